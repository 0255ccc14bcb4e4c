# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write StreamWorld to disk: video files, JSON lines of timed messages, and the card of the data set."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from videollm_mod.outputs import replacing, write_json, write_text
from videollm_mod.train.data.world.clip import EVENTS, SPLITS, STEP, Clip, World
from videollm_mod.train.data.world.dialogues import KINDS, Question, describe, make_dialogue
from videollm_mod.train.data.world.drawing import write_pictures, write_video
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.rows import SLIDE_FRAMES, covered_patches, make_slides
from videollm_mod.train.data.world.sprites import COLORS, THINGS


def write_split(
    folder: Path,
    split: str,
    *,
    num_clips: int,
    world: World,
    size: int,
    fps: int,
    kinds: Sequence[str] = KINDS[1:],
) -> None:
    """
    Write clips as video files, and one dialogue of each kind per clip as JSON lines of timed messages.

    Existing videos are kept, so an interrupted run continues where it stopped.

    Args:
        folder (`Path`): The folder. It is created if needed.
        split (`str`): One of [`SPLITS`].
        num_clips (`int`): Number of clips. With "describe" it is also the number of slide shows.
        world ([`World`]): What clips may show.
        size (`int`): Width and height of the videos.
        fps (`int`): Frame rate of the videos. Slide shows have 2 fps.
        kinds (`Sequence[str]`, *optional*, defaults to all kinds except "describe"): Some of [`KINDS`].

    Raises:
        `ValueError`: If the folder has videos of the split that were made with other options.
    """
    claim_videos(folder, split, {"data": "StreamWorld", "world": asdict(world), "size": size, "fps": fps})
    lines: list[str] = []
    for index in tqdm(range(num_clips), desc=split, unit="clip"):
        name = f"{split}-{index:06d}"
        dialogues = [kind for kind in kinds if kind != "describe"]
        if dialogues:
            clip = make_clip(SPLITS[split] + index, world)
            lines += _write_clip(folder, f"videos/{name}.mp4", clip, dialogues, size=size, fps=fps)
        if "describe" in kinds:
            slides = make_slides(SPLITS[split] + index * SLIDE_FRAMES, world)
            lines.append(_write_slides(folder, f"videos/{name}-slides.mp4", slides, size=size))
    write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")


def _write_clip(folder: Path, video: str, clip: Clip, kinds: list[str], *, size: int, fps: int) -> Iterator[str]:
    write_once(folder / video, partial(write_video, clip, size=size, fps=fps))
    covered = covered_patches([(clip, index * STEP) for index in range(clip.num_frames(1 / STEP))])
    for kind in kinds:
        messages, questions = make_dialogue(clip, kind)
        if messages:
            yield to_line(video, clip.seconds, kind, clip.seed, messages, questions, covered)


def _write_slides(folder: Path, video: str, slides: list[tuple[Clip, float]], *, size: int) -> str:
    pictures, seed = (clip.draw(time, size) for clip, time in slides), slides[0][0].seed
    write_once(folder / video, partial(write_pictures, pictures, size=size, fps=round(1 / STEP), seed=seed))
    messages = describe([clip.description(time) for clip, time in slides])
    return to_line(video, SLIDE_FRAMES * STEP, "describe", seed, messages, [], covered_patches(slides))


def to_line(
    video: str,
    end: float,
    kind: str,
    seed: int,
    messages: list[dict[str, Any]],
    questions: list[Question],
    covered: list[list[int]],
) -> str:
    """Return the line of a row."""
    row = {"video": video, "start": 0.0, "end": end, "messages": messages, "kind": kind, "seed": seed}
    row["questions"] = [{"kind": q.kind, "time": q.time} for q in questions]
    row["covered"] = covered
    return json.dumps(row)


def claim_videos(folder: Path, split: str, options: Mapping[str, Any]) -> None:
    """
    Create the folder `videos`, and record in it what the videos of a split depend on. Later runs keep these videos
    only if their options are the same.

    Args:
        folder (`Path`): The folder of the splits.
        split (`str`): The split that is about to be written.
        options (`Mapping[str, Any]`): The options, as values of JSON.

    Raises:
        `ValueError`: If there are videos of the split that were made with other options, or with unknown ones.
    """
    videos, options = folder / "videos", json.loads(json.dumps(options))
    record = videos / f".{split}.json"
    known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    if known == options:
        return
    if any(videos.glob(f"{split}-*.mp4")):
        others = [name for name in options if known.get(name) != options[name]]
        how = f"made with another value of {' and '.join(others)}" if known else "made with unknown options"
        raise ValueError(
            f"'{videos}' has videos of the split {split}, {how}. Write to another folder, or delete these videos."
        )
    videos.mkdir(parents=True, exist_ok=True)
    write_json(record, options)


