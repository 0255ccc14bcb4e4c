# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`transformers serve` loads a checkpoint by its remote code and answers chat requests."""

import base64
import json
import socket
import time
from functools import cache
from pathlib import Path

import httpx
import pytest
from transformers import AutoModel, AutoProcessor
from transformers.cli.serve import Serve


ROOT = Path(__file__).parents[1]
CLIP = ROOT / "samples" / "streamworld.mp4"
QUESTION = "How many things do you see?"

pytestmark = pytest.mark.xdist_group("generic server")  # one process loads and serves the checkpoint


@pytest.fixture(scope="module")
def ask():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = {"host": "127.0.0.1", "port": port, "non_blocking": True}
    server = Serve(force_model=str(ROOT), device="cpu", trust_remote_code=True, **address)
    url = f"http://127.0.0.1:{port}/v1/chat/completions"

    def ask(*content, **options):
        request = {"messages": [{"role": "user", "content": list(content)}], "max_tokens": 20, **options}
        return httpx.post(url, json={"model": str(ROOT), **request}, timeout=60)

    try:
        while not server.server.started:
            time.sleep(0.05)
        yield ask
    finally:
        server.kill_server()


def text(said):
    return {"type": "text", "text": said}


def video(path):
    return {"type": "video_url", "video_url": {"url": str(path)}}


@cache
def load():
    model, processor = (kind.from_pretrained(ROOT, trust_remote_code=True) for kind in (AutoModel, AutoProcessor))
    return model, processor


def expected(content, **options):
    """Return the number of tokens of a message, and what `generate` answers."""
    model, processor = load()
    options |= {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    ids, num_tokens = model.generate(**inputs, max_new_tokens=20), inputs["input_ids"].shape[1]
    return num_tokens, processor.decode(ids[0, num_tokens:], skip_special_tokens=True)


def test_a_question_about_a_video_is_answered_as_by_generate(ask):
    answer = ask(video(CLIP), text(QUESTION)).json()
    num_tokens, said = expected([{"type": "video", "path": CLIP}, text(QUESTION)])
    assert answer["choices"][0]["message"]["content"] == said != ""
    assert answer["usage"]["prompt_tokens"] == num_tokens, "all frames, since there are fewer than 32"
    streamed = ask(video(CLIP), text(QUESTION), stream=True).text
    events = [json.loads(line.removeprefix("data: ")) for line in streamed.splitlines() if line]
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"]) == said


def test_a_request_may_choose_fewer_frames(ask):
    answer = ask(video(CLIP), text(QUESTION), chat_template_kwargs={"num_frames": 4}).json()
    num_tokens, _ = expected([{"type": "video", "path": CLIP}, text(QUESTION)])
    fewer, _ = expected([{"type": "video", "path": CLIP}, text(QUESTION)], num_frames=4)
    assert answer["usage"]["prompt_tokens"] == fewer < num_tokens / 2


def test_pictures_and_plain_text_are_answered_too(ask):
    assert ask(text("Hello.")).json()["choices"][0]["message"]["content"]
    path = ROOT / "docs" / "loss.png"
    url = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    answer = ask({"type": "image_url", "image_url": {"url": url}}, text(QUESTION)).json()
    frames = expected([{"type": "image", "path": str(path)}, text(QUESTION)])
    assert (answer["usage"]["prompt_tokens"], answer["choices"][0]["message"]["content"]) == frames
