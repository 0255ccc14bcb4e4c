# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Measures of what a model says on its own history: values computed by hand, and judges."""

import math
import random
import sys
from itertools import accumulate
from types import MappingProxyType, SimpleNamespace

import numpy as np
import pytest
from endpoints import scripted_endpoint

from videollm_mod.train import content_words as content_words_module
from videollm_mod.train.content_words import content_words
from videollm_mod.train.endpoint import Endpoint
from videollm_mod.train.endpoint_judge import EndpointJudge
from videollm_mod.train.judging import _load_encoder, check_judge, find_judge, find_similarity
from videollm_mod.train.tasks import find_task
from videollm_mod.train.teacher_forcing import evaluate_metric
from videollm_mod.train.text_scores import score_bleu


# What the code of FlowNar and of ProAssist returned for the random dialogues of two tests.
FLOWNAR = {
    "temporal_precision": 0.4999603174603175,
    "temporal_recall": 0.37923520923520926,
    "temporal_f1": 0.40487653854041,
    "rouge_l": 0.2490596983277408,
    "cider": 0.7336932927640265,
    # These random texts hold no synonyms and paraphrases, so that FlowNar's METEOR is that of stems.
    "meteor_1.5_stem": 0.12229968587596385,
}
PROASSIST = {
    "missing_rate": 0.3610223642172524,
    "redundant_rate": 0.45799457994579945,
    "match_precision": 0.15176151761517614,
    "match_recall": 0.17891373801916932,
    "match_f1": 0.16422287390029325,
    "jaccard_index": 0.11618257261410789,
    "match_cost": 0.6495580561459064,
    "match_bleu_1": 0.648437499997467,
    "match_bleu_2": 0.3118743737454774,
    "match_bleu_3": 0.13927899584522754,
    "match_bleu_4": 1.3090832421917634e-05,
}


def said(*replies):
    return [{"time": float(time), "text": text} for time, text in replies]


# ------------------------------------------------------------------------------------------------ narration segments


def test_narrations_as_segments():
    metric = evaluate_metric("narration_segments")
    # Told: 10-12 and 12-16. True: 10-12.5, 12.5-13 and 13-20, so the IoUs are .8; 0; .3 and .12; .125, .375.
    predictions = [said((12, "cut the onion"), (16, "you stir it"))]
    references = [[said((12.5, "cut the onion"), (13, "wait"), (20, "you stir"))]]
    scores = metric.compute(predictions=predictions, references=references, starts=[10.0])
    assert scores["temporal_precision"] == 1 / 2 and scores["temporal_recall"] == pytest.approx(1 / 3)
    assert scores["temporal_f1"] == pytest.approx(2 * (1 / 2) * (1 / 3) / (5 / 6))
    # "wait" is paired with "you stir it", the nearest by generalized IoU.
    recall = 2 / 2
    rouge = (1 + 1.44) * (2 / 3) * recall / (recall + 1.44 * 2 / 3)
    assert scores["rouge_l"] == pytest.approx((1 + 0 + rouge) / 3)
    assert scores["meteor_stem"] > 0 and scores["cider"] > 0


def test_a_frame_of_delay_annotators_and_silent_videos():
    metric = evaluate_metric("narration_segments")
    predictions = [said((3.5, "a"), (7.5, "b")), []]
    references = [[said((4, "a"), (8, "b")), said((8, "c"))], [said((5, "d"))]]
    scores = metric.compute(predictions=predictions, references=references, fps=2.0)
    # With half a second more, both predictions are exact. The other annotator's 0-8 overlaps each by half.
    assert scores["temporal_precision"] == scores["temporal_recall"] == 1 / 2, "the silent video counts 0"
    assert scores["rouge_l"] == pytest.approx(2 / 4)
    nothing = metric.compute(predictions=[said((1, "a"))], references=[[]])
    assert nothing["temporal_f1"] == nothing["cider"] == 0.0


WORDS = ["you", "cut", "the", "red", "onion", "with", "knife", "stir", "it", "now"]


def random_text(rng):
    return " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))


