# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamingBench (arXiv 2411.03628): questions with options, and outputs at the right moment, polled and native."""

from collections.abc import Sequence
from typing import Any, ClassVar

from videollm_mod.train.data.faults import naming
from videollm_mod.train.data.streaming_bench import PATIENCE
from videollm_mod.train.streaming_evaluation import open_frames
from videollm_mod.train.tasks import Task
from videollm_mod.train.tasks.choices import contains, letter_likelihoods, most_likely, read_letter, read_yes
from videollm_mod.train.tasks.replies import Streamed
from videollm_mod.train.tasks.running import Runner
from videollm_mod.train.text_scores import split_words


# Seconds by which an output may be early or late.
TOLERANCE = 2.0
POLL = '{question} Is it now time to say "{output}"? Reply yes or no only.'


class Choices(Task):
    """
    The share of right replies, in all and by type of question.

    A reply chooses an option by its letter or by its text (see [`read_letter`]). The published scorer compares the
    first character of the reply. `accuracy_by_likelihood` takes the most likely letter in place of the reply.
    """

    truth_keys = ("options",)
    no_reply: ClassVar[dict[str, Any] | None] = {"text": ""}
    official_note = "The published scorer compares the first character of the reply with the letter."
    scored_keys = ("options", "type", "answer")

    def __init__(self, name: str) -> None:
        super().__init__(name)
        figures = {
            "streaming_bench_real": {"InternLM-XComposer2.5-OmniLive": 0.7379, "StreamPro": 0.789},
            "streaming_bench_omni": {"ViSpeak": 0.616},
        }
        self.papers = {model: {"accuracy": figure} for model, figure in figures.get(name, {}).items()}

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return the greedy reply, and how likely each letter is."""
        (text,) = runner.answer(row, max_new_tokens=32)
        return {"text": text, "likelihoods": letter_likelihoods(runner, row, row["truth"]["options"])}

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return the accuracies."""
        by_type: dict[str, list[bool]] = {}
        for row, predicted in zip(rows, predictions, strict=True):
            text, truth = predicted["text"], row["truth"]
            chosen = text[:1] if official else read_letter(text, truth["options"])
            by_type.setdefault(truth["type"], []).append(chosen == truth["answer"])
        right = [value for values in by_type.values() for value in values]
        scores = {name.lower().replace(" ", "_"): sum(values) / len(values) for name, values in by_type.items()}
        scores["accuracy"] = sum(right) / len(right)
        if not official:
            pairs = zip(rows, predictions, strict=True)
            likely = [most_likely(predicted.get("likelihoods")) == row["truth"]["answer"] for row, predicted in pairs]
            scores["accuracy_by_likelihood"] = sum(likely) / len(likely)
        return scores


class PolledOutput(Task):
    """
    Outputs at the right moment, polled as the published code does.

    From a second after the question to four seconds after the right moment, the model is asked each second whether it
    is time. At the first yes it is asked for the output. `time_accuracy` is the share of first yeses within two
    seconds of the moment, `accuracy` of those with the right output too. The clip begins at the question, and earlier
    polls are no history.
    """

    papers = {"Seed1.5-VL": {"accuracy": 0.828}, "MMDuet2": {"accuracy": 0.3469}}
    truth_keys = ("asked", "time", "output")
    no_reply: ClassVar[dict[str, Any] | None] = {"polls": [], "outputs": {}}
    official_note = 'The published scorer takes "yes" and the output anywhere in a reply, also within other words.'

    def predict(self, runner: Runner, row: dict[str, Any]) -> dict[str, Any]:
        """Return each poll until the first yes, by the word and by the published rule, and the outputs."""
        truth, question = row["truth"], row["messages"][0]["content"]
        poll = POLL.format(question=question, output=truth["output"])
        due = [truth["asked"] + second for second in range(1, int(truth["time"] - truth["asked"]) + PATIENCE + 1)]
        session = runner.model.stream(runner.processor, fps=runner.fps, speak=_never, max_new_tokens=32)
        found: dict[str, Any] = {"polls": [], "outputs": {}}
        stream, frames = open_frames(session, row)
        with naming(row):
            for time, picture in frames:
                # The clip of a poll ends before the frame at its moment.
                while due and time >= due[0] - 1e-6 and not _is_over(found):
                    _poll(session, due.pop(0), poll, question, found)
                stream.push(picture, time=time)
        # After the end of the video nothing changes, but for the moment.
        for time in due:
            if not _is_over(found):
                _poll(session, time, poll, question, found)
        return found

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,
    ) -> dict[str, float]:
        """Return `time_accuracy`, `accuracy` and `answered`, the share of questions with a yes."""
        rule = "official" if official else "word"
        spoken = []
        for predicted in predictions:
            first = next((poll for poll in predicted["polls"] if _YES[rule](poll["text"])), None)
            spoken.append(None if first is None else (first["time"], predicted["outputs"][rule]))
        return _score_moments(rows, spoken, official)


