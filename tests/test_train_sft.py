# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The training script, from data to a checkpoint that loads without this package."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin
from datasets import Dataset
from hub import TOKEN, Hub
from huggingface_hub import ModelCard
from peft import PeftModel
from PIL import Image
from preloaded import launch, start
from programs import losses_of, run_main, run_training
from published import save_source
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import (
    copy_embedded,
    random_frames,
    tiny_model,
    tiny_processor,
    tiny_text_config,
    tiny_tokenizer,
    tiny_vision_config,
    training_batch,
    write_clip,
    write_noisy_clip,
)
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from videollm_mod import VideoLLMMoDForConditionalGeneration, VideoLLMMoDProcessor
from videollm_mod.convert.vision_language import convert
from videollm_mod.stream_format_videollm_mod import STREAM_FORMATS
from videollm_mod.train import sft
from videollm_mod.train.arguments import RowArguments, run
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data import subtitles
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.streamworld import StreamWorld
from videollm_mod.train.data.timed_messages import NARRATE, TimedMessages, find_faults, load_timed_messages
from videollm_mod.train.data.world.clip import SPLITS, WORLDS
from videollm_mod.train.data.world.events import make_clip
from videollm_mod.train.data.world.rows import streamworld_dataset
from videollm_mod.train.encode import EncodeArguments
from videollm_mod.train.encode import main as encode_main
from videollm_mod.train.new_model import choose_parts, model_from_parts, new_model
from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig
from videollm_mod.train.streaming_evaluation import free_streaming
from videollm_mod.train.teacher_forcing import teacher_forced
from videollm_mod.train.trainer import StreamingSFTTrainer


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "train" / "configs"
EMBEDDED = ROOT
SAMPLES = ROOT / "samples"
NASA = ROOT / "tests" / "data" / "nasa_13013.mp4"
NO_WEIGHT = "error: no weight would learn: choose parts with --tune_language_model, --tune_connector, ..."
NASA_ROOT = ["--video_root", NASA.parent]


# ----------------------------------------------------------------------------------------------------------- training


def new_processor():
    model, processor = new_model(CONFIGS / "streamworld_model.json")
    return processor, model


def test_a_new_model_fits_its_tokenizer():
    processor, model = new_processor()
    text = model.config.text_config
    assert text.vocab_size == processor.frame_token_id == len(processor.tokenizer) - 1
    assert len(processor.tokenizer.encode("]\n")) == 1
    assert processor.frame_num_tokens == model.config.frame_num_tokens == 16
    words = processor.tokenizer.tokenize(": The red umbrella bumps into the blue car.")
    assert len(words) == 10, words


def test_collator_needs_no_mask():
    processor, model = new_processor()
    rows = list(streamworld_dataset(num_clips=3, world=WORLDS["small"]))
    batch = training_batch(processor, rows)
    assert "attention_mask" not in batch and batch["position_ids"].shape == batch["input_ids"].shape
    assert batch["num_frames"].tolist() == [len(row["video"]) for row in rows]
    with torch.no_grad():
        together = model.eval()(**batch).loss
        parts = [model(**training_batch(processor, [row])) for row in rows]
        counts = [int((StreamCollator(processor)([row])["labels"][:, 1:] >= 0).sum()) for row in rows]
    mean = sum(p.loss * n for p, n in zip(parts, counts, strict=True)) / sum(counts)
    assert together == pytest.approx(float(mean), rel=1e-4)


def test_one_process_refuses_several_gpus(tmp_path, monkeypatch):
    """The trainer would split each step among them with `nn.DataParallel`."""
    training = StreamingSFTConfig(str(tmp_path))
    monkeypatch.setattr(StreamingSFTConfig, "n_gpu", 2)
    with pytest.raises(SystemExit, match="accelerate launch train/sft.py"):
        sft.main(ScriptArguments(), StreamWorld("streamworld"), training, ModelArguments())


