# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The ablation trains variants of routing from one initialisation, continues where it stopped, and compares them."""

import json
import sys

import ablation
import pytest
import torch
from ablation_arms import ARMS, decaying
from ablation_measures import kept_counts, totals
from ablation_training import batch_order, read_rows, train_arm, with_features
from safetensors.torch import save_file

from videollm_mod.train.new_model import new_model
from videollm_mod.train.recipe import CONFIGS


TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
NARRATE = {"role": "user", "content": "Please narrate the video in real time.", "time": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `prepare` makes it: an untrained model, and clips of four frames with random features."""
    folder = tmp_path_factory.mktemp("ablation")
    settings = json.loads((CONFIGS / "local_model.json").read_text())
    settings["model"]["text_config"] |= TEXT | {"num_key_value_heads": 2}
    (folder / "model.json").write_text(json.dumps(settings))
    model, processor = new_model(folder / "model.json", mod_keep_ratio=1.0)
    model.save_pretrained(folder / "initial")
    processor.save_pretrained(folder / "initial")
    generator, width = torch.Generator().manual_seed(0), model.config.vision_config.hidden_size
    for name, count in (("clips", 8), ("test", 2)):
        (folder / name).mkdir()
        rows = []
        for index in range(count):
            features = torch.randn(3 + index % 2, 64, width, generator=generator).bfloat16()
            save_file({"frame_features": features}, folder / name / f"{index}.safetensors", metadata={"fps": "2.0"})
            said = {"role": "assistant", "content": "A red ball enters.", "time": 1.0}
            asked = {"role": "user", "content": "Which color is the ball?", "time": 1.0}
            answered = {"role": "assistant", "content": "Red.", "time": 1.0}
            row = {"frame_features": f"{index}.safetensors", "messages": [NARRATE, said, asked, answered]}
            rows.append(row | {"covered": [[0, 1, 63]] * len(features)})
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "about.json").write_text(json.dumps({"world": "tiny", "fps": 2.0}))
    return folder


def run(folder, *options):
    """Run the ablation in this process."""
    given = ["ablation.py", "run", "--folder", folder, "--steps", 2, "--batch-size", 2, "--test-clips", 2, *options]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", list(map(str, given)))
        ablation.main()


def test_runs_leave_a_line_each_and_continue(folder, capsys):
    run(folder, "--arms", "full", "learned", "--seeds", 0)
    full, learned = ablation.read_results(folder)
    assert (full["arm"], learned["arm"]) == ("full", "learned") and full["world"] == "tiny"
    assert full["changes"] == {"mod_keep_ratio": [1.0] * 4, "mod_layers": None}
    assert learned["clip_flops"] < learned["full_clip_flops"] == full["clip_flops"] and full["frame_flops"] > 0
    assert learned["router_layers"] == [2, 3] and learned["chance"] == [13 / 64] * 2
    for line in (full, learned):
        assert len(line["clips"]) == 2 and line["text_loss"] > 0 < line["stream_loss"]
        assert 0 <= line["event_f1"] <= 1 and 0 <= line["answer_accuracy"] <= 1
    # A routed layer keeps 13 of 64 tokens, on things or on background.
    for clip in learned["clips"]:
        for on_things, on_background in zip(clip["kept_covered"], clip["kept_background"], strict=True):
            assert on_things + on_background == 13 * clip["frames"]
    run(folder, "--arms", "full", "learned", "uniform", "--seeds", 0)
    assert "2 of 3 runs" in capsys.readouterr().out
    assert [line["arm"] for line in ablation.read_results(folder)] == ["full", "learned", "uniform"]


def test_a_run_without_time_for_its_steps_does_not_count(folder, capsys):
    before = ablation.read_results(folder)
    with pytest.raises(SystemExit, match=r"without a result: random \(seed 0\)"):
        run(folder, "--arms", "random", "--seeds", 0, "--minutes", 0)
    assert "only 0 of 2 steps" in capsys.readouterr().out and ablation.read_results(folder) == before


def test_arms_train_on_the_same_rows_in_the_same_order(folder):
    lengths = [3, 4] * 4
    assert batch_order(lengths, 3, 2, seed=0) == batch_order(lengths, 3, 2, seed=0) != batch_order(lengths, 3, 2, 1)
    assert sorted(sum(batch_order(lengths, 4, 2, seed=0), [])) == list(range(8))
    rows = read_rows(folder, "clips")
    losses = [train_arm(folder / "initial", rows, {}, 2, 0, batch_size=2).losses for _ in range(2)]
    assert losses[0] == losses[1]


def test_frames_are_pooled_to_fewer_tokens_and_to_one(folder):
    (row, *_) = rows = read_rows(folder, "clips")
    features = with_features(row)["frame_features"].float()
    pooled = with_features(row, (4, 8))["frame_features"].float()
    torch.testing.assert_close(pooled[:, 0], (features[:, 0] + features[:, 8]) / 2, atol=0.02, rtol=0.02)
    few = train_arm(folder / "initial", rows, {"frame_token_pooled": (4, 8)}, 1, 0, batch_size=2)
    one = train_arm(folder / "initial", rows, {}, 1, 0, batch_size=2, takes_maximum=True)
    assert (few.processor.frame_num_tokens, one.processor.frame_num_tokens) == (32, 1)
    seen = one.model.model.connector(features)
    assert torch.equal(seen[:, 0], one.model.model.connector(features.flip(1))[:, 0]) and seen.shape[1] == 1


def test_kept_tokens_are_counted_on_things_and_on_background():
    kept = torch.zeros(2, 1, 16, dtype=torch.bool)
    kept[0, 0, [0, 5]], kept[1, 0, 0] = True, True
    # In a grid of 4x4 the patches 0, 1 and 9 are one token.
    counts = kept_counts(kept, [[0, 1, 9, 63]], (4, 4))
    assert counts == {
        **{"covered": 2, "kept_covered": [1, 1], "any_covered": 1},
        **{"background": 14, "kept_background": [1, 0], "any_background": 1},
    }
    clip = {"lm_correctness": 0.5, "text_loss": 6.0, "texts": 3, "events_right": 1, "events_told": 2, "events_true": 4}
    found = totals([clip | counts])
    assert found["text_loss"] == 2 and found["event_f1"] == pytest.approx(1 / 3) and found["event_recall"] == 0.25
    assert found["kept_covered"] == [0.5, 0.5] and found["any_covered"] == 0.5


def test_arms_are_configurations():
    assert ARMS["early_exit"].fields(6, "all_deep")["mod_keep_ratio"] == [1, 1, 0, 0, 0, 0]
    assert ARMS["layer_skip"].fields(4, "all_deep")["mod_keep_ratio"] == [1, 0, 1, 0]
    assert decaying(6) == [1.0, 1.0, 0.6545, 0.3455, 0.15, 0.15]
    assert ARMS["uniform"].fields(6, "interleaved")["mod_layers"] == "interleaved"
    assert ARMS["all"].fields(6, "interleaved")["mod_layers"] == "all"
