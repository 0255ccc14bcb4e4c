# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Check what the browser or a client sent. Errors are shown to the person in one line."""

import base64
import math
from typing import Any

import gradio as gr
import numpy as np
from page import FPS
from PIL import Image
from uploads import open_picture


MOST_SECONDS = 1e6  # Latest second of a camera or a video.


def refusal(message: str) -> gr.Error:
    """Return an error that the page shows and the log does not."""
    return gr.Error(message, print_exception=False)


def call(function: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function, and show its `ValueError` to the person."""
    try:
        return function(*args, **kwargs)
    except gr.Error:
        raise
    except ValueError as error:
        raise refusal(str(error)) from None
    except FileNotFoundError:
        raise refusal("The video is no longer here. Choose it again.") from None


def check_number(name: str, value: Any, *, least: float = 0.0, most: float = MOST_SECONDS) -> float:
    """Return a number that the browser or a client sent."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not (math.isfinite(number) and least <= number <= most):
        raise refusal(f"`{name}` must be a number from {least:g} to {most:g}, not {value!r:.40}.")
    return number


def check_fps(value: Any) -> float:
    """Return a rate that the browser or a client sent."""
    return check_number("fps", value, least=FPS[0], most=FPS[1])


def check_text(name: str, value: Any) -> str:
    """Return a text that the browser or a client sent, empty for `None`."""
    if value is not None and not isinstance(value, str):
        raise refusal(f"`{name}` must be a text, not {value!r:.40}.")
    return value or ""


def read_frame(sent: dict[str, Any]) -> tuple[float, np.ndarray]:
    """Return the second and the picture, uint8 (height, width, 3), of a frame that the browser sent."""
    try:
        kind, data = sent["image"].split(",", 1)
        if not kind.startswith("data:image/") or len(data) > 2_000_000:
            raise ValueError
        with open_picture(base64.b64decode(data, validate=True)) as image:
            if image.width * image.height > 1024 * 1024:
                raise ValueError
            time, picture = sent["time"], np.asarray(image.convert("RGB"))
    except (ValueError, OSError, AttributeError, KeyError, TypeError, SyntaxError, Image.DecompressionBombError):
        message = "A frame is a `time` in seconds and an `image`: a data URL of a JPEG, PNG or WebP of at most 1 MP."
        raise refusal(message) from None
    return check_number("time", time), picture
