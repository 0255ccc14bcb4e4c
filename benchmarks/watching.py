# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What the streaming benchmarks run: models with routing and without, steps of sessions and engines, and the plain loop.

Weights, frames and cache entries are random: time and memory do not depend on them. The plain loop is inference as in
VideoLLM-online: the same language model at full compute with Transformers' `DynamicCache`, one frame at a time.
"""

import argparse
import inspect
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import (
    ROOT,
    SCHEMES,
    SHAPES,
    Step,
    choose_device,
    default_device,
    device_name,
    num_frame_tokens,
    random_config,
    random_model,
    to_dtype,
)
from tqdm import tqdm
from transformers import AutoConfig, Cache, DynamicCache

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor
from videollm_mod.cache_videollm_mod import CACHE_NAME
from videollm_mod.mistakes import one_line_errors
from videollm_mod.serving import StreamingEngine, VideoLLMMoDPagedCache, attention_in_use
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.loading import CACHE_DTYPES, WEIGHTS, quantization
from videollm_mod.streaming_videollm_mod import StreamStep


PLAIN = "plain loop"
AS_SAVED = "as saved"
# Frames in a step that catches up.
TOGETHER = 8
SIGLIP_L = "siglip-l"
# The default vision encoder. SigLIP-L/16-384's shape is too large for a CPU.
SMALL_ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
}
# "]", "Assistant" and ":" open a reply.
REPLY_OPENING = 3
CAN_COMPILE = "compile" in inspect.signature(VideoLLMMoDForConditionalGeneration.stream).parameters


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the models."""
    parser.add_argument("--shape", choices=SHAPES, default="tiny", help="shape of the language model")
    parser.add_argument(
        "--tokens", type=num_frame_tokens, nargs="+", default=[10, 50], help="tokens per frame, 1 + n x n"
    )
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES), help="routing schemes")
    parser.add_argument(
        "--encoder", help=f"vision encoder: a folder, a Hub id, or {SIGLIP_L} for its shape; default: a small one"
    )
    parser.add_argument("--checkpoint", help="a folder or Hub id, instead of a random model of the options above")
    add_run_options(parser)


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the device and the dtypes."""
    parser.add_argument("--device", type=choose_device, default=default_device())
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--weights", choices=WEIGHTS, help="store linear layers in eight bits (torchao)")
    parser.add_argument(
        "--cache-dtype", choices=CACHE_DTYPES, help="store keys and values in eight bits; not in the plain loop"
    )


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and turn dtype names into dtypes."""
    options = parser.parse_args()
    if options.checkpoint is not None:
        with one_line_errors():
            options.checkpoint = check_checkpoint(options.checkpoint)
    options.dtype = to_dtype(options.dtype, options.device)
    options.cache_dtype = CACHE_DTYPES.get(options.cache_dtype)
    return options


def model_sets(options: argparse.Namespace) -> Iterator[dict[str, VideoLLMMoDForConditionalGeneration]]:
    """Yield the models by scheme, one set for each number of tokens per frame, or one set for a checkpoint."""
    if options.checkpoint:
        yield share_modules({scheme: load(scheme, options) for scheme in (AS_SAVED, "full")})
        return
    for tokens in tqdm(options.tokens, desc="tokens per frame"):
        yield random_models(tokens, options)


def random_models(tokens: int, options: argparse.Namespace) -> dict[str, VideoLLMMoDForConditionalGeneration]:
    """Return a random model of each scheme. The models share all modules."""
    vision: Any = dict(SMALL_ENCODER)
    if options.encoder:
        # The default vision configuration has the shape of SigLIP-L/16-384.
        vision = None if options.encoder == SIGLIP_L else AutoConfig.from_pretrained(options.encoder)
    # Memory may be too small for a second set of weights: only one model has real ones, and a router in each layer.
    everywhere = random_config(options.shape, "interleaved", tokens, vision)
    everywhere.mod_layers = "all"
    real = random_model(everywhere, dtype=options.dtype, device=options.device)
    for router in real.model.routers.values():
        torch.nn.init.normal_(router.weight, std=real.config.text_config.initializer_range)
    quantize(real.eval(), options.weights)
    configs = {scheme: random_config(options.shape, scheme, tokens, vision) for scheme in options.schemes}
    models = {name: random_model(config, dtype=options.dtype, device="meta") for name, config in configs.items()}
    share_modules({"": real, **models})
    return {name: model.eval() for name, model in models.items()}


