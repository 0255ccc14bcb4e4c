# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checks of the numbers and texts that a user passes. Both the model and the processor use them."""

import math
import operator
import reprlib
from numbers import Real
from typing import Any


# Beyond it a video would show each of its frames many times.
MOST_FPS = 1000


def check_number(
    name: str,
    value: Any,
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
    unit: str = "",
) -> float:
    """
    Return a number as a float. It may be Python's, NumPy's, a `Fraction` or a tensor with one element.

    Raises:
        `ValueError`: If it is no number or a truth value, is NaN or infinite, or is out of range.
    """
    try:
        number = value.item() if hasattr(value, "item") else value
        number = float(number) if isinstance(number, Real) and not isinstance(number, bool) else math.nan
    except (ValueError, RuntimeError, OverflowError):  # several elements, or an integer of 309 digits
        number = math.nan
    if not (math.isfinite(number) and above < number and least <= number <= most):
        kind = "positive" if above == 0 else "finite"
        bounds = [f"at least {least:g}"] * (least > -math.inf)
        bounds += [f"at most {most:g}"] * (most < math.inf and not number <= above)
        limits = f", {' and '.join(bounds)}" if bounds else ""
        raise ValueError(f"`{name}` must be a {kind} number{unit}{limits}, got {_in_one_line(value)}.")
    return number


def check_seconds(name: str, value: Any, *, least: float = -math.inf) -> float:
    """Return a time in seconds as a float; see [`check_number`]."""
    return check_number(name, value, least=least, unit=" of seconds")


def check_fps(value: Any, name: str = "fps") -> float:
    """Return a frame rate, in (0, 1000] frames per second, as a float; see [`check_number`]."""
    return check_number(name, value, above=0, most=MOST_FPS, unit=" of frames per second")


def check_count(name: str, value: Any, *, least: int = 1) -> int:
    """Return a whole number of any type as an int. Raises `ValueError` for other values, and for less than `least`."""
    try:
        count = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        count = least - 1
    if count < least:
        raise ValueError(f"`{name}` must be a whole number, at least {least}, got {_in_one_line(value)}.")
    return count


def check_normalized(pixels: Any) -> Any:
    """Return the pixel values of frames. Raises `ValueError` for bytes, which `normalize_frames` has not seen."""
    if not pixels.is_floating_point():
        raise ValueError(f"Frames must be normalised, got {pixels.dtype}: call `processor.normalize_frames` first.")
    return pixels


def check_text(name: str, text: Any) -> str:
    """Return a text. Raises `ValueError` for other values, and for a lone surrogate, which no tokenizer reads."""
    if not isinstance(text, str):
        raise ValueError(f"{name} must be a text, got {_in_one_line(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at position {error.start}"
        raise ValueError(f"{name} is not valid Unicode: it has a lone surrogate, {found}.") from None
    return text


def _in_one_line(value: Any) -> str:
    return " ".join(reprlib.repr(value).split())


__all__ = ["MOST_FPS", "check_count", "check_fps", "check_normalized", "check_number", "check_seconds", "check_text"]
