# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Two replicas of the server on Ray: where sessions live, what a lost replica costs, and how one is removed."""

import asyncio
import inspect
import json
import os
import shutil
import socket
import tempfile
import time as clock
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


if os.environ.get("TEST_RAY") != "1":
    pytest.skip("`make test-ray` runs these tests: Ray takes half a minute to start", allow_module_level=True)
pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')

import httpx  # noqa: E402
import ray  # noqa: E402
import yaml  # noqa: E402
from engines import embedded  # noqa: E402
from pyarrow import parquet  # noqa: E402
from ray import serve  # noqa: E402
from ray.serve.config import AutoscalingConfig, AutoscalingContext  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402
from serving_server import frame_event, narration, picture  # noqa: E402
from typer.testing import CliRunner  # noqa: E402
from websockets.asyncio.client import connect  # noqa: E402
from websockets.exceptions import ConnectionClosed, InvalidStatus  # noqa: E402

from videollm_mod import cli  # noqa: E402
from videollm_mod.serving.ray_app import Settings, app, replicas_needed  # noqa: E402


ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def cluster():
    """One Ray instance for all tests of this file."""
    # Paths of sockets must be short. Without a token, nothing is written into the home directory.
    folder = tempfile.mkdtemp(prefix="ray")
    # Replicas save sessions among temporary files.
    os.environ |= {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "TMPDIR": folder}
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def address(cluster):  # noqa: ARG001
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    serve.run(
        app(Settings(max_streams=2, max_frames=24, max_text_tokens=256, min_replicas=2, limits={"max_waiting": 64}))
    )
    at = f"127.0.0.1:{port}"
    while any(httpx.get(f"http://{at}/health").status_code != 200 for _ in range(8)):
        clock.sleep(0.2)
    yield at
    serve.shutdown()


def name_of_model(address):
    """Return the model's name at one of the replicas."""
    return httpx.get(f"http://{address}/v1/models", timeout=60).json()["data"][0]["id"]


def replica_of(name):
    """Return the replica of a session's id or resume token."""
    return name.partition(".")[0]


def token_of(session):
    return session["videollm_mod"]["resume_token"]


async def open_stream(address, **query):
    """Connect a WebSocket, as soon as there is room. Return it, and the session object."""
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    while True:
        try:
            connection = await connect(f"ws://{address}/v1/realtime?{asked}", max_size=None)
            return connection, json.loads(await connection.recv())["session"]
        except InvalidStatus as error:
            if error.response.status_code != 503:
                raise
        except ConnectionClosed as closed:
            if closed.rcvd is None or closed.rcvd.code != 1012:  # the replica is removed too
                raise
        await asyncio.sleep(1)


async def send(connection, frames, start=0):
    for number, frame in enumerate(frames, start=start):
        await connection.send(json.dumps(frame_event(frame, number / 2)))


def responses(event):
    """Return the time and the text of the response that an event ends, in a list, or an empty list."""
    if event["type"] != "response.done":
        return []
    return [(event["videollm_mod"]["time"], event["response"]["output"][0]["content"][0]["text"])]


async def hear(connection, count):
    """Return the time and the text of the next `count` responses."""
    said = []
    while len(said) < count:
        said += responses(json.loads(await asyncio.wait_for(connection.recv(), 60)))
    return said


def test_http_sessions_stay_on_their_replicas(address):
    frames = embedded()[2][:8]
    path = f"http://{address}/v1/streaming/sessions"
    with httpx.Client(timeout=60) as client:
        sessions = [client.post(path).json()["id"] for _ in range(2)]
        said = {name: [] for name in sessions}
        for number, frame in enumerate(frames):
            for name in sessions:
                answer = client.post(f"{path}/{name}/frame?time={number / 2}", content=picture(frame))
                assert answer.status_code == 200, answer.text
                said[name] += [[event["time"], event["text"]] for event in answer.json()["said"]]
        expected = [list(event) for event in narration() if event[0] <= (len(frames) - 1) / 2]
        assert expected and list(said.values()) == [expected] * 2
        assert [client.delete(f"{path}/{name}").status_code for name in sessions] == [200, 200]


