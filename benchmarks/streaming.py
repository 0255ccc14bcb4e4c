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
"""
How fast a stream is watched and talked about, routed and at full compute, beside a plain loop over the same weights.

```bash
python benchmarks/streaming.py                                                   # on this machine's CPU, small
python benchmarks/streaming.py --checkpoint . --contexts 10 60 --stream-context 24 \\
    --clip samples/streamworld.mp4                                         # the embedded checkpoint, its sample
python benchmarks/streaming.py --shape llama3-8b --device cuda --tokens 50 --encoder siglip-l \\
    --contexts 10 300 600 1200 3600 --streams 1 8 16 32 64 --stream-context 300  # on a GPU
```

Weights, frames and what is remembered are random: time and memory do not depend on them. A step is one frame that
arrives when so many are remembered: its tokens through all layers and the decision whether to speak, as a
`StreamingEngine` of one stream runs it, on a GPU as one captured graph. The plain loop is what VideoLLM-online's
inference does: the same language model by itself, full compute, Transformers' `DynamicCache`, a frame at a time.

With `--streams` as many streams, each with a memory of `--stream-context` frames, show a frame at the same moment,
again and again: how long such a round takes, vision encoding included, says how many frames a second all of them may
bring. A round that takes longer than a frame of 2 a second lasts is a missed deadline.

With `--compile` the steps of an engine of one stream are also measured compiled. With `--weights` all ways run on
linear layers in eight bits, with `--cache` all but the plain loop, whose cache has no such choice, remember in eight
bits.

With `--clip` a checkpoint watches a video file from its first frame to its last word: in a session, in an engine of
one stream, and, for what was said there, in the plain loop, which is given each word that it is to say, so that all of
them do the same work.

The floor of a step is what the memory or the arithmetic unit of this machine needs at least, whichever is more: bytes
of weights and cache over the measured rate of a copy, or operations over the measured rate of a matrix product.
All ways take five steps in turns, on the same weights, since a machine's speed changes; how many times as fast as the
plain loop a way is, is the median over pairs of steps. Where memory comes to lie makes a difference too: all is done
twice (`--tries`), and medians are of both. A round of streams is measured once, scheme after scheme, and of watching a
clip the median of fifteen is told. Of few steps p99 is the slowest.
"""

import argparse
import ctypes
import gc
import json
import math
import time as clock
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Any

import torch
from cost import SCHEMES, SHAPES, device_name, free, p99, wait, write
from tqdm import tqdm
from transformers import AutoConfig, AutoProcessor, Cache, DynamicCache

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration
from videollm_mod.cache_videollm_mod import CACHE_NAME
from videollm_mod.serving import StreamingEngine
from videollm_mod.serving.attention import attention_in_use
from videollm_mod.serving.pages import VideoLLMMoDPagedCache
from videollm_mod.space.loading import CACHE_DTYPES, WEIGHTS, quantization
from videollm_mod.streaming_videollm_mod import StreamEvent, StreamStep
from videollm_mod.video_reading_videollm_mod import read_ahead


PLAIN = "plain loop"
AS_SAVED = "as saved"
PROMPT = "Please narrate the video in real time."
CLIP_FPS = 2.0
# Frames that wait, of a step that sees several.
TOGETHER = 8
# Steps of a way in a turn.
IN_A_ROW = 5
# Where Linux counts the most memory that a process held anew.
_CLEAR = Path("/proc/self/clear_refs")
SIGLIP_L = "siglip-l"
# What the vision encoder is if none is named: SigLIP-L/16-384's shape is for GPUs.
SMALL_ENCODER = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "intermediate_size": 288,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 128,
    "patch_size": 16,
}


@dataclass
class Row:
    """
    Figures of one way of running at one context.

    Args:
        scheme (`str`): Routing, or the plain loop.
        tokens (`int`): Tokens a frame.
        context (`int`): Frames remembered.
        p50, p99 (`float`): Milliseconds of a frame step.
        times_plain (`float`, *optional*): How many times as fast as the plain loop's beside it it is.
        together (`float`): Milliseconds a frame of steps of eight frames that wait.
        together_times_plain (`float`, *optional*): How many times as fast as the plain loop's, one after another.
        encoded (`float`): Frames a second, a frame at a time, vision encoding included.
        first_word (`float`): Milliseconds from an encoded frame to the first token of a reply to it.
        tokens_per_second (`float`): Reply tokens a second.
        cache_mb (`float`): Megabytes of the cache.
        peak_gb (`float`, *optional*): Most gigabytes held while it took a step of each kind, without what other ways
            held then: of a GPU by tensors, on Linux by the process.
        floor (`float`): Milliseconds of a frame step at the machine's rates of copying and of matrix products.
    """

    scheme: str
    tokens: int
    context: int
    p50: float
    p99: float
    times_plain: float | None
    together: float
    together_times_plain: float | None
    encoded: float
    first_word: float
    tokens_per_second: float
    cache_mb: float
    peak_gb: float | None
    floor: float


