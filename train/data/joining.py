# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Join videos to one, one after the other, without encoding them again."""

import json
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from videollm_mod.data_paths import VIDEO_FORMATS
from videollm_mod.outputs import replacing, write_text
from videollm_mod.space.uploads import demux
from videollm_mod.train.data.child_processes import CrashError
from videollm_mod.train.data.converters import Notes, Video, Videos
from videollm_mod.video_reading_videollm_mod import VideoReader


# Which files were joined to which, in the folder of joined videos.
_RECORD = ".joined.json"
_MP4 = (".mp4", ".m4v", ".mov")
# Seconds by which the announced length of a video may differ from that of its pictures.
_TOLERANCE = 1


class JoiningError(ValueError):
    """Videos cannot be joined. The message is a reason without names, as a table of [`Notes`] counts it."""


def open_joined(
    videos: Videos, notes: Notes, where: str, field: str, *, name: str, members: Sequence[str]
) -> Video | None:
    """
    Return the video that several videos give in order, or note why there is none.

    A video of this name in the folder of videos is taken as it is. Otherwise `videos.made_folder` gets one, unless it
    has one of these same files.

    Args:
        videos ([`Videos`]): Finds the videos.
        notes ([`Notes`]): Where to count.
        where, field (`str`): The entry and its field, for notes.
        name (`str`): Name of the joined video, without extension.
        members (sequence of `str`): Names of the videos, in order. Empty if they are unknown.
    """
    if videos.find(name) is not None:
        return videos.open(notes, where, field, name)
    field = f"{field} (members: {', '.join(members)})" if members else field
    found = [videos.find(member) for member in members]
    if not members or videos.made_folder is None or os.path.basename(name) != name:
        notes.leave_out(where, field, "a group without its joined video")
        return None
    if None in found:
        notes.leave_out(where, field, "a group without its joined video: not all its members are there")
        return None
    paths = [video.path for video in found]
    try:
        path = _join_once(videos, name, paths)
    except (JoiningError, CrashError) as error:
        reason = "a member crashes the program that reads it" if isinstance(error, CrashError) else str(error)
        notes.leave_out(where, field, f"a group without its joined video: {reason}")
        return None
    videos.add(name, path)
    notes.mended(where, field, "a group without its joined video: joined from its members", by_rule=True)
    return videos.open(notes, where, field, name)


def join_videos(paths: Sequence[Path], out: Path) -> None:
    """
    Copy the pictures of videos into one file, each video where the one before it ends. The sound is left out.

    Args:
        paths (sequence of `Path`): The videos, in order.
        out (`Path`): The file, an mp4 or a Matroska file by its extension. It is written as a whole, or not at all.

    Raises:
        [`JoiningError`]: If a video cannot be read, or if the videos differ in what a decoder must know at the start:
            codec and its settings, size, format and direction of pictures.
        `OSError`: If the file cannot be written.
    """
    if len({_describe(path) for path in paths}) != 1:
        raise JoiningError("its members differ in codec, settings or size of pictures, and are not encoded again")
    format_name = "mp4" if out.suffix == ".mp4" else "matroska"
    with replacing(out) as part, av.open(f"file:{part}", "w", format=format_name) as target:
        copy, begin, last = None, Fraction(0), None
        for path in paths:
            with VideoReader(path, formats=VIDEO_FORMATS) as reader:
                if copy is None:
                    copy = target.add_stream_from_template(reader.stream, opaque=True)
                    copy.time_base = reader.stream.time_base
                end = Fraction(0)
                for packet in _packets(reader):
                    shift = round((begin - reader.origin) / packet.time_base)
                    end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base - reader.origin)
                    packet.pts, packet.dts = packet.pts + shift, packet.dts + shift
                    # Times at which to decode must rise, also where one video ends and the next begins.
                    if last is not None and packet.dts * packet.time_base <= last:
                        packet.dts = int(last / packet.time_base) + 1
                    if packet.dts > packet.pts:
                        raise JoiningError("the times of pictures in its members do not follow each other")
                    last = packet.dts * packet.time_base
                    packet.stream = copy
                    target.mux(packet)
                if abs(end - Fraction(reader.seconds)) > _TOLERANCE:
                    raise JoiningError("a member is damaged, or its clock changes")
            begin += end


def _join_once(videos: Videos, name: str, paths: list[Path]) -> Path:
    """Return the joined file. It is written if it is not there, or was joined from other files."""
    folder = videos.made_folder
    path = folder / f"{name}{'.mp4' if paths[0].suffix.lower() in _MP4 else '.mkv'}"
    try:
        known = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    states = [[str(member.absolute()), member.stat().st_size, member.stat().st_mtime_ns] for member in paths]
    if not path.is_file() or known.get(name) != states:
        folder.mkdir(parents=True, exist_ok=True)
        videos.call(join_videos, paths, path)
        write_text(folder / _RECORD, json.dumps({**known, name: states}) + "\n")
    return path


def _describe(path: Path) -> tuple[Any, ...]:
    """Return what must be equal in all parts of a file."""
    try:
        with VideoReader(path, formats=VIDEO_FORMATS) as reader:
            codec = reader.stream.codec_context
            _, _, frame = next(reader.frames())
            settings = codec.name, bytes(codec.extradata or b""), codec.width, codec.height, codec.pix_fmt
            return *settings, codec.sample_aspect_ratio, frame.rotation
    except (av.error.FFmpegError, ValueError, StopIteration, OSError):
        raise JoiningError("a member cannot be read") from None


def _packets(reader: VideoReader) -> Iterator[Any]:
    """Yield the packets of the pictures in the order of decoding, all with both times."""
    try:
        for packet in demux(reader.container, reader.stream):
            if packet.size:
                if packet.pts is None or packet.is_discard:
                    raise JoiningError("a member has pictures without a time, or hides some")
                packet.dts = packet.pts if packet.dts is None else packet.dts
                yield packet
    except av.error.FFmpegError:
        raise JoiningError("a member cannot be read") from None


__all__ = ["JoiningError", "join_videos", "open_joined"]