def run_process(folder, *arguments, **variables):
    """Train in a process of its own. Most tests train in this process, without seconds of imports."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **variables}
    return subprocess.run(
        [sys.executable, "train/sft.py", *map(str, arguments), "--output_dir", str(folder)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_two_stages_from_scratch(tmp_path):
    small = ["--dataset", "streamworld", "--world", "small", "--num_clips", 16, "--per_device_train_batch_size", 4]
    small += ["--warmup_steps", 1, "--logging_steps", 1, "--save_strategy", "no", "--report_to", "none"]
    small += ["--learning_rate", 1e-3, "--tune_language_model", "full", "--tune_vision_encoder", "true"]
    new = ["--model_config", CONFIGS / "streamworld_model.json", "--kinds", "describe=1", "--num_train_epochs", 1]
    first = run_training(tmp_path / "one", *new, *small)
    assert first.returncode == 0, first.stderr[-3000:]
    model = AutoModel.from_pretrained(tmp_path / "one", trust_remote_code=True)
    before, model.config.speak = model.state_dict(), "every"
    model.config.save_pretrained(tmp_path / "one")
    options = ["--checkpoint", tmp_path / "one", "--num_train_epochs", 1]
    second = run_training(tmp_path / "two", *options, *small)
    assert second.returncode == 0, second.stderr[-3000:]
    losses = losses_of(second.stdout)
    assert len(losses) == 4 and losses[-1] < losses[0]
    trained = AutoModel.from_pretrained(tmp_path / "two", trust_remote_code=True)
    assert trained.config.speak == "learned"
    after = trained.state_dict()
    still = [name for name, weight in after.items() if torch.equal(weight, before[name])]
    assert not still, "every parameter is trained, routers included"
    assert any("router" in name for name in after)
    card = ModelCard.load(tmp_path / "two" / "README.md")
    assert card.data.pipeline_tag == "video-text-to-text" and "Data: streamworld. Made from: one." in card.text
    assert "| learning_rate | 0.001 |" in card.text and str(tmp_path) not in card.content
    assert Image.open(tmp_path / "two" / "loss.png").size[0] > 500
    names = {path.name for path in (tmp_path / "two").iterdir()}
    assert {"config.json", "model.safetensors", "chat_template.jinja", "processor_config.json"} <= names
    assert {"modeling_videollm_mod.py", "routing_videollm_mod.py", "video_reading_videollm_mod.py"} <= names


def test_a_converted_model_trains_in_its_own_turns(tmp_path):
    save_source("smolvlm", tmp_path / "theirs")
    convert(str(tmp_path / "theirs"), tmp_path / "ours", mod_layers="all", mod_keep_ratio=0.5)
    rows = ["--dataset", "streamworld", "--world", "small", "--num_clips", 4, "--per_device_train_batch_size", 4]
    how = ["--num_train_epochs", 5, "--learning_rate", 3e-3, "--warmup_steps", 0, "--tune_language_model", "full"]
    how += ["--logging_steps", 1, "--save_strategy", "no", "--report_to", "none"]
    done = run_training(tmp_path / "out", "--checkpoint", tmp_path / "ours", *rows, *how)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = losses_of(done.stdout)
    assert len(losses) == 5 and losses[-1] < 0.95 * losses[0]
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert processor.stream_format == STREAM_FORMATS["smolvlm"]
    config = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).config
    assert config.speak == "learned" and config.frame_token_interval_id == processor.frame_token_interval_id


def test_output_of_a_script_is_quiet(tmp_path):
    """Libraries print no warnings: what remains is a progress bar, the figures and two lines of ours."""
    options = ["--dataset", "streamworld", "--world", "tiny", "--num_clips", 2, "--max_steps", 1, "--lora_r", 4]
    options += ["--checkpoint", EMBEDDED, "--save_strategy", "no", "--report_to", "none", "--logging_steps", 1]
    done = run_process(tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.strip().splitlines()
    assert lines[0].startswith("Training ") and lines[-1] == f"saved to {tmp_path / 'out'}"
    assert all(line.startswith("{'") for line in lines[1:-1]), done.stdout
    bars = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    assert bars and all("| " in line and "/1 [" in line for line in bars), done.stderr


def test_a_missing_model_is_named(tmp_path):
    failed = run_training(tmp_path, "--dataset", "streamworld")
    assert failed.returncode == 1 and "exactly one of --checkpoint, --model_config" in failed.stderr
    assert "Traceback" not in failed.stderr and not list(tmp_path.iterdir())


def test_an_unknown_argument_is_named(tmp_path):
    failed = run_training(tmp_path, "--dataset", "streamworld", "--epochs", 3)
    assert failed.returncode == 1 and "error: " in failed.stderr and "'--epochs'" in failed.stderr
    assert "Traceback" not in failed.stderr and not list(tmp_path.iterdir())


def test_a_checkpoint_that_diverged_is_refused(tmp_path):
    folder = copy_embedded(tmp_path / "diverged")
    weights = load_file(folder / "model.safetensors")
    weights["model.connector.linear_1.bias"][3] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    failed = run_training(tmp_path / "out", "--dataset", "streamworld", "--num_clips", 1, "--checkpoint", folder)
    assert failed.returncode == 1 and failed.stderr.splitlines()[-1].startswith(f"error: --checkpoint {folder}: 1 of ")


def test_bad_data_is_named_before_training(tmp_path):
    rows = [{"video": str(NASA), "messages": [{"role": "assistant", "content": "Late.", "time": 99.0}]}]
    (tmp_path / "data.jsonl").write_text(json.dumps(rows[0]) + "\n")
    failed = run_training(tmp_path / "out", "--dataset", tmp_path / "data.jsonl", *NASA_ROOT, "--validate_only")
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    where = f"'{tmp_path}/data.jsonl', line 1"
    assert f"{where}, messages[0].time: is 99 s, beyond the end at 13.013 s" in failed.stderr


@pytest.fixture
def faulty(tmp_path):
    """Rows of two splits: fine, no object, a video that ends early only when it is decoded, and fine."""
    write_clip(tmp_path / "good.mp4", random_frames(40))
    write_noisy_clip(tmp_path / "noisy.mp4", 40, noise_from=20)
    told = [{"role": "assistant", "content": "A ball.", "time": 3.5}]
    good, noisy = (json.dumps({"video": f"{name}.mp4", "messages": told}) for name in ("good", "noisy"))
    for split in ("train", "validation"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join([good, "null", noisy, good]))
    return tmp_path


ONE_STEP = ["--checkpoint", EMBEDDED, "--max_steps", 1, "--per_device_train_batch_size", 3, "--lora_r", 4]
ONE_STEP += ["--save_strategy", "no", "--report_to", "none", "--logging_steps", 1]
NO_OBJECT = "a row is an object with messages and a video, got null."
ENDS_EARLY = "Message 0 is at 3.5 s, after the last frame at 1.5 s."


def test_faulty_rows_are_left_out_and_listed_at_the_end(faulty):
    options = ["--dataset", faulty, *ONE_STEP, "--skip_faulty", "--dataloader_num_workers", 1]
    evaluated = ["--eval_split", "validation", "--eval_strategy", "steps", "--eval_steps", 1]
    done = run_training(faulty / "out", *options, *evaluated)
    assert done.returncode == 0 and len(losses_of(done.stdout)) == 1, done.stderr[-3000:]
    end = done.stderr[done.stderr.index("left out ") :]
    assert end.splitlines()[:5] == [
        "left out 4 of 8 rows:",
        f"'{faulty}/train.jsonl', line 2: {NO_OBJECT}",
        f"'{faulty}/validation.jsonl', line 2: {NO_OBJECT}",
        f"'{faulty}/validation.jsonl', line 3, messages[0].time: is 3.5 s, beyond the end at 2 s",
        f"'{faulty}/train.jsonl', line 3: {ENDS_EARLY}",
    ]


def test_checks_of_all_frames_find_what_training_would(faulty, capsys):
    def check(**options):
        script, training = ScriptArguments(skip_faulty=True, **options), StreamingSFTConfig(str(faulty / "out"))
        sft.main(script, TimedMessages(str(faulty)), training, ModelArguments())
        return capsys.readouterr()

    assert f"{faulty}: 3 rows to train on, 1 left out" in check(validate_only="quick").out
    full = check(validate_only="full")
    assert f"{faulty}: 2 rows to train on, 2 left out" in full.out
    assert f"mended or read in part: 1 video:\n'{faulty}/noisy.mp4': " in full.err
    (faulty / "validation.jsonl").write_text("null\n")
    with pytest.raises(SystemExit, match="no row is left, since all are faulty"):
        check(eval_split="validation")
    shown = capsys.readouterr().err
    assert "left out 2 of 5 rows:\n" in shown and f"'{faulty}/validation.jsonl', line 1: {NO_OBJECT}" in shown


class KillingCollator(StreamCollator):
    """Kill the worker that collates a row with a noisy video."""

    def _frames(self, example):
        if "noisy" in example["video"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._frames(example)


def test_a_row_that_fails_or_kills_its_worker_ends_training_in_one_line(faulty, monkeypatch):
    (faulty / "train.jsonl").write_text((faulty / "train.jsonl").read_text().replace("null", ""))
    options = ["--dataset", faulty, *ONE_STEP, "--dataloader_num_workers", 1]
    failed = run_training(faulty / "out", *options)
    assert failed.returncode == 1 and "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == f"error: '{faulty}/train.jsonl', line 3: {ENDS_EARLY}"
    monkeypatch.setattr(sft, "StreamCollator", KillingCollator)
    killed = run_training(faulty / "out", *options, "--skip_faulty")
    assert killed.returncode == 1 and "Traceback" not in killed.stderr, killed.stderr[-3000:]
    line = killed.stderr.splitlines()[-1]
    assert re.match(r"error: a worker of the data loader (was killed \(Killed\)|died) at ", line)
    assert f"at '{faulty}/train.jsonl', line 3. If memory ran out, lower --dataloader_num_workers" in line


def test_the_training_split_is_refused_for_evaluation(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text("{}\n")
    script = ScriptArguments(eval_split="validation")
    monkeypatch.setattr(sft, "load_split", lambda *_: [])
    with pytest.raises(SystemExit, match="is one split. Give a folder with train.jsonl and validation.jsonl"):
        sft.main(script, TimedMessages(str(tmp_path / "data.jsonl")), None, None)
    script = ScriptArguments(eval_split="train")
    with pytest.raises(SystemExit, match="--eval_split train: this is the training split"):
        sft.main(script, StreamWorld("streamworld"), None, None)


def test_an_evaluation_needs_a_split(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_split", lambda *_, **__: [])
    training = StreamingSFTConfig(output_dir=str(tmp_path), eval_strategy="steps", eval_steps=1, report_to="none")
    with pytest.raises(SystemExit, match="--eval_strategy steps needs --eval_split"):
        sft.main(ScriptArguments(), StreamWorld("streamworld"), training, None)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_in_4bit", "true"], "error: --load_in_4bit computes in bfloat16: add --bf16 true."),
        (["--attn_implementation", "foo"], "error: --attn_implementation foo: "),
        (["--tune_language_model", "frozen", "--tune_connector", "false", "--tune_routers", "false"], NO_WEIGHT),
        (["--tune_language_model", "frozen", "--tune_connector", "false", "--mod_router", "uniform"], NO_WEIGHT),
        (["--label_smoothing_factor", 0.1, "--stream_loss_weight", 3], "error: `stream_loss_weight` 3.0 does not"),
    ],
)
def test_options_that_do_not_go_together_end_in_one_line(tmp_path, options, message):
    given = ["--dataset", "streamworld", "--num_clips", 2, "--checkpoint", EMBEDDED, "--max_steps", 1, *options]
    done = run_training(tmp_path / "out", *given, "--report_to", "none")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(message), done.stderr[-3000:]


def test_a_split_without_a_row_to_learn_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sft, "load_split", lambda *_, **__: Dataset.from_dict({"messages": [], "video": []}))
    training = StreamingSFTConfig(output_dir=str(tmp_path), report_to="none")
    with pytest.raises(SystemExit, match="--dataset streamworld: the split 'train' has no row to learn"):
        sft.main(ScriptArguments(), StreamWorld("streamworld"), training, ModelArguments(checkpoint=str(EMBEDDED)))


def test_from_a_video_with_subtitles_to_a_checkpoint(tmp_path):
    """One command converts the subtitles of a video to a row, and another trains and merges an adapter."""
    done = run_main(subtitles.main, NASA, "--out", tmp_path / "nasa.jsonl")
    assert done.returncode == 0, done.stderr
    data = ["--dataset", tmp_path / "nasa.jsonl", *NASA_ROOT, "--checkpoint", EMBEDDED]
    checked = run_training(tmp_path / "out", *data, "--validate_only")
    assert checked.returncode == 0 and "1 row to train on, no fault found" in checked.stdout, checked.stderr
    options = ["--max_steps", 4, "--logging_steps", 1, "--lora_r", 8, "--learning_rate", 1e-3, "--save_strategy", "no"]
    trained = run_training(tmp_path / "out", *data, *options, "--augmentation", 0.3, "--report_to", "none")
    assert trained.returncode == 0, trained.stderr[-3000:]
    losses = losses_of(trained.stdout)
    assert len(losses) == 4 and losses[-1] < losses[0]
    before = AutoModel.from_pretrained(EMBEDDED, trust_remote_code=True).state_dict()
    after = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True).state_dict()
    assert before.keys() == after.keys(), "the adapter is merged"
    changed = {name for name, weight in after.items() if not torch.equal(weight, before[name])}
    assert {name for name in before if "router" in name or "connector" in name} <= changed
    assert any("q_proj" in name for name in changed) and not any("vision_encoder" in name for name in changed)


SMALL_RUN = [
    *("--dataset", "streamworld", "--world", "small", "--checkpoint", EMBEDDED, "--tune_language_model", "full"),
    *("--num_clips", 64, "--seconds", "3,5", "--learning_rate", 1e-3, "--warmup_steps", 1, "--logging_steps", 1),
    *("--report_to", "none"),
    *("--bf16", "false", "--gradient_checkpointing", "false", "--train_sampling_strategy", "sequential"),
]


def evaluation_of(text):
    """Return the measures of the last streamed evaluation, without latencies."""
    shown = ast.literal_eval(next(line for line in text.splitlines()[::-1] if line.startswith("{'eval_lm_ppl'")))
    return {name: float(value) for name, value in shown.items() if not name.endswith(("latency", "epoch"))}


def kill_in_a_checkpoint(folder, *arguments, after):
    """Start a run, kill it while it writes a checkpoint after step `after`, and return the checkpoint."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    running = start("train/sft.py", *arguments, "--output_dir", folder, **pipes)
    seen = set()
    while running.poll() is None:
        for path in folder.glob("checkpoint-*"):
            if path in seen or int(path.name.split("-")[1]) <= after:
                continue
            # Stop the run first, so that no file appears between this check and the kill.
            running.send_signal(signal.SIGSTOP)
            if (path / "trainer_state.json").exists():
                seen.add(path)
                running.send_signal(signal.SIGCONT)
                continue
            running.kill()
            running.communicate()
            return path
        time.sleep(0.0005)
    raise AssertionError(f"ended before it was killed: {running.communicate()[0].decode()[-2000:]}")


