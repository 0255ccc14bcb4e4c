# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The trainer, collator and callbacks: loss and gradients equal the model's, and logs and schedules are right."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tiny import random_features, random_frames, tiny_model, tiny_processor, training_batch
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerControl, TrainerState, get_cosine_schedule_with_warmup
from trl import SFTConfig, SFTTrainer

from videollm_mod.train import callbacks
from videollm_mod.train.callbacks import KeepRatioWarmup, TimeLimit
from videollm_mod.train.collator import StreamCollator, augment_replies, normalize_pixels
from videollm_mod.train.teacher_forcing import teacher_forced
from videollm_mod.train.trainer import StreamingSFTTrainer, _join_lora


def row(seed, frames=6):
    return {
        "video": random_frames(frames, seed=seed),
        "messages": [
            {"role": "user", "content": "Narrate.", "time": 0.0},
            {"role": "assistant", "content": "A red ball enters."[: 6 + 4 * (seed % 3)], "time": 1.0},
            {"role": "assistant", "content": "It leaves.", "time": (frames - 1) / 2},
        ],
    }


ROWS = [row(seed, frames) for seed, frames in enumerate((6, 9, 4, 7))]


def new_trainer(
    folder,
    *,
    rows=ROWS,
    model=None,
    cls=StreamingSFTTrainer,
    streamed=None,
    collator=None,
    adapter=None,
    router_learning_rate=None,
    compute_loss_func=None,
    **options,
):
    processor = tiny_processor()
    model = tiny_model(text_overrides={"tie_word_embeddings": False}) if model is None else model
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 1,
        "learning_rate": 0.0,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_grad_norm": 0.0,
        "remove_unused_columns": False,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    } | options
    dataset = Dataset.from_dict({"row": range(len(rows))}).with_transform(
        lambda batch: {key: [rows[index][key] for index in batch["row"]] for key in ("video", "messages")}
    )
    return cls(
        model=model,
        args=SFTConfig(output_dir=str(folder), use_cpu=True, **options),
        train_dataset=dataset,
        processing_class=processor,
        data_collator=StreamCollator(processor, **(collator or {})),
        peft_config=adapter,
        compute_loss_func=compute_loss_func,
        **({} if router_learning_rate is None else {"router_learning_rate": router_learning_rate}),
        **({} if streamed is None else {"eval_dataset": dataset, "stream_examples": streamed}),
    )


def gradients(trainer):
    """Train, and return the gradients of the last step."""
    kept = {}
    original = trainer.create_optimizer

    def create_optimizer(*args, **kwargs):
        optimizer = original(*args, **kwargs)
        optimizer.register_step_pre_hook(
            lambda *_: kept.update({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.requires_grad})
        )
        return optimizer

    trainer.create_optimizer = create_optimizer
    trainer.train()
    return kept


class Plain(SFTTrainer):
    """TRL's trainer, which does not know that pixels come as uint8."""

    def _prepare_inputs(self, inputs):
        return normalize_pixels(super()._prepare_inputs(inputs), self.processing_class)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_trainers_loss_equals_the_models(tmp_path, weight):
    model = tiny_model(text_overrides={"tie_word_embeddings": False}, stream_loss_weight=weight)
    batch = training_batch(tiny_processor(), ROWS)
    expected = model.train()(**batch, use_cache=False).loss.item()
    trainer = new_trainer(tmp_path, model=model)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
    if weight != 1:
        plain = new_trainer(tmp_path, model=model, cls=Plain)
        plain.train()
        assert plain.state.log_history[0]["loss"] != pytest.approx(expected, rel=1e-2)


LOSSES = [{"label_smoothing_factor": 0.1}, {"loss_type": "dft"}, {"compute_loss_func": lambda *_, **__: None}]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: next(iter(loss)))
@pytest.mark.parametrize("weight", [0.0, 1.0, 3.0])
def test_losses_that_would_ignore_the_weight_of_frames_are_refused(tmp_path, loss, weight):
    model = tiny_model(text_overrides={"tie_word_embeddings": False}, stream_loss_weight=weight)
    if weight == 1:
        new_trainer(tmp_path, model=model, **loss)
    else:
        with pytest.raises(ValueError, match=f"`stream_loss_weight` {weight} does not work with `{next(iter(loss))}"):
            new_trainer(tmp_path, model=model, **loss)


def test_a_training_step_needs_one_forward_pass(tmp_path):
    trainer = new_trainer(tmp_path, max_steps=3)
    calls = []
    trainer.model.model.language_model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert len(calls) == 3


def test_accumulated_gradients_equal_those_of_one_large_batch(tmp_path):
    """The rows differ in length and number of labels, so a mean of means would be wrong."""
    options = {"train_sampling_strategy": "sequential"}
    model = tiny_model(text_overrides={"tie_word_embeddings": False}, stream_loss_weight=2.0)
    large = new_trainer(tmp_path, model=model, **options)
    one = gradients(large)
    small = new_trainer(tmp_path, model=model, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    four = gradients(small)
    logged, expected = small.state.log_history[0], large.state.log_history[0]
    for name in ("loss", "text_loss", "stream_loss"):
        assert logged[name] == pytest.approx(expected[name], rel=1e-4), name
    assert one.keys() == four.keys() and any("router" in name for name in one)
    for name, gradient in one.items():
        torch.testing.assert_close(four[name], gradient, rtol=1e-3, atol=1e-6)


def test_packing_dialogues_does_not_change_training(tmp_path):
    """A packed batch has no padding, and its loss and gradients equal those of one dialogue per row."""
    options = {"train_sampling_strategy": "sequential"}
    model = tiny_model(text_overrides={"tie_word_embeddings": False}, stream_loss_weight=2.0)
    padded = new_trainer(tmp_path, model=model, **options)
    one = gradients(padded)
    packed = new_trainer(tmp_path, model=model, collator={"packing": True}, **options)
    two = gradients(packed)
    assert packed.state.log_history[0]["loss"] == pytest.approx(padded.state.log_history[0]["loss"], rel=1e-5)
    for name, gradient in one.items():
        torch.testing.assert_close(two[name], gradient, rtol=1e-3, atol=1e-6)
    batch, rows = StreamCollator(tiny_processor(), packing=True)(ROWS), StreamCollator(tiny_processor())(ROWS)
    pad = tiny_processor().tokenizer.pad_token_id
    assert batch["input_ids"].shape == (1, int((rows["input_ids"] != pad).sum()))
    assert batch["pixel_values_videos"].shape[:2] == (1, 6 + 9 + 4 + 7) == (1, batch["num_frames"][0])


def test_an_adapter_on_the_head_trains_as_in_the_model(tmp_path):
    """TRL's fused head reads only the weight of the head, so it would leave out an adapter."""
    model = tiny_model(text_overrides={"tie_word_embeddings": False})
    config = model.make_lora_config(r=4, lora_alpha=4, lora_dropout=0.0)
    trainer = new_trainer(tmp_path, model=model, adapter=config, train_sampling_strategy="sequential")
    adapted = trainer.model
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            # These weights start at zero, where an adapter has no effect.
            torch.nn.init.normal_(parameter, std=0.1)
    assert type(adapted.get_base_model().lm_head).__module__.startswith("peft")
    loss = adapted.train()(**training_batch(tiny_processor(), ROWS), use_cache=False).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    adapted.zero_grad()
    found = gradients(trainer)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert expected.keys() == found.keys() and sum("lm_head.lora" in name for name in found) == 2
    for name, gradient in expected.items():
        assert gradient.any()
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


def test_a_young_adapter_on_the_head_is_seen_in_bfloat16():
    """Added to the weight, it would be rounded away, and the sum costs more than the parts."""
    model = tiny_model(text_overrides={"tie_word_embeddings": False}).bfloat16()
    get_peft_model(model, model.make_lora_config(r=4, lora_alpha=8, lora_dropout=0.0))
    head = model.lm_head
    down, up = head.lora_A["default"].weight, head.lora_B["default"].weight
    torch.nn.init.constant_(up, 2e-4)  # after one step of Adam
    plain = torch.randn(1, 20, head.in_features).bfloat16()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden, weight = _join_lora(head, plain)
    assert hidden.dtype == weight.dtype == torch.bfloat16
    assert counter.get_total_flops() < 2 * down.numel() * up.shape[0] / 2  # half of B A
    found = hidden.double() @ weight.double().T - plain.double() @ head.base_layer.weight.double().T
    share = 2 * plain.double() @ down.double().T @ up.double().T
    assert (found - share).norm() < 0.01 * share.norm()


def test_other_adapters_on_the_head_are_refused(tmp_path):
    model = tiny_model(text_overrides={"tie_word_embeddings": False})
    with pytest.raises(ValueError, match="must be plain LoRA"):
        new_trainer(tmp_path, model=model, adapter=model.make_lora_config(r=4, use_dora=True))


def test_prediction_returns_the_loss_and_logits(tmp_path):
    trainer = new_trainer(tmp_path, per_device_eval_batch_size=4)
    batch = training_batch(tiny_processor(), ROWS)
    with pytest.warns(FutureWarning, match="return_outputs"):
        loss, logits, labels = trainer.prediction_step(trainer.model.eval(), dict(batch), prediction_loss_only=False)
    assert loss == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-5)
    assert logits.shape[:2] == labels.shape


