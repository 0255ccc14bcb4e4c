# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Clients that put a load on a server: cameras that stream to it, and clients that send recent frames again."""

import asyncio
import base64
import io
import json
import random
import time as clock
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import httpx
from common import PROMPT
from PIL import Image
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from videollm_mod.train.data.world.clip import SPLITS, WORLDS
from videollm_mod.train.data.world.drawing import Painter
from videollm_mod.train.data.world.events import make_clip


QUESTION = "How many things do you see?"
# Seconds in which the first streams begin, for which a lost client stays away, and that the last answers may take.
SPREAD, AWAY, PATIENCE = 1.0, 0.5, 30.0


class Due(NamedTuple):
    """What a client does at a time in seconds: `"frame"`, `"question"` or `"break"`."""

    time: float
    kind: str


@dataclass(frozen=True)
class Visit:
    """
    One stream of the plan.

    Args:
        begin, end (`float`): Seconds from the start of the measurement.
        fps (`float`): Frames per second.
        questions, breaks (`tuple[float, ...]`): When its client asks, and when its connection breaks off, in seconds.
    """

    begin: float
    end: float
    fps: float
    questions: tuple[float, ...]
    breaks: tuple[float, ...]

    def timeline(self) -> list[Due]:
        """Return all that its client does, in order. A client sends nothing for half a second after a break."""
        num_frames = max(1, int((self.end - self.begin) * self.fps))
        frames = [Due(self.begin + index / self.fps, "frame") for index in range(num_frames)]
        frames = [frame for frame in frames if not any(0 <= frame.time - lost < AWAY for lost in self.breaks)]
        asked = [Due(time, "question") for time in self.questions]
        return sorted([*frames, *asked, *(Due(time, "break") for time in self.breaks)])


def arrivals(rng: random.Random, rate: float, begin: float, end: float) -> Iterator[float]:
    """Yield the times of a Poisson process with `rate` arrivals per second."""
    time = begin
    while rate > 0 and (time := time + rng.expovariate(rate)) < end:
        yield time


def plan(
    streams: int,
    seconds: float,
    *,
    seed: int,
    fps: list[float],
    stay: float | None,
    questions: float,
    breaks: float,
) -> list[Visit]:
    """
    Plan the streams of a measurement. The same arguments give the same plan.

    Args:
        streams (`int`): Streams at once, on average if streams come and go.
        seconds (`float`): Length of the measurement.
        seed (`int`): Seed of all random times.
        fps (`list[float]`): Frame rates. Streams have them in turn.
        stay (`float`, *optional*): Mean seconds of a stream, distributed exponentially. Streams then arrive as a
            Poisson process with `streams / stay` arrivals per second. By default all streams stay to the end.
        questions, breaks (`float`): Questions and broken connections per minute and stream, also Poisson processes.
    """
    rng = random.Random(seed)
    begins = sorted(rng.uniform(0, SPREAD) for _ in range(streams))
    begins += arrivals(rng, 0 if stay is None else streams / stay, SPREAD, seconds)
    visits = []
    for number, begin in enumerate(begins):
        end = seconds if stay is None else min(seconds, begin + rng.expovariate(1 / stay))
        asked = tuple(arrivals(rng, questions / 60, begin, end))
        lost = tuple(arrivals(rng, breaks / 60, begin, end))
        visits.append(Visit(begin, end, fps[number % len(fps)], asked, lost))
    return visits


def most_at_once(visits: list[Visit]) -> int:
    """Return the largest number of streams at one time."""
    return max(sum(other.begin <= visit.begin < other.end for other in visits) for visit in visits)


@dataclass
class Tally:
    """
    What clients have seen. All times are counted from the planned time, so that a client that is late hides nothing.

    Attributes:
        lags (`list[float]`): Seconds to the decision about a frame that the model saw.
        first_words (`list[float]`): Seconds from a question to the first word of its answer.
        late_sends (`list[float]`): Seconds by which frames were sent too late. Large ones mean that the clients need
            more of the machine than they get.
        sent (`int`): Frames that were due.
        late (`int`): Frames that the model saw more than one frame interval after they were due.
        dropped (`int`): Frames that the model did not see.
        asked (`int`), unanswered (`int`): Questions, and those without an answer.
        resumed (`int`): Connections that broke off and were resumed.
        refusals (`int`): Streams and requests that the server refused because it was full.
        errors (`Counter`): Further errors by name.
    """

    lags: list[float] = field(default_factory=list)
    first_words: list[float] = field(default_factory=list)
    late_sends: list[float] = field(default_factory=list)
    sent: int = 0
    late: int = 0
    dropped: int = 0
    asked: int = 0
    unanswered: int = 0
    resumed: int = 0
    refusals: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def see(self, lag: float, fps: float) -> None:
        """Count a frame that the model saw."""
        self.lags.append(lag)
        self.late += lag > 1 / fps

    @property
    def missed(self) -> float:
        """Share of the frames that were dropped, or seen after their deadline of one frame interval."""
        return (self.late + self.dropped) / max(1, self.sent)


