# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Live sources on loopback that stall, break off, drop and return: HTTP, UDP and RTSP."""

import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import av
import numpy as np


FPS = 20


class _Writes(list):
    def write(self, data: bytes) -> int:
        self.append(bytes(data))
        return len(data)


def encode(frames: np.ndarray, kind: str, *, start: float = 0.0, fps: float = FPS, **options: str) -> list[bytes]:
    """Encode frames (count, height, width, 3) in a container, every one a key frame; return the bytes of each."""
    pieces, writes = [], _Writes()
    jpeg = kind in ("mjpeg", "mpjpeg")
    with av.open(writes, "w", format=kind, options={"flush_packets": "1", **options}) as container:
        stream = container.add_stream("mjpeg" if jpeg else "libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuvj420p" if jpeg else "yuv420p"
        stream.options = {"huffman": "default"} if jpeg else {"preset": "ultrafast", "tune": "zerolatency", "g": "1"}
        for index, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format="rgb24")
            frame.pts, frame.time_base = index + round(start * fps), 1 / Fraction(fps).limit_denominator(1001)
            container.mux(stream.encode(frame))
            pieces.append(b"".join(writes) if kind != "rtp" else list(writes))
            writes.clear()
    return pieces


def paced(pieces: list[Any], send: Callable[[Any], Any], fps: float = FPS) -> None:
    """Send the pieces at a frame rate, until the receiver goes away."""
    begin = time.monotonic()
    for index, piece in enumerate(pieces):
        time.sleep(max(0.0, begin + index / fps - time.monotonic()))
        send(piece)


@contextmanager
def http_server(answer: Callable[[BaseHTTPRequestHandler, int], None], port: int = 0) -> Iterator[str]:
    """Serve `answer(request, number of earlier requests)`, which writes what it likes; yield the server's address."""
    count = iter(range(1000))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            with suppress(OSError):
                answer(self, next(count))

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", port), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def headers(request: BaseHTTPRequestHandler, kind: str = "video/mp2t", length: int | None = None) -> None:
    """Begin an answer; without a length it ends when the connection does."""
    request.send_response(200)
    request.send_header("Content-Type", kind)
    if length is not None:
        request.send_header("Content-Length", str(length))
    request.end_headers()


@contextmanager
def rtsp_server(answer: Callable[[Callable[[list[bytes]], None], int], None]) -> Iterator[str]:
    """
    Serve RTP packets of H.264 over RTSP's own connection; `answer(send, number of earlier clients)` sends them. A
    client that asks for UDP gets nothing, as behind a firewall.
    """
    sdp = b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 96\r\na=rtpmap:96 H264/90000\r\n"

    def serve(connection: socket.socket, number: int) -> None:
        def send(packets: list[bytes]) -> None:
            for packet in packets:
                # RTCP packets go to the second channel.
                channel = 192 <= packet[1] <= 223
                connection.sendall(b"$" + bytes([channel]) + len(packet).to_bytes(2, "big") + packet)

        with connection, suppress(OSError):
            for line in connection.makefile("r", newline="\r\n"):
                if found := re.match(r"(OPTIONS|DESCRIBE|SETUP|PLAY) ", line):
                    method = found[1]
                elif line.startswith("Transport:"):
                    transport = line.strip()
                elif line.startswith("CSeq:"):
                    sequence = line.strip()
                elif line == "\r\n":
                    more = f"{transport};server_port=9-10\r\n" if method == "SETUP" else ""
                    more += f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}\r\n" * (method == "DESCRIBE")
                    reply = f"RTSP/1.0 200 OK\r\n{sequence}\r\nSession: 1\r\n{more}\r\n".encode()
                    connection.sendall(reply + sdp * (method == "DESCRIBE"))
                    if method == "PLAY" and "TCP" in transport:
                        return answer(send, number)

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with suppress(OSError):
                for number in range(1000):
                    connection, _ = listener.accept()
                    threading.Thread(target=serve, args=(connection, number), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield f"rtsp://127.0.0.1:{listener.getsockname()[1]}/camera"
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)


def free_udp_port() -> int:
    """Return a UDP port that nobody uses."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def broadcast(port: int, pieces: list[bytes], fps: float = FPS) -> None:
    """Send an MPEG transport stream by UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:

        def send(piece: bytes) -> None:
            for at in range(0, len(piece), 1316):
                with suppress(ConnectionRefusedError):
                    sender.sendto(piece[at : at + 1316], ("127.0.0.1", port))

        paced(pieces, send, fps)
