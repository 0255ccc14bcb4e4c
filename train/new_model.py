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
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, set_seed

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


# As in Llama 3: words with the space before them, digits one by one, and punctuation with the newlines after it.
_PATTERN = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def new_model(
    config_file: str | Path, *, seed: int = 0
) -> tuple[VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor]:
    """
    An untrained model and its processor.

    Args:
        config_file (`str` or `Path`): JSON with `model`, fields of [`VideoLLMMoDConfig`] without token ids and
            vocabulary; `system_prompt`; and `vocab_size`, the most tokens its tokenizer may have.
        seed (`int`, *optional*, defaults to 0): Seed of the weights.
    """
    settings = json.loads(Path(config_file).read_text(encoding="utf-8"))
    fields = settings["model"]
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
