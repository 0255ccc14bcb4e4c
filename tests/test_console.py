# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What programs print: counts, costs and the model's words."""

from pathlib import Path

from videollm_mod.console import counted, describe_entries, describe_saving, visible

import pytest

from videollm_mod.commands.folder import Narrated, Video, print_result
from videollm_mod.mistakes import one_line_errors


def test_a_number_and_its_word_agree():
    assert [counted(number, "frame") for number in (0, 1, 2)] == ["0 frames", "1 frame", "2 frames"]
    assert [counted(number, "reply") for number in (1, 2)] == ["1 reply", "2 replies"] and counted(
        2, "day"
    ) == "2 days"
    assert (
        describe_entries([8, 3, 8, 3, 4], {1, 3, 4})
        == "8 in each of 2 full layers, up to 4 in each of 3 routed layers"
    )
    assert describe_entries([8, 3], {1}) == "8 in the full layer, 3 in the routed layer"


def test_a_model_without_routed_layers_is_not_compared_with_itself():
    assert describe_saving(6e8, 1e9, "FLOP", " here") == "0.6 GFLOP here, 1 at full compute (routing saves 40%)"
    assert describe_saving(1e9, 1e9, "FLOP", " here") == "1 GFLOP here"


def test_the_words_of_a_model_cannot_control_the_terminal():
    assert visible("a \x1b[31mred\x07 box\n\tand \u2764\ufe0f") == "a \ufffd[31mred\ufffd box\n\tand \u2764\ufe0f"


def test_a_file_name_cannot_control_the_terminal(capsys):
    name = "a\x1b]0;title\x07\nerror: b.mp4"
    with pytest.raises(SystemExit), one_line_errors():
        raise ValueError(f"'{name}' cannot be read.")
    video = Video(Path(name), name, Path("a.srt"))
    print_result(Narrated(video), as_json=False)
    print_result(Narrated(video, fault="It is empty."), as_json=False)
    out, err = capsys.readouterr()
    assert out == "a\ufffd]0;title\ufffd error: b.mp4: 0 captions in a.srt\n"
    assert err == "error: 'a\ufffd]0;title\ufffd\nerror: a\ufffd]0;title\ufffd error: b.mp4: It is empty.\n"
