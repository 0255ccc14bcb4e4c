# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Take the page's pictures with Chromium: light, dark, on a phone, and the comparison.

```bash
python docs/photograph_space.py docs
```
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import sync_playwright


ROOT = Path(__file__).resolve().parents[1]
PORT = 7871
LAST = json.loads((ROOT / "samples" / "streamworld.json").read_text(encoding="utf-8"))["events"][-1][1]
DESK, PHONE = {"width": 1280, "height": 960}, {"width": 390, "height": 844}


def main() -> None:
    """Serve the page, play the sample, and take the pictures."""
    parser = argparse.ArgumentParser(description="Take pictures of the page.")
    parser.add_argument("out", type=Path, help="folder to write to")
    out = parser.parse_args().out
    environment = {**os.environ, "GRADIO_ANALYTICS_ENABLED": "False"}
    command = [sys.executable, str(ROOT / "space" / "app.py"), "--port", str(PORT)]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{PORT}").close()
                break
            except OSError:
                if server.poll() is not None:
                    raise SystemExit("error: the page did not start; run `python space/app.py` to see why") from None
                time.sleep(0.1)
        with sync_playwright() as playwright:
            flags = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags)
            for name, scheme, size in (("light", "light", DESK), ("dark", "dark", DESK), ("phone", "light", PHONE)):
                page = browser.new_page(viewport=size, color_scheme=scheme)
                page.goto(f"http://127.0.0.1:{PORT}")
                page.click("#streamworld")
                page.wait_for_function(f"document.querySelector('#chat').innerText.includes('{LAST}')")
                page.wait_for_function("document.querySelector('video').ended")
                page.fill("#question textarea, #question input", "What do you see?")
                page.click("#ask")
                page.wait_for_function("document.querySelector('#chat').innerText.includes('do you see')")
                page.wait_for_timeout(1500)
                page.screenshot(path=out / f"space_{name}.png", full_page=name == "phone")
                page.close()
            page = browser.new_page(viewport=DESK)
            page.goto(f"http://127.0.0.1:{PORT}")
            page.get_by_role("tab", name="Compare").click()
            page.click("#compare")
            page.wait_for_function("document.querySelector('#full_figures').innerText.includes('entries')")
            page.wait_for_timeout(6000)
            page.screenshot(path=out / "space_compare.png", full_page=True)
            browser.close()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
