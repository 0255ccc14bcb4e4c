# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Let a language model write dialogues about videos with a known timeline, as VideoLLM-online's second source of data.

```bash
python train/data/generate.py --dataset prepared/goalstep --out dialogues --model meta-llama/Meta-Llama-3-8B-Instruct
python train/data/generate.py --dataset prepared/goalstep --out dialogues \\
    --endpoint http://localhost:8000/v1 --endpoint_model NAME
```

Each reply of the language model is kept. If the command is interrupted, run it again: it continues where it stopped.
"""

import shlex
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videollm_mod.console import quiet

from tqdm.auto import tqdm
from transformers import HfArgumentParser

from videollm_mod.mistakes import one_line_errors
from videollm_mod.outputs import path_from, write_json
from videollm_mod.train.data.about import read_about
from videollm_mod.train.data.converters import Notes
from videollm_mod.train.data.dialogues import to_number
from videollm_mod.train.data.faults import FaultyRowError
from videollm_mod.train.data.json_rows import LineWriter
from videollm_mod.train.data.planned_dialogues import (
    Plan,
    RejectedError,
    find_timeline,
    plan_dialogue,
    read_dialogue,
    to_messages,
)
from videollm_mod.train.data.prepare import describe_all, describe_split
from videollm_mod.train.data.rewriting import ask_for_rewrite, read_rewrite
from videollm_mod.train.data.timed_messages import SOURCES, VIDEO_ROOT_HELP, load_timed_messages
from videollm_mod.train.reply_cache import Reply


# `--help` does without torch and the client of endpoints.
if TYPE_CHECKING:
    from videollm_mod.train.language_model import Writer


@dataclass
class GenerateArguments:
    """
    What to write dialogues about, and how.

    Args:
        dataset (`str`): Rows with timelines: a folder of `prepare.py`, or any timed messages.
        out (`Path`): Folder to write to.
        video_root (`list[str]`, *optional*): Folders, and beginnings of URLs, outside the data set that rows may name.
        split (`str`, *optional*, defaults to `"train"`): Split to read and to write.
        task (`str`, *optional*): Tasks of which to use the rows, separated by commas. Defaults to all rows.
        rewrite (`bool`, *optional*, defaults to `False`): Whether to rewrite the replies of the rows instead, from
            "C looks around." to "You look around.".
        dialogues (`int`, *optional*, defaults to 10): Number of dialogues per row.
        questions (`int`, *optional*, defaults to 3): Most questions in a dialogue.
        events (`int`, *optional*, defaults to 64): Most events in a dialogue. A dialogue about a longer timeline
            covers a random part of it.
        seed (`int`, *optional*, defaults to 0): Another seed gives other questions at other times.
        fps (`float`, *optional*, defaults to 2.0): Frames per second of the grid on which times are placed.
        min_seconds (`float`, *optional*, defaults to 0.0): Shortest time from the first message to the last.
            VideoLLM-online uses 60.
        max_seconds (`float`, *optional*, defaults to 3600.0): Longest time from the first message to the last.
    """

    dataset: str = field(metadata={"help": "Rows with timelines: a folder of prepare.py, or any timed messages."})
    out: Path = field(metadata={"help": "Folder to write to."})
    video_root: list[str] | None = field(default=None, metadata={"help": VIDEO_ROOT_HELP})
    split: str = field(default="train", metadata={"help": "Split to read and to write."})
    task: str | None = field(default=None, metadata={"help": "Use rows of these tasks, separated by commas."})
    rewrite: bool = field(
        default=False, metadata={"help": 'Rewrite replies from "C looks around." to "You look around." instead.'}
    )
    dialogues: int = field(default=10, metadata={"help": "Number of dialogues per row."})
    questions: int = field(default=3, metadata={"help": "Most questions in a dialogue."})
    events: int = field(default=64, metadata={"help": "Most events in a dialogue."})
    seed: int = field(default=0, metadata={"help": "Another seed gives other questions at other times."})
    fps: float = field(default=2.0, metadata={"help": "Frames per second of the grid on which times are placed."})
    min_seconds: float = field(default=0.0, metadata={"help": "Shortest time from the first message to the last."})
    max_seconds: float = field(default=3600.0, metadata={"help": "Longest time from the first message to the last."})

    def __post_init__(self) -> None:
        for name in ("dialogues", "questions", "events", "fps"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name} must be a positive number, got {getattr(self, name):g}.")


@dataclass
class WriterArguments:
    """
    Which language model writes.

    Args:
        model (`str`, *optional*): A model of Transformers that is tuned for instructions: a folder or a Hub id.
        endpoint (`str`, *optional*): In place of `model`: address of an OpenAI-compatible interface.
        endpoint_model (`str`, *optional*): Name of the model there. The key is the variable `OPENAI_API_KEY`.
        max_tokens (`int`, *optional*, defaults to 2048): Tokens after which a reply is cut.
        temperature (`float`, *optional*, defaults to 0.0): Temperature of sampling. 0 takes the likeliest tokens.
        batch_size (`int`, *optional*, defaults to 8): Dialogues that a local model writes together.
        device (`str`, *optional*, defaults to `"auto"`): Device of a local model.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of a local model.
        concurrency (`int`, *optional*, defaults to 8): Requests to an endpoint at the same time.
        timeout (`float`, *optional*, defaults to 120.0): Seconds to wait for a reply of an endpoint.
        max_retries (`int`, *optional*, defaults to 5): How often to repeat a request that failed.
    """

    model: str | None = field(default=None, metadata={"help": "A model tuned for instructions: a folder or a Hub id."})
    endpoint: str | None = field(default=None, metadata={"help": "Address of an OpenAI-compatible interface."})
    endpoint_model: str | None = field(default=None, metadata={"help": "Name of the model at the endpoint."})
    max_tokens: int = field(default=2048, metadata={"help": "Tokens after which a reply is cut."})
    temperature: float = field(default=0.0, metadata={"help": "Temperature of sampling. 0 is greedy."})
    batch_size: int = field(default=8, metadata={"help": "Dialogues that a local model writes together."})
    device: str = field(default="auto", metadata={"help": "Device of a local model."})
    dtype: str = field(default="auto", metadata={"help": "Data type of a local model."})
    concurrency: int = field(default=8, metadata={"help": "Requests to an endpoint at the same time."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds to wait for a reply of an endpoint."})
    max_retries: int = field(default=5, metadata={"help": "How often to repeat a request that failed."})

    def __post_init__(self) -> None:
        if (self.model is None) == (self.endpoint is None):
            raise ValueError("give either --model or --endpoint with --endpoint_model.")
        if (self.endpoint is None) != (self.endpoint_model is None):
            raise ValueError("--endpoint and --endpoint_model belong together.")

    def make_writer(self, cache: Path) -> "Writer":
        """Return the language model, with a folder for its replies."""
        from videollm_mod.train.endpoint import Endpoint
        from videollm_mod.train.language_model import EndpointWriter, LocalWriter

        options = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        if self.model is not None:
            place = {"device": self.device, "dtype": self.dtype}
            return LocalWriter(self.model, **options, **place, batch_size=self.batch_size, cache=cache)
        retries = {"timeout": self.timeout, "max_retries": self.max_retries}
        endpoint = Endpoint(self.endpoint, self.endpoint_model, cache=cache, **retries)
        return EndpointWriter(endpoint, **options, concurrency=self.concurrency)


# ----------------------------------------------------------------------------------------------------------- dialogues


class DialogueGenerator:
    """
    Turns rows with timelines into rows with dialogues.

    Args:
        arguments ([`GenerateArguments`]): How.
        writer ([`Writer`]): The language model.
        notes ([`Notes`]): Where to count what is left out.
    """

    def __init__(self, arguments: GenerateArguments, writer: "Writer", notes: Notes) -> None:
        self.arguments, self.writer, self.notes = arguments, writer, notes

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the rows of dialogues that can be used, in the order of their sources."""
        planned: dict[tuple[int, int], tuple[dict[str, Any], Plan]] = {}
        made: dict[tuple[int, int], dict[str, Any] | None] = {}
        order: deque[tuple[int, int]] = deque()
        with tqdm(total=len(rows) * self.arguments.dialogues, unit="dialogue", disable=None) as bar:
            for key, reply in self.writer.write(self._requests(rows, planned, order)):
                source, plan = planned.pop(key)
                made[key] = self._make_row(source, plan, key[1], reply)
                bar.update()
                # Replies come in any order. A row waits for those before it.
                while order and order[0] in made:
                    row = made.pop(order.popleft())
                    if row is not None:
                        yield row

    def _requests(
        self, rows: Sequence[dict[str, Any]], planned: dict, order: deque
    ) -> Iterator[tuple[tuple[int, int], Any]]:
        """Yield the prompts of all dialogues, and put their plans into `planned` and their keys into `order`."""
        options = {"fps": self.arguments.fps, "most_questions": self.arguments.questions}
        for index, row in self._read(rows, self.notes):
            try:
                events = find_timeline(row)
            except RejectedError as error:
                self.notes.leave_out(row["id"], "", str(error))
                continue
            span = {"first": to_number(row.get("start")) or 0.0, "last": to_number(row.get("end"))}
            for number in range(self.arguments.dialogues):
                name = f"{self.arguments.seed}/{row['id']}/{number}"
                plan = plan_dialogue(events, name=name, most_events=self.arguments.events, **options, **span)
                planned[index, number] = (row, plan)
                order.append((index, number))
                yield (index, number), plan.prompt()

    def _read(self, rows: Sequence[dict[str, Any]], notes: Notes) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the rows that can be used, each with an `id`."""
        tasks = None if self.arguments.task is None else self.arguments.task.split(",")
        for index in range(len(rows)):
            try:
                row = rows[index]
            except FaultyRowError as error:
                notes.leave_out(str(error), "", "not a row")
                continue
            named = [row[name] for name in SOURCES if isinstance(row.get(name), str)]
            messages = row.get("messages")
            if tasks is not None and row.get("task") not in tasks:
                continue
            if len(named) != 1:
                notes.leave_out(f"row {index}", "video", "not one file")
            elif not isinstance(messages, list) or not all(map(_is_message, messages)):
                notes.leave_out(f"row {index}", "messages", "not a list of messages")
            else:
                yield index, {**row, "id": str(row.get("id") or f"{Path(named[0]).stem}/{index}")}

    def _make_row(self, source: dict[str, Any], plan: Plan, number: int, reply: Reply | str) -> dict[str, Any] | None:
        where = f"{source['id']}/dialogue{number}"
        try:
            if isinstance(reply, str):
                raise RejectedError(reply)
            dialogue = read_dialogue(plan, reply.text, is_cut=reply.is_cut, notes=self.notes, where=where)
            self._check_length(plan, dialogue)
        except RejectedError as error:
            self.notes.leave_out(where, "", str(error))
            return None
        end = max(dialogue[-1][0], plan.start + 1)
        return {
            "id": where,
            **_source_of(source, self.arguments.out),
            "start": plan.start / plan.fps,
            "end": end / plan.fps,
            "messages": to_messages(plan, dialogue),
        }

    def _check_length(self, plan: Plan, dialogue: list[tuple[int, str, str]]) -> None:
        if not dialogue:
            raise RejectedError("no question has a reply")
        seconds = (dialogue[-1][0] - dialogue[0][0]) / plan.fps
        if seconds < self.arguments.min_seconds:
            raise RejectedError("shorter than --min_seconds")
        if seconds > self.arguments.max_seconds:
            raise RejectedError("longer than --max_seconds")


class Rewriter(DialogueGenerator):
    """Rewrites the replies of rows, each text once. See [`DialogueGenerator`]."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield the rows with their replies rewritten."""
        texts = {text for _, row in self._read(rows, Notes()) for text in _replies(row)}
        rewritten: dict[str, str | RejectedError] = {}
        requests = ((text, ask_for_rewrite(text)) for text in sorted(texts))
        for text, reply in tqdm(self.writer.write(requests), total=len(texts), unit="reply", disable=None):
            try:
                rewritten[text] = read_rewrite(text, reply)
            except RejectedError as error:
                rewritten[text] = error
        for _, row in self._read(rows, self.notes):
            messages = list(self._rewrite(row, rewritten))
            if any(message.get("role") == "assistant" for message in messages):
                kept = {name: value for name, value in row.items() if name not in (*SOURCES, "where")}
                yield {**kept, **_source_of(row, self.arguments.out), "messages": messages}
            else:
                self.notes.leave_out(row["id"], "messages", "no reply is left")

    def _rewrite(self, row: dict[str, Any], rewritten: dict[str, str | RejectedError]) -> Iterator[dict[str, Any]]:
        for index, message in enumerate(row["messages"]):
            if message.get("role") != "assistant":
                yield message
                continue
            text = rewritten[message["content"]]
            if isinstance(text, str):
                yield {**message, "content": text}
            else:
                self.notes.leave_out(row["id"], f"messages[{index}]", f"reply: {text}")


