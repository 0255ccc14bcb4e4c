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
r"""
Makes a checkpoint of ours from one of VideoLLM-online (LIVE, arXiv 2406.11816): a PEFT adapter over a language model,
with the vision encoder kept apart.

```bash
python convert/videollm_online.py meta-llama/Meta-Llama-3-8B-Instruct \
    chenjoya/videollm-online-8b-v1plus out
python convert/videollm_online.py BASE ADAPTER out --mod_layers interleaved --mod_keep_ratio 0.2
```

Without `--mod_layers` and `--mod_keep_ratio` it is the same model, at full compute. With them its routers are new,
and by the default gate begin as the plain layer on the tokens they keep, and are to be fine-tuned (`train/sft.py`).
"""

import argparse
import json
from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils import load_peft_weights
from transformers.utils import logging

from videollm_mod.mistakes import MISTAKES, in_one_line
from videollm_mod.train.card import write_plain_card
from videollm_mod.train.new_model import DTYPES, layers_of, model_from_parts, new_folder, routing_fields


logger = logging.get_logger(__name__)

# Frame layouts, which are not in a checkpoint but in its version's name.
LIVE_VERSIONS: dict[str, dict[str, Any]] = {
    "live1": {"frame_token_cls": True, "frame_token_pooled": None, "frame_token_interval": None},
    "live1+": {"frame_token_cls": True, "frame_token_pooled": [3, 3], "frame_token_interval": ","},
}
_PREFIX = "base_model.model."
# Saved whole beside the adapter: theirs and ours.
_WHOLE = {
    "connector.0.": "model.connector.linear_1.",
    "connector.2.": "model.connector.linear_2.",
    "lm_head.base_layer.": "lm_head.",
    "model.embed_tokens.": "model.language_model.embed_tokens.",
}
_NEEDED = [f"connector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")]


def convert(
    base: str,
    adapter: str,
    out: str | Path,
    *,
    vision_model: str = "google/siglip-large-patch16-384",
    live_version: str = "live1+",
    keep_adapter: bool = False,
    dtype: Any = None,
    mod_layers: str | list[int] | None = None,
    mod_keep_ratio: float | list[float] | None = None,
) -> Path:
    """
    Converts a checkpoint.

    Args:
        base (`str`): The language model that was adapted, a folder or a Hub id.
        adapter (`str`): VideoLLM-online's checkpoint, a folder or a Hub id.
        out (`str` or `Path`): Folder to write, which must not hold anything yet.
        vision_model (`str`, *optional*): The vision encoder.
        live_version (`str`, *optional*, defaults to `"live1+"`): `"live1"`, one pooled token a frame and no interval
            token, or `"live1+"`, 1 + 3x3 tokens and ",".
        keep_adapter (`bool`, *optional*, defaults to `False`): Leave the adapter one, in the folder `adapter` of
            `out`, instead of merging it.
        dtype (`torch.dtype`, *optional*): Of all weights; by default the language model's.
        mod_layers, mod_keep_ratio (*optional*): As of [`VideoLLMMoDConfig`]; by default full compute.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: If the checkpoint is not one of VideoLLM-online over this base: tensors that are missing, too
            many or of another shape are listed by name. Nothing is written then.
        `FileExistsError`: If there is something in `out`.
    """
    out = Path(out)
    with new_folder(out) as folder:
        if live_version not in LIVE_VERSIONS:
            raise ValueError(f"`live_version` is one of {', '.join(LIVE_VERSIONS)}, got {live_version!r}.")
        settings = PeftConfig.from_pretrained(adapter)
        theirs = load_peft_weights(str(adapter), device="cpu")
        patterns = [name for name in ("alpha_pattern", "rank_pattern") if getattr(settings, name, None)]
        if patterns or getattr(settings, "use_dora", False):
            raise ValueError(f"The adapter is not uniform LoRA: it has {', '.join(patterns or ['use_dora'])}.")
        named = settings.base_model_name_or_path
        if named and Path(named).name != Path(base).name:
            logger.warning(f"The adapter was trained on '{named}'. '{base}' has its shape and is taken all the same.")
        routing = routing_fields(mod_layers, mod_keep_ratio)
        model, processor = model_from_parts(vision_model, base, dtype=dtype, **LIVE_VERSIONS[live_version], **routing)

        options = {"lora_dropout": settings.lora_dropout, "use_rslora": settings.use_rslora, "modules_to_save": None}
        lora = model.make_lora_config(r=settings.r, lora_alpha=settings.lora_alpha, **options)
        lora.base_model_name_or_path = None
        whole, low_rank = _sort(theirs)
        _refuse_what_does_not_fit(model.state_dict(), whole)
        model.load_state_dict(whole, strict=False)
        adapted = get_peft_model(model, lora)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        _refuse_what_does_not_fit(expected, low_rank, complete=True)
        set_peft_model_state_dict(adapted, low_rank)
        if keep_adapter:
            adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
            model = adapted.unload()
        else:
            model = adapted.merge_and_unload()
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        parts = [base, adapter, vision_model]
        _write_card(folder, out.name, parts, live_version, model.config, has_adapter=keep_adapter)
    return out


