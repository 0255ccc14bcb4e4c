# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""When to speak and what is worth showing: policies, probes, and replies that are cut or withdrawn."""

import copy
import math
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks_videollm_mod import check_count, check_number, check_seconds, check_text


# What the user is taken to say before a reply that nobody asked for, unless the model has learned when to speak.
DEFAULT_PROMPT = "What is happening now? Answer in one short sentence."
# The question of the policy "probe".
PROBE_QUESTION = "Is there anything new to report?"
# Defaults of the options of policies that are not learned.
EVERY, MAX_WORDS, NO_REPEAT, MIN_SILENCE = 2.0, 40, 1, 1.0
# Times of frames are rounded. A frame may come this many seconds before its time.
_EARLY = 1e-6
# A run of words loops when so many words in a row repeat those before them.
_LOOP_WORDS = 6
# Scripts without spaces, where each character counts as a word: Thai to Lao, Khmer, Japanese kana, Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_UNSPACED}][^\w\s]*|[^\s{_UNSPACED}]+")
_SENTENCE_END = re.compile(r"""[.!?\u2026]+["')\]\u2019\u201d]*(?=\s)|[\u3002\uff01\uff1f]+[\u300d\u300f\u201d]*|\n""")


@dataclass(frozen=True)
class SeenFrame:
    """
    What a callable given as `speak` decides by.

    Attributes:
        time (`float`): Time of the frame in seconds.
        frame (`int`): Its index in the stream.
        features (`torch.Tensor` of shape `config.frame_feature_shape`): Its features, before the connector.
        interval_probability (`float`): The model's probability of silence after it.
        speaks (`bool`): The decision of the interval rule.
        last_reply (`float`, *optional*): Time of the last reply in seconds, or `None` before the first.
    """

    time: float
    frame: int
    features: torch.Tensor
    interval_probability: float
    speaks: bool
    last_reply: float | None


class Probe:
    """
    A question about what was seen, answered by the probability of one answer against another.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        question (`str`): What the user asks.
        answers (`Sequence[str]`, *optional*, defaults to `("Yes", "No")`): The two answers.

    Attributes:
        probability (`float`, *optional*): That of the first answer. `None` until the model was asked.

    Raises:
        `ValueError`: If a text is empty, or the answers begin with the same token.
    """

    def __init__(self, tokenizer: Any, question: str, answers: Sequence[str] = ("Yes", "No")) -> None:
        if not check_text("A question", question).strip():
            raise ValueError(f"A question must be a text that is not empty, got {question!r}.")
        if isinstance(answers, str) or len(answers) != 2:
            raise ValueError(f"`answers` must be two texts, such as ('Yes', 'No'), got {answers!r}.")
        self.question, self.probability = question, None
        yes, no = (_first_tokens(tokenizer, answer) for answer in answers)
        # A tokenizer may make one token of the space before any word.
        self._tokens = sorted(yes - no), sorted(no - yes)
        if not all(self._tokens):
            raise ValueError(f"`answers` must begin with different tokens, got {answers[0]!r} and {answers[1]!r}.")

    def read(self, logits: torch.Tensor) -> float:
        """Store and return the probability, from the scores (vocabulary,) of the reply's first token."""
        yes, no = (logits[tokens].float().logsumexp(dim=-1) for tokens in self._tokens)
        self.probability = float((yes - no).sigmoid())
        return self.probability


def _first_tokens(tokenizer: Any, answer: str) -> set[int]:
    """Return the first tokens of the usual spellings of an answer."""
    words = {check_text("An answer", answer).strip(), answer.strip().lower()}
    spellings = [space + word for word in words for space in ("", " ")]
    return {ids[0] for ids in (tokenizer.encode(text, add_special_tokens=False) for text in spellings) if ids}


# ------------------------------------------------------------------------------------------------------------ policies


class Policy:
    """
    Decides at which frames a session speaks without being asked. This one follows the interval rule. `every` (seconds)
    and `threshold` are the options `every` and `speak_threshold` of [`StreamingSession`].
    """

    name = "learned"
    default_threshold: float | None = None

    def __init__(self, every: float | None = None, threshold: float | None = None) -> None:
        self.every = EVERY if every is None else every
        self.threshold = self.default_threshold if threshold is None else threshold
        self.due = -math.inf  # time of the next frame that it may choose

    def choose(self, frames: Sequence[Any]) -> int | None:  # noqa: ARG002
        """Return the index of the frame to speak at, if it is known before the model sees them."""
        return None

    def decide(self, frame: SeenFrame) -> bool | str:
        """Return whether to speak at a frame that was seen and not chosen before."""
        return frame.speaks

    def attempt(self, frame: Any) -> None:
        """Take note that the session speaks, or asks whether to speak, at a frame."""


