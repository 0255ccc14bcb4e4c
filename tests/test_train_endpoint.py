# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The client of OpenAI-compatible endpoints, against a scripted server on loopback."""

import threading
import time

import pytest
from endpoints import scripted_endpoint

from videollm_mod.train.endpoint import Endpoint, EndpointError, NoReplyError


QUESTION = [{"role": "user", "content": "Which color?"}]


def test_a_reply_is_asked_for_once_and_kept(tmp_path):
    with scripted_endpoint("red", "blue") as (url, asked):
        endpoint = Endpoint(url, "judge", "key", cache=tmp_path / "replies")
        assert [endpoint.reply(QUESTION, max_tokens=5).text for _ in range(2)] == ["red", "red"]
        again = Endpoint(url + "/", "judge", cache=tmp_path / "replies")
        assert again.reply(QUESTION, max_tokens=5).text == "red"
        assert len(asked) == 1 and asked[0]["model"] == "judge" and asked[0]["messages"] == QUESTION
        assert asked[0]["max_tokens"] == 5 and asked[0]["temperature"] == 0.0
        # Another request has another reply, and without a cache every request is sent.
        assert endpoint.reply(QUESTION, max_tokens=6).text == "blue"
        assert Endpoint(url, "judge").reply(QUESTION, max_tokens=6).text == "blue" and len(asked) == 3


def test_a_busy_endpoint_is_asked_again(tmp_path):
    with scripted_endpoint(503, 429, "red") as (url, asked):
        assert Endpoint(url, "judge", cache=tmp_path, max_retries=2).reply(QUESTION).text == "red"
        assert len(asked) == 3 and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("answer", "said"), [(401, "answered 401: wrong"), (500, "answered 500"), ({"object": "list"}, "without a reply")]
)
def test_what_went_wrong_is_one_line_without_the_key(answer, said, tmp_path):
    with scripted_endpoint(answer) as (url, _), pytest.raises(EndpointError, match=said) as error:
        Endpoint(url, "judge", "SECRET", cache=tmp_path, max_retries=0).reply(QUESTION)
    assert "SECRET" not in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir()), "a failure is not kept"


@pytest.mark.parametrize(
    "answer",
    [400, {"choices": []}, {"choices": [{}]}, b"<html>welcome</html>", b'{"choices": nonsense', b"[]"],
    ids=["refused", "no choice", "no message", "a page", "broken JSON", "a list"],
)
def test_a_request_without_a_reply_says_nothing_about_others(answer):
    with scripted_endpoint(answer, "red") as (url, _):
        endpoint = Endpoint(url, "judge")
        with pytest.raises(NoReplyError):
            endpoint.reply(QUESTION)
        assert endpoint.reply(QUESTION).text == "red"


def as_a_reasoning_model(request):
    """Answer as OpenAI's reasoning models do."""
    for name, code in (("max_tokens", "unsupported_parameter"), ("temperature", "unsupported_value")):
        if name in request:
            return {"error": {"message": f"'{name}' is not supported with this model.", "param": name, "code": code}}
    return f"red, {request['max_completion_tokens']}"


def test_options_that_a_model_refuses_are_renamed_or_left_out(tmp_path):
    with scripted_endpoint(as_a_reasoning_model) as (url, asked):
        endpoint = Endpoint(url, "judge", cache=tmp_path)
        assert endpoint.reply(QUESTION, max_tokens=9).text == "red, 9" and len(asked) == 3
        assert endpoint.reply(QUESTION, max_tokens=8, seed=1).text == "red, 8" and len(asked) == 4
        assert asked[-1]["seed"] == 1 and set(asked[-1]) == {"model", "messages", "max_completion_tokens", "seed"}
        # The cache knows the request by what was asked for.
        assert (
            Endpoint(url, "judge", cache=tmp_path).reply(QUESTION, max_tokens=9).text == "red, 9" and len(asked) == 4
        )
    wrong = {"error": {"message": "too large", "param": "max_tokens", "code": "invalid_value"}}
    with scripted_endpoint(wrong) as (url, asked), pytest.raises(NoReplyError, match="answered 400: too large"):
        Endpoint(url, "judge").reply(QUESTION)
    assert len(asked) == 1


def test_an_endpoint_says_how_long_to_wait():
    busy = (429, {"retry-after": "0.2", "retry-after-ms": "x"})
    with scripted_endpoint(busy, "red") as (url, asked):
        begin = time.monotonic()
        assert Endpoint(url, "judge").reply(QUESTION).text == "red" and len(asked) == 2
        assert time.monotonic() - begin >= 0.2


def test_a_slow_reply_is_none():
    done = threading.Event()
    with scripted_endpoint(lambda _: str(done.wait(10))) as (url, _):
        with pytest.raises(NoReplyError, match="did not answer within"):
            Endpoint(url, "judge", timeout=0.2, max_retries=0).reply(QUESTION)
        done.set()


def test_a_reply_that_was_cut_is_marked_and_kept_so(tmp_path):
    choice = {"index": 0, "message": {"role": "assistant", "content": "The red"}, "finish_reason": "length"}
    with scripted_endpoint({"id": "1", "choices": [choice]}, "red") as (url, asked):
        replies = [Endpoint(url, "judge", cache=tmp_path).reply(QUESTION) for _ in range(2)]
        assert replies == [("The red", True)] * 2 and len(asked) == 1
        # A file that a full disk spoilt counts for nothing.
        [file] = tmp_path.iterdir()
        file.write_text(file.read_text()[:20])
        assert Endpoint(url, "judge", cache=tmp_path).reply(QUESTION).text == "red" and len(asked) == 2


def test_an_endpoint_that_is_not_there():
    with scripted_endpoint("red") as (url, _):
        pass
    with pytest.raises(EndpointError, match=r"cannot be reached: .*[^.]\.$"):
        Endpoint(url, "judge", max_retries=0).reply(QUESTION)
    with pytest.raises(ValueError, match="must be an address"):
        Endpoint("localhost:8000", "judge")