def _write_card(
    folder: Path, name: str, parts: list[str], live_version: str, config: Any, *, has_adapter: bool
) -> None:
    text = f"VideoLLM-online ({live_version}, arXiv 2406.11816), of {', '.join(Path(part).name for part in parts)}."
    text += " Its routers are new and to be fine-tuned." if config.routed_layers else ""
    write_plain_card(folder, name=name, config=config, text=text, base_models=parts, has_adapter=has_adapter)


def _sort(theirs: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Tensors under our names: those saved whole, and those of the adapter."""
    missing = [name for name in _NEEDED if _PREFIX + name not in theirs]
    if missing:
        raise ValueError(f"This is no checkpoint of VideoLLM-online. Missing: {', '.join(missing)}.")
    whole, low_rank = {}, {}
    for name, tensor in theirs.items():
        bare = name.removeprefix(_PREFIX)
        known = next((begin for begin in _WHOLE if bare.startswith(begin)), None)
        if known is not None:
            whole[_WHOLE[known] + bare.removeprefix(known)] = tensor
        else:
            low_rank[_PREFIX + bare.replace("model.layers.", "model.language_model.layers.", 1)] = tensor
    return whole, low_rank


def _refuse_what_does_not_fit(
    ours: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], *, complete: bool = False
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    found = {
        "Missing": [name for name in ours if complete and name not in tensors],
        "Too many": [name for name in tensors if name not in ours],
        "Misshapen": [
            name for name, tensor in tensors.items() if tuple(tensor.shape) != shapes.get(name, tensor.shape)
        ],
    }
    faults = []
    for fault, names in found.items():
        listed = [_their_name(name) for name in sorted(names)[:8]]
        if fault == "Misshapen":
            pairs = zip(listed, sorted(names), strict=False)
            listed = [f"{their} is {tuple(tensors[name].shape)} and not {shapes[name]}" for their, name in pairs]
        if listed:
            faults.append(f"{fault}: {', '.join(listed)}" + (f" and {len(names) - 8} more" if len(names) > 8 else ""))
    if faults:
        raise ValueError(f"The adapter does not fit this base. {'. '.join(faults)}.")


def _their_name(name: str) -> str:
    for theirs, ours in _WHOLE.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.removeprefix(_PREFIX).replace("model.language_model.layers.", "model.layers.", 1)


def main() -> None:
    """Converts and says what was made."""
    parser = argparse.ArgumentParser(description="Converts a VideoLLM-online checkpoint.")
    parser.add_argument("base", help="the language model that was adapted: a folder or a Hub id")
    parser.add_argument("adapter", help="VideoLLM-online's checkpoint: a folder or a Hub id")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--vision_model", default="google/siglip-large-patch16-384", help="the vision encoder")
    parser.add_argument("--live_version", choices=LIVE_VERSIONS, default="live1+", help="its frame layout")
    parser.add_argument("--keep_adapter", action="store_true", help="leave the adapter one")
    parser.add_argument("--dtype", choices=DTYPES, help="of all weights; by default the base's")
    parser.add_argument("--mod_layers", type=layers_of, help="which layers to route: a scheme, or 1,3,5")
    parser.add_argument("--mod_keep_ratio", type=float, help="share of a frame's tokens that they keep")
    parser.add_argument("--json", action="store_true", help="print what was done for machines")
    options = vars(parser.parse_args())
    as_json = options.pop("json")
    quiet()
    try:
        folder = convert(**options)
    except MISTAKES as error:
        raise SystemExit(f"error: {in_one_line(error)}") from None
    if as_json:
        print(json.dumps({"folder": str(folder), "adapter": options["keep_adapter"]}))
        return
    print(f"{folder}: `AutoModel.from_pretrained('{folder}', trust_remote_code=True)` loads it")
    if options["keep_adapter"]:
        print(f"and `PeftModel.from_pretrained(model, '{folder}', subfolder='adapter')` then puts the adapter on it")


if __name__ == "__main__":
    main()