def test_evaluation_corrupts_no_reply(tmp_path):
    trainer = new_trainer(tmp_path, streamed=[], collator={"augmentation": 1.0})
    clean = StreamCollator(tiny_processor())(ROWS)["labels"]
    assert torch.equal(next(iter(trainer.get_eval_dataloader()))["labels"], clean)
    corrupted = next(iter(trainer.get_train_dataloader()))["labels"]
    assert corrupted.shape != clean.shape or not torch.equal(corrupted, clean)


def test_the_trainer_logs_routing_and_streaming(tmp_path):
    trainer = new_trainer(tmp_path, max_steps=2)
    trainer.train()
    logs = trainer.state.log_history[1]
    assert logs["kept_share/layer_1"] == 0.2 and logs["kept_share/layer_3"] == 0.2 and "kept_share/layer_0" not in logs
    assert logs["router_score_std"] > 0 and logs["router_score_std/layer_1"] != logs["router_score_std/layer_3"]
    assert logs["frames_per_second"] > 0 and logs["peak_memory_gb"] > 0.01
    batch = training_batch(tiny_processor(), ROWS)
    with torch.no_grad():
        logits = trainer.model.eval()(**{k: v for k, v in batch.items() if k != "labels"}).logits[:, :-1]
    labels, at_frame = batch["labels"][:, 1:], batch["input_ids"][:, :-1] == trainer.model.config.frame_token_id
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(
        labels
    )
    learned = labels >= 0
    assert logs["text_loss"] == pytest.approx(losses[learned & ~at_frame].mean().item(), rel=1e-4)
    assert logs["stream_loss"] == pytest.approx(losses[learned & at_frame].mean().item(), rel=1e-4)
    # Both speeds are over the same time. Padding counts as tokens, because it takes time.
    frames = sum(len(row["video"]) for row in ROWS)
    assert logs["tokens_per_second"] / logs["frames_per_second"] == pytest.approx(batch["input_ids"].numel() / frames)


def test_each_evaluation_streams_clips(tmp_path, capsys):
    processor = tiny_processor()
    model = tiny_model(text_overrides={"tie_word_embeddings": False})
    # Replies of random weights do not end, so the shortest row is streamed.
    streamed = ROWS[2:3]
    trainer = new_trainer(tmp_path, model=model, max_steps=2, eval_strategy="steps", eval_steps=1, streamed=streamed)
    trainer.train()
    evaluations = [log for log in trainer.state.log_history if "eval_event_f1" in log]
    assert len(evaluations) == 2 and {"eval_lm_ppl", "eval_time_diff", "eval_fluency"} <= set(evaluations[0])
    # LIVE's measures cover all rows, not only those that are streamed.
    expected = teacher_forced(model.eval(), processor, ROWS, progress=False)
    assert evaluations[-1]["eval_lm_ppl"] == pytest.approx(expected["lm_ppl"], rel=1e-4)
    assert expected["lm_ppl"] != teacher_forced(model, processor, streamed, progress=False)["lm_ppl"]
    # Training speed excludes the time of evaluations.
    since, start = trainer._since, time.perf_counter()
    trainer.evaluate()
    assert trainer._since - since == pytest.approx(time.perf_counter() - start, rel=0.1)
    printed = capsys.readouterr().out
    assert printed.count("the first clip of the evaluation as the model streams it") == 3
    assert "   0.0s  user       Narrate." in printed