def test_segments_score_as_in_published_code():
    rng, told, true, starts = random.Random(7), [], [], []

    def narrate(start, count):
        times = list(accumulate((rng.random() * 4 for _ in range(count)), initial=start))[1:]
        return said(*((time, random_text(rng)) for time in times))

    for _ in range(20):
        starts.append(rng.random() * 50)
        told.append(narrate(starts[-1], rng.randint(1, 9)))
        true.append([narrate(starts[-1], rng.randint(1, 9)) for _ in range(2)])
    metric = evaluate_metric("narration_segments")
    scores = metric.compute(predictions=told, references=true, starts=starts, tokenize="spaces")
    assert {name: scores[name] for name in FLOWNAR} == pytest.approx(FLOWNAR, rel=1e-9)


# ------------------------------------------------------------------------------------------------- dialogue matching


def test_replies_match_as_in_published_code():
    rng, told, true = random.Random(1), [], []
    for _ in range(30):
        frames = [
            [random_text(rng) if rng.random() < 0.2 else "" for _ in range(2)] for _ in range(rng.randint(30, 80))
        ]
        for k, texts in enumerate((told, true)):
            texts.append(said(*((index / 2, pair[k]) for index, pair in enumerate(frames) if pair[k])))
    metric = evaluate_metric("dialogue_matching")
    scores = metric.compute(predictions=told, references=true, similarity="token_f1", before=1.5, after=2.5)
    assert {name: scores[f"{name}_token_f1"] for name in PROASSIST} == pytest.approx(PROASSIST, rel=1e-6)


def test_replies_are_matched_missing_redundant_and_right():
    metric = evaluate_metric("dialogue_matching")
    predictions = [said((1, "cut the red onion"), (5, "hello"), (9, "stir the soup now")), []]
    references = [said((2, "cut the onion"), (20, "serve it"), (9, "pour water")), said((3, "wait"))]
    options = {"similarity": "token_f1", "before": 2.5, "after": 2.5, "fps": 2.0}
    scores = metric.compute(predictions=predictions, references=references, **options)
    # "cut the red onion" is right, a second early. "hello" is redundant. At 9 s the cost is 1 with a true reply of no
    # similar word, and more at the silent frames around it, so the two are matched, but not right.
    # Of the right text, 3 of 4 words and 1 of 3 pairs are true. It is not shorter, so nothing is taken off.
    expected = {"missing_rate": 2 / 4, "redundant_rate": 1 / 3, "match_precision": 1 / 3, "match_recall": 1 / 4}
    expected |= {"jaccard_index": 1 / 5, "match_delay": 1.0, "match_f1": 2 / 7}
    expected["match_cost"] = (1 - 6 / 7 + 0.3 * (2 / 5) ** 1.5 + 1) / 2
    expected |= {"match_bleu_1": 3 / 4, "match_bleu_2": (3 / 4 * 1 / 3) ** 0.5, "match_bleu_3": 0, "match_bleu_4": 0}
    # METEOR: F of 30/31 with recall nine times as heavy, and 2 chunks of 3 words. CIDEr needs several texts.
    expected |= {"match_meteor_stem": 30 / 31 * (1 - 0.5 * (2 / 3) ** 3), "match_cider": 0}
    # METEOR 1.5: "the" weighs 0.25 and other words 0.75, so precision is 1.75 / 2.5. The chunks are the same two.
    expected["match_meteor_1.5_stem"] = 1 / (0.15 / 0.7 + 0.85) * (1 - 0.6 * (2 / 3) ** 0.2)
    assert scores == {f"{name}_token_f1": pytest.approx(value, abs=1e-4) for name, value in expected.items()}


