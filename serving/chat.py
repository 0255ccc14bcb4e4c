# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions`: questions about pictures and videos that come with the request."""

import asyncio
import io
import json
import math
import secrets
import tempfile
import threading
import time as clock
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ..space.uploads import FORMATS, announces_too_much, has_too_much
from ..video_reading_videollm_mod import VideoReader, read_video
from .chat_messages import ChatRequest, Media
from .fetching import fetch, read_data_uri, read_picture
from .limits import RequestError
from .live_session import LiveSession
from .realtime_events import usage
from .session_options import SessionOptions
from .telling import Reply
from .text_limits import check_history


_FRAMES_AT_ONCE = 8


class Completion:
    """
    One request. Its session sees what the request shows, and answers the last message.

    Args:
        server ([`Server`]): The server.
        asked ([`ChatRequest`]): The request.
        owner (`str`, *optional*): To whom it belongs.
    """

    def __init__(self, server: Any, asked: ChatRequest, owner: str | None = None) -> None:
        self.server, self.asked, self.limits, self.owner = server, asked, server.limits, owner
        self.completion_id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(clock.time())
        self.session: LiveSession | None = None
        self.reply: Reply | None = None
        self.words: asyncio.Queue[str | None] = asyncio.Queue()
        self.num_frames, self.fps = 0, asked.fps
        self._files, self._stop = ExitStack(), threading.Event()
        self._next = 0.0  # time of the next frame
        self._ends = 0.0  # when the request takes too long, by the clock of the event loop
        self._num_bytes = 0  # of its files

    async def open(self) -> None:
        """Open a session. This comes before anything is fetched, so that a full server fetches nothing."""
        turns = [part for part in self.asked.parts if isinstance(part, tuple)]
        turns += [] if self.asked.question is None else [("user", self.asked.question)]
        await self.server.sessions.run(lambda: check_history(self.server.engine, self.asked.system_prompt, turns))
        options = {"system_prompt": self.asked.system_prompt, "when_behind": "block"}
        self.session = await self.server.sessions.open(
            SessionOptions(unprompted=False),
            instructions="",
            owner=self.owner,
            max_output_tokens=self.asked.max_tokens,
            stream_options=options,
        )
        self.session.listeners.append(self._listen)

    async def begin(self) -> None:
        """Fetch what the request names, show it, and ask. Raise [`RequestError`] if that fails."""
        self._ends = asyncio.get_running_loop().time() + self.limits.show_seconds
        late = asyncio.get_running_loop().call_at(self._ends, self._stop.set)
        try:
            media = [await self._fetch(part) if isinstance(part, Media) else part for part in self.asked.parts]
            self._choose_fps(media)
            for part, shown in zip(self.asked.parts, media, strict=True):
                if isinstance(part, tuple):
                    await self.session.ask(part[1], reply_now=False, role=part[0])
                else:
                    self._refuse_if_late(part.param)
                    await self._show(shown)
            self.asked.parts.clear()  # they may hold files
            self.reply = await self.session.ask(self.asked.question)
            # Without a frame, a stream answers at its end.
            await self.session.finish()
        except BaseException:
            await self.end()
            raise
        finally:
            late.cancel()

    async def end(self) -> None:
        """End the session and delete files."""
        self._stop.set()
        self._files.close()
        if self.session is not None:
            await self.session.close()

    def _listen(self, kind: str, *what: Any) -> None:
        if kind == "words":
            self.words.put_nowait(what[1])
        elif kind in ("end", "over"):
            self.words.put_nowait(None)

    async def _fetch(self, part: Media) -> Any:
        """Return a picture, or the name of a file with a video."""
        self.session.touch()
        self._refuse_if_late(part.param)
        is_picture = part.kind == "image_url"
        try:
            with ExitStack() as stack:
                file = io.BytesIO() if is_picture else stack.enter_context(tempfile.NamedTemporaryFile())
                await self._copy(part, file)
                if is_picture:
                    data = file.getvalue()
                    return await self.server.sessions.run(lambda: read_picture(data, self.limits, param=part.param))
                file.flush()
                self._files.push(stack.pop_all())
        except OSError as error:
            wrong = f"The server cannot keep the file ({error.strerror}): try again later."
            raise RequestError(wrong, status=503, code="server_busy", param=part.param, retry_after=5) from None
        video = Media(part.kind, file.name, part.param)
        return replace(video, seconds=await self.session.work(lambda: self._measure(video)))

    async def _copy(self, part: Media, file: Any) -> None:
        """Write a picture or a video into a file."""
        left = self.limits.max_video_bytes - self._num_bytes
        most = min(left, self.limits.max_frame_bytes) if part.kind == "image_url" else left
        try:
            if part.url[:5].lower() == "data:":
                decode = partial(read_data_uri, part.url, most_bytes=most, param=part.param)
                await self.server.sessions.run(lambda: file.write(decode()))
            else:
                seconds = min(self.limits.fetch_seconds, self._ends - asyncio.get_running_loop().time())
                limits = {"most_bytes": most, "seconds": seconds, "param": part.param}
                await fetch(part.url, file, allows_private=self.server.allows_private_urls, **limits)
        except RequestError as error:
            if asyncio.get_running_loop().time() >= self._ends:
                self._stop.set()
                self._refuse_if_late(part.param)
            if error.code == "file_too_large" and most == left < self.limits.max_video_bytes:
                wrong = "The pictures and videos of the request have more than "
                wrong += f"{self.limits.max_video_bytes} bytes together, which is the limit."
                raise RequestError(wrong, status=413, code="file_too_large", param=part.param) from None
            raise
        self._num_bytes += file.tell()

    def _choose_fps(self, media: list[Any]) -> None:
        """See all videos at `fps`, or at a lower rate if the stream would forget frames of this request otherwise."""
        lengths = [part.seconds for part in media if isinstance(part, Media)]
        num_pictures = sum(not isinstance(part, (Media, tuple)) for part in media)
        left = self.session.stream.session.max_frames - num_pictures
        if sum(lengths) and sum(math.ceil(seconds * self.fps) for seconds in lengths) > left:
            # Each video has up to one frame more than its share.
            self.fps = min(self.fps, max(1, left + 1 - len(lengths)) / sum(lengths))

    async def _show(self, shown: Any) -> None:
        """Show a picture or a video."""
        if isinstance(shown, Media):
            await self.session.work(lambda: self._show_video(shown))
        else:
            await self.session.show([shown], [self._next])
            self.num_frames += 1
            self._next += 1 / self.fps

    def _show_video(self, video: Media) -> None:
        """Show a video file."""
        begin, waiting = self._next, []
        for time, frame in self._read(video):
            waiting.append((begin + time, frame))
            if len(waiting) == _FRAMES_AT_ONCE:
                self._push(waiting)
        self._push(waiting)
        self._next += 1 / self.fps

    def _read(self, video: Media) -> Iterator[tuple[float, Any]]:
        """Yield the frames of a video file. Raise [`RequestError`] if it cannot be read, or not in time."""
        try:
            # The frames may last longer than the file has said.
            yield from read_video(self._open(video), fps=self.fps, end=video.seconds)
        except (ValueError, OSError):
            self._refuse_if_late(video.param)  # a reader that was stopped may have found no frame
            raise _unreadable(video) from None
        self._refuse_if_late(video.param)

    def _refuse_if_late(self, param: str | None) -> None:
        if self._stop.is_set():
            wrong = "The pictures and videos of the request were not fetched and seen within "
            wrong += f"{self.limits.show_seconds:g} s, which is the limit."
            raise RequestError(wrong, status=413, code="video_too_large", param=param)

    def _open(self, video: Media) -> VideoReader:
        return VideoReader(video.url, formats=FORMATS, max_pixels=self.limits.max_frame_pixels, stop=self._stop)

    def _measure(self, video: Media) -> float:
        """Return the length of a video in seconds. Raise [`RequestError`] if it is too long or too large."""
        is_too_much = announces_too_much(video.url)
        try:
            if not is_too_much:
                with self._open(video) as reader:
                    is_too_much = has_too_much(reader)
            if is_too_much:
                wrong = "The video has too many frames, or too many in a second."
                raise RequestError(wrong, status=413, code="video_too_large", param=video.param)
            with self._open(video) as reader:
                seconds, pixels = reader.seconds, reader.stream.width * reader.stream.height
        except RequestError:
            raise
        except (ValueError, OSError):
            raise _unreadable(video) from None
        if seconds > self.limits.max_video_seconds or pixels > self.limits.max_frame_pixels:
            wrong = f"The video has {seconds:.0f} s and {pixels} pixels; the limits are "
            wrong += f"{self.limits.max_video_seconds:g} s and {self.limits.max_frame_pixels} pixels."
            raise RequestError(wrong, status=413, code="video_too_large", param=video.param)
        return seconds

    def _push(self, waiting: list[tuple[float, Any]]) -> None:
        if waiting:
            self.session.touch()  # a long video may take longer than `idle_seconds`
            times, frames = zip(*waiting, strict=True)
            self.session.stream.push(list(frames), time=list(times))
            self.num_frames, self._next = self.num_frames + len(times), times[-1]
            waiting.clear()

    # -------------------------------------------------------------------------------------------------------- answers

    async def whole(self) -> dict[str, Any]:
        """Return the completion when it is finished."""
        await self.session.until(lambda: self.reply.is_over)
        message = {"role": "assistant", "content": self.reply.text}
        choice = {"index": 0, "message": message, "finish_reason": self._finish_reason, "logprobs": None}
        return self._object("chat.completion", [choice]) | {"usage": self._usage} | self._extension

    async def chunks(self) -> AsyncIterator[str]:
        """Yield the completion as server-sent events."""
        try:
            yield self._chunk({"role": "assistant", "content": ""})
            while (words := await asyncio.wait_for(self.words.get(), self.limits.reply_seconds)) is not None:
                yield self._chunk({"content": words})
            await self.session.until(lambda: self.reply.is_over)
            yield self._chunk({}, self._finish_reason, **self._extension)
            if self.asked.include_usage:
                chunk = self._object("chat.completion.chunk", []) | {"usage": self._usage}
                yield f"data: {json.dumps(chunk)}\n\n"
            yield "data: [DONE]\n\n"
        except (TimeoutError, asyncio.TimeoutError):
            late = RequestError("The model has not answered in time.", status=504, code="timeout")
            yield f"data: {json.dumps({'error': late.to_dict()})}\n\n"
        except RequestError as error:
            yield f"data: {json.dumps({'error': error.to_dict()})}\n\n"
        finally:
            await self.end()

    def _chunk(self, delta: dict[str, Any], reason: str | None = None, **added: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        usage_later = {"usage": None} if self.asked.include_usage else {}
        chunk = self._object("chat.completion.chunk", [choice]) | usage_later | added
        return f"data: {json.dumps(chunk)}\n\n"

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        named = {"id": self.completion_id, "object": kind, "created": self.created, "model": self.server.name}
        return named | {"choices": choices}

    @property
    def _finish_reason(self) -> str:
        return "length" if len(self.reply.event.token_ids) >= self.session.max_output_tokens else "stop"

    @property
    def _usage(self) -> dict[str, int]:
        counted = usage(self.reply)
        return {
            "prompt_tokens": counted["input_tokens"],
            "completion_tokens": counted["output_tokens"],
            "total_tokens": counted["total_tokens"],
        }

    @property
    def _extension(self) -> dict[str, Any]:
        shown = {"frames": self.num_frames, "fps": self.fps} if self.num_frames else {"frames": 0}
        return {"videollm_mod": shown}


class _Stream(StreamingResponse):
    """A completion as server-sent events. It ends the completion also if the client leaves before the first event."""

    def __init__(self, completion: Completion) -> None:
        super().__init__(completion.chunks(), media_type="text/event-stream")
        self.completion = completion

    async def __call__(self, *arguments: Any) -> None:
        try:
            await super().__call__(*arguments)
        finally:
            await self.completion.end()


def _unreadable(video: Media) -> RequestError:
    return RequestError("This is not a readable video.", code="invalid_video", param=video.param)


async def answer(completion: Completion, request: Request) -> Response:
    """Finish a started completion and return its answer."""
    if completion.asked.stream:
        return _Stream(completion)
    try:
        return JSONResponse(await unless_gone(request, completion.whole()))
    finally:
        await completion.end()


async def unless_gone(request: Request, work: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns. Cancel it and raise [`RequestError`] if the client leaves before that."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_wait_until_gone(request))
    try:
        await asyncio.wait([task, gone], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise RequestError("The client left before the answer.", status=499, code="client_left")
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.wait([task, gone])


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


__all__ = ["Completion", "answer", "unless_gone"]
