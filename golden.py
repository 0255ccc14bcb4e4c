# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Record what a checkpoint computes in its file `golden.json`, and check on another machine that it still does.

The record is about one short stream: frames from a seed, two things that the user says, and a greedy reply. It has
token ids, the tokens that routed layers keep, the highest log-probabilities at each decision, hashes of weights, and
the settings that decide when the model speaks and what it remembers.
"""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers.utils import cached_file

from videollm_mod.compiled_step_videollm_mod import speakable
from videollm_mod.outputs import write_text
from videollm_mod.remembering_videollm_mod import checkpoint_limits
from videollm_mod.space.checkpoint_faults import load_config, named_faults
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.space.loading import load_checkpoint


FILE = "golden.json"
# Files of weights that are hashed. An adapter in another folder shows only in the outputs.
WEIGHTS = "*model*.safetensors"
_FORMAT = 1
_QUERY, _QUESTION = "Please narrate the video in real time.", "What do you see?"
_NUM_FRAMES, _FPS, _MAX_TOKENS = 6, 2.0, 12
# Side of a frame in squares of one colour, and number of log-probabilities that are recorded for a decision.
_SQUARES, _TOP = 8, 5


class Tolerance(NamedTuple):
    """How far a model of one dtype may be from its record on another machine."""

    logits: float  # difference of a log-probability, in standard deviations of the logits
    silence: float  # difference of a probability of silence
    kept: float  # share of routing decisions, one for each token and routed layer, that differ


TOLERANCES = {
    "float32": Tolerance(0.01, 0.01, 0.01),
    "float16": Tolerance(0.1, 0.1, 0.05),
    "bfloat16": Tolerance(0.5, 0.25, 0.2),
}


@dataclass(frozen=True)
class Verdict:
    """
    The result of a check.

    Attributes:
        difference (`str`, *optional*): The first difference beyond the tolerance. `None` if the model is equal.
        logits (`float`): Largest difference of a log-probability, in standard deviations of the logits.
        kept (`float`): Share of routing decisions that differ.
        tolerance ([`Tolerance`]): What was allowed.
        made_with, here (`dict[str, str]`): Versions of libraries and the dtype, of the record and of this check.
    """

    difference: str | None
    logits: float
    kept: float
    tolerance: Tolerance
    made_with: dict[str, str]
    here: dict[str, str]


@dataclass
class _Seen:
    """The tokens and outputs of one pass through the stream."""

    ids: list[int]
    positions: list[int]  # of the tokens to decide after: the last one of each frame, then those before reply tokens
    logits: torch.Tensor  # (positions, vocabulary), float32
    kept: dict[int, torch.Tensor]  # by routed layer, True where a token was kept, (frames, tokens)


class _NotEqualError(Exception):
    """The first difference."""


# ---------------------------------------------------------------------------------------------- recording and checking


def make_golden(folder: str | Path, weights: Iterable[Path] | None = None) -> dict[str, Any]:
    """
    Load a checkpoint and return its record.

    Args:
        folder (`str` or `Path`): The folder of the checkpoint. Its code is run.
        weights (`Iterable[Path]`, *optional*): Files of its weights. Defaults to those in the folder.

    Raises:
        `ValueError`: If it cannot be loaded.
    """
    processor, model = _load(str(folder), None)
    size = processor.video_processor.size
    about = {"seed": 0, "count": _NUM_FRAMES, "height": size["height"], "width": size["width"], "fps": _FPS}
    record: dict[str, Any] = {"format": _FORMAT, "made_with": _here(model)}
    record |= {"frames": about, "query": _QUERY, "question": _QUESTION, "settings": _settings(model)}
    seen, tokens = _stream(model, processor, record, None)
    record |= {
        "num_tokens": seen.logits.shape[-1],
        "vocabulary": _hash_vocabulary(processor.tokenizer),
        "prompt": _encode(processor, record),
        "ids": _text_ids(model, seen),
        "positions": seen.positions,
        "tokens": tokens,
        "silence": [round(float(silence), 6) for silence in _silence(model, seen)],
        "decisions": [_digest(row) for row in speakable(model, seen.logits)],
        "kept": {str(layer): [_to_hex(row) for row in rows] for layer, rows in seen.kept.items()},
        "weights": hash_weights(_weight_files(Path(folder)) if weights is None else weights),
    }
    return record


def write_golden(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON, with a line for each of its fields."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def read_golden(name: str, revision: str | None = None) -> tuple[dict[str, Any], Path]:
    """
    Return the record of a checkpoint and its file.

    Raises:
        `ValueError`: If the checkpoint has no record, or one of another version of this package.
        `OSError`: If there is no such checkpoint.
    """
    is_folder = Path(name).is_dir()
    found = cached_file(name, FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    if found is None:
        way = f"`videollm-mod verify {name} --write` records" if is_folder else "Publishing it again records"
        raise ValueError(f"'{name}' has no {FILE}, which tells what it should compute. {way} what it computes now.")
    try:
        record = json.loads(Path(found).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{FILE} of '{name}' is not complete JSON: {error}. Copy or download it again.") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise ValueError(f"{FILE} of '{name}' has another format than {_FORMAT}: use the version that wrote it.")
    return record, Path(found)


def verify_checkpoint(name: str, revision: str | None = None) -> Verdict:
    """
    Load a checkpoint and compare what it computes with its record: in a session, and in one forward pass.

    Args:
        name (`str`): A folder or a Hub id. Its code is run.
        revision (`str`, *optional*): Branch, tag or commit of a Hub checkpoint.

    Raises:
        `ValueError`: If it has no record or cannot be loaded.
        `OSError`: If there is no such checkpoint.
    """
    name = check_checkpoint(name)
    record, path = read_golden(name, revision)
    processor, model = _load(name, revision)
    here, made_with = _here(model), record["made_with"]
    tolerance = max(TOLERANCES.get(dtype, TOLERANCES["float32"]) for dtype in (here["dtype"], made_with["dtype"]))
    comparison = _Comparison(model, processor, record, tolerance)
    difference = None
    try:
        comparison.compare_vocabulary()
        comparison.compare_settings()
        if here["dtype"] == made_with["dtype"]:
            _compare_weights(hash_weights(_weight_files(path.parent)), record["weights"])
        seen, tokens = _stream(model, processor, record, record["tokens"])
        comparison.compare("a session", seen)
        comparison.compare("one forward pass", _forward(model, processor, record, seen))
    except _NotEqualError as error:
        difference = str(error)
    return Verdict(difference, comparison.logits, comparison.kept, tolerance, made_with, here)


def hash_weights(files: Iterable[Path]) -> dict[str, str]:
    """Return a hash of each tensor by name. It does not matter how the tensors are split into safetensors files."""
    from safetensors import safe_open

    hashes: dict[str, str] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                hashes[name] = digest.hexdigest()[:16]
    return dict(sorted(hashes.items()))


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob(WEIGHTS))


def _load(name: str, revision: str | None) -> tuple[Any, Any]:
    load_config(name, revision)
    with named_faults(name):
        return load_checkpoint(name, revision=revision)


def _settings(model: Any) -> dict[str, Any]:
    """Return when a checkpoint speaks without being asked, and what its sessions remember."""
    config = model.config
    speaking = {"speak": config.speak, "interval_threshold": config.interval_threshold}
    return speaking | checkpoint_limits(model.generation_config)


def _here(model: Any) -> dict[str, str]:
    return {
        "videollm_mod": importlib.metadata.version("videollm-mod"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


# ------------------------------------------------------------------------------------------------------------ a stream


def make_frames(*, seed: int, count: int, height: int, width: int, **_: Any) -> np.ndarray:
    """
    Return frames (count, height, width, 3), uint8, of coloured squares. A quarter of them changes from frame to frame.

    The bytes come from SHAKE-256, so they are the same on every machine and in every version of a library.
    """
    cells, frames = np.zeros((_SQUARES, _SQUARES, 3), np.uint8), []
    rows, columns = (np.arange(side) * _SQUARES // side for side in (height, width))
    for index in range(count):
        data = hashlib.shake_256(f"{seed} {index}".encode()).digest(_SQUARES * _SQUARES * 4)
        drawn = np.frombuffer(data, np.uint8).reshape(_SQUARES, _SQUARES, 4)
        changes = (drawn[..., 3] < 64) | (index == 0)
        cells = np.where(changes[..., None], drawn[..., :3], cells)
        frames.append(cells[rows][:, columns])
    return np.stack(frames)


class _Force:
    """A logits processor that makes a session say these tokens."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def __call__(self, said: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[said.shape[1]]] = 0
        return forced


