# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A real browser for tests of pages, and what axe finds in them."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import av
import pytest

from videollm_mod.video_reading_videollm_mod import read_video


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(sys.prefix) / "npm" / "node_modules" / "axe-core" / "axe.min.js"
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium: apt-get install chromium"
)
needs_axe = pytest.mark.skipif(not AXE.exists(), reason="needs axe, which npm brings: see the Makefile")


def camera_flags(video: Path, film: Path) -> list[str]:
    """
    Return flags with which Chromium's camera shows a video at two frames per second, again and again.

    Args:
        video (`Path`): The video.
        film (`Path`): Where to write it in the camera's format, a `.y4m` file.
    """
    with av.open(str(film), "w", format="yuv4mpegpipe") as container:
        stream = container.add_stream("wrapped_avframe", rate=2)
        frames = [frame for _, frame in read_video(video, fps=2)]
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format="yuv420p")):
                container.mux(packet)
    return ["--no-sandbox", "--use-fake-device-for-media-stream", f"--use-file-for-fake-video-capture={film}"]


def faults(page: Any) -> list[tuple[str, list[str]]]:
    """Return the serious faults that axe finds by WCAG 2 A and AA."""
    if not page.evaluate("() => 'axe' in window"):
        # A script tag would be refused by the policy of a page.
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run({ runOnly: ['wcag2a', 'wcag2aa'] })")
    assert len(found["passes"]) > 10, "axe ran"
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    return [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in serious]
