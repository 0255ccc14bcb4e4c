# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""`videollm-mod watch`: alerts when something comes into view, printed and posted to a webhook."""

import json
import queue
import threading
import time as clock
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from videollm_mod.console import printable

import typer

from videollm_mod.commands.watching import CtrlC, keep_what_was_seen, print_reading, read_frames
from videollm_mod.commands.windows import WindowedSession, see_windows, to_question
from videollm_mod.space.checkpoint_faults import in_one_line


# An answer counts as no again when its probability falls below this share of the threshold.
_RELEASE = 0.8
# Answers of a web server that a later try may change: too early, too many requests, and its own faults.
_TRY_AGAIN = {408, 425, 429}
# Seconds that the end of a source and Ctrl+C wait for alerts that are still to be sent.
_WAIT_AT_END, _WAIT_AT_STOP = 30.0, 0.3


class Alert:
    """
    Something to look for. It goes off when the answer turns to yes, and not again until it was no.

    Args:
        what (`str`): What to look for; see [`to_question`].
        threshold (`float`): Least probability of yes. The answer is no again at less than four fifths of it, so that
            a probability near the threshold gives one alert.
    """

    def __init__(self, what: str, threshold: float) -> None:
        self.what, self.threshold, self.is_on = what, threshold, False

    def turns_on(self, probability: float) -> bool:
        """Take note of an answer. Return whether the alert goes off."""
        if self.is_on:
            self.is_on = probability >= _RELEASE * self.threshold
            return False
        self.is_on = probability >= self.threshold
        return self.is_on


class Webhook:
    """
    Posts JSON to a web address in its own thread, so that the caller never waits.

    The thread tries again after each of `waits` seconds if the server does not answer, or answers 408, 425, 429 or 500
    and above. Other answers are final.

    Args:
        url (`str`): The address, http or https.
        say (`Callable`): Gets a line for each payload that was not delivered. The line has no part of the address that
            may be a password.
        timeout (`float`, *optional*, defaults to 10.0): Seconds that the server may take to accept and to answer.
        waits (`Sequence[float]`, *optional*, defaults to `(1, 4, 15)`): Seconds before the second and later tries.
        most_waiting (`int`, *optional*, defaults to 100): Payloads that may wait. Later ones are not sent.

    Raises:
        `ValueError`: If the address is not one of the web, or the proxy or the certificates of the environment cannot
            be used. The message does not contain the address.
    """

    def __init__(
        self,
        url: str,
        say: Callable[[str], None],
        *,
        timeout: float = 10.0,
        waits: Sequence[float] = (1, 4, 15),
        most_waiting: int = 100,
    ) -> None:
        import httpx

        self.name = _check_url(url)
        try:
            self._client = httpx.Client(timeout=timeout)
        except Exception as error:  # each library behind it has its own
            where = "the proxy or the certificates of the environment, such as ALL_PROXY and SSL_CERT_FILE"
            # A wrong address of a proxy may hold a password.
            reason = "its address is wrong" if isinstance(error, httpx.InvalidURL) else in_one_line(error)
            raise ValueError(f"--webhook cannot use {where}: {reason}") from None
        self.url, self.say, self.timeout, self.waits = url, say, timeout, tuple(waits)
        self._waiting: queue.Queue[dict[str, Any] | None] = queue.Queue(most_waiting)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="webhook", daemon=True)
        self._thread.start()

    def post(self, payload: dict[str, Any]) -> None:
        """Queue a payload."""
        try:
            self._waiting.put_nowait(payload)
        except queue.Full:
            self.say(f"{self.name} is too slow: an alert was not sent")

    def close(self, seconds: float) -> None:
        """Wait up to some seconds until all is delivered or given up, and say how many payloads are left."""
        until = clock.monotonic() + seconds
        while self._waiting.unfinished_tasks and clock.monotonic() < until:
            clock.sleep(0.02)
        self._stopped.set()
        if left := self._waiting.unfinished_tasks:
            self.say(f"{left} alert{'s were' if left > 1 else ' was'} not sent to {self.name}: there was no time left")

    def _run(self) -> None:
        with self._client as client:
            while not self._stopped.is_set():
                payload = self._waiting.get()
                try:
                    if (fault := self._deliver(client, payload)) and not self._stopped.is_set():
                        self.say(f"an alert was not sent to {self.name}: {fault}")
                finally:
                    self._waiting.task_done()

    def _deliver(self, client: Any, payload: dict[str, Any]) -> str:
        """Post a payload, several times if need be. Return why it was not accepted, or an empty text."""
        fault = ""
        for wait in (0, *self.waits):
            if self._stopped.wait(wait):
                return fault
            fault, can_try_again = self._try(client, payload)
            if not fault or not can_try_again:
                return fault
        return f"{fault}, {1 + len(self.waits)} times" if self.waits else fault

    def _try(self, client: Any, payload: dict[str, Any]) -> tuple[str, bool]:
        """Post a payload once. Return why it was not accepted, or an empty text, and whether to try again."""
        import httpx

        try:
            status = client.post(self.url, json=payload).status_code
        except httpx.TimeoutException:
            return f"no answer within {self.timeout:g} s", True
        except httpx.HTTPError as error:
            # Messages may contain the address.
            return f"the connection failed ({type(error).__name__})", True
        except Exception as error:  # An address that the client refuses.
            return f"it cannot be posted to ({type(error).__name__})", False
        if 200 <= status < 300:
            return "", False
        return f"it answered {status}", status >= 500 or status in _TRY_AGAIN


