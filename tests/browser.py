# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""A real browser for tests of pages, and what axe finds in them."""

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
AXE = Path(sys.prefix) / "npm" / "node_modules" / "axe-core" / "axe.min.js"
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium: apt-get install chromium"
)
needs_axe = pytest.mark.skipif(not AXE.exists(), reason="needs axe, which npm brings: see the Makefile")


def faults(page: Any) -> list[tuple[str, list[str]]]:
    """Return the serious faults that axe finds by WCAG 2 A and AA."""
    if not page.evaluate("() => 'axe' in window"):
        # A script tag would be refused by the policy of a page.
        page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate("() => axe.run({ runOnly: ['wcag2a', 'wcag2aa'] })")
    assert len(found["passes"]) > 10, "axe ran"
    serious = [v for v in found["violations"] if v["impact"] in ("serious", "critical")]
    return [(v["id"], [node["html"][:200] for node in v["nodes"]]) for v in serious]
