# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Turn dialogues and videos into one training batch with labels."""

import gc
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainerState

from videollm_mod.train.data.faults import FaultyRowError, RowRecord, name_row, naming, read_clip
from videollm_mod.train.data.feature_files import FeatureSource, StoredFeatures, read_features, read_header
from videollm_mod.train.data.windows import frame_range


# Frames that are decoded and resized at a time.
_FRAMES_TOGETHER = 32


# A forked worker must not free decoders that this process left over: their threads do not exist there.
if sys.platform != "win32":
    os.register_at_fork(after_in_child=gc.freeze)


class StreamCollator:
    """
    Make a training batch from examples `{"messages": ..., "video" or "frame_features": ..., "start", "end"}`.

    Padding is on the right, where causal attention hides it from the real tokens, so the batch has `position_ids` and
    no attention mask. Every entry is a tensor with a batch dimension, so that a batch can be split by rows. The model
    needs `num_frames` on the host: on a GPU a step waits for them once.

    Pixels stay uint8, a quarter of float32: call [`normalize_pixels`] where the model is. Frames are resized as they
    are decoded, so that a worker holds them at most twice.

    Args:
        processor ([`VideoLLMMoDProcessor`]): Makes tokens, labels and pixels.
        fps (`float`, *optional*, defaults to 2.0): Frame rate of the videos, and of timed messages.
        augmentation (`float`, *optional*, defaults to 0.0): Share of replies to corrupt (see [`augment_replies`]). Use
            a separate collator with 0 for evaluation.
        seed (`int`, *optional*, defaults to 0): Seed of the augmentation, which also depends on the epoch
            (see [`EpochTeller`]).
        packing (`bool`, *optional*, defaults to `False`): Whether to pack the dialogues into one row without padding.
            They do not see each other.
        record ([`RowRecord`], *optional*): Where to note the row at work and the rows that were left out.
        frame_feature_shape (`tuple[int, int]`, *optional*): The model's, which files of frame features must have.
        replacements (sequence of `dict`, *optional*): All rows. If a row cannot be read, the next row that can be read
            takes its place, so that batches keep their size and distributed processes take the same steps. Without
            them, such a row raises [`FaultyRowError`].
    """

    def __init__(
        self,
        processor: Any,
        fps: float = 2.0,
        *,
        augmentation: float = 0.0,
        seed: int = 0,
        packing: bool = False,
        record: RowRecord | None = None,
        replacements: Sequence[dict[str, Any]] | None = None,
        frame_feature_shape: tuple[int, int] | None = None,
    ) -> None:
        if not 0 <= augmentation <= 1:
            raise ValueError(f"`augmentation` is a share from 0 to 1, got {augmentation}.")
        self.processor = processor
        self.fps = fps
        self.augmentation = augmentation
        self.seed = seed
        self.packing = packing
        self.record = record
        self.replacements = replacements
        self.frame_feature_shape = frame_feature_shape
        # In shared memory, because a persistent worker has its own copy of this object.
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return a batch for [`VideoLLMMoDForConditionalGeneration`]."""
        dialogues, frames = zip(*(self._read_or_replace(example) for example in examples), strict=True)
        are_pixels = isinstance(frames[0], _Pixels)
        if any(isinstance(shown, _Pixels) != are_pixels for shown in frames):
            raise ValueError("A batch has rows with `video` and with `frame_features`: use one kind in a data set.")
        # The processor would normalise pixels. It only needs to know how many frames there are.
        features = [torch.empty(len(shown), 0) for shown in frames] if are_pixels else list(frames)
        batch = self.processor(list(dialogues), frame_features=features, return_labels=True, padding_side="right")
        mask = batch.pop("attention_mask")
        batch["num_frames"] = torch.tensor([len(shown) for shown in frames])
        batch["position_ids"] = torch.arange(mask.shape[1]).repeat(len(mask), 1)
        batch = _pack(batch, mask.bool()) if self.packing else dict(batch)
        if are_pixels:
            del batch["frame_features"]
            batch["pixel_values_videos"] = _join_pixels(frames, packing=self.packing)
        return batch

    def _read_or_replace(self, example: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        """Return the dialogue and the frames of an example, or those of the next row that can be read."""
        try:
            return self._read(example)
        except FaultyRowError as error:
            if not self.replacements:
                raise
            self.record.leave_out(str(error))
        count = len(self.replacements)
        # The choice depends only on the row, so a resumed run makes the same one.
        first = zlib.crc32(name_row(example).encode(errors="replace"))
        for index in range(count):
            try:
                return self._read(self.replacements[(first + index) % count])
            except FaultyRowError as error:
                self.record.leave_out(str(error))
        raise FaultyRowError(f"none of the {count} rows can be read.")

    def _read(self, example: dict[str, Any]) -> tuple[list[dict[str, Any]], Any]:
        """Return the dialogue and the frames of an example."""
        at_work = nullcontext() if self.record is None else self.record.working_on(example)
        with at_work, naming(example):
            start = example.get("start") or 0.0
            has_features = example.get("frame_features") is not None
            shown = self.read_features(example) if has_features else self._frames(example)
            messages = example.get("messages")
            if not isinstance(messages, (list, tuple)):
                raise ValueError(f"`messages` must be a list of messages, got {type(messages).__name__}.")
            messages = [_without_nulls(message) for message in messages]
            turns = self.processor.to_stream_turns(messages, len(shown), fps=self.fps, start=start)
        # The generator depends only on seed, epoch and dialogue. A resumed run, or one with another number of
        # workers, corrupts the same replies.
        epoch = example.get("epoch")
        # A row of a user may have such a field too.
        epoch = epoch if type(epoch) is int and epoch >= 0 else int(self.epoch)
        rng = np.random.default_rng((self.seed, epoch, zlib.crc32(repr(messages).encode())))
        return augment_replies(turns, rng, self.augmentation), shown

    def _frames(self, example: dict[str, Any]) -> "_Pixels":
        video = example.get("video")
        if video is None:
            raise ValueError("a row needs `video` or `frame_features`, this one has neither.")
        if isinstance(video, (str, Path)):
            video = (frame for _, frame in read_clip(example, fps=self.fps, record=self.record))
        elif isinstance(video, list):
            video = iter(video)
        if not isinstance(video, Iterator):
            return _Pixels([self.processor.resize_frames(video)])
        stacks = []
        while some := list(islice(video, _FRAMES_TOGETHER)):
            stacks.append(self.processor.resize_frames(some))
        return _Pixels(stacks or [self.processor.resize_frames([])])

    def read_features(self, example: dict[str, Any]) -> torch.Tensor:
        """
        Return the frame features (frames, features, width) of an example.

        Raises:
            `ValueError`: If they have another frame rate or shape than the model's.
        """
        source = example["frame_features"]
        if not isinstance(source, FeatureSource):
            return _as_features(source)
        name = "the row" if isinstance(source, (bytes, StoredFeatures)) else f"'{source}'"
        shape, about = read_header(source)
        fps = float(about.get("fps", self.fps))
        if fps != self.fps:
            raise ValueError(f"{name} has features at {fps:g} frames per second, but `fps` is {self.fps:g}.")
        features = read_features(source, frame_range(shape[0], about, example, fps=fps))
        if self.frame_feature_shape is not None and features.shape[1:] != self.frame_feature_shape:
            shapes = (features.shape[1:], self.frame_feature_shape)
            found, expected = (f"{count} features of width {width} per frame" for count, width in shapes)
            raise ValueError(f"{name} has {found}, but the model reads {expected}. Encode the frames again.")
        return features


class EpochTeller(TrainerCallback):
    """
    Pass the epoch to a collator, so that each epoch corrupts different replies.

    Args:
        collator ([`StreamCollator`]): The collator of the training data.
    """

    def __init__(self, collator: StreamCollator) -> None:
        self.collator = collator

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Set the epoch before the first batch is made."""
        self.collator.epoch.fill_(int(state.epoch))


