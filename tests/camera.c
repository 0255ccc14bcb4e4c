// Copyright 2026 The VideoLLM-MoD contributors.
// SPDX-License-Identifier: Apache-2.0
// A camera of Linux, /dev/video0, for the process that preloads this library: 64 x 48 pixels, 20 frames a second, each
// brighter than the one before. After 10 frames it does what CAMERA says.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/videodev2.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { WIDTH = 64, HEIGHT = 48, SIZE = 2 * WIDTH * HEIGHT, PLACE = 8192, BUFFERS = 8, FRAMES = 10 };
static int camera = -1, waits, count, queue[BUFFERS], queued;
static unsigned char *memory;
static double due;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + 1e-9 * t.tv_nsec;
}

static int fails_with(int error) {
    errno = error;
    return -1;
}

static int is(const char *word) {
    const char *said = getenv("CAMERA");
    return said && !strcmp(said, word);
}

static int open_camera(int flags) {
    if (is("denied")) return fails_with(EACCES);
    if (is("busy")) return fails_with(EBUSY);
    camera = memfd_create("camera", 0);
    waits = !(flags & O_NONBLOCK), count = queued = 0;
    if (ftruncate(camera, PLACE * BUFFERS)) return -1;
    memory = mmap(NULL, PLACE * BUFFERS, PROT_READ | PROT_WRITE, MAP_SHARED, camera, 0);
    return camera;
}

#define OPEN(name)                                                          \
    int name(const char *path, int flags, ...) {                            \
        va_list rest;                                                       \
        va_start(rest, flags);                                              \
        int mode = va_arg(rest, int);                                       \
        va_end(rest);                                                       \
        if (!strcmp(path, "/dev/video0")) return open_camera(flags);        \
        int (*real)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);      \
        return real(path, flags, mode);                                     \
    }
OPEN(open)
OPEN(open64)

static int next_frame(struct v4l2_buffer *buffer) {
    if (count == FRAMES && is("unplugged")) return fails_with(ENODEV);
    double seconds = count == FRAMES && is("silent") ? 3600 : due - now();
    if (seconds > 0 && !waits) return fails_with(EAGAIN);
    if (seconds > 0) usleep(1e6 * seconds);
    buffer->index = queue[0], buffer->bytesused = count == 5 && is("spoilt") ? 0 : SIZE, buffer->flags = V4L2_BUF_FLAG_TIMESTAMP_MONOTONIC;
    memmove(queue, queue + 1, sizeof(int) * --queued);
    for (int at = 0; at < SIZE; at++) memory[PLACE * buffer->index + at] = at % 2 ? 128 : 20 + 5 * (count % 40);
    buffer->timestamp.tv_sec = due, buffer->timestamp.tv_usec = 1e6 * (due - (long)due);
    count++, due += 0.05;
    return 0;
}

int ioctl(int file, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    void *about = va_arg(rest, void *);
    va_end(rest);
    if (file != camera || camera < 0) {
        int (*real)(int, unsigned long, ...) = dlsym(RTLD_NEXT, "ioctl");
        return real(file, request, about);
    }
    struct v4l2_buffer *buffer = about;
    struct v4l2_pix_format *pixels = &((struct v4l2_format *)about)->fmt.pix;
    switch (request & 0xffffffff) {
    case VIDIOC_QUERYCAP:
        ((struct v4l2_capability *)about)->capabilities = V4L2_CAP_VIDEO_CAPTURE | V4L2_CAP_STREAMING;
        return 0;
    case VIDIOC_G_FMT:
    case VIDIOC_S_FMT:
        pixels->width = WIDTH, pixels->height = HEIGHT, pixels->pixelformat = V4L2_PIX_FMT_YUYV;
        pixels->field = V4L2_FIELD_NONE, pixels->bytesperline = 2 * WIDTH, pixels->sizeimage = SIZE;
        return 0;
    case VIDIOC_G_PARM:
        ((struct v4l2_streamparm *)about)->parm.capture.timeperframe = (struct v4l2_fract){1, 20};
        return 0;
    case VIDIOC_REQBUFS:
        ((struct v4l2_requestbuffers *)about)->count = BUFFERS;
        return 0;
    case VIDIOC_QUERYBUF:
        buffer->length = SIZE, buffer->m.offset = PLACE * buffer->index;
        return 0;
    case VIDIOC_QBUF:
        queue[queued++] = buffer->index;
        return 0;
    case VIDIOC_DQBUF:
        return next_frame(buffer);
    case VIDIOC_STREAMON:
        due = now();
        return 0;
    case VIDIOC_G_INPUT:
        *(int *)about = 0;
        return 0;
    case VIDIOC_STREAMOFF:
    case VIDIOC_S_INPUT:
    case VIDIOC_ENUMINPUT:
        return 0;
    default:
        return fails_with(ENOTTY);
    }
}
