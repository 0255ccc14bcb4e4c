# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions` over loopback, with the `openai` client, and URLs that lead where they must not."""

import asyncio
import base64
import io
import resource
import socket
import threading
import time as clock
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from engines import embedded
from openai import APIStatusError, OpenAI
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from serving_server import ROOMY, data_uri, picture, running

from videollm_mod.serving import fetching
from videollm_mod.serving.chat import Completion
from videollm_mod.serving.chat_messages import ChatRequest, Media
from videollm_mod.serving.fetching import fetch, is_public
from videollm_mod.serving.limits import Limits, RequestError


SAMPLES = Path(__file__).parents[1] / "samples"
QUESTION = "How many things do you see?"


class Handler(SimpleHTTPRequestHandler):
    """Serves the samples and a picture, and redirects from /to/... to other hosts."""

    def do_GET(self):
        self.server.hosts.append(self.headers["Host"])
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", f"http://{self.path.removeprefix('/to/')}")
            self.end_headers()
        elif self.path == "/picture.jpg":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(picture(embedded()[2][1], "JPEG"))
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def files():
    """A web server with the samples."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=SAMPLES)) as server:
        server.hosts = []
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def client():
    model, processor, _ = embedded()
    options = {"engine_options": ROOMY, "allow_private_urls": True, "max_video_bytes": 1_000_000}
    with running(model, processor, name="tiny", **options) as (address, _):
        yield OpenAI(api_key="-", base_url=f"http://{address}/v1", max_retries=0)


def ask(client, *parts, text=QUESTION, **options):
    content = [*parts, {"type": "text", "text": text}]
    return client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": content}], **options)


def video(url):
    return {"type": "video_url", "video_url": {"url": url}}


def image(url):
    return {"type": "image_url", "image_url": {"url": url}}


def answer_of_a_session(*, frames, times, text=QUESTION):
    model, processor, _ = embedded()
    session = model.stream(processor, speak=lambda _: False)
    session.push(frames, time=times)
    return session.ask(text)[-1]


def test_a_video_is_seen_and_asked_about(client, files):
    frames = embedded()[2]
    expected = answer_of_a_session(frames=frames, times=[number / 2 for number in range(len(frames))])
    named = ask(client, video(f"http://localhost:{files.server_port}/streamworld.mp4"))
    assert named.choices[0].message.content == expected.text and named.choices[0].finish_reason == "stop"
    assert named.videollm_mod == {"frames": len(frames), "fps": 2.0}
    assert named.usage.completion_tokens == len(expected.token_ids)
    assert named.usage.total_tokens == named.usage.prompt_tokens + named.usage.completion_tokens
    assert named.usage.prompt_tokens > 16 * len(frames)
    assert files.hosts[-1] == f"localhost:{files.server_port}"
    data = base64.b64encode((SAMPLES / "streamworld.mp4").read_bytes()).decode()
    sent = ask(client, video(f"data:video/mp4;base64,{data}"), extra_body={"videollm_mod": {"fps": 10}})
    assert sent.videollm_mod["frames"] <= ROOMY["max_frames"]  # and not 85


def test_videos_of_a_request_share_what_the_stream_remembers(client, files):
    """The first one does not take all of it, and no picture after them makes the model forget a frame."""
    clip = video(f"http://localhost:{files.server_port}/streamworld.mp4")
    shown, asked = image(data_uri(embedded()[2][1])), {"extra_body": {"videollm_mod": {"fps": 10}}}
    one, two = (ask(client, *[clip] * count, shown, **asked).videollm_mod for count in (1, 2))
    most = ROOMY["max_frames"]
    assert most - 2 <= two["frames"] <= most and most - 1 <= one["frames"] <= most
    assert two["fps"] == pytest.approx(one["fps"] / 2, rel=0.1)


def test_more_pictures_than_a_stream_remembers_are_answered():
    with running(*embedded()[:2], name="tiny", engine_options=ROOMY | {"max_frames": 4}) as (address, _):
        client = OpenAI(api_key="-", base_url=f"http://{address}/v1", max_retries=0)
        asked = ask(client, *[image(data_uri(embedded()[2][1]))] * 5, max_tokens=1)
    assert asked.videollm_mod["frames"] == 5


def test_a_picture_at_an_address_is_one_in_the_request(client, files):
    expected = answer_of_a_session(frames=embedded()[2][1:2], times=[0.0])
    named = ask(client, image(f"http://localhost:{files.server_port}/picture.jpg"))
    sent = ask(client, image(data_uri(embedded()[2][1], "JPEG").replace("data:", "DATA:")))
    assert files.hosts[-1] == f"localhost:{files.server_port}" and named.videollm_mod["frames"] == 1
    assert named.choices[0].message.content == sent.choices[0].message.content == expected.text
    assert named.usage == sent.usage and named.usage.completion_tokens == len(expected.token_ids)


def test_a_stream_of_chunks_has_the_same_answer(client):
    shown = image(data_uri(embedded()[2][1], "JPEG"))
    whole = ask(client, shown)
    chunks = list(ask(client, shown, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage == whole.usage
    # As in OpenAI's API: all chunks have the field if it was asked for.
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks[:-1])
    assert not any("usage" in chunk.model_fields_set for chunk in ask(client, shown, stream=True))


def test_text_alone_and_earlier_turns(client):
    assert ask(client, max_tokens=1).usage.completion_tokens == 1
    assert ask(client, max_tokens=1).choices[0].finish_reason == "length"
    first = {"role": "user", "content": [image(data_uri(embedded()[2][1])), {"type": "text", "text": QUESTION}]}
    messages = [{"role": "system", "content": "A multimodal AI assistant."}, first]
    messages += [{"role": "assistant", "content": "One."}, {"role": "user", "content": "What color is the tree?"}]
    answer = client.chat.completions.create(model="tiny", messages=messages)
    assert answer.choices[0].message.content and answer.videollm_mod["frames"] == 1


@pytest.mark.parametrize("shown", [False, True], ids=["text", "picture"])
def test_a_long_history_is_served(client, shown):
    content = [image(data_uri(embedded()[2][1]))] if shown else []
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": "Hi"}]}]
    messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "Hi"}] * 17
    answer = client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert answer.usage.completion_tokens and answer.videollm_mod["frames"] == len(content)


def test_a_picture_without_a_question_is_answered(client):
    """The answer is what a session says of it."""
    model, processor, frames = embedded()
    session = model.stream(processor, speak=lambda _: False)
    session.push(frames[1:2], time=[0.0])
    session.hear(None)
    expected = session._run()[-1].text
    messages = [{"role": "user", "content": [image(data_uri(frames[1]))]}]
    answer = client.chat.completions.create(model="tiny", messages=messages)
    assert answer.choices[0].message.content == expected and answer.videollm_mod["frames"] == 1


HELLO = [{"role": "user", "content": "Hello."}]
FIELDS = sorted({*CompletionCreateParamsBase.__annotations__, "stream"} - {"messages"})
ASK_FOR_NOTHING = [(name, None) for name in FIELDS] + [
    ("stop", []),
    ("n", 1),
    ("logprobs", False),
    ("top_logprobs", 0),
    ("response_format", {"type": "text"}),
    ("tools", []),
    ("functions", []),
    ("tool_choice", "none"),
    ("tool_choice", "auto"),
    ("function_call", "none"),
    ("logit_bias", {}),
    ("parallel_tool_calls", True),
    ("service_tier", "auto"),
    ("service_tier", "default"),
    ("modalities", ["text"]),
    ("verbosity", "medium"),
    ("store", False),
    ("metadata", {"a": "b"}),
    ("user", "somebody"),
    ("presence_penalty", 0),
    ("stream", False),
    ("videollm_mod", {"fps": None}),
]


@pytest.mark.parametrize(("name", "value"), ASK_FOR_NOTHING)
def test_fields_that_ask_for_nothing_are_accepted(name, value):
    asked = ChatRequest({"messages": HELLO, name: value}, Limits())
    plain = ChatRequest({"messages": HELLO}, Limits())
    assert vars(asked) == vars(plain) | {"limits": asked.limits}


ASK_FOR_MORE = [
    ("stop", ["x"]),
    ("n", 2),
    ("n", True),
    ("logprobs", True),
    ("response_format", {"type": "json_object"}),
    ("tools", [{"type": "function", "function": {"name": "f"}}]),
    ("tool_choice", "required"),
    ("logit_bias", {"5": 100}),
    ("modalities", ["text", "audio"]),
    ("reasoning_effort", "high"),
    ("web_search_options", {}),
    ("stream", 0),
    ("stream_options", []),
    ("videollm_mod", []),
]


@pytest.mark.parametrize(("name", "value"), ASK_FOR_MORE)
def test_fields_that_ask_for_more_are_refused(name, value):
    with pytest.raises(RequestError) as error:
        ChatRequest({"messages": HELLO, name: value}, Limits())
    assert (error.value.status, error.value.param) == (400, name)


def turn(role, content, **fields):
    return {"role": role, "content": content, **fields}


REFUSAL = [{"type": "refusal", "refusal": "No."}]


@pytest.mark.parametrize(
    ("messages", "system", "parts", "question"),
    [
        ([turn("system", "A."), turn("developer", "B."), *HELLO], "A.\nB.", [], "Hello."),
        ([turn("developer", [{"type": "text", "text": "B."}]), *HELLO], "B.", [], "Hello."),
        ([*HELLO, turn("system", "Be brief."), *HELLO], None, [("user", "Hello."), ("user", "Be brief.")], "Hello."),
        ([*HELLO, turn("developer", "Be brief.")], None, [("user", "Hello.")], "Be brief."),
        ([*HELLO, turn("assistant", REFUSAL), *HELLO], None, [("user", "Hello."), ("assistant", "No.")], "Hello."),
        (
            [*HELLO, turn("assistant", None, refusal="No.", tool_calls=None), *HELLO],
            None,
            [("user", "Hello."), ("assistant", "No.")],
            "Hello.",
        ),
        ([*HELLO, turn("assistant", None), *HELLO], None, [("user", "Hello.")], "Hello."),
    ],
    ids=["system and developer", "parts", "system later", "system last", "refusal part", "refusal", "nothing said"],
)
def test_legal_histories_are_read(messages, system, parts, question):
    asked = ChatRequest({"messages": messages}, Limits())
    assert (asked.system_prompt, asked.parts, asked.question) == (system, parts, question)


def test_system_messages_share_the_limit_of_a_text():
    """All of them are read as one text, for which the engine waits."""
    half = turn("system", "x" * 20)
    assert len(ChatRequest({"messages": [half, half, *HELLO]}, Limits(max_text=41)).system_prompt) == 41
    with pytest.raises(RequestError, match="41 characters") as error:
        ChatRequest({"messages": [half, half, *HELLO]}, Limits(max_text=40))
    assert (error.value.code, error.value.param) == ("text_too_long", "messages.1.content")


WRONG = [
    ({"messages": HELLO, "extra_body": {"videollm_mod": {"frames": 8}}}, 400, "videollm_mod.frames"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": [image("data:,x")]}]}, 400, "messages.0.content.0.image_url.url"),
    ({"messages": [*HELLO, turn("assistant", None, tool_calls=[{}]), *HELLO]}, 400, "messages.1.tool_calls"),
    ({"messages": [{"role": "judge", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{"role": "user", "content": "x"}], "model": "other"}, 404, "model"),
]


@pytest.mark.parametrize(("body", "status", "param"), WRONG, ids=[param for _, _, param in WRONG])
def test_wrong_requests(client, body, status, param):
    with pytest.raises(APIStatusError) as error:
        client.chat.completions.create(**{"model": "tiny", **body})
    assert (error.value.status_code, error.value.body["param"]) == (status, param)


def test_wrong_files(client):
    playlist = base64.b64encode(f"#EXTM3U\n#EXTINF:1,\nfile:{SAMPLES}/streamworld.mp4\n".encode()).decode()
    for part, code in (
        (video(f"data:video/mp4;base64,{playlist}"), "invalid_video"),  # it names a file of the server
        (image("data:image/png;base64,dGV4dA=="), "invalid_image"),
        (image("data:image/png;base64,***"), "invalid_data_uri"),
        (image("file:///etc/passwd"), "invalid_url"),
        (video("http://user:secret@localhost/x"), "invalid_url"),
        (video("data:video/mp4;base64," + "x" * 1_400_000), "file_too_large"),
    ):
        with pytest.raises(APIStatusError) as error:
            ask(client, part)
        assert error.value.body["code"] == code, part


def test_a_video_without_a_readable_frame_is_named_by_its_field(client):
    data = bytearray((SAMPLES / "streamworld.mp4").read_bytes())
    at = data.index(b"mdat")
    size = int.from_bytes(data[at - 4 : at], "big")
    data[at + 4 : at - 4 + size] = bytes(size - 8)  # its index still names the frames
    with pytest.raises(APIStatusError) as error:
        ask(client, video(f"data:video/mp4;base64,{base64.b64encode(data).decode()}"))
    assert error.value.body["message"] == "This is not a readable video."
    assert (error.value.body["code"], error.value.body["param"]) == (
        "invalid_video",
        "messages.0.content.0.video_url.url",
    )


@pytest.fixture(scope="module")
def strict():
    """A server with small limits for all files of a request, and what its endpoints share."""
    options = {"engine_options": ROOMY, "allow_private_urls": True, "max_waiting": 4}
    options |= {"show_seconds": 3.0, "max_video_bytes": 40_000}
    with running(*embedded()[:2], name="tiny", **options) as (address, server):
        yield OpenAI(api_key="-", base_url=f"http://{address}/v1", max_retries=0, timeout=60), server


def refused(client, *parts):
    with pytest.raises(APIStatusError) as error:
        ask(client, *parts)
    return error.value.status_code, error.value.body["code"], error.value.body["param"]


def test_the_time_for_files_counts_fetching(strict):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes connections and never answers
        url, begin = f"http://127.0.0.1:{silent.getsockname()[1]}/", clock.monotonic()
        assert refused(strict[0], image(url)) == (413, "video_too_large", "messages.0.content.0.image_url.url")
    assert clock.monotonic() - begin < 20  # and not `fetch_seconds`


def test_the_time_for_files_counts_pictures(strict):
    client, server = strict
    with ThreadPoolExecutor() as threads:
        with server.engine._stepping:  # nothing is seen meanwhile
            asked = threads.submit(refused, client, *[image(data_uri(np.zeros((32, 32, 3), np.uint8)))] * 8)
            clock.sleep(5)
        assert asked.result()[:2] == (413, "video_too_large")


def test_files_of_a_request_have_one_limit_together(strict):
    shown = data_uri(np.random.default_rng(0).integers(0, 255, (80, 80, 3), np.uint8))  # 19 kB
    assert ask(strict[0], *[image(shown)] * 2).videollm_mod["frames"] == 2
    expected = (413, "file_too_large", "messages.0.content.2.image_url.url")
    assert refused(strict[0], *[image(shown)] * 3) == expected


def test_a_disk_without_room_is_one_line(client):
    clip = base64.b64encode((SAMPLES / "streamworld.mp4").read_bytes()).decode()
    most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most[1]))  # of a file, which is less than the clip
    try:
        with pytest.raises(APIStatusError) as error:
            ask(client, video(f"data:video/mp4;base64,{clip}"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, most)
    assert error.value.status_code == 503
    assert error.value.body["message"] == "The server cannot keep the file (File too large): try again later."


def test_a_video_that_takes_too_long_is_not_called_broken():
    completion = Completion(SimpleNamespace(limits=Limits()), ChatRequest({"messages": HELLO}, Limits()))
    completion._stop.set()  # as when the time is over
    with pytest.raises(RequestError, match="within 300 s, which is the limit") as error:
        list(completion._read(Media("video_url", str(SAMPLES / "streamworld.mp4"), "url", seconds=8.5)))
    assert (error.value.status, error.value.param) == (413, "url")


# ---------------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("64:ff9b::808:808", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:127.0.0.1", False),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address, expected):
    assert is_public(address) is expected


def fetched(url, **options):
    file = io.BytesIO()
    asyncio.run(fetch(url, file, **{"most_bytes": 1_000_000, "seconds": 20, **options}))
    return file.getvalue()


def test_private_urls_are_refused_also_after_a_redirect(files, monkeypatch):
    port = files.server_port
    for url in (
        f"http://localhost:{port}/",
        f"http://127.0.0.1:{port}/",
        f"http://[::1]:{port}/",
        "http://2130706433/",
    ):
        with pytest.raises(RequestError, match="private or loopback"):
            fetched(url)
    here = f"http://127.0.0.1:{port}"
    with monkeypatch.context() as patch:
        # For this test, one loopback address counts as public.
        patch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
        assert fetched(f"{here}/to/127.0.0.1:{port}/streamworld.mp4") == (SAMPLES / "streamworld.mp4").read_bytes()
        with pytest.raises(RequestError, match="'127.0.0.2' has a private"):
            fetched(f"{here}/to/127.0.0.2:{port}/streamworld.mp4")
    loop = f"{here}/to/127.0.0.1:{port}/to/" * 1 + f"127.0.0.1:{port}/missing.mp4"
    with pytest.raises(RequestError, match="status 404"):
        fetched(loop, allows_private=True)
    with pytest.raises(RequestError, match="more than 100 bytes"):
        fetched(f"{here}/streamworld.mp4", allows_private=True, most_bytes=100)
    with pytest.raises(RequestError, match="cannot be fetched"):
        fetched("http://127.0.0.1:9/", allows_private=True)
