# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Processor of VideoLLM-MoD: turns dialogues and frames into tokens, labels and pixels."""

import math
import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from itertools import accumulate, groupby, islice
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import SizeDict, load_image
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_vision_available
from transformers.utils.chat_template_utils import render_jinja_template

from .checks_videollm_mod import check_count, check_fps, check_seconds, check_text
from .reading_ahead_videollm_mod import keep_up, read_ahead, sample_every
from .stream_format_videollm_mod import check_stream_format, choose_template, make_special
from .video_opening_videollm_mod import goes_on, is_complete
from .video_processing_videollm_mod import VideoLLMMoDVideoProcessor
from .video_reading_videollm_mod import ReadingReport, VideoReader, read_video


if is_vision_available():
    from PIL import Image

DEFAULT_SYSTEM_PROMPT = (
    "A multimodal AI assistant is helping users with some activities. "
    "Below is their conversation, interleaved with the list of video frames received by the assistant."
)
ROLES = ("system", "user", "assistant", "stream")
Message = dict[str, Any]
_Spans = list[tuple[int, int]]
_Part = tuple[int, dict[str, Any]]  # a video or image in a message, with the message's index
_MAY_BE_OFF = ("add_special_tokens", "audio", "max_length", "truncation")  # what callers of any processor turn off
_LABEL_IGNORED = -100
_MOST_FRAMES = 100_000  # of a stream message: templates repeat no more
_PIXELS_TOGETHER = 1 << 21  # resized at once: about a frame of 1920 x 1080


