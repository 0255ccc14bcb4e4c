# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write DoomWorld to disk: video files, JSON lines of timed messages, and the card of the data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from huggingface_hub import DatasetCard, DatasetCardData
from tqdm.auto import tqdm

from videollm_mod.outputs import write_json, write_text
from videollm_mod.train.data.doom.clip import MAPS, SPLITS, STEP, Clip, record_clip, shrink
from videollm_mod.train.data.doom.dialogues import make_dialogue
from videollm_mod.train.data.doom.events import EVENTS, WORDINGS
from videollm_mod.train.data.doom.game import FPS, TICS
from videollm_mod.train.data.doom.rows import check_weights, draw
from videollm_mod.train.data.doom.things import THINGS
from videollm_mod.train.data.world.drawing import open_video
from videollm_mod.train.data.world.files import FEATURES, claim_videos, known_commands, to_line, write_once
from videollm_mod.train.data.world.rows import covered_patches


def write_split(
    folder: Path,
    split: str,
    *,
    num_clips: int,
    first_clip: int = 0,
    size: int,
    seconds: tuple[float, float],
    kinds: Sequence[str],
    wordings: dict[str, float],
    vocabulary: str = "full",
) -> None:
    """
    Write clips as videos of 35 frames a second, and one dialogue of each kind per clip as lines of timed messages.

    Existing videos are kept, so an interrupted run continues where it stopped.

    Args:
        folder (`Path`): The folder. It is created if needed.
        split (`str`): One of [`SPLITS`].
        num_clips (`int`): Number of clips.
        first_clip (`int`, *optional*, defaults to 0): Index of the first clip.
        size (`int`): Width and height of the videos.
        seconds (`tuple[float, float]`): Shortest and longest clip.
        kinds (`Sequence[str]`): Some of "narrate", "ask", "wait".
        wordings (`dict[str, float]`): Weight of each of [`WORDINGS`]. A clip has one, which follows from its seed.
        vocabulary (`str`, *optional*, defaults to `"full"`): What things are called (see [`record_clip`]).

    Raises:
        `ValueError`: If a wording is unknown, or if the folder has videos of the split that were made with other
            options.
    """
    check_weights("wordings", wordings, WORDINGS)
    # The pictures do not depend on the words.
    claim_videos(folder, split, {"data": "DoomWorld", "size": size, "seconds": seconds})
    lines: list[str] = []
    for index in tqdm(range(first_clip, first_clip + num_clips), desc=split, unit="clip"):
        video, seed = f"videos/{split}-{index:06d}.mp4", SPLITS[split] + index
        clip = film(folder / video, split, seed, size=size, seconds=seconds, vocabulary=vocabulary)
        covered = covered_patches([(clip, index * STEP) for index in range(len(clip.pictures))])
        wording = draw(np.random.default_rng((seed, 4)), wordings)
        for kind in kinds:
            messages, questions = make_dialogue(clip, kind, wording)
            if messages:
                lines.append(to_line(video, clip.seconds, kind, seed, messages, questions, covered))
    write_text(folder / f"{split}.jsonl", "\n".join(lines) + "\n")


def film(
    path: Path,
    split: str,
    seed: int,
    *,
    size: int,
    seconds: tuple[float, float],
    fps: int = FPS,
    vocabulary: str = "full",
) -> Clip:
    """Record a clip, and write it as a video of 35 frames a second unless the file exists."""
    how, clips = {"seconds": seconds, "fps": fps, "vocabulary": vocabulary}, []

    def write(part: Path) -> None:
        with open_video(part, size=size, fps=TICS, seed=seed, world="DoomWorld") as write:
            clips.append(record_clip(split, seed, **how, sink=lambda picture: write(shrink(picture, size))))

    write_once(path, write)
    return clips[0] if clips else record_clip(split, seed, **how)