def _replies(row: dict[str, Any]) -> Iterator[str]:
    yield from (message["content"] for message in row["messages"] if message.get("role") == "assistant")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _source_of(row: dict[str, Any], out: Path) -> dict[str, str]:
    """Return the video or frame features of a row, as a path from the folder `out`."""
    [(name, path)] = [(name, row[name]) for name in SOURCES if row.get(name) is not None]
    return {name: path if "://" in path else path_from(out, path)}


# ------------------------------------------------------------------------------------------------------------- command


def generate(
    rows: Sequence[dict[str, Any]], arguments: GenerateArguments, writer: "Writer", command: str = ""
) -> dict[str, Any]:
    """
    Write `OUT/<split>.jsonl` and `OUT/about.json`. Files of an earlier run are replaced at the end.

    Args:
        rows (sequence of `dict`): The rows of the data set.
        arguments ([`GenerateArguments`]): What to do.
        writer ([`Writer`]): The language model.
        command (`str`, *optional*): The command, for `about.json`.

    Returns:
        `dict`: What `about.json` says.

    Raises:
        `ValueError`: If no row is left. Files of an earlier run stay.
        [`EndpointError`]: If the endpoint cannot be used any more.
    """
    notes = Notes()
    notes.split = arguments.split
    make: Callable[..., Iterator[dict[str, Any]]] = Rewriter if arguments.rewrite else DialogueGenerator
    with LineWriter(arguments.out / f"{arguments.split}.jsonl") as file:
        count = 0
        for count, row in enumerate(make(arguments, writer, notes)(rows), 1):  # noqa: B007
            file.write(row)
        about = _describe(arguments, writer, notes, count, command)
        print(describe_all({"splits": {arguments.split: about["splits"][arguments.split]}}, notes, arguments.out))
        if not count:
            raise ValueError("no dialogue is left; the table says why.")
        if read_about(str(arguments.out)).get("license") != about["license"]:
            # A program that is killed must not leave dialogues with the licence of others.
            (arguments.out / "about.json").unlink(missing_ok=True)
    write_json(arguments.out / "about.json", about)
    return about


