# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What routers look at, and late moments of streams: counts are right, and the scripts run."""

import json
import re
import runpy
from argparse import Namespace
from types import SimpleNamespace

import long_context
import numpy as np
import pytest
import router_focus
import torch
from PIL import Image
from programs import ROOT, run_main
from router_focus import Choices, Clip

from videollm_mod import VideoLLMMoDProcessor
from videollm_mod.streaming_videollm_mod import StreamEvent
from videollm_mod.train.data.doom.things import MONSTERS
from videollm_mod.train.objectness import PatchLabels


def patches(*frames, tokens=4):
    """Return a bool tensor (frames, tokens) that is True at these patches of each frame."""
    return torch.stack([torch.isin(torch.arange(tokens), torch.tensor(frame)) for frame in frames])


def test_shares_lift_and_overlap_of_hand_made_choices():
    has_event, moves = torch.tensor([True, False, False]), torch.tensor([False, False, True])
    clip = Clip(patches([0], [0, 1], [2]), has_event, moves)
    choices = Choices()
    choices.add(1, patches([0, 1], [0, 2], [0, 3]))
    choices.add(3, patches([0, 1], [0, 1], [2, 3]))
    found = router_focus.figures(choices, [clip])
    first, other = found["layers"]["1"], found["layers"]["3"]
    assert (first["covered"], first["background"]) == (2 / 4, 4 / 8) and other["covered"] == 4 / 4
    assert (first["lift"], other["lift"]) == (1.0, 2.0)
    assert (first["covered at events"], first["covered in silence"]) == (1, 1 / 3)
    assert (first["again, still"], first["again, moving"]) == (1 / 2, 1 / 2) and other["again, moving"] == 0
    # The second frame's patch 2 and the third's patches 0 and 2 are kept by one layer only.
    assert found["together"]["covered"] == 1 and found["mean"]["covered"] == 6 / 8
    assert found["agreement"] == pytest.approx((2 + 1 + 1) / 6)
    # Layer 1 keeps patch 0 always and the others once each, layer 3 keeps 0 and 1 twice each.
    assert found["usual_places"] == pytest.approx((4 / 6 + 4 / 6) / 2)


def test_a_larger_token_is_covered_where_one_of_its_patches_is():
    config = SimpleNamespace(frame_token_pooled=[4, 4])
    video = torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    video[2, 8:] = 9
    reply = {"role": "assistant", "content": "A cat enters.", "time": 0.3}
    row = {"covered": [[], [0, 1, 63], [9]], "video": video.numpy(), "messages": [reply]}
    clip = router_focus.describe(row, config, 2.0)
    assert clip.covered.nonzero().tolist() == [[1, 0], [1, 15], [2, 0]]
    assert clip.has_event.tolist() == [False, True, False] and clip.moves.tolist() == [False, False, True]


def test_a_router_keeps_the_highest_scores_and_the_last_token_if_it_must():
    config = {"frame_token_cls": False, "router_layers": [2], "layer_keep_counts": [4, 4, 2]}
    scores = torch.tensor([[3.0, 1.0, 2.0, 0.0]])
    for keep_last, expected in ((False, [0, 2]), (True, [0, 3])):
        choices = router_focus.choose([scores], SimpleNamespace(**config, mod_keep_last=keep_last))
        assert choices.kept[2][0][0].nonzero().flatten().tolist() == expected


def test_the_focus_of_a_checkpoint(tmp_path):
    PatchLabels(("cat",), ("red",), torch.randn(7, 128), torch.zeros(7)).save(tmp_path)
    options = ["--world", "tiny", "--clips", 2, "--over", ROOT, "--objectness", tmp_path, "--out", tmp_path]
    done = run_main(router_focus.main, *options, program="benchmarks/router_focus.py")
    found = json.loads((tmp_path / "router_focus.json").read_text())
    routers = found["routers"]
    assert set(routers) == {"learned", "uniform", "random", "change", "objectness", "oracle"}
    assert list(routers["learned"]["layers"]) == ["2", "3", "4", "5"]
    best = routers["oracle"]["mean"]["covered"]
    assert all(router["mean"]["covered"] <= best for router in routers.values())
    assert routers["uniform"]["agreement"] == routers["uniform"]["mean"]["again, still"] == 1
    # A routed layer keeps 13 of 64 tokens.
    assert sum(routers["random"]["positions"]["2"]) == pytest.approx(13)
    assert found["training"][ROOT.name]["layers"] == routers["learned"]["layers"]
    assert done.stdout.strip() == (tmp_path / "router_focus.md").read_text().strip()
    assert (tmp_path / "router_focus.png").exists()


def test_the_picture_of_the_readme(tmp_path):
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_narration.py"))
    options = [tmp_path / "out.gif", "--world", "tiny", "--clip", 12, "--seconds", 2]
    run_main(drawing["main"], *options, program="docs/draw_narration.py")
    with Image.open(tmp_path / "out.gif") as picture:
        assert picture.n_frames == 4