def encoded_frames(seed: int, fps: float) -> list[str]:
    """Return the frames of a StreamWorld clip as data URIs with JPEG files."""
    clip = make_clip(SPLITS["test"] + seed, WORLDS["tiny"])
    painter, found = Painter(clip, 96), []
    for index in range(int(clip.seconds * fps)):
        file = io.BytesIO()
        Image.fromarray(painter.draw(index / fps)).save(file, format="JPEG", quality=90)
        found.append("data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode())
    return found


class Client:
    """
    A client that follows its part of the plan.

    Args:
        server ([`Server`]): The server, with its `address`, such as `http://127.0.0.1:8000`, and `headers`.
        visit ([`Visit`]): When it sends what.
        frames (`list[str]`): Its frames as data URIs. They repeat.
        tally ([`Tally`]): Where it counts.
        start (`float`): The time of `time.perf_counter` at second 0 of the plan.
    """

    def __init__(self, server: Any, visit: Visit, frames: list[str], tally: Tally, start: float) -> None:
        self.server, self.visit, self.frames, self.tally, self.start = server, visit, frames, tally, start
        self.number = 0  # of frames sent

    def since(self, due: float) -> float:
        """Return the seconds since a time of the plan."""
        return clock.perf_counter() - self.start - due

    def next_frame(self, due: float) -> str:
        """Return the frame to send."""
        self.tally.sent += 1
        self.tally.late_sends.append(max(0.0, self.since(due)))
        self.number += 1
        return self.frames[(self.number - 1) % len(self.frames)]

    async def follow(self) -> None:
        """Do what the plan says, at its times."""
        for due in self.visit.timeline():
            await asyncio.sleep(max(0.0, -self.since(due.time)))
            await getattr(self, f"on_{due.kind}")(due.time)


class StreamingClient(Client):
    """A client of `/v1/realtime`. It sends each frame once, and the model speaks when it decides to."""

    async def run(self) -> None:
        """Follow the plan. A stream that the server refuses does not try again."""
        self._waiting: dict[str, float] = {}  # due times of frames by item
        self._asked: dict[str, float] = {}  # due times of questions by their metadata, then by their response
        self._token, self._last_event = "", ""
        self._reader: asyncio.Task[None] | None = None
        await asyncio.sleep(max(0.0, -self.since(self.visit.begin)))
        try:
            await self._connect()
            await self._send("session.update", session={"videollm_mod": {"fps": self.visit.fps}})
            await self.follow()
            await self._settle()
            await self._socket.close()
        except InvalidStatus as error:
            self._count_refusal(error.response.status_code)
        except (ConnectionClosed, InvalidHandshake, OSError) as error:
            self.tally.errors[type(error).__name__] += 1
        finally:
            if self._reader is not None:
                self._reader.cancel()
            self.tally.dropped += len(self._waiting)
            self.tally.unanswered += len(self._asked)

    def _count_refusal(self, status: int) -> None:
        if status == 503:
            self.tally.refusals += 1
        else:
            self.tally.errors[f"status {status}"] += 1

    async def _connect(self) -> None:
        query = f"?resume_token={self._token}&last_event_id={self._last_event}" if self._token else ""
        address = self.server.address.replace("http", "ws", 1) + "/v1/realtime" + query
        self._socket: ClientConnection = await connect(
            address, additional_headers=self.server.headers, open_timeout=PATIENCE, max_size=None
        )
        self._reader = asyncio.ensure_future(self._read(self._socket))

    async def _send(self, kind: str, **fields: Any) -> None:
        await self._socket.send(json.dumps({"type": kind, **fields}))

    async def on_frame(self, due: float) -> None:
        """Send a frame."""
        picture = {"type": "input_image", "image_url": self.next_frame(due)}
        name = f"frame_{self.number}"
        self._waiting[name] = due
        item = {"id": name, "type": "message", "role": "user", "content": [picture]}
        time = {"time": round(due - self.visit.begin, 4)}
        await self._send("conversation.item.create", item=item, videollm_mod=time)

    async def on_question(self, due: float) -> None:
        """Ask."""
        name = f"question_at_{due}"
        self.tally.asked += 1
        self._asked[name] = due
        text = {"type": "input_text", "text": QUESTION}
        await self._send("conversation.item.create", item={"type": "message", "role": "user", "content": [text]})
        await self._send("response.create", response={"metadata": {"name": name}})

    async def on_break(self, _: float) -> None:
        """
        Lose the connection, stay away for a while, and resume the session.

        Frames and questions in flight do not count: the server is not to blame for their delay.
        """
        self.tally.sent -= len(self._waiting)
        self.tally.asked -= len(self._asked)
        self._waiting.clear()
        self._asked.clear()
        self._reader.cancel()
        self._socket.transport.abort()
        await asyncio.sleep(AWAY)
        await self._connect()
        self.tally.resumed += 1

    async def _settle(self) -> None:
        """Wait for what was sent to be seen and answered."""
        end = clock.perf_counter() + PATIENCE
        while (self._waiting or self._asked) and clock.perf_counter() < end and not self._reader.done():
            await asyncio.sleep(0.02)

    async def _read(self, socket: ClientConnection) -> None:
        with suppress(ConnectionClosed):
            async for message in socket:
                event = json.loads(message)
                kind = event["type"]
                if kind == "session.created":
                    self._token = event["session"]["videollm_mod"]["resume_token"]
                else:
                    self._last_event = event["event_id"]
                if kind == "conversation.item.done" and event["item"]["id"] in self._waiting:
                    self._count_frame(event)
                elif kind.startswith("response."):
                    self._count_words(kind, event)
                elif kind == "error":
                    self.tally.errors[event["error"]["code"]] += 1

    def _count_frame(self, event: dict[str, Any]) -> None:
        lag = self.since(self._waiting.pop(event["item"]["id"]))
        if event["videollm_mod"]["fate"] == "seen":
            self.tally.see(lag, self.visit.fps)
        else:
            self.tally.dropped += 1

    def _count_words(self, kind: str, event: dict[str, Any]) -> None:
        if kind == "response.created":
            name = (event["response"]["metadata"] or {}).get("name")
            if name in self._asked:
                self._asked[event["response"]["id"]] = self._asked.pop(name)
        elif kind == "response.output_text.delta" and event["response_id"] in self._asked:
            self.tally.first_words.append(self.since(self._asked.pop(event["response_id"])))
        elif kind == "response.done" and self._asked.pop(event["response"]["id"], None) is not None:
            self.tally.unanswered += 1  # it has no words


class ResendingClient(Client):
    """
    A client of `/v1/chat/completions`. For each frame and each question it sends its last frames again.

    While an answer about a frame is under way, further frames get no request of their own. They count as dropped.

    Args:
        window (`int`): Frames of a request.
        http (`httpx.AsyncClient`): Connections that clients share.
    """

    def __init__(self, *client: Any, window: int, http: httpx.AsyncClient) -> None:
        super().__init__(*client)
        self._recent: deque[str] = deque(maxlen=window)
        self._http, self._narration = http, None
        self._requests: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        """Follow the plan."""
        await self.follow()
        if self._requests:
            await asyncio.wait(self._requests, timeout=PATIENCE)
        for request in self._requests:
            request.cancel()
        await asyncio.gather(*self._requests, return_exceptions=True)

    async def on_frame(self, due: float) -> None:
        """Send the last frames, and ask for the narration of the newest."""
        self._recent.append(self.next_frame(due))
        if self._narration is None or self._narration.done():
            self._narration = self._start(self._narrate(due))
        else:
            self.tally.dropped += 1

    async def on_question(self, due: float) -> None:
        """Send the last frames with a question."""
        self.tally.asked += 1
        self._start(self._answer(due))

    async def on_break(self, _: float) -> None:
        """There is no connection to lose."""

    def _start(self, work: Any) -> "asyncio.Task[None]":
        self._requests.append(asyncio.ensure_future(work))
        return self._requests[-1]

    async def _narrate(self, due: float) -> None:
        lag = None
        try:
            lag = await self._chat(PROMPT, due)
        finally:
            if lag is None:
                self.tally.dropped += 1
            else:
                self.tally.see(lag, self.visit.fps)

    async def _answer(self, due: float) -> None:
        lag = None
        try:
            lag = await self._chat(QUESTION, due)
        finally:
            if lag is None:
                self.tally.unanswered += 1
            else:
                self.tally.first_words.append(lag)

    async def _chat(self, text: str, due: float) -> float | None:
        """Return the seconds to the first word of an answer, `None` without one. The answer is read to its end."""
        content = [{"type": "image_url", "image_url": {"url": url}} for url in self._recent]
        content.append({"type": "text", "text": text})
        body = {"messages": [{"role": "user", "content": content}], "stream": True}
        body["videollm_mod"] = {"fps": self.visit.fps}
        lag = None
        try:
            async with self._http.stream("POST", f"{self.server.address}/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    full = response.status_code == 503
                    self.tally.refusals += full
                    self.tally.errors.update([] if full else [f"status {response.status_code}"])
                async for line in response.aiter_lines():
                    if lag is None and line.startswith("data: {") and _has_words(json.loads(line[6:])):
                        lag = self.since(due)
        except httpx.HTTPError as error:
            self.tally.errors[type(error).__name__] += 1
        return lag


def _has_words(chunk: dict[str, Any]) -> bool:
    return any(choice["delta"].get("content") for choice in chunk.get("choices", []))


__all__ = ["Client", "ResendingClient", "StreamingClient", "Tally", "Visit", "arrivals", "encoded_frames"]
__all__ += ["most_at_once", "plan"]