class VideoLLMMoDProcessor(ProcessorMixin):
    r"""
    Wraps a video processor and a tokenizer with a fast backend.

    A dialogue is a list of messages `{"role": ..., "content": ...}` with roles system, user, assistant and stream. A
    stream message has `num_frames` instead of content. Timed messages have a `time` in seconds instead of stream
    messages between them; see [`~VideoLLMMoDProcessor.to_stream_turns`]. Special tokens in a message stay plain text.

    Args:
        video_processor ([`VideoLLMMoDVideoProcessor`]): Turns frames into pixel values.
        tokenizer (`PreTrainedTokenizerBase`): Gets the frame token as a special token if it has none.
        chat_template (`str`, *optional*): Renders dialogues. Defaults to `chat_template.jinja` beside this file, or
            with `stream_format` to `turn_template.jinja`.
        frame_token (`str`, *optional*, defaults to `"<v>"`): Stands for one token of a frame.
        frame_token_interval (`str`, *optional*, defaults to `","`): One token between frames, or `None`. With
            `stream_format` it is not used.
        frame_num_tokens (`int`, *optional*, defaults to 10): Number of tokens per frame, as in the configuration.
        system_prompt (`str`, *optional*): First message of dialogues without one. Defaults to VideoLLM-online's.
        stream_format (`str` or `dict`, *optional*): Texts around frames, words and replies: a name or a value of
            [`STREAM_FORMATS`]. `None` is VideoLLM-online's format. See `docs/stream-format.md`.

    Attributes:
        frame_token_interval_id (`int`, *optional*): The token that means silence after a frame. In a `stream_format`
            it is the first one between two frames, or `None` if a reply to frames begins with it too.
        end_of_reply_id (`int`): The token that ends a reply.
        frame_suffix_ids (`list[int]`): Tokens of the text after a frame, after which the model decides.
        frame_text_tokens (`int`): Most tokens of text around one frame: its own and those between it and the last.
        numbers_frames (`bool`): Whether a frame's text depends on its time or number.

    Raises:
        `ValueError`: If the tokenizer has no offsets or end-of-sequence token, splits the interval token, or does not
            have a special token where `stream_format` needs one.
    """

    def __init__(
        self,
        video_processor: VideoLLMMoDVideoProcessor | None = None,
        tokenizer: Any | None = None,
        chat_template: str | None = None,
        frame_token: str = "<v>",
        frame_token_interval: str | None = ",",
        frame_num_tokens: int = 10,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        stream_format: str | dict[str, str] | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError("The processor needs a tokenizer with a fast backend, which knows where tokens begin.")
        if tokenizer.eos_token is None:
            raise ValueError("The tokenizer has no end-of-sequence token (`eos_token`), which ends every reply.")
        if stream_format is not None:
            stream_format, frame_token_interval = check_stream_format(stream_format), None
        chat_template = choose_template(stream_format, chat_template)
        make_special(tokenizer, frame_token, "".join((stream_format or {}).values()))
        self.frame_token, self.frame_token_interval = frame_token, frame_token_interval
        self.frame_num_tokens, self.system_prompt, self.stream_format = frame_num_tokens, system_prompt, stream_format
        super().__init__(video_processor, tokenizer, chat_template=chat_template)
        tokenizer.chat_template = chat_template
        self.frame_token_id = tokenizer.convert_tokens_to_ids(frame_token)
        frame_text = (stream_format or {}).get("frame_before", "")
        self._needs_times = "{time}" in frame_text
        self.numbers_frames = self._needs_times or "{index}" in frame_text
        self.end_of_reply_id, self.frame_suffix_ids, self.frame_text_tokens = tokenizer.eos_token_id, [], 1
        if stream_format is None:
            self.frame_token_interval_id = self._find_interval_id()
        else:
            self._measure_format(stream_format)

    def _measure_format(self, stream_format: dict[str, str]) -> None:
        """Set what the tokens of a stream format imply. Tokens before a decision must not depend on what follows."""
        special = {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
        end, after = stream_format["assistant_end"], stream_format["frame_after"]
        if end not in special:
            raise ValueError(f"`assistant_end` {end!r} is not a special token of the tokenizer.")
        if after and not after.endswith(tuple(special)):
            raise ValueError(f"`frame_after` {after!r} must end with a special token of the tokenizer, or be empty.")
        self.end_of_reply_id = self.tokenizer.convert_tokens_to_ids(end)
        self.frame_suffix_ids = self._tokenize(self.frame_token + after)[0][1:]
        between = self.encode_turns([], stream_open=True, then="stream", index=2)
        reply = self.encode_turns([], stream_open=True, then="assistant")
        self.frame_token_interval_id = None if between[:1] in ([], reply[:1]) else between[0]
        longest = self.encode_turns([], stream_open=True, then="stream", time=60_000.0, index=100_000)
        self.frame_text_tokens = len(longest) + len(self.frame_suffix_ids)

    def _find_interval_id(self) -> int | None:
        if (interval := self.frame_token_interval) is None:
            return None
        between = self._tokenize(self.frame_token + interval + self.frame_token)[0][1:-1]
        if len(between) != 1:
            raise ValueError(f"`frame_token_interval` {interval!r} splits into {len(between)} tokens; it must be one.")
        return between[0]

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path: Any, *_: Any, **kwargs: Any) -> list[Any]:
        name = pretrained_model_name_or_path
        # Not the processor's own: `AutoTokenizer` would set those in the model's configuration.
        own = {*signature(cls).parameters, "return_unused_kwargs"}
        kwargs = {option: value for option, value in kwargs.items() if option not in own}
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
        except (ValueError, AttributeError, KeyError) as error:
            files = "tokenizer.json or tokenizer_config.json"
            reason = " ".join(str(error).split())[:200]
            message = f"'{name}' has no tokenizer that loads: {files} is missing or damaged ({reason})."
            raise ValueError(message) from error
        # The library would load the video processor as remote code even if this class is local.
        kwargs.pop("trust_remote_code", None)
        try:
            return [VideoLLMMoDVideoProcessor.from_pretrained(name, **kwargs), tokenizer]
        except OSError as error:
            if not os.path.isdir(name):
                raise
            reason = "processor_config.json is missing or has no `video_processor`"
            raise ValueError(f"'{name}' has no video processor that loads: {reason}.") from error

    @property
    def model_input_names(self) -> list[str]:
        """Names of all that the processor returns."""
        return ["input_ids", "attention_mask", "labels", "pixel_values_videos", "frame_features", "num_frames"]

    def __call__(
        self,
        messages: list[Message] | list[list[Message]] | None = None,
        videos: Any | None = None,
        *,
        text: str | list[str] | None = None,
        images: Any | None = None,
        frame_features: torch.Tensor | Sequence[torch.Tensor] | None = None,
        fps: float = 2.0,
        num_frames: int | None = None,
        start: float | Sequence[float] = 0.0,
        end: float | Sequence[float | None] | None = None,
        add_generation_prompt: bool = False,
        return_labels: bool = False,
        padding: bool = True,
        padding_side: str | None = None,
        return_tensors: str | None = "pt",
        **others: Any,
    ) -> BatchFeature:
        r"""
        Return the model's inputs for one dialogue or a batch.

        Args:
            messages (`list[dict]` or `list[list[dict]]`, *optional*): A dialogue or several. The system prompt is
                added if it is missing. Without stream messages and times, all frames come before the first message.
                Content is a text, or a list of parts as in [`~VideoLLMMoDProcessor.apply_chat_template`].
            videos (video or list of videos, *optional*): One per dialogue: a file or URL, of which `fps` frames per
                second are read, or frames, which are used as they are. Channels may come first if they are 3.
            text (`str` or `list[str]`, *optional*): Rendered text in place of `messages`, with one frame token for a
                video or all of them. Special tokens in it count, so never put in text that others wrote.
            images (image or list of images, *optional*): One or `[]` per dialogue, in place of `videos` of one frame.
            frame_features (`torch.Tensor` of shape `(frames, features, width)`, *optional*): Output of the
                model's `encode_frames` in place of `videos`; a list of them for a batch.
            fps (`float`, *optional*, defaults to 2.0): Frames per second to read, and to place timed messages at.
            num_frames (`int`, *optional*): Most frames from `start` to `end` of a file: fewer a second are read.
            start, end (`float` or `list[float]`, *optional*): Seconds between which to read each dialogue's video.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): Whether to end with "Assistant:".
            return_labels (`bool`, *optional*, defaults to `False`): Whether to return `labels`.
            padding (`bool`, *optional*, defaults to `True`): Whether to pad the rows of a batch to the longest.
            padding_side (`str`, *optional*): `"left"` or `"right"`. Defaults to the tokenizer's.
            return_tensors (`str`, *optional*, defaults to `"pt"`): `"pt"`, or `None` for lists.

        Returns:
            [`BatchFeature`] with `input_ids`, `attention_mask` and `labels` (batch, sequence), -100 where nothing is
            learned; `pixel_values_videos` (batch, frames, channels, height, width) or `frame_features` (batch, frames,
            features, width); and the list `num_frames`.

        Raises:
            `ValueError`: If frames and dialogue do not match, a message is malformed, or a video is unreadable.
            `TypeError`: If there are other options, except for those of any processor that are off (`audio=None`).
        """
        if wrong := [n for n, v in others.items() if n not in _MAY_BE_OFF or not (v is None or v is False)]:
            use = "give each option by its own name, as `fps`, `num_frames` or `padding`. Texts are never truncated"
            raise TypeError(f"`{wrong[0]}` is not supported: {use}.")
        if (messages is None) == (text is None):
            raise ValueError("Give exactly one of `messages` and `text`.")
        dialogues, is_batch = _as_batch(messages) if text is None else _as_batch(text, is_text=True)
        pairs = [(rendered, None) for rendered in dialogues] if text is not None else map(_take_part, dialogues)
        dialogues, parts = zip(*pairs, strict=True)
        fps = check_fps(fps)
        given = {"videos": videos, "images": images, "frame_features": frame_features, "start": start, "end": end}
        spread = (_spread(values, is_batch, len(dialogues), name) for name, values in given.items())
        videos, images, features, starts, ends = spread
        places = [f" (row {row})" if is_batch else "" for row in range(len(dialogues))]
        videos = [_choose_video(*choices) for choices in zip(parts, videos, images, features, places, strict=True)]
        starts = [check_seconds("start", start, least=0) for start in starts]
        ends = [None if end is None else check_seconds("end", end, least=0) for end in ends]
        ranges = list(zip(videos, starts, ends, strict=True))
        fps = fps if num_frames is None else self._rate_for(check_count("num_frames", num_frames), ranges, fps)
        pixels = [self._frames(*values, fps) for values in ranges]
        given = {"pixel_values_videos": pixels, "frame_features": features}
        given = {name: frames for name, frames in given.items() if any(row is not None for row in frames)}
        if len(given) == 2:
            raise ValueError("Give `videos` or `frame_features`, not both.")
        counts = [0 if row is None else len(row) for row in (features if "frame_features" in given else pixels)]
        rows = []
        for index, (dialogue, shown) in enumerate(zip(dialogues, counts, strict=True)):
            if text is None:
                dialogue = self._complete(dialogue, shown, fps, starts[index])
                rows.append(self._tokenize_dialogue(dialogue, add_generation_prompt, return_labels))
            else:
                dialogue = self._expand(check_text("`text`", dialogue), shown, fps, starts[index])
                rows.append({"input_ids": self._tokenize(dialogue)[0]})
            expected = rows[-1]["input_ids"].count(self.frame_token_id) / self.frame_num_tokens
            if expected != shown:
                hint = "The `num_frames` of its stream messages must add up to that. Or use timed messages."
                if text is not None:
                    hint = f"Write {self.frame_token} once for a video, or {self.frame_num_tokens} times for a frame."
                raise ValueError(f"The dialogue has {expected:g} frames, video {shown}{places[index]}. {hint}")
        data = self._pad(rows, padding, padding_side, return_tensors)
        data.update({name: _pad_frames(frames) for name, frames in given.items()})
        if any(counts):
            data["num_frames"] = counts
        return BatchFeature(data)

    def to_stream_turns(
        self, messages: list[Message], num_frames: int, *, fps: float = 2.0, start: float = 0.0
    ) -> list[Message]:
        """
        Turn timed messages into messages with stream turns between them.

        Frame i is at `start + i / fps`. A message follows the first frame at or after its time. At most one reply,
        question and answer follow one frame: later ones replace earlier ones, as in VideoLLM-online. A system message,
        user messages and replies with `learn=False` that begin the dialogue without a `time` come before all frames.

        Args:
            messages (`list[dict]`): Messages with `role`, `content` and `time` in seconds, in order of time.
            num_frames (`int`): Number of frames.
            fps (`float`, *optional*, defaults to 2.0): Frames per second.
            start (`float`, *optional*, defaults to 0.0): Time of the first frame.

        Raises:
            `ValueError`: If a time is missing, out of order or outside the frames, or there are no frames.

        Example:

        ```python
        >>> timed = [{"role": "user", "content": "Narrate.", "time": 0.0},
        ...          {"role": "assistant", "content": "A knife.", "time": 1.4}]
        >>> [m.get("num_frames", m["role"]) for m in processor.to_stream_turns(timed, num_frames=5, fps=2)]
        [1, 'user', 3, 'assistant', 1]
        ```"""
        if num_frames < 1:
            raise ValueError("Timed messages need frames, got none.")
        fps, start = check_fps(fps), check_seconds("start", start)
        # The messages after each frame that has some. The last frame always ends a run of frames.
        slots: dict[int, list[Message]] = {num_frames - 1: []}
        turns, last_time, seen, is_leading = [], start, 0, True
        for index, message in enumerate(messages):
            _check_message(message, index)
            message = dict(message)
            time, role = message.pop("time", None), message["role"]
            may_lead = role == "user" or message.get("learn") is False
            is_leading = is_leading and time is None and may_lead or role == "system" and index == 0
            if is_leading:
                turns.append(message)
                continue
            if time is None:
                raise ValueError(
                    f"Message {index} has no `time`. Only the system's and user's messages at the beginning, and "
                    "replies there with `learn=False`, may have none: they come before the first frame."
                )
            time = check_seconds(f"messages[{index}].time", time)
            if not last_time <= time:
                raise ValueError(f"Message {index} is at {time} s, before {last_time} s: order messages by time.")
            last_time = time
            slot = math.ceil(min((time - start) * fps - 1e-6, num_frames + 1))
            if slot > num_frames:
                last_frame = start + (num_frames - 1) / fps
                raise ValueError(f"Message {index} is at {time} s, after the last frame at {last_frame} s.")
            _put(slots.setdefault(min(slot, num_frames - 1), []), message)
        for slot in sorted(slots):
            turns += [{"role": "stream", "num_frames": slot + 1 - seen}, *slots[slot]]
            seen = slot + 1
        return self._with_times(turns, fps, start)

    def apply_chat_template(
        self,
        conversation: list[Message] | list[list[Message]],
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        add_stream_prompt: bool = False,
        add_stream_generation_prompt: bool = False,
        add_stream_query_prompt: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = "auto",
        continue_final_message: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        fps: float = 2.0,
        num_frames: int | None = None,
        padding: bool = True,
        tools: list[Any] | None = None,
        load_audio_from_video: bool = False,  # noqa: ARG002
        **others: Any,
    ) -> str | list[str] | list[int] | list[list[int]] | BatchFeature:
        r"""
        Render a dialogue, or several, as the text of a stream.

        Args:
            conversation (`list[dict]` or `list[list[dict]]`): Messages. Content may also be a list of parts:
                `{"type": "text", "text": ...}`, and one `{"type": "video", "video": ...}` (or `"path"` or `"url"`),
                which comes before all messages. An `"image"` is a video of one frame. With `tokenize` the video is
                read. A text has one frame token for it, which `processor(text=..., videos=...)` expands.
            chat_template (`str`, *optional*): A template in place of the processor's.
            add_generation_prompt (`bool`, *optional*, defaults to `False`): Whether to end with "\nAssistant:".
            add_stream_prompt (`bool`, *optional*, defaults to `False`): Whether to end with "\n[", where frames begin.
            add_stream_generation_prompt, add_stream_query_prompt (`bool`, *optional*, defaults to `False`): Whether to
                end with "]\nAssistant:", or to begin with "]" before a message; both close an open stream.
            tokenize (`bool`, *optional*, defaults to `False`): Whether to return token ids instead of text.
            return_dict (`bool`, *optional*, defaults to `False`): With `tokenize`, whether to return all inputs.
            return_tensors (`str`, *optional*): `"pt"`, as by default with `return_dict`, or `None` for lists.
            fps, num_frames, padding, processor_kwargs (*optional*): With `tokenize`, options of `__call__`.
            continue_final_message (`bool`, *optional*, defaults to `False`): `True` raises an error.
            tools, load_audio_from_video (*optional*): Of `transformers serve`. Tools are refused. No sound is read.

        Raises:
            `ValueError`: If a final message is to be continued, there are tools, a part is of another type, or
                `return_dict` or the tokens of a video come with another template or with `add_stream_...`.
            `TypeError`: If there are other options.
        """
        flags = {name: value for name, value in locals().items() if name.startswith("add_")}
        if others:
            use = "`fps`, `num_frames` or `padding`, or `return_labels` of the processor's call"
            raise TypeError(f"`{next(iter(others))}` is not supported: use {use}.")
        if continue_final_message:
            raise ValueError("`continue_final_message` is not supported: end the dialogue with the user's message.")
        if tools:
            raise ValueError("`tools` are not supported: the model cannot call functions.")
        dialogues, is_batch = _as_batch(conversation)
        pairs = [_take_part(dialogue) for dialogue in dialogues]
        return_tensors = ("pt" if return_dict else None) if return_tensors == "auto" else return_tensors
        padding = padding and (return_dict or return_tensors is not None)
        if tokenize and (return_dict or any(part for _, part in pairs)):
            given = [name for name in flags if flags[name] and name != "add_generation_prompt"]
            given += ["chat_template"] * (chat_template not in (None, self.chat_template))
            if given:
                raise ValueError(f"`{given[0]}` needs `tokenize=False`: pass the text to `processor(text=...)`.")
            options = {"fps": fps, "num_frames": num_frames, "padding": padding, "return_tensors": return_tensors}
            options |= {"add_generation_prompt": add_generation_prompt, **(processor_kwargs or {})}
            rows = self(conversation, **options)
            rows = rows if return_dict else rows["input_ids"]
        else:
            rendered = [self._render(dialogue, chat_template, part, **flags) for dialogue, part in pairs]
            rows = [text for text, _, _ in rendered]
            if tokenize:
                rows = [{"input_ids": self._tokenize(text, contents)[0]} for text, contents, _ in rendered]
                rows = self._pad(rows, padding, None, return_tensors)["input_ids"]
        return rows if is_batch or not isinstance(rows, list) else rows[0]

    def encode_turns(
        self, messages: list[Message], *, stream_open: bool, then: str, time: float = 0.0, index: int = 1
    ) -> list[int]:
        """
        Return the token ids between the last frame or reply of a stream and the next, without the tokens of either.

        The text after a frame belongs to that frame, and the text before a frame to these tokens.

        Args:
            messages (`list[dict]`): Messages since, possibly none, without frames.
            stream_open (`bool`): Whether a frame came last, so that the stream is open.
            then (`str`): `"stream"` if a frame comes next, `"assistant"` if a reply does.
            time (`float`, *optional*, defaults to 0.0): Time in seconds of the frame that comes next.
            index (`int`, *optional*, defaults to 1): Number of that frame in the stream, from 1.
        """
        begins = bool(messages) and messages[0]["role"] == "system"
        if self.stream_format is not None:
            last = "" if begins else "frames" if stream_open else "reply"
            ending = "add_stream_prompt" if then == "stream" else "add_generation_prompt"
            return self._encode_after(last, messages, {"next_time": time, "first_index": index, ending: True})
        if stream_open and then == "stream" and not messages:
            return [] if self.frame_token_interval_id is None else [self.frame_token_interval_id]
        ending = "add_stream_generation_prompt" if stream_open and not messages else "add_generation_prompt"
        flags = {"add_stream_query_prompt": stream_open, "add_stream_prompt" if then == "stream" else ending: True}
        return self._encode_after("" if begins else "frames" if stream_open else "reply", messages, flags)

    def encode_frame(self, time: float, index: int) -> tuple[list[int], list[int]]:
        """
        Return the token ids of a frame's own text, before and after its frame tokens.

        They are also the last ids of `encode_turns(..., then="stream")` if its text splits there.
        """
        if self.stream_format is None or not self.stream_format["frame_before"]:
            return [], self.frame_suffix_ids
        flags = {"next_time": time, "first_index": index, "add_stream_prompt": True}
        return self._encode_after("own", [], flags), self.frame_suffix_ids

    def encode_typical_frame(self) -> list[int]:
        """Return the token ids of a frame that follows another, for steps that are prepared before any frame comes."""
        between = self.encode_turns([], stream_open=True, then="stream", index=100)
        return [*between, *[self.frame_token_id] * self.frame_num_tokens, *self.frame_suffix_ids]

    def _encode_after(self, last: str, messages: list[Message], flags: dict[str, Any]) -> list[int]:
        """Return the token ids of messages and prompts after a special token, or with `last=""` of a beginning."""
        text, contents, _ = self._render(messages, before=last, **flags)
        # Some tokenizers treat the beginning of a text differently, so tokenise after the preceding special token.
        reply_end = self.tokenizer.convert_ids_to_tokens(self.end_of_reply_id)
        context = "" if not last else reply_end if last == "reply" else self.frame_token
        contents = [(begin + len(context), stop + len(context)) for begin, stop in contents]
        ids = self._tokenize(context + text, contents)[0]
        return ids[1:] if context else ids

    def _render(
        self, messages: list[Message], chat_template: str | None = None, part: _Part | None = None, **flags: Any
    ) -> tuple[str, _Spans, _Spans]:
        """Return a dialogue as text, with one frame token for a `part`, and the spans of contents and of replies."""
        if part is not None:
            if any("time" in message for message in messages):
                raise ValueError("Timed messages need the frames that they stand between: set `tokenize=True`.")
            flags |= {} if any(message.get("num_frames") for message in messages) else {"frame_num_tokens": 1}
            messages = self._complete(messages, 1, 1.0, 0.0)
        for index, message in enumerate(messages):
            _check_message(message, index)
            if self._needs_times and message["role"] == "stream" and "times" not in message:
                raise ValueError(f"Message {index} has no `times`, which this stream format writes: one per frame.")
        marked = [
            {**message, "content": f"\ue000{index}\ue001"} if message.get("content") else message
            for index, message in enumerate(messages)
        ]
        [template], [spans] = render_jinja_template(
            conversations=[marked],
            chat_template=chat_template or self.chat_template,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
            frame_token=self.frame_token,
            frame_token_interval=self.frame_token_interval,
            **{"frame_num_tokens": self.frame_num_tokens, **flags},
        )
        # Insert contents after rendering, to know their exact place.
        mark_pattern = re.compile("\ue000(\\d+)\ue001")
        marks = list(mark_pattern.finditer(template))
        inserted = [messages[int(mark[1])]["content"] for mark in marks]
        shifts = [0, *accumulate(len(new) - len(mark[0]) for new, mark in zip(inserted, marks, strict=True))]
        ends = [mark.end() for mark in marks]

        def move(span: tuple[int, int]) -> tuple[int, int]:
            begin, stop = (position + shifts[bisect_right(ends, position)] for position in span)
            return begin, stop

        text = mark_pattern.sub(lambda mark: messages[int(mark[1])]["content"], template)
        return text, [move(mark.span()) for mark in marks], [move(span) for span in spans]

    def _tokenize(self, text: str, contents: Sequence[tuple[int, int]] = ()) -> tuple[list[int], _Spans]:
        """Return token ids and character offsets. No special token may begin within the spans `contents`."""
        begins = [begin for begin, _ in contents]

        def is_template(position: int) -> bool:
            before = bisect_right(begins, position)
            return before == 0 or position >= contents[before - 1][1]

        ids, offsets = self._tokenize_piece(text)
        special = {i: token.content for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        if all(token not in special or is_template(begin) for token, (begin, _) in zip(ids, offsets, strict=True)):
            return ids, offsets
        # A message contains a special token: insert the template's own by hand and tokenise the rest as plain text.
        pattern = "|".join(re.escape(string) for string in sorted(special.values(), key=len, reverse=True))
        by_string = {string: token for token, string in special.items()}
        cuts = [match.span() for match in re.finditer(pattern, text) if is_template(match.start())]
        ids, offsets, cursor = [], [], 0
        for begin, stop in [*cuts, (len(text), len(text))]:
            if begin > cursor:
                piece, places = self._tokenize_piece(text[cursor:begin], split=True)
                ids += piece
                offsets += [(first + cursor, last + cursor) for first, last in places]
            if stop > begin:
                ids.append(by_string[text[begin:stop]])
                offsets.append((begin, stop))
            cursor = stop
        return ids, offsets

    def _tokenize_piece(self, text: str, split: bool = False) -> tuple[list[int], _Spans]:
        encoded = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=split, verbose=False
        )
        return encoded["input_ids"], encoded["offset_mapping"]

    def _expand(self, text: str, num_frames: int, fps: float, start: float) -> str:
        """Put all frames in place of one frame token. What stands before the first and after the last is there."""
        if not num_frames or text.count(self.frame_token) != 1:
            return text
        [turn] = self._with_times([{"role": "stream", "num_frames": num_frames}], fps, start)
        shown, token = self._render([turn])[0], self.frame_token
        # A placeholder has the text of a first frame at second 0.
        at = [self._render([], before="own", add_stream_prompt=True, next_time=t)[0] + token for t in (0.0, start)]
        return text.replace(at[0], at[1]).replace(token, shown[shown.index(token) : shown.rindex(token) + len(token)])

    def _complete(self, dialogue: list[Message], num_frames: int, fps: float, start: float) -> list[Message]:
        """Return the dialogue with a system message and with its frames in place."""
        if any(isinstance(message, dict) and "time" in message for message in dialogue):
            dialogue = self.to_stream_turns(dialogue, num_frames, fps=fps, start=start)
        dialogue = [m for m in dialogue if not (m.get("role") == "stream" and m.get("num_frames") == 0)]
        if not dialogue or dialogue[0].get("role") != "system":
            dialogue = [{"role": "system", "content": self.system_prompt}, *dialogue]
        if num_frames and all(message.get("role") != "stream" for message in dialogue):
            dialogue = [dialogue[0], {"role": "stream", "num_frames": num_frames}, *dialogue[1:]]
        return self._with_times(dialogue, fps, start)

    def _with_times(self, dialogue: list[Message], fps: float, start: float) -> list[Message]:
        """Return the dialogue with the `times` of its frames, if the stream format writes them."""
        if not self._needs_times:
            return dialogue
        turns, seen = [], 0
        for index, message in enumerate(dialogue):
            if message.get("role") == "stream":
                _check_message(message, index)
                begin, seen = seen, seen + message["num_frames"]
                message = {"times": [start + frame / fps for frame in range(begin, seen)], **message}
            turns.append(message)
        return turns

    def _tokenize_dialogue(
        self, dialogue: list[Message], add_generation_prompt: bool, return_labels: bool
    ) -> dict[str, list[int]]:
        text, contents, assistant_spans = self._render(dialogue, add_generation_prompt=add_generation_prompt)
        ids, offsets = self._tokenize(text, contents)
        labels = {"labels": self._labels(dialogue, ids, offsets, assistant_spans)} if return_labels else {}
        return {"input_ids": ids, **labels}

    def _labels(self, dialogue: list[Message], ids: list[int], offsets: _Spans, assistant_spans: _Spans) -> list[int]:
        """
        Return the labels: assistant turns, and after each frame the interval token or the text that opens a reply.

        `learn=False` excludes a message. A stream message's `learn` may also be a number, which includes that many of
        its frames, or a list with one truth value per frame.
        """
        labels = [_LABEL_IGNORED] * len(ids)
        # Some tokenizers leave spaces out of offsets, so that only the end of a token is sure.
        stops = np.array([stop for _, stop in offsets])
        spans = iter(assistant_spans)
        replies = {index: next(spans) for index, m in enumerate(dialogue) if m["role"] == "assistant"}

        def learn(first: int, last: int) -> None:
            labels[first:last] = ids[first:last]

        for index, (begin, stop) in replies.items():
            if dialogue[index].get("learn", True):
                learn(*np.searchsorted(stops, (begin, stop), side="right"))
        silence = self.tokenizer.eos_token_id if self.frame_token_interval_id is None else self.frame_token_interval_id
        frame_tokens = [i for i, token in enumerate(ids) if token == self.frame_token_id]
        frame_ends = iter(frame_tokens[self.frame_num_tokens - 1 :: self.frame_num_tokens])
        for index, message in enumerate(dialogue):
            if message["role"] != "stream":
                continue
            learned, count = message.get("learn", True), message["num_frames"]
            if isinstance(learned, int):
                limit = count if learned is True else learned
                learned = [position < limit for position in range(count)]
            for position, is_learned in enumerate(learned):
                after = next(frame_ends) + 1 + len(self.frame_suffix_ids)
                if is_learned and position + 1 < count:
                    labels[after] = silence
                elif is_learned and index + 1 in replies:
                    learn(after, int(np.searchsorted(stops, replies[index + 1][0], side="right")))
        return labels

    def _pad(
        self, rows: list[dict[str, list[int]]], padding: bool, padding_side: str | None, return_tensors: str | None
    ) -> dict[str, Any]:
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"`padding_side` must be 'left' or 'right', got {side!r}.")
        pad_id = self.tokenizer.pad_token_id
        fill = {"input_ids": self.tokenizer.eos_token_id if pad_id is None else pad_id, "labels": _LABEL_IGNORED}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        lengths = sorted({len(row["input_ids"]) for row in rows})
        if return_tensors not in ("pt", None) or padding not in (True, False, "longest"):
            raise ValueError(f"{return_tensors=}, {padding=}: must be 'pt' or None, and True, False or 'longest'.")
        if len(lengths) > 1 and return_tensors and not padding:
            raise ValueError(f"Rows of {lengths} tokens make no tensor: set `padding=True` or `return_tensors=None`.")
        data: dict[str, Any] = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if padding:
                extra = [[fill.get(name, 0)] * (lengths[-1] - len(row)) for row in values]
                values = [e + v if side == "left" else v + e for v, e in zip(values, extra, strict=True)]
            data[name] = torch.tensor(values) if return_tensors == "pt" else values
        return data

    def open_video(self, video: str | Path, **options: Any) -> VideoReader:
        """Open a video to read its frames at their own times; see [`VideoReader`] for the options and errors."""
        return VideoReader(video, **options)

    # For code that has loaded a checkpoint, and cannot import from its files.
    new_report = staticmethod(ReadingReport)
    read_video = staticmethod(read_video)
    sample_every = staticmethod(sample_every)

    def read_ahead(
        self,
        video: Any,
        most: int,
        *,
        fps: float = 2.0,
        start: float = 0.0,
        end: float | None = None,
        timeout: float | None = 10.0,
        reconnect: bool | None = None,
        report: ReadingReport | None = None,
        device: torch.device | str | None = None,
        session: Any | None = None,
        on_slow: Callable[[float, float], None] | None = None,
        **behind: Any,
    ) -> Iterator[list[tuple[float, torch.Tensor]]]:
        """
        Play a video in its own thread, up to `most` resized frames at once. With `session` and `on_slow`, cameras and
        broadcasts are thinned to a rate that the session keeps up with; see [`keep_up`]. `behind` are for
        [`read_ahead`].
        """
        options = {"timeout": timeout, "reconnect": reconnect, "report": report, "stop": (stop := Event())}
        frames = read_video(video, fps=fps, start=start, end=end, **options)
        small = ((time, self.resize_frames(frame, device)[0].permute(1, 2, 0).cpu()) for time, frame in frames)
        ahead = read_ahead(small, most, is_live=not is_complete(video), goes_on=goes_on(video), stop=stop, **behind)
        return keep_up(ahead, session, fps=fps, on_slow=on_slow) if session is not None and goes_on(video) else ahead

    def set_frame_size(self, frame_size: int, num_tokens: int) -> None:
        """Make frames of this side in pixels and number of tokens; [`set_frame_size`] of the model calls it."""
        video_processor = self.video_processor
        if video_processor.longest_edge is not None:
            before = max(video_processor.size["height"], video_processor.size["width"])
            video_processor.longest_edge = round(video_processor.longest_edge * frame_size / before)
        video_processor.size = SizeDict(height=frame_size, width=frame_size)
        self.frame_num_tokens = num_tokens

    def process_frames(self, frames: Any) -> torch.Tensor:
        """Return the pixel values of RGB frames, float32: [`resize_frames`], then [`normalize_frames`]."""
        return self.normalize_frames(self.resize_frames(frames))

    def resize_frames(self, frames: Any, device: torch.device | str | None = None) -> torch.Tensor:
        """
        Return RGB frames at the model's size, uint8 (frames, channels, height, width).

        Args:
            frames (PIL image, or array or tensor of shape `(height, width, 3)`, or several):
                uint8, or floating point in [0, 1]. Several are a list, an iterator, or an array with one more axis.
            device (`torch.device`, *optional*): Where to put them. A GPU resizes them too: few values differ, by 1.

        Raises:
            `ValueError`: If there is no frame, channels are not last, values are not pixels, or sizes differ.
        """
        options = {"input_data_format": "channels_first", "do_rescale": False, "do_normalize": False}
        resized: list[torch.Tensor] = []
        for stack in _as_stacks(frames):
            if torch.device(device or "cpu").type == "cuda" and not stack.is_cuda:
                stack = stack.pin_memory().to(device, non_blocking=True)
            # The resize is fastest where the channels of a pixel lie side by side, as in this view.
            stacks = self.video_processor(stack.permute(0, 3, 1, 2), **options)["pixel_values_videos"]
            resized.append(stacks[0].contiguous())
        sizes = {f"{stack.shape[-2]} x {stack.shape[-1]}" for stack in resized}
        if len(sizes) > 1:
            raise ValueError(f"Frames must have one size, got {' and '.join(sorted(sizes))}: set `do_resize=True`.")
        if not sizes:
            raise ValueError("The video is empty: there is no frame.")
        return torch.cat(resized).to(device)

    def normalize_frames(self, frames: torch.Tensor) -> torch.Tensor:
        """Return the pixel values, float32, of resized frames (frames, channels, height, width), on their device."""
        options = {"do_resize": False, "do_center_crop": False, "input_data_format": "channels_first"}
        return self.video_processor(frames, **options)["pixel_values_videos"][0]

    def _rate_for(self, num_frames: int, ranges: Sequence[tuple[Any, float, float | None]], rate: float) -> float:
        """Return frames per second, at most `rate`, that give at most `num_frames` from start to end of each file."""
        for video, start, end in ranges:
            if isinstance(video, (str, Path)):
                with self.open_video(video) as reader:
                    if not math.isfinite(reader.seconds):
                        raise ValueError(f"`num_frames` needs a video with an end, and '{video}' has none.")
                    seconds = (reader.seconds if end is None else min(end, reader.seconds)) - start
                    # A little slower, since the reader rounds rates.
                    rate = min(rate, num_frames / max(seconds, 1e-6) * (1 - 1e-4))
        return rate

    def _frames(self, video: Any, start: float, end: float | None, fps: float) -> torch.Tensor | None:
        if video is None:
            return None
        if isinstance(video, (str, Path)):
            video = (frame for _, frame in read_video(video, fps=fps, start=start, end=end))
        elif getattr(video, "ndim", 0) == 4 and video.shape[1] == 3 != video.shape[-1]:
            video = np.moveaxis(video, 1, -1) if isinstance(video, np.ndarray) else video.movedim(1, -1)
        return self.process_frames(video)


