# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The ablation trains variants of routing from one initialisation, continues where it stopped, and compares them."""

import json
import sys

import ablation
import ablation_prepare
import pytest
import torch
from ablation_arms import ARMS, decaying
from ablation_measures import kept_counts, measure_losses, totals
from ablation_rows import batch_order, read_rows, split_frames, with_features
from ablation_table import difference, estimate, tables, variants
from ablation_training import train_arm
from safetensors.torch import save_file

from videollm_mod.configuration_videollm_mod import VideoLLMMoDConfig
from videollm_mod.train.new_model import new_model
from videollm_mod.train.recipe_sizes import CONFIGS


TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
NARRATE = {"role": "user", "content": "Please narrate the video in real time.", "time": 0.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder as `prepare` makes it: an untrained model, and clips of two or three frames with random features."""
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
            features = torch.randn(2 + index % 2, 64, width, generator=generator).bfloat16()
            save_file({"frame_features": features}, folder / name / f"{index}.safetensors", metadata={"fps": "2.0"})
            said = {"role": "assistant", "content": "A red ball enters.", "time": 0.5}
            asked = {"role": "user", "content": "Which color is the ball?", "time": 0.5}
            answered = {"role": "assistant", "content": "Red.", "time": 0.5}
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


def test_a_folder_is_prepared_with_one_set_of_options(folder, tmp_path, monkeypatch, capsys):
    """With others, the finished stages would be of one world, and the rest and the name of another."""
    stages = []
    monkeypatch.setattr(ablation_prepare, "run_stage", lambda done, *_, **__: stages.append(done))

    def prepare(folder, *options):
        stages.clear()
        monkeypatch.setattr(sys, "argv", ["ablation.py", "prepare", "--folder", str(folder), *options])
        ablation.main()
        return len(stages)

    count = prepare(tmp_path / "new", "--world", "tiny", "--minutes", "60")
    assert count == prepare(tmp_path / "new", "--world", "tiny", "--minutes", "5") > 5
    known = (tmp_path / "new" / "about.json").read_text()
    for place, options in ((tmp_path / "new", ["--world", "hard"]), (folder, ["--world", "tiny"])):
        with pytest.raises(SystemExit):
            prepare(place, *options)
        assert "has stages of a run with other options: give another --folder" in capsys.readouterr().err
        assert not stages
    assert (tmp_path / "new" / "about.json").read_text() == known


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
    run(folder, "--arms", "full", "learned", "pooled", "--seeds", 0)
    assert "2 of 3 runs" in capsys.readouterr().out
    *_, pooled = lines = ablation.read_results(folder)
    assert [line["arm"] for line in lines] == ["full", "learned", "pooled"]
    # The baseline learns and answers the same, with one token a frame.
    for mine, other in zip(pooled["clips"], full["clips"], strict=True):
        same = ("texts", "streams", "frames", "events_true", "answers", "silent")
        assert [mine[name] for name in same] == [other[name] for name in same]
    assert pooled["clip_flops"] < full["clip_flops"]


def test_a_run_without_time_for_its_steps_does_not_count(folder, capsys):
    before = ablation.read_results(folder)
    with pytest.raises(SystemExit, match=r"without a result: random \(seed 0\)"):
        run(folder, "--arms", "random", "--seeds", 0, "--minutes", 0)
    assert "only 0 of 2 steps" in capsys.readouterr().out and ablation.read_results(folder) == before


def test_a_folder_without_an_initialisation_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path)
    assert capsys.readouterr().err.strip().endswith("run `ablation.py prepare` first.")


def test_arms_train_on_the_same_rows_in_the_same_order(folder):
    lengths = [2, 3] * 4
    assert batch_order(lengths, 3, 2, seed=0) == batch_order(lengths, 3, 2, seed=0) != batch_order(lengths, 3, 2, 1)
    assert sorted(sum(batch_order(lengths, 4, 2, seed=0), [])) == list(range(8))
    # 15 rows are seven batches of two and one row.
    assert all(len(batch) == 2 for seed in range(9) for batch in batch_order([2] * 15, 7, 2, seed))
    rows = read_rows(folder, "clips")
    routed = {"mod_keep_ratio": 0.2, "mod_layers": "all_deep"}
    options = {"batch_size": 2, "watching": 0.5, "router_rate": 10.0}
    first, second = (train_arm(folder / "initial", rows, routed, 2, 0, **options) for _ in range(2))
    assert first.losses == second.losses and first.model.config.mod_keep_ratio == 0.2


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
    assert ARMS["last_token"].fields(4, "all_deep")["mod_keep_ratio"] == [1, 1, 1e-6, 1e-6]
    assert ARMS["layer_skip"].fields(4, "all_deep")["mod_keep_ratio"] == [1, 0, 1, 0]
    assert decaying(6) == [1.0, 1.0, 0.6545, 0.3455, 0.15, 0.15]
    assert ARMS["uniform"].fields(6, "interleaved")["mod_layers"] == "interleaved"
    assert ARMS["all"].fields(6, "interleaved")["mod_layers"] == "all"


def test_a_setting_cannot_make_an_arm_another_one(folder, capsys):
    before = ablation.read_results(folder)
    with pytest.raises(SystemExit):
        run(folder, "--arms", "learned", "full", "--set", "mod_keep_ratio=0.1")
    assert "--set cannot change mod_keep_ratio of the arm full" in capsys.readouterr().err
    assert ablation.read_results(folder) == before
    ablation.check_settings(["learned", "uniform"], ["mod_keep_ratio"])


def test_the_last_token_of_each_frame_can_be_all_that_stays(folder):
    fields = ARMS["last_token"].fields(4, "all_deep")
    trained = train_arm(folder / "initial", read_rows(folder, "clips"), fields, 1, 0, batch_size=2)
    (clip, *_) = measure_losses(trained.model, trained.processor, list(map(with_features, read_rows(folder, "test"))))
    # Patches 0, 1 and 63 show a thing, and 63 is the last token.
    assert clip["kept_covered"] == [clip["frames"]] * 2 and clip["kept_background"] == [0, 0]


def test_single_frames_have_the_open_request_and_their_own_messages():
    later = {"role": "user", "content": "Tell me when it leaves.", "time": 1.0}
    said = {"role": "assistant", "content": "It leaves.", "time": 1.5}
    question = {"role": "user", "content": "What leaves?", "time": 1.5}
    answer = {"role": "assistant", "content": "A ball.", "time": 1.5}
    row = {"messages": [NARRATE, later, said, question, answer], "frame_features": torch.arange(5)[:, None, None]}
    parts = split_frames(row)
    contents = [[message["content"] for message in part["messages"]] for part in parts]
    narrate, wait = NARRATE["content"], later["content"]
    assert contents == [[narrate], [narrate], [narrate, wait], [wait, "It leaves.", "What leaves?", "A ball."], [wait]]
    assert [part["start"] for part in parts] == [0, 0.5, 1, 1.5, 2] and "time" not in parts[3]["messages"][0]
    assert [part["frame_features"].flatten().tolist() for part in parts] == [[0], [1], [2], [3], [4]]
    # Silence has a label between two frames only. The clip's last frame has nothing to say or to keep silent about.
    learned = split_frames(row, learned=True)
    assert [part["frame_features"].flatten().tolist() for part in learned] == [[0], [1, 1], [2], [3], [4]]
    assert [part["messages"] for part in learned] == [part["messages"] for part in parts]


def line(arm, seed, right, **changed):
    """A line of results: 50 clips with ten events each, `right` of which are told correctly in each clip."""
    clip = {"events_right": right, "events_told": 10, "events_true": 10, "lm_correctness": right / 10}
    about = {"arm": arm, "name": arm, "seed": seed, "world": "hard", "steps": 9, "batch_size": 8, "test_clips": 50}
    about |= {"learning_rate": 1e-3, "initial": "a", "hardware": "none", "date": "today", "changes": {}}
    about |= {"clip_flops": 2e9, "frame_flops": 1e6, "router_layers": [], "chance": [], "clips": [clip] * 50}
    return about | changed


def test_intervals_are_over_seeds_and_clips():
    # Equal seeds and clips leave nothing to vary.
    same = variants([line("full", seed, 5) for seed in range(3)])["full"]
    assert estimate(same, "event_f1") == (0.5, 0.5, 0.5) and estimate(same, "answer_accuracy") is None
    # Of two seeds, one in four replicates has the worse one twice.
    seeds = variants([line("full", 0, 2), line("full", 1, 8)])["full"]
    assert estimate(seeds, "event_f1") == pytest.approx((0.5, 0.2, 0.8))
    # Clips that are right or wrong: the standard error of a mean of 400 is 0.025.
    clips = [{"lm_correctness": float(index % 2)} for index in range(400)]
    value, low, high = estimate(variants([line("full", 0, 0, clips=clips)])["full"], "lm_correctness")
    assert (
        value == 0.5
        and low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.004)
        and high == pytest.approx(1 - low, abs=0.008)
    )
    # Two variants that fail on the same clips differ by exactly what separates them.
    better = [{"lm_correctness": clip["lm_correctness"] + 0.25} for clip in clips]
    found = variants([line("full", 0, 0, clips=clips), line("pooled", 0, 0, clips=better)])
    assert difference(found["pooled"], found["full"], "lm_correctness") == pytest.approx((0.25, 0.25, 0.25))


def test_tables_compare_learned_routers_with_others_in_the_same_layers():
    kept = {"kept_covered": [6, 2], "covered": 10, "kept_background": [1, 1], "background": 90}
    kept |= {"any_covered": 7, "any_background": 2}
    routed = {"router_layers": [2, 3], "chance": [0.2, 0.2]} | kept
    clips = {right: [clip | kept for clip in line("", 0, right)["clips"]] for right in (4, 6)}
    lines = [line("full", seed, 8) for seed in (0, 1)] + [line("pooled", seed, 3) for seed in (0, 1)]
    for seed in (0, 1):
        lines.append(line("learned", seed, 6, clips=clips[6], **routed))
        lines.append(line("uniform", seed, 4, clips=clips[4], **routed | {"changes": {"mod_router": "uniform"}}))
        lines.append(
            line("uniform interleaved", seed, 4, **routed | {"router_layers": [1]}, changes={"mod_router": "uniform"})
        )
    text = tables([line("full", 0, 1, steps=8), *lines])
    assert "1 results with other settings are left out" in text
    assert "| learned - uniform | 2 | **+0.200 [+0.200, +0.200]** |" in text
    assert (
        "| full - pooled | 2 | **+0.500 [+0.500, +0.500]** |" in text and "learned - uniform interleaved" not in text
    )
    # Eight of twenty tokens on things are kept, where chance keeps four.
    assert "| learned | 0.400 [0.400, 0.400] | 2.00 |" in text


def test_plots_show_what_runs_measured(folder, tmp_path):
    run(folder, "--arms", "learned", "--seeds", 1, "--save")
    assert len(VideoLLMMoDConfig.from_pretrained(folder / "models" / "learned_1").layer_keep_counts) == 4
    out = tmp_path / "evidence.png"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ablation.py", "plot", "--folder", str(folder), "--out", str(out)])
        ablation.main()
    assert {path.name for path in tmp_path.iterdir()} == {"evidence.png", "evidence_kept.png"}
