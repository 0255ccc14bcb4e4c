# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""When a session speaks without having learned it, and questions that leave no trace."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engines import said, tiny_engine
from tiny import random_frames, tiny_config, tiny_model, tiny_processor, tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from videollm_mod import VideoLLMMoDConfig, VideoLLMMoDForConditionalGeneration
from videollm_mod.generation_videollm_mod import DEFAULT_QUERY
from videollm_mod.serving import StreamingEngine
from videollm_mod.speaking_videollm_mod import (
    _EARLY,
    DEFAULT_PROMPT,
    POLICIES,
    PROBE_QUESTION,
    Draft,
    Policy,
    Probe,
    Speaking,
)


ROUTED = {"mod_layers": "interleaved"}
WATCH = {"system_prompt": "Watch.", "max_new_tokens": 4, "interval_threshold": 0.004}
ASKED = "Is there a ball?"


# ------------------------------------------------------------------------------------------------------------- probes


def probability_by_one_forward(model, processor, frames, dialogue):
    """Return P(Yes) against P(No) after a dialogue, by one forward without a cache and by the words' first tokens."""
    tokenizer = processor.tokenizer
    ids = processor.apply_chat_template(dialogue, tokenize=True, add_generation_prompt=True)
    with torch.no_grad():
        features = model.encode_frames(processor.normalize_frames(processor.resize_frames(frames, model.device)))
        logits = model(input_ids=torch.tensor([ids]), frame_features=features[None]).logits[0, -1].double()
    first = [
        {tokenizer.encode(x)[0] for x in words}
        for words in (("Yes", " Yes", "yes", " yes"), ("No", " No", "no", " no"))
    ]
    yes, no = (logits[sorted(mine - other)].exp().sum() for mine, other in (first, first[::-1]))
    return float(yes / (yes + no))


@pytest.mark.parametrize("options", [{}, ROUTED, {"mod_keep_ratio": 1.0}])
def test_a_probe_equals_one_forward_over_the_dialogue(options):
    model, processor, frames = tiny_model(**options), tiny_processor(), random_frames(5)
    session = model.stream(processor, system_prompt="Watch.", interval_threshold=0.0, chunk_frames=2)
    model.should_speak = lambda logits, _: (torch.zeros(len(logits), dtype=torch.bool), torch.ones(len(logits)))
    session.push(frames[:3])
    watched = [{"role": "system", "content": "Watch."}, {"role": "stream", "num_frames": 3}]
    question = {"role": "user", "content": ASKED}
    expected = probability_by_one_forward(model, processor, frames[:3], [*watched, question])
    assert session.probe(ASKED) == pytest.approx(expected, abs=1e-5)
    assert session.probe(ASKED, answers=("No", "Yes")) == pytest.approx(1 - expected, abs=1e-5)
    # What the user said and the model has not read yet is part of the dialogue, and stays unread.
    session.ask("Look closely.", reply_now=False)
    told = {"role": "user", "content": "Look closely."}
    expected = probability_by_one_forward(model, processor, frames[:3], [*watched, told, question])
    assert session.probe(ASKED) == pytest.approx(expected, abs=1e-5)
    session.push(frames[3:])
    later = {"role": "stream", "num_frames": 2}
    expected = probability_by_one_forward(model, processor, frames, [*watched, told, later, question])
    assert session.probe(ASKED) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_frames": 6, "max_text_tokens": 40}])
def test_nothing_of_a_probe_stays(options):
    """The stream is evicted from, speaks and is asked; probes come between all frames, after replies and questions."""
    model, processor, frames = tiny_model(**ROUTED), tiny_processor(), random_frames(12)

    def watch(probes):
        session, lengths = model.stream(processor, **WATCH, **options), []
        for index, frame in enumerate(frames):
            session.push(frame)
            if index == 4:
                session.ask("What is it?")
            if index == 7:
                session.ask("Say more.", reply_now=False)
            before = session.cache.lengths, list(session.events), session.num_remembered
            values = {session.probe(ASKED) for _ in range(probes)}
            assert (session.cache.lengths, session.events, session.num_remembered) == before and len(values) <= 1
            lengths.append((before[0], int(session.cache.next_position)))
        return said(session.events), lengths, [layer.keys for layer in session.cache.layers]

    (events, lengths, keys), (probed_events, probed_lengths, probed_keys) = watch(0), watch(2)
    assert probed_events == events and len(events) > 4
    assert probed_lengths == lengths
    for mine, theirs in zip(probed_keys, keys, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("capture", [False, True])
def test_an_engine_probes_what_was_pushed_by_then(capture):
    """Streams of an engine share steps with probes, and give what sessions give."""
    engine, frames = tiny_engine(capture=capture), random_frames(6)
    streams = [engine.open(**WATCH) for _ in range(2)]
    found = []
    for stream, own in zip(streams, (frames, frames[::-1]), strict=True):
        stream.push(own[:3])
        stream.ask("What is it?")
    for stream in streams:
        found.append(stream.probe(ASKED))
    streams[0].push(frames[3:])
    with engine:
        found.append(streams[0].probe(ASKED))
    sessions = [engine.model.stream(engine.processor, max_frames=12, max_text_tokens=160, **WATCH) for _ in range(2)]
    expected = []
    for session, own in zip(sessions, (frames, frames[::-1]), strict=True):
        session.push(own[:3])
        session.ask("What is it?")
        expected.append(session.probe(ASKED))
    sessions[0].push(frames[3:])
    expected.append(sessions[0].probe(ASKED))
    assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=0)
    assert len(set(found)) == 3
    for stream, session in zip(streams, sessions, strict=True):
        assert said(stream.events) == said(session.events)