def _put(slot: list[Message], message: Message) -> None:
    """
    Add a message to those after one frame. A later question replaces an earlier one and its answer, and a later reply
    an earlier reply. A reply before a question stays beside the answer.
    """
    is_question = message["role"] == "user"
    if_none = len(slot) if is_question else -1
    question = next((index for index, earlier in enumerate(slot) if earlier["role"] == "user"), if_none)
    slot[question + (not is_question) :] = [message]


def _check_message(message: Any, index: int) -> None:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ROLES:
        raise ValueError(f"Message {index} has role {role!r}; known roles are {', '.join(ROLES)}.")
    if role == "system" and index > 0:
        raise ValueError(f"Message {index} is a system message; only the first may be.")
    if role == "stream":
        count = message.get("num_frames")
        if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _MOST_FRAMES:
            raise ValueError(f"`num_frames` of message {index} must be from 1 to {_MOST_FRAMES}, got {count}.")
        for name, kind in (("learn", "truth values"), ("times", "times")):
            given = message.get(name, range(count))
            found = f"has {len(given)} {kind}" if isinstance(given, (list, tuple, range)) else f"is {given!r:.50}"
            if found != f"has {count} {kind}" and not (name == "learn" and isinstance(given, int)):
                raise ValueError(f"Message {index} has {count} frames, but `{name}` {found}.")
    elif not isinstance(content := message.get("content"), str):
        raise ValueError(f"Message {index} ({role}) needs text as `content`, got {type(content).__name__}.")
    else:
        check_text(f"The text of message {index} ({role})", content)