def _check_url(url: str) -> str:
    """Return the part of a web address that is no secret. Raise `ValueError` if it is not one."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("--webhook must be an address that begins with http:// or https://.")
    return f"{parts.scheme}://{parts.hostname}{port}"


def name_source(video: str) -> str:
    """Return the name of a video without its folder, and of a stream without what may be a password, as Unicode."""
    from videollm_mod.video_opening_videollm_mod import HOST, without_secrets

    shown = without_secrets(video)
    host = "".join(HOST.findall(shown))
    return f"{shown.partition('://')[0]}://{host}" if host else printable(Path(video).name)


def watch_for(
    processor: Any,
    video: str,
    session: Any,
    alerts: Sequence[Alert],
    ctrl_c: CtrlC,
    *,
    every: float,
    webhook: Webhook | None,
    as_json: bool,
    **reading: Any,
) -> bool:
    """
    Watch a video, and print and post each alert that goes off.

    Args:
        session ([`StreamingSession`]): A session that has seen nothing and does not speak.
        every (`float`): Seconds between two checks. Each check sees the frames since the one before.
        webhook ([`Webhook`], *optional*): Where to post. It is closed at the end.
        reading: Options of [`read_frames`].

    Returns:
        `bool`: Whether the source broke off.
    """
    watcher = WindowedSession(session, every, [to_question(alert.what) for alert in alerts])
    # If the model is slower than the source, an alert is late by what waits.
    reading["max_waiting"] = max(1, round(every * session.fps))
    reading["on_slower"] = partial(setattr, watcher, "fps")
    try:
        with keep_what_was_seen(watcher) as ends:
            for window in see_windows(watcher, read_frames(processor, video, watcher, **reading), ctrl_c):
                for alert, probability in zip(alerts, window.probabilities, strict=True):
                    if alert.turns_on(probability):
                        _tell(alert, window.end, probability, name_source(video), webhook, as_json)
        print_reading(reading["report"], watcher.num_dropped, as_json=as_json)
        return bool(ends) and not ctrl_c.is_pressed
    finally:
        if webhook is not None:
            webhook.close(_WAIT_AT_STOP if ctrl_c.is_pressed else _WAIT_AT_END)


def _tell(alert: Alert, time: float, probability: float, source: str, webhook: Webhook | None, as_json: bool) -> None:
    said = {"time": round(time, 3), "alert": alert.what, "probability": round(probability, 4)}
    typer.echo(json.dumps(said) if as_json else f"{time:6.1f}s  {alert.what} ({probability:.2f})")
    if webhook is not None:
        at = datetime.now().astimezone().isoformat(timespec="milliseconds")
        # Chat services show `text`.
        webhook.post({"text": f"{alert.what} ({source}, {time:.1f} s)", **said, "source": source, "at": at})


__all__ = ["Alert", "Webhook", "name_source", "watch_for"]
