# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Free streaming: where the user's messages of a row come."""

import numpy as np
from engines import said
from tiny import random_frames, tiny_model, tiny_processor, write_clip
from turns import recording

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.streaming_evaluation import free_streaming, stream_example, stream_examples
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
