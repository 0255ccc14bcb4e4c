# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tiny processors and models of the stream formats in turns."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny import IMAGE_SIZE, random_frames, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import AddedToken

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor, VideoLLMMoDVideoProcessor
from videollm_mod.stream_format_videollm_mod import STREAM_FORMATS


# The special tokens of each format.
SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "llava_onevision": ["<|im_start|>", "<|im_end|>", "<image_newline>"],
    "smolvlm": ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"],
    "internvl": ["<|im_start|>", "<|im_end|>", "<img>", "</img>"],
}


def turn_processor(name: str, *, special: bool = True, **options: Any) -> VideoLLMMoDProcessor:
    """A processor for tiny models whose tokenizer has the tokens of a format, which may not be marked as special."""
    tokenizer = tiny_tokenizer()
    tokens = [AddedToken(token, special=special, normalized=False) for token in SPECIAL[name]]
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.eos_token = STREAM_FORMATS[name]["assistant_end"]
    pixels = VideoLLMMoDVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return VideoLLMMoDProcessor(pixels, tokenizer, stream_format=name, **options)


def turn_model(processor: VideoLLMMoDProcessor, **options: Any) -> VideoLLMMoDForConditionalGeneration:
    """A tiny model for the tokens of such a processor. It is silent at most frames."""
    text = {"vocab_size": len(processor.tokenizer), "eos_token_id": processor.end_of_reply_id}
    text |= options.pop("text_overrides", {})
    ids = {name: getattr(processor, name) for name in ("frame_token_id", "frame_token_interval_id")}
    model = tiny_model(tiny_config(text_overrides=text, **ids, **options))
    model.generation_config.eos_token_id = processor.end_of_reply_id
    seen: list[torch.Tensor] = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1]))
    model.stream(processor, max_new_tokens=1).push(random_frames(20))
    hook.remove()
    mean = torch.stack(seen).mean(dim=0)
    silence = processor.frame_token_interval_id or processor.end_of_reply_id
    with torch.no_grad():
        model.lm_head.weight[silence] = 20 * mean / mean.norm() ** 2
    return model


@dataclass
class Fed:
    """What a session gave its model and kept in its cache, by token and by frame."""

    ids: list[int] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    features: list[torch.Tensor] = field(default_factory=list)


@contextmanager
def recording(model: VideoLLMMoDForConditionalGeneration) -> Iterator[Fed]:
    """Record the tokens, logits and frames of a session that runs meanwhile and does not evict any."""
    fed, forward = Fed(), model.forward

    def record(
        input_ids: Any = None, cache: Any = None, frame_features: Any = None, logits_to_keep: Any = 0, **options: Any
    ) -> Any:
        seen = int(cache.get_seq_length())
        gone = fed.ids[seen:].count(model.config.frame_token_id) // model.config.frame_num_tokens
        del fed.ids[seen:], fed.logits[seen:], fed.features[len(fed.features) - gone :]
        outputs = forward(input_ids, cache=cache, frame_features=frame_features, **options)
        fed.ids.extend(input_ids[0].tolist())
        fed.logits.extend(outputs.logits[0])
        fed.features.extend([] if frame_features is None else frame_features[0])
        outputs.logits = outputs.logits[:, logits_to_keep]
        return outputs

    model.forward = record
    try:
        yield fed
    finally:
        del model.forward
