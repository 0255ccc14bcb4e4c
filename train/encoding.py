# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Encode the frames of rows once, for `train/encode.py`, and those of a clip for tasks."""

import hashlib
import json
import time as clock
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset
from safetensors.torch import save_file
from tqdm.auto import tqdm

from videollm_mod.outputs import replacing, write_text
from videollm_mod.train.arguments import RowArguments
from videollm_mod.train.data.faults import (
    WHERE,
    FaultyRowError,
    RowRecord,
    counted,
    name_row,
    naming,
    read_clip,
)
from videollm_mod.train.data.shards import describing
from videollm_mod.train.data.sources import DataSource, load_split
from videollm_mod.train.loading import load_checkpoint, patient_accelerator


if TYPE_CHECKING:
    from videollm_mod.train.encode import EncodeArguments


def encode_rows(
    rows: Dataset,
    folder: Path,
    model: Any,
    processor: Any,
    *,
    fps: float = 2.0,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
    max_minutes: float | None = None,
    left_out: RowRecord | None = None,
) -> list[dict[str, Any]]:
    """
    Encode the video clips of rows. The processes of an accelerator share the work.

    Existing files are kept. Incomplete files of an interrupted run are deleted.

    Args:
        rows (`Dataset`): Timed messages with `video`, as [`load_split`] returns them.
        folder (`Path`): Folder to write to: `<hash>.safetensors`, each with one tensor `frame_features` of shape
            `(frames, features, width)` in the model's dtype, and its `fps` and `start` as metadata.
        model ([`VideoLLMMoDForConditionalGeneration`]): The model with `encode_frames`.
        processor ([`VideoLLMMoDProcessor`]): Reads videos and preprocesses frames.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        batch_size (`int`, *optional*, defaults to 64): Number of frames in memory at a time.
        accelerator (`Accelerator`, *optional*): Distributes rows over processes.
        max_minutes (`float`, *optional*): Time limit in minutes. At least one row is encoded.
        left_out ([`RowRecord`], *optional*): Where to record rows that cannot be read, which are then left out.

    Returns:
        `list[dict]`: The rows in order, with the file name `frame_features` instead of `video`.

    Raises:
        [`FaultyRowError`]: If a row cannot be read and `left_out` is not given.
    """
    accelerator = patient_accelerator() if accelerator is None else accelerator
    made: list[dict[str, Any]] = []
    if accelerator.is_local_main_process:
        for part in folder.glob("*.part"):
            part.unlink(missing_ok=True)
    accelerator.wait_for_everyone()
    encoder = _fingerprint(model, processor)
    end = clock.monotonic() + 60 * (float("inf") if max_minutes is None else max_minutes)
    with accelerator.split_between_processes(list(range(len(rows)))) as mine:
        for index in tqdm(mine, desc="rows", disable=not accelerator.is_main_process):
            if made and clock.monotonic() > end:
                break
            row = rows[index]
            name = _name(row, fps, encoder)
            try:
                with naming(row):
                    if not (folder / name).exists():
                        _encode(row, folder / name, model, processor, fps, batch_size)
            except FaultyRowError as error:
                if left_out is None:
                    raise
                left_out.leave_out(str(error))
                continue
            kept = {k: v for k, v in row.items() if k not in ("video", "frame_features", WHERE)}
            made.append({"frame_features": name, **kept})
    return gather_object(made)


def _encode(row: dict[str, Any], path: Path, model: Any, processor: Any, fps: float, batch_size: int) -> None:
    start = row.get("start") or 0.0
    features = encode_clip(model, processor, row, fps=fps, batch_size=batch_size).cpu()
    with replacing(path) as part:
        save_file({"frame_features": features}, part, metadata={"fps": str(fps), "start": str(start)})


@torch.no_grad()
def encode_clip(
    model: Any, processor: Any, row: dict[str, Any], *, fps: float = 2.0, batch_size: int = 64
) -> torch.Tensor:
    """
    Encode the frames of a row's clip.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model with `encode_frames`.
        processor ([`VideoLLMMoDProcessor`]): Preprocesses frames.
        row (`dict`): A row with `video`, and perhaps `start` and `end` in seconds.
        fps (`float`, *optional*, defaults to 2.0): Frames per second.
        batch_size (`int`, *optional*, defaults to 64): Number of frames in memory at a time.

    Returns:
        `torch.Tensor` of shape `(frames, features, width)`: On the model's device, in its data type.

    Raises:
        `ValueError` or `OSError`: If the video cannot be read.
    """
    frames = (frame for _, frame in read_clip(row, fps=fps))
    features = [
        model.model.encode_frames(processor.normalize_frames(processor.resize_frames(batch, model.device)))
        for batch in _batches(frames, batch_size)
    ]
    if not features:
        raise ValueError("the clip has no frame.")
    return torch.cat(features)


