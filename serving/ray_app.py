# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
The server on many machines with Ray Serve: `serve run videollm_mod.serving.ray_app:app model=MODEL`.

Each replica is the application of `videollm-mod serve` with its own engine. A session lives on one replica. Its
id and its resume token begin with the replica's name, and [`SessionRouter`] sends requests with these to that replica.
"""

import os
import pickle
import random
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

import ray
from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    AutoscalingContext,
    AutoscalingPolicy,
    BackpressureConfig,
    RequestRouterConfig,
)
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from .draining import draining
from .limits import Limits
from .state_folder import check_saving, own_folder


_SESSION = re.compile(r"/v1/streaming/sessions/(\w+)\.")
# Requests that a replica takes beside its streams: those that it refuses, and those without a stream.
_MORE_REQUESTS = 16
_RETRY_AFTER = 5.0  # seconds
_STATS_PERIOD = 1.0  # seconds between two reports of a replica to the routers
_CLOSING = 10.0  # seconds that replicas may take to close after `drain_seconds`


class Settings(BaseModel):
    """
    Settings of the application, each `NAME=VALUE` of `serve run` or an entry of `args` in a Serve config file.

    Keys of clients come from the environment variable `VIDEOLLM_MOD_API_KEYS`, separated by spaces, so that they stand
    in no file.

    Args:
        model (`str`), revision (`str`), name (`str`): The checkpoint, and its name for clients.
        weights (`str`), cache_dtype (`str`), frame_size (`int`): How the model is loaded, as for `videollm-mod serve`.
        max_streams (`int`): Most streams of a replica.
        max_frames (`int`), max_text_tokens (`int`): What a stream remembers.
        cors (`list[str]`), allowed_hosts (`list[str]`), allow_private_urls (`bool`), limits (`dict`): See
            [`create_app`].
        state_dir (`str`), max_state_bytes (`int`): Where a replica that is removed saves its sessions, and most bytes
            of them. All replicas must have this folder, so that clients resume their sessions on another one. The
            default is one among temporary files, which counts while the cluster has one machine.
        no_state_dir (`bool`): Whether a removed replica saves nothing.
        save_seconds (`float`): Seconds after which a replica also saves a session that has news while it goes on.
        transcriber (`str`), transcriber_model (`str`), speech (`str`), speech_model (`str`), speech_voice (`str`):
            Endpoints for speech, as for `videollm-mod serve`. Their keys come from the same environment variables.
        min_replicas (`int`), max_replicas (`int`): Between these, Serve adds and removes replicas.
        target_streams (`float`): Open streams of a replica above which Serve adds one, by default three quarters of
            `max_streams`.
        downscale_seconds (`float`): How long fewer streams than that must last before Serve removes a replica.
        num_gpus (`float`): GPUs of a replica.
        drain_seconds (`float`): How long a replica that is removed may take to answer what it has accepted.
    """

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    revision: str | None = None
    name: str | None = None
    weights: str | None = None
    cache_dtype: str | None = None
    frame_size: int | None = None
    max_streams: int = Field(8, ge=1)
    max_frames: int | None = None
    max_text_tokens: int | None = None
    cors: list[str] = []
    allowed_hosts: list[str] = []
    allow_private_urls: bool = False
    transcriber: str | None = None
    transcriber_model: str | None = None
    speech: str | None = None
    speech_model: str | None = None
    speech_voice: str | None = None
    limits: dict[str, Any] = {}
    state_dir: str | None = None
    no_state_dir: bool = False
    max_state_bytes: int = Field(10_000_000_000, ge=1)
    save_seconds: float | None = None
    min_replicas: int = Field(1, ge=1)
    max_replicas: int | None = None
    target_streams: float | None = Field(None, gt=0)
    downscale_seconds: float = Field(600.0, ge=0)
    num_gpus: float = Field(0.0, ge=0)
    drain_seconds: float = Field(30.0, gt=0)


class SessionRouter(RequestRouter):
    """
    Sends a request of a session to the replica that has it. Others go to the replica with the fewest open requests of
    this router's, among those with room for a stream. A WebSocket is an open request.
    """

    def initialize_state(self, **_: Any) -> None:
        """Begin without open requests."""
        self._open: dict[str, ReplicaID] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Return lists of replicas, best first."""
        candidates = list(candidate_replicas)
        if pending_request is None:
            return [candidates]
        pending_request.routing_context.should_backoff = True
        name = _replica_of(pending_request.args)
        if own := [replica for replica in candidates if replica.replica_id.unique_id == name]:
            return [own]
        # The replica of a session may be gone. Any other resumes the session if it was saved, or says where it is.
        count = Counter(self._open.values())
        roomy = [replica for replica in candidates if replica.routing_stats.get("has_room", True)] or candidates
        least = min((count[replica.replica_id] for replica in roomy), default=0)
        best = [replica for replica in roomy if count[replica.replica_id] == least]
        random.shuffle(best)
        return [best, candidates]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:  # noqa: ARG002
        """Count a request."""
        self._open[pending_request.metadata.internal_request_id] = replica_id

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:  # noqa: ARG002
        """Count it no more."""
        self._open.pop(internal_request_id, None)