def test_a_stream_that_ends_before_the_answer_says_so():
    engine = tiny_engine()
    stream = engine.open()
    stream.push(random_frames(1))
    engine._run_steps = None  # every step fails
    with pytest.raises(RuntimeError, match="ended before the answer"):
        stream.probe(ASKED)


@pytest.mark.parametrize(
    ("question", "answers", "message"),
    [
        (ASKED, "No", "must be two texts"),
        (ASKED, ("Yes", "No", "Red"), "must be two texts"),
        (" ", ("Yes", "No"), "not empty"),
        ("Is it?", ("Yes", "Yes"), "must begin with different tokens"),
        ("Is it?", "Yes", "two texts"),
        ("Is it?", ("Yes", 1), "must be a text"),
        ("Is it?", ("Yes", ""), "must begin with different tokens"),
    ],
)
def test_a_probe_refuses(question, answers, message):
    with pytest.raises(ValueError, match=message):
        Probe(tiny_tokenizer(), question, answers)


def test_a_probe_needs_a_frame_and_an_open_session():
    session = tiny_model().stream(tiny_processor())
    with pytest.raises(ValueError, match="no frame to answer from"):
        session.probe(ASKED)
    session.push(random_frames(1))
    session.close()
    with pytest.raises(ValueError, match="closed"):
        session.probe(ASKED)


# ----------------------------------------------------------------------------------------------------------- policies


class Talker(VideoLLMMoDForConditionalGeneration):
    """
    The real model with its real cache and a scripted head. It replies what `say` returns for the index of the last
    frame, its probability of yes to the policy's question is `yes` of that index, and by the interval rule it wants to
    speak at `speaks_at`. `fed` holds what the cache holds, `num_seen` and `num_steps` count the frames and
    steps that it computed.
    """

    def script(self, processor, say, yes, speaks_at):
        self.tokenizer, self.say, self.yes, self.speaks_at = processor.tokenizer, say, yes, speaks_at
        self.fed, self.num_seen, self.num_steps, self.begin = [], 0, 0, 0
        return self

    def forward(self, input_ids=None, cache=None, frame_features=None, logits_to_keep=0, **kwargs):
        self.num_seen += 0 if frame_features is None else frame_features.shape[1]
        self.num_steps += 1
        past, self.used = int(cache.get_seq_length()), cache
        self.fed = self.fed[:past] + input_ids[0].tolist()
        self.begin = len(self.fed) if input_ids.shape[1] > 1 else self.begin  # of a reply
        outputs = super().forward(input_ids=input_ids, cache=cache, frame_features=frame_features, **kwargs)
        rows = [self._scores(self.fed[: past + int(place) + 1]) for place in logits_to_keep]
        outputs.logits = torch.stack(rows)[None]
        return outputs

    def _scores(self, history):
        scores = torch.full((self.config.text_config.vocab_size,), -30.0)
        index = history.count(self.config.frame_token_id) // self.config.frame_num_tokens - 1
        if history[-1] == self.config.frame_token_id:
            scores[self.config.frame_token_interval_id] = float(index not in self.speaks_at) * 60 - 30
            scores[self.tokenizer.encode("]\n")[0]] = 0.0
            return scores
        if self.tokenizer.decode(history).endswith(f"\nUser: {PROBE_QUESTION}\nAssistant:"):
            for word, probability in (("Yes", self.yes(index)), ("No", 1 - self.yes(index))):
                scores[self.tokenizer.encode(word)[0]] = torch.tensor(probability).log()
            return scores
        reply = [*self.tokenizer.encode(f" {self.say(index)}"), self.tokenizer.eos_token_id]
        scores[reply[len(history) - self.begin]] = 0.0
        return scores

    @property
    def text(self):
        """What the cache holds, with F for a frame."""
        return self.tokenizer.decode(self.fed[: self.used.get_seq_length()]).replace("<v>" * 10, "F")


def talker(say=lambda index: f"Frame {index}.", *, yes=lambda _: 0.5, speaks_at=(), **options):
    """Return a scripted model and its processor."""
    torch.manual_seed(0)
    processor = tiny_processor()
    config = tiny_config(text_overrides={"vocab_size": len(processor.tokenizer) - 1}, **options)
    return Talker(config).eval().script(processor, say, yes, speaks_at), processor


