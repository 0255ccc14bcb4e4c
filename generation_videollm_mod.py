# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`stream` and `narrate`, and `generate` with a routed cache."""

from collections.abc import Callable, Iterator
from copy import copy
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode
from transformers.utils import logging

from .cache_videollm_mod import CACHE_NAME, one_cache
from .remembering_videollm_mod import CHECKPOINT
from .speaking_videollm_mod import SeenFrame
from .streaming_videollm_mod import StreamEvent, StreamingSession


logger = logging.get_logger(__name__)

# Inputs that belong to the frames of the prompt. They must not be fed again with later tokens.
_FRAME_INPUTS = ("pixel_values_videos", "frame_features", "num_frames", "frame_token_mask")
# What a generation configuration says of drawing tokens. Penalties need the prompt, which a stream forgets.
_SAMPLING = ("temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

# What the user says at the first frame of a narration, in training and by default.
DEFAULT_QUERY = "Please narrate the video in real time."


def interval_rule(
    logits: torch.Tensor, silence_token_id: int, interval_threshold: float
) -> tuple[torch.BoolTensor, torch.Tensor]:
    """
    Decide at the last token of a frame whether to speak (VideoLLM-online, arXiv 2406.11816, section 3.3).

    The model stays silent if the interval token is the most likely and its probability is at least the threshold.

    Args:
        logits (`torch.Tensor` of shape `(..., vocabulary)`): Scores of the next token.
        silence_token_id (`int`): The interval token, or end-of-sequence for models without one.
        interval_threshold (`float`): In [0, 1]. At 0 the most likely token decides.

    Returns:
        Whether to speak, bool of shape `(...)`, and the interval token's probability, float32 of shape `(...)`.
    """
    probabilities = logits.float().softmax(dim=-1)
    silence = probabilities[..., silence_token_id]
    silent = (silence >= interval_threshold) & (probabilities.argmax(dim=-1) == silence_token_id)
    return ~silent, silence


class VideoLLMMoDGenerationMixin:
    """Streaming, and what `generate` needs to know about frames and routed caches."""

    def stream(
        self,
        processor: Any,
        *,
        fps: float = 2.0,
        source_fps: float | None = None,
        system_prompt: str | None = None,
        interval_threshold: float | None = None,
        max_new_tokens: int = 100,
        chunk_frames: int = 8,
        max_frames: int | str | None = CHECKPOINT,
        sink_frames: int | None = None,
        max_text_tokens: int | str | None = CHECKPOINT,
        reuse_static: float | None = None,
        speak: str | Callable[[SeenFrame], bool | str] | None = None,
        every: float | None = None,
        speak_threshold: float | None = None,
        prompt: str | None = None,
        no_repeat: int | None = None,
        max_words: int | None = None,
        min_silence: float | None = None,
        streamer: Any | None = None,
        logits_processor: Any | None = None,
        do_sample: bool = False,
        output_router_scores: bool = False,
        cache_dtype: torch.dtype | None = None,
        cache: Any | None = None,
        compile: bool | None = None,
    ) -> StreamingSession:
        """
        Open a live session on this model; [`StreamingSession`] describes the options.

        Example:

        ```python
        >>> session = model.stream(processor, fps=2)
        >>> session.ask("Please narrate the video in real time.", reply_now=False)
        >>> for time, frame in processor.sample_every(camera, 0.5):  # PIL image or uint8 array (height, width, 3)
        ...     for event in session.push(frame, time=time):
        ...         print(event.time, event.role, event.text)
        ```"""
        options = {name: value for name, value in locals().items() if name not in ("self", "processor")}
        return StreamingSession(self, processor, **options)

    def narrate(
        self,
        processor: Any,
        video: Any,
        query: str | None = DEFAULT_QUERY,
        *,
        start: float = 0.0,
        end: float | None = None,
        timeout: float | None = 10.0,
        reconnect: bool | None = None,
        reply_now: bool = False,
        when_behind: str | None = None,
        max_waiting: int | None = None,
        fps: float | None = None,
        system_prompt: str | None = None,
        interval_threshold: float | None = None,
        max_new_tokens: int = 100,
        chunk_frames: int = 8,
        max_frames: int | str | None = CHECKPOINT,
        sink_frames: int | None = None,
        max_text_tokens: int | str | None = CHECKPOINT,
        reuse_static: float | None = None,
        speak: str | Callable[[SeenFrame], bool | str] | None = None,
        every: float | None = None,
        speak_threshold: float | None = None,
        prompt: str | None = None,
        no_repeat: int | None = None,
        max_words: int | None = None,
        min_silence: float | None = None,
        streamer: Any | None = None,
        logits_processor: Any | None = None,
        do_sample: bool = False,
        cache_dtype: torch.dtype | None = None,
        cache: Any | None = None,
        compile: bool | None = None,
    ) -> Iterator[StreamEvent]:
        """
        Watch a video and yield what the model says. A thread decodes the video while the model works.

        Args:
            processor ([`VideoLLMMoDProcessor`]): Reads the video and turns frames and text into tensors.
            video (`str`, `Path`, array, tensor or iterable): A file, a URL, `"camera:0"`, frames (height, width, 3) at
                `fps`, or pairs (time, frame), as `processor.sample_every(camera, 1 / fps)` yields them.
            query (`str`, *optional*): What the user says at the first frame; not yielded. `None` or `""` for nothing.
                The default is said only if `speak` is `"learned"`: otherwise the prompt takes its place.
            start (`float`, *optional*, defaults to 0.0): Second of the video to begin at.
            end (`float`, *optional*): Second of the video to stop at.
            timeout (`float`, *optional*, defaults to 10.0): Seconds that a camera or URL may take to open, and may be
                silent. `None` for no limit.
            reconnect (`bool`, *optional*): Whether to open a live source again when it ends, breaks off or falls
                silent. Defaults to `True` for cameras and broadcasts.
            reply_now (`bool`, *optional*, defaults to `False`): Whether the model must answer `query` at once, which
                VideoLLM-online's checkpoints expect. Otherwise it speaks when it decides to.
            when_behind (`str`, *optional*): What to do when a live source is faster than the model: `"drop_oldest"`
                (the default for cameras and broadcasts such as `rtsp://`) drops frames, `"block"` (the default for
                other sources) makes the source wait, and `"catch_up"` keeps frames and fails if too many wait.
            max_waiting (`int`, *optional*): Most frames of a live source that may wait. Defaults to 512 with
                `"catch_up"` and 16 otherwise. A frame waits at the model's size: 384 x 384 takes 0.4 MB.
            fps (`float`, *optional*): Frames to watch per second. Defaults to 2. A model that is too slow for that
                watches a camera or broadcast at 1, 0.5, ... instead, and a warning says so.
            system_prompt, interval_threshold, ...: The other options are those of [`StreamingSession`].

        Raises:
            `ValueError`: If the video cannot be read, or an option is out of range.
            `TooManyWaitingError`: If too many frames wait with `"catch_up"`; it comes after their events.
        """
        names = signature(self.stream).parameters
        options = {name: value for name, value in locals().items() if name in names}
        session = self.stream(**options | {"fps": 2.0 if fps is None else fps})
        if query and (query != DEFAULT_QUERY or session.speak == "learned"):
            session.hear(query, reply_now=reply_now)

        def on_drop() -> None:
            session.count_dropped()
            if session.num_dropped == 1:
                logger.warning(
                    "Frames come faster than the model can watch them: the oldest are dropped. Watch fewer per second "
                    "with a lower `fps`, or encode fewer with `reuse_static=3`."
                )

        def on_slow(slower: float, seconds: float) -> None:
            rate = f"{slower:g} frame{'' if slower == 1 else 's'} per second"
            took = f"A frame takes the model {seconds:.2g} s: it watches {rate} of this source."
            logger.warning(f"{took} Set `fps` to choose another rate.")

        report = processor.new_report()
        options = {"when_behind": when_behind, "max_waiting": max_waiting, "on_drop": on_drop, "device": self.device}
        options |= {"start": start, "end": end, "timeout": timeout, "reconnect": reconnect, "report": report}
        options |= {"session": session if fps is None else None, "on_slow": on_slow}
        ahead = processor.read_ahead(video, session.chunk_frames, fps=session.fps, **options)
        try:
            for waiting in ahead:
                times, frames = zip(*waiting, strict=True)
                yield from (event for event in session.push(frames, time=times) if event.role == "assistant")
            session.close()
        finally:
            ahead.close()
            if session.num_dropped > 0:
                logger.warning(f"{session.num_frames} frames were watched and {session.num_dropped} dropped.")
            if report:
                logger.warning(str(report))

    def should_speak(
        self, logits: torch.Tensor, interval_threshold: float | None = None
    ) -> tuple[torch.BoolTensor, torch.Tensor]:
        """Apply [`interval_rule`] with this model's interval token and, by default, its threshold."""
        silence = self.config.frame_token_interval_id
        if silence is None:
            eos = self.config.text_config.eos_token_id
            silence = eos[0] if isinstance(eos, (list, tuple)) else eos
        threshold = self.config.interval_threshold if interval_threshold is None else interval_threshold
        return interval_rule(logits, silence, threshold)

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Feed frames with the prompt only, unless there is no cache."""
        cache = one_cache(cache, past_key_values)
        seen = 0 if cache is None else cache.get_seq_length()
        # The first call of an assistant model has an empty cache, but is not marked as the first.
        if not is_first_iteration and kwargs.get("use_cache", True) and (isinstance(seen, torch.Tensor) or seen > 0):
            kwargs = {name: value for name, value in kwargs.items() if name not in _FRAME_INPUTS}
        kwargs |= {CACHE_NAME: cache, "inputs_embeds": inputs_embeds, "is_first_iteration": is_first_iteration}
        # Transformers drops pixels from the first call of an assistant model too.
        frames = {name: kwargs[name] for name in _FRAME_INPUTS if kwargs.get(name) is not None}
        return super().prepare_inputs_for_generation(input_ids, **kwargs) | frames

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        cache = one_cache(model_kwargs.get("cache"), model_kwargs.get("past_key_values"))
        position_ids = super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return position_ids + getattr(cache, "position_offset", 0)

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None, cache: Any = None, past_key_values: Any = None, **_: Any
    ) -> torch.Tensor | None:
        """Return a 2D mask, since layers differ in length, with a constant width for compiled steps."""
        cache = one_cache(cache, past_key_values)
        if attention_mask is None or not hasattr(cache, "record_positions"):
            return attention_mask
        return F.pad(attention_mask, (0, max(0, cache.get_max_length() - attention_mask.shape[1])))

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, **inputs: Any
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        if inputs.get("num_frames") is not None:
            inputs["num_frames"] = counts = torch.as_tensor(inputs["num_frames"]).flatten()
            for name in ("pixel_values_videos", "frame_features"):
                frames = inputs.get(name)
                if frames is not None and len(frames) == len(counts) and min(counts) < frames.shape[1]:
                    inputs[name] = torch.stack([_put_first(*row) for row in zip(frames, counts.tolist(), strict=True)])
        if expand_size > 1 and inputs.get("pixel_values_videos") is not None:
            # Beams share their frames: encode them once.
            inputs["frame_features"] = self.encode_frames(inputs.pop("pixel_values_videos"))
        return super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)

    def _prefill(self, input_ids: torch.Tensor, generation_config: Any, model_kwargs: dict, **options: bool) -> Any:
        """Prefill as in Transformers. A chunk of `prefill_chunk_size` tokens runs on to the end of its last frame."""
        frames = next((x for x in ("pixel_values_videos", "frame_features") if model_kwargs.get(x) is not None), None)
        cache = one_cache(model_kwargs.get("cache"), model_kwargs.get("past_key_values"))
        size, past = generation_config.prefill_chunk_size, 0 if cache is None else int(cache.get_seq_length())
        # An assistant model calls this again with later tokens. Its frames are in the cache then.
        again = past > 0 and not options.get("is_first_iteration", True)
        if again and size is not None:
            # There are few tokens, and Transformers 5.17 would begin its chunks with the prompt.
            generation_config = copy(generation_config)
            generation_config.prefill_chunk_size = None
        if size is None or cache is None or frames is None or again:
            return super()._prefill(input_ids, generation_config, model_kwargs, **options)
        # The prompt may begin with the tokens that are in the cache.
        mask = model_kwargs.get("attention_mask")
        new = (generation_config._mask_length if mask is None else mask.shape[1]) - past
        ids = input_ids[:, -new:]
        count, ends = F.pad((ids == self.config.frame_token_id).cumsum(dim=1), (1, 0)), [0]
        may_end = (count % self.config.frame_num_tokens == 0).all(dim=0).tolist()
        while ends[-1] < new:
            ends.append(next((end for end in range(ends[-1] + max(size, 1), new) if may_end[end]), new))
        seen = (count[:, ends] // self.config.frame_num_tokens).tolist()
        sliced = {x: model_kwargs[x] for x in ("attention_mask", "position_ids") if model_kwargs.get(x) is not None}
        for index, (begin, end) in enumerate(pairwise(ends)):
            rows = [row[n[index] : n[index + 1]] for row, n in zip(model_kwargs[frames], seen, strict=True)]
            inputs = model_kwargs | {name: x[..., : x.shape[-1] - new + end] for name, x in sliced.items()}
            inputs |= {frames: pad_sequence(rows, batch_first=True), "num_frames": [len(row) for row in rows]}
            inputs |= {"frame_token_mask": None, "is_first_iteration": True}
            outputs = self(**self.prepare_inputs_for_generation(ids[:, begin:end], **inputs), return_dict=True)
        return outputs

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        # A padded vocabulary scores the frame token, but a generated one would have no frame.
        processors.append(SuppressTokensLogitsProcessor([self.config.frame_token_id], device=self.device))
        return processors

    def new_warpers(self) -> LogitsProcessorList:
        """Return how `generate(do_sample=True)` changes scores before it draws: by temperature, top-k and the like."""
        config, _ = self._prepare_generation_config(None, do_sample=True)
        chosen = {name: getattr(config, name) for name in _SAMPLING}
        return super()._get_logits_processor(GenerationConfig(do_sample=True, **chosen))

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        generator = super()._get_candidate_generator(*args, **kwargs)
        # Prompt lookup scores tokens of the prompt, and the frame token's id may lie past the vocabulary.
        generator.vocab_size = max(self.config.text_config.vocab_size, self.config.frame_token_id + 1)
        return generator

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        given = one_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        if given is not None:
            model_kwargs[CACHE_NAME] = given
        kind = generation_config.cache_implementation
        if given is not None or generation_config.use_cache is False:
            sizes = batch_size, max_cache_length
            super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *sizes)
        elif kind in ALL_STATIC_CACHE_IMPLEMENTATIONS and not kind.startswith("offloaded"):
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"`cache_implementation={kind!r}` does not work with assisted generation: compiled steps keep no "
                    "record of frames, so part of a step cannot be removed. Leave the option out."
                )
            max_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            lengths = self._static_lengths(model_kwargs, batch_size, max_length)
            model_kwargs[CACHE_NAME] = self.new_cache(max_lengths=lengths)
        elif kind in (None, "dynamic", "offloaded"):
            model_kwargs[CACHE_NAME] = self.new_cache(offloading=kind == "offloaded")
        else:
            raise ValueError(f"`cache_implementation` is {kind!r}; it must be 'dynamic', 'static' or 'offloaded'.")

    def _static_lengths(self, model_kwargs: dict[str, Any], batch_size: int, max_length: int) -> list[int]:
        """Return the most entries that each layer can hold, given the prompt's frames."""
        frames = model_kwargs.get("frame_features", model_kwargs.get("pixel_values_videos"))
        num_frames = model_kwargs.get("num_frames")
        fewest = frames.shape[1] if frames is not None and batch_size == 1 else 0
        fewest = fewest if num_frames is None else int(min(num_frames))
        return [max_length - fewest * (self.config.frame_num_tokens - k) for k in self.config.layer_keep_counts]


def _put_first(row: torch.Tensor, count: int) -> torch.Tensor:
    """Return a row of frames with its padding behind its `count` frames: a pipeline pads on the tokenizer's side."""
    padding = len(row) - count
    comes_first = bool(row[count:].any()) and not row[:padding].any()
    return row.roll(-padding, 0) if comes_first else row


__all__ = ["DEFAULT_QUERY", "VideoLLMMoDGenerationMixin", "interval_rule"]