def _stream(model: Any, processor: Any, record: dict[str, Any], reply: list[int] | None) -> tuple[_Seen, list[int]]:
    """Run the stream in a session, with this reply or a greedy one. Return what was seen and the reply."""
    about, steps, kept = record["frames"], [], []
    with _watched(model, steps):
        session = model.stream(
            processor,
            fps=about["fps"],
            speak=lambda _: False,
            max_new_tokens=_MAX_TOKENS if reply is None else len(reply),
            logits_processor=None if reply is None else _Force(reply),
            output_router_scores=True,
        )
        session.ask(record["query"], reply_now=False)
        for frame in make_frames(**about):
            session.push(frame)
            kept.append(session.kept_tokens)
        session.ask(record["question"])
    ids, positions = [], []
    for step_ids, ends, _ in steps:
        positions += [len(ids) + end for end in ends]
        ids += step_ids
    logits = torch.cat([logits for *_, logits in steps])
    rows = {layer: torch.stack([frame[layer] for frame in kept]).cpu() for layer in model.config.routed_layers}
    # The tokens that were said, with the end of the reply if it came.
    tokens = [int(token) for token in speakable(model, logits[about["count"] :]).argmax(dim=-1)]
    return _Seen(ids, positions, logits, rows), tokens


@contextmanager
def _watched(model: Any, steps: list[Any]) -> Iterator[None]:
    """Record the ids, the decisions and the logits of the steps that a session runs on the model meanwhile."""

    def write_down(_: Any, __: Any, given: dict[str, Any], outputs: Any) -> None:
        steps.append(
            (given["input_ids"][0].tolist(), given["logits_to_keep"].tolist(), outputs.logits[0].float().cpu())
        )

    hook = model.register_forward_hook(write_down, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _forward(model: Any, processor: Any, record: dict[str, Any], seen: _Seen) -> _Seen:
    """Run the same tokens in one forward pass."""
    device = model.get_input_embeddings().weight.device
    frames = processor.resize_frames(make_frames(**record["frames"]), model.device)
    outputs = model(
        input_ids=torch.tensor([seen.ids], device=device),
        frame_features=model.encode_frames(processor.normalize_frames(frames))[None],
        logits_to_keep=torch.tensor(seen.positions, device=device),
        output_router_scores=True,
        use_cache=False,
    )
    kept = dict(zip(model.config.routed_layers, (rows[0].cpu() for rows in outputs.kept_tokens or ()), strict=True))
    return _Seen(seen.ids, seen.positions, outputs.logits[0].float().cpu(), kept)


def _hash_vocabulary(tokenizer: Any) -> str:
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def _encode(processor: Any, record: dict[str, Any]) -> list[int]:
    """Return the token ids of all texts as one beginning of a stream."""
    texts = {"system": processor.system_prompt, "user": f"{record['query']} {record['question']}"}
    turns = [{"role": role, "content": text} for role, text in texts.items()]
    return processor.encode_turns(turns, stream_open=False, then="stream")


def _text_ids(model: Any, seen: _Seen) -> list[int]:
    return [token for token in seen.ids if token != model.config.frame_token_id]


def _silence(model: Any, seen: _Seen) -> list[float]:
    """Return the probability of silence at each frame."""
    return model.should_speak(seen.logits[:_NUM_FRAMES])[1].tolist()


def _digest(scores: torch.Tensor) -> dict[str, Any]:
    """Return the most likely tokens, their log-probabilities, and the standard deviation of the logits."""
    values, tokens = scores.log_softmax(dim=-1).topk(min(_TOP, len(scores)))
    spread = scores[scores.isfinite()].std()
    rounded = [round(float(value), 5) for value in values]
    return {"tokens": tokens.tolist(), "log_probs": rounded, "spread": round(float(spread), 5)}


def _to_hex(kept: torch.Tensor) -> str:
    return f"{int(''.join('1' if is_kept else '0' for is_kept in kept.tolist()), 2):x}"


# ---------------------------------------------------------------------------------------------------------- comparison


class _Comparison:
    """Compares what a model does with a record, and keeps the largest differences."""

    def __init__(self, model: Any, processor: Any, record: dict[str, Any], tolerance: Tolerance) -> None:
        self.model, self.processor, self.record, self.tolerance = model, processor, record, tolerance
        self.logits = self.kept = 0.0

    def compare_vocabulary(self) -> None:
        """Compare tokens before any of them reaches the model, which may not know them."""
        _demand("number of tokens", self.model.get_output_embeddings().out_features, self.record["num_tokens"])
        if _hash_vocabulary(self.processor.tokenizer) != self.record["vocabulary"]:
            raise _NotEqualError("the tokenizer has another vocabulary")
        self._compare_ids(_encode(self.processor, self.record), self.record["prompt"])

    def compare_settings(self) -> None:
        """Compare what the stream does not show: when the model speaks by itself, and what it remembers."""
        found = _settings(self.model)
        expected = self.record.get("settings", found)  # the first records did not have them
        for name in sorted({*found, *expected}):
            _demand(name, found.get(name), expected.get(name))

    def compare(self, way: str, seen: _Seen) -> None:
        """Raise `_NotEqualError` at the first difference beyond the tolerance."""
        self._compare_ids(_text_ids(self.model, seen), self.record["ids"])
        _demand("places of decisions", seen.positions, self.record["positions"])
        self._compare_kept(way, seen.kept)
        pairs = zip(_silence(self.model, seen), self.record["silence"], strict=True)
        for frame, (silence, expected) in enumerate(pairs, start=1):
            if not abs(silence - expected) <= self.tolerance.silence:
                raise _NotEqualError(
                    f"in {way}, the probability of silence at frame {frame} is {silence:.4f} and was {expected:.4f}"
                )
        for index, scores in enumerate(speakable(self.model, seen.logits)):
            self._compare_decision(way, index, scores.log_softmax(dim=-1))

    def _compare_ids(self, ids: list[int], expected: list[int]) -> None:
        if ids == expected:
            return
        place = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b), len(ids))
        found = [tokens[place] if place < len(tokens) else "nothing" for tokens in (ids, expected)]
        where = f"number {place + 1} is {found[0]} and was {found[1]}"
        raise _NotEqualError(f"the tokenizer or the chat template gives other tokens: {where}")

    def _compare_kept(self, way: str, kept: dict[int, torch.Tensor]) -> None:
        _demand("routed layers", [str(layer) for layer in kept], list(self.record["kept"]))
        total, differing = sum(rows.numel() for rows in kept.values()), {}
        for layer, rows in kept.items():
            hexes = zip(map(_to_hex, rows), self.record["kept"][str(layer)], strict=True)
            pairs = [(int(one, 16), int(other, 16)) for one, other in hexes]
            for count, expected in ((one.bit_count(), other.bit_count()) for one, other in pairs):
                # The configuration says how many, so rounding does not matter.
                if count != expected:
                    tokens = f"layer {layer} keeps {count} of a frame and kept {expected}"
                    raise _NotEqualError(f"in {way}, routed layers keep other tokens: {tokens}")
            differing[layer] = sum((one ^ other).bit_count() for one, other in pairs)
        share = sum(differing.values()) / max(total, 1)
        self.kept = max(self.kept, share)
        if share > self.tolerance.kept:
            layer = max(differing, key=differing.get)
            raise _NotEqualError(
                f"in {way}, routed layers keep other tokens: {share:.1%} of decisions differ, most in layer {layer}"
            )

    def _compare_decision(self, way: str, index: int, log_probs: torch.Tensor) -> None:
        expected = self.record["decisions"][index]
        errors = (log_probs[expected["tokens"]] - torch.tensor(expected["log_probs"])).abs() / expected["spread"]
        error = float(errors.max())
        self.logits = max(self.logits, error)
        said = index - self.record["frames"]["count"]
        where = f"at frame {index + 1}" if said < 0 else f"at token {said + 1} of the reply"
        if not error <= self.tolerance.logits:
            raise _NotEqualError(
                f"in {way}, a log-probability {where} differs by {error:.3g} standard deviations of the logits"
            )
        # Near a tie, another machine may prefer the other token.
        token, best = self.record["tokens"][said] if said >= 0 else None, int(log_probs.argmax())
        if token is not None and not log_probs[best] - log_probs[token] <= self.tolerance.logits * expected["spread"]:
            decode = self.processor.tokenizer.decode
            raise _NotEqualError(f"in {way}, the model says {decode([best])!r} {where} and said {decode([token])!r}")


def _compare_weights(hashes: dict[str, str], expected: dict[str, str]) -> None:
    changed = [name for name in sorted({*hashes, *expected}) if hashes.get(name) != expected.get(name)]
    if changed:
        kind = "missing" if changed[0] not in hashes else "new" if changed[0] not in expected else "another"
        raise _NotEqualError(f"{len(changed)} of {len(expected)} weights differ; {changed[0]} is {kind}")


def _demand(what: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise _NotEqualError(f"{what}: {found}, and it was {expected}")


__all__ = [
    "FILE",
    "TOLERANCES",
    "WEIGHTS",
    "Tolerance",
    "Verdict",
    "hash_weights",
    "make_frames",
    "make_golden",
    "read_golden",
    "verify_checkpoint",
    "write_golden",
]
