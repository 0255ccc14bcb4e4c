# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Generation with a routed cache, and the two verbs of a stream: `stream` and `narrate`."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional as F
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.generation.configuration_utils import ALL_STATIC_CACHE_IMPLEMENTATIONS, GenerationMode
from transformers.utils import logging

from .cache_videollm_mod import CACHE_NAME, one_cache
from .streaming_videollm_mod import StreamEvent, StreamingSession


logger = logging.get_logger(__name__)

# What belongs to the frames of the prompt, and must not be fed again with the tokens that follow.
_FRAME_INPUTS = ("pixel_values_videos", "frame_features", "num_frames", "frame_token_mask")


def interval_rule(
    logits: torch.Tensor, silence_token_id: int, interval_threshold: float
) -> tuple[torch.BoolTensor, torch.Tensor]:
    """
    Decides at the last token of a frame whether to speak (VideoLLM-online, arXiv 2406.11816, section 3.3).

    The model stays silent if the interval token's probability is at least the threshold, and it is the most likely
    token once a probability below the threshold counts as zero.

    Args:
        logits (`torch.Tensor` of shape `(..., vocabulary)`): Scores of the next token.
        silence_token_id (`int`): The interval token, or end-of-sequence for models without one.
        interval_threshold (`float`): In [0, 1]; 0 leaves the decision to the most likely token.

    Returns:
        Whether to speak, bool of shape `(...)`, and the interval token's probability, float32 of shape `(...)`.
    """
    probabilities = logits.float().softmax(dim=-1)
    silence = probabilities[..., silence_token_id]
    silent = (silence >= interval_threshold) & (probabilities.argmax(dim=-1) == silence_token_id)
    return ~silent, silence


