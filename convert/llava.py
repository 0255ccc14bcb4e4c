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
Makes a checkpoint of ours from a plain vision-language model of the LLaVA family: LLaVA, LLaVA-NeXT,
LLaVA-NeXT-Video, LLaVA-OneVision, and whatever else has an encoder with a patch grid, a projector of two linear layers
and a decoder-only language model.

```bash
python convert/llava.py llava-hf/llava-onevision-qwen2-7b-ov-hf out
python convert/llava.py MODEL out --frame_token_pooled 7 7 --mod_layers interleaved --mod_keep_ratio 0.2
```

Encoder, projector and language model are taken, with the encoder's layer that the projector was trained on. The model
has seen no stream yet and is to be fine-tuned on streams (`train/sft.py`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from videollm_mod.mistakes import MISTAKES, in_one_line
from videollm_mod.train.card import write_plain_card
from videollm_mod.train.new_model import DTYPES, join_parts, layers_of, new_folder, routing_fields


_PROJECTOR = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
_TAKEN = ("model.vision_tower.", "model.language_model.", "model.multi_modal_projector.", "lm_head.")
_OWN = "its own pooling and cutting of pictures"


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
    Converts a checkpoint.

    Args:
        source (`str`): A vision-language model of Transformers, a folder or a Hub id.
        out (`str` or `Path`): Folder to write, which must not hold anything yet.
        frame_token_pooled (`tuple[int, int]`, *optional*): Grid of tokens a frame; by default 7x7, or all patches of
            an encoder that has fewer.
        dtype (`torch.dtype`, *optional*): Of all weights; by default the checkpoint's.
        mod_layers, mod_keep_ratio (*optional*): As of [`VideoLLMMoDConfig`]; by default full compute.

    Returns:
        `list[str]`: Names of the checkpoint's weights that were not taken.

    Raises:
        `ValueError`: If the model's parts do not fit, with the part. Nothing is written then.
        `FileExistsError`: If there is something in `out`.
    """
    out = Path(out)
    with new_folder(out) as folder:
        theirs = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype or "auto")
        _refuse_what_does_not_fit(theirs)
        config, parts = theirs.config, theirs.model
        grid = config.vision_config.image_size // config.vision_config.patch_size
        routing = routing_fields(mod_layers, mod_keep_ratio)
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
            **routing,
        )
        weights = parts.multi_modal_projector.state_dict()
        for name, weight in model.model.connector.state_dict().items():
            # A projector without biases is one whose biases are zero.
            weight.copy_(weights[name]) if name in weights else weight.zero_()
        left = [name for name in theirs.state_dict() if not name.startswith(_TAKEN)]
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        _write_card(folder, out.name, source, config.model_type, left, model.config)
    return left


def _refuse_what_does_not_fit(model: Any) -> None:
    parts, config = getattr(model, "model", None), model.config
    name = type(model).__name__
    missing = [p for p in ("vision_tower", "multi_modal_projector", "language_model") if not hasattr(parts, p)]
    if missing:
        raise ValueError(f"{name} has no {' and no '.join(missing)}: it is not of the LLaVA family.")
    others = set(parts.multi_modal_projector.state_dict()) - _PROJECTOR
    if others or not hasattr(config, "projector_hidden_act"):
        raise ValueError(
            f"The projector of {name} is not two linear layers with an activation between them"
            + (f", it also has {', '.join(sorted(others))}." if others else ".")
        )
    if not isinstance(config.vision_feature_layer, int) or config.vision_feature_layer >= 0:
        raise ValueError(
            f"{name} projects layers {config.vision_feature_layer} of its encoder; what fits is one, counted from the "
            "end."
        )
    for field in ("image_size", "patch_size"):
        if not isinstance(getattr(config.vision_config, field, None), int):
            raise ValueError(f"The encoder of {name}, {config.vision_config.model_type}, has no one `{field}`.")


def _write_card(folder: Path, name: str, source: str, kind: str, left: list[str], config: Any) -> None:
    grid = "x".join(map(str, config.frame_token_pooled))
    text = (
        f"Encoder, projector and language model of {Path(source).name} ({kind}) as a streaming model (VideoLLM-MoD, "
        f"arXiv 2408.16730). A frame is {grid} tokens, averaged before the projector. Not taken: "
        f"{', '.join([*left, _OWN])}. It has not seen a stream yet and is to be fine-tuned."
    )
    write_plain_card(folder, name=name, config=config, text=text, base_models=[source])


def main() -> None:
    """Converts and says what was made, and of what it was not."""
    parser = argparse.ArgumentParser(description="Converts a vision-language model of the LLaVA family.")
    parser.add_argument("source", help="a vision-language model of Transformers: a folder or a Hub id")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--frame_token_pooled", type=int, nargs=2, metavar=("H", "W"), help="tokens a frame")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; by default the checkpoint's")
    parser.add_argument("--mod_layers", type=layers_of, help="which layers to route: a scheme, or 1,3,5")
    parser.add_argument("--mod_keep_ratio", type=float, help="share of a frame's tokens that they keep")
    parser.add_argument("--json", action="store_true", help="print what was done for machines")
    options = vars(parser.parse_args())
    as_json, out = options.pop("json"), options["out"]
    quiet()
    try:
        left = convert(**options)
    except MISTAKES as error:
        raise SystemExit(f"error: {in_one_line(error)}") from None
    if as_json:
        print(json.dumps({"folder": str(out), "not_taken": left}))
        return
    print(f"not taken: {', '.join([*left, _OWN])}")
    print(f"{out}: `AutoModel.from_pretrained('{out}', trust_remote_code=True)` loads it")


if __name__ == "__main__":
    main()