def colored(*levels):
    """Return one frame of a plain color for each level."""
    frames = np.zeros((len(levels), 32, 32, 3), dtype=np.uint8)
    frames[:] = np.array([[level, 255 - level, level // 2] for level in levels])[:, None, None]
    return frames


def replies(session):
    return [(event.time, event.text) for event in session.events if event.role == "assistant"]


ASKED_NOW = f"]\nUser: {DEFAULT_PROMPT}\nAssistant:"


@pytest.mark.parametrize("chunk_frames", [1, 3, 8])
def test_every_speaks_at_multiples_after_its_prompt(chunk_frames):
    model, processor = talker()
    session = model.stream(processor, system_prompt="Watch.", speak="every", every=1.5, chunk_frames=chunk_frames)
    session.push(random_frames(8))
    assert replies(session) == [(0.0, "Frame 0."), (1.5, "Frame 3."), (3.0, "Frame 6.")]
    assert [event.role for event in session.events] == ["assistant"] * 3  # prompts are not events
    assert session.events[0].interval_probability > 0.9  # answers have none
    assert model.text == "<s>Watch.\n\n[" + "".join(
        f"F{ASKED_NOW} Frame {index}.</s>\n[{between}" for index, between in ((0, "F,F,"), (3, "F,F,"), (6, "F"))
    )
    assert model.num_seen == 8  # no frame was computed twice


def test_every_is_due_at_the_first_frame_at_or_after_a_multiple():
    model, processor = talker()
    session = model.stream(processor, speak="every", every=2.0)
    session.push(random_frames(6), time=[10.0, 11.9, 12.3, 13.9999999, 14.1, 18.5])
    assert [time for time, _ in replies(session)] == [10.0, 12.3, 13.9999999, 18.5]


@pytest.mark.parametrize("chunk_frames", [1, 3, 8])
def test_change_speaks_at_frames_that_differ(chunk_frames):
    model, processor = talker()
    options = {"speak": "change", "every": 1.0, "speak_threshold": 0.01, "chunk_frames": chunk_frames}
    session = model.stream(processor, **options)
    # The third frame differs, but comes 0.5 s after a reply. Its picture stays, so it is spoken about later.
    session.push(colored(0, 0, 200, 200, 200, 200, 201, 0, 0, 0, 200))
    session.push(colored(200, 200, 200))
    assert [time for time, _ in replies(session)] == [0.0, 1.0, 3.5, 5.0]
    assert model.num_seen == 14


def test_change_without_change_speaks_once():
    model, processor = talker(lambda index: f"Frame {index}.")
    session = model.stream(processor, speak="change", every=0.5)
    session.push(colored(*[90] * 9))
    assert replies(session) == [(0.0, "Frame 0.")]


@pytest.mark.parametrize("chunk_frames", [1, 8])
def test_probe_asks_once_in_a_while_and_speaks_if_yes_is_likely(chunk_frames):
    asked = []

    def yes(index):
        asked.extend([index] * (index not in asked))
        return 0.9 if index in (4, 5, 8) else 0.2

    model, processor = talker(yes=yes)
    session = model.stream(processor, system_prompt="Watch.", speak="probe", every=1.0, chunk_frames=chunk_frames)
    session.push(random_frames(10))
    assert asked == [0, 2, 4, 6, 8] and model.num_seen == 10
    assert replies(session) == [(2.0, "Frame 4."), (4.0, "Frame 8.")]
    assert PROBE_QUESTION not in model.text
    assert model.text.startswith(f"<s>Watch.\n\n[F,F,F,F,F{ASKED_NOW} Frame 4.</s>\n[F,")
    strict = model.stream(processor, speak="probe", speak_threshold=0.95)
    strict.push(random_frames(10))
    assert replies(strict) == []


@pytest.mark.parametrize("chunk_frames", [1, 3, 8])
def test_a_function_decides_at_each_frame_once(chunk_frames):
    model, processor = talker(speaks_at=(1, 5))
    frames = []

    def speak(frame):
        frames.append(frame)
        return {1: " \n", 2: True, 5: " Where is the ball?\n"}.get(frame.frame)

    session = model.stream(processor, system_prompt="Watch.", speak=speak, chunk_frames=chunk_frames)
    session.push(random_frames(7))
    assert [frame.frame for frame in frames] == [0, 1, 2, 3, 4, 5, 6]
    assert [frame.time for frame in frames] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert [frame.speaks for frame in frames] == [False, True, False, False, False, True, False]
    assert [round(frame.interval_probability) for frame in frames] == [1, 0, 1, 1, 1, 0, 1]
    assert [frame.last_reply for frame in frames] == [None, None, None, 1.0, 1.0, 1.0, 2.5]
    assert frames[0].features.shape == (10, 16) and session.speak == "function"
    assert replies(session) == [(1.0, "Frame 2."), (2.5, "Frame 5.")]
    asked = "]\nUser: Where is the ball?\nAssistant:"
    assert model.text == f"<s>Watch.\n\n[F,F,F{ASKED_NOW} Frame 2.</s>\n[F,F,F{asked} Frame 5.</s>\n[F"


def test_a_session_is_not_probed_during_a_reply():
    model, processor = talker(speaks_at=(1,))

    class Asker:
        def put(self, _):
            session.probe("Is it red?")

        def end(self):
            pass

    session = model.stream(processor, streamer=Asker())
    with pytest.raises(ValueError, match="cannot be probed during a reply"):
        session.push(random_frames(3))


@pytest.mark.parametrize(
    ("options", "probes", "spoken"),
    [
        ({"speak": "learned"}, 0, 0),
        ({"speak": "every", "every": 2.0}, 0, 3),
        ({"speak": "change"}, 0, 1),
        ({"speak": "probe", "every": 1.0}, 5, 0),
        ({"speak": lambda _: False}, 0, 0),
    ],
)
def test_what_a_policy_costs(options, probes, spoken):
    """Policies add no steps to frames. A probe takes one, and a reply one for its prompt and one for each token."""
    model, processor = talker(lambda _: "A ball.", yes=lambda _: 0.2)
    session = model.stream(processor, chunk_frames=1, no_repeat=0, **options)
    session.push(colored(*[90] * 10))
    reply = 1 + len(processor.tokenizer.encode(" A ball."))
    assert model.num_steps == 10 + probes + spoken * reply and model.num_seen == 10


def test_the_policy_of_the_checkpoint_is_the_default():
    model, processor = talker(speaks_at=(3,))
    for speak, options, times in (
        ("learned", {}, [1.5]),
        ("learned", {"every": 2.0}, [0.0, 2.0]),
        ("every", {}, [0.0, 2.0]),
        ("every", {"every": 1.0}, [0.0, 1.0, 2.0]),
        ("every", {"speak": "learned"}, [1.5]),
    ):
        model.config.speak = speak
        session = model.stream(processor, **options)
        session.push(random_frames(5))
        assert [time for time, _ in replies(session)] == times
    assert VideoLLMMoDConfig().speak == "learned"


def test_a_learned_policy_may_have_a_prompt_and_others_none():
    model, processor = talker(speaks_at=(0,))
    session = model.stream(processor, system_prompt="Watch.", prompt="What now?")
    session.push(random_frames(1))
    assert model.text == "<s>Watch.\n\n[F]\nUser: What now?\nAssistant: Frame 0."
    session = model.stream(processor, system_prompt="Watch.", speak="every", prompt="")
    session.push(random_frames(1))
    assert model.text == "<s>Watch.\n\n[F]\nAssistant: Frame 0."


@pytest.mark.parametrize("chunk_frames", [1, 8])
def test_a_question_with_a_frames_time_takes_the_place_of_the_policy(chunk_frames):
    """The policy stays due, and has to be silent for a second after the answer."""
    model, processor = talker()
    session = model.stream(processor, speak="every", every=1.5, chunk_frames=chunk_frames)
    session.push(random_frames(2))
    session.ask("What is it?", time=1.5)
    session.push(random_frames(5))
    expected = [(0.0, "Frame 0."), (1.5, "What is it?"), (1.5, "Frame 3."), (2.5, "Frame 5."), (3.0, "Frame 6.")]
    assert [(event.time, event.text) for event in session.events] == expected[:4]  # 3.0 is too soon after 2.5


@pytest.mark.parametrize("speak", ["every", "change", "probe"])
@pytest.mark.parametrize("chunk_frames", [1, 8])
def test_an_instruction_is_in_the_context_and_the_prompt_follows_it(speak, chunk_frames):
    model, processor = talker(yes=lambda _: 0.9)
    session = model.stream(processor, system_prompt="Watch.", speak=speak, chunk_frames=chunk_frames)
    session.ask("Be brief.", reply_now=False)
    session.push(random_frames(2))
    assert [(event.time, event.text) for event in session.events] == [(0.0, "Be brief."), (0.0, "Frame 0.")]
    expected = f"F]\nUser: Be brief.\nUser: {DEFAULT_PROMPT}\nAssistant: Frame 0.</s>\n[F"
    assert model.text == f"<s>Watch.\n\n[{expected}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speak": "often"}, "must be 'learned', 'every', 'change', 'probe' or a function"),
        ({"speak": 3}, "must be 'learned'"),
        ({"speak": ["every"]}, "must be 'learned'"),
        ({"speak": "every", "every": 0}, "`every` must be a positive number of seconds"),
        ({"speak": "learned", "every": 2}, "does not belong to learned"),
        ({"speak": lambda _: True, "every": 2}, "does not belong to a function"),
        ({"speak": "every", "speak_threshold": 0.5}, "belongs to 'change' and 'probe'"),
        ({"speak": "probe", "speak_threshold": 1.5}, "`speak_threshold` must be"),
        ({"speak": "change", "speak_threshold": 2.1}, "`speak_threshold` must be"),
        ({"speak": "change", "speak_threshold": -0.1}, "`speak_threshold` must be"),
        ({"no_repeat": -1}, "`no_repeat` must be a whole number"),
        ({"max_words": 2.5}, "`max_words` must be a whole number"),
        ({"min_silence": -1}, "`min_silence` must be"),
        ({"prompt": 3}, "`prompt` must be a text"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model().stream(tiny_processor(), **options)


@pytest.mark.parametrize(("speak", "most"), [("change", 2), ("probe", 1)])
def test_thresholds_at_their_limits(speak, most):
    for threshold in (0, most):
        session = tiny_model().stream(tiny_processor(), speak=speak, speak_threshold=threshold)
        assert session._speaking.policy.threshold == threshold


def test_a_frame_a_rounding_error_early_is_in_time():
    """A policy is due at multiples of its period, and `min_silence` ends, within `_EARLY`."""
    frame, early = SimpleNamespace(time=2.0 - _EARLY), SimpleNamespace(time=2.0 - 2 * _EARLY)
    policy = POLICIES["every"](2.0)
    policy.due = 2.0
    assert policy.choose([early]) is None and policy.choose([early, frame]) == 1
    speaking = Speaking(policy, min_silence=2.0)
    speaking.last_reply = 0.0
    assert speaking._may_speak(frame.time) and not speaking._may_speak(early.time)
    policy.due = 0.0
    assert speaking.choose([early]) == (1, False) and speaking.choose([early, frame]) == (2, True)


def test_a_tokenizer_may_put_a_token_before_each_text():
    tokenizer = tiny_tokenizer()
    expected = Probe(tokenizer, ASKED)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert tokenizer.encode("Yes")[0] == 1
    probe = Probe(tokenizer, ASKED)  # it would refuse answers that begin with the same token
    logits = torch.randn(len(tokenizer))
    for each in (expected, probe):
        each.read(logits)
    assert probe.probability == expected.probability


def test_replies_are_remembered_only_if_they_may_not_repeat():
    for no_repeat, known in ((0, ()), (2, ("b", "c"))):
        speaking = Speaking(Policy(), no_repeat=no_repeat)
        for time, text in enumerate(("A.", "B.", "C.")):
            speaking.shown(float(time), text)
        assert tuple(text.strip(".").lower() for text in speaking._recent) == known and speaking.last_reply == 2.0


def test_six_words_in_a_row_are_a_loop():
    tokenizer = tiny_tokenizer()
    for count, ends in ((6, False), (7, True)):
        draft = Draft(tokenizer, None, (), no_repeat=True, max_words=0)
        for token in tokenizer.encode("A red ball. " + "left " * count + "right"):
            draft.add(token)
        assert draft.must_end == ends


def test_a_policy_without_a_threshold_has_none():
    assert [Policy().threshold, Policy(threshold=0.5).threshold] == [None, 0.5]


def test_a_probe_asks_for_yes_or_no():
    session, given = tiny_model().stream(tiny_processor()), []
    session.push(random_frames(2))
    for options in ({}, {"answers": ("Yes", "No")}, {"answers": ("Yes", "Red")}):
        given.append(session.probe(ASKED, **options))
    assert given[0] == given[1] != given[2]


def test_the_configuration_knows_the_policies():
    for speak in POLICIES:
        assert tiny_config(speak=speak).speak == speak
    with pytest.raises(Exception, match="speak"):
        tiny_config(speak="often")


# ------------------------------------------------------------------------------------------------------------- guards


class Printed(BaseStreamer):
    """Collects the tokens of each reply."""

    def __init__(self):
        self.replies, self.open = [], []

    def put(self, value):
        self.open += value.tolist()

    def end(self):
        self.replies.append(tuple(self.open))
        self.open = []


def narrated(say, count=6, *, every=1.0, fps=1, **options):
    """Return a session that was shown `count` frames, its model, and what a streamer printed."""
    model, processor = talker(say)
    printed = Printed()
    session = model.stream(processor, fps=fps, speak="every", every=every, streamer=printed, **options)
    session.push(random_frames(count))
    # What is printed is what is said.
    assert printed.replies == [event.token_ids for event in session.events if event.role == "assistant"]
    assert printed.open == []
    return session, model


def test_a_sentence_said_at_every_frame_until_the_limit_is_said_once():
    """A model that was hardly trained does this."""
    session, model = narrated(lambda _: "The ball is red. " * 30, max_new_tokens=60)
    assert replies(session) == [(0.0, "The ball is red.")]
    assert session.num_suppressed == 5
    assert model.text.count("ball") == 1 and model.text.count("Assistant") == 1
    assert model.text.endswith("The ball is red.</s>\n[F,F,F,F,F")


@pytest.mark.parametrize("no_repeat", [0, 1, 2])
def test_no_repeat_compares_with_that_many_replies(no_repeat):
    texts = ["A red ball.", "a red  ball!", "It leaves.", "A red ball.", "A red ball", "It leaves."]
    session, _ = narrated(lambda index: texts[index], no_repeat=no_repeat)
    shown = {0: [0, 1, 2, 3, 4, 5], 1: [0, 2, 3, 5], 2: [0, 2]}[no_repeat]
    assert replies(session) == [(float(index), texts[index].replace("  ", " ")) for index in shown] or no_repeat == 0
    assert len(replies(session)) == len(shown)
    assert session.num_suppressed == 6 - len(shown)


def test_a_withdrawn_reply_leaves_no_trace():
    """The cache and the stream are as if the model had not been asked; what the user said before is still to come."""
    texts = ["A ball.", "A ball.", "", "A ball.", "It leaves.", "It leaves."]
    session, model = narrated(lambda index: texts[index], count=4)
    silent, processor = talker(lambda index: texts[index])
    once = silent.stream(processor, fps=1, speak="every", every=100.0)
    once.push(random_frames(4))
    assert said(session.events) == said(once.events) and session.num_suppressed == 3
    assert model.text == silent.text and session.cache.lengths == once.cache.lengths
    for other in (session, once):
        other.ask("Look.", reply_now=False)
    session.push(random_frames(2))  # "It leaves." is shown at the first of them
    once._speaking.policy.due = 4.0
    once.push(random_frames(2))
    assert said(session.events) == said(once.events) and [e.text for e in session.events][1:] == [
        "Look.",
        "It leaves.",
    ]
    assert model.text == silent.text


class Says(LogitsProcessor):
    """Lets a real model say these texts, one per reply."""

    def __init__(self, tokenizer, texts):
        self.replies = iter([[*tokenizer.encode(f" {text}"), tokenizer.eos_token_id] for text in texts])

    def __call__(self, input_ids, scores):
        self.reply = next(self.replies) if input_ids.shape[1] == 0 else self.reply
        scores[:, self.reply[input_ids.shape[1]]] = 1e4
        return scores


@pytest.mark.parametrize("capture", [False, True])
def test_an_engine_withdraws_what_a_session_withdraws(capture):
    texts = ["A ball.", "A ball.", "A ball. A ball. A ball. A ball.", "It leaves.", "", "It leaves.", "A ball."]
    engine, frames = tiny_engine(capture=capture), random_frames(7)

    def options():
        says = LogitsProcessorList([Says(engine.processor.tokenizer, texts)])
        return {"speak": "every", "every": 0.5, "logits_processor": says, "streamer": Printed(), "min_silence": 0.0}

    stream = engine.open(**options())
    stream.push(frames)
    engine.run()
    session = engine.model.stream(engine.processor, max_frames=12, max_text_tokens=160, **options())
    session.push(frames)
    assert said(stream.events) == said(session.events)
    assert replies(session) == [(0.0, "A ball."), (1.5, "It leaves."), (3.0, "A ball.")]
    assert stream.session.num_suppressed == session.num_suppressed == 4
    assert stream.session.cache.lengths == session.cache.lengths
    assert stream.session.streamer.replies == session.streamer.replies


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("A man walks. A man walks. A man walks. A man walks. A man walks.", "A man walks."),
        (
            "Look: the red ball rolls left now, the red ball rolls left now, the red",
            "Look: the red ball rolls left now,",
        ),
        ("no no no no no no no no no no", "no"),
        ("It goes on and on and on, and then it stops.", None),
        ("One two three. One two four. One two five. One two six.", None),
        ("\u7ea2\u7403\u8fdb\u6765\u4e86\u3002" * 3, "\u7ea2\u7403\u8fdb\u6765\u4e86\u3002"),
    ],
)
def test_a_reply_that_loops_ends_there(text, shown):
    session, model = narrated(lambda _: text, count=1, max_words=0)
    assert replies(session) == [(0.0, text if shown is None else shown)]
    if shown is not None:
        assert model.text.endswith(f"Assistant: {shown}")


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("A man walks in the rain with a dog.", 5, "A man walks in the"),
        ("A man walks. He has a red hat on.", 5, "A man walks."),
        ("A man walks. He waves. He leaves the room.", 5, "A man walks. He waves."),
        ("A man walks. He waves.", 5, "A man walks. He waves."),
        ("It is 3.5 m long. That is a lot.", 6, "It is 3.5 m long."),
        ("\u7ea2\u7403\u6765\u4e86\u3002\u5b83\u8d70\u4e86\u3002", 6, "\u7ea2\u7403\u6765\u4e86\u3002"),
        ("A man walks. He has a red hat on.", 0, "A man walks. He has a red hat on."),
    ],
)
@pytest.mark.parametrize("no_repeat", [0, 1])
def test_max_words_ends_with_the_last_sentence_that_fits(text, most, shown, no_repeat):
    session, model = narrated(lambda _: text, count=1, max_words=most, no_repeat=no_repeat)
    assert replies(session) == [(0.0, shown)]
    assert model.text.replace("</s>", "").endswith(f"Assistant: {shown}")
    session.push(random_frames(1), time=0.5)
    assert model.text.endswith(f"Assistant: {shown}</s>\n[F")


