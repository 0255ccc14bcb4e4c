# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Teacher forcing: LIVE's measures equal what its code prints, and the watched frames follow a cut cache."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import IMAGE_SIZE, SCHEMES, random_features, random_frames, tiny_config, tiny_model, tiny_processor
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from turns import turn_model, turn_processor

from videollm_mod import VideoLLMMoDProcessor, VideoLLMMoDVideoProcessor
from videollm_mod.train import teacher_forcing
from videollm_mod.train.teacher_forcing import Turn, predict_tokens, predict_turns, score_turns


DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "live_measures.json").read_text())
VOCAB, INTERVAL, REPLY, EOS, FRAME = (CASES[name] for name in ("vocab", "interval", "resp", "eos", "v"))
QUESTIONS = json.loads((DATA / "live_measures_of_questions.json").read_text())["cases"]
# At which of the further frames the model speaks; the names of the cases say it.
SPEAKS_LATE = {"late_turn1_first_extra": 0, "late_turn1_third_extra": 2}


def read_case(name):
    """Return a case in the format of those with questions."""
    if name in QUESTIONS:
        return QUESTIONS[name]
    case = CASES["cases"][name]
    calls = [
        {"past": call["past"], "ids": call["ids"], "frames": list(range(4, 4 + call["n_frames"]))}
        for call in case["extra_forward_calls"]
    ]
    return case | {"interval": INTERVAL, "speaks_late": SPEAKS_LATE.get(name), "extra_forward_calls": calls}


