# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Free streaming: where the user's messages of a row come."""

from engines import said
from tiny import random_frames, tiny_model, tiny_processor, write_clip
from turns import recording

from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.streaming_evaluation import free_streaming, stream_example, stream_examples


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