@pytest.mark.parametrize("no_repeat", [0, 1])
def test_a_reply_that_the_model_has_ended_keeps_words_after_the_last_full_stop(no_repeat):
    session, _ = narrated(lambda _: "A man walks. He has a hat", count=1, max_words=20, no_repeat=no_repeat)
    assert replies(session) == [(0.0, "A man walks. He has a hat")]


def test_a_reply_cut_by_the_token_limit_ends_with_its_last_sentence():
    session, _ = narrated(lambda _: "A man walks. He has a red hat on his head.", count=1, max_new_tokens=16)
    assert replies(session) == [(0.0, "A man walks.")]


def test_min_silence_delays_the_policy():
    session, _ = narrated(lambda index: f"Frame {index}.", 8, every=1.0, min_silence=1.5, fps=2)
    assert [time for time, _ in replies(session)] == [0.0, 1.5, 3.0]
    model, processor = talker(speaks_at=range(8))
    session = model.stream(processor, min_silence=1.2)
    session.push(random_frames(8))
    assert [time for time, _ in replies(session)] == [0.0, 1.5, 3.0]


def test_a_learned_policy_has_guards_if_asked_for():
    model, processor = talker(lambda _: "A ball. A ball. A ball. A ball.", speaks_at=(1, 2, 4))
    session = model.stream(processor)
    session.push(random_frames(6))
    assert len(replies(session)) == 3 and session.events[0].text.count("ball") == 4
    session = model.stream(processor, system_prompt="Watch.", no_repeat=1)
    session.push(random_frames(6))
    assert replies(session) == [(0.5, "A ball.")] and session.num_suppressed == 2
    assert model.text == "<s>Watch.\n\n[F,F]\nAssistant: A ball.</s>\n[F,F,F,F"