class EveryPolicy(Policy):
    """Speaks once in `every` seconds, at the first frame at or after each multiple of it since the first frame."""

    name = "every"
    start: float | None = None

    def choose(self, frames: Sequence[Any]) -> int | None:
        """Return the index of the first frame that is due."""
        return next((index for index, frame in enumerate(frames) if frame.time >= self.due - _EARLY), None)

    def decide(self, frame: SeenFrame) -> bool:  # noqa: ARG002
        """Return False: frames are chosen before they are seen."""
        return False

    def attempt(self, frame: Any) -> None:
        """Be due at the next multiple of `every` seconds after the first frame."""
        self.start = frame.time if self.start is None else self.start
        self.due = self.start + self.every * (math.floor((frame.time - self.start + _EARLY) / self.every) + 1)


class ChangePolicy(EveryPolicy):
    """
    Speaks at a frame that differs from the one last spoken about: the cosine distance between their features, averaged
    over tokens, exceeds the threshold. At most once in `every` seconds; the first frame counts as changed.
    """

    name, default_threshold = "change", 0.05
    spoken: torch.Tensor | None = None

    def choose(self, frames: Sequence[Any]) -> int | None:
        """Return the index of the first frame that is due and differs."""
        first = super().choose(frames)
        if first is None or self.spoken is None:
            return first
        pooled = torch.stack([_pool(frame.features) for frame in frames[first:]])
        differs = (1 - pooled @ self.spoken > self.threshold).tolist()
        return first + differs.index(True) if any(differs) else None

    def attempt(self, frame: Any) -> None:
        """Compare with this frame from now on."""
        self.spoken, self.due = _pool(frame.features), frame.time + self.every


class ProbePolicy(EveryPolicy):
    """Asks the model once in `every` seconds whether there is anything new, and speaks if yes is likely enough."""

    name, default_threshold = "probe", 0.5


class CallablePolicy(Policy):
    """Speaks where a function says so."""

    name = "function"

    def __init__(self, function: Callable[[SeenFrame], bool | str | None]) -> None:
        super().__init__()
        self.function = function

    def decide(self, frame: SeenFrame) -> bool | str:
        """Ask the function."""
        answer = self.function(frame)
        return check_text("The prompt of a reply", answer).strip() if isinstance(answer, str) else bool(answer)


POLICIES = {policy.name: policy for policy in (Policy, EveryPolicy, ChangePolicy, ProbePolicy)}


def _pool(features: torch.Tensor) -> torch.Tensor:
    """Return the mean of features (tokens, hidden), normalised."""
    return torch.nn.functional.normalize(features.mean(dim=0, dtype=torch.float32), dim=0)


def new_policy(speak: Any, every: float | None, threshold: float | None, learned: str) -> Policy:
    """
    Return the policy of a session; see [`StreamingSession`] for its options. `learned` is the configuration's policy.

    Raises:
        `ValueError`: If the name is unknown, or an option is out of range or not one of the policy's.
    """
    if speak is None:
        speak = "every" if learned == "learned" and every is not None else learned
    if not callable(speak) and not (isinstance(speak, str) and speak in POLICIES):
        raise ValueError(f"`speak` is {speak!r}; it must be {', '.join(map(repr, POLICIES))} or a function.")
    name = speak if isinstance(speak, str) else "a function"
    if every is not None:
        every = check_number("every", every, above=0, unit=" of seconds")
        if name in ("learned", "a function"):
            raise ValueError(f"`every` does not belong to {name}: leave it out, or set `speak='every'`.")
    if threshold is not None:
        if name not in ("change", "probe"):
            raise ValueError(f"`speak_threshold` belongs to 'change' and 'probe', not to {name}: leave it out.")
        threshold = check_number("speak_threshold", threshold, least=0, most=2 if name == "change" else 1)
    return POLICIES[speak](every, threshold) if isinstance(speak, str) else CallablePolicy(speak)


# ------------------------------------------------------------------------------------------------------------- replies


def _plain(text: str) -> str:
    """Return a text without case, spaces, punctuation and control characters, to compare it with others."""
    return "".join(x for x in text.casefold() if unicodedata.category(x)[0] not in "PZC")


def _words(text: str) -> Iterator[tuple[str, int]]:
    """Yield each word as it is compared, and where it ends in the text."""
    for found in _WORD.finditer(text):
        if word := _plain(found[0]):
            yield word, found.end()