def _replica_of(arguments: Sequence[Any]) -> str | None:
    """Return the replica that the path or the resume token of a request names."""
    if not arguments or not isinstance(arguments[0], bytes):
        return None
    scope = pickle.loads(arguments[0]).asgi_scope
    if found := _SESSION.search(scope["path"]):
        return found[1]
    tokens = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("resume_token", [""])
    return tokens[0].rpartition(".")[0] or None


def replicas_needed(context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """
    Return how many replicas the open streams need, and an empty state for Serve to keep. Serve delays changes, and
    keeps the number within its limits.

    A stream may have no open request: a session over plain HTTP, or one whose client has lost its connection. If no
    replica has reported its streams yet, open requests count.

    Args:
        context (`AutoscalingContext`): What Serve knows of the replicas.
    """
    reported = (context.aggregated_metrics or {}).get("streams", {})
    streams = max(sum(reported.values()), context.total_num_requests)
    return streams / context.config.get_target_ongoing_requests(), {}


class Replica:
    """One process with an engine. [`app`] gives it its application."""

    async def check_health(self) -> None:
        """Raise `RuntimeError` if the engine has stopped, so that Serve replaces the replica."""
        status = self.app.state.server.status
        if status not in ("starting", "ok"):
            raise RuntimeError(status)

    async def record_routing_stats(self) -> dict[str, bool]:
        """Tell routers whether there is room for another stream. Sessions without a WebSocket are no open request."""
        return {"has_room": self._num_streams < self.app.state.server.engine.max_streams}

    async def record_autoscaling_stats(self) -> dict[str, int]:
        """Tell Serve how many streams are open."""
        return {"streams": self._num_streams}

    @property
    def _num_streams(self) -> int:
        return len(list(self.app.state.server.sessions))


def app(settings: Settings) -> serve.Application:
    """Return the application for `serve run`."""
    # Wrong settings are reported before a replica starts.
    Limits(**settings.limits)
    check_saving(settings.save_seconds, settings.state_dir)
    if settings.no_state_dir and settings.state_dir is not None:
        raise ValueError("`state_dir` and `no_state_dir` contradict each other: give one of them.")
    target = settings.target_streams or 0.75 * settings.max_streams
    replicas = {"min_replicas": settings.min_replicas, "initial_replicas": settings.min_replicas}
    replicas |= {"max_replicas": max(settings.min_replicas, settings.max_replicas or 0)}
    deployment = serve.deployment(
        serve.ingress(lambda: _new_app(settings))(Replica),
        name="VideoLLM-MoD",
        ray_actor_options={"num_cpus": 1, "num_gpus": settings.num_gpus},
        autoscaling_config=AutoscalingConfig(
            **replicas,
            target_ongoing_requests=target,
            downscale_delay_s=settings.downscale_seconds,
            policy=AutoscalingPolicy(policy_function=replicas_needed),
        ),
        request_router_config=RequestRouterConfig(
            request_router_class=SessionRouter, request_routing_stats_period_s=_STATS_PERIOD
        ),
        max_ongoing_requests=settings.max_streams + _MORE_REQUESTS,
        max_queued_requests=_MORE_REQUESTS,
        backpressure_config=BackpressureConfig(status_code=503, retry_after_s=_RETRY_AFTER),
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.drain_seconds + _CLOSING,
    )
    return deployment.bind()


def _new_app(settings: Settings) -> FastAPI:
    """Return the application of a replica; called in its process."""
    from ..commands.serve import KEYS, model_key, new_app, split_keys
    from ..commands.watching import EMBEDDED

    given = settings.model_dump()
    limits, drain_seconds = given.pop("limits"), given.pop("drain_seconds")
    for name in ("min_replicas", "max_replicas", "target_streams", "downscale_seconds", "num_gpus", "no_state_dir"):
        del given[name]
    given["model"] = given["model"] or str(EMBEDDED)
    is_shared = settings.state_dir is not None
    if not is_shared and not settings.no_state_dir:
        key = f"{model_key(given['model'], settings.revision)} with Ray Serve"
        given["state_dir"] = own_folder(key, settings.max_state_bytes)
    keys = split_keys(os.environ.get(KEYS, "").split())
    place = f"{serve.get_replica_context().replica_tag}."
    made = new_app(**given, api_keys=keys, session_prefix=place, **limits)
    made.router.lifespan_context = draining(made, drain_seconds, _is_removed, lambda: is_shared or _is_one_machine())
    return made


def _is_one_machine() -> bool:
    """Return whether all replicas can read the temporary files of this one."""
    return sum(node["Alive"] for node in ray.nodes()) == 1


def _is_removed() -> bool:
    """Return whether Serve has begun to remove the replica of this process."""
    # Serve waits for open connections, and has no public way to say so. If this private one is gone, the answer is
    # always no, and Serve cuts the connections when its patience ends.
    actors = getattr(ray._private.worker.global_worker, "actors", {}).values()
    return any(getattr(getattr(actor, "_replica_impl", None), "_shutting_down", False) for actor in actors)


__all__ = ["Replica", "SessionRouter", "Settings", "app", "replicas_needed"]