def test_answers_to_a_user_are_shown_as_they_are():
    session, _ = narrated(lambda _: "A ball. A ball. A ball. A ball. A ball.", 1, max_words=2)
    session.ask("What is it?")
    assert [event.text for event in session.events][2] == "A ball. A ball. A ball. A ball. A ball."


def test_only_what_is_shown_is_printed():
    """Random texts of few words, with sentences, loops and repeats of earlier replies."""
    tokenizer, generator, outcomes = tiny_tokenizer(), random.Random(0), set()
    words = ["A", "ball", "rolls", "left", "A ball rolls.", "It stops.", "\u00e9t\u00e9", "\u7403", "no", "3.5", "\n"]
    for _ in range(300):
        text = " ".join(generator.choices(words, k=generator.randint(0, 9)) * generator.choice([1, 1, 2, 4]))
        recent = ["aballrolls", "aballrollsitstops", "noaball"][: generator.randint(0, 3)]
        printed, limit = Printed(), generator.choice([0, 4, 9])
        draft = Draft(tokenizer, printed, recent, no_repeat=generator.random() < 0.8, max_words=limit)
        tokens = tokenizer.encode(text)
        stop = generator.randint(1, len(tokens) + 1)
        for token in tokens[:stop]:
            draft.add(token)
            if draft.must_end:
                break
        put = tuple(printed.open)
        is_shown = draft.end(is_complete=stop > len(tokens))
        outcomes.add((is_shown, draft.must_end, len(draft.token_ids) < stop))
        if is_shown:
            assert printed.replies == [tuple(draft.token_ids)]
            assert tuple(draft.token_ids) == tuple(tokens[: len(draft.token_ids)])
        else:
            assert put == () and printed.replies == []
    assert len(outcomes) > 4


