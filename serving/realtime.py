# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`/v1/realtime`: the events of OpenAI's realtime protocol, in which pictures are frames of a stream."""

import asyncio
import base64
import json
import secrets
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from .hearing import Hearing
from .limits import RequestError
from .live_session import FINAL, SAVED, LiveSession
from .realtime_events import (
    Audio,
    content_part,
    item_content,
    response_end,
    response_object,
    session_object,
    text_event,
)
from .speaking import Speech
from .telling import Frame, Reply


_MOST_ITEMS = 1000  # that can be retrieved
_MOST_KEPT = 4_000_000  # characters of events that are kept after they were sent; a minute of audio
_MOST_UNSPOKEN = 2  # replies that wait until an earlier one is spoken, before replies are not spoken
_MOST_DIGITS = 18  # of an event's number
_TOKEN = "<resume token>"  # what stands for it in saved events
# Attributes of a conversation that are saved as they are.
_KEPT = ("conversation_id", "last_item", "number", "sent", "rewound_to", "rewinds")
# Close codes of WebSockets.
SLOW_READER, REPLACED, ENDED, RESTARTING, FAILED = 1013, 4000, 1000, 1012, 1011


class Conversation:
    """
    What the realtime protocol keeps for a session, with or without a connection: items, and the last events.

    Args:
        session ([`LiveSession`]): The session.
        model (`str`): The model's name.
        audio ([`Audio`], *optional*): How it hears and speaks.
    """

    def __init__(self, session: LiveSession, model: str, audio: Audio | None = None) -> None:
        self.session, self.model, self.audio = session, model, audio or Audio()
        self.hearing = Hearing(self.audio.transcriber, session.limits, session.lock, self.fail)
        self.conversation_id = f"conv_{secrets.token_hex(10)}"
        self.items: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.last_item: str | None = None
        self.number = 0  # of the last event
        self.sent = 0  # number of the last event that a client was sent
        # The last event before a save whose server was killed, until a client resumes the session.
        self.rewound_to: int | None = None
        # Each such event, and the last number of an event that its server has forgotten.
        self.rewinds: list[tuple[int, int]] = []
        self.connection: Connection | None = None
        self._is_known = False  # whether a client has had an event, and with the first one the token
        self._events: deque[tuple[int, str]] = deque()
        self._num_kept = 0  # characters of these events
        self._news = asyncio.Event()  # an event was sent
        self._replies: dict[str, dict[str, Any]] = {}
        self._speech: Speech | None = None
        self._closing: Reply | None = None  # its text is complete, and its speech is not
        self._held: deque[tuple[str, tuple[Any, ...]]] = deque()  # what later replies tell meanwhile
        self._unspoken: set[str] = set()  # those of them that come too late to be spoken
        session.listeners.append(self._listen)
        session.conversation = self

    def connect(self, connection: "Connection") -> None:
        """Let a connection send the events from now on. An earlier one ends."""
        if self.connection is not None:
            self.connection.finish(REPLACED, "the session was resumed by another connection")
        self.connection = connection
        if self.session.over is not None:  # it ended while no connection could be told
            self._finish_connection(self.session.over)

    def _finish_connection(self, reason: str) -> None:
        can_go_on = self.session.is_kept and reason not in FINAL
        code = RESTARTING if reason == SAVED else FAILED if can_go_on else ENDED
        self.connection.finish(code, f"session {reason}"[:100])

    def emit(self, kind: str, **fields: Any) -> None:
        """Queue an event for the client."""
        self.number += 1
        event = {"type": kind, "event_id": f"event_{self.number}", **fields}
        self._events.append((self.number, json.dumps(event)))
        self._num_kept += len(self._events[-1][1])
        while self._has_too_many():
            self._num_kept -= len(self._events.popleft()[1])
        if self.connection is not None:
            self.connection.notice()

    def _has_too_many(self) -> bool:
        """Whether to forget the oldest event."""
        was_sent = self._events[0][0] <= self.sent
        return len(self._events) > self.session.limits.max_unsent or (self._num_kept > _MOST_KEPT and was_sent)

    def note_sent(self, number: int) -> None:
        """Take note that a client was sent an event."""
        self.sent, self._is_known = number, True
        self._news.set()

    async def _until_sent(self, number: int) -> None:
        while self.sent < number:
            self._news.clear()
            await self._news.wait()

    def next_event(self) -> tuple[int, str] | None:
        """Return the number and the text of the event to send next, if there is one."""
        if self.sent == self.number:
            return None
        return self._events[max(0, self.sent + 1 - self._events[0][0])]

    @property
    def num_missed(self) -> int:
        """Number of events that were forgotten before they could be sent."""
        first = self._events[0][0] if self._events else self.number + 1
        return max(0, first - self.sent - 1)

    def resume(self, connection: "Connection", last_event_id: str | None) -> dict[str, Any]:
        """
        Return the first event of a new connection; what was said meanwhile follows. An earlier connection ends.

        Args:
            connection ([`Connection`]): The new connection.
            last_event_id (`str`, *optional*): The last event that the client has, by default the last that was sent.
        """
        self.connect(connection)
        number = (last_event_id or "").removeprefix("event_")
        known = int(number) if number.isdecimal() and len(number) <= _MOST_DIGITS else self.sent
        if self.rewound_to is not None:
            self._renumber(known)
        if known <= self.number:
            self.note_sent(known)  # speech may wait for that
        missed = self.num_missed
        self.note_sent(self.sent + missed)
        # A client that has an event of a later number was told before.
        rewound_to = next((f"event_{last}" for last, end in self.rewinds if known <= end), None)
        told = {"missed_events": missed or None, "rewound_to": rewound_to}
        described = self.describe(resumed=True, last_frame_time=self.session.last_time, **told)
        return {"type": "session.created", "event_id": f"event_{secrets.token_hex(10)}", "session": described}

    def _renumber(self, known: int) -> None:
        """Let what came since a save follow the last event that the client has, which is forgotten if it is later."""
        last, self.rewound_to = self.rewound_to, None
        self.rewinds.append((last, max(last, known)))
        if known <= last:
            return
        new = [json.loads(event) for number, event in self._events if number > last]
        self._events.clear()
        self._num_kept, self.number = 0, known
        self.note_sent(known)  # before the connection looks for events that it has missed
        for event in new:
            del event["event_id"]
            self.emit(event.pop("type"), **event)

    @property
    def is_busy(self) -> bool:
        """Whether a response is being spoken, or a recording waits for its transcript. Neither can be saved."""
        return self._speech is not None or self.hearing.is_busy

    async def leave(self) -> None:
        """Wait for the client to resume the session. Without the token it cannot, and the session ends."""
        if self._is_known:
            self.session.leave()
        else:
            await self.session.close()

    async def disconnect(self, seconds: float) -> None:
        """End the connection, since the server stops, and wait until it sends nothing more."""
        if self.connection is not None:
            self.connection.finish(RESTARTING, "the server stops: resume the session")
        ends = asyncio.get_running_loop().time() + seconds
        while self.connection is not None and asyncio.get_running_loop().time() < ends:
            await asyncio.sleep(0.01)

    def to_dict(self) -> dict[str, Any]:
        """Return what another process needs to go on, as what JSON can hold."""
        # The token does not belong into files.
        events = [(number, event.replace(self.session.token, _TOKEN)) for number, event in self._events]
        state = {name: getattr(self, name) for name in _KEPT}
        state |= {"items": self.items, "events": events, "audio": self.audio.settings()}
        return state | {"audio_buffer": base64.b64encode(self.hearing.buffer).decode()}

    def go_on(self, saved: dict[str, Any], *, went_on: bool) -> None:
        """Go on where a conversation was that `to_dict` returned, also if it `went_on` elsewhere since then."""
        for name in _KEPT:
            setattr(self, name, saved[name])
        self.items.update(saved["items"])
        self._events.extend((number, event.replace(_TOKEN, self.session.token)) for number, event in saved["events"])
        self._num_kept = sum(len(event) for _, event in self._events)
        self.audio = self.audio.with_settings(saved["audio"])
        self.hearing.buffer += base64.b64decode(saved["audio_buffer"])
        self._is_known = True
        if went_on and self.rewound_to is None:
            self.rewound_to = self.number

    def describe(self, **added: Any) -> dict[str, Any]:
        """Return the session object."""
        return session_object(self.session, self.model, self.audio, **added)

    def shown(self, item_id: str) -> dict[str, Any]:
        """Return an item as clients see it."""
        return _shown(self.items[item_id])

    # ------------------------------------------------------------------------------------------- what the session does

    def add_item(self, item: dict[str, Any], *, has_frame: bool, **told: Any) -> None:
        """
        Add an item that a client sent. An item with a frame is done when the frame is seen or dropped. `told` are
        further fields of the event.
        """
        self._append(item, **told)
        if not has_frame:
            self.emit("conversation.item.done", previous_item_id=item["previous"], item=_shown(item))

    def _append(self, item: dict[str, Any], **told: Any) -> None:
        item["previous"], self.last_item = self.last_item, item["id"]
        self.items[item["id"]] = item
        while len(self.items) > _MOST_ITEMS:
            self.items.popitem(last=False)
        self.emit("conversation.item.added", previous_item_id=item["previous"], item=_shown(item), **told)

    def _listen(self, kind: str, *what: Any) -> None:
        if self._closing is not None and kind in ("begin", "words", "end"):
            # The protocol has one response at a time.
            self._held.append((kind, what))
        else:
            getattr(self, f"_on_{kind}")(*what)

    def _on_frame(self, frame: Frame) -> None:
        item = self.items.get(frame.item_id)
        if item is not None:
            item["status"] = "completed" if frame.fate == "seen" else "incomplete"
            told = {"previous_item_id": item["previous"], "item": _shown(item), "videollm_mod": frame.to_dict()}
            self.emit("conversation.item.done", **told)

    def _on_begin(self, reply: Reply) -> None:
        wants_speech = self.audio.is_spoken if reply.is_spoken is None else reply.is_spoken
        # The server that took the request may have had a speaker.
        reply.is_spoken = wants_speech and self.audio.speaker is not None
        item = {"id": f"item_{secrets.token_hex(10)}", "object": "realtime.item", "type": "message"}
        item |= {"status": "in_progress", "role": "assistant", "content": []}
        self._replies[reply.reply_id] = item
        response = self._response(reply, [], begins=True)
        self.emit("response.created", response=response, videollm_mod=self._place(reply))
        self.emit("response.output_item.added", response_id=reply.reply_id, output_index=0, item=_shown(item))
        self._append(item)
        self.emit("response.content_part.added", **self._part(reply), part=content_part(reply))
        if reply.is_spoken:
            self._speak(reply)

    def _on_words(self, reply: Reply, words: str) -> None:
        kind, fields = text_event(reply, words)
        self.emit(kind, **self._part(reply), **fields)
        if self._speech is not None:
            self._speech.add(words)

    def _on_end(self, reply: Reply) -> None:
        kind, fields = text_event(reply)
        self.emit(kind, **self._part(reply), **fields)
        if self._speech is not None and not self._speech.is_over:
            if reply.is_cancelled or reply.is_failed or reply.event.interrupted:
                self._speech.stop()
            else:
                self._speech.finish()
                self._closing = reply
                return
        self._close(reply)

    def _close(self, reply: Reply) -> None:
        """Tell that a response is done."""
        self._speech = None
        item = self._replies.pop(reply.reply_id)
        is_cut = self._response(reply, [])["status"] == "cancelled"
        item["status"] = "incomplete" if is_cut else "completed"
        item["content"] = item_content(reply)
        for kind, fields in response_end(reply, _shown(item)):
            self.emit(kind, **fields)
        self.emit("conversation.item.done", previous_item_id=item["previous"], item=_shown(item))
        response = self._response(reply, [_shown(item)])
        self.emit("response.done", response=response, videollm_mod=self._place(reply))

    # ------------------------------------------------------------------------------------------------------- speech

    def _speak(self, reply: Reply) -> None:
        """Begin the speech of a reply, unless it would come too late."""
        is_unspoken = reply.reply_id in self._unspoken
        self._unspoken.discard(reply.reply_id)
        if reply.is_cancelled or is_unspoken or self.session.over is not None:
            return
        if sum(kind == "begin" for kind, _ in self._held) >= _MOST_UNSPOKEN:
            late = "The speech endpoint is slower than the model speaks, so this reply comes as text."
            self._fail_speech(reply, RequestError(late, status=503, code="speech_behind"))
            return

        async def send(audio: bytes) -> None:
            delta = base64.b64encode(audio).decode()
            self.emit("response.output_audio.delta", **self._part(reply), delta=delta)
            # So that audio does not wait here for a slow client.
            await self._until_sent(self.number)

        def end(error: RequestError | None) -> None:
            if error is not None:
                self._fail_speech(reply, error)
                self._unspoken |= {what[0].reply_id for kind, what in self._held if kind == "begin"}
            if self._closing is reply:
                self._end_speech()

        self._speech = Speech(self.audio.speaker, self.session.limits, send, end)

    def _fail_speech(self, reply: Reply, error: RequestError) -> None:
        self.session.sessions.metrics.speech_failures.labels(error.code).inc()
        told = error.to_dict() | {"event_id": None}
        self.emit("error", error=told, videollm_mod={"response_id": reply.reply_id})

    def _end_speech(self) -> None:
        """End the response that was being spoken, and tell what later ones have told meanwhile."""
        reply, self._closing = self._closing, None
        self._close(reply)
        while self._held and self._closing is None:
            kind, what = self._held.popleft()
            self._listen(kind, *what)

    def silence(self, response_id: str | None = None) -> Reply | None:
        """Stop the speech of the response that is still being spoken, and return its reply, if there is one."""
        reply = self._closing
        if reply is None or response_id not in (None, reply.reply_id):
            return None
        reply.is_silenced = True
        self._speech.stop()
        self._end_speech()
        return reply

    async def cancel(self) -> Reply | None:
        """Cancel the response in progress, or the first that was asked for. Return its reply, if there is one."""
        if self._speech is not None and not self._speech.is_over and self.session.reply is not None:
            self._speech.stop()
            self.session.reply.is_silenced = True  # also if its text turns out to be complete
        reply = await self.session.cancel()
        if reply is None and (reply := self.hearing.withdraw()) is not None:
            self._on_begin(reply)
            self._on_end(reply)
        return reply

    # ---------------------------------------------------------------------------------------------------------- end

    def _on_over(self, reason: str) -> None:
        self.hearing.close()
        if self._closing is not None:
            self._speech.stop()
            self._end_speech()
        if self.session.reply is not None and self.session.reply.reply_id in self._replies:
            self.session.reply.is_failed = True
            self._on_end(self.session.reply)
        if reason == "expired":
            idle = f"The session had no events from its client for {self.session.limits.idle_seconds:g} s."
            self.emit("session.expired", videollm_mod={"reason": idle})
        elif reason not in ("closed", SAVED):
            self.fail(RequestError(f"The session has ended: {reason}", status=500, code="session_failed"), None)
        if self.connection is not None:
            self._finish_connection(reason)

    def fail(self, error: RequestError, event_id: str | None) -> None:
        """Tell the client what was wrong with an event."""
        self.emit("error", error=error.to_dict() | {"event_id": event_id})

    def _response(self, reply: Reply, output: list[dict[str, Any]], *, begins: bool = False) -> dict[str, Any]:
        most = self.session.max_output_tokens
        return response_object(reply, output, self.conversation_id, most, begins=begins)

    def _part(self, reply: Reply) -> dict[str, Any]:
        """Return the names of the part that holds a response."""
        item_id = self._replies[reply.reply_id]["id"]
        return {"response_id": reply.reply_id, "item_id": item_id, "output_index": 0, "content_index": 0}

    def _place(self, reply: Reply) -> dict[str, Any]:
        """Return what the extension field of a response says."""
        place: dict[str, Any] = {"unprompted": not reply.is_asked}
        if reply.ignored and reply.event is None:
            place["ignored"] = reply.ignored
        if reply.event is not None:
            event = reply.event
            place |= {"time": event.time, "frame": event.frame, "lag": event.latency}
            place |= {"interval_probability": event.interval_probability}
        else:
            session = self.session.stream.session
            place |= {"time": session.time, "frame": session.num_frames - 1}
        return {name: value for name, value in place.items() if value is not None}