def _take_part(messages: Sequence[Message]) -> tuple[list[Message], _Part | None]:
    """Return the messages with plain text as content, and the video or image among their parts, if any."""
    plain, found = [], []
    for index, message in enumerate(messages):
        parts = message.get("content") if isinstance(message, dict) else None
        if isinstance(parts, (list, tuple)):
            texts: list[str] = []
            for part in parts:
                kind = part.get("type") if isinstance(part, dict) else None
                if kind == "text":
                    texts.append(check_text(f"A text part of message {index}", part.get("text")))
                elif kind in ("image", "video"):
                    found.append((index, part))
                else:
                    raise ValueError(f"A part must be text, an image or a video, got {kind!r} in message {index}.")
            message = {**message, "content": " ".join(texts)}
        plain.append(message)
    if len(found) > 1:
        raise ValueError(f"A dialogue may have one video or image, got {len(found)}.")
    return plain, found[0] if found else None


def _choose_video(found: _Part | None, video: Any, image: Any, features: Any, where: str) -> Any:
    """Return the video of a dialogue, if any: the one that is given, or the one that a part of a message names."""
    index, part = found or (None, {})
    place = (f"message {index}" if found else "a dialogue") + where
    kind = part.get("type")
    source = next((part[name] for name in (kind, "path", "url") if part.get(name) is not None), None)
    image = None if isinstance(image, (list, tuple)) and not image else image
    num_given = sum(each is not None for each in (source, video, image, features))
    if found and not num_given:
        raise ValueError(f"The {kind} part of {place} names no {kind}: give it `{kind}`, `path` or `url`.")
    if num_given > 1:
        raise ValueError("Give `videos`, `images`, `frame_features` or a part of a message that names one, not both.")
    given = next((each for each in (source, video, image) if each is not None), None)
    only = given[0] if isinstance(given, (list, tuple)) and len(given) == 1 else given
    if image is None and (source is None or kind == "video"):
        # Transformers also takes a list of one video. A list of one frame is a video itself.
        return only if isinstance(only, (str, Path, list, tuple)) or getattr(only, "ndim", 3) == 4 else given
    try:
        return [only if hasattr(only, "shape") else load_image(only)]
    except (TypeError, ValueError, OSError) as error:
        raise ValueError(f"The image of {place} cannot be read: {str(error).splitlines()[0]}") from error