def case_processor(interval) -> VideoLLMMoDProcessor:
    """A processor with the token ids of the cases: 64 words, two tokens per frame."""
    special = {INTERVAL: ",", EOS: "</s>", FRAME: "<v>"}
    words = {special.get(index, f"w{index}"): index for index in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(",", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="w1")
    pixels = VideoLLMMoDVideoProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    options = {"frame_token_interval": None if interval is None else ","}
    return VideoLLMMoDProcessor(pixels, tokenizer, frame_num_tokens=CASES["tokens_per_frame"], **options)


class Scripted:
    """A tiny model with a real cache and head that predicts given tokens, and a record of what it sees later."""

    def __init__(self, case):
        interval, late = case["interval"], case["speaks_late"]
        self.table, self.calls = case["logit_table_argmax"], []
        self.later = [EOS if interval is None else interval] * 100
        if late is not None:
            per_frame = CASES["tokens_per_frame"] + (interval is not None)
            self.later[per_frame * (late + 1) - 1] = REPLY
        text = {"vocab_size": VOCAB, "hidden_size": VOCAB, "eos_token_id": EOS}
        ids = {"frame_token_id": FRAME, "frame_token_interval_id": interval}
        self.model = tiny_model(tiny_config(text_overrides=text, frame_token_pooled=[1, 1], mod_layers="all", **ids))
        with torch.no_grad():
            self.model.lm_head.weight.copy_(CASES["peak"] * torch.eye(VOCAB))
        self.model.model.register_forward_pre_hook(self.record, with_kwargs=True)
        self.model.model.register_forward_hook(self.predict, with_kwargs=True)

    def record(self, _module, _args, inputs):
        cache = inputs.get("cache")
        self.past = 0 if cache is None else int(cache.get_seq_length())
        if self.past:
            ids, frames = inputs["input_ids"][0].tolist(), inputs["frame_features"][0, :, 0, 0]
            self.calls.append({"past": self.past, "ids": ids, "frames": frames.int().tolist()})

    def predict(self, _module, _args, inputs, outputs):
        count = inputs["input_ids"].shape[1]
        tokens = self.later[:count] if self.past else self.table[:count]
        outputs.last_hidden_state = torch.nn.functional.one_hot(torch.tensor([tokens]), VOCAB).float()
        return outputs


@pytest.mark.parametrize("name", [*CASES["cases"], *QUESTIONS])
def test_the_measures_equal_what_lives_code_prints(name):
    case = read_case(name)
    scripted, ids = Scripted(case), torch.tensor([case["input_ids"]])
    labels = torch.tensor([[-100, *case["labels"][:-1]]])  # the model shifts labels itself
    # Each frame has its number as features.
    features = torch.arange(case["input_ids"].count(FRAME) // 2).float()[None, :, None, None]
    features = features.expand(-1, -1, *scripted.model.config.frame_feature_shape)
    batch = {"input_ids": ids, "labels": labels, "frame_features": features}
    options = {"fps": 1.0, "interval_threshold": case["threshold"]}
    turns = predict_tokens(scripted.model, case_processor(case["interval"]), batch, **options)
    assert scripted.calls == case["extra_forward_calls"]
    scores = score_turns([turns], fps=1.0)
    expected = {key: case[key] for key in ("lm_ppl", "fluency", "lm_correctness")} | {"time_diff": case["frame_diff"]}
    # LIVE computes in float32.
    assert {key: scores[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert score_turns([turns], fps=2.0)["time_diff"] == pytest.approx(case["frame_diff"] / 2)


def turn(speaks, labels, predictions, *, losses=None, is_decided=True, late=0):
    losses = [0.0] * len(labels) if losses is None else losses
    return Turn(losses, labels, predictions, speaks, is_decided, late)


EXACT = turn([False, False, True], [5, 6, 7, 2], [5, 6, 8, 2], losses=[0.0, 0.0, np.log(16.0), 0.0])
EARLY = turn([False, True, False, True], [5, 2], [5, 2])
LATE = turn([False, False, False], [5, 2], [5, 2], late=2)
ANSWER = turn([False, False], [4, 5, 2], [4, 5, 2], is_decided=False, late=1)
EARLY_ANSWER = turn([False, True], [4, 5, 2], [4, 5, 2], is_decided=False)
ONLY_TEXT = turn([], [4, 2], [3, 2], is_decided=False)


def test_the_measures_equal_values_computed_by_hand():
    scores = score_turns([[EXACT, EARLY, LATE], [ANSWER, EARLY_ANSWER, ONLY_TEXT], []], fps=2.0)
    # The first turn has a mean loss of log(16) / 4, so a perplexity of 2. A dialogue without turns counts 1, 0, 1, 1.
    assert scores["lm_ppl"] == pytest.approx(((2 + 1 + 1) / 3 + 1 + 1) / 3, rel=1e-5)
    assert scores["lm_correctness"] == pytest.approx(((2 / 4 + 1 + 1) / 3 + (1 + 1 + 0) / 3 + 1) / 3)
    # In frames: exact, 2 early, 2 late; one late, exact. Text without frames has no time.
    assert scores["time_diff"] == pytest.approx(((0 + 2 + 2) / 3 + (1 + 0) / 2 + 0) / 3 / 2)
    first = ((3 + 2) / (3 + 4) + (4 - 2) / (4 + 2) + (3 - 1) / (3 + 2)) / 3
    assert scores["fluency"] == pytest.approx((first + ((2 - 1) / (2 + 3) + 1) / 2 + 1) / 3)
    # The answer is in time, as the model is silent before it. The other one is a frame early.
    assert scores["reply_delay"] == pytest.approx(((0 + 2 + 2) / 3 + (0 + 1) / 2 + 0) / 3 / 2)
    assert scores["reply_fluency"] == pytest.approx((first + (1 + (2 - 1) / (2 + 3)) / 2 + 1) / 3)


def dialogue(frames, *replies, questions=(), start=0.0):
    messages = [{"role": "assistant", "content": text, "time": time} for time, text in replies]
    messages += [{"role": "user", "content": text, "time": time} for time, text in questions]
    order = {"user": 0, "assistant": 1}
    messages.sort(key=lambda message: (message["time"], order[message["role"]]))
    return {"video": random_frames(frames, seed=frames), "messages": messages, "start": start}


DIALOGUES = [
    dialogue(9, (1.0, "A red ball enters."), (3.0, "It leaves.")),
    dialogue(6, (2.0, "The square."), questions=[(1.5, "Where is it?")]),
    dialogue(5, (1.0, "It is red."), (2.0, "It leaves."), questions=[(1.0, "Which color?")]),
]


@pytest.mark.parametrize("close_is_one_token", [True, False])
def test_turns_match_the_dialogue(close_is_one_token):
    processor = tiny_processor(close_is_one_token=close_is_one_token)
    ids = {name: getattr(processor, name) for name in ("frame_token_id", "frame_token_interval_id")}
    vocabulary = {"vocab_size": len(processor.tokenizer) - 1}
    model = tiny_model(mod_layers="all", text_overrides=vocabulary, **ids)
    turns = [predict_turns(model, processor, example) for example in DIALOGUES]
    texts = [[processor.tokenizer.decode(t.labels).removeprefix("\n") for t in row] for row in turns]
    assert texts == [
        ["Assistant: A red ball enters.</s>", "Assistant: It leaves.</s>"],
        ["Assistant: The square.</s>"],
        ["Assistant: It is red.</s>", "Assistant: It leaves.</s>"],
    ]
    assert [[t.is_decided for t in row] for row in turns] == [[True, True], [True], [False, True]]
    # In the second dialogue, the question at 1.5 s replaces that frame's decision, and the frame at 2.0 s decides.
    assert [[len(t.speaks) for t in row] for row in turns] == [[3, 4], [4], [2, 2]]
    assert [[t.num_frames for t in row] for row in turns] == [[3, 4], [5], [3, 2]]


def test_losses_equal_the_loss_of_the_model(monkeypatch):
    """Also if few rows of logits and few frames are in memory at a time."""
    monkeypatch.setattr(teacher_forcing, "_NUM_LOGITS", 5)
    monkeypatch.setattr(teacher_forcing, "_NUM_FRAMES", 4)
    processor, model = tiny_processor(), tiny_model()
    sizes = {"head": [], "encoder": []}
    model.lm_head.register_forward_hook(lambda _module, args, _out: sizes["head"].append(len(args[0])))
    encoder = model.model.vision_encoder
    encoder.register_forward_hook(lambda _module, args, _out: sizes["encoder"].append(len(args[0])))
    monkeypatch.setattr(type(model), "should_speak", lambda _self, logits, _threshold: 2 * [logits[:, 0] < torch.inf])
    turns = predict_turns(model, processor, DIALOGUES[0])
    assert max(sizes["head"]) == 5 and sizes["encoder"] == [4, 4, 1]
    batch = processor(DIALOGUES[0]["messages"], DIALOGUES[0]["video"], return_labels=True)
    logits = model(**{k: v for k, v in batch.items() if k not in ("labels", "attention_mask")}).logits[0]
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    places = [i for i in range(1, len(labels)) if labels[i] >= 0 and ids[i - 1] != model.config.frame_token_id]
    losses = [torch.nn.functional.cross_entropy(logits[i - 1], labels[i]).item() for i in places]
    np.testing.assert_allclose([loss for t in turns for loss in t.losses], losses, rtol=1e-3)


@pytest.fixture
def watching(monkeypatch):
    """Return the logits that each model decides from, while it stays silent, except at a further frame."""

    def watch(model, late=-1):
        seen = []

        def should_speak(_model, logits, _threshold=None):
            further = sum(map(len, seen[1:]))
            speaks = (torch.arange(len(logits)) + further == late) & bool(seen)
            seen.append(logits.clone())
            return speaks, speaks

        monkeypatch.setattr(type(model), "should_speak", should_speak)
        return seen

    return watch


def frame_ends(model, ids):
    per_frame = model.config.frame_num_tokens
    return [i for i, token in enumerate(ids) if token == model.config.frame_token_id][per_frame - 1 :: per_frame]


def logits_of(model, ids, features):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), frame_features=features, num_frames=[features.shape[1]]).logits[0]


@pytest.mark.parametrize("scheme", ["interleaved", "all", "all_deep", "change"])
def test_a_silent_model_watches_on_from_a_cut_cache(scheme, watching):
    """
    The watched frames follow the last stream position, as if nothing were between them.

    For this, the cache of each routed layer must be cut to its own length, and again for the turn before.
    """
    processor, model = tiny_processor(), tiny_model(**SCHEMES[scheme])
    # A reply, a question that is answered at once, and two replies.
    replies = ((2.0, "A red ball enters."), (4.0, "Red."), (6.0, "It leaves."), (7.5, "Red."))
    example = dialogue(17, *replies, questions=[(4.0, "Which color?")])
    seen = watching(model)
    turns = predict_turns(model, processor, example)
    assert [len(t.speaks) for t in turns] == [5, 3, 4, 3] and [t.num_frames for t in turns] == [5, 4, 4, 3]
    assert [t.late for t in turns] == [4, 3, 3, 0], "min(next turn, this turn - 1) frames, none for the last turn"
    assert [t.frame_diff for t in turns] == [-4, -3, -3, 0] and [t.reply_diff for t in turns] == [-4, 0, -3, 0]

    ids = processor(example["messages"], example["video"])["input_ids"][0].tolist()
    features = model.model.encode_frames(processor(example["messages"], example["video"])["pixel_values_videos"])
    between = [model.config.frame_token_interval_id] + [model.config.frame_token_id] * model.config.frame_num_tokens
    # The frames up to the last decision, and the first and the number of those after the turn.
    ends = frame_ends(model, ids)
    # The last turn is watched first.
    for logits, seen_frames, first, count in zip(seen[:0:-1], (5, 8, 13), (5, 9, 13), (4, 3, 3), strict=True):
        told = ids[: ends[seen_frames - 1] + 1] + between * count
        shown = torch.cat([features[:, :seen_frames], features[:, first : first + count]], dim=1)
        expected = logits_of(model, told, shown)[frame_ends(model, told)[-count:]]
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("watched_together", [32, 2])
def test_the_delay_counts_the_frames_until_the_model_speaks(watching, monkeypatch, watched_together):
    monkeypatch.setattr(teacher_forcing, "_NUM_WATCHED", watched_together)
    processor, model = tiny_processor(), tiny_model(mod_layers="all")
    example = dialogue(20, (4.0, "A red ball enters."), (8.0, "It leaves."))
    seen = watching(model, late=3)
    turns = predict_turns(model, processor, example)
    assert [t.late for t in turns] == [4, 0]
    # Eight frames could be watched. No more are watched than those together with the one at which the model speaks.
    assert [len(logits) for logits in seen[1:]] == ([8] if watched_together == 32 else [2, 2])


@pytest.mark.parametrize("name", ["smolvlm", "internvl"])
def test_frames_that_are_watched_have_their_own_times_and_numbers(name, watching):
    processor = turn_processor(name)
    model = turn_model(processor, mod_layers="all")
    watching(model)
    seen = []
    model.register_forward_pre_hook(lambda _model, _args, given: seen.append(given["input_ids"][0]), with_kwargs=True)
    example = dialogue(8, (61.0, "A ball."), (63.0, "It leaves."), start=60.0)
    turns = predict_turns(model, processor, example)
    assert [t.late for t in turns] == [2, 0] and len(seen) == 1
    texts = {"smolvlm": ["Frame from 01:01:", "Frame from 01:02:"], "internvl": ["Frame4:", "Frame5:"]}[name]
    assert re.findall(r"Frame.*?:(?=[ <])", processor.tokenizer.decode(seen[0])) == texts


def stream_turns(*turns):
    """A dialogue of stream turns, each a number of frames and what follows them."""
    messages = []
    for frames, *following in turns:
        messages += [{"role": "stream", "num_frames": frames}, *following]
    return messages


def reply(content, **options):
    return {"role": "assistant", "content": content, **options}


def predict(model, processor, messages):
    """The turns of a dialogue of stream turns."""
    frames = sum(message.get("num_frames", 0) for message in messages)
    features = random_features(model.config, frames)
    batch = processor(messages, frame_features=features[0], return_labels=True)
    return predict_tokens(model, processor, batch)


def test_a_reply_that_is_not_learned_ends_a_turn(watching):
    processor, model = tiny_processor(), tiny_model(mod_layers="all")
    watching(model)
    unlearned = {"role": "stream", "num_frames": 2, "learn": False}
    messages = [*stream_turns((4, reply("A."))), unlearned, reply("B.", learn=False), *stream_turns((6, reply("C.")))]
    turns = predict(model, processor, messages)
    assert [len(t.speaks) for t in turns] == [4, 6] and [t.frames_seen for t in turns] == [4, 12]
    assert turns[0].late == 2, "The turn that is left out still limits how many frames are watched."


def test_silence_without_an_interval_token_is_end_of_sequence(watching):
    """There the end of sequence is the target of silence, and ends replies. Only as an input it ends turns."""
    processor = tiny_processor(frame_token_interval=None)
    text = {"vocab_size": len(processor.tokenizer)}
    ids = {"frame_token_id": processor.frame_token_id, "frame_token_interval_id": None}
    model = tiny_model(mod_layers="all", text_overrides=text, **ids)
    seen = watching(model)
    turns = predict(model, processor, stream_turns((4, reply("A.")), (3, reply("B."))))
    assert [len(t.speaks) for t in turns] == [4, 3] and [t.is_decided for t in turns] == [True, True]
    assert [processor.tokenizer.decode(t.labels) for t in turns] == ["Assistant: A.</s>", "Assistant: B.</s>"]
    assert [t.late for t in turns] == [3, 0] and len(seen[1]) == 3


@pytest.mark.parametrize("name", ["chatml", "llama3", "llava_onevision", "smolvlm", "internvl"])
def test_turns_in_a_stream_format_are_those_of_the_default_one(name, watching):
    """There the token that ends a reply may also end the user's turn, and a decision may come after a frame's text."""
    processor = turn_processor(name)
    model = turn_model(processor, mod_layers="all")
    watching(model)
    example = dialogue(10, (1.0, "A ball."), (2.5, "Red."), (4.0, "It leaves."), questions=[(2.5, "Which color?")])
    turns = predict_turns(model, processor, example)
    texts = [processor.tokenizer.decode(t.labels) for t in turns]
    replies = ("A ball.", "Red.", "It leaves.")
    for text, said in zip(texts, replies, strict=True):
        assert text.endswith(said + processor.tokenizer.eos_token) and sum(reply in text for reply in replies) == 1
    assert [len(t.speaks) for t in turns] == [3, 2, 3] and [t.num_frames for t in turns] == [3, 3, 3]
    assert [t.is_decided for t in turns] == [True, False, True] and [t.late for t in turns] == [2, 2, 0]