def write_once(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a video unless it exists. It gets its name only when it is complete."""
    if not path.exists():
        with replacing(path) as part:
            write(part)


def write_sample(folder: Path, clip: Clip, world: str, *, size: int, fps: int, name: str = "streamworld") -> None:
    """
    Write one clip as `<name>.mp4` and its events as `<name>.json`.

    Args:
        folder (`Path`): The folder. It is created if needed.
        clip ([`Clip`]): The clip.
        world (`str`): Name of its world, for the JSON file.
        size (`int`): Width and height of the video.
        fps (`int`): Its frame rate.
        name (`str`, *optional*, defaults to `"streamworld"`): Name of both files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / f"{name}.mp4") as part:
        write_video(clip, part, size=size, fps=fps)
    write_json(folder / f"{name}.json", {"seed": clip.seed, "world": world, "events": clip.story()})


COMMAND = "python train/data/streamworld.py"
# The card names the types of all columns: a split without a question does not show what `questions` holds.
FEATURES = [
    {"name": "video", "dtype": "string"},
    {"name": "start", "dtype": "float64"},
    {"name": "end", "dtype": "float64"},
    {
        "name": "messages",
        "list": [
            {"name": "role", "dtype": "string"},
            {"name": "content", "dtype": "string"},
            {"name": "time", "dtype": "float64"},
        ],
    },
    {"name": "kind", "dtype": "string"},
    {"name": "seed", "dtype": "int64"},
    {"name": "questions", "list": [{"name": "kind", "dtype": "string"}, {"name": "time", "dtype": "float64"}]},
    {"name": "covered", "list": {"list": "int64"}},
]
CARD = """
# StreamWorld

A generated world for streaming video models: {things} kinds of things in {colors} colors enter, move, meet, hide,
change and leave. Grounds are textured and may move, and pictures have distractors and compression noise. The time of
every event is known exactly.

Each line of `<split>.jsonl` is a dialogue in timed messages. Times are seconds since the beginning of the video.

- `narrate`: the model describes every event as soon as it can be seen, and sometimes answers a question.
- `ask`: the model is silent except for answers about the present frame, an earlier one, a count, an order or a
  comparison.
- `wait`: a question asks for something that comes later. The model waits and speaks when it happens.
- `describe` (only if requested): a slide show. Every frame comes from a different clip and is described.

`covered` has the patches that show a thing, at 2 frames a second: indices in a grid of 8 x 8 patches, row by row.

No two splits share a clip. The split `ood` has pairs of thing and color that no other split has, more things and
longer clips. The events are {events}.

The pictures are drawn, not filmed: results on them say nothing about natural video. These commands made the data set;
the same seeds give the same clips.

```bash
{commands}
```
"""


def known_commands(card: Path, command: str) -> dict[str, str]:
    """Return the lines of a card that run `command`, by split. A card that does not exist has none."""
    known = card.read_text(encoding="utf-8").splitlines() if card.exists() else []
    return {line.split("--split ")[1].split()[0]: line for line in known if line.startswith(f"{command} ")}


def write_card(folder: Path, split: str, options: str) -> None:
    """
    Write the card of a folder of splits, `README.md`. It keeps the commands that made the other splits.

    Args:
        folder (`Path`): The folder of the splits.
        split (`str`): The split that was just written.
        options (`str`): The options of the command that wrote it.
    """
    path = folder / "README.md"
    commands = known_commands(path, COMMAND)
    commands[split] = f"{COMMAND} {folder.resolve().name} --split {split} {options}"
    existing = [name for name in SPLITS if (folder / f"{name}.jsonl").exists()]
    files = [{"split": name, "path": f"{name}.jsonl"} for name in existing]
    data = DatasetCardData(
        license="apache-2.0",
        language="en",
        pretty_name="StreamWorld",
        task_categories=["video-text-to-text"],
        tags=["video", "streaming", "synthetic"],
        dataset_info={"features": FEATURES},
        configs=[{"config_name": "default", "data_files": files}],
    )
    words = {"things": len(THINGS), "colors": len(COLORS), "events": ", ".join(EVENTS)}
    words["commands"] = "\n".join(commands[name] for name in existing if name in commands)
    card = DatasetCard(f"---\n{data}\n---\n{CARD.format(**words)}")
    write_text(path, str(card))
