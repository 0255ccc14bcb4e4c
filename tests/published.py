# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write tiny checkpoints in the layouts of other projects."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import tiny_text_config, tiny_tokenizer, tiny_vision_config
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SiglipImageProcessor,
)


LINEAR = "model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)|lm_head$"
VISION = tiny_vision_config("siglip_vision_model")


class Live(LlamaForCausalLM):
    """VideoLLM-online's model: a language model with a connector."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.connector = nn.Sequential(nn.Linear(VISION["hidden_size"], width), nn.GELU(), nn.Linear(width, width))
        self.post_init()


def save_live(base_folder: Path, vision_folder: Path, adapter_folder: Path) -> PeftModel:
    """Write the three parts of VideoLLM-online into folders: language model, vision encoder and adapter."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(base_folder)
    fields = {k: v for k, v in tiny_text_config("llama", vocab_size=len(tokenizer)).items() if k != "model_type"}
    config = LlamaConfig(**{**fields, "eos_token_id": tokenizer.eos_token_id})
    live = Live(config)
    for weight in live.parameters():
        nn.init.normal_(weight, std=0.3) if weight.dim() > 1 else None
    base = LlamaForCausalLM(config)
    base.load_state_dict(live.state_dict(), strict=False)
    base.generation_config.eos_token_id = tokenizer.eos_token_id
    base.save_pretrained(base_folder)
    AutoModel.from_config(AutoConfig.for_model(**VISION)).save_pretrained(vision_folder)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.05, target_modules=LINEAR, modules_to_save=["connector"])
    adapted = get_peft_model(live, lora).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(adapter_folder)
    return adapted


def save_llava(folder: Path, config_class: Any, vision: dict[str, Any], text: str, **fields: Any) -> PreTrainedModel:
    """Write a model of the LLaVA family, given a vision configuration and a type of language model."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    vision_config = AutoConfig.for_model(**vision)
    text_config = AutoConfig.for_model(**tiny_text_config(text, vocab_size=len(tokenizer) + 2))
    fields = {"image_token_index": len(tokenizer), "image_token_id": len(tokenizer)} | fields
    model = AutoModelForImageTextToText.from_config(
        config_class(vision_config=vision_config, text_config=text_config, **fields)
    ).eval()
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kind = CLIPImageProcessor if vision["model_type"].startswith("clip") else SiglipImageProcessor
    kind(image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.3, 0.4]).save_pretrained(folder)
    return model