class NativeOutput(Streamed):
    """
    Outputs at the right moment, spoken unasked: the first reply after the question, in a stream.

    The clip begins at the question. `time_accuracy` and `accuracy` are as for the polled task, but the two tasks do
    not compare: here no poll tells the model the output or the moments.
    """

    has_published_scorer = False

    def wants(self, row: dict[str, Any]) -> bool:
        """Return whether this is a row of the proactive task."""
        return row.get("task") == "streaming_bench_proactive"

    def score(
        self,
        rows: Sequence[dict[str, Any]],
        predictions: Sequence[dict[str, Any]],
        about: dict[str, Any],  # noqa: ARG002
        official: bool = False,  # noqa: ARG002
    ) -> dict[str, float]:
        """Return `time_accuracy`, `accuracy` and `answered`, the share of questions with a reply."""
        first = [next(iter(predicted["replies"]), None) for predicted in predictions]
        spoken = [None if reply is None else (reply["time"], reply["text"]) for reply in first]
        return _score_moments(rows, spoken, official=False)


def _never(_frame: Any) -> bool:
    """The model speaks when it is asked."""
    return False


# Whether a reply says yes: by the word, and as the published code reads it.
_YES = {"word": lambda text: read_yes(text) is True, "official": lambda text: "yes" in text.strip().lower()}


def _is_over(found: dict[str, Any]) -> bool:
    """Return whether every rule has heard a yes."""
    return len(found["outputs"]) == len(_YES)


def _poll(session: Any, time: float, poll: str, question: str, found: dict[str, Any]) -> None:
    """Ask whether it is time, and at the first yes for the output."""
    text = _ask(session, poll)
    found["polls"].append({"time": time, "text": text})
    if heard := [rule for rule, says_yes in _YES.items() if rule not in found["outputs"] and says_yes(text)]:
        found["outputs"] |= dict.fromkeys(heard, _ask(session, question))


def _ask(session: Any, question: str) -> str:
    """Return the reply of a copy of the stream, so that the stream itself has not heard the question."""
    if session.num_frames + session.num_waiting == 0:
        return ""
    copy = session.fork()
    return "".join(event.text for event in copy.ask(question) if event.role == "assistant")


def _score_moments(
    rows: Sequence[dict[str, Any]], spoken: Sequence[tuple[float, str] | None], official: bool
) -> dict[str, float]:
    in_time = right = 0
    for row, reply in zip(rows, spoken, strict=True):
        truth = row["truth"]
        if reply is not None and abs(reply[0] - truth["time"]) <= TOLERANCE + 1e-6:
            in_time += 1
            output, text = truth["output"], reply[1]
            right += output in text if official else contains(split_words(text), split_words(output))
    count = len(rows)
    answered = sum(reply is not None for reply in spoken)
    return {"time_accuracy": in_time / count, "accuracy": right / count, "answered": answered / count}
