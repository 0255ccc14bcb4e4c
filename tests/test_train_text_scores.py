# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""METEOR, ROUGE-L and CIDEr of captions."""

import math
import shutil

import nltk
import pytest

from videollm_mod.train.teacher_forcing import evaluate_metric
from videollm_mod.train.text_scores import SCORES, available_scores, score_captions, split_words


def test_words_have_no_case_and_no_punctuation():
    assert split_words("You don't pick-up  the Knife, (again).") == [
        "you",
        "don't",
        "pick-up",
        "the",
        "knife",
        "again",
    ]


def test_scores_of_equal_and_unlike_captions():
    scores = score_captions(["A man opens the door.", "nothing alike"], [["a man opens the door"], ["he sits down"]])
    # Five words in one chunk: a penalty of 0.5 * (1/5)^3.
    assert scores["meteor_stem"] == pytest.approx([1 - 0.5 / 125, 0.0])
    assert scores["rouge_l"] == pytest.approx([1.0, 0.0]) and scores["cider"] == pytest.approx([10.0, 0.0])


def test_scores_equal_values_computed_by_hand():
    predictions = ["the man opens a box", "he walks"]
    references = [["a man opened the box", "man opens box"], ["she walks"]]
    scores = score_captions(predictions, references)
    # "opened" has the stem of "opens". Second reference: 3 of 5 words match 3 of 3 in two chunks.
    precision, recall = 3 / 5, 1.0
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    assert scores["meteor_stem"][0] == pytest.approx(max(mean * (1 - 0.5 * (2 / 3) ** 3), 1 - 0.5 * (4 / 5) ** 3))
    # Longest common subsequences: "man the box"... with the first, "man opens box" with the second.
    assert scores["rouge_l"][0] == pytest.approx((1 + 1.44) * 0.6 * 1.0 / (1.0 + 1.44 * 0.6))
    assert scores["rouge_l"][1] == pytest.approx(0.5)
    # Every n-gram is in one of two items, so all weights are log 2. Of two words, "walks" is right.
    assert scores["cider"][1] == pytest.approx(10 * (1 / 2 + 0 + 0 + 0) / 4)
    first = (4 / 5 + 0) / 4
    second = (3 / math.sqrt(5 * 3) + 1 / math.sqrt(4 * 2)) / 4 * math.exp(-((4 - 2) ** 2) / 72)
    assert scores["cider"][0] == pytest.approx(10 * (first + second) / 2)


def test_repeated_words_are_clipped_and_frequent_ones_count_less():
    references = [["you cut"], ["you stir"], ["they pour"]]
    scores = score_captions(["you cut cut cut", "", "they pour"], references)
    often, rare = math.log(3) - math.log(2), math.log(3)
    mine = math.hypot(often, 3 * rare)
    theirs = math.hypot(often, rare)
    unigrams = (often**2 + rare**2) / (mine * theirs)
    # Of the bigrams "you cut", "cut cut" and again, one is right. "cut cut" has weight 2 log 3.
    bigrams = rare**2 / (math.hypot(rare, 2 * rare) * rare)
    penalty = math.exp(-((3 - 1) ** 2) / 72)
    assert scores["cider"] == pytest.approx([10 * penalty * (unigrams + bigrams) / 4, 0.0, 5.0])
    assert scores["meteor_stem"][1] == scores["rouge_l"][1] == 0.0


def test_spaces_alone_may_split_words():
    scores = score_captions(["You cut."], [["you cut ."]], tokenize=str.split)
    assert scores["rouge_l"] == [0.0] and score_captions([], []) == {name: [] for name in SCORES}