@dataclass
class Round:
    """
    Figures of many streams at once.

    Args:
        scheme (`str`): Routing.
        tokens (`int`): Tokens a frame.
        streams (`int`): How many streams.
        p50, p99 (`float`): Milliseconds in which each of them has its frame encoded, seen and decided on.
        frames_per_second (`float`): Of all together.
        missed (`int`): Rounds of those measured that took longer than a frame of 2 a second lasts.
        cache_mb (`float`): Megabytes of all caches.
    """

    scheme: str
    tokens: int
    streams: int
    p50: float
    p99: float
    frames_per_second: float
    missed: int
    cache_mb: float


@dataclass
class Clip:
    """
    Figures of one way of watching a video file.

    Args:
        way (`str`): How.
        frames (`int`): Frames that it has at 2 a second.
        words (`int`): Tokens said.
        seconds (`float`): From opening the file to the last word.
        times_plain (`float`): How many times as fast as the plain loop beside it, the median of all tries.
    """

    way: str
    frames: int
    words: int
    seconds: float
    times_plain: float


def main() -> None:
    """Measures, prints a table, and writes it with plots where asked."""
    parser = argparse.ArgumentParser(description="Measures streaming, routed and not, beside a plain loop.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="default: bfloat16 on a GPU, float32 elsewhere")
    parser.add_argument("--tokens", type=int, nargs="+", default=[10, 50], help="tokens a frame, 1 + n x n")
    parser.add_argument("--contexts", type=int, nargs="+", default=[10, 300, 600], help="frames remembered")
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument(
        "--checkpoint", help="a folder or a Hub id in place of random weights and of what decides them"
    )
    parser.add_argument(
        "--encoder", help=f"vision encoder: a folder, a Hub id or {SIGLIP_L}, its shape; by default a small one"
    )
    parser.add_argument("--compile", action="store_true", help="also measure steps that are compiled")
    parser.add_argument("--weights", choices=WEIGHTS, help="linear layers in eight bits, by torchao, of all ways")
    parser.add_argument("--cache", choices=CACHE_DTYPES, help="keys and values in eight bits, but of the plain loop")
    parser.add_argument("--clip", help="a video file that the checkpoint watches from start to end")
    parser.add_argument("--steps", type=int, default=100, help="steps measured of each kind")
    parser.add_argument("--tries", type=int, default=2, help="times that they are, each from another memory")
    parser.add_argument("--streams", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="streams at once")
    parser.add_argument("--stream-context", type=int, default=60, help="frames that each of them remembers")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for streaming.json and streaming.md, written as figures come, latency.png and streams.png",
    )
    options = parser.parse_args()
    if options.clip and not options.checkpoint:
        parser.error("--clip needs --checkpoint: random weights have nothing to say")
    if options.steps < 1 or options.tries < 1:
        parser.error(f"--steps {options.steps} --tries {options.tries}: at least one of each")
    options.dtype = getattr(torch, options.dtype or ("bfloat16" if options.device == "cuda" else "float32"))
    rates = machine_rates(options.device, options.dtype)
    rows: list[Row] = []
    rounds: list[Round] = []
    clips: list[Clip] = []
    text = ""
    for tokens in tqdm([None] if options.checkpoint else options.tokens, desc="models"):
        models = load_all(options) if tokens is None else build_all(tokens, options)
        for found in measure(models, rates, options):
            rows += found
            text = report(rows, rounds, clips, rates, options)
        for scheme, model in models.items():
            for one in measure_streams(model, scheme, options):
                rounds.append(one)
                text = report(rows, rounds, clips, rates, options)
        del models, model
        free(options.device)  # before others are made
    if options.clip:
        clips = measure_clip(options)
        text = report(rows, rounds, clips, rates, options)
    print(text)
    if options.out is not None:
        if rows:
            draw(rows, options.out / "latency.png")
        if rounds:
            draw_streams(rounds, options.out / "streams.png")