def test_bleu_sums_counts_over_texts_and_takes_off_for_length():
    # 5 of 6 words and 2 of 4 pairs; 6 words for 8. The second text has no three words, and the first one triple.
    said_texts, true_texts = ["Cut the red onion.", "Stir it!"], ["cut the onion, the red onion", "stir on"]
    short = math.exp(1 - 8 / 6)
    expected = [5 / 6 * short, (5 / 6 * 3 / 4) ** 0.5 * short, (5 / 6 * 3 / 4 * 1 / 2) ** (1 / 3) * short, 0]
    assert score_bleu(said_texts, true_texts) == pytest.approx(expected, abs=1e-3)
    assert score_bleu(["."], ["a"]) == score_bleu([], []) == [0.0] * 4
    assert score_bleu(["a b c d e"], ["a b c d e"]) == pytest.approx([1.0] * 4)
    metric = evaluate_metric("dialogue_matching")
    scores = metric.compute(
        predictions=[said((1, "."), (5, "a b"))], references=[said((1, "."), (5, "a b"))], similarity="exact"
    )
    assert scores["match_bleu_2_exact"] == pytest.approx(1.0), "a true text without a word is left out"
    nothing = metric.compute(predictions=[[]], references=[said((1, "a"))], similarity="exact")
    assert nothing["match_bleu_1_exact"] == nothing["match_cider_exact"] == nothing["match_cost_exact"] == 0.0


def turn(time, role, text):
    return {"time": float(time), "role": role, "text": text}


def test_a_language_model_grades_dialogues_three_times(tmp_path):
    def reply(request):
        system, user = (message["content"] for message in request["messages"])
        assert "1 to 5" in system and (request["temperature"], request["top_p"]) == (0.5, 0.95)
        if "[3.0s] User: Wait." in user:
            return "I cannot {grade} this.\n---\nNo grade."
        true, generated = user.split("Generated dialogue by the model:\n")
        assert true == "Gold-standard reference dialogue:\n[1.5s] User: How?\n[1.5s] Assistant: Cut it.\n\n\n"
        assert generated.startswith("[0.33s] Assistant: Hello.\n[1.5s] User: How?\n\n\nFormat")
        last = '{"correctness": %s, "promptness": 2, "efficiency": 9, "overall": "good"}'
        return ["No grade.", last % 3, 'So {"correctness": 1}.\n---\n' + last % 4][request["seed"]]

    asking, empty = turn(1.5, "user", "How?"), turn(2, "assistant", " ")
    predictions = [[asking, turn(1 / 3, "assistant", "Hello."), empty], [turn(3, "user", "Wait.")]]
    references = [[asking, turn(1.5, "assistant", "Cut it.")], [turn(3, "user", "Wait.")]]
    with scripted_endpoint(reply) as (url, asked):
        for _ in range(2):
            judge = EndpointJudge(Endpoint(url, "judge", cache=tmp_path))
            scores = evaluate_metric("dialogue_judge").compute(
                predictions=predictions, references=references, judge=judge
            )
        assert len(asked) == 6, "three times a video, and the second time all come from the cache"
    expected = {"judge_correctness": 3.5, "judge_promptness": 2.0, "judge_efficiency": 0.0, "judge_overall": 0.0}
    assert scores == {**expected, "judge_ungraded": 1}


# --------------------------------------------------------------------------------------------------- described words


class Tagger:
    """Stands for spaCy: a word is what the table says, and one that ends in "s" has a base form."""

    kinds = MappingProxyType(
        {"dog": "NOUN", "dogs": "NOUN", "runs": "VERB", "Rex": "PROPN", "cat": "NOUN", "is": "VERB"}
    )
    Defaults = SimpleNamespace(stop_words={"i", "the"})

    def __call__(self, text):
        words = text.replace(".", "").split()
        return [SimpleNamespace(text=w, pos_=self.kinds.get(w, "X"), lemma_=w.removesuffix("s")) for w in words]


@pytest.fixture
def word_models(monkeypatch):
    vectors = {"dog": (1.0, 0.0), "Rex": (0.8, 0.6), "run": (0.0, 1.0), "cat": (-0.8, -0.6)}
    encoder = SimpleNamespace(encode=lambda texts, **_: np.array([vectors[text] for text in texts]))
    models = {"sentence_transformers": SimpleNamespace(SentenceTransformer=lambda *_, **__: encoder)}
    models["spacy"] = SimpleNamespace(load={"en_core_web_lg": Tagger()}.get, Language=Tagger)
    caches = (_load_encoder, content_words_module._load_tagger, content_words_module._base)
    for name, module in models.items():
        monkeypatch.setitem(sys.modules, name, module)
    for cache in caches:
        cache.cache_clear()
    yield monkeypatch
    for cache in caches:
        cache.cache_clear()