@pytest.mark.xdist_group("preloaded")
def test_a_killed_and_resumed_run_equals_an_uninterrupted_run(tmp_path):
    """It resumes from the previous checkpoint, with the same data order and dropout."""
    options = [*SMALL_RUN[:4], *SMALL_RUN[4:6], "--lora_r", 8, *SMALL_RUN[8:-2], "--max_steps", 4, "--save_steps", 1]
    options += ["--augmentation", 0.3, "--per_device_train_batch_size", 2, "--resume_from_checkpoint", "true"]
    whole = run_training(tmp_path / "whole", *options)
    assert whole.returncode == 0 and "has no complete checkpoint" in whole.stdout, whole.stderr[-2000:]
    expected = losses_of(whole.stdout)
    assert len(expected) == 4

    half = kill_in_a_checkpoint(tmp_path / "broken", *options, after=1)
    step = int(half.name.split("-")[1])
    last = half.with_name(f"checkpoint-{step - 1}")

    resumed = run_training(tmp_path / "broken", *options)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    assert f"{half.name}', which is incomplete" in resumed.stdout
    assert losses_of(resumed.stdout) == expected[step - 1 :]
    assert (last / "trainer_state.json").exists() and (half / "trainer_state.json").exists()
    one, other = (AutoModel.from_pretrained(tmp_path / f, trust_remote_code=True) for f in ("whole", "broken"))
    for name, weight in one.state_dict().items():
        assert torch.equal(weight, other.state_dict()[name]), name


