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
"""A model from scratch: a configuration from a file, a tokenizer trained on what there is to say."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    set_seed,
)
from transformers.utils import logging

from videollm_mod import (
    VideoLLMMoDConfig,
    VideoLLMMoDForConditionalGeneration,
    VideoLLMMoDProcessor,
    VideoLLMMoDVideoProcessor,
)
from videollm_mod.train.data.shapes import (
    alignment_messages,
    make_clip,
    make_slides,
    narration_messages,
)


logger = logging.get_logger(__name__)

# As in Llama 3: words with the space before them, digits one by one, and punctuation with the newlines after it.
_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def new_model(
    config_file: str | Path, *, seed: int = 0, **changes: Any
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """
    An untrained model and its processor.

    Args:
        config_file (`str` or `Path`): JSON with `model`, fields of [`VideoLLMMoDConfig`] without token ids and
            vocabulary; `system_prompt`; and `vocab_size`, the most tokens its tokenizer may have.
        seed (`int`, *optional*, defaults to 0): Seed of the weights.
        changes: Fields of [`VideoLLMMoDConfig`] to set otherwise.
    """
    settings = json.loads(Path(config_file).read_text(encoding="utf-8"))
    fields = settings["model"] | changes
    image_size = fields["vision_config"]["image_size"]
    fields.setdefault("frame_token_pooled", None)
    grid = fields["frame_token_pooled"] or (0, 0)
    processor = VideoLLMMoDProcessor(
        VideoLLMMoDVideoProcessor(size={"height": image_size, "width": image_size}),
        new_tokenizer(settings["vocab_size"], settings["system_prompt"]),
        frame_num_tokens=int(fields.get("frame_token_cls", True)) + grid[0] * grid[1],
        system_prompt=settings["system_prompt"],
    )
    tokenizer = processor.tokenizer
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    # The frame token comes last and is never embedded or predicted: it needs no row.
    fields["text_config"] |= {"vocab_size": processor.frame_token_id, "pad_token_id": tokenizer.pad_token_id} | special
    config = VideoLLMMoDConfig(
        **fields, frame_token_id=processor.frame_token_id, frame_token_interval_id=processor.frame_token_interval_id
    )
    set_seed(seed)
    model = VideoLLMMoDForConditionalGeneration(config)
    model.generation_config = GenerationConfig(pad_token_id=tokenizer.pad_token_id, **special)
    return model, processor


def model_from_parts(
    vision_model: str, language_model: str, *, seed: int = 0, dtype: Any = None, **fields: Any
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """
    A model of a trained vision encoder and a trained language model; connector and routers are new.

    Args:
        vision_model (`str`): An image encoder, alone or with a text tower: a folder or a Hub id.
        language_model (`str`): A decoder-only language model: a folder or a Hub id.
        seed (`int`, *optional*, defaults to 0): Seed of the new weights.
        dtype (`torch.dtype`, *optional*): Of all weights; by default the language model's.
        fields: Of [`VideoLLMMoDConfig`], such as `mod_layers` or `frame_token_pooled`.
    """
    tokenizer = AutoTokenizer.from_pretrained(language_model)
    text = AutoModelForCausalLM.from_pretrained(language_model, dtype=dtype or "auto")
    vision_config = AutoConfig.from_pretrained(vision_model)
    vision_config = getattr(vision_config, "vision_config", vision_config)
    encoder = MODEL_MAPPING[type(vision_config)].from_pretrained(vision_model, config=vision_config, dtype=text.dtype)
    if getattr(vision_config, "image_size", None) is None:
        side = vision_config.patch_size * math.isqrt(vision_config.num_patches)
    else:
        side = vision_config.image_size
    pixels: dict[str, Any] = {"size": {"height": side, "width": side}}
    try:
        images = AutoImageProcessor.from_pretrained(vision_model)
        pixels |= {"image_mean": images.image_mean, "image_std": images.image_std}
    except OSError:
        logger.warning(f"'{vision_model}' has no image processor: pixels are normalised to [-1, 1].")
    fields = {name: value for name, value in fields.items() if value is not None}
    defaults = VideoLLMMoDConfig(text_config=text.config, vision_config=vision_config, **fields)
    processor = VideoLLMMoDProcessor(
        VideoLLMMoDVideoProcessor(**pixels), tokenizer, frame_num_tokens=defaults.frame_num_tokens
    )
    config = VideoLLMMoDConfig(
        text_config=text.config,
        vision_config=vision_config,
        frame_token_id=processor.frame_token_id,
        frame_token_interval_id=processor.frame_token_interval_id,
        **fields,
    )
    set_seed(seed)
    model = VideoLLMMoDForConditionalGeneration._from_config(config, dtype=text.dtype)
    model.model.routers.float()
    model.model.vision_encoder.load_state_dict(encoder.state_dict())
    model.model.language_model.load_state_dict(text.base_model.state_dict())
    model.lm_head.load_state_dict(text.get_output_embeddings().state_dict())
    model.generation_config = text.generation_config
    return model, processor


def new_tokenizer(vocab_size: int, system_prompt: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE in which the words of the generated world are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def texts() -> Iterator[str]:
        for seed in range(300):
            yield f"{system_prompt}\n\nUser: \nAssistant: ]\n[\n]\nUser:"
            messages = narration_messages(make_clip(seed)) + alignment_messages(make_slides(seed))
            yield from (f": {message['content']}" for message in messages)

    tokenizer.train_from_iterator(texts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        padding_side="left",
        model_max_length=4096,
    )
