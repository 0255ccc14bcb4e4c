# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The model in lmms-eval, as a plugin: two classes and the manifest that names them.

```bash
lmms-eval --model videollm_mod --model_args pretrained=.,fps=2 --tasks TASK
```

`pyproject.toml` registers [`manifest`] as an entry point of the group `lmms_eval.models`, so that an installed package
is found. lmms-eval uses the chat class, or the simple one with `--force_simple`.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from loguru import logger
from PIL import Image
from tqdm import tqdm

from videollm_mod.train.data.faults import UNREADABLE
from videollm_mod.train.encoding import encode_clip
from videollm_mod.train.loading import load_checkpoint
from videollm_mod.train.streaming_evaluation import FeatureStream
from videollm_mod.train.tasks.running import Prompt, Runner
from videollm_mod.video_reading_videollm_mod import VideoReader


MODES = ("offline", "stream")
# Tokens of the context that text may take, if `max_frames` is not given.
_TEXT_TOKENS = 1024
# Placeholders that some tasks write for pictures. Frames have a place of their own.
_PLACEHOLDER = re.compile(r"<(?:image|video)(?: ?\d+)?>\n?")


def manifest() -> ModelManifest:
    """Return what lmms-eval needs to find the classes."""
    return ModelManifest(
        model_id="videollm_mod",
        simple_class_path=f"{__name__}.VideoLLMMoD",
        chat_class_path=f"{__name__}.VideoLLMMoDChat",
    )


@dataclass(frozen=True)
class Part:
    """
    A part of a prompt: text of a role, or frames.

    Args:
        role (`str`): "system", "user", "assistant", or "stream" for frames.
        text (`str`, *optional*, defaults to `""`): The text.
        media (*optional*): A video or a picture: a path, a PIL image, or an array of frames.
        start, end (`float`, *optional*): Seconds between which to watch the video.
    """

    role: str
    text: str = ""
    media: Any = None
    start: float | None = None
    end: float | None = None


def as_parts(visuals: Any, text: str) -> list[Part]:
    """
    Return the prompt of a simple request: all media, then the text.

    Args:
        visuals: What the task's `doc_to_visual` returned: a list of media, one, or `None`.
        text (`str`): The question.
    """
    media = visuals if isinstance(visuals, (list, tuple)) else [] if visuals is None else [visuals]
    return [*(_media_part(one) for one in media), Part("user", _PLACEHOLDER.sub("", text))]


def chat_parts(messages: Sequence[dict[str, Any]]) -> list[Part]:
    """Return the prompt of a chat request: the contents of its messages in order, with texts of one message joined."""
    parts: list[Part] = []
    for message in messages:
        content = message["content"]
        texts: list[str] = []
        for item in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            if item["type"] == "text":
                texts.append(item["text"])
                continue
            if item["type"] == "audio":
                raise TypeError("the model does not hear: the task gives it a sound.")
            if texts:
                parts.append(Part(message["role"], "\n".join(texts)))
                texts = []
            parts.append(_media_part(item["url"], item.get("start_time"), item.get("end_time")))
        if texts:
            parts.append(Part(message["role"], "\n".join(texts)))
    return parts


def _media_part(media: Any, start: float | None = None, end: float | None = None) -> Part:
    if isinstance(media, dict):
        if "array" in media:
            raise TypeError("the model does not hear: the task gives it a sound.")
        start, end = media.get("video_start", start), media.get("video_end", end)
        media = media.get("url") or media.get("path") or media.get("video")
    if isinstance(media, Image.Image):
        media = [media.convert("RGB")]
    if media is None or isinstance(media, (int, float)):
        raise TypeError(f"a video or a picture is expected, got {media!r}.")
    return Part("stream", media=media, start=start, end=end)


