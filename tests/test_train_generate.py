# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Generated dialogues: questions at random times, what becomes of written answers, and what a rerun asks again."""

import json
import lzma
import re
import signal
import subprocess
import threading
import time

import pytest
from endpoints import scripted_endpoint
from preloaded import start
from programs import ROOT, run_main, run_training, without_leaks
from tiny import random_frames, write_clip

from videollm_mod.train.data import generate
from videollm_mod.train.data.converters import Notes
from videollm_mod.train.data.ego4d.goalstep import read_timelines
from videollm_mod.train.data.json_streams import read_values
from videollm_mod.train.data.planned_dialogues import (
    FOLLOW_UP,
    Event,
    Plan,
    RejectedError,
    find_timeline,
    plan_dialogue,
    read_dialogue,
    to_messages,
)
from videollm_mod.train.data.questions import QUESTIONS
from videollm_mod.train.data.rewriting import read_rewrite
from videollm_mod.train.data.timed_messages import find_faults, load_timed_messages
from videollm_mod.train.reply_cache import Reply


EVENTS = [Event(1.2, 4.0, "Open the box"), Event(4.0, 7.9, "Take out the lamp"), Event(9.1, 12.0, "Plug it in")]
PLAN = Plan(tuple(EVENTS), (3, 8, 16, 19, 24), ((4, "What is done now?"), (17, FOLLOW_UP)), 0, 2.0)
# What a good language model writes for this plan.
WRITTEN = """\
[2] User: What is done now?
[2] Assistant: The box is being opened.
[4] Assistant: Now the lamp is taken out.
[8] Assistant: The lamp is out.
[8.5] User: And then?
[8.5] Assistant: The lamp will be plugged in.
[9.5] Assistant: It is being plugged in.
[12] Assistant: It is plugged in."""


def read(text, *, is_cut=False, plan=PLAN):
    notes = Notes()
    dialogue = read_dialogue(plan, text, is_cut=is_cut, notes=notes, where="a")
    return dialogue, {what: found.count for what, found in notes.mended_by.get("", {}).items()}


def write_well(request):
    """Write a dialogue as asked for."""
    prompt = request["messages"][-1]["content"]
    lines = re.findall(r"^\[.*?\] (?:User|Assistant): .*$", prompt, flags=re.M)
    return "\n".join(line.replace("...", f"Words {number}.") for number, line in enumerate(lines))


# ----------------------------------------------------------------------------------------------------------- timelines


def test_a_timeline_is_the_truth_or_else_the_replies():
    messages = [
        {"role": "user", "content": "Tell me each step.", "time": 0.0},
        {"role": "assistant", "content": "Take out the  lamp", "time": 4},
        {"role": "assistant", "content": "Open the box", "time": 1.2},
        {"role": "assistant", "content": "Say when.", "time": None},
    ]
    replies = find_timeline({"messages": messages, "truth": {"label": "x"}})
    assert replies == [Event(1.2, None, "Open the box"), Event(4.0, None, "Take out the lamp")]
    timeline = [
        [4, "7.9", "Take out the lamp"],
        [1.2, 4.0, "Open the box"],
        [None, 2, "?"],
        [5, 3, "Wipe it"],
        "x",
        [1],
    ]
    events = find_timeline({"messages": messages, "truth": {"timeline": timeline}})
    assert events == [*EVENTS[:2], Event(5.0, None, "Wipe it")]


def test_one_event_with_an_end_is_a_timeline():
    assert find_timeline({"truth": {"timeline": [[1, 2, "Once"]]}}) == [Event(1.0, 2.0, "Once")]


@pytest.mark.parametrize("row", [{}, {"messages": None}, {"truth": {"timeline": [[1, 1, "Once"]]}}])
def test_a_row_of_one_moment_has_no_timeline(row):
    with pytest.raises(RejectedError, match="two moments"):
        find_timeline(row)


# --------------------------------------------------------------------------------------------------------------- plans


def test_questions_are_of_all_kinds_and_the_same_in_each_run():
    assert {kind: len(set(texts)) for kind, texts in QUESTIONS.items()} == {"past": 50, "present": 50, "future": 50}
    plans = [plan_dialogue(EVENTS, name=f"row/{number}") for number in range(200)]
    assert plans == [plan_dialogue(EVENTS, name=f"row/{number}") for number in range(200)]
    asked = [text for plan in plans for _, text in plan.questions]
    kinds = {kind: sum(text in texts for text in asked) for kind, texts in QUESTIONS.items()}
    assert min(kinds.values()) > 100 and asked.count(FOLLOW_UP) > 60
    assert all(plan.questions[0][1] != FOLLOW_UP for plan in plans)
    for plan in plans:
        frames = [frame for frame, _ in plan.questions]
        assert len(set(frames)) == 3 and frames[0] >= 3 and frames[-1] < 24, "between the first change and the last"
        assert frames[0] - 20 <= plan.start <= frames[0] and plan.start >= 0


