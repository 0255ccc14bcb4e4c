# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
r"""
Convert a checkpoint of VideoLLM-online (arXiv 2406.11816): a PEFT adapter over a language model, and a vision encoder.

```bash
videollm-mod convert meta-llama/Meta-Llama-3-8B-Instruct chenjoya/videollm-online-8b-v1plus out
videollm-mod convert BASE ADAPTER out --mod-layers interleaved --mod-keep-ratio 0.2
```

Without `--mod-layers` and `--mod-keep-ratio` the result is the same model, at full compute. With them it has new
routers. The default gate starts at 1, so the model starts as the original layers on the tokens that it keeps.
Fine-tune it (`train/sft.py`).
"""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from videollm_mod.convert import new_folder, with_name
from videollm_mod.space.checkpoint_names import check_checkpoint


if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

# A checkpoint does not hold its frame layout. It follows from the version.
LIVE_VERSIONS: dict[str, dict[str, Any]] = {
    "live1": {"frame_token_cls": True, "frame_token_pooled": None, "frame_token_interval": None},
    "live1+": {"frame_token_cls": True, "frame_token_pooled": [3, 3], "frame_token_interval": ","},
}
_PREFIX = "base_model.model."
# Weights that the adapter saves in full, not as low-rank factors: their name and ours.
_COMPLETE = {
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
    mod_router: str | None = None,
) -> Path:
    """
    Convert a checkpoint.

    Args:
        base (`str`): The language model under the adapter: a folder or a Hub id.
        adapter (`str`): VideoLLM-online's checkpoint: a folder or a Hub id.
        out (`str` or `Path`): Folder to write. It must be empty or new.
        vision_model (`str`, *optional*): The vision encoder.
        live_version (`str`, *optional*, defaults to `"live1+"`): Frame layout. `"live1"` has one token per frame and
            no interval token. `"live1+"` has 1 + 3x3 tokens per frame and "," between frames.
        keep_adapter (`bool`, *optional*, defaults to `False`): Save the adapter unmerged, in the folder `adapter` of
            `out`.
        dtype (`torch.dtype`, *optional*): Type of all weights. The default is the language model's.
        mod_layers, mod_keep_ratio, mod_router (*optional*): See [`VideoLLMMoDConfig`]. The default is full compute.

    Returns:
        `Path`: The folder.

    Raises:
        `ValueError`: If the adapter is not VideoLLM-online's or does not fit the base. The message lists tensors that
            are missing, unknown or of another shape, and nothing is written.
        `FileExistsError`: If `out` is not empty.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from videollm_mod.train.new_model import model_from_parts, routing_fields, teach_routers

    out = with_name(Path(out))
    with new_folder(out) as folder:
        base, adapter, vision_model = map(check_checkpoint, (base, adapter, vision_model))
        if live_version not in LIVE_VERSIONS:
            raise ValueError(f"`live_version` must be one of {', '.join(LIVE_VERSIONS)}, got {live_version!r}.")
        settings = _read_settings(adapter, base)
        theirs = _read_weights(adapter)
        routing = routing_fields(mod_layers, mod_keep_ratio, mod_router)
        model, processor = model_from_parts(vision_model, base, dtype=dtype, **LIVE_VERSIONS[live_version], **routing)

        options = {"lora_dropout": settings.lora_dropout, "use_rslora": settings.use_rslora, "modules_to_save": None}
        lora = model.make_lora_config(r=settings.r, lora_alpha=settings.lora_alpha, **options)
        lora.base_model_name_or_path = None
        complete, low_rank = _sort(theirs)
        _check_tensors(model.state_dict(), complete)
        model.load_state_dict(complete, strict=False)
        adapted = get_peft_model(model, lora)
        expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        _check_tensors(expected, low_rank, needs_all=True)
        set_peft_model_state_dict(adapted, low_rank)
        if keep_adapter:
            adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
            model = adapted.unload()
        else:
            model = adapted.merge_and_unload()
        teach_routers(model.config)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        parts = [base, adapter, vision_model]
        _write_card(folder, out.name, parts, live_version, model.config, has_adapter=keep_adapter)
    return out


def _read_settings(adapter: str, base: str) -> Any:
    """Read the adapter's configuration. Raise `ValueError` if the adapter is not plain LoRA."""
    from peft import PeftConfig

    settings = PeftConfig.from_pretrained(adapter)
    special = [name for name in ("alpha_pattern", "rank_pattern", "use_dora") if getattr(settings, name, None)]
    if special:
        raise ValueError(f"The adapter is not uniform LoRA: it has {', '.join(special)}.")
    named = settings.base_model_name_or_path
    if named and Path(named).name != Path(base).name:
        logger.warning(f"The adapter was trained on '{named}'. Converting with '{base}', which has the same shape.")
    return settings


