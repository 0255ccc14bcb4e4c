# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Stream formats in turns: texts of dialogues, tokens of sessions, special tokens in text of others, and labels."""

import json
import random

import pytest
import torch
from engines import said
from jinja2 import UndefinedError
from tiny import SCHEMES, random_frames, tiny_processor, training_batch
from torch.testing import assert_close
from transformers import AutoProcessor, AutoTokenizer
from turns import SPECIAL, recording, turn_model, turn_processor

from videollm_mod import VideoLLMMoDProcessor
from videollm_mod.serving import StreamingEngine
from videollm_mod.stream_format_videollm_mod import STREAM_FORMATS
from videollm_mod.train.collator import StreamCollator


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


@pytest.mark.parametrize("name", [None, *TEXTS])
def test_the_tokenizer_alone_renders_chats_of_text(name, tmp_path):
    """DPO and other text tools load the tokenizer without the processor. Frames raise an error there."""
    processor = tiny_processor() if name is None else turn_processor(name)
    processor.save_pretrained(tmp_path)
    tokenizer, text = AutoTokenizer.from_pretrained(tmp_path), [DIALOGUE[0], *DIALOGUE[2:5]]
    rendered = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
    assert rendered == processor.apply_chat_template(text, add_generation_prompt=True)
    with pytest.raises(UndefinedError, match="frame_token"):
        tokenizer.apply_chat_template(DIALOGUE, tokenize=False)


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


def test_a_template_of_another_kind_is_refused(tmp_path):
    """A checkpoint's template stays when `stream_format` is overridden, and would write other turns."""
    processor = turn_processor("chatml")
    for stream_format, other in (("chatml", None), (None, "chatml")):
        folder = tmp_path / str(stream_format)
        parts = (processor.video_processor, processor.tokenizer)
        VideoLLMMoDProcessor(*parts, stream_format=stream_format).save_pretrained(folder)
        with pytest.raises(ValueError, match="`chat_template` and `stream_format` do not fit"):
            AutoProcessor.from_pretrained(folder, trust_remote_code=True, stream_format=other)


@pytest.mark.parametrize(
    ("stream_format", "message"),
    [
        ("chatlm", "'chatlm' is unknown; known formats are .*chatml"),
        (["chatml"], "must be a name, or a dict of texts by part, got list"),
        ({"assistant_end": "<|im_end|>", "user": ""}, "unknown parts user; known are .*user_after"),
        ({"assistant_end": "<|im_end|>", "user_after": 3}, "must have texts as parts; user_after is none"),
        ({"user_after": ""}, "needs `assistant_end`, the special token that ends a reply"),
        ({"assistant_end": "."}, "`assistant_end` '.' is not a special token"),
        ({"assistant_end": "<|im_end|>", "frame_after": "<|im_end|>\n"}, "must end with a special token"),
    ],
)
def test_a_format_that_cannot_be_written_is_refused(stream_format, message):
    processor = turn_processor("chatml")
    with pytest.raises(ValueError, match=message):
        VideoLLMMoDProcessor(processor.video_processor, processor.tokenizer, stream_format=stream_format)


def test_a_format_with_times_needs_them():
    message = "Message 1 has no `times`, which this stream format writes: one per frame"
    with pytest.raises(ValueError, match=message):
        turn_processor("smolvlm").apply_chat_template(
            [{"role": "system", "content": "Watch."}, {"role": "stream", "num_frames": 2}]
        )


@pytest.mark.parametrize("name", STREAM_FORMATS)
def test_the_placeholder_of_a_video_becomes_its_frames(name):
    processor, frames = turn_processor(name), random_frames(3)
    asked = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    for options in ({"fps": 0.5}, {"fps": 2.0}, {"fps": 1, "start": 60}):
        text = processor.apply_chat_template(asked, add_generation_prompt=True)
        expected = processor(asked, frames, add_generation_prompt=True, **options)
        assert text.count(processor.frame_token) == 1
        assert torch.equal(processor(text=text, videos=frames, **options)["input_ids"], expected["input_ids"])


def test_a_format_is_its_texts():
    """A part that is left out is empty."""
    processor = turn_processor("chatml")
    texts = {part: text for part, text in STREAM_FORMATS["chatml"].items() if text}
    same = VideoLLMMoDProcessor(processor.video_processor, processor.tokenizer, stream_format=texts)
    assert same.apply_chat_template(DIALOGUE, tokenize=True) == processor.apply_chat_template(DIALOGUE, tokenize=True)
    assert same.stream_format == processor.stream_format


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


# ---------------------------------------------------------------------------------------------------------- sessions


def watch(model, processor, chunk_frames=1):
    """Watch with questions, also two in a row and one between frames; return the session and what it fed."""
    with recording(model) as fed:
        session = model.stream(processor, chunk_frames=chunk_frames, max_new_tokens=4)
        session.ask("Narrate.", reply_now=False)
        session.push(random_frames(5))
        session.ask("What?")
        session.ask("Where?")
        session.push(random_frames(8, seed=1))
        session.ask("And now?", time=session.time + 1.0)
        session.push(random_frames(5, seed=2))
    return session, fed