def test_streams_spread_and_are_refused_when_all_replicas_are_full(address):
    async def fill():
        opened = [await open_stream(address) for _ in range(4)]
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"ws://{address}/v1/realtime")
        resumed, session = await open_stream(address, resume_token=token_of(opened[0][1]))
        for connection, _ in [*opened[1:], (resumed, session)]:
            await connection.close()
        return [session["id"] for _, session in opened], refused.value.response, session["id"]

    sessions, refused, resumed = asyncio.run(fill())
    assert sorted(Counter(map(replica_of, sessions)).values()) == [2, 2]
    assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
    assert json.loads(refused.body)["error"]["code"] == "server_full"
    assert resumed == sessions[0]


def test_a_lost_replica_costs_its_own_streams_only(address):
    frames = embedded()[2]
    expected = narration()

    async def lose():
        opened = {}
        while len(opened) < 2:
            connection, session = await open_stream(address)
            opened.setdefault(replica_of(session["id"]), (connection, session))
        (lost, gone), (kept, _) = opened.values()
        for connection in (lost, kept):
            await send(connection, frames[:8])
        name = f"SERVE_REPLICA::default#VideoLLM-MoD#{replica_of(gone['id'])}"
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
        with pytest.raises(ConnectionClosed):
            while True:
                await asyncio.wait_for(lost.recv(), 60)
        await send(kept, frames[8:], start=8)
        assert await hear(kept, len(expected)) == expected
        with pytest.raises(InvalidStatus) as refused:
            await open_stream(address, resume_token=token_of(gone))
        again, session = await open_stream(address)
        await send(again, frames)
        heard = await hear(again, len(expected))
        for connection in (kept, again):
            await connection.close()
        return gone, session, refused.value.response, heard

    gone, session, refused, heard = asyncio.run(lose())
    assert refused.status_code == 404 and json.loads(refused.body)["error"]["code"] == "no_session"
    assert heard == expected and replica_of(session["id"]) != replica_of(gone["id"])


def test_a_replica_that_is_removed_says_what_it_has_to_say(address):
    """It has no folder, as on several machines that share none."""
    frames = embedded()[2]
    settings = {"max_streams": 2, "max_frames": 24, "max_text_tokens": 256, "min_replicas": 2, "no_state_dir": True}
    serve.run(app(Settings(**settings, limits={"max_waiting": 64}, name="forgets")))
    while any(name_of_model(address) != "forgets" for _ in range(8)):
        clock.sleep(1)  # replicas of the deployment before are still there
    expected = narration()

    async def leave():
        connection, _ = await open_stream(address)
        await send(connection, frames)
        accepted, heard = 0, []
        while accepted < len(frames):
            event = json.loads(await connection.recv())
            heard += responses(event)
            # The model's replies are items too.
            accepted += event["type"] == "conversation.item.added" and event["item"]["role"] == "user"
        with ThreadPoolExecutor(1) as thread:
            thread.submit(serve.delete, "default")
            heard += await hear(connection, len(expected) - len(heard))
            last = json.loads(await connection.recv())
            while last["type"] != "error":
                last = json.loads(await connection.recv())
            with pytest.raises(ConnectionClosed):
                await connection.recv()
        return heard, last

    heard, last = asyncio.run(leave())
    assert heard == expected
    assert last["error"]["message"] == "The session has ended: the server is shutting down"