def test_a_plan_stays_within_its_row_and_covers_part_of_a_long_timeline():
    events = [Event(float(second), None, f"Step {second}") for second in range(100)]
    plans = [plan_dialogue(events, name=f"{number}", first=30.2, last=90.4, most_events=10) for number in range(50)]
    assert all(len(plan.events) == 10 and max(plan.slots) <= 180 for plan in plans)
    assert len({plan.slots for plan in plans}) > 20
    late = [plan for plan in plans if plan.questions[0][0] >= 61]
    assert late and all(plan.start >= 61 for plan in late)


def test_a_prompt_shows_the_timeline_and_the_lines_to_fill_in():
    text = PLAN.prompt()[-1]["content"]
    assert "1.2 to 4: Open the box\n4 to 7.9: Take out the lamp\n9.1 to 12: Plug it in\n" in text
    lines = [line for line in WRITTEN.splitlines() if "User: And then" not in line]
    wanted = [re.sub("Assistant: .*", "Assistant: ...", line) for line in lines]
    wanted.insert(4, "[8.5] User: ...")
    assert "\n".join(wanted) in text


# ------------------------------------------------------------------------------------------------------------- answers


def test_a_dialogue_as_asked_for_is_kept_as_written():
    dialogue, mended = read(WRITTEN)
    assert to_messages(PLAN, dialogue) == [
        {"role": "user", "content": "What is done now?", "time": 2.0},
        {"role": "assistant", "content": "The box is being opened.", "time": 2.0},
        {"role": "assistant", "content": "Now the lamp is taken out.", "time": 4.0},
        {"role": "assistant", "content": "The lamp is out.", "time": 8.0},
        {"role": "user", "content": "And then?", "time": 8.5},
        {"role": "assistant", "content": "The lamp will be plugged in.", "time": 8.5},
        {"role": "assistant", "content": "It is being plugged in.", "time": 9.5},
        {"role": "assistant", "content": "It is plugged in.", "time": 12.0},
    ]
    assert not mended


@pytest.mark.parametrize("fps", [2.0, 3.0, 6.0, 24.0, 30.0])
@pytest.mark.parametrize("later", [0, 20000])
def test_a_dialogue_keeps_its_frames_at_any_rate(fps, later):
    """The prompt has times of two decimals, which are before or after the frame that is meant."""
    slots = tuple(range(int(later * fps), int(later * fps) + 25))
    plan = Plan(tuple(EVENTS), slots, ((slots[0], "What is done now?"), (slots[11], "And then?")), 0, fps)
    dialogue, mended = read(write_well({"messages": plan.prompt()}), plan=plan)
    assert [frame for frame, role, _ in dialogue if role == "assistant"] == list(slots) and not mended
    assert [frame for frame, role, _ in dialogue if role == "user"] == [slots[0], slots[11]]
    # A time between two frames still follows the next one.
    between = (slots[0] + 0.5) / fps
    [_, reply] = read(f"[{slots[0] / fps:.4f}] User: Q?\n[{between:.4f}] Assistant: A lamp.", plan=plan)[0]
    assert reply[0] == slots[1]


def test_lines_may_look_otherwise():
    dressed = re.sub(r"\[(.*?)\] (\w+): (.*)", r'- **`\1s` \2:** "\3"', WRITTEN)
    assert read(f"Sure! Here is the dialogue:\n\n```\n{dressed}\n```\nLet me know!") == (
        read(WRITTEN)[0],
        {"line of no speaker: dropped": 2},
    )