def _longest_repetition(words: Sequence[str], least: int = 1) -> int:
    """
    Return how many of the last words repeat the words just before them, at any distance. With `least`, count only
    repetitions of so many words that are also complete.
    """
    longest = 0
    for distance in range(1, len(words)):
        count = 0
        while count + distance < len(words) and words[-1 - count] == words[-1 - count - distance]:
            count += 1
        if count >= (least if least == 1 else max(least, distance)):
            longest = max(longest, count)
    return longest


class Draft:
    """
    A reply while it is generated: which of its tokens are sure to be shown, and where it must end.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        streamer (`BaseStreamer`, *optional*): Receives tokens when they are sure to be shown.
        recent (`Sequence[str]`): Replies that it must not repeat, as [`_plain`] returns them.
        no_repeat (`bool`): Whether it must not repeat them or itself, or be empty.
        max_words (`int`): Most words, or 0 for no limit.

    Attributes:
        token_ids (`list[int]`): Its tokens.
    """

    def __init__(
        self, tokenizer: Any, streamer: Any | None, recent: Sequence[str] = (), *, no_repeat: bool, max_words: int
    ) -> None:
        self.tokenizer, self.streamer, self.recent = tokenizer, streamer, recent
        self.no_repeat, self.max_words = no_repeat, max_words
        self.token_ids: list[int] = []
        self._cut_at: int | None = None
        self._num_put = 0
        self._ends: list[int] = []  # where the text of each token ends

    @property
    def must_end(self) -> bool:
        """Whether it loops or has too many words."""
        return self._cut_at is not None

    def add(self, token: int) -> None:
        """Add a token."""
        self.token_ids.append(token)
        if not (self.no_repeat or self.max_words):
            self._put(len(self.token_ids))
            return
        text = self._decode()
        self._ends.append(len(text))
        # The last word may be unfinished.
        words = list(_words(text))
        complete = words[:-1]
        self._cut_at = self._find_cut(text, complete, len(words))
        repeated = _longest_repetition([word for word, _ in complete]) if self.no_repeat else 0
        safe = complete[-1 - repeated][1] if len(complete) > repeated else 0
        if self.max_words:
            # The reply may be cut after any sentence.
            safe = min(safe, *_sentence_ends(text)[-1:], len(text))
        if not self._repeats(text[:safe], as_beginning=True):
            self._put(sum(end <= safe for end in self._ends))

    def end(self, *, is_complete: bool) -> bool:
        """
        End the reply, which `is_complete` if the model has ended it. Remove the tokens that are not shown, and return
        whether it is shown at all.
        """
        if self.no_repeat or self.max_words:
            text = self._decode()
            words = list(_words(text))
            cut = self._find_cut(text, words, len(words)) if self._cut_at is None else self._cut_at
            if cut is None and self.max_words and not is_complete:
                cut = max(_sentence_ends(f"{text} "), default=None)
            if cut is not None:
                while len(self.token_ids) > self._num_put and self._decode(-1).startswith(text[:cut]):
                    self.token_ids.pop()
            if self._repeats(self._decode(), as_beginning=not is_complete and self._cut_at is None):
                return False
        self._put(len(self.token_ids))
        if self.streamer is not None:
            self.streamer.end()
        return True

    def _put(self, count: int) -> None:
        """Give the streamer the first `count` tokens, as far as it does not have them."""
        if self.streamer is not None:
            # Those with `skip_prompt` skip what comes first, which is a prompt in `generate` only.
            if hasattr(self.streamer, "next_tokens_are_prompt"):
                self.streamer.next_tokens_are_prompt = False
            for token in self.token_ids[self._num_put : count]:
                self.streamer.put(torch.tensor([token]))
        self._num_put = max(self._num_put, count)

    def _find_cut(self, text: str, words: Sequence[tuple[str, int]], num_words: int) -> int | None:
        """Return where the text must end, if it has too many words or loops."""
        cuts = []
        if self.no_repeat:
            looped = _longest_repetition([word for word, _ in words], least=_LOOP_WORDS)
            cuts += [words[-1 - looped][1]] if looped else []
        if self.max_words and num_words > self.max_words:
            limit = words[self.max_words - 1][1]
            cuts.append(max((end for end in _sentence_ends(text) if end <= limit), default=limit))
        return min(cuts, default=None)

    def _repeats(self, text: str, *, as_beginning: bool = False) -> bool:
        """Return whether a text that must not is empty, or is a recent reply or the beginning of one."""
        plain, known = _plain(text), (*self.recent, "")
        is_known = any(earlier.startswith(plain) for earlier in known) if as_beginning else plain in known
        return self.no_repeat and is_known

    def _decode(self, stop: int | None = None) -> str:
        return self.tokenizer.decode(self.token_ids[:stop], skip_special_tokens=True)


