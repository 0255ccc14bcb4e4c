# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""METEOR 1.5: its rules in Python, and its program."""

import math
import shutil
import sys
from pathlib import Path

import pytest

from videollm_mod.train import meteor
from videollm_mod.train.meteor import find_program, read_synonyms, score_with_program, split_meteor
from videollm_mod.train.tasks import find_task
from videollm_mod.train.teacher_forcing import evaluate_metric
from videollm_mod.train.text_scores import available_scores, score_captions


# What was said, the true text, and the score that METEOR 1.5's program printed with `-l en -norm -m "exact stem"
# -w "1.0 0.6"` on 29 November 2026.
PRINTED = [
    ("You cut the onion.", "You are cutting the onions slowly.", 0.24391882357001293),
    ("He picks up the knife , the knife", "he picked the knife up", 0.3666173833052316),
    ("It's 3.5 km to the U.S. border, isn't it?", "it is 3.5 km to the US border", 0.4688953153102325),
    ("C puts the pick-up truck's key down ...", "C put the pick up truck 's keys down", 0.430359485597538),
    ("“Quickly” he ran away", "he 's quick to run away !", 0.15064935064935067),
    ("the the the cat", "the cat the cat sat on the mat", 0.17939896271298988),
    ("No. 5 is Mr. Smith's", "no . 5 is Mr Smith 's", 0.2233676265554817),
]
# And for all of them together.
PRINTED_TOGETHER = 0.2963612367899564
# The class of pycocoevalcap, as far as its callers see it: the same command, the same lines, and its lock.
PACKAGE = """
import os, subprocess, threading


class Meteor:
    def __init__(self):
        command = ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        self.meteor_p = subprocess.Popen(command, cwd=os.path.dirname(os.path.abspath(__file__)), **pipes)
        self.lock = threading.Lock()

    def ask(self, line):
        self.meteor_p.stdin.write((line + "\\n").encode())
        self.meteor_p.stdin.flush()

    def compute_score(self, gts, res):
        self.lock.acquire()
        evaluate = "EVAL"
        for key in gts:
            self.ask(" ||| ".join(("SCORE", " ||| ".join(gts[key]), res[key][0])))
            evaluate += " ||| " + self.meteor_p.stdout.readline().decode().strip()
        self.ask(evaluate)
        scores = [float(self.meteor_p.stdout.readline().strip()) for _ in gts]
        score = float(self.meteor_p.stdout.readline().strip())
        self.lock.release()
        return score, scores

    def __del__(self):
        self.lock.acquire()
        self.meteor_p.stdin.close()
        self.meteor_p.kill()
        self.meteor_p.wait()
        self.lock.release()
"""
# A program of the same lines: the share of the first true text's words that were said. It stops at the word "crash".
JAVA = """#!{python}
import sys
for line in sys.stdin:
    kind, *parts = [part.strip() for part in line.split("|||")]
    if "crash" in line:
        sys.exit("Error: Could not reserve enough space")
    if kind == "SCORE":
        true, said = parts[0].split(), parts[-1].split()
        print(len(set(true) & set(said)), len(set(true)), flush=True)
    else:
        counts = [[float(count) for count in part.split()] for part in parts]
        print(*(one / all for one, all in counts), sum(one for one, _ in counts), sep="\\n", flush=True)
"""


def forget_package():
    """Forget modules of pycocoevalcap, so that the next import looks for them."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        del sys.modules[name]


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A package of pycocoevalcap's name, and a `java` on the path that speaks as METEOR does."""
    folder = tmp_path / "site" / "pycocoevalcap" / "meteor"
    folder.mkdir(parents=True)
    (folder / "meteor.py").write_text(PACKAGE)
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(JAVA.replace("{python}", sys.executable))
    java.chmod(0o755)
    forget_package()
    monkeypatch.setenv("PATH", str(java.parent))
    monkeypatch.setattr(sys, "path", [str(tmp_path / "site"), *sys.path])
    yield java
    forget_package()


def score_meteor(said, true, **options):
    """Return the score of one text."""
    together, [score] = meteor.score_meteor([said], [true], **options)
    assert together == score
    return score


def test_scores_equal_values_computed_by_hand():
    # In the order of the true text: "a"; "man opened", a chunk of two; "the"; "box". Function words weigh 0.25, and
    # "opens" has the stem of "opened".
    share = (2 * 0.25 + (1 + 0.6 + 1) * 0.75) / (2 * 0.25 + 3 * 0.75)
    assert score_meteor("the man opens a box", ["a man opened the box"]) == pytest.approx(share * (1 - 0.6 * 0.8**0.2))
    # Two of three words are said, and nothing else: precision 1. They are one chunk.
    mean = 1 / (0.15 / 1 + 0.85 / (2 / 3))
    assert score_meteor("man opens", ["man opens box"]) == pytest.approx(mean * (1 - 0.6 * 0.5**0.2))
    # The better of two true texts counts. A text as the true one has no penalty, also if words are alike by stem only.
    assert score_meteor("man opens", ["man opens box", "Man opens"]) == 1.0
    assert score_meteor("man opens", ["men opened"]) == pytest.approx(1 / (0.15 / 0.3 + 0.85 / 0.3) * (1 - 0.6))
    assert score_meteor("man opens", ["man opened"]) == pytest.approx(0.8)
    assert score_meteor("", ["man"]) == score_meteor("man", [""]) == score_meteor("man", []) == 0.0


@pytest.mark.parametrize(("said", "true", "score"), PRINTED)
def test_scores_are_those_of_the_program(said, true, score):
    assert score_meteor(said, [true]) == pytest.approx(score, abs=1e-12)