def random_processor(model: VideoLLMMoDForConditionalGeneration) -> VideoLLMMoDProcessor:
    """Return a processor for a random model: the embedded checkpoint's, with the model's frames."""
    processor = VideoLLMMoDProcessor.from_pretrained(ROOT, trust_remote_code=True)
    height, width = image_size(model.config)
    processor.video_processor.size = {"height": height, "width": width}
    processor.frame_num_tokens, processor.frame_token_id = model.config.frame_num_tokens, model.config.frame_token_id
    return processor


def silence(model: VideoLLMMoDForConditionalGeneration) -> None:
    """Let a model never speak by itself: random weights would at random."""
    interval = model.config.frame_token_interval_id

    def should_speak(logits: torch.Tensor, threshold: Any = None) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: ARG001
        probability = logits.float().softmax(dim=-1)[..., interval]
        return torch.zeros_like(probability, dtype=torch.bool), probability

    model.should_speak = should_speak


def load(scheme: str, options: argparse.Namespace) -> VideoLLMMoDForConditionalGeneration:
    """Load the checkpoint as it is saved, or with every keep ratio set to 1."""
    ratio = {} if scheme == AS_SAVED else {"mod_keep_ratio": 1.0}
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(options.checkpoint, dtype=options.dtype, **ratio)
    quantize(model.to(options.device), options.weights)
    return model.eval()


def share_modules(
    models: dict[str, VideoLLMMoDForConditionalGeneration],
) -> dict[str, VideoLLMMoDForConditionalGeneration]:
    """Give all models the modules of the first, so that memory holds them once."""
    first, *others = models.values()
    for model in others:
        model.lm_head = first.lm_head
        for part in ("vision_encoder", "connector", "language_model"):
            setattr(model.model, part, getattr(first.model, part))
    return models


def quantize(model: VideoLLMMoDForConditionalGeneration, weights: str | None) -> None:
    """Convert linear layers to eight bits in place, with the same result as loading a checkpoint in eight bits."""
    if weights is not None:
        from torchao.quantization import quantize_

        for part in (model.model.vision_encoder, model.model.connector, model.model.language_model):
            quantize_(part, quantization(weights)["quantization_config"].quant_type)


def describe(rates: tuple[float, float] | None, options: argparse.Namespace) -> str:
    """Return the line above the tables: model, dtype, hardware, torch version, and attention kernel."""
    is_embedded = options.checkpoint and Path(options.checkpoint).resolve() == ROOT
    parts = [
        "embedded checkpoint" if is_embedded else str(options.checkpoint or options.shape),
        str(options.dtype).removeprefix("torch."),
        "trained weights" if options.checkpoint else "random weights",
    ]
    if options.weights is not None:
        parts[-1] += f" in {options.weights}"
    if options.cache_dtype is not None:
        parts.append(f"keys and values in {str(options.cache_dtype).removeprefix('torch.')}")
    parts += [device_name(options.device), f"torch {torch.__version__}"]
    encoder = "of the checkpoint" if options.checkpoint else options.encoder or "small"
    kernels = " and ".join(attention_in_use(torch.empty(0, device=options.device).device))
    text = f"{', '.join(parts)}. Vision encoder: {encoder}. Attention: {kernels}."
    if rates is not None:
        text += f" Copies: {rates[0] / 1e9:.3g} GB/s. Matrix products: {rates[1] / 1e12:.3g} TFLOP/s."
    return text


