# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Stream formats in turns: texts of dialogues, tokens of sessions, special tokens in text of others, and labels."""

import json
import random

import pytest
from tiny import IMAGE_SIZE, random_frames, tiny_config, tiny_model, tiny_tokenizer
from tokenizers import AddedToken
from transformers import AutoProcessor

from videollm_mod import VideoLLMMoDProcessor, VideoLLMMoDVideoProcessor
from videollm_mod.stream_format_videollm_mod import STREAM_FORMATS


SPECIAL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "llava_onevision": ["<|im_start|>", "<|im_end|>", "<image_newline>"],
    "smolvlm": ["<|im_start|>", "<end_of_utterance>", "<fake_token_around_image>", "<global-img>"],
    "internvl": ["<|im_start|>", "<|im_end|>", "<img>", "</img>"],
}
# The text of DIALOGUE in each format, with # for the tokens of a frame.
TEXTS = {
    "chatml": (
        "<|im_start|>system\nWatch.<|im_end|>\n"
        "<|im_start|>user\n#\n#\nWhat?\nAnd where?<|im_end|>\n"
        "<|im_start|>assistant\nA ball.<|im_end|>\n"
        "<|im_start|>user\n#<|im_end|>\n"
        "<|im_start|>assistant\nIt leaves.<|im_end|>\n"
        "<|im_start|>user\nTell me.\n#"
    ),
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nWatch.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n#\n#\nWhat?\nAnd where?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA ball.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n#<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nIt leaves.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nTell me.\n#"
    ),
    "llava_onevision": (
        "<|im_start|>system \nWatch.<|im_end|>"
        "<|im_start|>user ##<image_newline>\nWhat?\nAnd where?<|im_end|>"
        "<|im_start|>assistant\nA ball.<|im_end|>"
        "<|im_start|>user #<image_newline><|im_end|>"
        "<|im_start|>assistant\nIt leaves.<|im_end|>"
        "<|im_start|>user \nTell me.\n#"
    ),
    "smolvlm": (
        "<|im_start|>System: Watch.<end_of_utterance>\n"
        "User: You are provided the following series of frames from a video.\n"
        "\nFrame from 00:00:<fake_token_around_image><global-img>#<fake_token_around_image>"
        "\nFrame from 00:59:<fake_token_around_image><global-img>#<fake_token_around_image>"
        "\n\nWhat?\nAnd where?<end_of_utterance>\n"
        "Assistant: A ball.<end_of_utterance>\n"
        "User: \nFrame from 01:00:<fake_token_around_image><global-img>#<fake_token_around_image><end_of_utterance>\n"
        "Assistant: It leaves.<end_of_utterance>\n"
        "User: Tell me.\n\nFrame from 100:01:<fake_token_around_image><global-img>#<fake_token_around_image>"
    ),
    "internvl": (
        "<|im_start|>system\nWatch.<|im_end|>\n"
        "<|im_start|>user\nFrame1: <img>#</img>\nFrame2: <img>#</img>\nWhat?\nAnd where?<|im_end|>\n"
        "<|im_start|>assistant\nA ball.<|im_end|>\n"
        "<|im_start|>user\nFrame3: <img>#</img><|im_end|>\n"
        "<|im_start|>assistant\nIt leaves.<|im_end|>\n"
        "<|im_start|>user\nTell me.\nFrame4: <img>#</img>"
    ),
}
DIALOGUE = [
    {"role": "system", "content": "Watch."},
    {"role": "stream", "num_frames": 2, "times": [0.0, 59.9]},
    {"role": "user", "content": "What?"},
    {"role": "user", "content": "And where?"},
    {"role": "assistant", "content": "A ball."},
    {"role": "stream", "num_frames": 1, "times": [60.0]},
    {"role": "assistant", "content": "It leaves."},
    {"role": "user", "content": "Tell me."},
    {"role": "stream", "num_frames": 1, "times": [6001.0]},
]


