# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Run a model on rows of timed messages: answer, score candidates, stream, and predict turns."""

import math
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple, TypeAlias

import torch

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.dialogues import floor_frame
from videollm_mod.train.data.faults import naming
from videollm_mod.train.data.windows import count_frames
from videollm_mod.train.encoding import encode_clip
from videollm_mod.train.streaming_evaluation import stream_examples
from videollm_mod.train.teacher_forcing import Turn, most_official_frames, predict_all_turns


# Frames that are encoded at once.
_FRAMES_TOGETHER = 64
# A dialogue with stream messages, and the features (frames, features, width) of its frames.
Prompt: TypeAlias = tuple[list[dict[str, Any]], torch.Tensor]


class Likelihood(NamedTuple):
    """
    How likely a text is as a reply.

    Attributes:
        total (`float`): Sum of the log-probabilities of its tokens, with the token that ends a reply.
        num_tokens (`int`): Number of these tokens.
        is_greedy (`bool`): Whether each of them is the most likely one.
    """

    total: float
    num_tokens: int
    is_greedy: bool


class Runner:
    """
    A model with its processor, for the tasks of an evaluation.

    Rows have `messages`, and `video` or `frame_features`. The prompt of a row is its dialogue up to its last reply,
    with all frames of the row. Questions stand where the row has them: before the first frame, between frames, or
    after the last.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model, in evaluation mode.
        processor ([`VideoLLMMoDProcessor`]): Its processor.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        batch_size (`int`, *optional*, defaults to 8): Number of rows that run together.
        interval_threshold (`float`, *optional*): Interval threshold of streams; the default is the configuration's.
        stream_options (`dict`, *optional*): Further options of [`StreamingSession`].
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        fps: float = 2.0,
        batch_size: int = 8,
        interval_threshold: float | None = None,
        stream_options: dict[str, Any] | None = None,
    ) -> None:
        self.model, self.processor, self.fps, self.batch_size = model, processor, fps, batch_size
        self.interval_threshold, self.stream_options = interval_threshold, stream_options or {}
        self._collator = StreamCollator(processor, fps, frame_feature_shape=model.config.frame_feature_shape)
        # The rows of some benchmarks ask several questions about one clip: its frames are encoded once.
        self._last: tuple[Any, float, torch.Tensor] | None = None

    def answer(
        self, row: dict[str, Any], *, max_new_tokens: int = 512, num_beams: int = 1, num_return: int = 1
    ) -> list[str]:
        """
        Return the model's reply to a row, without sampling.

        Args:
            row (`dict`): The row.
            max_new_tokens (`int`, *optional*, defaults to 512): Longest reply in tokens.
            num_beams (`int`, *optional*, defaults to 1): Number of beams. With 1, the search is greedy.
            num_return (`int`, *optional*, defaults to 1): Number of replies, at most `num_beams`.

        Returns:
            `list[str]`: `num_return` replies, the best first.

        Raises:
            [`FaultyRowError`]: If the row cannot be read, or is longer than the model's context.
        """
        options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "num_return": num_return}
        return self.answer_all([row], **options)[0]

    def answer_all(
        self,
        rows: Sequence[dict[str, Any]],
        *,
        max_new_tokens: int = 512,
        num_beams: int = 1,
        num_return: int = 1,
        official: bool = False,
    ) -> list[list[str]]:
        """
        Return the replies to several rows, which run as one batch. See [`Runner.answer`].

        With `official`, a clip is cut as VideoLLM-online's code cuts it: of one with more frames than
        [`most_official_frames`] the model sees nothing, and what stands before the first frame is the prompt.
        """
        options = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "num_return": num_return}
        return self.answer_prompts([self._prompt(row, official) for row in rows], **options)

    @torch.no_grad()
    def answer_prompts(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int = 512, num_beams: int = 1, num_return: int = 1
    ) -> list[list[str]]:
        """Return the replies to several prompts, which run as one batch. See [`Runner.answer`]."""
        turns, features = zip(*prompts, strict=True)
        inputs = self.processor(
            list(turns), frame_features=list(features), add_generation_prompt=True, padding_side="left"
        )
        inputs = {name: x.to(self.model.device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
        tokenizer, length = self.processor.tokenizer, inputs["input_ids"].shape[1]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        out = self.model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            # These are the defaults. A checkpoint for sampling may have others, which would print a warning.
            temperature=1.0,
            top_p=1.0,
            num_beams=num_beams,
            num_return_sequences=num_return,
            eos_token_id=self.processor.end_of_reply_id,
            pad_token_id=pad,
        )
        texts = [text.strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]
        return [texts[begin : begin + num_return] for begin in range(0, len(texts), num_return)]

    def likelihoods(self, row: dict[str, Any], candidates: Sequence[str], *, per_token: bool = False) -> list[float]:
        """
        Return how likely each candidate is as the reply to a row.

        The prompt runs once: its keys and values serve all candidates.

        Args:
            row (`dict`): The row.
            candidates (sequence of `str`): Texts of the reply.
            per_token (`bool`, *optional*, defaults to `False`): Whether to divide by the number of tokens.

        Returns:
            `list[float]`: Sum of the log-probabilities of each candidate's tokens, with the token that ends a reply.
        """
        found = self.score_prompt(self._prompt(row), candidates)
        return [each.total / (each.num_tokens if per_token else 1) for each in found]

    @torch.no_grad()
    def score_prompt(self, prompt: Prompt, candidates: Sequence[str]) -> list[Likelihood]:
        """Return how likely each candidate is as the reply to a prompt. See [`Runner.likelihoods`]."""
        turns, features = prompt
        opening = self._tokenize(turns, add_generation_prompt=True)
        full = [self._tokenize([*turns, {"role": "assistant", "content": text}]) for text in candidates]
        # A tokenizer may merge the end of the prompt with the reply.
        begins = [_shared_length(opening, ids) for ids in full]
        shared = min(begins, default=0)
        if not full:
            return []
        cache, device = self.model.new_cache(), self.model.device
        head = self.model(
            input_ids=torch.tensor([opening[:shared]], device=device),
            frame_features=features[None],
            num_frames=[len(features)],
            cache=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[0]
        found = []
        for ids, begin in zip(full, begins, strict=True):
            logits = head
            if (more := len(ids) - 1 - shared) > 0:
                part = torch.tensor([ids[shared:-1]], device=device)
                logits = torch.cat([head, self.model(input_ids=part, cache=cache, use_cache=True).logits[0]])
                cache.crop(-more, num_frames=0)
            reply = torch.tensor(ids[begin:], device=logits.device)
            scores = logits[begin - shared :].float().log_softmax(dim=-1)
            total = float(scores.gather(1, reply[:, None]).sum())
            found.append(Likelihood(total, len(reply), bool((scores.argmax(dim=-1) == reply).all())))
        return found

    def stream(self, row: dict[str, Any], **options: Any) -> list[Any]:
        """
        Stream the clip of a row from its beginning: the model sees its own replies as history.

        Args:
            row (`dict`): The row. Its user messages are asked at their times.
            options: Options of [`StreamingSession`], in place of the runner's.

        Returns:
            `list[StreamEvent]`: What was said, by user and model.
        """
        return self.stream_all([row], **options)[0]

    def stream_all(self, rows: Sequence[dict[str, Any]], **options: Any) -> list[list[Any]]:
        """Stream several rows at the same time, `batch_size` in one engine. See [`Runner.stream`]."""
        options = {"interval_threshold": self.interval_threshold, **self.stream_options, **options}
        options |= {"fps": self.fps, "batch_size": min(self.batch_size, len(rows)) or 1}
        # Streams end in an order of their own.
        places = {id(row): place for place, row in enumerate(rows)}
        events: list[list[Any]] = [[] for _ in rows]
        for row, said, _ in stream_examples(self.model, self.processor, rows, **options):
            events[places[id(row)]] = said
        return events

    def turns(
        self, row: dict[str, Any], *, interval_threshold: float | None = None, official: bool = False
    ) -> list[Turn]:
        """
        Predict every turn of a row from the true history (see [`predict_all_turns`]).

        Args:
            row (`dict`): The row.
            interval_threshold (`float`, *optional*): Interval threshold; the default is the runner's.
            official (`bool`, *optional*, defaults to `False`): Whether a long row is cut as in VideoLLM-online's code.
        """
        threshold = self.interval_threshold if interval_threshold is None else interval_threshold
        options = {"fps": self.fps, "interval_threshold": threshold, "official": official, "progress": False}
        return predict_all_turns(self.model, self.processor, [row], **options)[0]

    def _prompt(self, row: dict[str, Any], official: bool = False) -> Prompt:
        """Return the dialogue before the last reply, and the features (frames, features, width) of all frames."""
        with naming(row):
            messages = before_reply(row["messages"])
            options = {"fps": self.fps, "start": row.get("start") or 0.0}
            config = self.model.config
            most = most_official_frames(config)
            if official and (count := count_frames(row, fps=self.fps, most=most)) > most:
                turns = self.processor.to_stream_turns(messages, count, **options)
                kept = list(takewhile(lambda turn: turn["role"] != "stream", turns))
                nothing = torch.empty(0, *config.frame_feature_shape, dtype=self.model.dtype, device=self.model.device)
                return self.make_prompt(kept, nothing)
            features = self._features(row)
            turns = self.processor.to_stream_turns(messages, len(features), **options)
            return self.make_prompt(turns, features)

    def make_prompt(self, turns: list[dict[str, Any]], features: torch.Tensor) -> Prompt:
        """
        Return a prompt, with the system prompt if it has none.

        Args:
            turns (`list[dict]`): A dialogue with stream messages.
            features (`torch.Tensor` of shape `(frames, features, width)`): Features of its frames.

        Raises:
            `ValueError`: If it is longer than the model's context.
        """
        if turns[0]["role"] != "system":
            turns = [{"role": "system", "content": self.processor.system_prompt}, *turns]
        length = len(self._tokenize(turns, add_generation_prompt=True))
        if length > (context := self.model.config.text_config.max_position_embeddings):
            raise ValueError(f"the prompt has {length:,} tokens, and the model reads at most {context:,}.")
        return turns, features

    def _features(self, row: dict[str, Any]) -> torch.Tensor:
        if row.get("frame_features") is not None:
            return self._collator.read_features(row).to(self.model.device)
        start, end = row.get("start") or 0.0, math.inf if row.get("end") is None else row["end"]
        key = (row["video"], start) if isinstance(row["video"], str) else None
        if key is None or self._last is None or self._last[0] != key or self._last[1] < end:
            features = encode_clip(self.model, self.processor, row, fps=self.fps, batch_size=_FRAMES_TOGETHER)
            self._last = (key, end, features)
        # A clip may also be the beginning of the one before.
        return self._last[2] if end == math.inf else self._last[2][: floor_frame(end - start, self.fps) + 1]

    def _tokenize(self, turns: list[dict[str, Any]], **flags: bool) -> list[int]:
        return self.processor.apply_chat_template(turns, tokenize=True, **flags)


def before_reply(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the messages before the last reply, or all if there is none. Keys without a value are left out."""
    replies = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    kept = messages[: replies[-1]] if replies else messages
    return [{key: value for key, value in message.items() if value is not None} for message in kept]


def _shared_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens with which both begin."""
    differ = (k for k, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1])
    return next(differ, min(len(first), len(second)))
