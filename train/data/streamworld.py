# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
StreamWorld, a generated world: the data source, and a command that writes it to disk.

Things enter, move, meet, change and leave, and the time of every event is known. A clip follows from its seed.

```bash
python train/data/streamworld.py out --split validation --num_clips 20     # mp4 files and timed messages
python train/sft.py --dataset streamworld --world tiny --kinds narrate=2,ask=1 ...    # or train without writing it
```
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.command_line import CommandLineParser
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.world.clip import SPLITS, STEP, WORLDS
from videollm_mod.train.data.world.dialogues import KINDS
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.files import write_card, write_sample, write_split
from videollm_mod.train.data.world.rows import SLIDE_FRAMES, streamworld_dataset


# Imported before this project, a missing package would end in a traceback (see `train/__init__.py`).
if TYPE_CHECKING:
    from datasets import Dataset


@dataclass
class StreamWorld(DataSource):
    """
    A generated world of moving things. Rows are made when they are read.

    Args:
        world (`str`, *optional*, defaults to `"full"`): What clips may show: `"full"`, `"small"`, `"tiny"` or
            `"hard"` (see [`WORLDS`]). The split "ood" always uses the world of that name.
        kinds (`str`, *optional*, defaults to `"narrate=1"`): Weights of the kinds of dialogue, for example
            `"describe=1,narrate=2,ask=1,wait=1"`.
        frame_size (`int`, *optional*, defaults to 96): Width and height of the pictures.
        seconds (`str`, *optional*): Shortest and longest clip in seconds, for example `"20,60"`. The default is the
            world's. A longer clip of the same index begins with the events of the shorter one.
        questions_per_minute (`float`, *optional*): How often the user asks. The default is up to four questions a row,
            however long it is.
    """

    world: str = field(
        default="full", metadata={"help": "What clips may show.", "choices": ["full", "small", "tiny", "hard"]}
    )
    kinds: str = field(
        default="narrate=1",
        metadata={"help": "Weights of the kinds of dialogue, for example describe=1,narrate=2,ask=1,wait=1."},
    )
    frame_size: int = field(default=96, metadata={"help": "Width and height of the pictures."})
    seconds: str | None = field(
        default=None, metadata={"help": "Shortest and longest clip, for example 20,60. Default: the world's."}
    )
    questions_per_minute: float | None = field(
        default=None, metadata={"help": "How often the user asks. Default: up to four questions a row."}
    )

    frame_rate: ClassVar[float] = 1 / STEP

    def __post_init__(self) -> None:
        self.limits = None if self.seconds is None else parse_seconds(self.seconds)
        if self.questions_per_minute is not None and not 0 <= self.questions_per_minute <= 60:
            raise ValueError(f"`questions_per_minute` is from 0 to 60, got {self.questions_per_minute:g}.")

    @property
    def longest_row(self) -> float:
        """Seconds of the longest clip of any split."""
        return max(self.longest_row_of(split) for split in SPLITS)

    def longest_row_of(self, split: str) -> float:
        """Seconds of the longest clip of a split, or of a slide show."""
        world = WORLDS["ood" if split == "ood" else self.world]
        return max(world.seconds[1] if self.limits is None else self.limits[1], SLIDE_FRAMES * STEP)

    def load(self, split: str, *, num_clips: int, first_clip: int = 0) -> "Dataset":
        """Return rows of a split (see [`streamworld_dataset`])."""
        world = WORLDS["ood" if split == "ood" else self.world]
        return streamworld_dataset(
            split,
            num_clips=num_clips,
            first_clip=first_clip,
            kinds=parse_weights("kinds", self.kinds),
            world=world if self.limits is None else replace(world, seconds=self.limits),
            size=self.frame_size,
            questions_per_minute=self.questions_per_minute,
        )

    def title(self, split: str) -> str:
        """Return the name of the data for cards."""
        name = f"StreamWorld, {'ood' if split == 'ood' else self.world}"
        return name if self.limits is None else f"{name}, clips of {self.limits[0]:g} to {self.limits[1]:g} s"


def parse_weights(option: str, text: str) -> dict[str, float]:
    """Read the value of an option, for example "narrate=2,ask=1", as a table."""
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise ValueError(f"`{option}` looks like 'narrate=2,ask=1', got {text!r}.") from None


def parse_seconds(seconds: str) -> tuple[float, float]:
    """Read "20,60" as two numbers."""
    try:
        shortest, longest = map(float, seconds.split(","))
    except ValueError:
        shortest, longest = 0.0, 0.0
    if not 1 <= shortest <= longest < float("inf"):
        raise ValueError(f"`seconds` gives the shortest and the longest clip, like '20,60', got {seconds!r}.")
    return shortest, longest


@one_line_errors()
def main() -> None:
    """Write a split, or one clip with its events."""
    parser = CommandLineParser(description="Writes StreamWorld as mp4 files and JSON lines of timed messages.")
    parser.add_argument("folder", type=Path, help="folder to write to")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--num_clips", type=int, default=100, help="number of clips")
    parser.add_argument("--clip", type=int, help="write only the clip of this number, with its events")
    parser.add_argument("--name", default="streamworld", help="name of the two files that --clip writes")
    parser.add_argument("--world", choices=WORLDS, help="what clips may show (default: full; for the split ood: ood)")
    parser.add_argument(
        "--frame_size", "--size", type=int, default=256, help="width and height in pixels, an even number from 16"
    )
    parser.add_argument("--fps", type=int, default=24, help="frame rate of the videos, from 2 to 30")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=KINDS[1:], help="kinds of dialogue; describe writes slide shows"
    )
    options = parser.parse_args()
    if not 2 <= options.fps <= 30:
        parser.error(f"--fps must be from 2 to 30, got {options.fps}")
    if options.frame_size % 2 or not 16 <= options.frame_size <= 4096:
        parser.error(
            f"--frame_size must be an even number from 16 to 4096, as H.264 requires, got {options.frame_size}"
        )
    folder, split = options.folder, options.split
    name = options.world or ("ood" if split == "ood" else "full")
    video = {"size": options.frame_size, "fps": options.fps}
    if options.clip is not None:
        clip = make_clip(SPLITS[split] + options.clip, WORLDS[name])
        write_sample(folder, clip, name, **video, name=options.name)
        print(f"wrote {folder / options.name}.mp4 and {folder / options.name}.json")
        return
    write_split(folder, split, num_clips=options.num_clips, world=WORLDS[name], kinds=options.kinds, **video)
    given = f"--num_clips {options.num_clips} --world {name} --frame_size {options.frame_size} --fps {options.fps}"
    write_card(folder, split, f"{given} --kinds {' '.join(options.kinds)}")
    print(f"wrote {folder / split}.jsonl and its videos")


if __name__ == "__main__":
    main()
