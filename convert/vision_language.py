# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert a vision-language model of Transformers to a streaming model: the same encoder, projector, language model,
pixels and turns.

```bash
videollm-mod convert HuggingFaceTB/SmolVLM2-256M-Video-Instruct smol
videollm-mod convert llava-hf/llava-onevision-qwen2-0.5b-ov-hf onevision
videollm-mod convert OpenGVLab/InternVL3-1B-hf internvl --mod-layers interleaved --mod-keep-ratio 0.5
```
"""

import importlib
from pathlib import Path
from shlex import quote
from typing import Any

from videollm_mod.convert import new_folder, with_name
from videollm_mod.space.checkpoint_faults import load_weights
from videollm_mod.space.checkpoint_names import check_checkpoint

from .source import Source


# The file of this folder that reads a model type. Other types are read like LLaVA.
READERS = {"smolvlm": "smolvlm", "idefics3": "smolvlm", "internvl": "internvl"}
TYPES = ("llava", "llava_next", "llava_next_video", "llava_onevision", *READERS)
NEWLINE_TOKEN = "<image_newline>"


def convert(
    source: str,
    out: str | Path,
    *,
    frame_token_pooled: tuple[int, int] | None = None,
    frame_size: int | None = None,
    dtype: Any = None,
    mod_layers: str | list[int] | None = None,
    mod_keep_ratio: float | list[float] | None = None,
    mod_router: str | None = None,
) -> list[str]:
    """
    Convert a vision-language model.

    Args:
        source (`str`): A model of Transformers, of a type in `TYPES` or with the same parts as LLaVA: a folder or a
            Hub id.
        out (`str` or `Path`): Folder to write. It must be empty or new.
        frame_token_pooled (`tuple[int, int]`, *optional*): Grid of tokens per frame. The default is the model's own
            for a frame of a video. A model with a pixel shuffle has no other.
        frame_size (`int`, *optional*): Side in pixels at which frames are encoded. The default is the encoder's own.
        dtype (`torch.dtype`, *optional*): Type of all weights. The default is the checkpoint's.
        mod_layers, mod_keep_ratio, mod_router (*optional*): See [`VideoLLMMoDConfig`]. The default is full compute.

    Returns:
        `list[str]`: What the streaming model has no place for: names of weights, and other parts.

    Raises:
        `ValueError`: If a part of the model does not fit. The message names the part, and nothing is written.
        `FileExistsError`: If `out` is not empty.
    """
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    from videollm_mod import VideoLLMMoDVideoProcessor
    from videollm_mod.train.new_model import join_parts, routing_fields, teach_routers

    out = with_name(Path(out))
    with new_folder(out) as folder:
        source = check_checkpoint(source)
        kind = _check_type(source)
        theirs = load_weights(AutoModelForImageTextToText, source, dtype=dtype or "auto")
        tokenizer = AutoTokenizer.from_pretrained(source)
        part = importlib.import_module(f".{READERS.get(kind, 'llava')}", __package__).read(theirs, source, tokenizer)
        _check_sizes(part, theirs.config.vision_config, frame_token_pooled)
        newline = None if part.image_newline is None else _add_newline(theirs, tokenizer, part.image_newline)
        frame_token = tokenizer.convert_ids_to_tokens(part.frame_token_id)
        model, processor = join_parts(
            part.encoder,
            part.language_model,
            theirs.get_output_embeddings(),
            video_processor=VideoLLMMoDVideoProcessor(**part.pixels),
            tokenizer=tokenizer,
            generation_config=theirs.generation_config,
            processor_options={
                "stream_format": _with_beginning(part.stream_format, tokenizer),
                "system_prompt": "",
                **({"frame_token": frame_token} if frame_token is not None else {}),
            },
            frame_token_cls=False,
            frame_token_pooled=frame_token_pooled or part.frame_token_pooled,
            speak="every",
            **part.fields,
            **routing_fields(mod_layers, mod_keep_ratio, mod_router),
        )
        model.model.connector.load_state_dict(part.connector)
        if frame_size is not None:
            model.set_frame_size(processor, frame_size)
        never = {processor.frame_token_id, part.frame_token_id, newline, *part.placeholders} - {None}
        rows = model.config.text_config.vocab_size
        model.generation_config.suppress_tokens = sorted(token for token in never if token < rows)
        teach_routers(model.config)
        left_out = [name for name in theirs.state_dict() if not name.startswith(part.taken)] + part.left_out
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _write_card(folder, out.name, source, kind, part, left_out, model.config)
    return left_out


def _check_type(source: str) -> str:
    """Return the model type of a checkpoint. Raise `ValueError` for a type that Transformers does not read."""
    from transformers import PreTrainedConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
    if kind == "videollm_mod":
        raise ValueError(f"'{source}' is a streaming model already.")
    if kind not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        hint = " Those of OpenGVLab have names that end in '-hf'." if kind == "internvl_chat" else ""
        raise ValueError(f"'{source}' is a model of type {kind!r}. Supported types are {', '.join(TYPES)}.{hint}")
    return kind


def _check_sizes(part: Source, vision_config: Any, frame_token_pooled: tuple[int, int] | None) -> None:
    from videollm_mod.configuration_videollm_mod import height_and_width

    made, read = tuple(part.pixels["size"].values()), height_and_width(vision_config.image_size)
    if made != read:
        raise ValueError(
            f"The processor makes frames of {made[0]}x{made[1]} pixels, but the encoder reads {read[0]}x{read[1]}."
        )
    own = part.frame_token_pooled
    is_fixed = part.fields.get("connector") == "pixel_shuffle"
    if is_fixed and frame_token_pooled is not None and tuple(frame_token_pooled) != own:
        raise ValueError(
            f"`frame_token_pooled` must stay {own[0]}x{own[1]}: the model's projector reads squares of patches of one "
            "size. Leave it out."
        )


def _with_beginning(stream_format: Any, tokenizer: Any) -> Any:
    """Return a stream format that begins with the token that the tokenizer begins every text with."""
    from videollm_mod.stream_format_videollm_mod import STREAM_FORMATS

    texts = STREAM_FORMATS.get(stream_format) if isinstance(stream_format, str) else None
    bos = tokenizer.bos_token_id
    if texts is None or texts["begin"] or bos is None or tokenizer("").input_ids[:1] != [bos]:
        return stream_format
    return {**texts, "begin": tokenizer.bos_token}


def _add_newline(theirs: Any, tokenizer: Any, newline: Any) -> int:
    """Add a token for the embedding that follows frames, with its row in the table. Return the token's id."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(NEWLINE_TOKEN, special=True, normalized=False)], special_tokens=True)
    token_id = tokenizer.convert_tokens_to_ids(NEWLINE_TOKEN)
    if token_id >= theirs.config.text_config.vocab_size:
        theirs.resize_token_embeddings(token_id + 1, mean_resizing=False)
    theirs.get_input_embeddings().weight.data[token_id] = newline.data
    return token_id


