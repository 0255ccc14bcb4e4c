# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""URLs and data URIs that strangers name: hosts in disguise, redirects, packed answers."""

import asyncio
import gzip
import io
import socket
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

from videollm_mod.serving import fetching
from videollm_mod.serving.fetching import fetch, is_public, read_data_uri
from videollm_mod.serving.limits import RequestError


class Handler(BaseHTTPRequestHandler):
    """Answers /packed with a file in gzip, redirects from /to/..., and answers other paths with the host it got."""

    def do_GET(self):
        self.send_response(302 if self.path.startswith("/to/") else 200)
        if self.path.startswith("/to/"):
            self.send_header("Location", unquote(self.path.removeprefix("/to/")))
        if self.path == "/packed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        self.wfile.write(gzip.compress(bytes(1_000_000)) if self.path == "/packed" else self.headers["Host"].encode())

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server.server_port
        server.shutdown()


def fetched(url, **options):
    file = io.BytesIO()
    asyncio.run(fetch(url, file, **{"most_bytes": 10_000, "seconds": 20, "param": "url", **options}))
    return file.getvalue()


@pytest.mark.parametrize(
    "address",
    [
        "fec0::1",  # a site's own
        "2002:808:808::",  # 6to4
        "2001:0:808:808::f7f7:f7f7",  # Teredo
        "64:ff9b:1::808:808",  # a site's own gateway to IPv4
        "2606:4700::5efe:7f00:1",  # ISATAP
        "::7f00:1",
        "::ffff:0:808:808",
        "192.0.0.192",  # metadata of a cloud
        "168.63.129.16",  # the same of another one
        "3fff::1",
        "192.88.99.1",
    ],
)
def test_addresses_of_tunnels_and_clouds_are_not_public(address):
    assert not is_public(address)


def test_a_packed_answer_is_refused_before_it_is_unpacked(port):
    with pytest.raises(RequestError, match="packed file .Content-Encoding 'gzip'.") as error:
        fetched(f"http://127.0.0.1:{port}/packed", allows_private=True)
    assert error.value.param == "url"


@pytest.mark.parametrize(
    "url",
    [
        "http://[::1",
        "http://127.0.0.1:99999/",
        "http://127.0.0.1:0/",
        "http://127.0.0.1:-1/",
        "http://xn--/",
        "javascript:x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/",
        "http://a@127.0.0.1/",
        "http://127.0.0.1\\@8.8.8.8/",
        "http://\uff11\uff12\uff17.0.0.1/",
    ],
)
def test_a_malformed_url_is_one_error_also_after_a_redirect(port, url):
    for given in (url, f"http://127.0.0.1:{port}/to/{url}" if url.isascii() else url):
        with pytest.raises(RequestError, match="must begin with http:// or https://") as error:
            fetched(given, allows_private=True)
        assert error.value.code == "invalid_url" and "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "0", "[::ffff:7f00:1]", "127\u30020\u30020\u30021"])
def test_a_private_host_in_another_form_is_refused_and_one_parser_reads_it(port, host):
    with pytest.raises(RequestError, match="private or loopback"):
        fetched(f"http://{host}:{port}/")
    with pytest.raises(RequestError, match="private or loopback"):
        # A header has only ASCII. The first host counts as public here, and the redirect is checked.
        fetched_through(port, f"http://{host.encode('idna').decode()}:{port}/")
    assert fetched(f"http://{host}:{port}/", allows_private=True).isascii()


def fetched_through(port, url):
    real, asked = is_public, []

    def judge(address):
        asked.append(address)
        return len(asked) == 1 or real(address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetching, "is_public", judge)
        return fetched(f"http://127.0.0.1:{port}/to/{url}")


def test_the_connection_goes_to_the_address_that_was_checked(port, monkeypatch):
    answers = []

    def resolve(*_, **__):
        # A name that leads elsewhere at each question.
        answers.append(f"127.0.0.{1 + len(answers)}")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (answers[-1], port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetching, "is_public", lambda address: address == "127.0.0.1")
    assert fetched(f"http://rebinding.example:{port}/") == f"rebinding.example:{port}".encode()
    assert answers == ["127.0.0.1"]


@pytest.mark.parametrize("first", ["refuses", "is silent"])
def test_the_next_address_of_a_host_is_tried(port, monkeypatch, first):
    def resolve(*_, **__):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (f"127.0.0.{number}", port)) for number in (2, 1)]

    monkeypatch.setattr(fetching, "_CONNECT_SECONDS", 0.2)
    with ExitStack() as stack:
        if first == "is silent":
            stack.enter_context(socket.create_server(("127.0.0.2", port), backlog=0))
            for _ in range(3):  # Linux drops what comes when so many wait
                waiting = stack.enter_context(socket.socket())
                waiting.setblocking(False)
                waiting.connect_ex(("127.0.0.2", port))
        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        url = f"http://two.example:{port}/"
        assert fetched(url, allows_private=True) == f"two.example:{port}".encode()
        with pytest.raises(RequestError, match="'two.example' has a private or loopback address"):
            fetched(url)  # each is checked


def test_a_data_uri_is_base64_of_ascii():
    for uri in ("data:image/png;base64,\xe9", "data:image/png;base64,\ud800", "data:image/png,\ud800", "data:a/b,%%"):
        with pytest.raises(RequestError) as error:
            read_data_uri(uri, most_bytes=1000, param="url")
        assert error.value.code == "invalid_data_uri"
    assert read_data_uri("data:image/png;x=y;base64,YQ==", most_bytes=1000) == b"a"