def test_described_words_by_hand(word_models):
    """Cosines: Rex is near dog (0.8) and run (0.6), and opposite to cat."""
    metric = evaluate_metric("described_words")
    assert content_words(["The dogs is.", "A dog runs"]) == {"dog", "run"}, "'is' has the base form 'i', a stop word"
    predictions, references = ["The Rex cat."], [["The dogs.", "A dog runs."]]
    scores = metric.compute(predictions=predictions, references=references)
    # Rex is found, cat is not. Both true words are found, by Rex.
    assert scores == {"precision": 1 / 2, "recall": 1.0, "f1": pytest.approx(2 / 3)}
    published = metric.compute(predictions=predictions, references=references, rule="published")
    assert published == {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2}
    # Two words are near the one true word: the published recall is 2.
    many = {"predictions": ["Rex dog"], "references": [["dogs"]]}
    assert metric.compute(**many, rule="published")["recall"] == 2.0 and metric.compute(**many)["recall"] == 1.0
    rows, replies = [{"truth": {"content": ["dogs"]}}], [{"text": "Rex dog"}]
    assert [find_task("vript_hard_hal").score(rows, replies, {}, flag)["recall"] for flag in (False, True)] == [1, 2]
    silent = metric.compute(predictions=["", *predictions], references=[*references, *references])
    assert silent["precision"] == 1 / 4 and silent["f1"] == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match='`rule` is "both" or "published"'):
        metric.compute(**many, rule="x")
    word_models.setitem(sys.modules, "spacy", None)
    content_words_module._load_tagger.cache_clear()
    with pytest.raises(ImportError, match="python -m spacy download en_core_web_lg"):
        find_task("vript_hard_hal").check({})


def test_the_window_and_the_assignment_of_least_cost():
    metric = evaluate_metric("dialogue_matching")
    texts = said((4, "cut it"), (5, "cut it"))
    # Both replies are nearest to the truth at 5 s. The first takes that at 3 s, since the sum is less.
    scores = metric.compute(
        predictions=[texts], references=[said((5, "cut it"), (3, "cut it"))], similarity="exact", before=1, after=1
    )
    assert scores["match_f1_exact"] == 1.0 and scores["match_delay_exact"] == 0.5
    # The truth may be a second later, not earlier.
    early = metric.compute(predictions=[texts[:1]], references=[texts[1:]], similarity="exact", before=0, after=1)
    late = metric.compute(predictions=[texts[1:]], references=[texts[:1]], similarity="exact", before=0, after=1)
    assert early["match_f1_exact"] == 1.0 and late["missing_rate_exact"] == late["redundant_rate_exact"] == 1.0
    with pytest.raises(ValueError, match="The window must reach at least a frame"):
        metric.compute(predictions=[texts], references=[texts], similarity="exact", before=0, after=0.2)


# --------------------------------------------------------------------------------------------------------------- PAUC


def span(start, end, content, question="What happens?", related_end=None):
    times = {"start": float(start), "end": float(end), "related_end": related_end}
    return {"question": question, "content": content, **times}


