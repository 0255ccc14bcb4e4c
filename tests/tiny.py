# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny models, tokenizers and clips for tests. Nothing is downloaded."""

import json
import shutil
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedTokenizerFast

from videollm_mod import (
    VideoLLMMoDConfig,
    VideoLLMMoDForConditionalGeneration,
    VideoLLMMoDProcessor,
    VideoLLMMoDVideoProcessor,
)
from videollm_mod.cache_videollm_mod import TokenRun
from videollm_mod.routers_videollm_mod import GATES
from videollm_mod.train.checkpoint_files import checkpoint_files


TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
VISION_MODELS = ("siglip_vision_model", "siglip2_vision_model", "clip_vision_model", "dinov2", "swin")
# Every routing scheme with a name, and the paper's baselines.
SCHEMES: dict[str, dict[str, Any]] = {
    "full": {"mod_keep_ratio": 1.0},
    "interleaved": {"mod_layers": "interleaved"},
    "interleaved_deep": {"mod_layers": "interleaved_deep"},
    "all": {"mod_layers": "all"},
    "all_deep": {"mod_layers": "all_deep"},
    "list": {"mod_layers": [0, 2]},
    "early_exit": {"mod_keep_ratio": [1.0, 1.0, 0.0, 0.0]},
    "layer_skip": {"mod_keep_ratio": [1.0, 0.0, 1.0, 0.0]},
    "decaying": {"mod_keep_ratio": [1.0, 0.7, 0.4, 0.15]},
    "uniform": {"mod_layers": "all", "mod_router": "uniform"},
    "random": {"mod_layers": "all", "mod_router": "random"},
    "change": {"mod_layers": "all", "mod_router": "change"},
}
IMAGE_SIZE = 32
ROOT = Path(__file__).parents[1]
_CORPUS = [
    "A red ball enters from the left.\nUser: What color is the ball?\nAssistant: The ball is red.",
    "[,,,]\nAssistant: The blue square leaves.\n[,,]\nUser: Please narrate the video in real time.\n[,]\n",
    "A multimodal AI assistant is helping users with some activities. Below is their conversation, interleaved.",
] * 20


def embedded_files() -> dict[str, bytes]:
    """Return names and contents of the files that make up the embedded checkpoint."""
    return {name: path.read_bytes() for name, path in checkpoint_files(ROOT).items()}


def copy_embedded(folder: Path) -> Path:
    """Copy the embedded checkpoint into a new folder."""
    for name, path in checkpoint_files(ROOT).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / name)
    return folder