# ------------------------------------------------------------------------------------------ however frames are watched


class Changing:
    """A function that speaks at every third frame, and where the interval rule would not."""

    def __call__(self, frame):
        return frame.frame % 3 == 2 and "And now?"


POLICY_OPTIONS = [
    {"speak": "every", "every": 1.5},
    {"speak": "change", "every": 1.0, "speak_threshold": 0.02},
    {"speak": "probe", "every": 1.0, "speak_threshold": 0.16, "no_repeat": 0},
    {"speak": Changing(), "max_words": 3, "min_silence": 0.0},
    {"speak": "learned", "min_silence": 1.0, "interval_threshold": 0.004, "no_repeat": 2},
]
POLICY_NAMES = ["every", "change", "probe", "a function", "learned"]
LIMITS = {"max_frames": 12, "max_text_tokens": 160}


@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=POLICY_NAMES)
def test_events_do_not_depend_on_how_frames_come(options):
    """
    Frames one by one and together, through a fork, `narrate` and an engine, with evictions, an instruction and a
    question: the model is untrained, its cache is real.
    """
    model, processor, frames = tiny_model(**ROUTED), tiny_processor(), random_frames(30)
    options = {**options, **LIMITS, "max_new_tokens": 5, "prompt": "Now?"}

    def watch(sizes, chunk_frames, fork_at=None):
        session, begin = model.stream(processor, chunk_frames=chunk_frames, **options), 0
        session.ask("Be brief.", reply_now=False)
        session.ask("What is it?", time=6.0)
        for size in sizes:
            if begin == fork_at:
                other = session.fork()
                other.push(random_frames(5, seed=1))
            session.push(frames[begin : begin + size])
            begin += size
        return session

    session = watch([1] * 30, 8)
    assert session.num_remembered < 13 and len(replies(session)) > 3
    assert [event.text for event in session.events if event.role == "user"] == ["Be brief.", "What is it?"]
    for other in (watch([30], 1), watch([30], 8), watch([7, 1, 4, 10, 8], 3), watch([10, 20], 8, fork_at=10)):
        assert said(other.events) == said(session.events)
        assert other.num_suppressed == session.num_suppressed
        assert other.cache.lengths == session.cache.lengths
    engine = StreamingEngine(model, processor, page_size=16, **LIMITS)
    streams = [engine.open(**{name: x for name, x in options.items() if name not in LIMITS}) for _ in range(2)]
    for stream, size in zip(streams, (1, 30), strict=True):
        stream.ask("Be brief.", reply_now=False)
        stream.ask("What is it?", time=6.0)
        for begin in range(0, 30, size):
            stream.push(frames[begin : begin + size])
            if size == 1:
                engine.run()
    engine.run()
    for stream in streams:
        assert said(stream.events) == said(session.events)
        assert stream.session.num_suppressed == session.num_suppressed


