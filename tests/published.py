# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Write tiny checkpoints in the layouts of other projects."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import IMAGE_SIZE, tiny_text_config, tiny_tokenizer, tiny_vision_config
from tokenizers import AddedToken, processors
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageTextToText,
    CLIPImageProcessor,
    GotOcr2ImageProcessor,
    Idefics3Config,
    Idefics3ImageProcessor,
    Idefics3Processor,
    InternVLConfig,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaNextVideoConfig,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SmolVLMConfig,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VipLlavaConfig,
)
from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE as SMOLVLM_TURNS


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


# --------------------------------------------------------------------------- vision-language models of Transformers


_CHATML_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}<video>\n{% elif part['type'] == 'image' %}<IMG_CONTEXT>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ONEVISION_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }} "
    "{% for part in message['content'] if part['type'] != 'text' %}<{{ part['type'] }}>{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\n' + part['text'] }}{% endfor %}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_VICUNA_TURNS = (
    "{% for message in messages %}{{ message['role'].upper() }}: "
    "{% for part in message['content'] if part['type'] != 'text' %}<{{ part['type'] }}>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }} {% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_MISTRAL_TURNS = (
    "{% for message in messages %}[INST] "
    "{% for part in message['content'] if part['type'] != 'text' %}<{{ part['type'] }}>\n{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %} [/INST]{% endfor %}"
)
_IDEFICS3_TURNS = SMOLVLM_TURNS.replace("<|im_start|>", "<|begin_of_text|>")
_NORMALIZED = {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
# Names of models of Transformers that `save_source` writes, some with the name of another language model.
SOURCES = ("smolvlm", "idefics3", "internvl", "llava_onevision", "llava_next_video", "llava_next", "llava")
SOURCES += ("llava_next_video on mistral", "internvl on llama")


def source_tokenizer(special: Sequence[str], *, bos: str, eos: str, **named: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with special tokens, some of them as attributes, such as `video_token`."""
    backend = tiny_tokenizer().backend_tokenizer
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    if bos == "<s>":
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    options = {"extra_special_tokens": named} if named else {}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token="<pad>", padding_side="left", **options
    )


def _idefics3(kind: str) -> tuple[Any, Any]:
    is_smolvlm = kind == "smolvlm"
    bos = "<|im_start|>" if is_smolvlm else "<|begin_of_text|>"
    parts = ["<fake_token_around_image>", "<image>", "<global-img>", "<row_1_col_1>"]
    tokenizer = source_tokenizer([bos, "<end_of_utterance>", *parts], bos=bos, eos="<end_of_utterance>")
    # 8x8 patches, and 2x2 tokens of 4x4 patches each.
    config = (SmolVLMConfig if is_smolvlm else Idefics3Config)(
        vision_config=_vision(patch_size=4),
        text_config=_text("llama", tokenizer),
        scale_factor=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    image = {**_NORMALIZED, "size": {"longest_edge": 48}, "max_image_size": {"longest_edge": IMAGE_SIZE}}
    shared = {"image_seq_len": 4, "chat_template": SMOLVLM_TURNS if is_smolvlm else _IDEFICS3_TURNS}
    if not is_smolvlm:
        return config, Idefics3Processor(Idefics3ImageProcessor(**image), tokenizer, **shared)
    video = SmolVLMVideoProcessor(
        **image, video_sampling={"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 40}}
    )
    return config, SmolVLMProcessor(SmolVLMImageProcessor(**image), tokenizer, video, **shared)


def _internvl(kind: str) -> tuple[Any, Any]:
    text = kind.partition(" on ")[2]
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named["video_token"] = "<video>"
    special = ["<|im_start|>", "<|im_end|>", *named.values()]
    # Tokenizers of InternLM begin each text with a token, and end it with another one than a turn.
    bos, eos = ("<s>", "</s>") if text == "llama" else ("<|im_start|>", "<|im_end|>")
    tokenizer = source_tokenizer(special, bos=bos, eos=eos, **named)
    # The published checkpoints have both names of the type.
    rope = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    config = InternVLConfig(
        vision_config=_vision(),
        text_config=_text(text or "qwen2", tokenizer, tie_word_embeddings=True, rope_scaling=rope),
        image_seq_length=4,
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    size = {**_NORMALIZED, "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(**size),
        tokenizer,
        InternVLVideoProcessor(**size),
        image_seq_length=4,
        chat_template=_CHATML_TURNS,
    )
    return config, processor


def _onevision(_: str) -> tuple[Any, Any]:
    special = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = source_tokenizer(special, bos="<|im_start|>", eos="<|im_end|>")
    # 5x5 patches, so that 3x3 tokens lie between them.
    config = LlavaOnevisionConfig(
        vision_config=_vision("siglip_vision_model", image_size=40, vision_use_head=False),
        text_config=_text("qwen2", tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[40, 40]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    size = {**_NORMALIZED, "size": {"height": 40, "width": 40}}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(**size, image_grid_pinpoints=[[40, 40]]),
        tokenizer,
        LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=_ONEVISION_TURNS,
    )
    return config, processor


def _llava(kind: str) -> tuple[Any, Any]:
    kind, _, text = kind.partition(" on ")
    has_video = kind == "llava_next_video"
    tokenizer = source_tokenizer(["<image>", *["<video>"] * has_video], bos="<s>", eos="</s>")
    kinds = {
        "vipllava": VipLlavaConfig,
        "llava": LlavaConfig,
        "llava_next": LlavaNextConfig,
        "llava_next_video": LlavaNextVideoConfig,
    }
    config = kinds[kind](
        vision_config=_vision("clip_vision_model"),
        text_config=_text(text or "llama", tokenizer),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        **({"video_token_index": tokenizer.convert_tokens_to_ids("<video>")} if has_video else {}),
        **({} if kind.endswith("llava") else {"image_grid_pinpoints": [[IMAGE_SIZE, 2 * IMAGE_SIZE]]}),
    )
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    size |= _NORMALIZED
    shared = {
        "patch_size": 8,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": _MISTRAL_TURNS if text == "mistral" else _VICUNA_TURNS,
    }
    if kind.endswith("llava"):
        return config, LlavaProcessor(CLIPImageProcessor(**size), tokenizer, **shared)
    image_processor = LlavaNextImageProcessor(**size, image_grid_pinpoints=[[IMAGE_SIZE, 2 * IMAGE_SIZE]])
    if not has_video:
        return config, LlavaNextProcessor(image_processor, tokenizer, **shared)
    return config, LlavaNextVideoProcessor(LlavaNextVideoVideoProcessor(**size), image_processor, tokenizer, **shared)


def _vision(model_type: str | None = None, **changes: Any) -> dict[str, Any]:
    fields = tiny_vision_config(**changes) | {"model_type": model_type}
    return {name: value for name, value in fields.items() if value is not None}


def _text(model_type: str, tokenizer: Any, **changes: Any) -> dict[str, Any]:
    # Published tables have more rows than the tokenizer has tokens.
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    changes = {"num_hidden_layers": 2, "vocab_size": len(tokenizer) + 3, **ids, **changes}
    return tiny_text_config(model_type, **changes)


_MAKERS = {"smolvlm": _idefics3, "idefics3": _idefics3, "internvl": _internvl, "llava_onevision": _onevision}


def save_source(kind: str, folder: Path, **changes: Any) -> tuple[PreTrainedModel, Any]:
    """
    Write a tiny vision-language model of Transformers with random weights, and its own processor.

    Args:
        kind (`str`): The model type: one of `SOURCES`, or "vipllava", which does not fit. "TYPE on TEXT" has another
            language model.
        folder (`Path`): Where to write.
        changes: Fields of the model's configuration, such as `spatial_pool_stride`.

    Returns:
        `tuple`: The model, in evaluation mode, and its processor.
    """
    config, processor = _MAKERS.get(kind.partition(" on ")[0], _llava)(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_scale = weight.dim() == 1 and name.endswith("weight")
            weight.normal_(1.0 if is_scale else 0.0, 0.2 if weight.dim() > 1 else 0.1)
    ends = processor.tokenizer.get_vocab().get("<|im_end|>", processor.tokenizer.eos_token_id)
    model.generation_config.eos_token_id = ends
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor
