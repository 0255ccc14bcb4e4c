# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What an endless stream forgets. Tests of sessions check what the cache holds then."""

import random

import pytest

from videollm_mod.remembering_videollm_mod import StreamMemory


def kept_slowly(pieces, num_new_text, most, sinks, limit):
    """
    Return which pieces (kind, tokens) stay: one rule after the other, counting everything again each time.

    Unlike in a session, an interval is a piece of its own.
    """
    frames = [index for index, (kind, _) in enumerate(pieces) if kind == "frame"]
    texts = [index for index, (kind, _) in enumerate(pieces) if kind == "text"]
    gone = set(frames[sinks:][: 1 + most // 8]) if len(frames) == most else set()

    def text():
        return num_new_text + sum(pieces[index][1] for index in texts if index not in gone)

    if limit is not None and text() > limit:
        fixed = frames[sinks - 1] if 0 < sinks <= len(frames) else 0
        for frame in frames[sinks:]:
            for index in texts[1:]:
                if fixed < index < frame and text() > limit * 7 // 8:
                    gone.add(index)
            if text() <= limit * 7 // 8 or frame == frames[-1]:
                break
            gone.add(frame)
    if not gone:
        return [True] * len(pieces)
    stays, before = [], None
    for index, (kind, _) in enumerate(pieces):
        is_kept = (index + 1 not in gone and before == "frame") if kind == "interval" else index not in gone
        stays.append(is_kept)
        before = kind if is_kept else before
    return stays


@pytest.mark.parametrize(("most", "sinks"), [(1, 0), (3, 2), (8, 6)])
def test_text_has_its_limit_also_where_every_frame_goes_at_once(most, sinks):
    memory = StreamMemory(most, sinks, 100)
    for _ in range(100):
        memory.forget(10)
        memory.add_text(10)
        assert memory.num_text_tokens <= 100
        memory.add_frame(10, 0)


@pytest.mark.parametrize("interval", [0, 1])
def test_evictions_equal_a_slow_reference(interval):
    draw, evictions = random.Random(0), 0
    for _ in range(300):
        most = draw.choice([1, 2, 3, 6, 9, 17])
        sinks, limit = draw.randrange(most), draw.choice([None, 1, 10, 40, 90])
        memory, pieces, num_new_text = StreamMemory(most, sinks, limit), [], draw.randint(1, 20)
        for _ in range(60):
            runs = memory.forget(num_new_text)
            stays = kept_slowly(pieces, num_new_text, most, sinks, limit)
            expected = [kept for kept, (_, length) in zip(stays, pieces, strict=True) for _ in range(length)]
            keep = [run.stays for run in runs for _ in range(run.num_tokens)]
            assert (keep or [True] * len(expected)) == expected
            assert sum(run.num_frames for run in runs) in (0, sum(kind == "frame" for kind, _ in pieces))
            evictions += bool(runs)
            pieces = [piece for piece, kept in zip(pieces, stays, strict=True) if kept]
            room = memory.room(num_new_text)
            text = num_new_text + sum(length for kind, length in pieces if kind == "text")
            assert room == (1 if text > (limit or 1e9) else most - memory.num_frames)
            separator = 0 if num_new_text else interval
            if num_new_text:
                memory.add_text(num_new_text)
                if len(pieces) > 1 and pieces[-1][0] == "text":
                    num_new_text += pieces.pop()[1]
                pieces.append(("text", num_new_text))
            count = draw.randint(1, min(room, 4))
            for _ in range(count):
                memory.add_frame(10, separator)
                pieces += [("interval", separator)] * bool(separator) + [("frame", 10)]
                separator = interval
            back = draw.randrange(count)
            assert memory.remove_frames(back) == back * (10 + interval)
            del pieces[len(pieces) - back * (1 + interval) :]
            assert memory.num_frames == sum(kind == "frame" for kind, _ in pieces)
            assert sum(piece.length for piece in memory.pieces) == sum(length for _, length in pieces)
            num_new_text = draw.choice([0, 0, 1, 5, 30])
    assert evictions > 1000
