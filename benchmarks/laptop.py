# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
How many frames per second does a laptop watch, and how soon does it answer?

```bash
python benchmarks/laptop.py                            # everything, about 15 minutes on two quiet cores
python benchmarks/laptop.py --quick                    # the smaller model without compilation, about 3 minutes
python benchmarks/laptop.py --models 256m --sizes 256
```

Random weights in the shapes of SmolVLM2-256M-Video and SmolVLM2-500M-Video. A session sees frames of 1280 x 720 one by
one, with `reuse_static=3`. In a moving scene it encodes each of them, and in a static one none.

The first word is that of the answer to a question about the newest of 16 frames. The session has seen the other 15.
Without a session, all 16 are encoded and read again: that is measured with Transformers' own class, the same weights
and the same tokens. Resizing is not counted there. The two are measured in turns, and in float32 must say the same
word.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from videollm_mod.console import quiet

import numpy as np
import torch
from common import ROOT, device_name, machine_rates, timed, to_dtype
from report import markdown_table, write_results
from tokenizers import AddedToken
from tqdm import tqdm
from transformers import LlamaConfig, PreTrainedTokenizerFast, SmolVLMConfig, SmolVLMForConditionalGeneration

from videollm_mod import (
    StreamingSession,
    VideoLLMMoDConfig,
    VideoLLMMoDForConditionalGeneration,
    VideoLLMMoDProcessor,
    VideoLLMMoDVideoProcessor,
)
from videollm_mod.space.command_line import CommandLineParser


QUESTION = "What is happening now?"
# Frames that people send again for each answer.
NUM_FRAMES = 16
FACTOR = 4
VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
VISION |= {"image_size": 512, "patch_size": 16}
TEXT = {
    "256m": {"hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
    "500m": {"hidden_size": 960, "num_hidden_layers": 32, "intermediate_size": 2560},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "vocab_size": 2048},
}
HEADS = {"256m": (9, 3), "500m": (15, 5), "tiny": (2, 1)}
TINY_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


@dataclass
class Row:
    """
    What was measured of one model at one size of frames.

    Args:
        model (`str`): A name in `TEXT`.
        size (`int`): Side of a frame in pixels.
        tokens (`int`): Tokens per frame.
        runner (`str`): `"eager"` or `"compiled"`.
        moving, static (`float`): Frames per second of a moving and of a static scene.
        first_word, resent (`float`, *optional*): Seconds from the newest frame to the first word, of the session and
            with all frames sent again.
    """

    model: str
    size: int
    tokens: int
    runner: str
    moving: float
    static: float
    first_word: float | None = None
    resent: float | None = None


