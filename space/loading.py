# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Load a checkpoint for streaming, and recognise the videos of generated worlds."""

import logging
import reprlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoProcessor


logger = logging.getLogger(__name__)


# Parameters below which one CPU thread is faster than several.
SMALL = 20_000_000

# Names of eight-bit types, as options spell them.
CACHE_DTYPES = {"fp8": torch.float8_e4m3fn}
WEIGHTS = ("int8", "fp8")
# More tokens are no frame of a model, but a wrong number in a file.
MOST_FRAME_TOKENS = 100_000

# The generated worlds. The embedded checkpoint knows them and nothing else.
WORLDS = ("StreamWorld", "DoomWorld")


def seen_area(video_processor: Any, height: int, width: int) -> tuple[float, float, float, float]:
    """
    Return what the encoder sees of a picture as left, top, width and height, in pixels of the picture.

    With `fit="pad"` it is larger than the picture, and with `"crop"` smaller.
    """
    # A published checkpoint may have code that is older than `fit`.
    fit = getattr(video_processor, "fit", "pad")
    if fit == "stretch":
        return 0.0, 0.0, float(width), float(height)
    size = video_processor.size
    scale = (max if fit == "crop" else min)(size["height"] / height, size["width"] / width)
    across, down = size["width"] / scale, size["height"] / scale
    return (width - across) / 2, (height - down) / 2, across, down


def quantization(weights: str | None) -> dict[str, Any]:
    """
    Return options of `AutoModel.from_pretrained` that load linear layers in eight bits, with one scale per row.

    Routers, embeddings and the head keep their type.

    Args:
        weights (`str`, *optional*): `"int8"` or `"fp8"`. Without it, there are no options.

    Raises:
        `ValueError`: If `weights` is another word, or if torchao is not installed.
    """
    if weights is None:
        return {}
    if weights not in WEIGHTS:
        raise ValueError(f"Weights can be {' or '.join(WEIGHTS)}, not {weights!r}.")
    # torchao is optional and slow to import.
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig
    except ImportError:
        raise ValueError("Weights in eight bits need torchao: `pip install torchao`.") from None
    made = Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig()
    return {"quantization_config": TorchAoConfig(made)}


def load_checkpoint(
    name: str, *, weights: str | None = None, revision: str | None = None, **options: Any
) -> tuple[Any, Any]:
    """
    Load a processor and its model as [`load_parts`] does, with the model where it runs, as [`load_model`] puts it.

    Args:
        name (`str`): A folder or a Hub id. Its code is run.
        weights (`str`, *optional*): See [`quantization`].
        options: See [`load_model`].
        revision (`str`, *optional*): Branch, tag or commit of a Hub checkpoint.

    Raises:
        `OSError`: If there is no such checkpoint.
        `ValueError`: As for [`load_parts`] and [`quantization`].
    """
    processor, model = load_parts(name, revision=revision, **quantization(weights), **options)
    return processor, _placed(model)


