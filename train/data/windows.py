# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Split rows that are too long for the model into windows, without decoding a frame.

A window is a row with its own `start` and `end`. It ends after a reply or before a question, as late as the limits
allow, and so never between a question and its reply. A stretch without such a place is cut at the limit.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from datasets import Dataset

from videollm_mod.train.data.dialogues import ceil_frame, floor_frame, last_frame, round_frame
from videollm_mod.train.data.faults import (
    WHERE,
    FaultyRowError,
    RowRecord,
    counted,
    list_lines,
    name_row,
    naming,
    open_video,
)
from videollm_mod.train.data.feature_files import FeatureSource, StoredFeatures, read_header


# The longest video of VideoLLM-online with 10 tokens a frame, at 2 frames per second.
MAX_FRAMES = 1200
NO_ROW_LEFT = "no row is left: none has a window with anything to learn."
# Keys of a complete row that its windows lack: what its score needs.
_SCORED = ("task", "truth")


class Window(NamedTuple):
    """Frames `first` to `stop` of a row with `num_frames`, the frame `stop` excluded."""

    first: int
    stop: int
    num_frames: int

    @property
    def is_complete(self) -> bool:
        """Whether this is the complete row."""
        return self.stop - self.first == self.num_frames


@dataclass(frozen=True)
class Windows:
    """
    Find the windows of rows.

    Args:
        processor ([`VideoLLMMoDProcessor`], *optional*): Counts tokens.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        max_frames (`int`, *optional*, defaults to 1200): Most frames of a window.
        max_tokens (`int`, *optional*): Most tokens of a window: the model's context, or fewer. Needs a processor.
        num_replies (`int`, *optional*, defaults to 0): Number of earlier replies that a window begins with, as text.
    """

    processor: Any | None = None
    fps: float = 2.0
    max_frames: int = MAX_FRAMES
    max_tokens: int | None = None
    num_replies: int = 0

    def __post_init__(self) -> None:
        if self.max_frames < 1:
            raise ValueError(f"`max_frames` must be at least 1, got {self.max_frames}.")
        if self.num_replies < 0:
            raise ValueError(f"`num_replies` must not be negative, got {self.num_replies}.")

    def find(self, row: dict[str, Any]) -> list[Window]:
        """
        Return the windows of a row, in order. Windows without anything to learn are left out.

        Raises:
            [`FaultyRowError`]: If the text between two frames fills a window, or a file cannot be read.
        """
        with naming(row):
            # Most rows are short, and their files stay closed.
            for most in (self.max_frames, 0):
                num_frames = count_frames(row, fps=self.fps, most=most)
                dialogue = Dialogue(row, num_frames, self.fps)
                if self._fits(dialogue, 0, num_frames):
                    return [Window(0, num_frames, num_frames)]
            windows, first = [], 0
            while first < num_frames:
                window = Window(first, self._find_stop(dialogue, first), num_frames)
                windows += [window] if dialogue.teaches(window) else []
                first = window.stop
        return windows

    def surely_fit(self, seconds: float) -> bool:
        """Return whether rows of this length need no window, if they have at most half as much text as frames."""
        frames = math.ceil(seconds * self.fps) + 1
        return frames <= self.max_frames and (
            self.max_tokens is None or 1.5 * frames * self._tokens_per_frame <= self.max_tokens
        )

    @property
    def _tokens_per_frame(self) -> int:
        return self.processor.frame_num_tokens + self.processor.frame_text_tokens

    def _find_stop(self, dialogue: "Dialogue", first: int) -> int:
        most = min(first + self.max_frames, dialogue.num_frames)
        places = [place for place in dialogue.places if first < place <= most]
        # A window with more frames has more tokens.
        if (stop := self._last_that_fits(dialogue, first, places)) is not None:
            return stop
        if (stop := self._last_that_fits(dialogue, first, range(first + 1, most + 1))) is not None:
            return stop
        if (count := self._count(dialogue, first, first + 1)) <= self.max_tokens:
            return first + 1
        raise ValueError(
            f"messages: the text at {dialogue.time(first):g} s needs {count} tokens with its frame, and a window has "
            f"at most {self.max_tokens}. Shorten it."
        )

    def _last_that_fits(self, dialogue: "Dialogue", first: int, stops: Sequence[int]) -> int | None:
        low, high = 0, len(stops)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(dialogue, first, stops[middle - 1]) else (low, middle - 1)
        return stops[low - 1] if low else None

    def _fits(self, dialogue: "Dialogue", first: int, stop: int) -> bool:
        count = stop - first
        if count > self.max_frames:
            return False
        if self.max_tokens is None:
            return True
        if dialogue.sizes is None:
            texts = [self.processor.system_prompt, *(message["content"] for message in dialogue.all)]
            # The processor writes a special token in a message as plain text.
            options = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
            ids = self.processor.tokenizer(texts, **options)["input_ids"]
            dialogue.sizes = dict(zip(texts, map(len, ids), strict=True))
        messages = dialogue.messages(first, stop, self.num_replies)
        if not messages or messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.processor.system_prompt}, *messages]
        text = sum(dialogue.sizes[message["content"]] + self._overheads[message["role"]] for message in messages)
        return count * self._tokens_per_frame + text <= self.max_tokens

    @cached_property
    def _overheads(self) -> dict[str, int]:
        """
        How many tokens a message of each role needs beside those of its content, at most.

        To count complete windows exactly would take most of the time before training.
        """
        system, options = {"role": "system", "content": "a"}, {"num_frames": 4, "fps": 1.0}
        without = count_tokens(self.processor, [system], **options)
        found = {"system": without - 3 * self._tokens_per_frame - self.processor.frame_num_tokens}
        for role in ("user", "assistant"):
            message = {"role": role, "content": "a", "time": 1.0}
            # One token more: the space before a content may become a token of its own.
            found[role] = count_tokens(self.processor, [system, message], **options) - without + 1
        return found

    def _count(self, dialogue: "Dialogue", first: int, stop: int) -> int:
        messages = dialogue.messages(first, stop, self.num_replies)
        start = dialogue.time(first)
        return count_tokens(self.processor, messages, stop - first, fps=self.fps, start=start)