def test_rows_without_video_are_measured_and_not_streamed(tmp_path):
    trainer = new_trainer(tmp_path, streamed=[])
    scores = trainer.evaluate()
    assert scores["eval_lm_ppl"] > 1 and "eval_event_f1" not in scores
    with torch.no_grad():
        videos = [training_batch(tiny_processor(), [row])["pixel_values_videos"][0] for row in ROWS]
        rows = [
            {"messages": row["messages"], "frame_features": trainer.model.encode_frames(pixels)}
            for row, pixels in zip(ROWS, videos, strict=True)
        ]
    assert trainer.evaluate(rows)["eval_lm_ppl"] == pytest.approx(scores["eval_lm_ppl"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ collator


def stream(count, **more):
    return {"role": "stream", "num_frames": count, **more}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


TURNS = [stream(2), {"role": "user", "content": "Q?"}, assistant("Q."), stream(3), assistant("A."), stream(1)]
TURNS += [assistant("B."), stream(4), assistant("C.")]


def test_augmentation_is_off_by_default_and_when_zero():
    for seed in range(20):
        assert augment_replies(TURNS, np.random.default_rng(seed), 0.0) == TURNS
    assert StreamCollator(tiny_processor()).augmentation == 0.0
    with pytest.raises(ValueError, match="share from 0 to 1"):
        StreamCollator(tiny_processor(), augmentation=2.0)


def test_augmentation_takes_frames_from_stream_turns_only():
    turns = [stream(2), assistant("A."), {"role": "user", "content": "Q?", "num_frames": b"x"}]
    for seed in range(20):
        found = augment_replies(turns, np.random.default_rng(seed), 1.0)
        assert found[-1] == turns[-1]


def test_augmentation_keeps_the_time_of_each_frame():
    times, turns, begin = [0.5 * k for k in range(10)], [], 0
    for turn in TURNS:
        more = {"times": times[begin : begin + turn["num_frames"]]} if turn["role"] == "stream" else {}
        turns, begin = [*turns, turn | more], begin + turn.get("num_frames", 0)
    corrected = 0
    for seed in range(100):
        found = augment_replies(turns, np.random.default_rng(seed), 0.7)
        streams = [turn for turn in found if turn["role"] == "stream"]
        assert all(len(turn["times"]) == turn["num_frames"] for turn in streams)
        assert [time for turn in streams for time in turn["times"]] == times
        corrected += len(streams) > 4
    assert corrected


def test_augmentation_corrects_a_reply_before_the_next_one():
    """A frame lies between: a correction after the only one would be said with the next reply."""
    for count, later, is_possible in ((1, ["B."], False), (2, ["B."], True), (2, [], True)):
        turns = [stream(2), assistant("A."), stream(count), *map(assistant, later)]
        found = [augment_replies(turns, np.random.default_rng(seed), 0.5) for seed in range(100)]
        assert any(turn == assistant("A.") for each in found for turn in each[2:]) == is_possible


def test_augmentation_corrupts_replies_and_excludes_them_from_the_loss():
    seen = set()
    for seed in range(300):
        turns = augment_replies(TURNS, np.random.default_rng(seed), 0.7)
        assert sum(turn.get("num_frames", 0) for turn in turns) == 10
        roles = [turn["role"] for turn in turns]
        assert not any(one == two for one, two in zip(roles, roles[1:], strict=False)), "frames separate replies"
        assert turns[:3] == TURNS[:3], "answers to questions stay as they are"
        place = 0
        for turn, following in zip(turns, [*turns[1:], {}], strict=True):
            if turn["role"] == "stream":
                learned = turn.get("learn", True)
                learned = [learned] * turn["num_frames"] if isinstance(learned, bool) else learned
                for index, is_learned in enumerate(learned):
                    place += 1
                    speaks = index + 1 == turn["num_frames"] and following.get("role") == "assistant"
                    annotated = place in (5, 6, 10)
                    if is_learned and not speaks and place != 2:
                        assert not annotated, "silence where a reply was left out is not learned"
                    late = is_learned and speaks and not annotated
                    seen |= {"late"} if late else set()
            elif turn["role"] == "assistant":
                right = {5: "A.", 6: "B.", 7: "B.", 10: "C.", 2: "Q."}
                corrected = turn["content"] == right.get(place) or turn["content"] == right.get(place - 1)
                assert turn.get("learn", True) == (turn.get("learn", True) and corrected)
                if not turn.get("learn", True):
                    seen.add("emptied" if turn["content"] == "" else "replaced")
        if "A." not in [turn.get("content") for turn in turns] and roles.count("assistant") < 4:
            seen.add("left out")
    assert seen == {"late", "emptied", "replaced", "left out"}


def test_features_train_like_their_video():
    model, processor = tiny_model(), tiny_processor()
    from_video = training_batch(processor, ROWS[:1])
    features = model.model.encode_frames(from_video["pixel_values_videos"])[0].detach()
    from_features = StreamCollator(processor)([{"frame_features": features, "messages": ROWS[0]["messages"]}])
    assert torch.equal(from_features["labels"], from_video["labels"])
    torch.testing.assert_close(model(**from_features).loss, model(**from_video).loss)
    assert random_features(model.config, 6).shape == from_features["frame_features"].shape


# ----------------------------------------------------------------------------------------------------------- callbacks


def test_keep_ratios_fall_during_warmup(tmp_path):
    model = tiny_model(text_overrides={"tie_word_embeddings": False})
    counts = []
    trainer = new_trainer(tmp_path, model=model, max_steps=6)
    trainer.add_callback(KeepRatioWarmup(model.config, 4))
    layer = model.model.language_model.layers[1]
    layer.mlp.register_forward_hook(lambda _, inputs, __: counts.append(inputs[0].shape[1]))
    trainer.train()
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[2] > counts[4] == counts[5]
    assert model.config.mod_keep_ratio == 0.2
    kept = [log["kept_share/layer_1"] for log in trainer.state.log_history[:6]]
    assert kept == [0.9, 0.8, 0.6, 0.4, 0.2, 0.2]
    per_layer = tiny_model(mod_keep_ratio=[1.0, 0.5, 0.0, 0.2]).config
    assert KeepRatioWarmup(per_layer, 2).ratio(1) == [1.0, 0.75, 0.0, pytest.approx(0.6)]
    held = KeepRatioWarmup(model.config, 2, hold_steps=2)
    assert [held.ratio(step) for step in range(5)] == [0.9, 0.9, 0.9, pytest.approx(0.6), 0.2]
    assert [KeepRatioWarmup(model.config, 0, hold_steps=1).ratio(step) for step in range(2)] == [0.9, 0.2]
    with pytest.raises(ValueError, match="at least 1 step"):
        KeepRatioWarmup(per_layer, 0)


def test_layers_that_keep_nothing_have_no_router_and_warm_up_without(tmp_path):
    options = {"mod_keep_ratio": [1.0, 0.5, 0.0, 0.2], "text_overrides": {"tie_word_embeddings": False}}
    model = tiny_model(**options)
    trainer = new_trainer(tmp_path, model=model, max_steps=3)
    trainer.add_callback(KeepRatioWarmup(model.config, 2))
    trainer.train()
    assert set(model.model.routers) == {"1", "3"} and model.config.mod_keep_ratio == options["mod_keep_ratio"]


def test_routers_have_their_own_learning_rate(tmp_path):
    model = tiny_model(mod_router_loss="gradient", text_overrides={"tie_word_embeddings": False})
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    options = {"learning_rate": 1e-5, "lr_scheduler_type": "constant", "warmup_steps": 0}
    trainer = new_trainer(tmp_path, model=model, max_steps=1, router_learning_rate=0.1, **options)
    trainer.train()
    moved = {name: (weight.detach() - before[name]).abs().max() for name, weight in model.named_parameters()}
    # Adam's first step has the size of the learning rate.
    assert all(moved[f"model.language_model.{name}.weight"] > 0.09 for name in model.router_names)
    assert 0 < max(size for name, size in moved.items() if "router" not in name) < 2e-5
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == len(before)


# ---------------------------------------------------------------------------------------------------------- time limit


def run_with_limit(monkeypatch, minutes, seconds_a_step, steps=1000, warmup=50):
    """
    Return the learning rates, the seconds and the number of steps of a run with a time limit.

    A simulated clock advances by `seconds_a_step(step)` at each step.
    """
    now = [100.0]
    monkeypatch.setattr(callbacks.clock, "monotonic", lambda: now[0])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = get_cosine_schedule_with_warmup(optimizer, warmup, steps)
    state, control, limit = TrainerState(max_steps=steps), TrainerControl(), TimeLimit(minutes)
    args = SimpleNamespace(save_strategy="steps")
    limit.on_train_begin(args, state, control, lr_scheduler=scheduler)
    rates = []
    while state.global_step < state.max_steps and not control.should_training_stop:
        now[0] += seconds_a_step(state.global_step)
        optimizer.step()
        scheduler.step()
        state.global_step += 1
        limit.on_step_end(args, state, control, lr_scheduler=scheduler)
        rates.append(scheduler.get_last_lr()[0])
    assert control.should_save == control.should_training_stop, "what is trained is saved"
    return rates, now[0] - 100, state.max_steps


def test_a_short_time_limit_reduces_the_steps(monkeypatch, capsys):
    """The estimate ignores slow first steps, and the learning rate is near 0 at the last step."""
    rates, seconds, steps = run_with_limit(monkeypatch, 1, lambda step: 5.0 if step < 2 else 0.5)
    assert 95 < len(rates) == steps < 110 and 50 < seconds <= 60.5
    assert max(rates) > 0.99 and rates[-1] < 1e-3
    assert "There is time for" in capsys.readouterr().out
    # The warm-up keeps its share of the steps, so the learning rate reaches its peak.
    rates, _, steps = run_with_limit(monkeypatch, 1, lambda _: 1.0, steps=100_000, warmup=5000)
    assert 55 <= len(rates) == steps <= 62 and max(rates) > 0.9 and rates[-1] < 1e-3
    # The machine becomes slower during training.
    rates, seconds, steps = run_with_limit(monkeypatch, 1, lambda step: 0.1 if step < 100 else 1.0)
    assert 130 < len(rates) < 160 and seconds <= 70 and rates[-1] < 0.02
    # The machine becomes faster during training.
    rates, seconds, steps = run_with_limit(monkeypatch, 1, lambda step: 1.0 if step < 20 else 0.1)
    assert 300 < len(rates) < 430 and 45 < seconds <= 60.5 and rates[-1] < 1e-3
    # There is time for only a few steps.
    rates, _, _ = run_with_limit(monkeypatch, 0.1, lambda _: 1.0)
    assert len(rates) in (6, 7) and rates[-1] < 0.1


def test_the_trainer_stops_at_the_time_limit(tmp_path, monkeypatch):
    trainer = new_trainer(tmp_path, max_steps=1000, learning_rate=1e-3, lr_scheduler_type="cosine")
    ticks = iter(range(100_000))
    monkeypatch.setattr(callbacks.clock, "monotonic", lambda: float(next(ticks)))
    trainer.add_callback(TimeLimit(0.5))
    trainer.train()
    assert trainer.state.global_step == trainer.state.max_steps < 32
    assert trainer.lr_scheduler.get_last_lr()[0] < 0.01 * trainer.args.learning_rate


def test_a_time_limit_refuses_a_constant_schedule(tmp_path):
    trainer = new_trainer(tmp_path, max_steps=10, lr_scheduler_type="constant")
    trainer.add_callback(TimeLimit(0.5))
    with pytest.raises(ValueError, match="such as 'cosine' or 'linear'"):
        trainer.train()


def test_a_long_time_limit_changes_nothing(monkeypatch, capsys):
    rates, _, steps = run_with_limit(monkeypatch, 10, lambda _: 0.5, steps=100, warmup=5)
    free, _, _ = run_with_limit(monkeypatch, 1e9, lambda _: 0.5, steps=100, warmup=5)
    assert steps == 100 and rates == free and "There is time" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="must be positive, got 0"):
        TimeLimit(0)