def test_a_session_of_a_removed_replica_goes_on_elsewhere(address):
    """
    A deployment with other settings replaces both replicas, and nothing was said about a folder. The client has its
    first token only.
    """
    frames, expected = embedded()[2], narration()
    settings = {"max_streams": 2, "max_frames": 24, "max_text_tokens": 256, "min_replicas": 2}
    # A replica takes a minute to start on a busy machine.
    limits = {"max_waiting": 64, "resume_seconds": 300.0}
    settings |= {"limits": limits}

    async def watch(deploy):
        """Send a frame when the one before was accepted. Return the sessions, the close codes and what was said."""
        connection, session = await open_stream(address)
        sessions, codes, heard, last, sent, accepted = [session], [], [], None, 0, 0
        token, deployed = token_of(session), None
        while accepted < len(frames) or len(heard) < len(expected):
            try:
                # The last frame comes when both replicas are new.
                if sent == accepted < len(frames) - (deployed is None or not deployed.done()):
                    await send(connection, frames[sent : sent + 1], start=sent)
                    sent += 1
                event = json.loads(await asyncio.wait_for(connection.recv(), 1))
                heard, last = heard + responses(event), event["event_id"]
                accepted += event["type"] == "conversation.item.added" and event["item"]["role"] == "user"
                if accepted == 8 and deployed is None:
                    deployed = deploy()
            except asyncio.TimeoutError:
                continue
            except ConnectionClosed as closed:
                codes.append(closed.rcvd.code)
                connection, session = await open_stream(address, resume_token=token, last_event_id=last)
                sessions, sent = [*sessions, session], accepted
        await connection.close()
        return sessions, codes, heard

    async def move():
        loop = asyncio.get_running_loop()
        after = app(Settings(**settings, name="after"))
        return await watch(lambda: asyncio.ensure_future(loop.run_in_executor(None, serve.run, after)))

    serve.run(app(Settings(**settings, name="before")))
    sessions, codes, heard = asyncio.run(move())
    assert heard == expected and codes and set(codes) == {1012}
    places = [replica_of(session["id"]) for session in sessions]
    assert len(set(places)) == len(places) > 1
    assert [replica_of(token_of(session)) for session in sessions] == places


def test_a_session_of_a_lost_replica_goes_on_elsewhere_from_its_last_save(address, tmp_path):
    """The client sends again what came after the save. The folder is moved, so that there is no later one."""
    frames, expected, moved = embedded()[2], narration(), tmp_path / "moved"
    settings = {"max_streams": 2, "max_frames": 24, "max_text_tokens": 256, "min_replicas": 2}
    limits = {"max_waiting": 64, "resume_seconds": 300.0}
    settings |= {"limits": limits, "state_dir": str(tmp_path / "state"), "save_seconds": 0.2}
    serve.run(app(Settings(**settings, name="saving")))

    def count_saved():
        try:
            (state,) = (tmp_path / "state").glob("*/client.json")
            return json.loads(state.read_text(encoding="utf-8"))["num_received"]
        except (ValueError, FileNotFoundError):  # none, two, or replaced meanwhile
            return 0

    async def lose():
        connection, session = await open_stream(address)
        while "save_seconds" not in session["videollm_mod"]:  # a replica of the deployment before
            await connection.close()
            connection, session = await open_stream(address)
        await send(connection, frames[:8])
        while count_saved() < 8:
            await asyncio.sleep(0.05)
        (tmp_path / "state").rename(moved)
        await send(connection, frames[8:11], start=8)
        events = []
        while not any(time > 4 for event in events for time, _ in responses(event)):
            events.append(json.loads(await asyncio.wait_for(connection.recv(), 60)))
        name = f"SERVE_REPLICA::default#VideoLLM-MoD#{replica_of(session['id'])}"
        ray.kill(ray.get_actor(name, namespace="serve"), no_restart=True)
        with pytest.raises(ConnectionClosed):
            while True:
                events.append(json.loads(await asyncio.wait_for(connection.recv(), 60)))
        moved.rename(tmp_path / "state")
        last = events[-1]["event_id"]
        again, resumed = await open_stream(address, resume_token=token_of(session), last_event_id=last)
        told = resumed["videollm_mod"]
        first = int(2 * told["last_frame_time"]) + 1
        kept = [event["event_id"] for event in events].index(told["rewound_to"]) + 1
        heard = [told for event in events[:kept] for told in responses(event)]
        await send(again, frames[first:], start=first)
        heard += await hear(again, len(expected) - len(heard))
        await again.close()
        return session, resumed, heard

    session, resumed, heard = asyncio.run(lose())
    assert resumed["videollm_mod"]["last_frame_time"] == 3.5
    assert replica_of(resumed["id"]) != replica_of(session["id"]) and heard == expected