def _shown(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name != "previous"}


class Connection:
    """
    One WebSocket of a session.

    Args:
        socket (`WebSocket`): The accepted WebSocket.
        conversation ([`Conversation`]): What it is about.
        handle (`Callable`): Handles the text of an event, `None` for a message that is not a text.
    """

    def __init__(
        self, socket: WebSocket, conversation: Conversation, handle: Callable[[str | None], Awaitable[None]]
    ) -> None:
        self.socket, self.conversation, self.session = socket, conversation, conversation.session
        self._handle = handle
        self._news = asyncio.Event()
        self._end: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    async def run(self, first: dict[str, Any] | None = None) -> None:
        """Exchange events until either side ends the connection. The `first` event comes before all others."""
        conversation = self.conversation
        self.session.come_back()
        tasks = [asyncio.ensure_future(self._send(first)), asyncio.ensure_future(self._receive())]
        try:
            await asyncio.wait([*tasks, self._end], return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                # Nothing can be sent any more. The close code tells whether the client meant to leave.
                await asyncio.wait([tasks[1]], timeout=1)
            if self._end.done() and self._end.result()[0] in (ENDED, FAILED):
                # What was said last still goes out.
                with suppress(asyncio.TimeoutError, TimeoutError):
                    await asyncio.wait_for(self._send_rest(tasks[0]), 5)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if conversation.connection is self:
                conversation.connection = None
            await self._close(tasks[1])

    def notice(self) -> None:
        """Take note that there is an event to send."""
        self._news.set()
        if self.conversation.num_missed and not self._end.done():
            self.session.sessions.metrics.disconnected.labels("slow_reader").inc()
            self.finish(SLOW_READER, "events were not read fast enough; resume the session")

    def finish(self, code: int, reason: str) -> None:
        """End the connection."""
        if not self._end.done():
            self._end.set_result((code, reason))

    async def _send(self, first: dict[str, Any] | None) -> None:
        conversation = self.conversation
        if first is not None:
            await self.socket.send_text(json.dumps(first))
        while conversation.connection is self:
            while (event := conversation.next_event()) is not None:
                await self.socket.send_text(event[1])
                if conversation.connection is not self:
                    return
                conversation.note_sent(event[0])
            self._news.clear()
            await self._news.wait()

    async def _send_rest(self, task: "asyncio.Task[None]") -> None:
        while self.conversation.sent < self.conversation.number and not task.done():
            await asyncio.sleep(0.01)

    async def _receive(self) -> int:
        """Handle events until the client closes the connection. Return the close code."""
        while True:
            message = await self.socket.receive()
            if message["type"] == "websocket.disconnect":
                return message.get("code") or 1006
            await self._handle(message.get("text"))

    async def _close(self, received: "asyncio.Task[int]") -> None:
        """Close the WebSocket, and end the session if its client meant to."""
        has_left = received.done() and not received.cancelled() and received.exception() is None
        if has_left and received.result() == 1000:
            await self.session.close()
        elif self.session.over is None and self.conversation.connection is None:
            await self.conversation.leave()
        if not has_left:
            if self.session.saved is not None:  # the client may resume it elsewhere at once
                await self.session.saved.wait()
            code, reason = self._end.result() if self._end.done() else (FAILED, "the server failed")
            with suppress(RuntimeError, WebSocketDisconnect, OSError, asyncio.TimeoutError, TimeoutError):
                await asyncio.wait_for(self.socket.close(code, reason), 5)


__all__ = ["Connection", "Conversation"]
