# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a run costs: estimates against measured steps, and the papers' runs on hand-made rows with tiny models."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hub import Hub
from programs import run_main, run_training
from published import save_live
from test_train_trainer import new_trainer, row
from test_train_windows import asked, said
from tiny import random_frames, tiny_model, tiny_processor, write_clip
from torch.utils.flop_counter import FlopCounterMode

from videollm_mod.train import sft
from videollm_mod.train.arguments import run
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.dry_run import Estimate, count_steps
from videollm_mod.train.new_model import choose_parts
from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig


pytestmark = pytest.mark.xdist_group("dry run")  # one process makes the workplace


@pytest.mark.parametrize(
    ("tuned", "checkpointing", "routing"),
    [
        ("lora", True, {"mod_layers": "interleaved"}),
        ("lora", False, {"mod_keep_ratio": 1.0}),
        ("full", False, {"mod_layers": "all"}),
        ("frozen", True, {"mod_layers": "interleaved"}),
    ],
)
def test_estimates_agree_with_a_measured_step(tmp_path, tuned, checkpointing, routing):
    """Operations within 5%, and the bytes of weights, gradients and optimizer exactly."""
    text = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "tie_word_embeddings": False}
    # This attention counts completely, as a dense one.
    model = tiny_model(text_overrides=text, attn_implementation="eager", **routing)
    arguments = ModelArguments(tune_language_model=tuned, lora_r=8)
    config, rows, adapter = model.config, [row(0, 60)], choose_parts(model, arguments)
    options = {"per_device_train_batch_size": 1, "gradient_checkpointing": checkpointing}
    trainer = new_trainer(tmp_path, rows=rows, model=model, adapter=adapter, **options)
    with FlopCounterMode(display=False) as counter:
        trainer.train()
    options = {"dtype": torch.float32, "checkpointing": checkpointing, "has_features": False}
    estimate = Estimate(config, arguments, **options)
    text_tokens = StreamCollator(tiny_processor())(rows)["input_ids"].shape[1] - 60 * config.frame_num_tokens
    found = estimate.training_flops(60, text_tokens, is_causal=False)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)
    assert estimate.training_flops(60, text_tokens) < found
    memory, weights = estimate.memory(60, text_tokens), list(trainer.model.parameters())
    assert memory.weights == sum(weight.nbytes for weight in weights)
    assert memory.trained == memory.gradients == sum(weight.nbytes for weight in weights if weight.requires_grad)
    states = trainer.optimizer.state_dict()["state"].values()
    assert memory.optimizer == sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("tuned", ["full", "lora"])
def test_each_stage_of_zero_shards_one_thing_more(tuned):
    model, arguments = tiny_model(), ModelArguments(tune_language_model=tuned, lora_r=8)
    options = {"dtype": torch.bfloat16, "checkpointing": False, "has_features": True}
    estimate = Estimate(model.config, arguments, **options)
    learned = [weight for weight in estimate.trained.parameters() if weight.requires_grad]
    size, count = sum(weight.nbytes for weight in learned), sum(weight.numel() for weight in learned)
    alone, *stages = [estimate.memory(8, 20, zero_stage=stage, num_gpus=4) for stage in range(4)]
    assert (alone.gradients, alone.optimizer) == (size, 2 * size)
    # Both moments and a copy of the weight have 4 bytes each.
    assert {memory.optimizer for memory in stages} == {12 * count // 4}
    assert [memory.gradients for memory in stages] == [size, size // 4, size // 4]
    layers = estimate.model.model.language_model.layers
    largest = max(sum(weight.nbytes for weight in layer.parameters()) for layer in layers)
    assert [memory.weights for memory in stages] == [alone.weights, alone.weights, alone.weights // 4 + largest]
    assert len({memory.activations for memory in (alone, *stages)}) == 1


def test_activations_are_about_what_a_step_keeps():
    """The backward pass of a layer keeps these numbers. The model is in float32, which doubles them."""
    model, arguments = tiny_model(mod_keep_ratio=1.0), ModelArguments(tune_language_model="full")
    options = {"dtype": torch.float32, "checkpointing": False, "has_features": True}
    estimate, kept = Estimate(model.config, arguments, **options), {}
    batch = StreamCollator(tiny_processor())([row(0, 60)])
    weights = {weight.data_ptr() for weight in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hidden = torch.randn(*batch["input_ids"].shape, 32, requires_grad=True)
    layer, positions = model.model.language_model.layers[0], batch["position_ids"]
    embeddings = model.model.language_model.rotary_emb(hidden, positions)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer.train()(hidden, position_embeddings=embeddings, attention_mask=None)
    measured = sum(size for place, size in kept.items() if place not in weights)
    text_tokens = hidden.shape[1] - 600
    assert 2 * estimate.memory(60, text_tokens).activations / 4 == pytest.approx(measured, rel=0.35)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"num_train_epochs": 2}, (4, 2)),
        ({"num_train_epochs": 0.5}, (1, 0.5)),
        ({"max_steps": 7}, (7, 3.5)),
    ],
)
def test_steps_are_counted_as_the_trainer_does(tmp_path, options, expected):
    training = StreamingSFTConfig(str(tmp_path), **options)
    assert count_steps(13, 8, training) == expected