def test_the_area_equals_values_computed_by_hand():
    metric = evaluate_metric("pauc")
    predictions = [
        said((1, "a dog"), (12, "a red car"), (16, "NO REPLY"), (18, "a red car stops"), (18.5, "a red car")),
        said((3, "late"), (3.5, "")),
        [],
    ]
    references = [[span(10, 20, "a red car stops"), span(30, 40, "it leaves")], [span(4, 8, "x")], []]
    scores = metric.compute(predictions=predictions, references=references, judge="token_f1", max_level=4)
    # F1 of 6/7 rounds to level 3. With omega 0.5 the replies count at 1 s and 4 s of 10 s.
    first = (1 * 0.5 + 3 * 3 + 6 * 4) / 40
    assert scores["pauc_token_f1"] == pytest.approx(((first + 0.125) / 2 + 0.125) / 2), "the third has no span"
    # "a red car stops" is similar to "a red car", and "a red car" was said before. Five replies are not silence.
    assert scores["duplicate_share_token_f1"] == pytest.approx(2 / 5)
    assert (scores["pauc_omega"], scores["pauc_max_level"], scores["pauc_silent"]) == (0.5, 4, 0.125)
    assert scores["pauc_unjudged"] == 0
    timely = metric.compute(
        predictions=predictions[:1], references=[references[0][:1]], judge="exact", max_level=2, omega=0.0
    )
    # Level 0 from 2 s, full from 8 s.
    assert timely["pauc_exact"] == pytest.approx((2 * 0.5 + 6 * 0 + 2 * 2) / 20) and timely["pauc_silent"] == 0.25
    anytime = metric.compute(
        predictions=[said((20, "a red car stops"))], references=[references[0][:1]], judge="exact", omega=1.0
    )
    assert anytime["pauc_exact"] == 1.0


def test_the_benchmark_joins_replies_forgets_late_losses_and_counts_spans():
    metric = evaluate_metric("pauc")
    predictions = [said((2, "a red"), (4, "car"), (6, "and a blue bus that waits"), (21, "it")), []]
    references = [
        [span(0, 8, "a red car", related_end=5.0), span(20, 24, "it leaves", related_end=None)],
        [span(0, 4, "x")],
    ]
    scores = metric.compute(predictions=predictions, references=references, rule="benchmark", max_level=2, omega=0.0)
    # "a red" has an F1 of 4/5, "a red car" of 1. The third, 3 of 9 words, lowers the level after 5 s: it is ignored.
    first = (2 * 0.5 + 2 * 2 + 4 * 2) / 16
    second = (1 * 0.5 + 3 * 1) / 8
    assert scores["pauc_benchmark_token_f1"] == pytest.approx((first + second + 0.25) / 3)
    reward = metric.compute(predictions=predictions, references=references, max_level=2, omega=0.0)
    # Each reply by itself: levels 2 (4/5), 1 (1/2) and 0 (2/9).
    first = (2 * 0.5 + 2 * 2 + 2 * 1 + 2 * 0) / 16
    assert reward["pauc_token_f1"] == pytest.approx(((first + second) / 2 + 0.25) / 2)
    with pytest.raises(ValueError, match="`rule` is"):
        metric.compute(predictions=predictions, references=references, rule="x")


def test_wrong_spans_and_options_are_refused():
    metric = evaluate_metric("pauc")
    for options, message in (({"omega": 2}, "`omega` in"), ({"judge": "nobody"}, "no similarity 'nobody': choose")):
        with pytest.raises(ValueError, match=message):
            metric.compute(predictions=[[]], references=[[span(0, 1, "x")]], **options)
    with pytest.raises(ValueError, match="must end after its start, got 4.0 to 4.0 s"):
        metric.compute(predictions=[[]], references=[[span(4, 4, "x")]])


def test_a_language_model_judges_each_pair_once(tmp_path):
    def reply(request):
        system, user = (message["content"] for message in request["messages"])
        if "Earlier replies" in user:
            return "No." if "again" in user else "<think>no, or</think>yes"
        assert "to 5 (everything" in system
        return "4" if "a car" in user.split("Model's answer:")[1] else "I cannot say"

    predictions = [said((1, "a car"), (2, "a bus"), (3, "a car again")), said((1, "a car"))]
    references = [[span(0, 4, "a red car")], [span(0, 4, "a red car")]]
    with scripted_endpoint(reply) as (url, asked):
        for _ in range(2):
            judge = EndpointJudge(Endpoint(url, "judge", cache=tmp_path))
            scores = evaluate_metric("pauc").compute(predictions=predictions, references=references, judge=judge)
        # Three different pairs, and two replies after others; the second time all come from the cache.
        assert len(asked) == 5
    first = (0.5 * 0.5 + 3.5 * 3) / 16
    assert scores["pauc_endpoint"] == pytest.approx(first) and scores["duplicate_share_endpoint"] == pytest.approx(
        1 / 4
    )
    assert scores["pauc_unjudged"] == 1, "no grade in 'I cannot say'"


@pytest.mark.parametrize(
    ("reply", "level"),
    [
        ("5", 4),
        ("**Grade: 2.**", 1),
        ("4/5", 3),
        ("3 out of 5: one of 2 things is missing", 2),
        ("Grade from 1 to 5: 5", 4),
        ("I'd give a 4 on the scale of 1-5.", 3),
        ("The truth has 3 balls, and the answer 2. Grade: 1", 0),
        # Chat templates may put the opening tag into the prompt.
        ("The grade runs from 1 to 5. 3 words are missing.\n</think>\n\n5", 4),
        ("<think>1 or 2?</think>The answer has it all.\n\n5", 4),
        ("<think>It may be 3", None),
        ("2 of 3 things are there: 4", None),
        ("4.5", None),
        ("0", None),
        ("6", None),
        ("I cannot say", None),
    ],
)
def test_a_grade_is_what_a_language_model_says_after_its_thoughts(reply, level):
    with scripted_endpoint(reply) as (url, _):
        assert EndpointJudge(Endpoint(url, "judge")).levels([("q", "a", "b")], 4) == [level]


def test_thoughts_are_no_answer_about_repeats_and_a_cut_reply_is_none():
    cut = {"index": 0, "message": {"role": "assistant", "content": "There are 3"}, "finish_reason": "length"}
    with scripted_endpoint("Yes or no?\n</think>\n\nNo.", {"id": "1", "choices": [cut]}) as (url, _):
        judge = EndpointJudge(Endpoint(url, "judge"))
        assert judge.repeats([(("a",), "b")]) == [True]
        # The beginning of its thoughts may stand in the prompt.
        assert judge.levels([("q", "a", "b")], 4) == [None]


@pytest.mark.parametrize(
    ("answer", "reason"), [(422, "answered 422: wrong"), (503, "answered 503: wrong"), (b"[]", "without a reply")]
)
def test_a_judge_that_does_not_reply_fails_its_check(answer, reason):
    with scripted_endpoint(answer) as (url, _):
        judge = EndpointJudge(Endpoint(url, "judge", max_retries=0))
        with pytest.raises(OSError, match=reason):
            check_judge(judge)
        # Later, a request without a reply leaves out one grade.
        assert judge.levels([("q", "a", "b")], 4) == [None]
    with scripted_endpoint("I cannot say") as (url, _):
        check_judge(EndpointJudge(Endpoint(url, "judge")))


def test_similarities(monkeypatch):
    pairs = [("The car, red.", "the car red"), ("a red car", "red bus"), ("", "")]
    assert find_similarity("exact")(pairs) == [1.0, 0.0, 1.0]
    assert find_similarity("token_f1")(pairs) == pytest.approx([1.0, 2 / 5, 1.0])
    assert find_judge("exact").repeats([(("a", "b"), "B."), ((), "a")]) == [True, False]
    _load_encoder.cache_clear()
    vectors = {"a": (1.0, 0.0), "b": (0.6, 0.8), "not a": (-1.0, 0.0)}
    encoder = SimpleNamespace(encode=lambda texts, **_: np.array([vectors[text] for text in texts]))
    library = SimpleNamespace(SentenceTransformer=lambda name, **_: encoder if "all-mpnet-base-v2" in name else None)
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    assert find_similarity("sentence")([("a", "b"), ("b", "b"), ("not a", "a")]) == pytest.approx([0.6, 1.0, 1.0])
    assert find_judge("sentence").levels([("q", "a", "b")], 4) == [2] and find_similarity("sentence")([]) == []
    _load_encoder.cache_clear()
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ImportError, match="pip install sentence-transformers"):
        find_similarity("sentence")(pairs)