def main() -> None:
    """Measure and print a table; with `--out`, also write files."""
    quiet()
    parser = CommandLineParser(description="Measure small vision-language models as streaming narrators.")
    parser.add_argument("--models", nargs="+", choices=list(TEXT), default=["256m", "500m"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 384, 256], help="sides of frames in pixels")
    parser.add_argument("--runners", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--frames", type=int, default=5, help="frames to measure of each scene")
    parser.add_argument("--tries", type=int, default=2, help="first words to measure")
    parser.add_argument("--dtype", help="by default float32")
    parser.add_argument("--quick", action="store_true", help="the smaller model only, uncompiled, everything once")
    parser.add_argument("--out", type=Path, help="folder for laptop.json and laptop.md")
    options = parser.parse_args()
    if options.quick:
        options.models, options.runners, options.frames, options.tries = options.models[:1], ["eager"], 2, 1
    options.dtype = to_dtype(options.dtype, "cpu")
    machine = describe(options)
    rows: list[Row] = []
    for row in measure_all(options):
        rows.append(row)
        text = f"{machine}\n\n{table(rows)}\n"
        if options.out is not None:
            write_results(options.out, "laptop", {"machine": machine, "rows": list(map(asdict, rows))}, text)
    print(text)


def describe(options: argparse.Namespace) -> str:
    """Return the line above the table."""
    dtype = str(options.dtype).removeprefix("torch.")
    _, products = machine_rates("cpu", options.dtype)
    hardware = f"{device_name('cpu')}, torch {torch.__version__}"
    return f"Random weights, {dtype}, {hardware}. Matrix products: {products / 1e12:.3g} TFLOP/s."


def measure_all(options: argparse.Namespace) -> Iterator[Row]:
    """Measure each model at each size, by each runner."""
    progress = tqdm(total=len(options.models) * len(options.sizes) * len(options.runners), disable=None)
    for name in options.models:
        source = make_source(name, options.dtype)
        model, processor = make_streaming(source)
        for size in options.sizes:
            model.set_frame_size(processor, size)
            for runner in options.runners:
                progress.set_description(f"{name}, {size} pixels, {runner}")
                yield measure(name, source, model, processor, runner, options)
                progress.update()


def make_tokenizer() -> Any:
    """Return the embedded checkpoint's tokenizer with the special tokens of SmolVLM."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(ROOT)
    names = ("<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>", "<image>")
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_special_tokens({"extra_special_tokens": tokens}, replace_extra_special_tokens=False)
    return tokenizer


def make_source(name: str, dtype: torch.dtype) -> SmolVLMForConditionalGeneration:
    """Return a model of Transformers' own class with random weights, the same ones at every call."""
    tokenizer, (heads, key_value_heads) = make_tokenizer(), HEADS[name]
    text = {"vocab_size": 49280, "num_attention_heads": heads, "num_key_value_heads": key_value_heads, **TEXT[name]}
    text |= {"max_position_embeddings": 8192, "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}}
    ends = {"eos_token_id": tokenizer.convert_tokens_to_ids("<end_of_utterance>"), "pad_token_id": 0}
    config = SmolVLMConfig(
        text_config=LlamaConfig(**text, **ends, tie_word_embeddings=True),
        vision_config=VISION | (TINY_VISION if name == "tiny" else {}),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=FACTOR,
        tie_word_embeddings=True,
        **ends,
    )
    torch.manual_seed(0)
    return SmolVLMForConditionalGeneration._from_config(config, dtype=dtype).eval()


def make_streaming(
    source: SmolVLMForConditionalGeneration,
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """Return a streaming model that shares the source's weights, and its processor."""
    vision, side = source.config.vision_config, source.config.vision_config.image_size
    grid = side // vision.patch_size // FACTOR
    video_processor = VideoLLMMoDVideoProcessor(size={"height": side, "width": side}, fit="stretch")
    processor = VideoLLMMoDProcessor(
        video_processor, make_tokenizer(), frame_token="<image>", frame_num_tokens=grid**2, stream_format="smolvlm"
    )
    config = VideoLLMMoDConfig(
        text_config=source.config.text_config,
        vision_config=vision,
        connector="pixel_shuffle",
        connector_hidden_act=None,
        frame_token_cls=False,
        frame_token_pooled=(grid, grid),
        frame_token_id=processor.frame_token_id,
        frame_token_interval_id=processor.frame_token_interval_id,
        mod_keep_ratio=1.0,
        speak="every",
    )
    model = VideoLLMMoDForConditionalGeneration._from_config(config, dtype=source.dtype).eval()
    pairs = (
        (model.model.vision_encoder, source.model.vision_model),
        (model.model.language_model, source.model.text_model),
        (model.model.connector.linear_1, source.model.connector.modality_projection.proj),
        (model.lm_head, source.lm_head),
    )
    for ours, theirs in pairs:
        ours.load_state_dict(theirs.state_dict(), assign=True)
    return model, processor


def measure(name: str, source: Any, model: Any, processor: Any, runner: str, options: argparse.Namespace) -> Row:
    """Measure one model at its size of frames."""
    if runner == "compiled":
        torch.compiler.reset()
    settings = {"speak": lambda _: False, "reuse_static": 3, "max_frames": 4 * NUM_FRAMES, "system_prompt": ""}
    settings |= {"compile": runner == "compiled", "max_new_tokens": 1}
    session = model.stream(processor, **settings)
    # The first frame comes with text, and the second compiles the step of a frame.
    push_all(session, moving_scene(2))
    moving = median(push_all(session, moving_scene(options.frames, first=2)))
    num_encoded = session.num_frames - session.num_reused
    static = median(push_all(session, static_scene(options.frames, first=1 + options.frames)))
    if num_encoded != options.frames + 2 or session.num_reused != options.frames:
        raise RuntimeError(f"{session.num_reused} frames were reused; the scenes are not what they should be.")
    row = Row(name, model.config.frame_size, model.config.frame_num_tokens, runner, 1 / moving, 1 / static)
    if runner == "eager":
        row.first_word, row.resent = measure_first_word(source, model.stream(processor, **settings), options.tries)
    return row


def measure_first_word(source: Any, session: StreamingSession, tries: int) -> tuple[float, float]:
    """Return the seconds to the first word, of a session and of the source model, which get the same tokens."""
    model, processor = session.model, session.processor
    old, newest = moving_scene(2)
    push_all(session, [old] * (NUM_FRAMES - 1))
    turns = [
        {"role": "stream", "num_frames": NUM_FRAMES, "times": [index / session.fps for index in range(NUM_FRAMES)]}
    ]
    turns = [{"role": "system", "content": ""}, *turns, {"role": "user", "content": QUESTION}]
    ids = processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    pixels = processor.process_frames([old] * (NUM_FRAMES - 1) + [newest])[None].to(model.dtype)
    inputs = {"input_ids": torch.tensor([ids]), "pixel_values": pixels, "max_new_tokens": 1, "do_sample": False}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    own, resent = [], []
    for _ in range(tries):
        fork = session.fork()

        def answer(fork: StreamingSession = fork) -> int:
            fork.push(newest)
            return fork.ask(QUESTION)[-1].token_ids[0]

        seconds, word = timed(answer, "cpu")
        own.append(seconds)
        seconds, generated = timed(lambda: source.generate(**inputs), "cpu")
        resent.append(seconds)
        # Rounding to 16 bits may choose another word.
        if model.dtype == torch.float32 and int(generated[0, -1]) != word:
            raise RuntimeError(f"The session says token {word}, and {type(source).__name__} {int(generated[0, -1])}.")
    return median(own), median(resent)


def moving_scene(count: int, first: int = 0) -> list[np.ndarray]:
    """Return frames of a camera that pans over a picture by 40 pixels per frame."""
    picture = np.random.default_rng(0).integers(0, 256, (90, 320, 3), dtype=np.uint8).repeat(8, axis=0)
    picture = picture.repeat(8, axis=1)
    return [picture[:, 40 * index % 1280 :][:, :1280] for index in range(first, first + count)]


def static_scene(count: int, first: int) -> list[np.ndarray]:
    """Return a frame of the moving scene again and again, with the noise of a camera."""
    (frame,), noise = moving_scene(1, first), np.random.default_rng(1)
    return [(frame + noise.normal(0, 4, frame.shape)).clip(0, 255).astype(np.uint8) for _ in range(count)]


def push_all(session: StreamingSession, frames: list[np.ndarray]) -> list[float]:
    """Push frames one by one, and return the seconds of each."""
    return [
        timed(lambda frame=frame: session.push(frame, time=session.num_frames / session.fps), "cpu")[0]
        for frame in frames
    ]


def table(rows: list[Row]) -> str:
    """Return a Markdown table."""
    head = ["model", "frame", "tokens per frame", "session", "frames/s, moving", "frames/s, static"]
    head += ["first word, s", f"first word with {NUM_FRAMES} frames sent again, s"]
    return markdown_table(head, map(cells, rows))


def cells(row: Row) -> list[str]:
    """Return a row of the table."""
    words = ["-", "-"] if row.first_word is None else [f"{row.first_word:.2f}", f"{row.resent:.1f}"]
    speeds = [f"{row.moving:.2f}", f"{row.static:.2f}"]
    return [row.model, f"{row.size} x {row.size}", str(row.tokens), row.runner, *speeds, *words]


if __name__ == "__main__":
    main()