class Dialogue:
    """
    The messages of a row by the frames that they follow.

    A message without a time comes before all frames.
    """

    def __init__(self, row: dict[str, Any], num_frames: int, fps: float) -> None:
        self.start, self.num_frames, self.fps = row.get("start") or 0.0, num_frames, fps
        self.all = [{k: v for k, v in message.items() if v is not None} for message in row["messages"]]
        self.slots = [self._slot(message) for message in self.all]
        # The number of tokens of each text, once it is known.
        self.sizes: dict[str, int] | None = None

    def _slot(self, message: dict[str, Any]) -> int:
        """Return the frame that a message follows, as [`~VideoLLMMoDProcessor.to_stream_turns`] does."""
        if "time" not in message:
            return -1
        return min(ceil_frame(message["time"] - self.start, self.fps), self.num_frames - 1)

    def time(self, frame: int) -> float:
        """Return the time of a frame in seconds."""
        return self.start + frame / self.fps

    @property
    def places(self) -> list[int]:
        """The frames before which a window may end: those after a reply, those of a question, and the end."""
        found, is_waiting = {self.num_frames}, False
        pairs = zip(self.slots, self.all, strict=True)
        for slot, group in groupby(pairs, key=lambda pair: pair[0]):
            roles = [message["role"] for _, message in group]
            if "user" in roles and not is_waiting:
                found.add(slot)
            is_waiting = roles[-1] == "user"
            if roles[-1] == "assistant":
                found.add(slot + 1)
        return sorted(found)

    def teaches(self, window: Window) -> bool:
        """Return whether a window has something to learn: a reply, or silence between two frames."""
        told = zip(self.all, self.slots, strict=True)
        return window.stop - window.first > 1 or any(
            message["role"] == "assistant" and window.first <= slot < window.stop for message, slot in told
        )

    def messages(self, first: int, stop: int, num_replies: int = 0) -> list[dict[str, Any]]:
        """
        Return the messages of a window. Messages that come before its first frame have no time.

        They are the system's message, the standing instruction and the last `num_replies` replies.
        """
        # The first frame may be later than a message that follows it. A window cannot have times before its start.
        inside = [
            {**message, "time": max(message["time"], self.time(first))} if slot == first > 0 else message
            for message, slot in zip(self.all, self.slots, strict=True)
            if first <= slot < stop
        ]
        if first == 0:
            return [message for message, slot in zip(self.all, self.slots, strict=True) if slot < 0] + inside
        earlier = [message for message, slot in zip(self.all, self.slots, strict=True) if slot < first]
        replies = [message for message in earlier if message["role"] == "assistant"]
        replies = [{**message, "learn": False} for message in replies[max(len(replies) - num_replies, 0) :]]
        system = [message for message in earlier if message["role"] == "system"]
        standing = self._standing_instruction(first)
        kept = [*system, *([] if standing is None else [standing]), *replies]
        return [{name: value for name, value in message.items() if name != "time"} for message in kept] + inside

    def _standing_instruction(self, first: int) -> dict[str, Any] | None:
        """
        Return the user's message that is in force at a frame.

        It is the last one before that was not answered at once, at its own frame. If all were, it is the last one with
        several replies.
        """
        standing, waits = None, False
        for index, (message, slot) in enumerate(zip(self.all, self.slots, strict=True)):
            if message["role"] != "user" or slot >= first:
                continue
            roles = [other["role"] for other in self.all[index + 1 : index + 3]]
            at_once = roles[:1] == ["assistant"] and self.slots[index + 1] == slot
            if not at_once or (not waits and roles == ["assistant", "assistant"]):
                standing, waits = message, waits or not at_once
        return standing