def _describe(
    arguments: GenerateArguments, writer: "Writer", notes: Notes, count: int, command: str
) -> dict[str, Any]:
    given, before = read_about(arguments.dataset), read_about(str(arguments.out))
    made = describe_split(arguments.split, {arguments.split: Counter({"": count})}, notes)
    return {
        "source": f"{'replies rewritten' if arguments.rewrite else 'dialogues'} by {writer.name}",
        "dataset": arguments.dataset,
        "tasks": [],
        "license": given.get("license", "unknown"),
        "may_be_shared": given.get("may_be_shared", False),
        "fps": arguments.fps,
        "labels": {},
        "splits": {**before.get("splits", {}), arguments.split: made},
        "command": command,
    }


def main() -> None:
    """Write dialogues about the rows of a data set."""
    with one_line_errors():
        parser = HfArgumentParser((GenerateArguments, WriterArguments), prog="generate.py", allow_abbrev=False)
        arguments, chosen = parser.parse_args_into_dataclasses()
        from videollm_mod.train.endpoint import EndpointError

        source, cache = Path(arguments.dataset), arguments.out / "replies"
        if arguments.out.resolve() in (source.resolve(), source.resolve().parent):
            raise ValueError(f"--out '{arguments.out}' holds the data set: write to another folder.")
        # Faults of these are found before a model is loaded.
        rows = load_timed_messages(arguments.dataset, arguments.split, video_root=arguments.video_root or ())
        arguments.out.mkdir(parents=True, exist_ok=True)
        writer = chosen.make_writer(cache)
        command = shlex.join(["python", "train/data/generate.py", *sys.argv[1:]])
        try:
            generate(rows, arguments, writer, command)
        except EndpointError as error:
            raise SystemExit(
                f"error: {str(error).rstrip('.')}. Replies so far are in '{cache}': run the command again."
            ) from None
        except KeyboardInterrupt:
            raise SystemExit(f"interrupted. Replies so far are in '{cache}': run the command again.") from None


if __name__ == "__main__":
    quiet()
    main()