def test_texts_together_have_the_score_of_their_sums():
    # 3 of 4 and 2 of 2 words match, in 1 and 2 chunks. All words are content words.
    said, true = ["man opens box slowly", "box red"], [["man opens box"], ["red box"]]
    together, scores = meteor.score_meteor(said, true)
    assert together == pytest.approx(1 / (0.15 / (5 / 6) + 0.85) * (1 - 0.6 * (3 / 5) ** 0.2))
    assert scores == [score_meteor(*pair) for pair in zip(said, true, strict=True)]
    # What the program printed last, for all of them together.
    said, true, _ = zip(*PRINTED, strict=True)
    assert meteor.score_meteor(said, [[text] for text in true])[0] == pytest.approx(PRINTED_TOGETHER, abs=1e-12)


def test_words_are_split_as_the_program_splits_them():
    text = "Mr. Smith's pick-up costs 1,000.50, “isn't it” … said the U.S. Dr.. Wait... No. 5."
    words = "mr. smith 's pick up costs 1,000.50 , \" isn 't it \" … said the us dr .. wait ... no. 5 ."
    assert split_meteor(text) == words.split()


def test_synonyms_match_by_the_files_of_wordnet():
    senses = ["auto%1:06:00:: 00000007 1 0", "car%1:06:00:: 00000007 1 0", "mouse%1:05:00:: 00000009 1 0"]
    find = read_synonyms([*senses, "pointer%1:06:00:: 00000009 1 0"], [[], ["mice mouse\n"]])
    assert find("cars") == find("auto") == {7} and find("mice") == {9} and find("bus") == find("as") == frozenset()
    share = (0.25 * 2 + 0.75 * (0.8 + 1)) / (0.25 * 2 + 0.75 * 2)
    assert score_meteor("the auto is red", ["the car is red"], find_synsets=find) == pytest.approx(share * 1.0)
    # Three of four words in two chunks.
    less = (0.25 * 2 + 0.75) / (0.25 * 2 + 0.75 * 2)
    assert score_meteor("the auto is red", ["the car is red"]) == pytest.approx(less * (1 - 0.6 * (2 / 3) ** 0.2))
    assert score_meteor("mice", ["pointers"], find_synsets=find) == pytest.approx(0.8)


@pytest.mark.usefixtures("program")
def test_the_program_scores_where_it_is_installed():
    assert find_program() is None
    assert "meteor_1.5" in available_scores() and "meteor_1.5" not in available_scores(["cider"])
    said, true = ["a red\nball", "", "no ||| thing"], [["a ball is red", "a"], ["two words"], ["thing"]]
    # A line break, and what parts the texts of a line, would put all later scores at the wrong texts.
    together, scores = score_with_program(said, true)
    assert scores == pytest.approx([3 / 4, 0.0, 1.0]) and together == 4
    assert score_with_program([], []) == (0.0, [])
    told = [{"time": 1.0, "text": "a ball is red"}]
    spoken = [{"time": 1.0, "text": "a red ball"}]
    found = evaluate_metric("narration_segments").compute(predictions=[spoken], references=[[told]])
    assert found["meteor_1.5"] == 3, "the program's score of all texts together, as FlowNar's code takes it"


def test_the_program_starts_once_for_the_captions_of_all_videos(program):
    starts = program.parent / "starts"
    program.write_text(
        program.read_text().replace("import sys\n", f"import sys\nopen({str(starts)!r}, 'a').write('.')\n")
    )
    event = {"start": 0.0, "end": 9.0, "text": "a red ball"}
    other = {"start": 20.0, "end": 30.0, "text": "a dog"}
    said = [[event, other], [event], []]
    true = [[[event | {"text": "a red box"}]], [[event]], [[event]]]
    found = evaluate_metric("dense_captions").compute(predictions=said, references=true)
    # Matches of each video, at all overlaps: its score of all captions together, not their mean.
    assert found["meteor_1.5"] == pytest.approx((2 + 3 + 0) / 3)
    assert starts.read_text() == ".", "the program reads its paraphrases for seconds"


@pytest.mark.usefixtures("program")
def test_a_program_that_stops_is_one_line():
    with pytest.raises(RuntimeError, match=r"METEOR's program stopped: Error: Could not reserve enough space\.$"):
        score_with_program(["a crash"], [["b"]])


def test_what_is_missing_is_one_line(program: Path, monkeypatch):
    assert "METEOR" not in find_task("narration").official_note
    program.unlink()
    # The table of --official says it too.
    assert find_task("narration").official_note.endswith(" on the path: install a Java runtime.")
    assert find_program() == (
        "METEOR 1.5 is a Java program, and there is no `java` on the path: install a Java runtime."
    )
    # The rest of the path may hold the package itself.
    monkeypatch.setattr(sys, "path", [])
    forget_package()
    assert "meteor_1.5" not in available_scores()
    with pytest.raises(ImportError, match=r'pip install -e "\.\[meteor\]"'):
        score_captions(["a"], [["a"]], names=["meteor_1.5"])


def test_the_published_program_scores_where_it_is_installed():
    pytest.importorskip("pycocoevalcap")
    if shutil.which("java") is None:
        pytest.skip("there is no Java")
    said = ["the auto is red", "He picked it up quickly.", "a\nb ||| c", ""]
    together, scores = score_with_program(
        said, [["the car is red"], ["He was quick to pick it up."], ["a b c"], ["a man"]]
    )
    assert together == pytest.approx(0.39626970276212353) and together != pytest.approx(sum(scores) / 4, abs=1e-3)
    assert scores == pytest.approx([0.925, 0.3160555803083806, 1.0, 0.0])
    assert math.isclose(scores[0], (0.5 + 0.75 * 1.8) / 2, abs_tol=1e-9)