def count_frames(row: dict[str, Any], *, fps: float, most: float = math.inf) -> int:
    """
    Return the number of frames of a row, from its times, or else from the header of its video or features. A file of
    features always tells it. Features within a Parquet file would have to be read for it.

    Times may count a frame too many: if a row ends where its video does, there is none at the end.

    Args:
        row (`dict`): A row with `video` or `frame_features`: a path, or the frames themselves.
        fps (`float`): Frames per second.
        most (`int`, *optional*): Most frames to count by times alone. If a row has more, its video is opened, and the
            number is exact. Features within a Parquet file stay closed.
    """
    features, video = row.get("frame_features"), row.get("video")
    frames = video if features is None else features
    if not isinstance(frames, FeatureSource):
        return len(frames)
    start, end = row.get("start") or 0.0, row.get("end")
    if features is not None and (end is None or not isinstance(features, StoredFeatures)):
        shape, about = read_header(features)
        return len(frame_range(shape[0], about, row, fps=fps))
    count = math.inf if end is None else 1 + floor_frame(end - start, fps)
    if end is not None and (count <= most or features is not None):
        return count
    with open_video(video) as reader:
        seconds = reader.seconds
    # A URL may not tell its length.
    return count if count < seconds == math.inf else min(count, 1 + last_frame(seconds - start, fps))


def frame_range(count: int, about: dict[str, str], row: dict[str, Any], *, fps: float) -> range:
    """
    Return which frames of a file of frame features a row shows.

    Args:
        count (`int`): Number of frames in the file.
        about (`dict[str, str]`): Its metadata. The first frame is at second `start`.
        row (`dict`): A row, perhaps with `start` and `end`.
        fps (`float`): Frames per second.
    """
    begin, start, end = float(about.get("start", 0.0)), row.get("start"), row.get("end")
    first = 0 if start is None else max(0, round_frame(start - begin, fps))
    return range(first, count if end is None else min(count, floor_frame(end - begin, fps) + 1))


