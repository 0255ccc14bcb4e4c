# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The vision encoder's labels, and StreamWorld's recipe from nothing to a table, in miniature."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from videollm_mod.train import recipe
from videollm_mod.train.data.world.clip import WORLDS, Clip
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.sprites import COLORS
from videollm_mod.train.pretrain_vision import LabelledPatches, PatchReader, make_scenes
from videollm_mod.train.recipe import CONFIGS, SIZES, Size


WORLD = WORLDS["small"]


def test_patch_labels_match_the_pictures():
    """A patch inside a thing mostly has its color, and a patch without a thing shows the background."""
    patches = LabelledPatches(WORLD, grid=8, size=96, seeds=range(20))
    close, far = [], []
    for seed in patches.seeds:
        clip = make_scenes(seed, WORLD)
        things, colors, places = patches.labels(clip, 0.0)
        picture = clip.draw(0.0, 96).astype(float).reshape(8, 12, 8, 12, 3)[:, 3:9, :, 3:9].mean((1, 3)).reshape(-1, 3)
        covered = colors >= 0
        assert np.array_equal(covered, things < len(WORLD.things)) and not places[~covered].any()
        row, column = np.indices((8, 8)).reshape(2, -1) + 0.5
        middle = covered & (np.hypot(places[:, 0] - column, places[:, 1] - row) < 0.6)
        palette = np.array(list(COLORS.values()), dtype=float)
        close += list(np.abs(picture[middle] - palette[colors[middle]]).mean(-1))
        far += list(np.abs(picture[middle] - palette[(colors[middle] + 3) % len(palette)]).mean(-1))
    assert len(close) > 60 and np.mean(close) < 0.6 * np.mean(far)


def test_scenes_show_many_things_and_the_wall_hides_some():
    scenes = [make_scenes(seed, WORLD) for seed in range(40)]
    assert scenes[0] == make_scenes(0, WORLD) and all(isinstance(clip, Clip) and not clip.events for clip in scenes)
    story = np.mean([len(make_clip(seed, WORLD).visible(5.0)) for seed in range(40)])
    assert np.mean([len(clip.visible(3.0)) for clip in scenes]) > 2 * story
    seen = {actor.name(actor.begin) for clip in scenes for actor in clip.actors}
    assert seen == {f"{color} {thing}" for color, thing in WORLD.pairs()}
    walled = next(clip for clip in scenes if clip.wall is not None)
    things, _, _ = LabelledPatches(WORLD, 8, 96, range(1)).labels(walled, 0.0)
    behind = things == len(WORLD.things) + 1
    assert 4 < behind.sum() < 16 and not behind.reshape(8, 8)[:4].any()


def test_shares_of_correct_patches():
    torch.manual_seed(0)

    class Known(torch.nn.Module):
        config = type("Config", (), {"hidden_size": 4})

        def forward(self, pixel_values):
            return type("Output", (), {"last_hidden_state": pixel_values})

    reader = PatchReader(Known(), num_things=2)
    things, colors = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[5, 6, -100, -100]])
    with torch.no_grad():
        reader.reading.weight.zero_()
        reader.reading.bias.zero_()
        reader.reading.bias[0] = 9.0  # Predicts thing 0 everywhere,
        reader.reading.bias[4 + 6] = 9.0  # and color 6.
    output = reader(torch.randn(1, 4, 4), things, colors, torch.zeros(1, 4, 3))
    assert output["right"].tolist() == [[0.5, 0.5]] and output["loss"] > 0


@pytest.mark.timeout(1200)
def test_the_recipe_trains_and_prints_a_table(tmp_path, monkeypatch, capfd):
    """All stages run, a second run skips them, and the trained model has the pretrained encoder."""
    monkeypatch.setitem(recipe.SIZES, "quick", Size("streamworld_model.json", "small", "tiny", 16, 8, 16, 8, 1, 8, 1))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setattr(
        sys, "argv", ["recipe.py", "--size", "quick", "--twin", "--minutes", "60", "--folder", str(tmp_path)]
    )
    recipe.main()
    printed = capfd.readouterr().out
    assert "is there" not in printed and printed.count("--max_minutes") == 10
    table = printed.split("Held-out clips of StreamWorld, tiny")[1].splitlines()
    assert table[1].split() == ["before", "after", "full", "compute"]
    assert [line[:36].strip() for line in table[2 : 2 + len(recipe.TABLE)]] == list(recipe.TABLE.values())
    before, after = (
        AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True).state_dict()
        for name in ("vision", "trained")
    )
    for name, weight in before.items():
        assert torch.equal(weight, after[name]) == ("vision_encoder" in name), name

    twin = AutoModel.from_pretrained(tmp_path / "trained_1", trust_remote_code=True)
    assert twin.config.mod_keep_ratio == 1

    # A second run finds all stages.
    monkeypatch.setattr(recipe, "measure_checkpoint", lambda *_, **__: dict.fromkeys(recipe.TABLE, 0.0))
    recipe.main()
    assert capfd.readouterr().out.count("is there") == 10


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_its_files(size):
    assert (CONFIGS / SIZES[size].model_config).exists() and {SIZES[size].things, SIZES[size].world} <= set(WORLDS)
    json.loads((CONFIGS / SIZES[size].model_config).read_text())


def test_a_stage_that_fails_stops_the_recipe(tmp_path):
    with pytest.raises(SystemExit, match="error: train/sft.py failed"):
        recipe.run_stage(Path(tmp_path / "one" / "config.json"), "sft.py", "--dataset", "nothing_here")