def write_sample(
    folder: Path,
    split: str,
    seed: int,
    *,
    size: int,
    seconds: tuple[float, float],
    fps: int,
    name: str,
    vocabulary: str = "full",
) -> None:
    """
    Write one clip as `<name>.mp4` and its events as `<name>.json`.

    Args:
        folder (`Path`): The folder. It is created if needed.
        split (`str`): One of [`SPLITS`].
        seed (`int`): The seed of the clip.
        size (`int`): Width and height of the video.
        seconds (`tuple[float, float]`): Shortest and longest clip.
        fps (`int`): Frames per second in which its events are seen (see [`record_clip`]).
        name (`str`): Name of both files. A video of that name is replaced.
        vocabulary (`str`, *optional*, defaults to `"full"`): What things are called (see [`record_clip`]).
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.mp4").unlink(missing_ok=True)
    how = {"size": size, "seconds": seconds, "fps": fps, "vocabulary": vocabulary}
    clip = film(folder / f"{name}.mp4", split, seed, **how)
    story = {"seed": seed, "seconds": seconds, "fps": fps, "split": split, "map": clip.map, "events": clip.story()}
    write_json(folder / f"{name}.json", story)


COMMAND = "python train/data/doomworld.py"
CARD = """
# DoomWorld

A scripted player walks through maps of Freedoom in ViZDoom. It explores, fights, collects things and opens doors. The
game knows what each pixel shows, so the time and the words of every event are exact.

Each line of `<split>.jsonl` is a dialogue in timed messages. Times are seconds since the beginning of the video, and
multiples of a quarter of a second: train at 4 frames a second.

- `narrate`: the model tells every event as soon as it can be seen, and sometimes answers a question.
- `ask`: the model is silent except for answers about the present frame, an earlier one, a count, an order or a
  comparison.
- `wait`: a question asks for something that comes later. The model waits and speaks when it happens.

The things are {things}. The events are {events}. A thing is in sight if it covers at least 0.2% of the picture. A
monster is near within 200 map units. Now and then the player is suddenly in another place.

`covered` has the patches that show a thing, at 4 frames a second: indices in a grid of 8 x 8 patches, row by row.

No two splits share a seed or a map:

{maps}

These commands made the data set. On one version of ViZDoom, the same seeds give the same clips.

```bash
{commands}
```

## Licenses

The messages are made by this project (Apache-2.0). The pictures show the art and the maps of
[Freedoom](https://freedoom.github.io) (BSD 3-clause), drawn by [ViZDoom](https://vizdoom.farama.org) (MIT).
"""


def write_card(folder: Path, split: str, options: str) -> None:
    """
    Write the card of a folder of splits, `README.md`. It keeps the commands that made the other splits.

    Args:
        folder (`Path`): The folder of the splits.
        split (`str`): The split that was just written.
        options (`str`): The options of the command that wrote it.
    """
    commands = known_commands(folder / "README.md", COMMAND)
    commands[split] = f"{COMMAND} {folder.resolve().name} --split {split} {options}"
    existing = [name for name in SPLITS if (folder / f"{name}.jsonl").exists()]
    data = DatasetCardData(
        license="bsd-3-clause",
        language="en",
        pretty_name="DoomWorld",
        task_categories=["video-text-to-text"],
        tags=["video", "streaming", "synthetic", "egocentric"],
        dataset_info={"features": FEATURES},
        configs=[
            {"config_name": "default", "data_files": [{"split": name, "path": f"{name}.jsonl"} for name in existing]}
        ],
    )
    words = {"things": ", ".join(THINGS), "events": ", ".join(name.replace("_", " ") for name in EVENTS)}
    words["maps"] = "\n".join(f"- {name}: {wad}.wad, {', '.join(maps)}" for name, (wad, maps) in MAPS.items())
    words["commands"] = "\n".join(commands[name] for name in existing if name in commands)
    write_text(folder / "README.md", str(DatasetCard(f"---\n{data}\n---\n{CARD.format(**words)}")))
