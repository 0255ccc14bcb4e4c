# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Saved sessions: a session that was saved and restored says what one that was never interrupted says."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from engines import said, tiny_engine
from preloaded import preloaded_python
from tiny import SCHEMES, random_frames, tiny_model, tiny_processor

from videollm_mod.serving import restore_session, save_session
from videollm_mod.serving.saved_files import read
from videollm_mod.serving.saving import fill_session


OPTIONS = {"max_new_tokens": 4, "interval_threshold": 0.004, "output_router_scores": True}
LIMITS = {"max_frames": 4, "sink_frames": 1, "max_text_tokens": 24}


def first_half(session, frames):
    """Push some frames and ask, so that frames, turns and the end of a reply wait to enter the cache."""
    session.ask("Narrate.", reply_now=False)
    session.push(frames[:5])
    session.ask("What color is the ball?")
    session.ask("And later?", time=3.2)
    return session


def second_half(session, frames):
    """Push the other frames one by one; return all that can be seen of the session."""
    seen = []
    for frame in frames[5:]:
        session.push(frame)
        seen.append((session.interval_probability, {i: x.tolist() for i, x in session.kept_tokens.items()}))
    session.close()
    cache = session.cache
    figures = (session.num_frames, session.num_remembered, session.num_suppressed, session.num_reused, session.speak)
    return said(session), seen, figures, cache.lengths, cache.next_position


def entries(session):
    layers = enumerate(session.cache.layers)
    positions = [session.cache.get_positions(i) for i, layer in layers if hasattr(layer, "positions")]
    return [(layer.keys.float(), layer.values.float()) for layer in session.cache.layers], positions


CASES = {
    "full": ("full", {}, {}),
    "interleaved": ("interleaved", {}, {}),
    "early_exit": ("early_exit", LIMITS, {}),
    "evicted": ("all", LIMITS, {}),
    "change": ("change", LIMITS, {}),
    "eight bits": ("all", LIMITS | {"cache_dtype": torch.float8_e4m3fn}, {"dtype": torch.bfloat16}),
    "every": ("all", {"speak": "every", "every": 1.0, "source_fps": 4.0, "fps": 2.0}, {}),
    "changes": ("all", {"speak": "change", "every": 0.5, "reuse_static": 3.0, "prompt": "Now?"}, {}),
    "probe": ("all", {"speak": "probe", "every": 1.0, "speak_threshold": 0.2, "no_repeat": 3}, {}),
    "sampled": ("interleaved", {"do_sample": True}, {}),
}


@pytest.mark.parametrize("scheme, options, given", CASES.values(), ids=CASES)
def test_a_restored_session_goes_on_as_if_never_interrupted(tmp_path, scheme, options, given):
    model, processor = tiny_model(**SCHEMES[scheme]).to(given.get("dtype", torch.float32)), tiny_processor()
    frames = random_frames(10)
    frames[5:7] = frames[4]  # what still needs the frame before the restart
    session = first_half(model.stream(processor, **OPTIONS | options), frames)
    save_session(session, tmp_path / "saved")
    at_save = torch.get_rng_state()
    expected = second_half(session, frames)
    torch.rand(3)
    restored = restore_session(model, processor, tmp_path / "saved")
    assert torch.equal(torch.get_rng_state(), at_save) == session.do_sample
    assert second_half(restored, frames) == expected
    assert len(restored.events) > 4
    torch.testing.assert_close(entries(restored), entries(session), rtol=0, atol=0)


def test_a_session_with_a_preallocated_cache(tmp_path):
    model, processor, frames = tiny_model(mod_layers="all"), tiny_processor(), random_frames(10)
    session = model.stream(processor, cache=model.new_cache(max_lengths=[400] * 4), **OPTIONS)
    save_session(first_half(session, frames), tmp_path)
    restored = restore_session(model, processor, tmp_path)
    assert restored.cache.layers[0].max_cache_len == 400
    assert second_half(restored, frames) == second_half(session, frames)