def report(
    rows: list[Row], rounds: list[Round], clips: list[Clip], rates: tuple[float, float], options: argparse.Namespace
) -> str:
    """All figures so far as Markdown; written with them as JSON, so that a run that is broken off loses none."""
    rows.sort(key=lambda row: (row.tokens, row.context))
    rounds.sort(key=lambda row: (row.tokens, row.streams))
    text = f"{describe(rates, options)}\n\n{table(rows)}\n"
    if rounds:
        text += (
            f"\nStreams at once, each with {options.stream_context} frames remembered:\n\n{table_of_streams(rounds)}\n"
        )
    if clips:
        text += f"\n'{Path(options.clip).name}' from its first frame to its last word:\n\n{table_of_clips(clips)}\n"
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        figures = {"machine": describe(rates, options)}
        figures |= {"rows": [asdict(row) for row in rows], "streams": [asdict(row) for row in rounds]}
        figures |= {"clip": [asdict(row) for row in clips]}
        write(options.out / "streaming.json", json.dumps(figures, indent=1))
        write(options.out / "streaming.md", text)
    return text


def measure(
    models: dict[str, VideoLLMMoDForConditionalGeneration], rates: tuple[float, float], options: argparse.Namespace
) -> Iterator[list[Row]]:
    """All ways at each context: each scheme, and where there is full compute the plain loop on the same weights."""
    ways: dict[str, Callable[[int], Watcher]] = {}
    stored = {"cache_dtype": CACHE_DTYPES.get(options.cache)}
    for scheme, model in models.items():
        ways[scheme] = partial(Engine, model, **stored)
        if options.compile:
            ways[f"{scheme}, compiled"] = partial(Engine, model, compile_steps=True, **stored)
        if scheme == "full":
            ways[PLAIN] = partial(PlainLoop, model)
    for context in tqdm(sorted(options.contexts), desc="frames remembered", leave=False):
        found = measure_context(ways, context, rates, options)
        for name in [name for name in ways if name not in found]:
            # Beside the others it had no room.
            found |= measure_context({name: ways[name]}, context, rates, options)
            if name not in found:
                print(f"{name}: no memory for {context} frames, left out")
                del ways[name]
        yield [make_row(name, context, found) for name in ways]


def make_row(name: str, context: int, found: "dict[str, Measured]") -> Row:
    """The figures of one way."""
    measured = found[name]
    seconds = {kind: median(taken) for kind, taken in measured.seconds.items()}
    is_paired = PLAIN in found and measured.is_beside_others and found[PLAIN].is_beside_others
    plain = found[PLAIN].seconds if is_paired else None

    def speed(kind: str) -> float | None:
        # Of pairs taken together: what slows the machine down slows both.
        return None if plain is None else median(map(truediv, plain[kind], measured.seconds[kind]))

    return Row(
        name,
        measured.tokens,
        context,
        p50=1e3 * seconds["frame"],
        p99=1e3 * p99(measured.seconds["frame"]),
        times_plain=speed("frame"),
        together=1e3 * seconds["together"] / TOGETHER,
        together_times_plain=speed("together"),
        encoded=1 / seconds["encoded"],
        first_word=1e3 * seconds["speak"],
        tokens_per_second=1 / seconds["word"],
        cache_mb=measured.cache_bytes / 1e6,
        peak_gb=measured.peak_gb,
        floor=1e3 * measured.floor,
    )


def measure_streams(
    model: VideoLLMMoDForConditionalGeneration, scheme: str, options: argparse.Namespace
) -> Iterator[Round]:
    """Rounds of so many streams, a frame each."""
    config = model.config
    for count in tqdm(sorted(options.streams), desc=f"{scheme}, streams", leave=False):
        free(options.device)
        try:
            yield _measure_round(model, scheme, count, options)
        except torch.OutOfMemoryError:
            print(f"{scheme}, {config.frame_num_tokens} tokens: no memory for {count} streams, left out")
            break