class Watcher:
    """
    One variant with a number of frames in its cache: the steps to time, and how to undo them.

    Args:
        model ([`VideoLLMMoDForConditionalGeneration`]): The model.
        cache (`Cache`): Its cache, filled with the context.
    """

    def __init__(self, model: VideoLLMMoDForConditionalGeneration, cache: Cache) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.before = int(cache.get_seq_length())

    def watch(self, features: torch.Tensor) -> None:
        """Process frame features (1, frames, features, width), up to the speak/stay-silent decision."""
        raise NotImplementedError

    def talk(self, count: int) -> None:
        """Process `count` tokens of text, up to the choice of the next token."""
        raise NotImplementedError

    def cache_bytes(self) -> int:
        """Return the bytes of the cache entries, without reserved memory."""
        raise NotImplementedError

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the features (1, frames, features, width) of pixel values (1, frames, channels, height, width)."""
        return self.model.encode_frames(pixels)

    def steps(self, dtype: torch.dtype) -> dict[str, Step]:
        """Return the steps to time, by kind."""
        device, size = self.model.device, self.config.frame_feature_shape
        features = torch.randn(1, TOGETHER, *size, device=device, dtype=dtype)
        pixels = torch.randn(1, 1, 3, *image_size(self.config), device=device, dtype=dtype)

        def speak() -> None:
            self.watch(features[:, :1])
            self.talk(REPLY_OPENING)

        kinds: dict[str, Callable[[], None]] = {
            "frame": lambda: self.watch(features[:, :1]),
            "together": lambda: self.watch(features),
            "encoded": lambda: self.watch(self.encode(pixels)),
            "speak": speak,
            "word": lambda: self.talk(1),
        }
        return {kind: partial(self._run, step) for kind, step in kinds.items()}

    def _run(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return self.undo

    def undo(self) -> None:
        """Remove what the step added to the cache."""
        added = int(self.cache.get_seq_length()) - self.before
        if added > 0:
            self.cache.crop(-added)


class EngineWatcher(Watcher):
    """The steps of one stream of a [`StreamingEngine`]; options are the engine's."""

    def __init__(self, model: VideoLLMMoDForConditionalGeneration, context: int, **options: Any) -> None:
        self.engine, caches = make_engine(model, 1, context, **options)
        super().__init__(model, caches[0])

    def watch(self, features: torch.Tensor) -> None:
        """See [`Watcher`]."""
        self.engine.runner.execute([self.cache], [frame_step(self.config, features[0])])

    def talk(self, count: int) -> None:
        """See [`Watcher`]."""
        self.engine.runner.execute([self.cache], [StreamStep([7] * count, [count - 1])])

    def cache_bytes(self) -> int:
        """See [`Watcher`]."""
        entries = [keys[0, 0].nbytes + values[0, 0].nbytes for keys, values, _ in self.engine.pool.layers]
        return sum(length * size for length, size in zip(self.cache.lengths, entries, strict=True))


class SessionWatcher(Watcher):
    """The steps of a [`StreamingSession`] of the kind `runner`, a name in [`session_options`]."""

    def __init__(
        self,
        model: VideoLLMMoDForConditionalGeneration,
        context: int,
        *,
        runner: str = "session",
        max_frames: int | None = None,
        cache_dtype: torch.dtype | None = None,
    ) -> None:
        most = context + TOGETHER if max_frames is None else max_frames
        options = session_options(runner, max_frames=most, max_text_tokens=64)
        self.session = model.stream(
            text_around_frames(model.config), system_prompt="", cache_dtype=cache_dtype, **options
        )
        fill_cache(self.session.cache, model, context)
        super().__init__(model, self.session.cache)

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """See [`Watcher`]. A compiled session also encodes compiled."""
        return self.session._encode(pixels[0])[None]

    def watch(self, features: torch.Tensor) -> None:
        """See [`Watcher`]."""
        self.session._execute(frame_step(self.config, features[0]))

    def talk(self, count: int) -> None:
        """See [`Watcher`]."""
        self.session._execute(StreamStep([7] * count, [count - 1]))

    def cache_bytes(self) -> int:
        """See [`Watcher`]."""
        return used_bytes(self.cache)


class PlainLoop(Watcher):
    """The language model without routing, with Transformers' own cache."""

    def __init__(self, model: VideoLLMMoDForConditionalGeneration, context: int) -> None:
        cache = DynamicCache()
        fill_cache(cache, model, context)
        super().__init__(model, cache)

    @torch.no_grad()
    def watch(self, features: torch.Tensor) -> None:
        """See [`Watcher`]. Several frames run one after another."""
        interval = torch.tensor([[self.config.frame_token_interval_id]], device=self.model.device)
        for index in range(features.shape[1]):
            parts = [self.model.get_input_embeddings()(interval), self.model.model.connector(features[:, index])]
            logits = self._step(torch.cat(parts, dim=1))
            self.model.should_speak(logits[0])[0].tolist()

    @torch.no_grad()
    def talk(self, count: int) -> None:
        """See [`Watcher`]."""
        ids = torch.full((1, count), 7, device=self.model.device)
        int(self._step(self.model.get_input_embeddings()(ids)).argmax())

    def _step(self, embeds: torch.Tensor) -> torch.Tensor:
        outputs = self.model.model.language_model(inputs_embeds=embeds, use_cache=True, **{CACHE_NAME: self.cache})
        return self.model.lm_head(outputs.last_hidden_state[:, -1:])

    def cache_bytes(self) -> int:
        """See [`Watcher`]."""
        return used_bytes(self.cache)