@pytest.mark.parametrize("stage", [None, 1, 2])
def test_a_merged_adapter_is_saved_as_complete_weights(tmp_path, monkeypatch, stage):
    """DeepSpeed gives the same weights if it does not shard them."""
    trainer, adapted = new_adapted_trainer(tmp_path, monkeypatch, stage=stage)
    expected = deepcopy(adapted).merge_and_unload().state_dict()
    sft.merge_for_saving(trainer)
    trainer.save_model(tmp_path / "out")
    loaded, report = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert loaded.state_dict().keys() == expected.keys()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_an_adapter_of_sharded_weights_is_not_merged(tmp_path, monkeypatch, capsys):
    trainer, adapted = new_adapted_trainer(tmp_path, monkeypatch, stage=3)
    sft.merge_for_saving(trainer)
    assert trainer.model is adapted and trainer.is_deepspeed_enabled
    assert any("lora_A" in name for name, _ in adapted.named_parameters())
    assert f"'{tmp_path}' gets only the adapter. To merge it" in capsys.readouterr().out


def new_adapted_trainer(folder, monkeypatch, *, stage):
    """Return a trainer of an adapted model that appears to use DeepSpeed if there is a stage."""
    model = tiny_model()
    trainer = StreamingSFTTrainer(
        model=model,
        args=StreamingSFTConfig(output_dir=str(folder), report_to="none"),
        train_dataset=streamworld_dataset(num_clips=1),
        processing_class=tiny_processor(),
        data_collator=StreamCollator(tiny_processor()),
        peft_config=choose_parts(model, ModelArguments(lora_r=2, lora_dropout=0.0)),
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            # These weights start at zero, where an adapter has no effect.
            torch.nn.init.normal_(parameter, std=0.1)
    if stage is not None:
        plugin = DeepSpeedPlugin(zero_stage=stage)
        monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
        trainer.is_deepspeed_enabled, trainer.deepspeed = True, trainer.model
    return trainer, trainer.model


def test_qlora_trains_on_a_language_model_in_4_bits(tmp_path):
    """Only its linear layers have 4 bits. The other parts train, and the saved model loads and answers."""
    options = [*SMALL_RUN[:6], "--load_in_4bit", "true", "--bf16", "true", "--lora_r", 8, *SMALL_RUN[8:12]]
    options += ["--learning_rate", 1e-3, "--warmup_steps", 1, "--logging_steps", 1, "--report_to", "none"]
    options += ["--max_steps", 6, "--per_device_train_batch_size", 4, "--save_strategy", "no"]
    done = run_training(tmp_path, *options)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = losses_of(done.stdout)
    assert len(losses) == 6 and sum(losses[4:]) < sum(losses[:2])
    model = AutoModel.from_pretrained(tmp_path, trust_remote_code=True)
    small = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    assert len(small) == 7 * 6 and all(".language_model.layers." in name for name in small)
    before = AutoModel.from_pretrained(EMBEDDED, trust_remote_code=True).state_dict()
    for name, weight in model.state_dict().items():
        if "router" in name or "connector" in name:
            assert not torch.equal(weight.float(), before[name].float()), name
    assert {w.dtype for w in model.parameters() if w.is_floating_point()} == {torch.float32}
    processor = VideoLLMMoDProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    say = [{"role": "assistant", "content": "A red ball enters from the left.", "time": 1.0}]
    batch = processor(say, random_frames(4), fps=2, return_labels=True)
    # In training mode: bitsandbytes packs weights for the CPU's inference only if their width is a multiple of 64.
    assert torch.isfinite(model.train()(**batch).loss)


def test_a_run_is_pushed_to_the_hub(tmp_path):
    """After training, the model on the Hub is complete: it loads from there."""
    load = "from transformers import AutoModel, AutoProcessor; name = 'somebody/narrator'; "
    load += "model = AutoModel.from_pretrained(name, trust_remote_code=True); "
    load += "processor = AutoProcessor.from_pretrained(name, trust_remote_code=True); "
    load += "print(model.num_parameters(), sum(weight.double().sum().item() for weight in model.parameters()))"
    with Hub() as hub:
        options = [*SMALL_RUN, "--max_steps", 1, "--per_device_train_batch_size", 2, "--save_strategy", "no"]
        options += ["--push_to_hub", "--hub_model_id", "somebody/narrator", "--hub_token", TOKEN]
        with hub.used_here(tmp_path / "home"):
            done = run_training(tmp_path / "out", *options)
        assert done.returncode == 0, done.stderr[-3000:]
        assert len(hub.repos["somebody/narrator"]) == 2, "one commit after the empty one"
        files = hub.files("somebody/narrator")
        assert {"config.json", "model.safetensors", "modeling_videollm_mod.py", "chat_template.jinja"} <= set(files)
        assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
        card = ModelCard(files["README.md"].decode())
        assert card.data.library_name == "transformers" and card.data.pipeline_tag == "video-text-to-text"
        assert TOKEN not in done.stdout + done.stderr and not any(TOKEN.encode() in data for data in files.values())
        # In a fresh process with its own cache: code of an earlier run would have the same commit.
        environment = {**os.environ, **hub.environment(tmp_path / "other")}
        fresh = subprocess.run(
            [sys.executable, "-c", load], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert fresh.returncode == 0, fresh.stderr[-2000:]
    model = AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    total = sum(weight.double().sum().item() for weight in model.parameters())
    assert fresh.stdout == f"{model.num_parameters()} {total}\n"


def test_a_run_is_logged_for_tensorboard_and_trackio(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    (tmp_path / "log.yaml").write_text("report_to: [tensorboard, trackio]\nproject: narration\nrun_name: first\n")
    options = [*SMALL_RUN[: SMALL_RUN.index("--report_to")], *SMALL_RUN[SMALL_RUN.index("--report_to") + 2 :]]
    options += ["--max_steps", 2, "--per_device_train_batch_size", 2, "--save_strategy", "no"]
    done = run_training(tmp_path / "out", "--config", tmp_path / "log.yaml", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    events = EventAccumulator(str(next((tmp_path / "out" / "runs").iterdir()))).Reload()
    names = {f"train/{name}" for name in ("loss", "text_loss", "stream_loss", "router_score_mean")}
    assert names <= set(events.Tags()["scalars"])
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx(losses_of(done.stdout), rel=1e-3)
    script = "import json\nfrom trackio.sqlite_storage import SQLiteStorage\n"
    script += "print(json.dumps(SQLiteStorage.get_logs('narration', 'first')))"
    read = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    tracked = [row["train/loss"] for row in json.loads(read.stdout.splitlines()[-1]) if "train/loss" in row]
    assert tracked == pytest.approx(losses, rel=1e-3)


@pytest.mark.xdist_group("preloaded")
def test_two_processes_equal_one_with_the_same_batch(tmp_path):
    """Packed, DDP and FSDP2 runs on the CPU have the losses, evaluation and weights of one process."""
    options = [*SMALL_RUN, "--max_steps", 2, "--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", 2]
    options += ["--eval_split", "validation", "--num_eval_clips", 2, "--num_streamed_clips", 1]
    alone = run_training(tmp_path / "alone", *options, "--per_device_train_batch_size", 4)
    assert alone.returncode == 0, alone.stderr[-2000:]
    packed = run_training(tmp_path / "packed", *options, "--per_device_train_batch_size", 4, "--packing", "true")
    assert packed.returncode == 0, packed.stderr[-2000:]
    assert losses_of(packed.stdout) == pytest.approx(losses_of(alone.stdout), rel=2e-3)
    weights = AutoModel.from_pretrained(tmp_path / "alone", trust_remote_code=True).state_dict()
    streamed = evaluation_of(alone.stdout)
    assert streamed["eval_lm_ppl"] > 1 and "as the model streams it" in alone.stdout
    for kind, script in (("ddp", "train/sft.py"), ("fsdp2", "tests/fsdp2_on_cpu.py")):
        arguments = [*options, "--use_cpu", "--per_device_train_batch_size", 2, "--output_dir", tmp_path / kind]
        done = launch(kind, script, *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        assert losses_of(done.stdout) == pytest.approx(losses_of(alone.stdout), rel=2e-3), kind
        assert evaluation_of(done.stdout) == pytest.approx(streamed, rel=2e-3), kind
        assert done.stdout.count("as the model streams") == alone.stdout.count("as the model streams"), kind
        assert ("in 2 processes, sharded on cpu" if kind == "fsdp2" else "in 2 processes on cpu") in done.stdout
        for name, weight in AutoModel.from_pretrained(tmp_path / kind, trust_remote_code=True).state_dict().items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-3, atol=2e-4, msg=f"{kind} {name}")


@pytest.mark.xdist_group("preloaded")
def test_a_sharded_adapter_on_the_head_is_trained(tmp_path):
    text = json.loads((ROOT / "train" / "configs" / "streamworld_model.json").read_text())
    text["model"]["text_config"]["tie_word_embeddings"] = False
    (tmp_path / "model.json").write_text(json.dumps(text))
    options = [*SMALL_RUN[:4], *SMALL_RUN[8:], "--max_steps", 3, "--save_strategy", "no", "--lora_r", 8]
    options += ["--model_config", tmp_path / "model.json", "--lora_dropout", 0.0]
    alone = run_training(tmp_path / "alone", *options, "--per_device_train_batch_size", 4)
    assert alone.returncode == 0, alone.stderr[-2000:]
    arguments = [*options, "--use_cpu", "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "sharded"]
    done = launch("fsdp2", "tests/fsdp2_on_cpu.py", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(done.stdout) == pytest.approx(losses_of(alone.stdout), rel=2e-3)
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("alone", "sharded")]
    assert "lm_head.weight" in weights[0] and weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-3, atol=2e-4, msg=name)


def save_text_model(folder, **options):
    config = AutoConfig.for_model(**tiny_text_config("qwen2", vocab_size=512))
    text = AutoModelForCausalLM.from_config(config, **options)
    text.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return text


@pytest.mark.parametrize("vision", ["siglip_vision_model", "siglip", "dinov2", "clip"])
def test_a_new_model_of_trained_parts(tmp_path, vision):
    torch.manual_seed(0)
    text = save_text_model(tmp_path / "text", dtype=torch.bfloat16)
    tower = {"siglip": "siglip_vision_model", "clip": "clip_vision_model"}.get(vision, vision)
    vision_config = tiny_vision_config(tower)
    if vision in ("siglip", "clip"):
        small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = AutoConfig.for_model(vision, vision_config=vision_config, text_config=small)
    else:
        config = AutoConfig.for_model(**vision_config)
    encoder = AutoModel.from_config(config)
    encoder.save_pretrained(tmp_path / "vision")

    model, processor = model_from_parts(str(tmp_path / "vision"), str(tmp_path / "text"), mod_layers="all_deep")
    tower = getattr(encoder, "vision_model", encoder).state_dict()
    ours = model.model.vision_encoder.state_dict()
    assert len(ours) >= 10
    for name, weight in ours.items():
        other = tower[name] if name in tower else tower[name.removeprefix("vision_model.")]
        torch.testing.assert_close(weight, other.to(weight.dtype))
    for name, weight in text.base_model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], weight)
    assert torch.equal(model.lm_head.weight, text.lm_head.weight) and model.dtype == torch.bfloat16
    assert model.config.mod_layers == "all_deep" and processor.frame_num_tokens == model.config.frame_num_tokens
    batch = processor([{"role": "user", "content": "Hi."}], random_frames(2), add_generation_prompt=True)
    model.save_pretrained(tmp_path / "both")
    again = VideoLLMMoDForConditionalGeneration.from_pretrained(tmp_path / "both", dtype="auto").eval()
    assert torch.equal(again(**batch).logits, model.eval()(**batch).logits)


@pytest.mark.xdist_group("preloaded")
def test_a_new_model_is_saved_without_a_step_and_an_adapter_beside_it(tmp_path):
    """The untrained model equals its parts, and a saved adapter turns it into the trained model."""
    torch.manual_seed(0)
    save_text_model(tmp_path / "text")
    AutoModel.from_config(AutoConfig.for_model(**tiny_vision_config())).save_pretrained(tmp_path / "vision")
    parts = ["--vision_model", tmp_path / "vision", "--language_model", tmp_path / "text", "--mod_layers", "all_deep"]
    options = [*parts, *SMALL_RUN[:4], *SMALL_RUN[8:], "--per_device_train_batch_size", 2, "--save_strategy", "no"]
    options += ["--frame_token_pooled", 3, 3, "--lora_r", 8]
    saved = run_training(tmp_path / "new", *options, "--max_steps", 0)
    assert saved.returncode == 0, saved.stderr[-3000:]
    assert "Training " not in saved.stdout and not losses_of(saved.stdout)
    new = AutoModel.from_pretrained(tmp_path / "new", trust_remote_code=True)
    joined, _ = model_from_parts(
        str(tmp_path / "vision"), str(tmp_path / "text"), seed=42, mod_layers="all_deep", frame_token_pooled=[3, 3]
    )
    assert new.config.mod_layers == "all_deep" and new.state_dict().keys() == joined.state_dict().keys()
    for name, weight in joined.state_dict().items():
        assert torch.equal(new.state_dict()[name], weight), name
    assert VideoLLMMoDProcessor.from_pretrained(tmp_path / "new", trust_remote_code=True).frame_num_tokens == 10

    options += ["--max_steps", 3, "--merge_adapter", "false", "--keep_ratio_warmup_steps", 2, "--use_cpu"]
    trained = launch("single_gpu", "train/sft.py", "--output_dir", tmp_path / "adapter", *options, processes=1)
    assert trained.returncode == 0, trained.stderr[-3000:]
    # At least one of a frame's ten tokens is skipped from the first step on.
    shares = [float(part.split("'")[0]) for part in trained.stdout.split("'kept_share/layer_2': '")[1:]]
    assert shares == [0.9, 0.6, 0.2] and len(losses_of(trained.stdout)) == 3
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    merged = PeftModel.from_pretrained(new, tmp_path / "adapter").merge_and_unload()
    changed = {
        name for name, weight in merged.state_dict().items() if not torch.equal(weight, joined.state_dict()[name])
    }
    linear = {name for name in changed if ".language_model.layers." in name and "_proj.weight" in name}
    parts = ("model.connector", "lm_head")
    expected = {name for name in joined.state_dict() if name.startswith(parts) or ".router." in name}
    assert changed - linear == expected
    assert len(linear) == 4 * 7


@pytest.mark.xdist_group("preloaded")
def test_training_on_encoded_features_equals_training_on_video(tmp_path):
    """Losses are the same, also with features of an interrupted run and of two processes."""
    write_clip(tmp_path / "a.mp4", random_frames(40, seed=1), fps=10)
    write_clip(tmp_path / "b.mp4", random_frames(30, seed=2), fps=10)
    say = [{"role": "assistant", "content": "A ball.", "time": 2.0}]
    rows = [{"video": "a.mp4", "start": 1.0, "end": 3.0, "messages": say}, {"video": "b.mp4", "messages": say}]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def encode(out="out", options=()):
        types = (RowArguments, DataSource, EncodeArguments)
        arguments = ["--dataset", tmp_path, "--output_dir", tmp_path / out, "--checkpoint", EMBEDDED, *options]
        return run_main(lambda: run(encode_main, *types), *arguments)

    done = encode()
    assert done.returncode == 0, done.stderr[-2000:]
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 2 and not list((tmp_path / "out").glob("*.part"))
    kept = files[0].stat().st_mtime_ns
    files[1].unlink()
    assert encode().returncode == 0 and files[1].exists() and files[0].stat().st_mtime_ns == kept
    arguments = ["--dataset", tmp_path, "--output_dir", tmp_path / "shared", "--checkpoint", EMBEDDED]
    shared = launch("ddp", "train/encode.py", *arguments)
    assert shared.returncode == 0 and shared.stderr.count("rows: 100%") >= 1, shared.stderr[-2000:]
    assert "1/1" in shared.stderr, "each process has one of the two rows"
    rows = [(tmp_path / out / "train.jsonl").read_text(encoding="utf-8") for out in ("out", "shared")]
    assert rows[0] == rows[1]
    for path in files:
        one, other = (load_file(tmp_path / out / path.name)["frame_features"] for out in ("out", "shared"))
        assert torch.equal(one, other)

    # Even without any time, one row is encoded.
    short = encode(out="short", options=["--max_minutes", "0"])
    assert "1 of 2 rows; the time limit was reached" in short.stdout
    assert (tmp_path / "short" / "train.jsonl").read_text(encoding="utf-8") == rows[0].splitlines(keepends=True)[0]

    model = VideoLLMMoDForConditionalGeneration.from_pretrained(EMBEDDED)
    processor = VideoLLMMoDProcessor.from_pretrained(EMBEDDED, trust_remote_code=True)
    videos, features = load_timed_messages(tmp_path), load_timed_messages(tmp_path / "out", video_root=[tmp_path])
    assert list(find_faults(features)) == []
    for index in range(2):
        watched, encoded = (training_batch(processor, [rows[index]]) for rows in (videos, features))
        assert torch.equal(watched["labels"], encoded["labels"]) and "pixel_values_videos" not in encoded
        torch.testing.assert_close(model(**encoded).loss, model(**watched).loss)
    with pytest.raises(ValueError, match="has features at 2 frames per second, but `fps` is 4"):
        StreamCollator(processor, fps=4.0)([features[0]])
    with pytest.raises(ValueError, match="64 features of width 128 per frame, but the model reads 5 features"):
        StreamCollator(processor, frame_feature_shape=(5, 64))([features[0]])


# ------------------------------------------------------------------------------------------------ embedded checkpoint


@pytest.fixture(scope="module")
def embedded():
    model = VideoLLMMoDForConditionalGeneration.from_pretrained(EMBEDDED).eval()
    return model, VideoLLMMoDProcessor.from_pretrained(EMBEDDED, trust_remote_code=True)


# How many events of a sample are told right and in the right second, of how many told.
TOLD_RIGHT = {"streamworld": (5, 5), "doomworld": (0, 2)}


@pytest.mark.parametrize("sample", sorted(path.stem for path in SAMPLES.glob("*.mp4")))
def test_embedded_checkpoint_narrates_its_samples(embedded, sample):
    """The clips are held out, and a clip without an entry above is missing there."""
    model, processor = embedded
    story = json.loads((SAMPLES / f"{sample}.json").read_text(encoding="utf-8"))
    if "world" in story:
        clip = make_clip(story["seed"], WORLDS[story["world"]])
        assert [list(e) for e in clip.story()] == story["events"]
    assert SPLITS["test"] <= story["seed"] < SPLITS["ood"] and len(story["events"]) >= 5
    events = model.narrate(processor, SAMPLES / f"{sample}.mp4", NARRATE)
    told = [[e.time, e.text] for e in events if e.role == "assistant"]
    assert (sum(event in story["events"] for event in told), len(told)) == TOLD_RIGHT[sample]


def test_embedded_checkpoint_on_held_out_clips(embedded):
    """The README's figures, on half the clips, as `train/evaluation.py` computes them. LIVE's measures are of 20."""
    model, processor = embedded
    kinds = {"narrate": 2.0, "ask": 1.0, "wait": 1.0}
    rows = streamworld_dataset("test", num_clips=100, kinds=kinds, world=WORLDS["tiny"], size=128)
    scores = free_streaming(model, processor, rows)
    assert scores["event_f1"] >= 0.92 and scores["answer_accuracy"] >= 0.88 and scores["silent_frames_right"] >= 0.995
    forced = teacher_forced(model, processor, rows.select(range(20)))
    assert forced["reply_delay"] < 0.1 and forced["reply_fluency"] > 0.9 and forced["lm_ppl"] < 1.1