@pytest.mark.parametrize(
    ("old", "new", "what", "gone"),
    [
        ("[2] User", "[1] Assistant: Hello.\n[2] User", "reply before the first question: dropped", []),
        ("[8] Assistant", "[9] Assistant", "reply after the next question: dropped", ["The lamp is out."]),
        ("The lamp is out.", "Now the lamp is taken out.", "same text as the reply before: dropped", []),
        ("[4] Assistant", "[7.8] Assistant", "two replies at one frame: kept the later one", ["Now the lamp is"]),
        ("The lamp is out.", "...", "line without a text: dropped", ["The lamp is out."]),
        ("It is plugged in.", "It is\nplugged in.", "line of no speaker: dropped", ["It is plugged in."]),
        (
            "And then?",
            "...",
            "line without a text: dropped",
            ["will be plugged", "being plugged", "It is plugged"],
        ),
    ],
)
def test_what_is_not_used_is_counted(old, new, what, gone):
    dialogue, mended = read(WRITTEN.replace(old, new))
    assert mended[what] == 1
    said = " ".join(text for _, role, text in dialogue if role == "assistant")
    assert not [text for text in gone if text in said]
    assert "The box is being opened." in said


def test_the_last_line_of_a_cut_answer_is_not_used():
    dialogue, mended = read(WRITTEN.removesuffix("ugged in."), is_cut=True)
    assert dialogue[-1] == (19, "assistant", "It is being plugged in.")
    assert mended == {"reply was cut: its last line dropped": 1}


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (WRITTEN, " \n", "empty reply"),
        ("[4] Assistant", "Assistant", "a line without a time"),
        ("[9.5] Assistant", "[13] Assistant", "a time outside the video"),
        ("[8] Assistant", "[3] Assistant", "times out of order"),
        ("[8.5] User", "[2] User", "times out of order"),
        ("[9.5] Assistant", "[8] Assistant", "times out of order"),
        ("[8.5] User", "[5] User", "a question at another time"),
        ("The lamp is out.", "The lamp is out at 7.9 seconds.", "mentions seconds"),
        ("The lamp is out.", "At 0:08, the lamp is out.", "mentions seconds"),
        ("The lamp is out.", "The lamp is out since [8].", "mentions seconds"),
    ],
)
def test_a_dialogue_that_breaks_the_rules_is_rejected(old, new, reason):
    with pytest.raises(RejectedError, match=reason):
        read(WRITTEN.replace(old, new))


def test_thoughts_are_no_lines():
    assert read(f"<think>\n[2] User: Hm?\n[1] Assistant: No.\n</think>\n\n{WRITTEN}") == read(WRITTEN)
    with pytest.raises(RejectedError, match="empty reply"):
        read(f"<think>\n{WRITTEN}")


def test_an_ordinal_is_no_time():
    dialogue, _ = read(WRITTEN.replace("The lamp is out.", "The second step of 2 is done."))
    assert (16, "assistant", "The second step of 2 is done.") in dialogue