@pytest.mark.parametrize("kind", ["websocket", "http"])
def test_replicas_come_and_go_with_streams(address, kind):
    """
    Sessions over plain HTTP have no open request between two frames. The stream that is left goes on, also if its
    replica is the one that is removed.
    """
    settings = {"max_streams": 3, "max_frames": 24, "max_text_tokens": 256, "min_replicas": 1, "max_replicas": 2}
    settings |= {"target_streams": 1.0, "downscale_seconds": 5.0, "limits": {"resume_seconds": 300.0}}
    serve.run(app(Settings(**settings, name=kind)))
    path, frame = f"http://{address}/v1/streaming/sessions", embedded()[2][0]

    def count():
        states = serve.status().applications["default"].deployments["VideoLLM-MoD"].replica_states
        return sum(states.values())

    async def open_one(client):
        if kind == "websocket":
            connection, session = await open_stream(address)
            return session["id"], connection.close, lambda: show_socket(connection, token_of(session))
        session_id = (await client.post(path)).raise_for_status().json()["id"]
        return session_id, lambda: client.delete(f"{path}/{session_id}"), lambda: show_http(client, session_id)

    async def show_socket(connection, token):
        """Show a frame, and return the replica that sees it."""
        try:
            for _ in range(2):
                await send(connection, [frame])
                while (event := json.loads(await asyncio.wait_for(connection.recv(), 60)))["type"] != "error":
                    if event["type"] == "conversation.item.done":
                        return replica_of(token)
        except ConnectionClosed as closed:
            assert closed.rcvd.code == 1012
        connection, session = await open_stream(address, resume_token=token)
        return await show_socket(connection, token_of(session))

    async def show_http(client, session_id):
        while True:
            answer = await client.post(f"{path}/{session_id}/frame", content=picture(frame), follow_redirects=True)
            if answer.status_code != 503:
                assert answer.status_code == 200, answer.text
                return replica_of(str(answer.url).removeprefix(f"{path}/"))
            await asyncio.sleep(1)

    async def crowd():
        async with httpx.AsyncClient(timeout=60) as client:
            while count() != 1 or (await client.get(f"http://{address}/v1/models")).json()["data"][0]["id"] != kind:
                await asyncio.sleep(1)  # replicas of the deployment before are still there
            opened = [await open_one(client) for _ in range(2)]
            while count() < 2:
                await asyncio.sleep(1)
            opened.append(await open_one(client))
            while replica_of(opened[-1][0]) == replica_of(opened[0][0]):  # routers learn of it in a moment
                await opened.pop()[1]()
                opened.append(await open_one(client))
            for _, close, _ in opened[:2]:
                await close()
            while count() > 1:
                await asyncio.sleep(1)
            return [replica_of(session_id) for session_id, _, _ in opened], await opened[-1][2]()

    places, left = asyncio.run(crowd())
    assert places[0] == places[1] != places[2] and left in places


def test_replicas_follow_open_streams():
    """Until replicas have reported, open requests count."""

    def needed(streams, requests):
        given = dict.fromkeys(inspect.signature(AutoscalingContext).parameters)
        given |= {"total_num_requests": requests, "aggregated_metrics": streams}
        return replicas_needed(AutoscalingContext(**given | {"config": AutoscalingConfig(target_ongoing_requests=6)}))

    assert needed({"streams": {"a": 8.0, "b": 1.0}}, 3.0) == (1.5, {})
    assert needed({}, 12.0) == needed(None, 12.0) == (2.0, {})


# ------------------------------------------------------------------------------------------------- narrating a folder


@pytest.fixture(scope="module")
def idle_cluster(cluster):  # noqa: ARG001
    """The three processors, without replicas of the server."""
    serve.shutdown()


