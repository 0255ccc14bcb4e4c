# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
DoomWorld, clips of a scripted player in ViZDoom: the data source, and a command that writes it to disk.

The pictures are three-dimensional and egocentric. The game knows what each pixel shows and what happens, so narration
and its times are exact. A clip follows from its split, its seed and its length.

```bash
pip install -e ".[doom]"
python train/data/doomworld.py out --split validation --num_clips 20     # mp4 files and timed messages
python train/sft.py --dataset doomworld --kinds narrate=2,ask=1 ...    # or train without writing it
```
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.data.doom.clip import RATES, SLIDE_FRAMES, SPLITS
from videollm_mod.train.data.doom.events import WORDINGS
from videollm_mod.train.data.doom.files import write_card, write_sample, write_split
from videollm_mod.train.data.doom.game import FPS, find_vizdoom
from videollm_mod.train.data.doom.rows import doomworld_dataset
from videollm_mod.train.data.doom.things import VOCABULARIES
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.streamworld import parse_seconds, parse_weights
from videollm_mod.train.data.world.dialogues import KINDS


# Imported before this project, a missing package would end in a traceback (see `train/__init__.py`).
if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class DoomWorld(DataSource):
    """
    Clips of a scripted player in ViZDoom. Rows are recorded when they are read.

    Args:
        kinds (`str`, *optional*, defaults to `"narrate=1"`): Weights of the kinds of dialogue, for example
            `"describe=1,narrate=2,ask=1,wait=1"`.
        wordings (`str`, *optional*, defaults to `"plain=1"`): Weights of the wordings of narration, for example
            `"plain=2,brief=1,player=1"`.
        frame_size (`int`, *optional*, defaults to 128): Width and height of the pictures.
        seconds (`str`, *optional*, defaults to `"8,15"`): Shortest and longest clip in seconds.
        frame_rate (`int`, *optional*, defaults to 4): Frames per second of the clips, 4 or 2, and of the model.
        vocabulary (`str`, *optional*, defaults to `"full"`): What things are called. "small" tells of monsters and
            items, and not which, nor how far away.
    """

    kinds: str = field(
        default="narrate=1",
        metadata={"help": "Weights of the kinds of dialogue, for example describe=1,narrate=2,ask=1,wait=1."},
    )
    wordings: str = field(
        default="plain=1",
        metadata={"help": f"Weights of the wordings of narration ({', '.join(WORDINGS)})."},
    )
    frame_size: int = field(default=128, metadata={"help": "Width and height of the pictures."})
    seconds: str = field(default="8,15", metadata={"help": "Shortest and longest clip in seconds, for example 20,60."})
    frame_rate: int = field(
        default=4, metadata={"help": "Frames per second of the clips, and of the model.", "choices": list(RATES)}
    )
    vocabulary: str = field(
        default="full",
        metadata={"help": "What things are called. 'small' does not tell kinds apart.", "choices": list(VOCABULARIES)},
    )

    def __post_init__(self) -> None:
        self.limits = parse_seconds(self.seconds)

    @property
    def longest_row(self) -> float:
        """Seconds of the longest clip, or of a slide show."""
        return max(self.limits[1], SLIDE_FRAMES / self.frame_rate)

    def load(self, split: str, *, num_clips: int, first_clip: int = 0) -> "Dataset":
        """Return rows of a split (see [`doomworld_dataset`])."""
        find_vizdoom()
        return doomworld_dataset(
            split,
            num_clips=num_clips,
            first_clip=first_clip,
            kinds=parse_weights("kinds", self.kinds),
            wordings=parse_weights("wordings", self.wordings),
            size=self.frame_size,
            seconds=self.limits,
            fps=self.frame_rate,
            vocabulary=self.vocabulary,
        )

    def title(self, split: str) -> str:
        """Return the name of the data for cards."""
        low, high = self.limits
        return f"DoomWorld{', ood' if split == 'ood' else ''}, clips of {low:g} to {high:g} s"


@one_line_errors()
def main() -> None:
    """Write a split, or one clip with its events."""
    parser = CommandLineParser(description="Writes DoomWorld as mp4 files and JSON lines of timed messages.")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num_clips", type=int, default=100, help="number of clips")
    parser.add_argument("--first_clip", type=int, default=0, help="index of the first clip")
    parser.add_argument("--clip", type=int, help="write only the clip of this number, with its events")
    parser.add_argument("--name", default="doomworld", help="name of the two files that --clip writes")
    parser.add_argument(
        "--frame_rate", type=int, choices=RATES, default=FPS, help="frames per second, for events of --clip"
    )
    parser.add_argument(
        "--frame_size", "--size", type=int, default=256, help="width and height in pixels, an even number from 16"
    )
    parser.add_argument("--seconds", default=DoomWorld.seconds, help="shortest and longest clip, for example 20,60")
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:], help="kinds of dialogue")
    parser.add_argument(
        "--wordings",
        default=DoomWorld.wordings,
        help=f"weights of the wordings of clips ({', '.join(WORDINGS)}), for example plain=2,brief=1",
    )
    parser.add_argument("--vocabulary", choices=VOCABULARIES, default="full", help="what things are called")
    options = parser.parse_args()
    if options.frame_size % 2 or not 16 <= options.frame_size <= 4096:
        parser.error(
            f"--frame_size must be an even number from 16 to 4096, as H.264 requires, got {options.frame_size}"
        )
    seconds, wordings = parse_seconds(options.seconds), parse_weights("wordings", options.wordings)
    if seconds[0] < 2:
        parser.error(f"--seconds must be at least 2, got {options.seconds}")
    try:
        find_vizdoom()
    except ImportError as error:
        raise SystemExit(f"error: {error}") from None
    folder, split = options.folder, options.split
    video = {"size": options.frame_size, "seconds": seconds, "vocabulary": options.vocabulary}
    if options.clip is not None:
        write_sample(folder, split, SPLITS[split] + options.clip, **video, fps=options.frame_rate, name=options.name)
        print(f"wrote {folder / options.name}.mp4 and {folder / options.name}.json")
        return
    clips = {"num_clips": options.num_clips, "first_clip": options.first_clip}
    write_split(folder, split, **clips, **video, kinds=options.kinds, wordings=wordings)
    given = f"--num_clips {options.num_clips} --first_clip {options.first_clip} --frame_size {options.frame_size}"
    write_card(
        folder,
        split,
        f"{given} --seconds {options.seconds} --kinds {' '.join(options.kinds)} "
        f"--wordings {options.wordings} --vocabulary {options.vocabulary}",
    )
    print(f"wrote {folder / split}.jsonl and its videos")


if __name__ == "__main__":
    main()
