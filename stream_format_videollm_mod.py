# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Stream formats in turns: the text around frames, questions and replies, as other models were trained on it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken


# What every format has. The template writes these texts; `{time}` is MM:SS, `{index}` counts frames from 1.
_PARTS = {
    "begin": "",  # begins the text
    "system_before": "",
    "system_after": "",
    "user_before": "",  # begins a user's turn, which has frames, words, or both
    "user_after": "",
    "assistant_before": "",  # a space at its end belongs to the first token of the reply
    "assistant_end": "",  # one special token, which the model writes to end a reply
    "assistant_after": "",  # between that token and the next turn
    "intro": "",  # before the first frame of a dialogue
    "frame_before": "",
    "frame_after": "",  # the model decides after it whether to speak
    "frame_between": "",  # between two frames
    "frames_end": "",  # after the last frame of a turn, whatever follows
    "outro": "",  # between the last frame and the user's words
    "words_before": "",  # before words that begin a turn
}
_CHATML = {
    "system_before": "<|im_start|>system\n",
    "system_after": "<|im_end|>\n",
    "user_before": "<|im_start|>user\n",
    "user_after": "<|im_end|>\n",
    "assistant_before": "<|im_start|>assistant\n",
    "assistant_end": "<|im_end|>",
    "assistant_after": "\n",
}
_FORMATS = {
    "chatml": {**_CHATML, "frame_between": "\n", "outro": "\n"},
    "llama3": {
        "begin": "<|begin_of_text|>",
        "system_before": "<|start_header_id|>system<|end_header_id|>\n\n",
        "system_after": "<|eot_id|>",
        "user_before": "<|start_header_id|>user<|end_header_id|>\n\n",
        "user_after": "<|eot_id|>",
        "assistant_before": "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "assistant_end": "<|eot_id|>",
        "frame_between": "\n",
        "outro": "\n",
    },
    "llava_onevision": {
        "system_before": "<|im_start|>system \n",
        "system_after": "<|im_end|>",
        "user_before": "<|im_start|>user ",
        "user_after": "<|im_end|>",
        "assistant_before": "<|im_start|>assistant\n",
        "assistant_end": "<|im_end|>",
        "frames_end": "<image_newline>",
        "outro": "\n",
        "words_before": "\n",
    },
    "smolvlm": {
        "begin": "<|im_start|>",
        "system_before": "System: ",
        "system_after": "<end_of_utterance>\n",
        "user_before": "User: ",
        "user_after": "<end_of_utterance>\n",
        "assistant_before": "Assistant: ",
        "assistant_end": "<end_of_utterance>",
        "assistant_after": "\n",
        "intro": "You are provided the following series of frames from a video.\n",
        "frame_before": "\nFrame from {time}:<fake_token_around_image><global-img>",
        "frame_after": "<fake_token_around_image>",
        "outro": "\n\n",
    },
    "internvl": {
        **_CHATML,
        "frame_before": "Frame{index}: <img>",
        "frame_after": "</img>",
        "frame_between": "\n",
        "outro": "\n",
    },
}
STREAM_FORMATS: dict[str, dict[str, str]] = {name: {**_PARTS, **texts} for name, texts in _FORMATS.items()}
_FIRST_LINE = re.compile(r"\A\{%- set stream_format = .*? -%\}$", re.MULTILINE)


def check_stream_format(stream_format: str | Mapping[str, str]) -> dict[str, str]:
    """Return a stream format, given its name or its texts; raise `ValueError` for unknown names and parts."""
    if isinstance(stream_format, str):
        if stream_format not in STREAM_FORMATS:
            known = ", ".join(STREAM_FORMATS)
            raise ValueError(f"`stream_format` {stream_format!r} is unknown; known formats are {known}.")
        return dict(STREAM_FORMATS[stream_format])
    if not isinstance(stream_format, Mapping):
        kind = type(stream_format).__name__
        raise ValueError(f"`stream_format` must be a name, or a dict of texts by part, got {kind}.")
    if unknown := sorted(set(stream_format) - set(_PARTS)):
        raise ValueError(f"`stream_format` has unknown parts {', '.join(unknown)}; known are {', '.join(_PARTS)}.")
    if wrong := [name for name, text in stream_format.items() if not isinstance(text, str)]:
        raise ValueError(f"`stream_format` must have texts as parts; {', '.join(wrong)} is none.")
    if not stream_format.get("assistant_end"):
        raise ValueError("`stream_format` needs `assistant_end`, the special token that ends a reply.")
    return {**_PARTS, **stream_format}


def choose_template(stream_format: Mapping[str, str] | None, template: str | None = None) -> str:
    """
    Return the chat template of a stream format, with the format inside: `template`, or `turn_template.jinja`. Without
    a format the default is `chat_template.jinja`. Raise `ValueError` if `template` is of the other kind.
    """
    if template is None:
        name = "chat_template.jinja" if stream_format is None else "turn_template.jinja"
        template = Path(__file__).with_name(name).read_text(encoding="utf-8")
    if bool(_FIRST_LINE.match(template)) != (stream_format is not None):
        raise ValueError(
            "`chat_template` and `stream_format` do not fit: a template of a stream format begins with "
            "`{%- set stream_format = {} -%}`, and others do not. Set both, or leave both as the checkpoint has them."
        )
    texts = json.dumps(dict(stream_format or {}), ensure_ascii=False)
    return _FIRST_LINE.sub(lambda _: f"{{%- set stream_format = {texts} -%}}", template)


def make_special(tokenizer: Any, frame_token: str, written: str) -> None:
    """Make the frame token and the tokens of a stream format special, so that text of others cannot contain them."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    names = {frame_token} - set(tokenizer.get_vocab())
    names |= {name for name, is_special in added.items() if not is_special and name in written + frame_token}
    if names:
        tokens = [AddedToken(name, special=True, normalized=False) for name in sorted(names)]
        tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)


__all__ = ["STREAM_FORMATS", "check_stream_format", "choose_template", "make_special"]