@pytest.mark.parametrize("options", POLICY_OPTIONS, ids=POLICY_NAMES)
def test_narrate_says_what_a_session_says(options):
    model, processor, frames = tiny_model(**ROUTED), tiny_processor(), random_frames(9)
    options = {**options, "max_new_tokens": 5}
    narrated = list(model.narrate(processor, frames, "Be brief.", **options))
    session = model.stream(processor, **options)
    session.hear("Be brief.", reply_now=False)
    session.push(frames)
    assert said(narrated) == [event for event in said(session.events) if event[2] == "assistant"] != []


def test_the_default_query_of_narrate_is_said_to_models_that_learned_when_to_speak():
    for options, is_said in (({}, True), ({"every": 1.0}, False), ({"every": 1.0, "query": "Be brief."}, True)):
        model, processor = talker()
        list(model.narrate(processor, random_frames(2), **options))
        assert (options.get("query", DEFAULT_QUERY) in model.text) is is_said


@pytest.mark.parametrize("speak", ["every", "change", "probe"])
def test_a_question_interrupts_a_reply_that_nobody_asked_for(speak):
    model, processor = talker(
        lambda index: "A ball rolls in from the left." if index == 0 else "Red.", yes=lambda _: 0.9
    )

    class Interrupter(Printed):
        def put(self, value):
            super().put(value)
            if len(self.open) == 3 and not self.replies:
                session.ask("What color?", interrupt=True)

    session = model.stream(processor, system_prompt="Watch.", speak=speak, every=1.0, streamer=Interrupter())
    session.push(random_frames(2))
    first, question, answer = session.events
    assert first.interrupted and first.text and "A ball rolls".startswith(first.text)
    assert (question.text, question.time) == ("What color?", 0.0) and answer.role == "assistant"
    cut = f"F{ASKED_NOW} {first.text}</s>\n"
    assert model.text.startswith(f"<s>Watch.\n\n[{cut}User: What color?\nAssistant: A ball rolls in")