def count_tokens(
    processor: Any, messages: list[dict[str, Any]], num_frames: int, *, fps: float, start: float = 0.0
) -> int:
    """
    Return the number of tokens of timed messages with their frames, exactly and without pixels.

    Args:
        processor ([`VideoLLMMoDProcessor`]): The processor.
        messages (`list[dict]`): Messages with `role`, `content` and `time`.
        num_frames (`int`): Number of frames.
        fps (`float`): Frames per second.
        start (`float`, *optional*, defaults to 0.0): Time of the first frame.
    """
    turns = processor.to_stream_turns(messages, num_frames, fps=fps, start=start)
    if turns[0]["role"] != "system":
        turns = [{"role": "system", "content": processor.system_prompt}, *turns]
    more = 0
    if not processor.numbers_frames:
        # In a run, each frame after the second has the same tokens.
        shorter = [
            turn | {"num_frames": min(turn["num_frames"], 2)} if "num_frames" in turn else turn for turn in turns
        ]
        left_out = num_frames - sum(turn.get("num_frames", 0) for turn in shorter)
        more, turns = left_out * len(processor.encode_typical_frame()), shorter
    return len(processor.apply_chat_template(turns, tokenize=True)) + more


def cut_row(row: dict[str, Any], window: Window, *, fps: float, num_replies: int = 0) -> dict[str, Any]:
    """
    Return a window of a row as a row with its own `start`, `end` and `messages`.

    A video and a file of features keep their path. Frames that are in the row itself are cut.

    Args:
        row (`dict`): The row.
        window ([`Window`]): Its frames.
        fps (`float`): Frames per second.
        num_replies (`int`, *optional*, defaults to 0): Number of earlier replies to begin with.
    """
    dialogue, (first, stop, num_frames) = Dialogue(row, window.num_frames, fps), window
    part = {"start": dialogue.time(first), "messages": dialogue.messages(first, stop, num_replies)}
    if stop < num_frames or row.get("end") is not None:
        # Between two frames, so that rounding cannot add or lose one.
        part["end"] = dialogue.time(stop) - 0.5 / fps
    for name in ("video", "frame_features"):
        if row.get(name) is not None and not isinstance(row[name], FeatureSource):
            part[name] = row[name][first:stop]
    return {name: value for name, value in row.items() if name not in _SCORED} | part


def cut_beginning(row: dict[str, Any], max_frames: int, *, fps: float) -> dict[str, Any] | None:
    """
    Cut a row as VideoLLM-online's `max_frames_clip` does: before the run of frames that would pass a limit.

    A run of frames ends with a message. The messages of the last frame stay, and the frames after them do not.

    Args:
        row (`dict`): The row.
        max_frames (`int`): Most frames.
        fps (`float`): Frames per second.

    Returns:
        `dict`: The beginning of the row, or the row itself if it is short enough. `None` if no frame is left: the
        first run passes the limit.

    Raises:
        [`FaultyRowError`]: If a file cannot be read.
    """
    with naming(row):
        num_frames = count_frames(row, fps=fps, most=max_frames)
        if num_frames <= max_frames:
            return row
        ends = [slot + 1 for slot in Dialogue(row, num_frames, fps).slots]
        stop = max((end for end in ends if end <= max_frames), default=0)
        return cut_row(row, Window(0, stop, num_frames), fps=fps) if stop else None


def name_part(
    row: dict[str, Any], window: Window, windows: Windows, *, number: int, count: int, name: Any
) -> dict[str, Any]:
    """Return window `number` of `count` of a row, as [`cut_row`] does, with a name of its own."""
    if window.is_complete:
        return row
    part = cut_row(row, window, fps=windows.fps, num_replies=windows.num_replies)
    part["id"] = f"{name if row.get('id') is None else row['id']}/window-{number}"
    return {**part, WHERE: f"{name_row(row)}, window {number} of {count}"}


def parts_of(row: dict[str, Any], windows: Windows) -> list[dict[str, Any]]:
    """Return the windows of a row, as rows. See [`Windows.find`] for errors."""
    found = windows.find(row)
    options = {"count": len(found), "name": name_row(row)}
    return [name_part(row, window, windows, number=number, **options) for number, window in enumerate(found, 1)]