def edit(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Replace the weights of a checkpoint by what a function makes of them."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@lru_cache
def _tokenizer_json(close_is_one_token: bool) -> str:
    """Return a byte-level BPE in which "]\\n" is one token, as in Llama 3, or two."""
    newline = r"[\r\n]*" if close_is_one_token else ""
    pattern = rf" ?\p{{L}}+| ?\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+{newline}|\s"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer.to_str()


def tiny_tokenizer(*, close_is_one_token: bool = True) -> PreTrainedTokenizerFast:
    """A fresh tokenizer of some 400 tokens."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(close_is_one_token)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="right",
    )


def tiny_processor(*, close_is_one_token: bool = True, **options: Any) -> VideoLLMMoDProcessor:
    """A processor for tiny models: 32x32 frames, 1 + 3x3 tokens each."""
    return VideoLLMMoDProcessor(
        VideoLLMMoDVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tiny_tokenizer(close_is_one_token=close_is_one_token),
        **options,
    )


@lru_cache
def _token_ids() -> tuple[int, int, int]:
    processor = tiny_processor()
    return processor.frame_token_id, processor.frame_token_interval_id, len(processor.tokenizer) - 1


def tiny_text_config(model_type: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Four layers of width 32."""
    config = {
        "model_type": model_type,
        "vocab_size": _token_ids()[2],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    if model_type == "mistral":
        config["sliding_window"] = None
    return config | overrides


def tiny_vision_config(model_type: str = "siglip_vision_model", **overrides: Any) -> dict[str, Any]:
    """Two layers of width 16 over 4x4 patches."""
    if model_type == "swin":
        # Two stages: patches of 4 pixels become patches of 8.
        stages = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 4, "window_size": 2}
        return {"model_type": "swin", "image_size": IMAGE_SIZE, **stages, **overrides}
    config = {
        "model_type": model_type,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
    }
    if model_type == "siglip2_vision_model":
        config["num_patches"] = (IMAGE_SIZE // 8) ** 2
    else:
        config["image_size"] = IMAGE_SIZE
    return config | overrides


def tiny_config(
    text: str = "llama", vision: str = "siglip_vision_model", *, text_overrides: Any = None, **options: Any
) -> VideoLLMMoDConfig:
    """Return a tiny configuration."""
    frame_token_id, interval_id, _ = _token_ids()
    options = {"frame_token_id": frame_token_id, "frame_token_interval_id": interval_id} | options
    return VideoLLMMoDConfig(
        text_config=tiny_text_config(text, **(text_overrides or {})),
        vision_config=tiny_vision_config(vision),
        **options,
    )


def tiny_model(
    config: VideoLLMMoDConfig | None = None, *, seed: int = 0, attn_implementation: str = "sdpa", **options: Any
) -> VideoLLMMoDForConditionalGeneration:
    """Return a tiny model in evaluation mode, with random router weights: zeros would hide mistakes."""
    torch.manual_seed(seed)
    config = tiny_config(**options) if config is None else config
    config._attn_implementation = attn_implementation
    model = VideoLLMMoDForConditionalGeneration(config)
    for router in model.model.routers.values():
        for weight in router.parameters():
            torch.nn.init.normal_(weight, std=0.3)
    return model.eval()


def choose_kept(scores: torch.Tensor, keep_count: int, keep_last: bool) -> torch.LongTensor:
    """Return the tokens (frames, kept) that a routed layer keeps by scores (frames, tokens), by a plain loop."""
    num_tokens = scores.shape[1]
    count, candidates = (keep_count - 1, num_tokens - 1) if keep_last else (keep_count, num_tokens)
    even = [(2 * index + 1) * candidates // (2 * count) for index in range(count)]
    order = even + [index for index in range(candidates) if index not in even]
    rows = [
        sorted(sorted(order, key=lambda index: -row[index])[:count]) + [num_tokens - 1] * keep_last
        for row in scores.tolist()
    ]
    return torch.tensor(rows, dtype=torch.long, device=scores.device)


def gate_of(scores: torch.Tensor, name: str) -> torch.Tensor:
    """Return the gate g of each score; see [`GATES`]."""
    if (gate := GATES[name]) is None:
        return torch.ones_like(scores)
    return 1 + gate[1] * gate[0](scores)


def dialogue_ids(config: VideoLLMMoDConfig, runs: list[int], *, seed: int = 0) -> torch.LongTensor:
    """Return the tokens (1, sequence) of a dialogue: text, then for each number that many frames and more text."""
    generator = torch.Generator().manual_seed(seed)

    def text(length: int) -> list[int]:
        return torch.randint(3, 250, (length,), generator=generator).tolist()

    interval = [] if config.frame_token_interval_id is None else [config.frame_token_interval_id]
    frame = [config.frame_token_id] * config.frame_num_tokens
    ids = text(5)
    for frames in runs:
        for index in range(frames):
            ids += (interval if index else []) + frame
        ids += text(4)
    return torch.tensor([ids])


def token_runs(config: VideoLLMMoDConfig, ids: torch.LongTensor, keep: torch.BoolTensor) -> list[TokenRun]:
    """Return what to give `evict_tokens` so that tokens (1, sequence) stay where `keep` (sequence,) is True."""
    runs, place, tokens = [], 0, ids[0].tolist()
    while place < len(tokens):
        is_frame = tokens[place] == config.frame_token_id
        runs.append(TokenRun(config.frame_num_tokens if is_frame else 1, int(is_frame), bool(keep[place])))
        place += runs[-1].num_tokens
    return runs


def random_features(config: VideoLLMMoDConfig, frames: int, *, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Frame features (batch, frames, features, width)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, frames, *config.frame_feature_shape, generator=generator)


def random_frames(count: int, *, size: tuple[int, int] = (IMAGE_SIZE, IMAGE_SIZE), seed: int = 0) -> np.ndarray:
    """Frames (count, height, width, 3), uint8."""
    return np.random.default_rng(seed).integers(0, 256, (count, *size, 3), dtype=np.uint8)


def training_batch(processor: VideoLLMMoDProcessor, rows: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    """Return rows as the trainer gives them to the model. Options are the collator's."""
    from videollm_mod.train.collator import StreamCollator, normalize_pixels  # here, since it loads datasets

    return normalize_pixels(StreamCollator(processor, **options)(rows), processor)


def write_clip(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float = 10,
    times: list[float] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    **options: str,
) -> Path:
    """
    Write frames (count, height, width, 3) as a video. With `times` in seconds, the frame rate is variable. Further
    options are the encoder's.
    """
    import av  # here, since tests on a GPU run without it

    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        fast = {"crf": "1", "preset": "ultrafast", "tune": "zerolatency"} if codec == "libx264" else {}
        stream.options = fast | options
        if codec == "libx264":  # older codecs take the clock of a frame rate only
            stream.codec_context.time_base = Fraction(1, 12000)
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.time_base = Fraction(1, 12000)
            frame.pts = round(12000 * (index / fps if times is None else times[index]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_late_stream(path: Path, frames: np.ndarray) -> Path:
    """
    Write frames at 5 fps as an MPEG-TS in which a second video stream begins when the first has ended. FFmpeg looks
    at 7 seconds when it opens a file, and knows the second stream if it begins before that.
    """
    import av

    options = {"mpegts_pmt_start_pid": "600", "mpegts_start_pid": "700"}
    first, second = write_clip(path, frames, fps=5), path.with_name("second.ts")
    with av.open(str(first)) as source, av.open(str(second), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in [packet for packet in source.demux(video=0) if packet.size]:
            packet.stream = stream
            target.mux(packet)
    path.write_bytes(path.read_bytes() + second.read_bytes())
    second.unlink()
    return path


def write_noisy_clip(path: Path, count: int, *, noise_from: int) -> Path:
    """Write random frames at 10 fps, with noise in place of the packets from `noise_from` on."""
    import av

    write_clip(path, random_frames(count))
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    for place, size in packets[noise_from:]:
        data[place : place + size] = b"\xa5" * size
    path.write_bytes(data)
    return path


class WithoutFloat64(TorchDispatchMode):
    """Refuse float64, as GPUs of Apple do."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and x.dtype == torch.float64]
        assert not made, f"{function.name()} makes float64"
        return result


class CheckIndices(TorchDispatchMode):
    """Fake tensors allow an index on another device. A GPU does not."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name().startswith(("aten::index.", "aten::index_put")):
            for index in args[1]:
                assert index is None or index.device.type == "cpu" or index.device == args[0].device
        return function(*args, **(kwargs or {}))


class HostAndDevice(ExitStack):
    """
    Record transfers between host and device in functions of these modules. They wait on a GPU, and a CUDA graph cannot
    contain them.
    """

    def __init__(self, *modules: ModuleType) -> None:
        super().__init__()
        self.files = [module.__file__ for module in modules]
        self.found: set[tuple[str, str]] = set()

    def __enter__(self) -> "HostAndDevice":
        operations = ("lift_fresh", "_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "equal")
        self.enter_context(_Operations(self, operations))
        self.enter_context(_Methods(self, ("tolist", "numpy", "cpu")))
        return self

    def write_down(self, name: str) -> None:
        """Record a transfer and the function that caused it."""
        ours = [x for x in traceback.extract_stack() if x.filename in self.files]
        self.found |= {(f"{Path(x.filename).stem.removesuffix('_videollm_mod')}.{x.name}", name) for x in ours[-1:]}


class _Operations(TorchDispatchMode):
    def __init__(self, watcher: HostAndDevice, names: tuple[str, ...]) -> None:
        super().__init__()
        self.watcher, self.names = watcher, names

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().removeprefix("aten::")
        # The operation counts the true values of a boolean index.
        counts = name in ("index", "index_put_") and any(x is not None and x.dtype == torch.bool for x in args[1])
        if name in self.names or counts:
            self.watcher.write_down(name)
        return function(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, watcher: HostAndDevice, names: tuple[str, ...]) -> None:
        super().__init__()
        self.watcher, self.names = watcher, names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        places = [x for x in (*args[1:], *(kwargs or {}).values()) if isinstance(x, str)]
        if name in self.names or (name == "to" and "cpu" in places):
            self.watcher.write_down(name)
        return function(*args, **(kwargs or {}))
