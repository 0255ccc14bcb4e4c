# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The load benchmark: its plan, its arithmetic, and a short load on a real server."""

import asyncio
import json
import sys

import load
import pytest
from engines import embedded
from load_clients import Tally, Visit, arrivals, plan
from serving_server import running


RATES = {"fps": [1.0, 2.0], "stay": 5.0, "questions": 6.0, "breaks": 3.0}


def test_the_plan_follows_from_its_seed():
    visits = plan(8, 200, seed=1, **RATES)
    assert visits == plan(8, 200, seed=1, **RATES) != plan(8, 200, seed=2, **RATES)
    # 8 streams at the beginning, then 8 / 5 arrivals a second: 318 in 199 s, with a deviation of 18.
    assert 250 < len(visits) - 8 < 390
    assert sum(visit.end - visit.begin for visit in visits) / 200 == pytest.approx(8, rel=0.25)
    assert {visit.fps for visit in visits} == {1.0, 2.0}
    assert all(visit.begin <= time < visit.end <= 200 for visit in visits for time in visit.questions + visit.breaks)
    assert all(visit.end == 9 for visit in plan(3, 9, seed=0, **{**RATES, "stay": None}))


def test_arrivals_are_a_poisson_process():
    class Means:
        def expovariate(self, rate):
            return 1 / rate

    assert list(arrivals(Means(), 2.0, 1.0, 3.0)) == [1.5, 2.0, 2.5]
    assert list(arrivals(Means(), 0.0, 1.0, 3.0)) == []


def test_a_client_sends_nothing_while_it_is_away():
    visit = Visit(begin=1.0, end=3.0, fps=4.0, questions=(2.9,), breaks=(1.6,))
    frames = [due.time for due in visit.timeline() if due.kind == "frame"]
    assert frames == [1.0, 1.25, 1.5, 2.25, 2.5, 2.75]
    assert [due.kind for due in visit.timeline()][3] == "break" and visit.timeline()[-1] == (2.9, "question")


def test_percentiles_and_deadlines():
    tally = Tally(sent=250, dropped=50, asked=4, unanswered=1, first_words=[0.1, 0.2, 0.6])
    for milliseconds in range(1, 201):
        tally.see(milliseconds / 1000, fps=1 / 0.1975)
    row = load.summarise("streaming", 2, 3, 20.0, tally, {"process": 5e6, "cache": 2e6})
    assert (row.lag_p50, row.lag_p99) == (pytest.approx(100.5), pytest.approx(198))
    assert (row.first_word_p50, row.first_word_p99) == (pytest.approx(200), pytest.approx(600))
    assert row.frames_per_second == 10 and (row.server_mb, row.cache_mb) == (5, 2)
    assert tally.late == 3 and row.missed == 53 / 250 and not row.keeps_up
    assert "| streaming | 2 | 3 | 10 | 100 | 198 | 21.2% | 200 | 600 | 3 of 4 | 50 |" in load.table([row])
    empty = load.summarise("streaming", 1, 1, 1.0, Tally(), {"process": 0.0, "cache": 0.0})
    assert empty.keeps_up and empty.lag_p99 is None and empty.server_mb is None and "| - | - |" in load.table([empty])


@pytest.mark.parametrize("largest", [0, 1, 2, 5, 8, 11, 12])
def test_the_ramp_finds_the_largest_number(largest):
    tried = []

    async def fits(number):
        tried.append(number)
        return number <= largest

    assert asyncio.run(load.find_most(fits, 12)) == largest
    assert len(tried) == len(set(tried)) <= 8 and max(tried) <= 12


def test_both_ways_on_a_real_server(monkeypatch, capsys, tmp_path):
    """Two streams for 2.5 seconds, with four questions and two broken connections."""
    model, processor, _ = embedded()
    engine = {"max_streams": 8, "max_frames": 24, "max_text_tokens": 256, "page_size": 32}
    with running(model, processor, engine_options=engine, api_keys=["key"]) as (address, server):
        command = ["load.py", "--url", f"http://{address}", "--api-key", "key", "--streams", "2", "--seconds", "2.5"]
        command += [
            "--stay",
            "100",
            "--fps",
            "2",
            "--questions",
            "30",
            "--breaks",
            "25",
            "--seed",
            "9",
            "--window",
            "3",
        ]
        monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
        load.main()
        assert not list(server.sessions)
    streaming, resending = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert (tmp_path / "load.md").read_text().strip() == capsys.readouterr().out.strip()
    # A client that sends frames again holds a cache only for a moment, which the measurement may miss.
    assert streaming["cache_mb"] > 0 <= resending["cache_mb"]
    for row in (streaming, resending):
        assert row["errors"] == {} and row["refusals"] == row["unanswered"] == 0 < row["questions"]
        assert 0 < row["lag_p50"] <= row["lag_p99"] and 0 < row["first_word_p50"] <= row["first_word_p99"]
        assert row["frames_per_second"] > 0
    assert streaming["resumed"] > 0 == streaming["dropped"]


def test_mistakes_are_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["load.py", "--url", "http://127.0.0.1:9", "--seconds", "1"])
    with pytest.raises(SystemExit):
        load.main()
    assert capsys.readouterr().err.startswith("error: http://127.0.0.1:9/metrics: no figures")
    monkeypatch.setattr(sys, "argv", ["load.py", "--url", "http://127.0.0.1:9", "--max-streams", "2"])
    with pytest.raises(SystemExit):
        load.main()
    assert "not for --url" in capsys.readouterr().err