def _write_card(
    folder: Path, name: str, source: str, kind: str, part: Source, left_out: list[str], config: Any
) -> None:
    from videollm_mod.train.card import write_plain_card
    from videollm_mod.train.new_model import stretches_positions

    grid, own = "x".join(map(str, config.frame_token_pooled)), "x".join(map(str, part.frame_token_pooled))
    differences = [*part.differences]
    if grid != own:
        differences.append(f"The source has {own} tokens for a frame.")
    text_config = part.language_model.config
    if stretches_positions(text_config):
        length = text_config.max_position_embeddings
        differences.append(f"Beyond {length:,} tokens the source stretches positions, and this model does not.")
    if part.stream_format is None:
        differences.append("The turns are VideoLLM-online's, because those of the source are not known.")
    text = (
        f"{Path(source).name} ({kind}) as a streaming model (VideoLLM-MoD, arXiv 2408.16730): its encoder, projector, "
        f"language model, pixels and turns. A frame is {grid} tokens.\n\n"
        "It streams without training, because it is asked every few seconds what it sees. It has not learned when to "
        "be silent. Fine-tune it for that.\n\n"
        f"```bash\nvideollm-mod narrate video.mp4 --model {quote(name)} --every 2\n"
        f'videollm-mod ask video.mp4 "What happens?" --model {quote(name)}\n```\n\n'
        f"Not converted: {', '.join(left_out) or 'nothing'}."
    )
    text = " ".join([text, *differences])
    write_plain_card(folder, name=name, config=config, text=text, base_models=[source])