# ---------------------------------------------------------------------------------------------------- the papers' runs


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with rows as the converters prepare them, and a Hub with tiny models under the real names."""
    folder = tmp_path_factory.mktemp("runs")
    write_clip(folder / "clip.mp4", random_frames(60), fps=5)
    step = {"id": "a/0/step", "task": "coin_step", "truth": {"label": "cut the rope"}, "end": 3.0}
    question = {"role": "user", "content": "Which step is shown?"}
    lta = {"id": "a/0", "task": "ego4d_lta", "truth": {"verb": ["take"]}, "start": 1.0, "end": 5.0}
    told = [asked(0.5), *(said(0.5 + k, f"You lift ball {k}.") for k in range(1, 11))]
    rows = {
        "coin": [{**step, "messages": [question, said(3.0, "Cut the rope.")]}],
        "ego4d_lta": [{**lta, "messages": [question, said(5.0, "Take the ball.")]}],
        "ego4d_narration": [{"id": "a", "task": "ego4d_narration", "truth": {}, "messages": told}],
        "ego_exo4d": [{**step, "task": "ego_exo4d_keystep", "messages": [question, said(3.0, "Cut the rope.")]}],
    }
    for name, made in rows.items():
        (folder / "prepared" / name).mkdir(parents=True)
        config = yaml.safe_load(Path(sft.__file__).with_name("configs").joinpath(f"{name}.yaml").read_text())
        video = folder / config["video_root"][0] / "clip.mp4"
        video.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "clip.mp4", video)
        lines = [json.dumps({"video": str(video), **row}) for row in made * 4]
        (folder / "prepared" / name / "train.jsonl").write_text("\n".join(lines))
    save_live(folder / "language", folder / "vision", folder / "adapter")
    names = {"meta-llama/Meta-Llama-3-8B-Instruct": "language", "google/siglip-large-patch16-384": "vision"}
    with Hub() as server:
        for name, part in names.items():
            files = {file.name: file.read_bytes() for file in (folder / part).iterdir() if file.is_file()}
            server.repos[name] = [files]
        yield folder, server


def run_paper(workplace, name, *arguments, home="home"):
    folder, server = workplace
    types = (ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments)
    config = sft.__file__.replace("sft.py", f"configs/{name}.yaml")
    with server.used_here(folder / home):
        return run_main(lambda: run(sft.main, *types), "--config", config, *arguments, program="sft.py", folder=folder)


@pytest.mark.parametrize("name", ["coin", "ego4d_lta", "ego4d_narration", "ego_exo4d"])
def test_the_papers_runs_train(workplace, name):
    """Three steps, in float32 and in windows of at most eight frames."""
    small = ["--bf16", "false", "--dataloader_num_workers", 0, "--gradient_accumulation_steps", 1, "--lora_r", 4]
    options = ["--max_steps", 3, "--logging_steps", 1, "--save_strategy", "no", "--max_frames", 8]
    done = run_paper(workplace, name, *small, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"'loss': '([\d.]+)'", done.stdout)]
    assert len(losses) == 3 and all(loss > 0 for loss in losses)
    assert (workplace[0] / "outputs" / name / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "windows", "frames", "epochs"),
    [("coin", 4, 28, 5), ("ego4d_lta", 4, 36, 6), ("ego4d_narration", 12, 96, 2), ("ego_exo4d", 4, 28, 2)],
)
def test_a_dry_run_tells_steps_tokens_operations_memory_and_hours(
    workplace, monkeypatch, name, windows, frames, epochs
):
    """It loads no weights: those of the Hub are not even there."""
    server = workplace[1]
    for repo, [files] in server.repos.items():
        without = {file: data for file, data in files.items() if not file.endswith(".safetensors")}
        monkeypatch.setitem(server.repos, repo, [without])
    done = run_paper(workplace, name, "--dry_run", "--max_frames", 10, "--utilization", 0.5, home="empty")
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == f"prepared/{name}: 4 rows to train on, no fault found"
    counts = re.fullmatch(rf"{windows} windows, {frames} frames, ([\d,]+) tokens, 0.0\d hours of video", lines[1])
    assert lines[4] == f"{epochs} steps of up to 64 windows (8 GPUs x 1 x 8 accumulated), {epochs} epochs"
    tokens = int(counts[1].replace(",", ""))
    assert lines[5] == f"{tokens:,} tokens a step on average"
    for line, variant in ((lines[6], "full compute"), (lines[9], "routed")):
        assert re.fullmatch(variant + r": [\d.e-]+ TFLOP a step, [\d.e-]+ EFLOP in all", line)
    hours = [dict(re.findall(r"(RTX 4090|[A-Z]\w+) ([\d.e-]+)", lines[at].partition(": ")[2])) for at in (8, 11)]
    assert list(hours[0]) == list(hours[1]) == ["A100", "H100", "H200", "L40S", "RTX 4090"]
    assert all(0 < float(hours[1][gpu]) < float(hours[0][gpu]) for gpu in hours[0])
    stage = {"coin": 1, "ego4d_lta": 1, "ego4d_narration": 2, "ego_exo4d": 2}[name]
    assert "at 50% of the published peak" in lines[12] and f"with ZeRO-{stage}." in lines[12]


def test_a_dry_run_needs_a_model(workplace):
    folder = workplace[0]
    data = ["--dataset", folder / "prepared" / "coin", "--video_root", folder / "videos"]
    done = run_training(folder / "out", *data, "--dry_run")
    assert done.returncode == 1 and done.stderr.endswith("error: --dry_run needs a model, such as --checkpoint.\n")
