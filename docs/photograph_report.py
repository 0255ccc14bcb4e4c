# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Draw `report.png`: the report of a sample clip on a desk in light mode and on a phone in dark mode.

```bash
python docs/photograph_report.py docs
```"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright


ROOT = Path(__file__).parents[1]
DESK, PHONE, MARGIN = {"width": 1000, "height": 844}, {"width": 390, "height": 844}, 20


def main() -> None:
    out = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = Path(folder, "report.html")
        # The toy was trained on this question, and not to summarise.
        command = ["report", str(ROOT / "samples" / "streamworld.mp4"), "--summary", "What do you see?"]
        subprocess.run([sys.executable, str(ROOT / "cli.py"), *command, "--out", str(report)], check=True)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        pictures = []
        for scheme, size in (("light", DESK), ("dark", PHONE)):
            page = browser.new_page(viewport=size, color_scheme=scheme)
            page.goto(report.as_uri())
            page.hover(".timeline a >> nth=2", force=True)
            page.screenshot(path=Path(folder, f"{scheme}.png"))
            pictures.append(Image.open(Path(folder, f"{scheme}.png")).convert("RGB"))
        browser.close()
    width = sum(picture.width for picture in pictures) + MARGIN
    both = Image.new("RGB", (width, DESK["height"]), "white")
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1], (pictures[0].width + MARGIN, 0))
    # A palette halves the file.
    both.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(out / "report.png", optimize=True)


if __name__ == "__main__":
    main()