def test_a_restored_session_can_be_forked_and_saved_again_in_its_place(tmp_path):
    model, processor, frames = tiny_model(**SCHEMES["change"]), tiny_processor(), random_frames(10)
    session = first_half(model.stream(processor, **OPTIONS | LIMITS), frames)
    save_session(session, tmp_path / "saved")
    restored = restore_session(model, processor, tmp_path / "saved")
    save_session(restored, tmp_path / "saved")
    fork = restore_session(model, processor, tmp_path / "saved").fork()
    expected = second_half(session, frames)
    assert second_half(fork, frames) == expected
    assert second_half(restored, frames) == expected
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_positions_are_restored_beside_the_embeddings(tmp_path):
    """Later steps count them there, also for a layer on another device."""
    model, processor = tiny_model(**SCHEMES["all"]), tiny_processor()
    session = first_half(model.stream(processor, **OPTIONS), random_frames(10))
    save_session(session, tmp_path)
    saved = read(tmp_path, model)
    model.model.language_model.layers[1].to("meta")
    restored = model.stream(processor, **OPTIONS)
    fill_session(restored, saved)
    assert restored.cache.layers[1].keys.is_meta and not restored.cache.layers[0].keys.is_meta
    assert torch.equal(restored.cache.get_positions(1), session.cache.get_positions(1))


def test_a_session_saved_before_its_first_frame(tmp_path):
    model, processor, frames = tiny_model(), tiny_processor(), random_frames(10)
    session = model.stream(processor, system_prompt="Watch closely.", **OPTIONS)
    session.ask("Narrate.", reply_now=False)
    save_session(session, tmp_path)
    restored = restore_session(model, processor, tmp_path)
    assert second_half(restored, frames) == second_half(session, frames)