def _pack(batch: dict[str, Any], real: torch.BoolTensor) -> dict[str, Any]:
    """Concatenate the rows of tokens and of frames, without their padding."""
    num_frames = batch["num_frames"]
    packed = {name: batch[name][real][None] for name in ("input_ids", "labels", "position_ids")}
    packed["seq_idx"] = torch.arange(len(real))[:, None].expand_as(real)[real][None]
    packed["num_frames"] = num_frames.sum()[None]
    shown = [row[:count] for row, count in zip(batch["frame_features"], num_frames, strict=True)]
    packed["frame_features"] = torch.cat(shown)[None]
    return packed


class _Pixels:
    """Resized frames of a row, uint8, in stacks (frames, channels, height, width)."""

    def __init__(self, stacks: list[torch.Tensor]) -> None:
        sizes = {f"{stack.shape[-2]} x {stack.shape[-1]}" for stack in stacks}
        if len(sizes) > 1:
            raise ValueError(f"Frames must have one size, got {' and '.join(sorted(sizes))}: set `do_resize=True`.")
        self.stacks, self.count = stacks, sum(map(len, stacks))

    def __len__(self) -> int:
        return self.count

    def move_to(self, place: torch.Tensor) -> None:
        """Copy the frames to a place (frames, channels, height, width), and free them one stack after the other."""
        begin = 0
        while self.stacks:
            stack = self.stacks.pop(0)
            place[begin : begin + len(stack)] = stack
            begin += len(stack)


