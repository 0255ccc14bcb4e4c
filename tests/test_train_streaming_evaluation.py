# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Free streaming: where the user's messages of a row come."""

import numpy as np
import pytest
from engines import said
from tiny import random_frames, tiny_model, tiny_processor, write_clip
from turns import recording

from videollm_mod.streaming_videollm_mod import StreamEvent
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.streaming_evaluation import StreamTally, free_streaming, stream_example, stream_examples
from videollm_mod.train.tasks import find_task
from videollm_mod.train.tasks.running import Runner


def test_a_question_without_a_time_comes_before_the_first_frame(tmp_path):
    processor, model = tiny_processor(), tiny_model()
    video = write_clip(tmp_path / "clip.mp4", random_frames(30), fps=10)
    messages = [
        {"role": "system", "content": "Watch it."},
        {"role": "user", "content": "What do you see?"},
        {"role": "assistant", "content": "A ball.", "time": 2.0},
    ]
    example = {"video": str(video), "start": 1.0, "end": 2.0, "messages": messages}
    with recording(model) as fed:
        events, frames = stream_example(model, processor, example, max_new_tokens=3)
    batch = StreamCollator(processor)([example])
    rendered, first = batch["input_ids"][0].tolist(), model.config.frame_token_id
    until = rendered.index(first) + model.config.frame_num_tokens
    assert fed.ids[:until] == rendered[:until], "training and streaming have the same tokens up to the first frame"
    assert processor.tokenizer.decode(rendered[:until]).startswith("<s>Watch it.\n\nUser: What do you see?\n[<v>")
    assert (events[0].role, events[0].frame, frames) == ("user", -1, 3)
    served = list(stream_examples(model, processor, [example, example], max_new_tokens=3))
    assert [said(row[1]) for row in served] == [said(events)] * 2
    assert free_streaming(model, processor, [example], max_new_tokens=3, progress=False)["event_recall"] >= 0


def test_evaluation_encodes_every_frame_of_a_still_scene():
    """Commands reuse features of models that have not learned when to speak. Measures must not depend on it."""
    processor, model = tiny_processor(), tiny_model(speak="every")
    row = {
        "video": np.repeat(random_frames(1), 9, axis=0),
        "messages": [{"role": "assistant", "content": "A ball.", "time": 2.0}],
        "id": "still",
    }
    encoded = []
    model.model.vision_encoder.register_forward_pre_hook(
        lambda _, inputs, options: encoded.append(len((*inputs, *options.values())[0])), with_kwargs=True
    )
    session = model.stream(processor, reuse_static=3, max_new_tokens=1)
    session.push(row["video"])
    assert sum(encoded) == 1, "of this video one frame is new"
    encoded.clear()
    free_streaming(model, processor, [row], max_new_tokens=1, progress=False)
    assert sum(encoded) == 9
    encoded.clear()
    runner, task = Runner(model, processor, stream_options={"max_new_tokens": 1}), find_task("narration")
    task.predict(runner, row)
    assert sum(encoded) == 2 * 9, "once for the true history and once for the model's own"


@pytest.mark.parametrize("start", [0.0, 0.3, 100.0])
def test_scores_of_a_perfect_model_do_not_depend_on_the_start_of_a_row(start):
    """Between two frames the later one is right, as in training, and after the last frame the last one."""
    told = [(1.1, "A ball."), (3.2, "A box."), (7.3, "Red."), (9.8, "It leaves.")]
    messages = [{"role": "assistant", "content": text, "time": start + time} for time, text in told]
    messages.insert(2, {"role": "user", "content": "Which color?", "time": start + 7.1})
    spoken = [(3, "assistant", "A ball."), (7, "assistant", "A box."), (15, "user", "Which color?")]
    spoken += [(15, "assistant", "Red."), (19, "assistant", "It leaves.")]
    events = [
        StreamEvent(start + frame / 2, frame, role, text, interval_probability=None if frame == 15 else 0.1)
        for frame, role, text in spoken
    ]
    tally = StreamTally(2.0, "token_f1")
    tally.add({"messages": messages, "start": start}, events, 20)
    scores = tally.scores(tolerance=0.5, delay_window=5.0)
    assert tally.silent == 17
    perfect = ("silent_frames_right", "event_f1", "answer_accuracy", "match_f1_token_f1")
    assert {name: scores[name] for name in perfect} == dict.fromkeys(perfect, 1.0)
    assert scores["temporal_f1"] == pytest.approx(2 / 3), (
        "by the published rule, a segment ends a frame after its words"
    )
    tally.add({"messages": messages, "start": start}, [], 20)
    assert tally.scores(tolerance=0.5, delay_window=5.0)["silent_frames_right"] == 1.0
    early = StreamTally(2.0, "token_f1")
    early.add({"messages": messages, "start": start}, [StreamEvent(start + 1.0, 2, "assistant", "A ball.")], 20)
    assert early.scores(tolerance=0.5, delay_window=5.0)["silent_frames_right"] == 16 / 17


def test_questions_come_where_training_has_them(tmp_path):
    """Between two frames, after the last one, and after a reply at the same frame."""
    processor, model = tiny_processor(), tiny_model()
    video = write_clip(tmp_path / "clip.mp4", random_frames(80), fps=10)
    told = [("user", "Which ball?", 6.1), ("assistant", "Red.", 6.3), ("user", "Tell me.", 6.4)]
    told += [("user", "Where?", 7.6), ("assistant", "There.", 7.8), ("user", "And now?", 7.9)]
    messages = [{"role": role, "content": text, "time": time} for role, text, time in told]
    row = {"video": str(video), "start": 5.0, "messages": messages}
    StreamCollator(processor)([row])
    served = [events for _, events, _ in stream_examples(model, processor, [row, row], max_new_tokens=3)]
    streamed, frames = stream_example(model, processor, row, max_new_tokens=3)
    assert frames == 6 and all(said(events) == said(streamed) for events in served)
    asked = [(event.time, event.text) for event in streamed if event.role == "user"]
    assert asked == [(6.5, "Which ball?"), (6.5, "Tell me."), (7.5, "Where?"), (7.5, "And now?")]
    answered = [
        one.text
        for one, two in zip(streamed, streamed[1:], strict=False)
        if (one.role, two.role, two.interval_probability) == ("user", "assistant", None)
    ]
    assert answered == ["Which ball?", "Where?"]
    tally = StreamTally(2.0, "token_f1")
    tally.add(row, streamed, frames)
    assert tally.true_answers == ["Red.", "There."] and tally.true_events == [[]]
    assert tally.answers == [
        two.text for one, two in zip(streamed, streamed[1:], strict=False) if one.text in ("Which ball?", "Where?")
    ]