class _Harness(lmms):
    """
    What both classes share: loading, and answering a prompt.

    Args:
        pretrained (`str`): A checkpoint: a folder or a Hub id.
        fps (`float`, *optional*, defaults to 2.0): Frames per second that the model sees.
        max_frames (`int`, *optional*): Most frames of a video. A longer one is watched at a lower rate, so that it is
            seen to its end. Defaults to what the context holds, with 1024 tokens left for text.
        mode (`str`, *optional*, defaults to `"offline"`): In `"offline"`, the model reads the prompt at once. In
            `"stream"`, it watches frame by frame and may speak, and its own words are part of what it remembers when
            it answers.
        interval_threshold (`float`, *optional*): Interval threshold of streams. Defaults to the checkpoint's.
        system_prompt (`str`, *optional*): A text or the path of a file. Defaults to the checkpoint's.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the weights.
        device_map (`str`, *optional*): How to place the model. Defaults to `device`, or to all GPUs that there are.
        attn_implementation (`str`, *optional*): Attention implementation.
        device (`str`, *optional*): Device, from the command line.
        batch_size (`int`, *optional*, defaults to 1): Prompts that run together offline, from the command line.
    """

    def __init__(
        self,
        pretrained: str,
        fps: float = 2.0,
        max_frames: int | None = None,
        mode: str = "offline",
        interval_threshold: float | None = None,
        system_prompt: str | None = None,
        dtype: str = "auto",
        device_map: str | None = None,
        attn_implementation: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
    ) -> None:
        super().__init__()
        if mode not in MODES:
            raise ValueError(f"mode is one of {', '.join(MODES)}, got {mode!r}.")
        if not fps > 0 or (max_frames is not None and max_frames < 1):
            raise ValueError(f"fps and max_frames are positive numbers, got {fps!r} and {max_frames!r}.")
        if not str(batch_size).isdigit() or not int(batch_size):
            raise ValueError(f"--batch_size is a positive number, got {batch_size!r}.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        place = self.accelerator.device if self._world_size > 1 else device_map or device or "auto"
        loading = {"dtype": dtype, "device_map": place, "attn_implementation": attn_implementation}
        loading = {name: value for name, value in loading.items() if value is not None}
        model, processor = load_checkpoint(pretrained, **loading)
        self.runner = Runner(model, processor, fps=fps, interval_threshold=interval_threshold)
        self.mode, self.batch_size = mode, int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else processor.system_prompt
        if max_frames is None:
            frame_tokens = model.config.frame_num_tokens + processor.frame_text_tokens
            room = model.config.text_config.max_position_embeddings - _TEXT_TOKENS
            max_frames = max(room // frame_tokens, 1)
        self.max_frames = max_frames

    @property
    def device(self) -> torch.device:
        """Device on which the processes of a run exchange their results."""
        return self.runner.model.device

    # ------------------------------------------------------------------------------------------------------- answers

    def generate_until(self, requests: list[Any]) -> list[str]:
        """Return an answer to each request, without sampling."""
        return self._answer_all(self._requests(requests))

    def generate_until_multi_round(self, requests: list[Any]) -> list[list[str]]:
        """Return the answers of all rounds of each request. A round has its own media and question, or messages."""
        return [self._answer_rounds(request.args) for request in tqdm(requests, disable=self._rank != 0)]

    def _answer_all(self, prompts: Iterator[tuple[str, Callable[[], list[Part]], dict[str, Any]]]) -> list[str]:
        """Answer prompts, given with their names and their options of generation, in order."""
        prompts = list(prompts)
        answers: list[str] = [""] * len(prompts)
        waiting: list[tuple[int, Prompt]] = []
        options: dict[str, Any] = {}
        for index, (name, make, given) in enumerate(tqdm(prompts, disable=self._rank != 0, desc="Model Responding")):
            if waiting and (given != options or len(waiting) == self.batch_size):
                self._answer_waiting(waiting, options, answers)
            options = given
            try:
                if self.mode == "stream":
                    answers[index] = self._stream(make(), given)
                else:
                    waiting.append((index, self._prompt(make())))
            except (*UNREADABLE, TypeError) as error:
                logger.error(f"{name}: {error} The answer counts as empty.")
        self._answer_waiting(waiting, options, answers)
        return answers

    def _answer_waiting(self, waiting: list[tuple[int, Prompt]], options: dict[str, Any], answers: list[str]) -> None:
        """Answer prompts as one batch, and empty the list."""
        chosen = {"max_new_tokens": _max_new_tokens(options), "num_beams": options.get("num_beams") or 1}
        if waiting:
            found = self.runner.answer_prompts([prompt for _, prompt in waiting], **chosen)
            for (index, _), [text] in zip(waiting, found, strict=True):
                answers[index] = _until(text, options)
        waiting.clear()

    def _prompt(self, parts: Sequence[Part]) -> Prompt:
        """Return a prompt of the model. Frames that follow frames are one stream message."""
        features = [self._encode(part)[0] for part in parts if part.role == "stream"]
        counts = iter(map(len, features))
        turns: list[dict[str, Any]] = []
        for part in parts:
            if part.role != "stream":
                turns.append({"role": part.role, "content": part.text})
            elif turns and turns[-1]["role"] == "stream":
                turns[-1]["num_frames"] += next(counts)
            else:
                turns.append({"role": "stream", "num_frames": next(counts)})
        if turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        model = self.runner.model
        empty = torch.empty(0, *model.config.frame_feature_shape, dtype=model.dtype, device=model.device)
        return self.runner.make_prompt(turns, torch.cat(features) if features else empty)

    def _stream(self, parts: Sequence[Part], options: dict[str, Any]) -> str:
        """Watch frame by frame, and return the reply to the last question."""
        if not any(part.role == "stream" for part in parts):
            raise ValueError("the task shows nothing, and a stream answers from what it has seen.")
        system = next((part.text for part in parts if part.role == "system"), self.system_prompt)
        runner, time = self.runner, 0.0
        session = runner.model.stream(
            runner.processor,
            fps=runner.fps,
            system_prompt=system,
            interval_threshold=runner.interval_threshold,
            max_new_tokens=_max_new_tokens(options),
        )
        stream, events, has_seen = FeatureStream(session), [], False
        for index, part in enumerate(parts):
            if part.role == "assistant":
                raise ValueError("the task gives replies of an assistant, which a stream cannot have said.")
            if part.role == "user":
                is_last = not any(later.role == "stream" for later in parts[index:])
                events = session.ask(part.text, reply_now=is_last and has_seen)
            elif part.role == "stream":
                features, fps = self._encode(part)
                for row in features:
                    stream.push(row, time=time)
                    time, has_seen = time + 1 / fps, True
        session.close()
        return _until(next((event.text for event in reversed(events) if event.role == "assistant"), ""), options)

    def _encode(self, part: Part) -> tuple[torch.Tensor, float]:
        """Return the features (frames, features, width) of a part, and its frames per second."""
        fps = self.runner.fps
        if isinstance(part.media, str):
            with VideoReader(part.media) as reader:
                seconds = min(reader.seconds, part.end or math.inf) - (part.start or 0.0)
            if not math.isfinite(seconds):
                raise ValueError(f"'{part.media}' has no end.")
            fps = min(fps, self.max_frames / seconds) if seconds > 0 else fps
        row = {"video": part.media, "start": part.start, "end": part.end}
        return encode_clip(self.runner.model, self.runner.processor, row, fps=fps)[: self.max_frames], fps

    def _doc(self, task: str, split: str, doc_id: int) -> Any:
        return self.task_dict[task][split][doc_id]


def _max_new_tokens(options: dict[str, Any]) -> int:
    return int(options.get("max_new_tokens") or 512)


def _until(text: str, options: dict[str, Any]) -> str:
    """Return a text up to the first of the texts at which a task wants it to stop."""
    stops = options.get("until") or []
    for stop in filter(None, [stops] if isinstance(stops, str) else stops):
        text = text.split(stop, 1)[0]
    return text.strip()


class VideoLLMMoD(_Harness):
    """The simple class of lmms-eval: all media come first, then the question. [`_Harness`] describes its options."""

    is_simple = True

    def _requests(self, requests: list[Any]) -> Iterator[tuple[str, Callable[[], list[Part]], dict[str, Any]]]:
        for context, options, doc_to_visual, doc_id, task, split in (request.args for request in requests):
            doc = self._doc(task, split, doc_id)
            yield f"{task} {doc_id}", lambda d=doc, v=doc_to_visual, c=context: as_parts(v(d), c), options

    def _answer_rounds(self, args: tuple[Any, ...]) -> list[str]:
        context, options, doc_to_visual, doc_to_text, doc_id, task, split = args
        doc = self._doc(task, split, doc_id)
        visuals, answers, about = doc_to_visual(doc), [], None
        while True:
            name = f"{task} {doc_id}, round {len(answers)}"
            prompt = (name, lambda v=visuals, c=context: as_parts(v, c), options)
            answers = [*answers, *self._answer_all(iter([prompt]))]
            visuals, context, is_last, said, about = doc_to_text(
                doc, previous_output=answers, round_idx=len(answers), previous_round_info=about
            )
            answers = answers if said is None else list(said)
            if is_last:
                return answers

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """
        Return how likely each continuation is, and whether the model would say it.

        lmms-eval 0.7.3 takes the least value for the best choice of a multiple-choice task, as if it were a loss. Such
        tasks therefore get the negative sum of log-probabilities, and tasks of the type `loglikelihood` get the sum.
        """
        if self.mode == "stream":
            raise ValueError("Likelihoods of given answers need mode=offline.")
        return [self._score(*request.args) for request in tqdm(requests, disable=self._rank != 0)]

    def _score(
        self, context: str, target: Any, doc_to_visual: Callable, doc_id: int, task: str, split: str
    ) -> GenerationResult:
        doc = self._doc(task, split, doc_id)
        text = target(doc) if callable(target) else target
        [found] = self.runner.score_prompt(self._prompt(as_parts(doc_to_visual(doc), context)), [text.strip()])
        # lmms-eval 0.7.3 turns a bare pair into text.
        return GenerationResult((found.total if callable(target) else -found.total, found.is_greedy))


class VideoLLMMoDChat(_Harness):
    """The chat class of lmms-eval: media stand where the task's messages have them. See [`VideoLLMMoD`]."""

    is_simple = False

    def _requests(self, requests: list[Any]) -> Iterator[tuple[str, Callable[[], list[Part]], dict[str, Any]]]:
        for _, doc_to_messages, options, doc_id, task, split in (request.args for request in requests):
            doc = self._doc(task, split, doc_id)
            yield f"{task} {doc_id}", lambda d=doc, m=doc_to_messages: chat_parts(m(d)), options

    def _answer_rounds(self, args: tuple[Any, ...]) -> list[str]:
        _, doc_to_messages, options, doc_id, task, split = args
        doc = self._doc(task, split, doc_id)
        messages, answers, about = doc_to_messages(doc), [], None
        while True:
            prompt = (f"{task} {doc_id}, round {len(answers)}", lambda m=messages: chat_parts(m), options)
            answers = [*answers, *self._answer_all(iter([prompt]))]
            messages, is_last, said, about = doc_to_messages(
                doc, round_idx=len(answers), previous_output=answers, previous_round_info=about
            )
            answers = answers if said is None else list(said)
            if is_last:
                return answers

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:  # noqa: ARG002
        """Refuse: lmms-eval has no messages for tasks that score given answers."""
        raise ValueError("Tasks that score given answers need --force_simple.")
