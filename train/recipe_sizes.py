# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the recipe trains on, and how much of it: worlds and sizes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


CONFIGS = Path(__file__).resolve().parent / "configs"
KINDS = "describe=1,narrate=5,ask=3,wait=1"
QUESTION_KINDS = "narrate=2,ask=5,wait=1"
LONG_KINDS = "narrate=4,ask=1"
TEST_KINDS = "narrate=2,ask=1,wait=1"
# Frames per second of all data. One model reads one rate, and LIVE's is 2.
FPS = 2
LONG, LONGEST = "30,60", "60,60"  # Seconds of long clips in training, and in evaluation.


@dataclass(frozen=True)
class World:
    """
    A world to train on.

    Args:
        scenes (`str`): World of the vision encoder's scenes (see [`LABELS`]), and of the slide shows.
        source (`dict`): The data source of its clips: `dataset` and options.
        long (`dict`): More options for long clips.
    """

    scenes: str
    source: dict[str, Any]
    long: dict[str, Any]

    def options(self, rows: str, size: int) -> dict[str, Any]:
        """
        Return the data source of a kind of rows.

        Args:
            rows (`str`): "slides", "clips", "long", "questions", "test" or "test_long".
            size (`int`): Width and height of the pictures.
        """
        kinds = {"slides": "describe=1", "clips": KINDS, "questions": QUESTION_KINDS, "long": LONG_KINDS}
        given = self.source | {"kinds": kinds.get(rows, TEST_KINDS), "frame_size": size}
        if rows == "slides" and "world" in given:
            given["world"] = self.scenes
        length = {"long": LONG, "test_long": LONGEST}.get(rows)
        return given if length is None else given | self.long | {"seconds": length}


def _streamworld(world: str, scenes: str) -> World:
    return World(scenes, {"dataset": "streamworld", "world": world}, {"questions_per_minute": 6})


# The worlds that `--worlds` may name. DoomWorld is recorded most slowly, so it is last and gets the time that is left.
WORLDS = {
    "full": _streamworld("full", "full"),
    # Slide shows of "small" have the same things, and more of them move: more places are seen.
    "tiny": _streamworld("tiny", "small"),
    "hard": _streamworld("hard", "hard"),
    "doom": World("doom", {"dataset": "doomworld", "frame_rate": FPS, "vocabulary": "small"}, {}),
}


@dataclass(frozen=True)
class Size:
    """
    The size of a run. All counts of clips and rows are of each world.

    Args:
        model_config (`str`): The new model: a file in `train/configs`.
        vision_config (`str`): How its vision encoder trains: a file in `train/configs`.
        worlds (`tuple[str, ...]`): Names of [`WORLDS`].
        vision_clips (`int`): Number of clips for the vision encoder.
        slides (`int`): Number of slide shows.
        clips (`int`): Number of rows with narration, questions and waiting.
        questions (`int`): Number of rows of the last stage, from other clips and mostly with questions.
        epochs (`int`): Number of epochs over `clips`.
        batch (`int`): Number of rows per step.
        test_clips (`int`): Number of held-out rows for evaluation.
        long_clips (`int`, *optional*, defaults to 0): Number of rows of 30 to 60 s, for the last stage.
        test_long (`int`, *optional*, defaults to 0): Number of held-out rows of 60 s.
        word_steps (`int`, *optional*, defaults to 0): Number of first steps, on single frames of slide shows.
        router_loss (`str`, *optional*): The routers' own loss (see `mod_router_loss`).
    """

    model_config: str
    vision_config: str
    worlds: tuple[str, ...]
    vision_clips: int
    slides: int
    clips: int
    questions: int
    epochs: int
    batch: int
    test_clips: int
    long_clips: int = 0
    test_long: int = 0
    word_steps: int = 0
    router_loss: str | None = None

    @property
    def frame_size(self) -> int:
        """Width and height of the pictures that the model sees."""
        return json.loads((CONFIGS / self.model_config).read_text())["model"]["vision_config"]["image_size"]


SIZES = {
    "quick": Size("streamworld_model.json", "streamworld_vision.yaml", ("tiny",), 400, 160, 400, 40, 1, 8, 8),
    "cpu": Size(
        *("doom_model.json", "local_vision.yaml", ("tiny", "hard", "doom")),
        # Small steps seem to learn more in a given time: see docs/evidence.md.
        *(8_000, 2_000, 8_000, 3_000, 2, 4, 100),
        long_clips=500,
        test_long=12,
        word_steps=1_500,
        router_loss="gradient",
    ),
    "gpu": Size(
        *("streamworld_gpu_model.json", "streamworld_vision.yaml", ("full",)),
        *(100_000, 20_000, 60_000, 20_000, 4, 32, 200),
    ),
}