def test_a_folder_on_two_processes_has_the_rows_of_one(idle_cluster, tmp_path):  # noqa: ARG001
    for name, source in (("a.mp4", "streamworld"), ("b/c.mp4", "doomworld"), ("d.mp4", "streamworld")):
        (tmp_path / "films" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "samples" / f"{source}.mp4", tmp_path / "films" / name)
    (tmp_path / "films" / "cut.mp4").write_bytes((tmp_path / "films" / "a.mp4").read_bytes()[:3000])
    command = ["narrate", str(tmp_path / "films"), "--out"]
    alone = CliRunner().invoke(cli.app, [*command, str(tmp_path / "srt"), "--json"])
    expected = {line["video"]: line for line in map(json.loads, alone.stdout.splitlines()) if "error" not in line}
    on_ray = [*command, str(tmp_path / "rows"), "--ray", "2"]
    done = CliRunner().invoke(cli.app, on_ray)
    assert done.exit_code == 1 and "3 narrated, 1 failed" in done.stderr, done.output
    rows = {row["video"]: row for row in parquet.read_table(tmp_path / "rows").to_pylist()}
    assert set(rows) == set(expected) == {"a.mp4", "b/c.mp4", "d.mp4"}
    for name, row in rows.items():
        assert {key: row[key] for key in ("seconds", "frames", "events")} == {
            key: expected[name][key] for key in ("seconds", "frames", "events")
        }
        assert row["srt"] == (tmp_path / "srt" / name).with_suffix(".srt").read_text()
    # A second run narrates what has no row.
    files = sorted((tmp_path / "rows").iterdir())
    lost = next(file for file in files if "b/c.mp4" in parquet.read_table(file)["video"].to_pylist())
    kept = len(rows) - parquet.read_table(lost).num_rows
    lost.unlink()
    again = CliRunner().invoke(cli.app, on_ray)
    assert f"{kept} of 4 videos have rows already" in again.stderr, again.output
    assert {row["video"]: row for row in parquet.read_table(tmp_path / "rows").to_pylist()} == rows


def test_a_data_set_on_all_processors_has_the_rows_of_one(idle_cluster, tmp_path):  # noqa: ARG001
    """No processor is left for the process that reads the rows."""
    (tmp_path / "films").mkdir()
    for name in ("streamworld.mp4", "doomworld.mp4"):
        shutil.copy(ROOT / "samples" / name, tmp_path / "films")
    command = ["narrate", str(tmp_path / "films"), "--split", "train", "--out"]
    alone = CliRunner().invoke(cli.app, [*command, str(tmp_path / "srt"), "--json"])
    expected = {line["video"]: line for line in map(json.loads, alone.stdout.splitlines())}
    on_ray = [*command, str(tmp_path / "rows"), "--ray", "3"]
    done = CliRunner().invoke(cli.app, on_ray)
    assert done.exit_code == 0 and "2 narrated" in done.stderr, done.output
    rows = {row["video"]: row for row in parquet.read_table(tmp_path / "rows").to_pylist()}
    assert len(rows) == 2 and {name: row["events"] for name, row in rows.items()} == {
        name: line["events"] for name, line in expected.items()
    }
    assert all(row["srt"] == (tmp_path / "srt" / f"{name}.srt").read_text() for name, row in rows.items())
    again = CliRunner().invoke(cli.app, on_ray)
    assert again.exit_code == 0 and "2 videos narrated before" in again.stderr, again.output


def test_the_manifest_has_settings_that_exist():
    manifest = yaml.safe_load((ROOT / "docs" / "rayservice.yaml").read_text(encoding="utf-8"))
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (found,) = config.applications
    assert found.import_path == f"{app.__module__}:{app.__name__}"
    assert Settings.model_validate(found.args).num_gpus == 1
    with pytest.raises(ValueError, match="max_steams"):
        Settings.model_validate(found.args | {"max_steams": 3})