def turn_processor(name, *, special=True, **options):
    """Return a tiny processor whose tokenizer has the special tokens of a format."""
    tokenizer = tiny_tokenizer()
    tokens = [AddedToken(token, special=special, normalized=False) for token in SPECIAL[name]]
    tokenizer.add_tokens(tokens, special_tokens=special)
    tokenizer.eos_token = STREAM_FORMATS[name]["assistant_end"]
    pixels = VideoLLMMoDVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return VideoLLMMoDProcessor(pixels, tokenizer, stream_format=name, **options)


def turn_model(processor, **options):
    """Return a tiny model for the tokens of such a processor."""
    text = {"vocab_size": len(processor.tokenizer), "eos_token_id": processor.end_of_reply_id}
    ids = {name: getattr(processor, name) for name in ("frame_token_id", "frame_token_interval_id")}
    model = tiny_model(tiny_config(text_overrides=text, **ids, **options))
    model.generation_config.eos_token_id = processor.end_of_reply_id
    return model


@pytest.fixture(params=STREAM_FORMATS)
def name(request):
    return request.param


# ------------------------------------------------------------------------------------------------------------- texts


def test_a_dialogue_as_text(name):
    processor = turn_processor(name)
    text = processor.apply_chat_template(DIALOGUE)
    assert text.replace("<v>" * 10, "#") == TEXTS[name]
    own = processor.tokenizer.apply_chat_template(
        DIALOGUE, tokenize=False, frame_token="<v>", frame_num_tokens=processor.frame_num_tokens
    )
    assert own == text


def test_a_saved_format_loads_again(name, tmp_path):
    processor = turn_processor(name)
    processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["stream_format"] == STREAM_FORMATS[name]
    loaded = AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.stream_format == STREAM_FORMATS[name]
    assert loaded.apply_chat_template(DIALOGUE) == processor.apply_chat_template(DIALOGUE)
    assert loaded.frame_token_interval_id == processor.frame_token_interval_id


def pieces(processor, dialogue):
    """Return the tokens of a dialogue as a session feeds them: between frames and replies, frames, and replies."""
    ids, turns, is_open, index = [], [], False, 0
    for message in dialogue:
        if message["role"] == "stream":
            for time in message["times"]:
                index += 1
                ids += processor.encode_turns(turns, stream_open=is_open, then="stream", time=time, index=index)
                ids += [processor.frame_token_id] * processor.frame_num_tokens
                ids += processor.encode_frame(time, index)[1]
                turns, is_open = [], True
        elif message["role"] == "assistant":
            ids += processor.encode_turns(turns, stream_open=is_open, then="assistant")
            space = " " if processor.stream_format["assistant_before"].endswith(" ") else ""
            ids += processor.tokenizer.encode(space + message["content"], add_special_tokens=False)
            ids.append(processor.end_of_reply_id)
            turns, is_open = [], False
        else:
            turns.append(message)
    return ids


def random_dialogue(draw):
    """Return a dialogue of runs of frames, questions and replies in any order, which ends with frames or a reply."""
    dialogue, time = [{"role": "system", "content": draw.choice(["", "Watch.", "Two\nlines.\n"])}], 0.0
    for _ in range(draw.randint(2, 8)):
        role = draw.choice(["user", "assistant", "stream"])
        if role == "stream":
            times = [time := time + draw.random() * 40 for _ in range(draw.randint(1, 3))]
            dialogue.append({"role": role, "num_frames": len(times), "times": times})
        else:
            dialogue.append({"role": role, "content": draw.choice(["What?", "A red ball.", "\nAgain\n", "No: 3, 4"])})
    return [*dialogue, {"role": "assistant", "content": "The ball leaves."}]


@pytest.mark.parametrize("seed", range(4))
def test_a_session_feeds_the_tokens_of_the_rendered_dialogue(name, seed):
    processor, draw = turn_processor(name), random.Random(seed)
    for _ in range(5):
        dialogue = random_dialogue(draw)
        count = sum(message.get("num_frames", 0) for message in dialogue)
        rendered = processor(dialogue, random_frames(count) if count else None)["input_ids"][0].tolist()
        assert pieces(processor, dialogue) == rendered, dialogue