def test_the_comparison_of_the_readme_is_drawn_from_the_tables_of_its_page(tmp_path):
    drawing = runpy.run_path(str(ROOT / "docs" / "draw_quality.py"))
    rows = drawing["read_table"]("## What came out")
    assert list(rows) == ["full", "router_loss", "learned", "uniform", "random"]
    assert rows["router_loss"] == (2.88, 0.098, 0.064, 0.134)
    with pytest.raises(ValueError, match="'## Run it' of evidence.md has no row for full, learned"):
        drawing["read_table"]("## Run it")
    run_main(drawing["main"], tmp_path / "quality.png", program="docs/draw_quality.py")
    with Image.open(tmp_path / "quality.png") as picture:
        assert picture.format == "PNG"


def test_events_and_answers_are_counted_by_the_time_since_the_start():
    narrated = [(1.0, "A cat enters."), (6.0, "The cat leaves."), (8.0, "A dog enters.")]
    messages = [{"role": "user", "content": "Narrate.", "time": 0.0}]
    messages += [{"role": "assistant", "content": text, "time": time} for time, text in narrated]
    messages[3:3] = [
        {"role": "user", "content": "How many?", "time": 7.0},
        {"role": "assistant", "content": "None.", "time": 7.0},
    ]
    said = [(0.0, "user", "Narrate."), (1.0, "assistant", "A cat enters."), (7.0, "user", "How many?")]
    said += [(7.0, "assistant", "none"), (8.0, "assistant", "A dog leaves.")]
    events = [
        StreamEvent(time, int(2 * time), role, text, interval_probability=None if time == 7.0 else 0.1)
        for time, role, text in said
    ]
    counts = long_context.count({"messages": messages}, events, [0, 10, 20], 2.0)
    assert counts == [[1, 1, 1, 0, 0], [0, 1, 2, 1, 1]]
    assert long_context.f1(np.array(counts)) == 2 / 5 and long_context.cell(np.array(counts[:1])).startswith("1.00 (")


@pytest.mark.parametrize(
    ("count", "edges"),
    [(16, [0, 16]), (120, [0, 20, 50, 100, 120]), (600, [0, 20, 50, 100, 200, 500, 600]), (20, [0, 20])],
)
def test_the_last_interval_ends_with_the_clips(count, edges):
    assert long_context.edges_of(Namespace(frames=[50, 20, 20, 100, 200, 500, 1000]), count) == edges


@pytest.mark.parametrize("fps", [2.0, 4.0])
def test_clips_of_doomworld_have_the_frame_rate_of_the_model(fps):
    pytest.importorskip("vizdoom")
    shown = {"dataset": "doomworld", "world": None, "vocabulary": "small", "seconds": 4.0, "questions": 6.0}
    processor = VideoLLMMoDProcessor.from_pretrained(ROOT)
    for rows_of in (long_context.long_rows, router_focus.held_out_rows):
        (row,) = rows_of(Namespace(**shown, fps=fps, clips=1), processor)
        seconds = len(row["video"]) / fps
        assert 4 <= seconds <= 15 and all((fps * message["time"]).is_integer() for message in row["messages"])
        assert not set(MONSTERS) & set(re.findall(r"\w+", str(row["messages"]).lower()))
    with pytest.raises(SystemExit, match="its clips have 2 frames per second, and --fps is 4: leave --fps out"):
        long_context.long_rows(Namespace(**shown | {"dataset": "streamworld"}, fps=4.0, clips=1), processor)


def test_long_context_of_a_checkpoint(tmp_path):
    options = ["--world", "tiny", "--seconds", 6, "--clips", 1, "--frames", 6, 20, "--max-frames", 5]
    options += ["--rope-theta", 50000, "--out", tmp_path]
    done = run_main(long_context.main, *options, program="benchmarks/long_context.py")
    path = tmp_path / "long_context.json"
    found = json.loads(path.read_text())
    names = {"routed", "full compute"}
    memories = ("remembers all", "last 5 frames")
    assert set(found["streamed"]) == {f"{name}, {memory}" for name in names for memory in memories}
    assert all(len(clips) == 1 and len(clips[0]) == 2 for clips in found["streamed"].values())
    assert len({clips[0][0][2] for clips in found["streamed"].values()}) == 1
    read = [found["read"][f"{name}, 1 clips"] for name in ("routed", "routed, rotary base 50000")]
    assert read[0] != read[1] and all(0 <= value <= 1 for pair in read[0] for value in pair if value is not None)
    assert done.stdout.strip() == (tmp_path / "long_context.md").read_text().strip()
    # A second run continues: it measures nothing again, and refuses other options.
    found["streamed"]["routed, remembers all"][0] = [[9, 9, 9, 0, 0], [0, 9, 9, 0, 0]]
    path.write_text(json.dumps(found))
    assert "| routed, remembers all | 1.00 (1.00" in run_main(long_context.main, *options).stdout
    only_last = [*options[:-1], tmp_path / "last", "--memory", "last", "--seconds-read", 0]
    run_main(long_context.main, *only_last)
    last = json.loads((tmp_path / "last" / "long_context.json").read_text())
    assert set(last["streamed"]) == {f"{name}, last 5 frames" for name in names} and last["read"] == {}
    assert all(last["streamed"][name] == found["streamed"][name] for name in last["streamed"])
    refused = run_main(long_context.main, *options, "--max-frames", 6)
    assert refused.returncode == 1 and "was measured with other options" in refused.stderr