@pytest.mark.parametrize("scheme", ["full", "interleaved"])
def test_streamed_chunked_served_and_in_one_forward(name, scheme):
    processor = turn_processor(name)
    model = turn_model(processor, **SCHEMES[scheme])
    session, fed = watch(model, processor)
    assert session.num_frames == 18 and 3 <= sum(event.role == "assistant" for event in session) < 12
    with torch.no_grad():
        whole = model(input_ids=torch.tensor([fed.ids]), frame_features=torch.stack(fed.features)[None]).logits[0]
    assert_close(torch.stack(fed.logits), whole, atol=2e-5, rtol=1e-4)
    chunked, again = watch(model, processor, chunk_frames=4)
    assert again.ids == fed.ids and said(chunked.events) == said(session.events)
    assert chunked.cache.lengths == session.cache.lengths
    shown = processor.tokenizer.decode(fed.ids).replace("<v>" * 10, "#")
    assert shown.count("#") == 18 and shown.count("#" + processor.stream_format["frame_after"]) == 18
    if processor.numbers_frames:
        assert ("Frame18: <img>#" if name == "internvl" else "\nFrame from 00:08:") in shown
    for options in ({}, {"capture": True}):
        engine = StreamingEngine(model, processor, max_streams=2, max_frames=20, max_text_tokens=600, **options)
        stream = engine.open(chunk_frames=4, max_new_tokens=4)
        stream.ask("Narrate.", reply_now=False)
        stream.push(random_frames(5))
        engine.run()
        stream.ask("What?")
        stream.ask("Where?")
        engine.run()
        stream.push(random_frames(8, seed=1))
        engine.run()
        stream.ask("And now?", time=stream.session.time + 1.0)
        stream.push(random_frames(5, seed=2))
        engine.run()
        assert said(stream.events) == said(session.events), options