# What runs the steps of a model, by the name in `--runners`.
RUNNERS: dict[str, Callable[..., Watcher]] = {
    "session": SessionWatcher,
    "session-preallocated": partial(SessionWatcher, runner="session-preallocated"),
    "session-compiled": partial(SessionWatcher, runner="session-compiled"),
    "engine": EngineWatcher,
    "engine-compiled": partial(EngineWatcher, compile_steps=True),
}
if not CAN_COMPILE:
    del RUNNERS["session-compiled"]


def session_options(runner: str, **limits: int) -> dict[str, Any]:
    """
    Return what `model.stream` and `model.narrate` need for a kind of session: `"session"`, with a growing cache, or
    `"session-preallocated"` or `"session-compiled"`, with these limits.
    """
    options: dict[str, Any] = {"max_frames": None} if runner == "session" else limits
    return {**options, "compile": runner == "session-compiled"} if CAN_COMPILE else options


def used_bytes(cache: Cache) -> int:
    """Return the bytes of the entries of a cache, without what is allocated for later ones."""
    return sum(
        (layer.keys.nbytes + layer.values.nbytes) * int(layer.get_seq_length()) // layer.keys.shape[2]
        for layer in cache.layers
    )


def make_engine(
    model: VideoLLMMoDForConditionalGeneration, streams: int, context: int, **options: Any
) -> tuple[StreamingEngine, list[VideoLLMMoDPagedCache]]:
    """Return an engine for this number of streams, and their caches, filled with `context` random frames."""
    around, limits = text_around_frames(model.config), {"max_frames": context + 8, "max_text_tokens": 64}
    engine = StreamingEngine(model, around, max_streams=streams, **limits, **options)
    caches = [VideoLLMMoDPagedCache(engine.pool) for _ in range(streams)]
    for cache in caches:
        cache.reserve(context + 8, context + 64)
        fill_cache(cache, model, context)
    return engine, caches


def fill_cache(cache: Cache, model: VideoLLMMoDForConditionalGeneration, frames: int) -> None:
    """Fill a cache with random entries, as many as these frames and their separators leave in each layer."""
    config, text = model.config, model.config.text_config
    tokens, is_ragged = config.frame_num_tokens, hasattr(cache, "record_positions")
    starts = torch.arange(frames, device=model.device)[:, None] * (tokens + 1)
    for layer, count in enumerate(config.layer_keep_counts):
        kept = (min(count, tokens) if is_ragged else tokens) + 1
        if is_ragged and layer in config.routed_layers:
            cache.record_positions(layer, (starts + torch.arange(kept, device=model.device)).flatten()[None])
        shape = (1, text.num_key_value_heads, frames * kept, text.head_dim)
        cache.update(*torch.randn(2, *shape, device=model.device, dtype=model.dtype), layer)
    if hasattr(cache, "advance"):
        cache.advance(frames * (tokens + 1))


def frame_step(config: VideoLLMMoDConfig, features: torch.Tensor) -> StreamStep:
    """Return the step that processes frames, given as features (frames, features, width)."""
    frame = [config.frame_token_interval_id] + [config.frame_token_id] * config.frame_num_tokens
    ends = [len(frame) * (index + 1) - 1 for index in range(len(features))]
    return StreamStep(frame * len(features), ends, features)


def text_around_frames(config: VideoLLMMoDConfig) -> SimpleNamespace:
    """Return what a session needs of a processor if its steps are given as pixel values or features and tokens."""
    ids = frame_step(config, torch.empty(1, *config.frame_feature_shape)).ids
    return SimpleNamespace(
        frame_text_tokens=1,
        numbers_frames=False,
        encode_typical_frame=lambda: ids,
        normalize_frames=lambda pixels: pixels,
    )


def image_size(config: VideoLLMMoDConfig) -> tuple[int, int]:
    """Return the height and width of the images that the vision encoder accepts."""
    size = config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)