def test_every_timeline_of_goalstep_has_a_dialogue(tmp_path):
    """The published validation file of Ego4D GoalStep: what is asked for is kept in full, if it is written."""
    file = tmp_path / "goalstep_valid.json"
    file.write_bytes(lzma.decompress((ROOT / "tests" / "data" / "goalstep" / "goalstep_valid.json.xz").read_bytes()))
    entries = list(read_values(file, "videos.item"))
    timelines = [timeline for entry in entries for timeline in read_timelines(entry, Notes())]
    # 134 videos, and 964 of their 3,349 steps have substeps.
    assert (len(entries), len(timelines)) == (134, 134 + 964)
    for timeline in timelines:
        events = find_timeline({"truth": {"timeline": [list(step) for step in timeline.steps]}})
        plan = plan_dialogue(events, name=timeline.id)
        text = write_well({"messages": plan.prompt()})
        dialogue, mended = read(text, plan=plan)
        assert len(dialogue) == len(text.splitlines()) and not mended, timeline.id
        frames = [frame for frame, _, _ in dialogue]
        assert frames == sorted(frames) and dialogue[0][1] == "user" and frames[-1] == plan.slots[-1]


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of rows about a video of 15 s. One of them has a timeline, and three are faulty."""
    folder = tmp_path_factory.mktemp("source")
    write_clip(folder / "lamp.mp4", random_frames(30), fps=2)
    timeline = [[event.start, event.end, event.text] for event in EVENTS]
    messages = [{"role": "assistant", "content": "Open the box.", "time": 1.5}]
    rows = [
        {"id": "lamp", "video": "lamp.mp4", "start": 1.5, "messages": messages, "truth": {"timeline": timeline}},
        {"video": "lamp.mp4", "messages": messages},
        {"id": "?", "video": ["lamp.mp4"], "messages": messages},
        {"id": "?", "video": "lamp.mp4", "messages": [{"role": "assistant", "content": 5}], "task": "other"},
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{broken\n")
    (folder / "about.json").write_text('{"license": "MIT", "may_be_shared": true}')
    return folder


def run(source, out, url, *more):
    options = ("--endpoint", url, "--endpoint_model", "small", "--max_retries", 0, *more)
    return run_main(generate.main, "--dataset", source, "--out", out, *options)


def rows_of(out):
    return [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]


def test_dialogues_are_written_and_train(source, tmp_path):
    with scripted_endpoint(write_well) as (url, asked):
        done = run(source, tmp_path, url)
        assert done.returncode == 0, done.stderr
        assert "train: 10 rows" in done.stdout and "1: no timeline of two moments or more (lamp/1)" in done.stdout
        assert "1: not one file (row 2, video)" in done.stdout and "line 5" in done.stdout
        assert "1: not a list of messages (row 3, messages)" in done.stdout
        assert len(asked) == 10 and asked[0]["temperature"] == 0
        first = (tmp_path / "train.jsonl").read_bytes()
        # Nothing is asked again, and the rows are the same although replies come in any order.
        assert run(source, tmp_path, url).returncode == 0 and len(asked) == 10
        assert (tmp_path / "train.jsonl").read_bytes() == first
        assert run(source, tmp_path, url, "--seed", 1, "--dialogues", 2).returncode == 0 and len(asked) == 12
        assert len(rows_of(tmp_path)) == 2
        done = run(source, tmp_path, url, "--task", "other,more")
        assert done.returncode == 1 and "lamp/1" not in done.stdout and "row 3" in done.stdout
    (tmp_path / "train.jsonl").write_bytes(first)
    about = json.loads((tmp_path / "about.json").read_text())
    assert about["source"] == "dialogues by small" and about["license"] == "MIT" and about["may_be_shared"]
    rows = load_timed_messages(tmp_path, video_root=[source])
    assert not list(find_faults(rows, full=True))
    assert [row["id"] for row in rows] == [f"lamp/dialogue{number}" for number in range(10)]
    for row in rows:
        times = [message["time"] * 2 for message in row["messages"]]
        assert times == sorted(times) and all(time.is_integer() for time in times)
        assert row["end"] == max(times) / 2 <= 12 and row["start"] >= 1.5
    options = f"--checkpoint . --dataset {tmp_path} --video_root {source} --max_steps 1 --lora_r 4"
    done = run_training(tmp_path / "trained", *options.split())
    [loss] = re.findall(r"'train_loss': '?([\d.]+)", done.stdout)
    assert done.returncode == 0 and 0 < float(loss) < 20


def test_failures_of_the_endpoint_are_counted_and_asked_for_again(source, tmp_path):
    slow, done = threading.Event(), (429, {"retry-after": "0.1"})
    with scripted_endpoint(500, "nonsense", b"<html>", done, lambda _: str(slow.wait(5)), write_well) as (url, asked):
        result = run(source, tmp_path, url, "--timeout", 1, "--concurrency", 1)
        slow.set()
        assert result.returncode == 0 and len(rows_of(tmp_path)) == 5
        assert "left out 4: no reply from the endpoint (lamp/dialogue" in result.stdout
        assert "left out 1: no question has a reply (lamp/dialogue1)" in result.stdout
        assert run(source, tmp_path, url).returncode == 0
        # What failed is asked for again. Nonsense is a reply, and stays.
        assert len(asked) == 14 and len(rows_of(tmp_path)) == 9


@pytest.mark.xdist_group("preloaded")
def test_an_interrupted_run_does_not_wait_for_the_endpoint(source, tmp_path):
    """A request is sent again for up to 12 minutes."""
    never = threading.Event()
    with scripted_endpoint(write_well, lambda _: str(never.wait(300))) as (url, asked):
        given = ("--dataset", source, "--out", tmp_path, "--endpoint", url, "--endpoint_model", "small")
        program = ("train/data/generate.py", *given, "--concurrency", 2)
        running = start(*program, stderr=subprocess.PIPE, text=True)
        while len(asked) < 3 and running.poll() is None:
            time.sleep(0.01)
        running.send_signal(signal.SIGINT)
        try:
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
            never.set()
    assert running.returncode == 1 and without_leaks(said).splitlines()[-1].endswith("run the command again."), said
    assert "interrupted. Replies so far are in" in said and len(list((tmp_path / "replies").glob("*.json"))) == 1


@pytest.mark.parametrize("status", [404, 500])
def test_an_endpoint_that_is_of_no_use_ends_the_run_without_loss(source, tmp_path, status):
    (tmp_path / "train.jsonl").write_text("of an earlier run")
    with scripted_endpoint(write_well, write_well, status) as (url, _):
        result = run(source, tmp_path, url, "--dialogues", 60, "--concurrency", 1)
    assert result.returncode == 1 and result.stderr.splitlines()[-1].startswith("error: http")
    assert f"answered {status}: wrong. Replies" in result.stderr and ("20 times in a row" in result.stderr) == (
        status == 500
    )
    assert "run the command again" in result.stderr and "Traceback" not in result.stderr
    assert (tmp_path / "train.jsonl").read_text() == "of an earlier run"
    assert len(list((tmp_path / "replies").glob("*.json"))) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [(("--min_seconds", 60), "shorter than --min_seconds"), (("--max_seconds", 0.1), "longer than --max_seconds")],
)
def test_dialogues_of_another_length_are_left_out(source, tmp_path, options, reason):
    (tmp_path / "train.jsonl").write_text("of an earlier run")
    with scripted_endpoint(write_well) as (url, _):
        done = run(source, tmp_path, url, *options)
    assert (tmp_path / "train.jsonl").read_text() == "of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["replies", "train.jsonl"]
    assert done.returncode == 1 and f"left out 10: {reason}" in done.stdout and "no dialogue is left" in done.stderr
    assert "wrote" not in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --model or --endpoint"),
        (("--endpoint", "http://x/v1"), "belong together"),
        (("--model", "x", "--dialogues", "0"), "--dialogues must be a positive number"),
        (("--endpoint", "localhost", "--endpoint_model", "small"), "must be an address"),
        (("--model", "docs"), "language model 'docs' cannot be loaded: "),
    ],
)
def test_a_mistake_is_one_line(source, tmp_path, options, message):
    done = run_main(generate.main, "--dataset", source, "--out", tmp_path / "out", *options)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_the_data_set_is_not_overwritten(source):
    before = (source / "train.jsonl").read_bytes()
    for dataset in (source, source / "train.jsonl"):
        done = run(dataset, source, "http://localhost:1/v1")
        assert done.returncode == 1 and "write to another folder" in done.stderr
    assert (source / "train.jsonl").read_bytes() == before


# ----------------------------------------------------------------------------------------------------------- rewriting


def test_narrations_are_rewritten_once_each(tmp_path):
    texts = ["C looks around.", "C picks a cup.", "C looks around.", "C waits."]
    messages = [{"role": "assistant", "content": text, "time": time} for time, text in enumerate(texts)]
    row = {"id": "a", "video": "a.mp4", "messages": messages, "task": "ego4d_narration", "truth": {"x": 1}}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")

    def rewrite(request):
        note = re.findall("Note: (.*)", request["messages"][-1]["content"])[-1]
        return {"C waits.": "C waits."}.get(note, f'Sentence: "{note.replace("C looks", "You look")}"').replace(
            "C picks", "You pick"
        )

    with scripted_endpoint(rewrite) as (url, asked):
        done = run(tmp_path, tmp_path / "out", url, "--rewrite")
    assert done.returncode == 0 and len(asked) == 3
    assert "left out 1: reply: still speaks of C (a, messages[3])" in done.stdout
    [written] = rows_of(tmp_path / "out")
    expected = [(0, "You look around."), (1, "You pick a cup."), (2, "You look around.")]
    assert [(message["time"], message["content"]) for message in written["messages"]] == expected
    assert written["video"] == "../a.mp4" and written["task"] == "ego4d_narration" and "where" not in written


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply("\n"), "empty reply"),
        (Reply('""'), "empty reply"),
        (Reply("You look", True), "reply was cut"),
        (Reply("<think>\nThe note is about C.", True), "empty reply"),
        (Reply("<think>C looks.</think>", True), "empty reply"),
        (Reply("You look at #C now."), "still speaks of C"),
        (Reply("You look around. " * 5), "much longer"),
        ("no reply from the endpoint", "no reply"),
    ],
)
def test_a_bad_rewrite_is_rejected(reply, reason):
    with pytest.raises(RejectedError, match=reason):
        read_rewrite("C looks around.", reply)


@pytest.mark.parametrize("thoughts", ["<think>\nC is the user.\n</think>\n\n", "C is the user.\n</think>\n"])
def test_thoughts_are_no_rewrite(thoughts):
    # Some chat templates put the opening tag into the prompt.
    assert read_rewrite("C looks around.", Reply(f"{thoughts}You look around.")) == "You look around."


def test_a_letter_in_a_word_is_not_the_wearer():
    assert read_rewrite("C opens a can of vitamin C.", Reply("You open a can of C-4.")) == "You open a can of C-4."