def _join_pixels(rows: Sequence[_Pixels], *, packing: bool) -> torch.Tensor:
    """Return the frames of rows (batch, frames, channels, height, width), padded with zeros, or all in one row."""
    counts, shape = [len(row) for row in rows], rows[0].stacks[0].shape[1:]
    size = (1, sum(counts)) if packing else (len(rows), max(counts))
    joined = torch.zeros(*size, *shape, dtype=torch.uint8)
    begin = 0
    for index, row in enumerate(rows):
        row.move_to(joined[0, begin:] if packing else joined[index])
        begin += counts[index]
    return joined


def normalize_pixels(batch: dict[str, Any], processor: Any, *, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """
    Return a batch of [`StreamCollator`] with normalised pixels, which the model reads.

    Args:
        batch (`dict`): The batch. One with frame features, or with normalised pixels, stays as it is.
        processor ([`VideoLLMMoDProcessor`]): Normalises frames.
        dtype (`torch.dtype`, *optional*): Dtype of the result, such as the vision encoder's. Default: float32.
    """
    pixels = batch.get("pixel_values_videos")
    if pixels is None or pixels.dtype != torch.uint8:
        return batch
    normalized = torch.empty(pixels.shape, dtype=dtype or torch.float32, device=pixels.device)
    # In parts: the library's float32 copies of a long video would not fit.
    for part, place in zip(
        pixels.flatten(0, 1).split(_FRAMES_TOGETHER), normalized.flatten(0, 1).split(_FRAMES_TOGETHER), strict=True
    ):
        place.copy_(processor.normalize_frames(part))
    return {**batch, "pixel_values_videos": normalized}


def _as_features(given: Any) -> torch.Tensor:
    try:
        features = torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"`frame_features` must be a path or numbers, got {type(given).__name__}.") from error
    if features.ndim != 3:
        shape = tuple(features.shape)
        raise ValueError(f"`frame_features` must be of shape (frames, features, width), got {shape}.")
    return features


def _without_nulls(message: Any) -> Any:
    return {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else message


def augment_replies(turns: list[dict[str, Any]], rng: np.random.Generator, share: float) -> list[dict[str, Any]]:
    """
    Corrupt some replies, so that the model watches the video instead of copying earlier text.

    This is the augmentation of VideoLLM-online's code. A reply that follows a frame is left out, emptied, or
    replaced by another reply of the dialogue. In half of the cases the next frame brings the correct reply. The loss
    ignores what is wrong: the text of a false reply, and the silence in place of a missing one.

    Args:
        turns (`list[dict]`): System, user, assistant and stream messages, as `to_stream_turns` returns them.
        rng (`np.random.Generator`): Source of all random choices.
        share (`float`): Probability that a reply is corrupted.

    Returns:
        `list[dict]`: Turns with the same total number of frames.
    """
    texts = sorted({turn["content"] for turn in turns if turn["role"] == "assistant"})
    result: list[dict[str, Any]] = []
    turns = [dict(turn) for turn in turns]
    for index, turn in enumerate(turns):
        after_frame = bool(result) and result[-1]["role"] == "stream"
        if turn["role"] != "assistant" or not after_frame or rng.random() >= share:
            _append(result, turn)
            continue
        following = turns[index + 1] if index + 1 < len(turns) else {}
        # A correction takes the next frame, which must not be the one at which the next reply comes.
        # Other turns may have `num_frames` too, which says nothing.
        corrected = following.get("role") == "stream" and following["num_frames"] > 1 and rng.random() < 0.5
        others = [text for text in texts if text != turn["content"]]
        how = str(rng.choice(["left out", "emptied", *(["replaced"] if others else [])]))
        if how == "left out":
            result[-1]["learn"] = [*_learned(result[-1])[:-1], False]
        else:
            content = str(rng.choice(others)) if how == "replaced" else ""
            result.append({**turn, "content": content, "learn": False})
        if corrected:
            rest, times = _learned(following), following.get("times")
            first = {} if times is None else {"times": times[:1]}
            _append(result, {"role": "stream", "num_frames": 1, "learn": rest[:1], **first})
            result.append(turn)
            following |= {"num_frames": following["num_frames"] - 1, "learn": rest[1:]}
            following |= {} if times is None else {"times": times[1:]}
    return result


def _append(turns: list[dict[str, Any]], turn: dict[str, Any]) -> None:
    """Append a turn, and merge frames into a stream turn before it."""
    if turn["role"] == "stream" and turns and turns[-1]["role"] == "stream":
        learned = _learned(turns[-1]) + _learned(turn)
        turns[-1] |= {"num_frames": len(learned), "learn": learned}
        turns[-1] |= {"times": turns[-1]["times"] + turn["times"]} if "times" in turn else {}
    else:
        turns.append(turn)


def _learned(turn: dict[str, Any]) -> list[bool]:
    learned = turn.get("learn", True)
    return [learned] * turn["num_frames"] if isinstance(learned, bool) else list(learned)