def _read_weights(adapter: str) -> dict[str, "torch.Tensor"]:
    """Read the adapter's weights. Raise `ValueError` if they are not in a safetensors file."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
    from safetensors.torch import load_file

    name = "adapter_model.safetensors"
    try:
        path = Path(adapter, name) if Path(adapter).is_dir() else hf_hub_download(adapter, name)
        return load_file(path)
    except (FileNotFoundError, EntryNotFoundError) as error:
        raise ValueError(
            f"'{adapter}' has no {name}. An adapter_model.bin is pickled and may run code when it is read: if you "
            "trust it, load it with PEFT and save it again."
        ) from error


def _write_card(
    folder: Path, name: str, parts: list[str], live_version: str, config: Any, *, has_adapter: bool
) -> None:
    from videollm_mod.train.card import write_plain_card

    text = f"VideoLLM-online ({live_version}, arXiv 2406.11816), of {', '.join(Path(part).name for part in parts)}."
    text += " Its routers are new: fine-tune it." if config.routed_layers else ""
    write_plain_card(folder, name=name, config=config, text=text, base_models=parts, has_adapter=has_adapter)


def _sort(theirs: dict[str, "torch.Tensor"]) -> tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]]:
    """Split tensors into complete and low-rank ones, under our names."""
    missing = [name for name in _NEEDED if _PREFIX + name not in theirs]
    if missing:
        raise ValueError(f"The adapter is not a checkpoint of VideoLLM-online. Missing: {', '.join(missing)}.")
    complete, low_rank = {}, {}
    for name, tensor in theirs.items():
        bare = name.removeprefix(_PREFIX)
        start = next((prefix for prefix in _COMPLETE if bare.startswith(prefix)), None)
        if start is not None:
            complete[_COMPLETE[start] + bare.removeprefix(start)] = tensor
        else:
            low_rank[_PREFIX + bare.replace("model.layers.", "model.language_model.layers.", 1)] = tensor
    return complete, low_rank


def _check_tensors(
    ours: dict[str, "torch.Tensor"], tensors: dict[str, "torch.Tensor"], *, needs_all: bool = False
) -> None:
    """Raise `ValueError` with the names of tensors that do not fit, at most eight of a kind."""
    wrong_shape = [n for n, tensor in tensors.items() if n in ours and tensor.shape != ours[n].shape]
    found = {
        "Missing": [_their_name(name) for name in ours if needs_all and name not in tensors],
        "Unknown": [_their_name(name) for name in tensors if name not in ours],
        "Wrong shape": [
            f"{_their_name(n)} is {tuple(tensors[n].shape)}, expected {tuple(ours[n].shape)}" for n in wrong_shape
        ],
    }
    faults = [
        f"{fault}: {', '.join(sorted(names)[:8])}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        for fault, names in found.items()
        if names
    ]
    if faults:
        raise ValueError(f"The adapter does not fit this base. {'. '.join(faults)}.")


def _their_name(name: str) -> str:
    for theirs, ours in _COMPLETE.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name.removeprefix(_PREFIX).replace("model.language_model.layers.", "model.layers.", 1)