def _batches(frames: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(frames, size)):
        yield batch


def _fingerprint(model: Any, processor: Any) -> str:
    """Hash everything that features depend on: weights, data type, preprocessing, feature layer and pooling."""
    config = model.config
    vision, pixels = config.vision_config.to_diff_dict(), processor.video_processor.to_dict()
    # The origin of a checkpoint does not change features, and the data type is hashed with the weights.
    for name in ("transformers_version", "auto_map", "dtype"):
        vision.pop(name, None)
        pixels.pop(name, None)
    how = [vision, pixels, config.vision_feature_layer, config.frame_token_cls, config.frame_token_pooled]
    # The default adds nothing, so that older files keep their names.
    if (connector := [config.connector, config.connector_pooling]) != ["mlp", "average"]:
        how += connector
    digest = hashlib.sha256(json.dumps(how, sort_keys=True, default=str).encode())
    for name, weight in model.model.vision_encoder.state_dict().items():
        digest.update(f"{name} {weight.dtype}".encode())
        digest.update(weight.cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _name(row: dict[str, Any], fps: float, encoder: str) -> str:
    video = row["video"]
    what = str(video) if isinstance(video, (str, Path)) else hashlib.sha256(video.tobytes()).hexdigest()
    stretch = json.dumps([what, row.get("start") or 0.0, row.get("end"), fps, encoder])
    return f"{hashlib.sha256(stretch.encode()).hexdigest()[:20]}.safetensors"


def _with_video(rows: Dataset, dataset: str, left_out: RowRecord | None) -> Dataset:
    """
    Return the rows that have a video, and record those that have features already.

    Raises:
        `SystemExit`: If there are such rows and `left_out` is not given, or if all rows are such.
    """
    given = (rows[index] for index in range(len(rows)))
    encoded = {index: name_row(row) for index, row in enumerate(given) if row.get("video") is None}
    if encoded and (left_out is None or len(encoded) == len(rows)):
        raise SystemExit(
            f"--dataset {dataset}: {next(iter(encoded.values()))} has features already, as {len(encoded)} of "
            f"{counted(len(rows), 'row')} have: give the data set that names the videos."
        )
    for name in encoded.values():
        left_out.leave_out(f"{name}: it has features already.")
    return rows.select([index for index in range(len(rows)) if index not in encoded])


def encode_split(script: RowArguments, source: DataSource, arguments: "EncodeArguments", record: RowRecord) -> None:
    """Encode a split, and record the rows that are left out."""
    rows = load_split(source, script.train_split, script.num_clips, script.first_clip, **script.checks(record))
    if source.frame_rate is None:  # Generated clips are videos, and take long to make.
        rows = _with_video(rows, source.dataset, record if script.skip_faulty else None)
    if script.validate_only:
        print(f"{source.dataset}: {counted(len(rows), 'row')} to encode, {record.count_faults()}")
        return
    accelerator, folder = patient_accelerator(), Path(arguments.output_dir)
    model, processor = load_checkpoint(arguments.checkpoint, dtype=arguments.dtype)
    folder.mkdir(parents=True, exist_ok=True)
    made = encode_rows(
        rows,
        folder,
        model.to(accelerator.device),
        processor,
        fps=script.fps,
        batch_size=arguments.batch_size,
        accelerator=accelerator,
        max_minutes=arguments.max_minutes,
        left_out=record if script.skip_faulty else None,
    )
    if not made:
        raise SystemExit(f"--dataset {source.dataset}: none of its rows can be read ({len(rows)} in total).")
    num_left_out = len(set(gather_object(record.left_out())))
    if accelerator.is_main_process:
        # Tasks and the card of published data need what `prepare.py` wrote.
        with describing(Path(source.dataset), folder):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
            write_text(folder / f"{script.train_split}.jsonl", text)
        count = counted(len(made), "row")
        if len(made) + num_left_out < max(record.num_rows, len(rows)):
            count = f"{len(made)} of {counted(len(rows), 'row')}; the time limit was reached"
        print(f"wrote {folder / script.train_split}.jsonl: {count}")