@pytest.fixture(params=["folder", "archive"])
def wordnet(request, tmp_path, monkeypatch):
    """WordNet's files with one noun of two words, where NLTK looks for its data."""
    folder = tmp_path / "corpora" / "wordnet"
    folder.mkdir(parents=True)
    parts = ("adj", "adv", "noun", "verb")
    by_part = [name for part in parts for name in (f"index.{part}", f"data.{part}", f"{part}.exc")]
    for name in ("cntlist.rev", "index.sense", *by_part):
        (folder / name).touch()
    (folder / "lexnames").write_text("00\tnoun.all\t1\n")
    (folder / "data.noun").write_text("00000000 00 n 02 car 0 auto 0 000 | a vehicle\n")
    (folder / "index.noun").write_text("auto n 1 0 1 0 00000000\ncar n 1 0 1 0 00000000\n")
    (folder / "index.sense").write_text("auto%1:06:00:: 00000000 1 0\ncar%1:06:00:: 00000000 1 0\n")
    if request.param == "archive":
        shutil.make_archive(str(folder), "zip", folder.parent, "wordnet")
        shutil.rmtree(folder)
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])


CAPTIONS = (["the auto is red"], [["the car is red"]])


@pytest.mark.usefixtures("wordnet")
def test_synonyms_of_wordnet_match_where_it_is_on_the_machine():
    names = ("meteor_stem", "meteor_wordnet", "meteor_1.5_stem", "meteor_1.5_wordnet", "rouge_l", "cider")
    assert available_scores() == names and available_scores(["cider"]) == ("cider",)
    scores = score_captions(*CAPTIONS, names=names)
    # Four words in one chunk, of which three are equal and one is a synonym.
    assert scores["meteor_wordnet"] == pytest.approx([1 - 0.5 / 4**3])
    # Three of four words in two chunks.
    assert scores["meteor_stem"] == pytest.approx([0.75 * (1 - 0.5 * (2 / 3) ** 3)])
    # By METEOR 1.5, a synonym weighs 0.8, and "the" and "is" weigh 0.25 where other words weigh 0.75.
    synonyms, stems = (0.5 + 0.75 * 1.8) / 2, (0.5 + 0.75) / 2 * (1 - 0.6 * (2 / 3) ** 0.2)
    assert scores["meteor_1.5_wordnet"] == pytest.approx([synonyms])
    assert scores["meteor_1.5_stem"] == pytest.approx([stems])
    said = [{"time": 1.0, "text": CAPTIONS[0][0]}], [{"time": 1.0, "text": CAPTIONS[1][0][0]}]
    found = evaluate_metric("narration_segments").compute(predictions=[said[0]], references=[[said[1]]])
    assert found["meteor_wordnet"] == pytest.approx(1 - 0.5 / 4**3) and found["meteor_stem"] < 0.7
    assert found["meteor_1.5_wordnet"] == pytest.approx(synonyms)
    assert found["meteor_1.5_stem"] == pytest.approx(stems)
    options = {"similarity": "token_f1"}
    found = evaluate_metric("dialogue_matching").compute(predictions=[said[0]], references=[said[1]], **options)
    assert found["match_meteor_wordnet_token_f1"] == pytest.approx(1 - 0.5 / 4**3)
    assert found["match_meteor_stem_token_f1"] < 0.7
    assert found["match_meteor_1.5_wordnet_token_f1"] == pytest.approx(synonyms)
    events = [[{"start": 0.0, "end": 1.0, "text": texts}] for texts in (CAPTIONS[0][0], CAPTIONS[1][0][0])]
    found = evaluate_metric("dense_captions").compute(predictions=[events[0]], references=[[events[1]]])
    assert found["meteor_1.5_wordnet"] == pytest.approx(synonyms)
    assert found["meteor_wordnet"] == pytest.approx(1 - 0.5 / 4**3) and found["meteor_stem"] < 0.7


def test_without_wordnet_there_is_no_score_of_that_name(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
    assert available_scores() == SCORES
    for name in ("meteor_wordnet", "meteor_1.5_wordnet"):
        with pytest.raises(LookupError, match="wordnet"):
            score_captions(*CAPTIONS, names=[name])