@pytest.mark.parametrize("sink_frames", [0, 2])
def test_after_evictions_the_text_of_each_frame_that_stays_is_whole(name, sink_frames):
    """With one layer the cache after evictions equals that of the tokens that stay."""
    processor = turn_processor(name)
    model = turn_model(processor, text_overrides={"num_hidden_layers": 1}, mod_layers="all")
    held, features = [], []
    forward, evict = model.forward, model.evict_tokens
    per_frame, frame_id = model.config.frame_num_tokens, model.config.frame_token_id

    def fed(input_ids=None, cache=None, frame_features=None, **kwargs):
        gone = [token for token, _ in held[int(cache.get_seq_length()) :]].count(frame_id) // per_frame
        del held[int(cache.get_seq_length()) :], features[len(features) - gone :]
        shown = len(features)
        features.extend([] if frame_features is None else frame_features[0])
        for token in input_ids[0].tolist():
            held.append((token, shown // per_frame if token == frame_id else None))
        return forward(input_ids, cache=cache, frame_features=frame_features, **kwargs)

    def evicted(cache, runs):
        keep = [run.stays for run in runs for _ in range(run.num_tokens)]
        places = [place for place, (token, _) in enumerate(held) if token == frame_id][::per_frame]
        features[:] = [frame for frame, place in zip(features, places, strict=True) if keep[place]]
        held[:] = [token for token, stays in zip(held, keep, strict=True) if stays]
        evict(cache, runs)

    model.forward, model.evict_tokens = fed, evicted
    session = model.stream(processor, max_frames=8, sink_frames=sink_frames, chunk_frames=2, max_new_tokens=2)
    for index, frame in enumerate(random_frames(30)):
        session.push(frame)
        if index % 7 == 3:
            session.ask("What?")
    model.forward = forward
    ids = torch.tensor([[token for token, _ in held]])
    text = processor.tokenizer.decode(ids[0]).replace("<v>" * 10, "#")
    assert text.count("#") == session.num_remembered == len(features) <= 8 and session.num_frames == 30
    own = processor.stream_format["frame_before"] + processor.stream_format["frame_after"]
    assert all(text.count(token) == own.count(token) * len(features) for token in SPECIAL[name] if token in own)
    with torch.no_grad():
        expected = model.new_cache()
        model(input_ids=ids, frame_features=torch.stack(features)[None], cache=expected)
        assert session.cache.lengths == expected.lengths
        logits = [model(input_ids=torch.tensor([[7]]), cache=c).logits for c in (session.cache, expected)]
    assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


def test_a_forked_session_numbers_frames_as_its_twin():
    processor = turn_processor("internvl")
    model = turn_model(processor)
    session = model.stream(processor, max_new_tokens=2)
    session.push(random_frames(3))
    twin = session.fork()
    for stream in (session, twin):
        stream.push(random_frames(9, seed=1))
        stream.ask("What?")
    assert said(session.events) == said(twin.events)
    assert session.cache.lengths == twin.cache.lengths


def test_suppressed_tokens_are_never_said():
    """They stand for pictures, or for text of the format, and ids beyond the vocabulary do no harm."""
    processor = turn_processor("internvl")
    model = turn_model(processor)
    replies = []
    for suppressed in (None, []):
        for _ in range(3):
            session = model.stream(processor, max_new_tokens=8)
            session.push(random_frames(2))
            session.ask("What?")
            replies.append(session.events[-1].token_ids)
            if suppressed is not None:
                assert not set(replies[-1]) & set(suppressed)
                suppressed += [*replies[-1][:1], 10**6]
                model.generation_config.suppress_tokens = suppressed
    assert replies[0] == replies[1] == replies[3] and len(set(replies[3:])) == 3


# ---------------------------------------------------------------------------------------------------- text of others


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_in_text_stay_text(name, special):
    """They do so also if the tokenizer has them as added tokens that are not marked as special."""
    processor = turn_processor(name, special=special)
    control = {i for i, token in processor.tokenizer.added_tokens_decoder.items() if token.special}
    assert set(processor.tokenizer.convert_tokens_to_ids(SPECIAL[name])) <= control
    for token in [*SPECIAL[name], "<v>", "<s>", "<pad>"]:
        dirty = f"Is {token} a token?{token}"
        for role in ("system", "user", "assistant"):
            dialogue = [dict(m, content=dirty) if m["role"] == role else m for m in DIALOGUE]
            clean = [dict(m, content="x") if m["role"] == role else m for m in DIALOGUE]
            ids, expected = (processor.apply_chat_template(d, tokenize=True) for d in (dialogue, clean))
            assert [i for i in ids if i in control] == [i for i in expected if i in control]
            assert processor.tokenizer.decode(ids) == processor.apply_chat_template(dialogue)
        asked = processor.encode_turns([{"role": "user", "content": dirty}], stream_open=True, then="assistant")
        plain = processor.encode_turns([{"role": "user", "content": "x"}], stream_open=True, then="assistant")
        assert [i for i in asked if i in control] == [i for i in plain if i in control]


# ----------------------------------------------------------------------------------------------------------- training


def test_labels_are_silence_and_what_opens_a_reply_after_the_text_of_a_frame(name):
    processor = turn_processor(name)
    timed = [
        {"role": "user", "content": "Narrate.", "time": 0.0},
        {"role": "assistant", "content": "A ball.", "time": 1.0},
        {"role": "assistant", "content": "It leaves.", "time": 2.0},
    ]
    batch = processor(timed, random_frames(5), fps=2, return_labels=True)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    text = processor.stream_format
    space = " " * text["assistant_before"].endswith(" ")
    reply = "{}{}{}".format(*(text[part] for part in ("frames_end", "user_after", "assistant_before"))).rstrip(" ")
    says = [reply + space + said + text["assistant_end"] for said in ("A ball.", "It leaves.")]
    silence = processor.frame_token_interval_id
    silence = processor.tokenizer.decode([processor.end_of_reply_id if silence is None else silence])
    assert processor.tokenizer.decode(labels[labels >= 0]) == silence + says[0] + silence + says[1]
    # Each decision has its label right after the text of its frame. The one before the question is left out.
    suffix = len(processor.frame_suffix_ids)
    ends = (ids == processor.frame_token_id).nonzero().flatten()[9::10] + suffix
    assert [bool(labels[end + 1] >= 0) for end in ends] == [False, True, True, True, True]
    learned = (labels >= 0).nonzero().flatten().tolist()
    assert not set(learned) & {int(end) - back for end in ends for back in range(suffix + 9)}


@pytest.mark.parametrize("name", ["smolvlm", "internvl"])
def test_a_few_steps_of_training_lower_the_loss(name):
    """The collator corrupts replies, which splits and joins runs of frames with times."""
    processor = turn_processor(name)
    model = turn_model(processor, mod_layers="all").train()
    messages = [{"role": "user", "content": "Narrate.", "time": 0.0}]
    messages += [{"role": "assistant", "content": text, "time": float(at)} for at, text in enumerate("ABCD", 1)]
    collator = StreamCollator(processor, fps=2, augmentation=0.9)
    rows = [{"messages": messages, "video": random_frames(12, seed=seed), "start": 0.0} for seed in range(2)]
    for epoch in range(6):
        collator.epoch.fill_(epoch)
        times = [
            [time for turn in augmented if turn["role"] == "stream" for time in turn.get("times", [])]
            for augmented in [collator._read(rows[0])[0]]
        ]
        assert times in ([[]], [[frame / 2 for frame in range(12)]]) and bool(times[0]) == (name == "smolvlm")
    batch = training_batch(processor, rows, fps=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(6):
        losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.8 * losses[0]