def _sentence_ends(text: str) -> list[int]:
    return [found.end() for found in _SENTENCE_END.finditer(text) if _plain(text[: found.end()])]


class Speaking:
    """
    When a session speaks without being asked, and which of these replies it shows. See [`StreamingSession`] for the
    options.

    Attributes:
        last_reply (`float`, *optional*): Time of the last reply that was shown.
        num_suppressed (`int`): Number of replies that were not shown.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        prompt: str | None = None,
        no_repeat: int | None = None,
        max_words: int | None = None,
        min_silence: float | None = None,
    ) -> None:
        is_learned = policy.name == "learned"
        own = ("", 0, 0, 0.0) if is_learned else (DEFAULT_PROMPT, NO_REPEAT, MAX_WORDS, min(MIN_SILENCE, policy.every))
        self.policy, self.is_learned = policy, is_learned
        self.prompt = own[0] if prompt is None else check_text("`prompt`", prompt).strip()
        self.no_repeat = own[1] if no_repeat is None else check_count("no_repeat", no_repeat, least=0)
        self.max_words = own[2] if max_words is None else check_count("max_words", max_words, least=0)
        self.min_silence = own[3] if min_silence is None else check_seconds("min_silence", min_silence, least=0)
        self.last_reply: float | None = None
        self.num_suppressed, self._recent = 0, ()

    def follow(self, earlier: "Speaking") -> None:
        """Know the replies that were shown before the options changed, and when the policy is due if it stays."""
        self.last_reply, self.num_suppressed = earlier.last_reply, earlier.num_suppressed
        self._recent = earlier._recent[-self.no_repeat :] if self.no_repeat else ()
        if (type(self.policy), self.policy.every) == (type(earlier.policy), earlier.policy.every):
            vars(self.policy).update(vars(earlier.policy) | {x: y for x, y in vars(self.policy).items() if x != "due"})

    def fork(self) -> "Speaking":
        """Return a copy that continues independently. A function given as `speak` is shared."""
        twin = copy.copy(self)
        twin.policy = copy.copy(self.policy)
        return twin

    def choose(self, frames: Sequence[Any]) -> tuple[int, bool]:
        """Return how many of these frames to see in one step, and whether to speak or probe at the last of them."""
        begin = next((index for index, frame in enumerate(frames) if self._may_speak(frame.time)), len(frames))
        index = self.policy.choose(frames[begin:])
        return (len(frames), False) if index is None else (begin + index + 1, True)

    def decide(
        self, frames: Sequence[Any], number: int, speaks: Sequence[bool], silence: Sequence[float], is_chosen: bool
    ) -> list[bool | str]:
        """
        Return for each frame seen whether to speak at it: True or a prompt at the first of them at most.

        Args:
            frames (`Sequence`): Frames with `time` and `features`.
            number (`int`): Index of the first in the stream.
            speaks (`Sequence[bool]`): The decisions of the interval rule.
            silence (`Sequence[float]`): The probabilities of silence.
            is_chosen (`bool`): Whether [`~Speaking.choose`] has chosen the last.
        """
        said: list[bool | str] = [False] * len(frames)
        for index, (frame, *seen) in enumerate(zip(frames, silence, speaks, strict=True)):
            given = SeenFrame(frame.time, number + index, frame.features, *seen, self.last_reply)
            answer = (is_chosen and index == len(frames) - 1) or self.policy.decide(given)
            if answer and self._may_speak(frame.time):
                said[index] = answer
                break
        return said

    def new_draft(self, tokenizer: Any, streamer: Any | None, *, is_asked: bool) -> Draft:
        """Return an empty reply. Answers to a user are shown as they are."""
        if is_asked:
            return Draft(tokenizer, streamer, no_repeat=False, max_words=0)
        return Draft(tokenizer, streamer, self._recent, no_repeat=self.no_repeat > 0, max_words=self.max_words)

    def shown(self, time: float, text: str) -> None:
        """Take note of a reply that is shown."""
        self.last_reply = time
        self._recent = (*self._recent, _plain(text))[-self.no_repeat :] if self.no_repeat else ()

    def _may_speak(self, time: float) -> bool:
        return self.last_reply is None or time >= self.last_reply + self.min_silence - _EARLY


__all__ = ["DEFAULT_PROMPT", "POLICIES", "PROBE_QUESTION", "Draft", "Probe", "SeenFrame", "Speaking", "new_policy"]