def _as_batch(items: Any, *, is_text: bool = False) -> tuple[list[Any], bool]:
    """Return the items as a batch, and whether they were one: texts, or dialogues, which are lists of dicts."""

    def is_one(item: Any) -> bool:
        is_dialogue = isinstance(item, Sequence) and all(isinstance(message, dict) for message in item)
        return isinstance(item, str) if is_text else is_dialogue

    is_batch = not is_one(items) and isinstance(items, Sequence)
    batch = list(items) if is_batch else [items]
    if not batch:
        raise ValueError("The list is empty: give at least one text or dialogue.")
    if wrong := [item for item in batch if not is_one(item)]:
        expected = "`text` must be a string" if is_text else "A dialogue must be a list of messages, which are dicts"
        raise ValueError(f"{expected}, or a list of such, got {type(wrong[0]).__name__}.")
    return batch, is_batch


def _spread(values: Any, is_batch: bool, count: int, name: str) -> list[Any]:
    """Return one value per dialogue. A single one, such as a time or `None`, holds for all."""
    if not is_batch or isinstance(values, str) or not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0:
        return [values] * count
    if len(values) != count:
        raise ValueError(f"`{name}` has {len(values)} entries for {count} dialogues: give one per dialogue.")
    return list(values)


def _pad_frames(rows: list[torch.Tensor | None]) -> torch.Tensor:
    """Stack the frames (frames, ...) of each row as (batch, frames, ...), padded with zeros."""
    like = next(row for row in rows if row is not None)
    return torch.nn.utils.rnn.pad_sequence([like[:0] if row is None else row for row in rows], batch_first=True)


