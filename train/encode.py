# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Frame features ahead of training: a frozen vision encoder need not see the same frames in every epoch.

```bash
python train/encode.py data/train.jsonl features --checkpoint my-model --fps 2
accelerate launch --num_processes 8 train/encode.py data/train.jsonl features --checkpoint my-model
python train/sft.py --dataset features --checkpoint my-model ...
```

Writes one safetensors file a stretch of video and rows that name it. What is there is not made again, so that a killed
run goes on where it was; files appear under their name only when they are whole.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from tqdm.auto import tqdm
from transformers import AutoModel, AutoProcessor

from videollm_mod.train.data.timed_messages import check_timed_messages, load_timed_messages


def encode_rows(
    rows: Any,
    folder: Path,
    model: Any,
    processor: Any,
    *,
    fps: float = 2.0,
    batch_size: int = 64,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """
    Encodes the stretches of video that rows are about, shared among the processes of an accelerator.

    Args:
        rows (iterable of `dict`): Timed messages with `video`, as [`load_timed_messages`] gives them.
        folder (`Path`): Where to write `<hash>.safetensors`, each with one tensor `frame_features` of shape
            `(frames, tokens, vision hidden)` in the model's dtype, and its `fps` and `start` as metadata.
        model ([`VideoLLMMoDForConditionalGeneration`]): Gives `encode_frames`.
        processor ([`VideoLLMMoDProcessor`]): Reads videos and makes pixels.
        fps (`float`, *optional*, defaults to 2.0): Frames a second.
        batch_size (`int`, *optional*, defaults to 64): Frames in memory at a time.
        accelerator (`Accelerator`, *optional*): Says which process this is.

    Returns:
        `list[dict]`: The rows with `frame_features`, a file name, in place of `video`.
    """
    accelerator = Accelerator() if accelerator is None else accelerator
    rows = list(rows)
    jobs = {_name(row, fps): row for row in rows}
    with accelerator.split_between_processes(sorted(jobs)) as mine:
        for name in tqdm(mine, desc="videos", disable=not accelerator.is_main_process):
            if not (folder / name).exists():
                _encode(jobs[name], folder / name, model, processor, fps, batch_size)
    accelerator.wait_for_everyone()
    return [
        {"frame_features": _name(row, fps), **{k: v for k, v in row.items() if k not in ("video", "frame_features")}}
        for row in rows
    ]


@torch.no_grad()
def _encode(row: dict[str, Any], path: Path, model: Any, processor: Any, fps: float, batch_size: int) -> None:
    start = row.get("start") or 0.0
    frames = (frame for _, frame in processor.read_video(row["video"], fps=fps, start=start, end=row.get("end")))
    features = [
        model.model.encode_frames(processor.process_frames(batch).to(model.device)).cpu()
        for batch in _batches(frames, batch_size)
    ]
    part = path.with_suffix(f".{os.getpid()}.part")
    save_file({"frame_features": torch.cat(features)}, part, metadata={"fps": str(fps), "start": str(start)})
    part.rename(path)


def _batches(frames: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(frames, size)):
        yield batch


def _name(row: dict[str, Any], fps: float) -> str:
    stretch = json.dumps([str(row["video"]), row.get("start") or 0.0, row.get("end"), fps])
    return f"{hashlib.sha256(stretch.encode()).hexdigest()[:20]}.safetensors"


def main() -> None:
    """Encodes a split."""
    parser = argparse.ArgumentParser(description="Writes the frame features of videos, and rows that name them.")
    parser.add_argument("source", help="timed messages: a .jsonl or .parquet file, a folder or a data set of the Hub")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--checkpoint", required=True, help="model whose vision encoder sees: a folder or a Hub id")
    parser.add_argument("--split", default="train")
    parser.add_argument("--fps", type=float, default=2.0, help="frames a second")
    parser.add_argument("--batch_size", type=int, default=64, help="frames encoded at a time")
    parser.add_argument("--dtype", default="auto", help="of the encoder and of what is written")
    options = parser.parse_args()
    accelerator = Accelerator()
    try:
        rows = load_timed_messages(options.source, options.split)
        check_timed_messages(rows)
    except (ValueError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None
    model = AutoModel.from_pretrained(options.checkpoint, trust_remote_code=True, dtype=options.dtype)
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = encode_rows(
        rows,
        options.folder,
        model.to(accelerator.device).eval(),
        processor,
        fps=options.fps,
        batch_size=options.batch_size,
        accelerator=accelerator,
    )
    if accelerator.is_main_process:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.folder / f"{options.split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{options.folder}: {len(rows)} rows")


if __name__ == "__main__":
    main()
