# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random dialogues: their tokens are those of their frames and texts, or an error names the message."""

import copy
import random
from functools import lru_cache
from typing import Any

import pytest
import torch
from fuzzing import SEEDS, WRONG, check_error, run_case
from hypothesis import given
from tiny import tiny_processor
from turns import SPECIAL, turn_processor

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.faults import FaultyRowError


FORMATS = (None, *SPECIAL)
ROLES = ("system", "user", "assistant", "stream")
TEXTS = [
    "",
    " ",
    "\n",
    "A red ball.",
    "Was siehst du? Ein Café, 日本語, 👩‍👩‍👧.",
    "]\nAssistant:",
    "[,,,]",
    "\nUser: Hi",
    "a\u0301",
]
TEXTS += [
    "{{ messages }}",
    "{% for x in y %}",
    "\u202eabc",
    "\x00\x07",
    "\r\n\r\n",
    "\ufeff",
    "\u2028",
    "\ue0001\ue001",
    "x" * 20_000,
    "é " * 3000,
]
# Half of a pair of surrogates, which no text may hold.
HALVES = ["\ud800", "a\udfff", "\ud83d \ude00"]


@lru_cache
def processor_of(name: str | None) -> Any:
    return tiny_processor() if name is None else turn_processor(name)


@lru_cache
def special_texts(name: str | None) -> list[str]:
    tokenizer = processor_of(name).tokenizer
    return sorted({token.content for token in tokenizer.added_tokens_decoder.values()})


def draw_text(chance: random.Random, name: str | None) -> Any:
    """Return a text, which may hold special tokens, or now and then something that is no text."""
    if chance.random() < 0.02:
        return chance.choice([*HALVES, *WRONG])
    parts = chance.choices([*TEXTS[:-2], *special_texts(name)], k=chance.choice([0, 1, 1, 1, 2, 4]))
    parts += [chance.choice(TEXTS[-2:])] * (chance.random() < 0.03)
    return chance.choice(["", " ", "\n"]).join(parts)


def draw_messages(chance: random.Random, name: str | None, *, is_timed: bool) -> list[Any]:
    """Return messages of a dialogue in any order of roles."""
    messages: list[Any] = []
    time = 0.0
    for _ in range(chance.choice([0, 1, 2, 3, 3, 5, 8])):
        role = chance.choice(ROLES[1:3] if is_timed or chance.random() < 0.1 else ROLES[1:])
        role = "system" if not messages and chance.random() < 0.3 else role
        message: dict[str, Any] = {"role": role}
        if role == "stream":
            message["num_frames"] = chance.choice([1, 1, 2, 3])
            if chance.random() < 0.2:
                message["learn"] = [chance.random() < 0.5 for _ in range(message["num_frames"])]
        else:
            message["content"] = draw_text(chance, name)
            if chance.random() < 0.1:
                message["learn"] = chance.random() < 0.5
        if is_timed and (messages or chance.random() < 0.3):
            time += chance.choice([0, 0.1, 0.5, 0.7])
            message["time"] = time
        messages.append(message)
    for _ in range(chance.choice([0, 0, 0, 1, 2])):
        spoil(chance, messages)
    return messages


def spoil(chance: random.Random, messages: list[Any]) -> None:
    """Change a message to something that is perhaps none."""
    if not messages:
        return
    at = chance.randrange(len(messages))
    message = messages[at]
    if not isinstance(message, dict) or chance.random() < 0.1:
        messages[at] = copy.deepcopy(chance.choice(WRONG))
    elif chance.random() < 0.2 and message:
        del message[chance.choice(sorted(message, key=str))]
    elif chance.random() < 0.3:
        other = chance.randrange(len(messages))
        messages[at], messages[other] = messages[other], messages[at]
    else:
        name = chance.choice([*message, "role", "content", "time", "learn", "num_frames", "x"])
        message[name] = copy.deepcopy(chance.choice(WRONG))  # a case must not change those of the next


def count_frames(messages: list[Any]) -> int:
    counts = [x.get("num_frames") for x in messages if isinstance(x, dict) and x.get("role") == "stream"]
    return sum(x for x in counts if isinstance(x, int) and 0 < x < 100)


def is_plain(messages: list[Any]) -> bool:
    """Whether messages are as documented, so that they must not be refused: known roles, texts, and frames."""
    for index, message in enumerate(messages):
        if (
            not isinstance(message, dict)
            or message.get("role") not in ROLES
            or set(message) - {"role", "content", "num_frames"}
        ):
            return False
        if message["role"] == "system" and index > 0:
            return False
        if message["role"] == "stream":
            if isinstance(message.get("content"), (list, tuple)):  # parts, which may be wrong
                return False
            if type(message.get("num_frames")) is not int or not 1 <= message["num_frames"] <= 100_000:
                return False
        elif not isinstance(message.get("content"), str) or any("\ud800" <= x <= "\udfff" for x in message["content"]):
            return False
    return count_frames(messages) > 0