IN_A_FRESH_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_serving_saving import *
model, processor = tiny_model(**SCHEMES["change"]), tiny_processor()
restored = restore_session(model, processor, sys.argv[2])
restored.hear("And now?", time=4.0)
print(json.dumps(second_half(restored, random_frames(10))))
latencies = [event.latency for event in restored.events[-3:]]
assert all(0 <= latency < 60 for latency in latencies), latencies
"""


@pytest.mark.xdist_group("preloaded")
def test_a_session_restored_in_a_fresh_process(tmp_path):
    model, processor, frames = tiny_model(**SCHEMES["change"]), tiny_processor(), random_frames(10)
    session = first_half(model.stream(processor, **OPTIONS | LIMITS), frames)
    save_session(session, tmp_path / "saved")
    (tmp_path / "go_on.py").write_text(IN_A_FRESH_PROCESS)
    command = [preloaded_python(), tmp_path / "go_on.py", Path(__file__).parent, tmp_path / "saved"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    session.hear("And now?", time=4.0)
    expected = json.loads(json.dumps(second_half(session, frames)))
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_what_belongs_to_the_process_is_given_again(tmp_path):
    model, processor, frames = tiny_model(), tiny_processor(), random_frames(10)
    session = model.stream(processor, speak=lambda frame: frame.frame == 9 and "What now?", **OPTIONS)
    save_session(first_half(session, frames), tmp_path)
    with pytest.raises(ValueError, match="speaks by a function, which files do not hold: give it as `speak`"):
        restore_session(model, processor, tmp_path)
    restored = restore_session(model, processor, tmp_path, speak=session._speaking.policy.function)
    assert second_half(restored, frames) == second_half(session, frames)
    assert restored.events[-1].frame == 9 and restored.events[-1].interval_probability is not None


# -------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model()
    session = model.stream(tiny_processor(), **OPTIONS)
    session.push(random_frames(2))
    save_session(session, folder)
    return model, {path.name: path.read_bytes() for path in folder.iterdir()}


def without(name):
    return lambda files: {other: data for other, data in files.items() if other != name}


def cut(name, length):
    return lambda files: files | {name: files[name][:length]}


def changed(old, new):
    return lambda files: files | {"session.json": files["session.json"].replace(old, new)}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (without("session.json"), FileNotFoundError, "holds no saved session: it has no session.json"),
        (without("session.safetensors"), FileNotFoundError, "it has no session.safetensors"),
        (cut("session.json", 300), ValueError, "session.json' is damaged"),
        (cut("session.json", 0), ValueError, "session.json' is damaged"),
        (changed(b'"format": 1', b'"format": 7'), ValueError, "has format 7; this version reads format 1"),
        (cut("session.safetensors", 5000), ValueError, "session.safetensors' is damaged"),
        (cut("session.safetensors", 3), ValueError, "session.safetensors' is damaged"),
        (changed(b'"id": "', b'"id": "0'), ValueError, "belongs to another save than session.json"),
    ],
)
def test_damaged_files_are_refused_by_name(tmp_path, saved, change, error, message):
    model, files = saved
    for name, data in change(files).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(error, match=message):
        restore_session(model, tiny_processor(), tmp_path)


@pytest.mark.parametrize(
    "other, part",
    [({"seed": 1}, "weights"), ({"mod_keep_ratio": 0.5}, "configuration"), ({"mod_layers": "all"}, "weights")],
)
def test_another_model_is_refused(tmp_path, saved, other, part):
    for name, data in saved[1].items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"saved with a model of other {part}: load that model"):
        restore_session(tiny_model(**other), tiny_processor(), tmp_path)


def test_a_folder_with_other_files_stays_as_it_is(tmp_path, saved):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists and is no saved session: choose another folder"):
        save_session(saved[0].stream(tiny_processor()), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_session_is_not_saved_during_a_reply(tmp_path):
    class Saving:
        errors = []

        def put(self, _):
            with pytest.raises(ValueError, match="cannot be saved during a reply") as error:
                save_session(session, tmp_path)
            self.errors.append(error)

        def end(self):
            pass

    session = tiny_model().stream(tiny_processor(), streamer=Saving(), **OPTIONS)
    session.push(random_frames(1))
    session.ask("What color is the ball?")
    assert Saving.errors and not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------- engines


def watch(engine, stream, frames, num_steps):
    """Push all frames at once, ask twice, and run some steps: the rest waits as pixels, features and questions."""
    stream.ask("Narrate.", reply_now=False)
    stream.push(frames)
    stream.ask("What color is the ball?", time=1.7)
    stream.ask("And later?", time=4.0)
    for _ in range(num_steps):
        engine.step()


def finish(stream):
    stream.close()
    list(stream)
    return said(stream.events), stream.session.interval_probability, stream.session.num_remembered


@pytest.mark.parametrize("num_steps", [0, 1, 5, 30])
def test_a_stream_goes_on_in_another_engine(tmp_path, num_steps):
    """A frame is to be seen after 1 step, a reply is half-written after 5, and frames were evicted after 30."""
    options = {"max_new_tokens": 4, "interval_threshold": 0.004, "chunk_frames": 2, "max_frames": 4}
    frames = random_frames(10)
    engine = tiny_engine(router="change", max_waiting=40)
    other = engine.open(**options)
    stream = engine.open(**options, when_behind="block")
    watch(engine, stream, frames, num_steps)
    stream.save(tmp_path)
    early = len(stream.events)
    assert bool(stream.session.cache._moved) == (num_steps == 30)
    expected = finish(stream)
    assert not other.session.is_paused and early < len(expected[0])

    second = tiny_engine(router="change", max_frames=6)
    restored = second.restore(tmp_path)
    assert restored.max_waiting == 40 and restored.when_behind == "block" and restored.session.max_frames == 4
    restored.close()
    assert said(restored) == expected[0][early:]
    assert finish(restored) == expected


def test_a_stream_is_saved_by_another_thread_and_ends_there(tmp_path):
    frames = random_frames(10)
    engine = tiny_engine()
    with engine:
        stream = engine.open(max_new_tokens=4, interval_threshold=0.004)
        watch(engine, stream, frames, 0)
        stream.save(tmp_path, close=True)
        with pytest.raises(ValueError, match="This stream is closed"):
            stream.push(frames)
        heard = list(stream)
    assert not engine.streams and stream.is_done
    model, processor = engine.model, engine.processor
    restored = restore_session(model, processor, tmp_path)
    assert said(restored.events) == said(heard)
    restored.close()
    straight = tiny_engine()
    again = straight.open(max_new_tokens=4, interval_threshold=0.004)
    watch(straight, again, frames, 0)
    assert said(restored.events) == finish(again)[0]


def test_an_engine_refuses_an_endless_session(tmp_path, saved):
    save_session(saved[0].stream(tiny_processor(), **OPTIONS), tmp_path)
    engine = tiny_engine()
    with pytest.raises(ValueError, match="has no limit: an engine needs `max_frames` and `max_text_tokens`"):
        engine.restore(tmp_path)
    assert not engine.streams