class VideoLLMMoDGenerationMixin:
    """What `generate` needs to know about frames and routed caches, and the entry to streaming."""

    # -------------------------------------------------------------------------------------------------- streaming

    def stream(self, processor: Any, **options: Any) -> StreamingSession:
        """
        Opens a live session on this model.

        Args:
            processor ([`VideoLLMMoDProcessor`]): Turns frames and text into tensors.
            options: Options of [`StreamingSession`]: `fps`, `system_prompt`, `interval_threshold`, `max_new_tokens`,
                `chunk_frames`, `max_frames`, `sink_frames`, `max_text_tokens`, `streamer`, `logits_processor`,
                `do_sample`, `cache_dtype`, `cache`.

        Returns:
            [`StreamingSession`]

        Example:

        ```python
        >>> session = model.stream(processor, fps=2)
        >>> session.ask("What am I holding?")
        >>> for frame in camera:                          # PIL image, or uint8 array or tensor (height, width, 3)
        ...     for event in session.push(frame):
        ...         print(event.time, event.text)
        ```"""
        return StreamingSession(self, processor, **options)

    def narrate(
        self,
        processor: Any,
        video: Any,
        query: str | None = None,
        *,
        fps: float = 2.0,
        start: float = 0.0,
        end: float | None = None,
        reply_now: bool = False,
        when_behind: str | None = None,
        max_waiting: int | None = None,
        **options: Any,
    ) -> Iterator[StreamEvent]:
        """
        Watches a video from start to end and yields what is said: `stream`, collected. The video is read ahead, and
        frames that wait are watched together, up to `chunk_frames`; of a file or an array always as many. That frames
        are dropped is logged at the first, and how many at the end.

        Args:
            processor ([`VideoLLMMoDProcessor`]): Reads the video and turns frames and text into tensors.
            video (`str`, `Path`, array, tensor or iterable): A file, a URL, or frames (height, width, 3) at `fps`.
            query (`str`, *optional*): Said by the user at the first frame.
            fps (`float`, *optional*, defaults to 2.0): Frames a second to watch.
            start (`float`, *optional*, defaults to 0.0): Second of the video to begin at.
            end (`float`, *optional*): Second of the video to stop at.
            reply_now (`bool`, *optional*, defaults to `False`):
                Whether the model must answer `query` at once. By default it goes on watching and speaks when it
                decides to, as in training on timed messages. VideoLLM-online's checkpoints expect `True`.
            when_behind (`str`, *optional*):
                What happens to frames of a live source that come faster than they can be watched: `"drop_oldest"`,
                `"block"`, which lets the source wait, or `"catch_up"`, which lets them wait and ends there if too many
                do. By default `"drop_oldest"` for `"camera:0"` and broadcasts such as `rtsp://`, which wait for
                nobody, else `"block"`: for an iterable over a camera of your own, or a live playlist, give
                `"drop_oldest"`. A file always waits.
            max_waiting (`int`, *optional*):
                How many frames may wait, as they were read: of 1920 x 1080 each takes 6.2 MB. By default 16, and 512
                to catch up.
            options: Options of [`StreamingSession`].

        Yields:
            [`StreamEvent`]

        Raises:
            `ValueError`: If the video cannot be read, or an option does not fit.
            `TooManyWaitingError`: If more frames come than may wait to catch up; those that wait are watched first.
        """
        session = self.stream(processor, fps=fps, **options)
        if query is not None:
            session.ask(query, reply_now=reply_now)

        def drop() -> None:
            session.count_dropped()
            if session.num_dropped == 1:
                logger.warning("Frames come faster than they can be watched: the oldest that wait are dropped.")

        # Decoding goes on while the model works.
        ahead = processor.read_ahead(
            video,
            session.chunk_frames,
            fps=fps,
            start=start,
            end=end,
            when_behind=when_behind,
            max_waiting=max_waiting,
            on_drop=drop,
        )
        try:
            for waiting in ahead:
                yield from session.push([frame for _, frame in waiting], time=[time for time, _ in waiting])
            yield from session.close()
        finally:
            ahead.close()
            if session.num_dropped > 0:
                logger.warning(f"{session.num_frames} frames were watched, and {session.num_dropped} dropped.")

    def should_speak(
        self, logits: torch.Tensor, interval_threshold: float | None = None
    ) -> tuple[torch.BoolTensor, torch.Tensor]:
        """[`interval_rule`] with this model's token of silence and, unless given, its threshold."""
        silence = self.config.frame_token_interval_id
        if silence is None:
            eos = self.config.text_config.eos_token_id
            silence = eos[0] if isinstance(eos, (list, tuple)) else eos
        threshold = self.config.interval_threshold if interval_threshold is None else interval_threshold
        return interval_rule(logits, silence, threshold)

    # -------------------------------------------------------------------------------------------- hooks of generate

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        cache: Any | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool = False,
        past_key_values: Any | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As in Transformers; frames are fed with the prompt, and again only where there is no cache."""
        cache = one_cache(cache, past_key_values)
        seen = 0 if cache is None else cache.get_seq_length()
        # An assistant model's first call is not flagged as the first, but finds its cache empty.
        if not is_first_iteration and kwargs.get("use_cache", True) and (isinstance(seen, torch.Tensor) or seen > 0):
            kwargs = {name: value for name, value in kwargs.items() if name not in _FRAME_INPUTS}
        return super().prepare_inputs_for_generation(
            input_ids,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None, cache: Any = None, past_key_values: Any = None, **_: Any
    ) -> torch.Tensor | None:
        """Keeps the mask two-dimensional, since layers differ in length, and of one width, for a compiled step."""
        cache = one_cache(cache, past_key_values)
        if attention_mask is None or not hasattr(cache, "record_positions"):
            return attention_mask
        return F.pad(attention_mask, (0, max(0, cache.get_max_length() - attention_mask.shape[1])))

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor | None, dict[str, Any]]:
        if expand_size > 1:
            if model_kwargs.get("pixel_values_videos") is not None:
                # Beams share their frames: encode them once and repeat the features.
                model_kwargs["frame_features"] = self.encode_frames(model_kwargs.pop("pixel_values_videos"))
            num_frames = model_kwargs.get("num_frames")
            if isinstance(num_frames, (list, tuple)):
                model_kwargs["num_frames"] = [count for count in num_frames for _ in range(expand_size)]
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> LogitsProcessorList:
        processors = super()._get_logits_processor(*args, **kwargs)
        frame_token_id = self.config.frame_token_id
        if frame_token_id < self.get_input_embeddings().num_embeddings:
            # Within a padded vocabulary the frame token has a score, but no frame would come with it.
            processors.append(SuppressTokensLogitsProcessor([frame_token_id], device=self.device))
        return processors

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        given = one_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        if given is not None:
            model_kwargs[CACHE_NAME] = given
        kind = generation_config.cache_implementation
        if given is not None or generation_config.use_cache is False:
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        elif kind in ALL_STATIC_CACHE_IMPLEMENTATIONS and not kind.startswith("offloaded"):
            if generation_mode == GenerationMode.ASSISTED_GENERATION:
                raise ValueError(
                    f"`cache_implementation={kind!r}` does not go with assisted generation: what a compiled step put "
                    "into layers of different lengths cannot be taken back in part. Leave it out."
                )
            max_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            lengths = self._static_lengths(model_kwargs, batch_size, max_length)
            model_kwargs[CACHE_NAME] = self.new_cache(max_lengths=lengths)
        elif kind in (None, "dynamic", "offloaded"):
            model_kwargs[CACHE_NAME] = self.new_cache(offloading=kind == "offloaded")
        else:
            raise ValueError(
                f"`cache_implementation` is {kind!r}; a routed model has 'dynamic', 'static' and 'offloaded' caches."
            )

    def _static_lengths(self, model_kwargs: dict[str, Any], batch_size: int, max_length: int) -> list[int]:
        """Entries each layer can hold at most once the prompt's frames are in."""
        frames = model_kwargs.get("frame_features", model_kwargs.get("pixel_values_videos"))
        num_frames = model_kwargs.get("num_frames")
        if num_frames is not None:
            fewest = int(min(num_frames))
        else:
            fewest = frames.shape[1] if frames is not None and batch_size == 1 else 0
        num_tokens = self.config.frame_num_tokens
        return [max_length - fewest * (num_tokens - min(k, num_tokens)) for k in self.config.layer_keep_counts]


__all__ = ["VideoLLMMoDGenerationMixin", "interval_rule"]
