# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Convert a plain vision-language model of the LLaVA family to a streaming model.

LLaVA, LLaVA-NeXT, LLaVA-NeXT-Video and LLaVA-OneVision fit, and so does any other model with a vision encoder on a
grid of patches, a projector of two linear layers, and a decoder-only language model.

```bash
python convert/llava.py llava-hf/llava-onevision-qwen2-7b-ov-hf out
python convert/llava.py MODEL out --frame_token_pooled 7 7 --mod_layers interleaved --mod_keep_ratio 0.2
```

The result has the model's encoder, projector and language model. The projector becomes the connector, and it reads the
encoder layer that it was trained on. The model has not seen a stream yet: fine-tune it on streams (`train/sft.py`).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from videollm_mod.convert import add_shared_arguments, new_folder
from videollm_mod.mistakes import one_line_errors
from videollm_mod.space.checkpoint_names import check_checkpoint


# Transformers calls the connector a projector.
_PROJECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
_CONVERTED = ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector.", "lm_head.")
_IMAGE_LAYOUT = "image pooling and tiling"


def convert(
    source: str,
    out: str | Path,
    *,
    frame_token_pooled: tuple[int, int] | None = None,
    dtype: Any = None,
    mod_layers: str | list[int] | None = None,
    mod_keep_ratio: float | list[float] | None = None,
) -> list[str]:
    """
    Convert a checkpoint.

    Args:
        source (`str`): A vision-language model of Transformers: a folder or a Hub id.
        out (`str` or `Path`): Folder to write. It must be empty or new.
        frame_token_pooled (`tuple[int, int]`, *optional*): Grid of tokens per frame. The default is 7x7, or all
            patches if the encoder has fewer.
        dtype (`torch.dtype`, *optional*): Type of all weights. The default is the checkpoint's.
        mod_layers, mod_keep_ratio (*optional*): See [`VideoLLMMoDConfig`]. The default is full compute.

    Returns:
        `list[str]`: Names of the weights that the streaming model has no place for.

    Raises:
        `ValueError`: If a part of the model does not fit. The message names the part, and nothing is written.
        `FileExistsError`: If `out` is not empty.
    """
    from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

    from videollm_mod.train.new_model import join_parts, routing_fields

    out = Path(out)
    with new_folder(out) as folder:
        theirs = AutoModelForImageTextToText.from_pretrained(check_checkpoint(source), dtype=dtype or "auto")
        _check_parts(theirs)
        config, parts = theirs.config, theirs.model
        grid = config.vision_config.image_size // config.vision_config.patch_size
        model, processor = join_parts(
            parts.vision_tower,
            parts.language_model,
            theirs.get_output_embeddings(),
            tokenizer=AutoTokenizer.from_pretrained(source),
            image_processor=AutoImageProcessor.from_pretrained(source),
            generation_config=theirs.generation_config,
            frame_token_cls=False,
            frame_token_pooled=frame_token_pooled or (min(7, grid), min(7, grid)),
            vision_feature_layer=config.vision_feature_layer,
            connector_hidden_act=config.projector_hidden_act,
            **routing_fields(mod_layers, mod_keep_ratio),
        )
        weights = parts.multi_modal_projector.state_dict()
        for name, weight in model.model.connector.state_dict().items():
            # A projector without biases computes the same as one with zero biases.
            weight.copy_(weights[name]) if name in weights else weight.zero_()
        left_out = [name for name in theirs.state_dict() if not name.startswith(_CONVERTED)]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _write_card(folder, out.name, source, config.model_type, left_out, model.config)
    return left_out


def _check_parts(model: Any) -> None:
    """Raise `ValueError` unless the model has the parts of the LLaVA family."""
    parts, config, name = getattr(model, "model", None), model.config, type(model).__name__
    missing = [p for p in ("vision_tower", "multi_modal_projector", "language_model") if not hasattr(parts, p)]
    if missing:
        raise ValueError(f"{name} is not of the LLaVA family: it has no {' and no '.join(missing)}.")
    others = set(parts.multi_modal_projector.state_dict()) - _PROJECTOR
    if others or not hasattr(config, "projector_hidden_act"):
        raise ValueError(
            f"The projector of {name} is not two linear layers with an activation between them"
            + (f": it also has {', '.join(sorted(others))}." if others else ".")
        )
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or layer >= 0:
        raise ValueError(f"{name} reads encoder layers {layer}. Supported is one layer, counted from the end: -2.")
    for field in ("image_size", "patch_size"):
        if not isinstance(getattr(config.vision_config, field, None), int):
            raise ValueError(f"The encoder of {name}, {config.vision_config.model_type}, has no single `{field}`.")


def _write_card(folder: Path, name: str, source: str, kind: str, left_out: list[str], config: Any) -> None:
    from videollm_mod.train.card import write_plain_card

    grid = "x".join(map(str, config.frame_token_pooled))
    text = (
        f"Encoder, projector and language model of {Path(source).name} ({kind}) as a streaming model (VideoLLM-MoD, "
        f"arXiv 2408.16730). A frame is {grid} tokens, averaged before the projector. Not converted: "
        f"{', '.join([*left_out, _IMAGE_LAYOUT])}. It has not seen a stream yet: fine-tune it."
    )
    write_plain_card(folder, name=name, config=config, text=text, base_models=[source])


def main() -> None:
    """Convert, then print which folder was written and what it lacks."""
    parser = argparse.ArgumentParser(
        description="Convert a vision-language model of the LLaVA family to a streaming model.",
        epilog="The result has not seen a stream yet: fine-tune it with train/sft.py.",
    )
    parser.add_argument("source", metavar="MODEL", help="vision-language model of Transformers: a folder or a Hub id")
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    parser.add_argument(
        "--frame_token_pooled",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="grid of tokens per frame; default: 7 7, or all patches if there are fewer",
    )
    add_shared_arguments(parser)
    options = vars(parser.parse_args())
    as_json, out = options.pop("json"), options["out"]
    with one_line_errors():
        print(f"loading {options['source']} ...", file=sys.stderr)
        quiet()
        left_out = convert(**options)
    if as_json:
        print(json.dumps({"folder": str(out), "not_converted": left_out}))
        return
    print(f"not converted: {', '.join([*left_out, _IMAGE_LAYOUT])}")
    print(f"wrote {out}. Load it: AutoModel.from_pretrained('{out}', trust_remote_code=True)")


if __name__ == "__main__":
    main()