def _measure_round(
    model: VideoLLMMoDForConditionalGeneration, scheme: str, count: int, options: argparse.Namespace
) -> Round:
    config, how = model.config, {"cache_dtype": CACHE_DTYPES.get(options.cache)}
    engine, caches = make_engine(model, count, options.stream_context, **how)
    pixels = torch.randn(count, 3, *_size(config), device=options.device, dtype=options.dtype)
    step = partial(_watch_all, engine, caches, pixels)
    seconds = in_turns({scheme: step}, max(options.steps // 4, 5), options.device)[scheme]
    p50, missed = median(seconds), sum(taken > 0.5 for taken in seconds)
    size, times = sum(cache.num_bytes for cache in caches) / 1e6, (1e3 * p50, 1e3 * p99(seconds))
    return Round(scheme, config.frame_num_tokens, count, *times, count / p50, missed, size)


def _watch_all(
    engine: StreamingEngine, caches: list[VideoLLMMoDPagedCache], pixels: torch.Tensor
) -> Callable[[], None]:
    """A frame for each stream; gives what takes it back."""
    before = int(caches[0].get_seq_length())
    with torch.no_grad():
        features = engine.model.encode_frames(pixels)
    engine.execute(caches, [look(engine.model.config, frames) for frames in features[:, None]])

    def take_back() -> None:
        for cache in caches:
            cache.crop(before - int(cache.get_seq_length()))

    return take_back


def in_turns(steps: dict[str, Callable[[], Callable[[], None]]], count: int, device: str) -> dict[str, list[float]]:
    """
    Seconds that each step took so many times, some in a row and all in turns: in a stream each follows its like, and
    finds what that has left in the processor's caches, so that the first of a turn does not count. What a step gives
    is called after it, untimed.
    """
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for done in range(0, count, IN_A_ROW):
        for name, step in steps.items():
            for index in range(1 + min(IN_A_ROW, count - done)):
                wait(device)
                begin = clock.perf_counter()
                take_back = step()
                wait(device)
                if index > 0:
                    taken[name].append(clock.perf_counter() - begin)
                take_back()
    return taken


def measure_clip(options: argparse.Namespace) -> list[Clip]:
    """The checkpoint watching a file in every way, in turn, the median of fifteen tries of each."""
    model, full = load(AS_SAVED, options), load("full", options)
    processor = AutoProcessor.from_pretrained(options.checkpoint, trust_remote_code=True)

    stored = {"cache_dtype": CACHE_DTYPES.get(options.cache)}

    def by_session() -> list[StreamEvent]:
        return list(model.narrate(processor, options.clip, PROMPT, fps=CLIP_FPS, **stored))

    def by_engine(engine: StreamingEngine) -> list[StreamEvent]:
        stream = engine.open(fps=CLIP_FPS)
        stream.ask(PROMPT, reply_now=False)
        frames = processor.read_video(options.clip, fps=CLIP_FPS)
        for waiting in read_ahead(frames, stream.session.chunk_frames, is_live=False):
            stream.push([frame for _, frame in waiting], time=[time for time, _ in waiting])
            engine.run()
        stream.close()
        engine.run()
        return stream.events

    spoken = [event for event in by_session() if event.role == "assistant"]
    frames = sum(1 for _ in processor.read_video(options.clip, fps=CLIP_FPS))

    def by_plain_loop() -> list[StreamEvent]:
        loop, prompt = PlainLoop(full, 0), processor.tokenizer(PROMPT)["input_ids"]
        loop.talk(len(prompt))
        for index, (_, frame) in enumerate(processor.read_video(options.clip, fps=CLIP_FPS)):
            pixel_values = processor.process_frames([frame]).to(options.device)
            with torch.no_grad():
                loop.watch(full.encode_frames(pixel_values)[None])
            for event in [event for event in spoken if event.frame == index]:
                loop.talk(3)  # what opens a reply
                for _ in event.token_ids:
                    loop.talk(1)
        return spoken

    ways: dict[str, Callable[[], list[StreamEvent]]] = {"session": by_session, PLAIN: by_plain_loop}
    for name, compiled in (("engine", False), ("engine, compiled", True)):
        if options.compile or not compiled:
            how = {"max_streams": 1, "max_frames": max(frames, 8), "compile_steps": compiled, **stored}
            engine = StreamingEngine(model, processor, **how)
            engine.warm_up()
            ways[name] = partial(by_engine, engine)
    for name, way in ways.items():
        # Once before it counts; the plain loop says what it is given.
        events = way()
        assert name == PLAIN or [e.text for e in events if e.role == "assistant"] == [e.text for e in spoken]
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(15):
        for name, way in ways.items():
            begin = clock.perf_counter()
            way()
            taken[name].append(clock.perf_counter() - begin)
    words = sum(len(event.token_ids) for event in spoken)
    # A machine that slows down for a while slows all ways of a round: they are compared within each.
    return [
        Clip(name, frames, words, median(seconds), median(map(truediv, taken[PLAIN], seconds)))
        for name, seconds in taken.items()
    ]


def make_engine(
    model: VideoLLMMoDForConditionalGeneration, streams: int, context: int, **how: Any
) -> tuple[StreamingEngine, list[VideoLLMMoDPagedCache]]:
    """An engine with room for these streams, and their caches, which remember frames of random numbers."""
    engine = StreamingEngine(model, None, max_streams=streams, max_frames=context + 8, max_text_tokens=64, **how)
    caches = [VideoLLMMoDPagedCache(engine.pool) for _ in range(streams)]
    for cache in caches:
        cache.reserve(context + 8, context + 64)
        remember(cache, model, context)
    return engine, caches


def remember(cache: Cache, model: VideoLLMMoDForConditionalGeneration, frames: int) -> None:
    """Fills a cache with what frames and their separators would leave in it, in random numbers."""
    config, text = model.config, model.config.text_config
    tokens, heads = config.frame_num_tokens, text.num_key_value_heads
    frame = torch.arange(frames, device=model.device)[:, None] * (tokens + 1)
    for layer, count in enumerate(config.layer_keep_counts):
        kept = min(count, tokens) + 1
        if hasattr(cache, "record_positions") and layer in config.routed_layers:
            cache.record_positions(layer, (frame + torch.arange(kept, device=model.device)).flatten()[None])
        entries = frames * (kept if hasattr(cache, "record_positions") else tokens + 1)
        shape = (1, heads, entries, text.head_dim)
        cache.update(*torch.randn(2, *shape, device=model.device, dtype=model.dtype), layer)
    if hasattr(cache, "advance"):
        cache.advance(frames * (tokens + 1))


def look(config: VideoLLMMoDConfig, features: torch.Tensor) -> StreamStep:
    """A step that sees frames, of features (frames, tokens, vision hidden)."""
    frame = [config.frame_token_interval_id] + [config.frame_token_id] * config.frame_num_tokens
    ends = [len(frame) * (index + 1) - 1 for index in range(len(features))]
    return StreamStep(frame * len(features), ends, features)


@dataclass
class Measured:
    """
    What was measured of one way at one context.

    Args:
        tokens (`int`): Tokens a frame.
        seconds (`dict[str, list[float]]`): Of each kind of step, in the order in which all ways took them.
        cache_bytes (`int`): Bytes of the cache.
        peak_gb (`float`, *optional*): See [`Row`].
        floor (`float`): Seconds of a frame step at those rates.
        is_beside_others (`bool`): Whether other ways took turns with it.
    """

    tokens: int
    seconds: dict[str, list[float]]
    cache_bytes: int
    peak_gb: float | None
    floor: float
    is_beside_others: bool


def measure_context(
    ways: "dict[str, Callable[[int], Watcher]]", context: int, rates: tuple[float, float], options: argparse.Namespace
) -> dict[str, Measured]:
    """All ways in turns, each brought to the context first; without those that have no memory beside the others."""
    device, some = options.device, max(options.steps // 2, 3)
    counts = {"frame": options.steps, "together": max(options.steps // 4, 3), "encoded": some, "speak": some}
    counts["word"] = some
    ways, found = dict(ways), dict[str, Measured]()
    for _ in range(options.tries):
        free(device)
        at_first = held_gb(device)
        watchers: dict[str, Watcher] = {}
        steps: dict[str, dict[str, Callable[[], Callable[[], None]]]] = {}
        peaks: dict[str, float | None] = {}
        for name, way in list(ways.items()):
            others = held_gb(device) - at_first
            reset_peak(device)
            try:
                watchers[name] = way(context)
                steps[name] = watchers[name].steps(options.dtype)
                for kind in counts:
                    steps[name][kind]()()
            except torch.OutOfMemoryError:
                for of in (ways, found, watchers, steps):
                    of.pop(name, None)
            if name in ways:
                peak = peak_gb(device)
                peaks[name] = None if peak is None else peak - others
            else:
                free(device)
        gc.collect()  # as `warm_up` of an engine does
        taken = {
            kind: in_turns({name: kinds[kind] for name, kinds in steps.items()}, count, device)
            for kind, count in counts.items()
        }
        for name, watcher in watchers.items():
            seconds = {kind: taken[kind][name] for kind in counts}
            if name in found:
                seconds = {kind: found[name].seconds[kind] + new for kind, new in seconds.items()}
                peaks[name] = None if peaks[name] is None else min(peaks[name], found[name].peak_gb)
            least = floor(watcher, context, rates)
            tokens, size = watcher.config.frame_num_tokens, watcher.cache_bytes()
            found[name] = Measured(tokens, seconds, size, peaks[name], least, len(watchers) > 1)
    return found


def floor(watcher: "Watcher", context: int, rates: tuple[float, float]) -> float:
    """Seconds of a frame step if bytes are read as fast as they are copied, or operations all that takes time."""
    model = watcher.model
    cost = model.estimate_cost(1, 1, past_frames=context, past_text_tokens=context)
    read = [*model.model.language_model.layers.parameters(), model.lm_head.weight]
    return max((sum(map(stored_bytes, read)) + watcher.cache_bytes()) / rates[0], cost.flops / rates[1])


def stored_bytes(weight: torch.Tensor) -> int:
    """Bytes of a weight as it lies in memory, those of its scales among them where it is in eight bits."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    return sum(getattr(weight, name).nbytes for name in weight.__tensor_flatten__()[0])


class Watcher:
    """A way of watching with so many frames remembered: what is to be timed, and the way back."""

    def __init__(self, model: VideoLLMMoDForConditionalGeneration, cache: Cache) -> None:
        self.model, self.config, self.cache = model, model.config, cache
        self.before = self.length()

    @torch.no_grad()
    def watch(self, features: torch.Tensor) -> None:
        """A step over frame features (1, frames, tokens, vision hidden), to the decision."""
        raise NotImplementedError

    @torch.no_grad()
    def talk(self, count: int) -> None:
        """A step over tokens of text, to the choice of the next."""
        raise NotImplementedError

    def steps(self, dtype: torch.dtype) -> dict[str, Callable[[], Callable[[], None]]]:
        """What is to be timed, by its kind; each gives the way back."""
        device, size = self.model.device, (self.config.frame_num_tokens, self.config.vision_config.hidden_size)
        features = torch.randn(1, TOGETHER, *size, device=device, dtype=dtype)
        pixels = torch.randn(1, 1, 3, *_size(self.config), device=device, dtype=dtype)

        def encoded() -> None:
            with torch.no_grad():
                frame = self.model.encode_frames(pixels)
            self.watch(frame)

        def speak() -> None:
            self.watch(features[:, :1])
            self.talk(3)  # "]", "Assistant", ":"

        kinds: dict[str, Callable[[], None]] = {
            "frame": lambda: self.watch(features[:, :1]),
            "together": lambda: self.watch(features),
            "encoded": encoded,
            "speak": speak,
            "word": lambda: self.talk(1),
        }
        return {kind: partial(self._do, step) for kind, step in kinds.items()}

    def _do(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return self.take_back

    def take_back(self) -> None:
        """Forgets what was done since."""
        if self.length() > self.before:
            self.cache.crop(self.before - self.length())

    def length(self) -> int:
        """Tokens seen."""
        return int(self.cache.get_seq_length())

    def cache_bytes(self) -> int:
        """Bytes of the cache."""
        raise NotImplementedError


class Engine(Watcher):
    """The steps of a stream of a [`StreamingEngine`]."""

    def __init__(self, model: VideoLLMMoDForConditionalGeneration, context: int, **how: Any) -> None:
        self.engine, caches = make_engine(model, 1, context, **how)
        super().__init__(model, caches[0])

    def watch(self, features: torch.Tensor) -> None:
        """See [`Watcher`]."""
        self.engine.execute([self.cache], [look(self.config, features[0])])

    def talk(self, count: int) -> None:
        """See [`Watcher`]."""
        self.engine.execute([self.cache], [StreamStep([7] * count, [count - 1])])

    def cache_bytes(self) -> int:
        """See [`Watcher`]; without what is only reserved."""
        entries = [keys[0, 0].nbytes + values[0, 0].nbytes for keys, values, _ in self.engine.pool.layers]
        return sum(length * size for length, size in zip(self.cache.lengths, entries, strict=True))


class PlainLoop(Watcher):
    """The language model by itself, with Transformers' own cache."""

    def __init__(self, model: VideoLLMMoDForConditionalGeneration, context: int) -> None:
        cache = DynamicCache()
        remember(cache, model, context)
        super().__init__(model, cache)

    @torch.no_grad()
    def watch(self, features: torch.Tensor) -> None:
        """See [`Watcher`]. Frames that wait are watched one after another."""
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
        return sum(x.numel() * x.element_size() for layer in self.cache.layers for x in (layer.keys, layer.values))


def build_all(tokens: int, options: argparse.Namespace) -> dict[str, VideoLLMMoDForConditionalGeneration]:
    """A random model of each scheme; all but their routers are the same modules."""
    side = math.isqrt(tokens - 1)
    if side < 1 or 1 + side**2 != tokens:
        raise SystemExit(f"error: --tokens {tokens}: a frame has 1 + n x n tokens, such as 10 or 50")
    text = AutoConfig.for_model(
        "llama", **{"vocab_size": 1024, "max_position_embeddings": 2**20, **SHAPES[options.shape]}
    )
    vision = dict(SMALL_ENCODER)
    if options.encoder:
        # Without one a configuration has SigLIP-L/16-384's shape.
        vision = None if options.encoder == SIGLIP_L else AutoConfig.from_pretrained(options.encoder)
    models: dict[str, VideoLLMMoDForConditionalGeneration] = {}
    for scheme in options.schemes:
        config = VideoLLMMoDConfig(
            text_config=text,
            vision_config=vision,
            frame_token_pooled=(side, side),
            frame_token_id=text.vocab_size,
            **SCHEMES[scheme],
        )
        torch.manual_seed(0)
        # A second set of weights may have no room: others than the first are made without.
        with torch.device("meta" if models else options.device):
            model = VideoLLMMoDForConditionalGeneration._from_config(config, dtype=options.dtype)
        model.model.routers.to_empty(device=options.device)
        for router in model.model.routers.values():
            torch.nn.init.normal_(router.weight, std=text.initializer_range)
        models[scheme] = model.eval()
    quantize(next(iter(models.values())), options.weights)
    return share(models)


def load_all(options: argparse.Namespace) -> dict[str, VideoLLMMoDForConditionalGeneration]:
    """A checkpoint as it is, and with every ratio 1."""
    return share({scheme: load(scheme, options) for scheme in (AS_SAVED, "full")})


def load(scheme: str, options: argparse.Namespace) -> VideoLLMMoDForConditionalGeneration:
    """A checkpoint, as it is or with every ratio 1."""
    ratio = {} if scheme == AS_SAVED else {"mod_keep_ratio": 1.0}
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(options.checkpoint, dtype=options.dtype, **ratio)
    quantize(model.to(options.device), options.weights)
    return model.eval()


def share(
    models: dict[str, VideoLLMMoDForConditionalGeneration],
) -> dict[str, VideoLLMMoDForConditionalGeneration]:
    """The models with the modules of the first, which then are in memory once, and their own routers."""
    first, *others = models.values()
    for model in others:
        model.lm_head = first.lm_head
        for part in ("vision_encoder", "connector", "language_model"):
            setattr(model.model, part, getattr(first.model, part))
    return models


def quantize(model: VideoLLMMoDForConditionalGeneration, weights: str | None) -> None:
    """Brings linear layers to eight bits where they are, as loading a checkpoint so does."""
    if weights is not None:
        from torchao.quantization import quantize_

        for part in (model.model.vision_encoder, model.model.connector, model.model.language_model):
            quantize_(part, quantization(weights)["quantization_config"].quant_type)


def machine_rates(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of a copy, read and written, and operations a second of a matrix product, the best of ten."""
    side, length = (8192, 2**30) if device == "cuda" else (2048, 2**27)
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    one = torch.randn(side, side, dtype=dtype, device=device)

    def best(step: Callable[[], Any]) -> float:
        taken = []
        for _ in range(10):
            wait(device)
            begin = clock.perf_counter()
            step()
            wait(device)
            taken.append(clock.perf_counter() - begin)
        return min(taken)

    return 2 * length / best(lambda: target.copy_(source)), 2 * side**3 / best(lambda: one @ one)


def describe(rates: tuple[float, float], options: argparse.Namespace) -> str:
    """What the figures were taken on."""
    return (
        f"{options.checkpoint or options.shape}, {str(options.dtype).removeprefix('torch.')}, "
        f"{'its own' if options.checkpoint else 'random'} weights"
        f"{f' in {options.weights}' if options.weights else ''}, "
        f"{f'keys and values in {options.cache}, ' if options.cache else ''}"
        f"{device_name(options.device)}, torch {torch.__version__}. Copies: {rates[0] / 1e9:.3g} GB/s, matrix "
        f"products: {rates[1] / 1e12:.3g} TFLOP/s. Vision encoder: "
        f"{'its own' if options.checkpoint else options.encoder or 'a small one'}. Attention: "
        f"{' and '.join(attention_in_use(torch.empty(0, device=options.device).device))}."
    )


def table(rows: list[Row]) -> str:
    """The figures as Markdown."""
    head = ["tokens a frame", "frames remembered", "", "p50, ms", "p99, ms", "p50 / floor", "times the plain loop"]
    head += [f"ms a frame, {TOGETHER} together", "times the plain loop", "frames/s", "frames/s with encoding"]
    head += ["first word, ms", "tokens/s", "cache, MB", "peak, GB"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row.tokens, row.context, row.scheme, f"{row.p50:.2f}", f"{row.p99:.2f}", f"{row.p50 / row.floor:.1f}"]
        cells += [
            _ratio(row.times_plain),
            f"{row.together:.2f}",
            _ratio(row.together_times_plain),
            _rate(1e3 / row.p50),
            _rate(row.encoded),
            f"{row.first_word:.1f}",
            _rate(row.tokens_per_second),
        ]
        cells += [f"{row.cache_mb:.1f}", "-" if row.peak_gb is None else f"{row.peak_gb:.2f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def table_of_streams(rounds: list[Round]) -> str:
    """The figures of many streams as Markdown."""
    head = [
        "tokens a frame",
        "streams",
        "",
        "p50, ms",
        "p99, ms",
        "frames/s, all together",
        "deadlines missed at 2 fps",
    ]
    lines = [[*head, "caches, MB"], ["---"] * (len(head) + 1)]
    for row in rounds:
        cells = [row.tokens, row.streams, row.scheme, f"{row.p50:.1f}", f"{row.p99:.1f}"]
        lines.append([*cells, _rate(row.frames_per_second), row.missed, f"{row.cache_mb:.1f}"])
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in lines)


def table_of_clips(clips: list[Clip]) -> str:
    """The figures of a video file as Markdown."""
    lines = [["", "seconds", "frames/s", "times its 2 fps", "times the plain loop"], ["---"] * 5]
    for row in clips:
        rate = row.frames / row.seconds
        lines.append([row.way, f"{row.seconds:.3f}", f"{rate:.0f}", f"{rate / CLIP_FPS:.0f}"])
        lines[-1].append(f"{row.times_plain:.2f}")
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def draw_streams(rounds: list[Round], path: Path) -> None:
    """Streams against frames a second, a panel for each number of tokens a frame."""
    points = [(row.tokens, row.scheme, row.streams, row.frames_per_second) for row in rounds]
    _draw(points, path, "streams", "frames/s, all together")


def draw(rows: list[Row], path: Path) -> None:
    """Latency against context, a panel for each number of tokens a frame."""
    _draw([(row.tokens, row.scheme, row.context, row.p50) for row in rows], path, "frames remembered", "ms a frame")


def _draw(points: list[tuple[int, str, int, float]], path: Path, x: str, y: str) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tokens = sorted({count for count, *_ in points})
    figure = Figure(figsize=(4.2 * len(tokens), 3.4), dpi=130)
    for axes, count in zip(figure.subplots(1, len(tokens), squeeze=False)[0], tokens, strict=True):
        for name in dict.fromkeys(scheme for _, scheme, *_ in points):
            line = [(at, value) for of, scheme, at, value in points if of == count and scheme == name]
            axes.plot(*zip(*line, strict=True), marker="o", label=name) if line else None
        axes.set(title=f"{count} tokens a frame", xlabel=x, ylabel=y, ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def _size(config: VideoLLMMoDConfig) -> tuple[int, int]:
    size = config.vision_config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def held_gb(device: str) -> float:
    """Gigabytes held now: of a GPU by tensors, on Linux by this process."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e9
    if not _CLEAR.exists():
        return 0.0
    # What was freed, and what glibc has not given back, nobody holds.
    getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)(0)
    return _of_this_process("VmRSS:")


def reset_peak(device: str) -> None:
    """Forgets what was held at most so far, where that can be."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif _CLEAR.exists():
        _CLEAR.write_text("5", encoding="ascii")


def peak_gb(device: str) -> float | None:
    """Gigabytes held at most since: of a GPU by tensors, on Linux by this process with all of its libraries."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return _of_this_process("VmHWM:") if _CLEAR.exists() else None


def _of_this_process(name: str) -> float:
    lines = (_CLEAR.parent / "status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) / 1e9 for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