def test_new_options_remember_what_was_said():
    session = tiny_model().stream(tiny_processor(), speak="every", no_repeat=2)
    for time, text in enumerate(("One.", "Two.", "Three.")):
        session._speaking.shown(float(time), text)
    session.set_speaking(speak="every", no_repeat=1)
    assert (session._speaking.last_reply, session._speaking._recent) == (2.0, ("three",))


@pytest.mark.parametrize("speak", ["every", "change"])
@pytest.mark.parametrize(("every", "times"), [(60, [0.0]), (4, [0.0, 6.0])])
def test_new_options_do_not_start_the_same_policy_again(speak, every, times):
    """With another `every` it does start again."""
    model, processor = talker()
    session = model.stream(processor, speak=speak, every=60)
    frames = random_frames(9)
    session.push(frames[:6], time=[float(time) for time in range(6)])
    session.set_speaking(speak=speak, every=every, max_words=10, speak_threshold=0.0 if speak == "change" else None)
    session.push(frames[6:], time=[6.0, 7.0, 8.0])
    assert [event.time for event in session.events] == times


@pytest.mark.parametrize(
    ("texts", "shown"), [(("A ball rolls in.",) * 2, 1), (("A ball rolls in.", "A cat sits."), 2)]
)
def test_an_interrupted_reply_that_only_repeats_is_not_shown(texts, shown):
    def say(index):
        calls.append(index)
        if calls.count(1) == 5:
            session.interrupt()
        return texts[index]

    calls = []
    model, processor = talker(say)
    session = model.stream(processor, speak="every", every=1.0)
    session.push(random_frames(2), time=[0.0, 1.0])
    assert calls.count(1) == 5 and session.num_suppressed == 2 - shown
    assert len(replies(session)) == shown and all(map(str.startswith, texts, (text for _, text in replies(session))))