def load_parts(name: str, *, revision: str | None = None, **options: Any) -> tuple[Any, Any]:
    """
    Load a processor and its model in evaluation mode, and check that they are complete and belong together.

    Args:
        name (`str`): A folder or a Hub id. Its code is run.
        revision (`str`, *optional*): Branch, tag or commit of a Hub checkpoint.
        options: Options of `AutoModel.from_pretrained`, or fields of the configuration.

    Raises:
        `OSError`: If there is no such checkpoint.
        `ValueError`: If the processor cannot prepare text or a frame, if processor and model are of different
            checkpoints, or if weights are missing, have other shapes or are not finite.
    """
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True, revision=revision)
    # What does not fit together is found before a video is watched, and before a text has so many tokens of a frame.
    count = getattr(processor, "frame_num_tokens", None)  # without `auto_map` it is a tokenizer
    if not isinstance(count, int) or not 1 <= count <= MOST_FRAME_TOKENS:
        most = f"a whole number from 1 to {MOST_FRAME_TOKENS:,}"
        raise ValueError(f"processor_config.json: `frame_num_tokens` must be {most}, got {reprlib.repr(count)}.")
    if processor.end_of_reply_id is None:
        raise ValueError(f"tokenizer_config.json: `eos_token` is no token: {processor.tokenizer.eos_token!r}.")
    with _naming("chat_template.jinja, with the tokenizer and the processor"):
        turns = [{"role": role, "content": "What?"} for role in ("system", "user", "assistant")]
        written = processor.encode_turns(turns, stream_open=False, then="stream")
        reply = processor.encode_turns([], stream_open=True, then="assistant")
        if not reply:
            raise ValueError("no text begins a reply.")
    with _naming("processor_config.json"):
        processor.process_frames(torch.zeros(1, 64, 64, 3, dtype=torch.uint8))
    model = _load(name, revision=revision, **options)
    for field in ("frame_num_tokens", "frame_token_id", "frame_token_interval_id"):
        theirs, its = getattr(processor, field), getattr(model.config, field)
        if theirs != its:
            raise ValueError(
                f"the processor and the model are of different checkpoints: `{field}` is {theirs} by "
                f"processor_config.json and the tokenizer, and {its} by config.json."
            )
    size, most = model.config.text_config.vocab_size, max(written + reply)
    if most >= size:
        raise ValueError(
            f"chat_template.jinja and tokenizer.json make token {most}, and by config.json the model knows {size}."
        )
    ends = model.generation_config.eos_token_id
    if not all(end is None or isinstance(end, int) for end in (ends if isinstance(ends, list) else [ends])):
        raise ValueError(f"generation_config.json: `eos_token_id` must be a number or several, got {ends!r}.")
    return processor, model


@contextmanager
def _naming(part: str) -> Iterator[None]:
    """Put the name of a part of a checkpoint before what an error says. Raises `ValueError` for any error."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{part}: {str(error).strip() or type(error).__name__}") from error


def load_model(name: str, **options: Any) -> Any:
    """
    Load a model in evaluation mode, on the GPU if there is one.

    On the CPU, a small model sets the process to one thread.

    Args:
        name (`str`): A folder or a Hub id. Its code is run.
        options: Options of `AutoModel.from_pretrained`, such as `revision`, or fields of the configuration.

    Raises:
        `OSError`: If there is no such checkpoint.
        `ValueError`: If weights of the model are missing from the checkpoint, or have other shapes.
    """
    return _placed(_load(name, **options))


def _load(name: str, **options: Any) -> Any:
    """Load a model, and check its weights."""
    options = {"dtype": "auto", **options}
    model, found = AutoModel.from_pretrained(name, trust_remote_code=True, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"{len(missing)} of the model's weights are missing, such as {missing[0]}.")
    check_finite(model)
    # A model with fewer routed layers needs fewer routers.
    unused = sorted(name for name in found["unexpected_keys"] if ".router." not in name)
    if unused:
        logger.warning(f"{len(unused)} of the checkpoint's weights are not used, such as {unused[0]}.")
    return model.eval()


def _placed(model: Any) -> Any:
    """Return a model on the GPU if there is one. Without one, a small model sets the process to one thread."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return model.to(device)


def check_finite(model: Any) -> None:
    """
    Check the weights of a model, which a training that diverged leaves as NaN.

    Raises:
        `ValueError`: If a weight is not a finite number. The message names one.
    """
    # Weights in eight bits are of other types.
    plain = [
        (name, weight)
        for name, weight in model.named_parameters()
        if type(weight) is torch.nn.Parameter and weight.is_floating_point() and weight.itemsize > 1
        if weight.numel() > 0 and not weight.is_meta
    ]
    spoilt = [name for name, weight in plain if not torch.stack(weight.aminmax()).isfinite().all()]
    if spoilt:
        raise ValueError(
            f"{len(spoilt)} of {len(plain)} weights hold NaN or infinity, such as {spoilt[0]}. Training that diverges "
            "leaves such weights: take an earlier checkpoint."
        )


def generated_world(video: str | Path, open_video: Callable[[str | Path], Any]) -> str | None:
    """
    Return the generated world that a video file is from, `"StreamWorld"` or `"DoomWorld"`, or `None` for other files.

    The worlds write their names into the comments of their files, so a copy is recognised in any folder.

    Args:
        video (`str` or `Path`): The video.
        open_video (`Callable`): Opens it, as `processor.open_video` does.
    """
    if not Path(video).is_file():
        return None
    try:
        with open_video(video) as reader:
            comment = reader.container.metadata.get("comment")
    except ValueError:
        return None
    return comment if comment in WORLDS else None