def check_tokens(processor: Any, inputs: Any, num_frames: int, messages: list[Any], labels: bool) -> None:
    """Check that texts give no special tokens, and that labels are tokens that follow."""
    ids = inputs["input_ids"][0]
    assert int((ids == processor.frame_token_id).sum()) == num_frames * processor.frame_num_tokens
    if labels:
        assert inputs["labels"].shape == inputs["input_ids"].shape
        given = inputs["labels"][0]
        assert bool(((given == -100) | ((given >= 0) & (given < len(processor.tokenizer)))).all())
    ends = sum(isinstance(x, dict) and x.get("role") == "assistant" for x in messages)
    if processor.stream_format is None:
        assert int((ids == processor.end_of_reply_id).sum()) == ends, "an end of reply from a text"


def try_dialogue(chance: random.Random) -> None:
    name = chance.choice(FORMATS)
    processor = processor_of(name)
    messages = draw_messages(chance, name, is_timed=False)
    frames = count_frames(messages)
    shown = frames if chance.random() < 0.95 else chance.choice([0, 1, 2, 7])
    features = torch.zeros(shown, 1, 4) if shown else None
    labels = chance.random() < 0.5
    try:
        inputs = processor(messages, frame_features=features, return_labels=labels)
    except ValueError as error:
        check_error(error, "essage", "dialogue", "`text`")
        # SmolVLM's format writes times, which these messages do not have.
        assert not (is_plain(messages) and shown == frames and name != "smolvlm"), (error, messages)
        text = None
    else:
        messages = [x for x in messages if x]  # `[()]` is a batch of one empty dialogue
        check_tokens(processor, inputs, shown, messages, labels)
        no_frames = any(x.get("num_frames") == 0 for x in messages)
        text = processor.apply_chat_template(messages) if name != "smolvlm" and not no_frames else None
    if text is not None:
        for token in special_texts(name):
            written = sum(str(x.get("content")).count(token) for x in messages)
            assert text.count(token) >= written, "a text is not in the dialogue as it was written"


def try_prompt(chance: random.Random) -> None:
    """Render messages with parts, as servers do, and timed messages, as training does."""
    name = chance.choice(FORMATS)
    processor = processor_of(name)
    messages = draw_messages(chance, name, is_timed=True)
    frames = chance.choice([0, 1, 2, 5, 9])
    try:
        turns = processor.to_stream_turns(messages, frames)
    except ValueError as error:
        check_error(error, "essage")
    else:
        assert sum(turn["num_frames"] for turn in turns if turn["role"] == "stream") == frames
    collator = StreamCollator(processor, augmentation=chance.choice([0.0, 1.0]), packing=chance.random() < 0.5)
    row = {"messages": messages, "frame_features": torch.zeros(frames, 1, 4), "where": "'rows.jsonl', line 3"}
    try:
        batch = collator([row])
    except FaultyRowError as error:
        check_error(error, "'rows.jsonl', line 3")
    else:
        assert int((batch["input_ids"] == processor.frame_token_id).sum()) == frames * processor.frame_num_tokens
        assert int(batch["num_frames"].sum()) == frames


def try_parts(chance: random.Random) -> None:
    """Give contents as lists of parts, and a whole batch."""
    processor = processor_of(chance.choice(FORMATS))
    messages = [
        x for x in draw_messages(chance, None, is_timed=False) if not isinstance(x, dict) or x.get("role") != "stream"
    ]
    for message in messages:
        if isinstance(message, dict) and "content" in message and chance.random() < 0.7:
            texts = [{"type": "text", "text": draw_text(chance, None)} for _ in range(chance.choice([0, 1, 2]))]
            wrong = [
                chance.choice(
                    [
                        {"type": chance.choice(WRONG)},
                        {"type": "video"},
                        {"type": "image", "image": chance.choice(WRONG)},
                        *WRONG,
                    ]
                )
            ]
            message["content"] = texts + wrong * (chance.random() < 0.1)
    given = messages if chance.random() < 0.7 else [messages, messages]
    try:
        inputs = processor.apply_chat_template(given, tokenize=True, return_dict=True, return_tensors="pt")
    except ValueError as error:
        check_error(error, "essage", "dialogue", "image")
    else:
        assert int((inputs["input_ids"] == processor.frame_token_id).sum()) == 0


@pytest.mark.parametrize("work", [try_dialogue, try_prompt, try_parts], ids=["turns", "timed", "parts"])
@given(seed=SEEDS)
def test_a_dialogue_gives_its_tokens_or_an_error_that_names_the_message(request, work, seed):
    run_case(request, work.__name__.removeprefix("try_"), seed, work)