class _Cutter:
    """Cut windows when they are read. This is the transform of a data set of windows."""

    def __init__(self, rows: Sequence[dict[str, Any]], windows: Windows) -> None:
        self.rows, self.windows = rows, windows

    def __call__(self, places: dict[str, list[int]]) -> dict[str, list[Any]]:
        made = [self._cut(*place) for place in zip(*(places[name] for name in _COLUMNS), strict=True)]
        names = dict.fromkeys(name for row in made for name in row)
        return {name: [row.get(name) for row in made] for name in names}

    def _cut(self, index: int, number: int, count: int, *place: int) -> dict[str, Any]:
        row, window = self.rows[index], Window(*place)
        return name_part(row, window, self.windows, number=number, count=count, name=index)


_COLUMNS = ("row", "number", "count", "first", "stop", "num_frames")


def split_rows(
    rows: Dataset, windows: Windows, *, longest_row: float | None = None, left_out: RowRecord | None = None
) -> Dataset:
    """
    Return the windows of all rows, in order. A row that is short enough stays as it is.

    The result is a data set like others: its order comes from the sampler's seed, and training resumes at a step.

    Args:
        rows (`Dataset`): Rows, as [`load_split`] returns them.
        windows ([`Windows`]): The limits.
        longest_row (`float`, *optional*): Seconds of the longest row, if known: rows that surely fit are not read.
        left_out ([`RowRecord`], *optional*): Where to record rows that cannot be split, which are then left out.

    Raises:
        [`FaultyRowError`]: If rows cannot be split and `left_out` is not given, with a line for each, or if no row is
            left.
    """
    if longest_row is not None and windows.surely_fit(longest_row):
        return rows
    places: dict[str, list[int]] = {name: [] for name in _COLUMNS}
    is_split, faults = False, []
    for index in range(len(rows)):
        try:
            found = windows.find(rows[index])
        except FaultyRowError as error:
            faults.append(str(error))
            found = []
        is_split |= not (len(found) == 1 and found[0].is_complete)
        for number, window in enumerate(found, 1):
            for name, value in zip(_COLUMNS, (index, number, len(found), *window), strict=True):
                places[name].append(value)
    if faults and left_out is None:
        lines = f"{counted(len(faults), 'row')} cannot be split:\n{list_lines(faults)}"
        raise FaultyRowError(faults[0] if len(faults) == 1 else lines)
    for fault in faults:
        left_out.leave_out(fault)
    if not places["row"]:
        raise FaultyRowError(NO_ROW_LEFT)
    return Dataset.from_dict(places).with_transform(_Cutter(rows, windows)) if is_split else rows


@dataclass
class Survey:
    """
    What a run reads.

    Args:
        names (`list[str]`): The name of each window.
        frames (`list[int]`): Its number of frames.
        tokens (`list[int]`): Its number of tokens; empty if they were not counted.
        fps (`float`): Frames per second.
    """

    names: list[str]
    frames: list[int]
    tokens: list[int]
    fps: float

    def lines(self) -> Iterator[str]:
        """Yield lines for people."""
        tokens = f", {sum(self.tokens):,} tokens" if self.tokens else ""
        hours = sum(self.frames) / self.fps / 3600
        yield f"{counted(len(self.frames), 'window')}, {sum(self.frames):,} frames{tokens}, {hours:.2f} hours of video"
        for word, counts in (("frames", self.frames), ("tokens", self.tokens)):
            if counts:
                yield f"most {word}: {max(counts):,}, in {self.names[counts.index(max(counts))]}"
        if not self.tokens:
            yield "tokens are not counted: name the model, for example with --checkpoint"


def survey(rows: Dataset, windows: Windows) -> Survey:
    """Count frames and tokens of rows that [`split_rows`] returned. No frame is decoded."""
    found = Survey([], [], [], windows.fps)
    for index in range(len(rows)):
        row = rows[index]
        with naming(row):
            dialogue = Dialogue(row, count_frames(row, fps=windows.fps), windows.fps)
            found.names.append(name_row(row))
            found.frames.append(dialogue.num_frames)
            if windows.processor is not None:
                place = {"fps": windows.fps, "start": dialogue.start}
                found.tokens.append(count_tokens(windows.processor, dialogue.all, dialogue.num_frames, **place))
    return found