def _as_stacks(frames: Any) -> Iterator[torch.Tensor]:
    """Yield frames as uint8 tensors (frames, height, width, 3): runs of equal size, of about `_PIXELS_TOGETHER`."""
    singles = map(_as_stack, frames) if isinstance(frames, (list, tuple, Iterator)) else _as_stack(frames).split(1)
    for shape, run in groupby(singles, key=lambda stack: tuple(stack.shape)):
        if shape[0] != 1:
            raise ValueError(f"A frame in a list must be (height, width, 3), got {shape}.")
        while some := list(islice(run, max(1, _PIXELS_TOGETHER // (shape[1] * shape[2])))):
            yield some[0] if len(some) == 1 else torch.cat(some)


def _as_stack(frames: Any) -> torch.Tensor:
    if is_vision_available() and isinstance(frames, Image.Image):
        frames = np.asarray(frames if frames.mode == "RGB" else frames.convert("RGB"))
    if not isinstance(frames, (np.ndarray, torch.Tensor)):
        raise ValueError(f"A frame must be a PIL image, an array or a tensor, got {type(frames).__name__}.")
    # Torch cannot read an array backwards, and warns of one that is read-only.
    stack = torch.from_numpy(np.require(frames, requirements="CW")) if isinstance(frames, np.ndarray) else frames
    stack = stack[None] if stack.ndim == 3 else stack
    if stack.ndim != 4 or stack.shape[-1] != 3:
        is_first = stack.ndim == 4 and stack.shape[1] == 3
        hint = " Channels seem to come first; `frame.transpose(1, 2, 0)` moves them last." if is_first else ""
        raise ValueError(f"A frame must be (height, width, 3), RGB, got shape {tuple(frames.shape)}.{hint}")
    if stack.numel() == 0:
        raise ValueError(f"The video is empty: got frames of shape {tuple(frames.shape)}.")
    if stack.is_floating_point():
        # NaN fails this comparison too.
        if not bool(((stack >= 0) & (stack <= 1)).all()):
            raise ValueError(f"Floating point pixels must lie in [0, 1], got NaN or {stack.min()} to {stack.max()}.")
        stack = (stack * 255).round().to(torch.uint8)
    if stack.dtype != torch.uint8:
        raise ValueError(f"Pixels must be uint8, or floating point in [0, 1], got {stack.dtype}.")
    return stack


VideoLLMMoDProcessor.register_for_auto_class("AutoProcessor")

__all__ = ["VideoLLMMoDProcessor"]
