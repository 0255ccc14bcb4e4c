# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of the training scripts: defaults, shipped configurations, data sources, and where a run resumes."""

import json
import sys
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from datasets import Dataset
from peft import get_peft_model
from tiny import tiny_model, tiny_processor
from transformers import TrainerState

from videollm_mod.routers_videollm_mod import ROUTERS
from videollm_mod.train import encode, pretrain_vision, sft
from videollm_mod.train.arguments import RowArguments, parse
from videollm_mod.train.data import sources
from videollm_mod.train.data.sources import DataSource
from videollm_mod.train.data.streamworld import StreamWorld
from videollm_mod.train.data.timed_messages import TimedMessages
from videollm_mod.train.evaluation import EvaluationArguments
from videollm_mod.train.new_model import choose_parts, load_model, plan_model
from videollm_mod.train.pretrain_vision import VisionArguments, VisionTrainingArguments
from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig


ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "train" / "configs"
UNLIMITED = ["--max_minutes", "5", "--lr_scheduler_type", "constant"]
SMALL = str(CONFIGS / "streamworld_model.json")
LAUNCH_CONFIGS = {"single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP"}
ZERO_STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
LAUNCH_CONFIGS |= dict.fromkeys(ZERO_STAGES, "DEEPSPEED")
# The paper's runs, which read prepared data.
PAPER_CONFIGS = ("coin", "ego4d_lta", "ego4d_narration", "ego_exo4d")


# ----------------------------------------------------------------------------------------------------------- defaults


def test_defaults_are_those_of_live(tmp_path):
    """arXiv 2406.11816, section 4."""
    training, model = StreamingSFTConfig(output_dir=str(tmp_path)), ModelArguments()
    assert (training.learning_rate, training.lr_scheduler_type, training.warmup_steps) == (2e-4, "cosine", 0.05)
    assert training.get_warmup_steps(1000) == 50
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 256, 0.05)
    adapted = tiny_model(text_overrides={"tie_word_embeddings": False})
    adapter = choose_parts(adapted, model)
    assert (adapter.r, adapter.lora_alpha, adapter.lora_dropout) == (128, 256, 0.05)
    assert adapter.modules_to_save == ["connector", "layers.1.router", "layers.3.router"]


def test_every_router_type_can_be_chosen():
    for name, router in ROUTERS.items():
        arguments = ModelArguments(checkpoint=str(ROOT), mod_router=name)
        # The embedded checkpoint has a router loss, which only routers with weights can learn from.
        expected = {"mod_router": name} | ({} if router.learns else {"mod_router_loss": None})
        assert arguments.config_fields() == expected
        assert plan_model(arguments)[0].mod_router_loss == ("gradient" if router.learns else None)
    without = ModelArguments(checkpoint=str(ROOT), mod_router_loss="none")
    assert plan_model(without)[0].mod_router_loss is None
    assert all(name in ModelArguments.__dataclass_fields__["mod_router"].metadata["help"] for name in ROUTERS)


@pytest.mark.parametrize(
    ("fields", "given", "loss"),
    [
        ({"mod_keep_ratio": 1.0}, {"mod_keep_ratio": 0.4}, "gradient"),
        ({"mod_layers": []}, {"mod_layers": "1,3"}, "gradient"),
        ({"mod_router": "change"}, {"mod_router": "learned"}, "gradient"),
        ({"mod_layers": []}, {"mod_layers": "1,3", "mod_router_loss": "none"}, None),
        ({"mod_layers": []}, {"mod_layers": "1,3", "mod_router": "uniform"}, None),
        ({"mod_layers": []}, {}, None),
        ({}, {}, None),
        ({}, {"mod_layers": "all"}, None),
    ],
)
def test_new_routers_learn_from_the_gradient_and_others_as_before(tmp_path, fields, given, loss, caplog):
    model = tiny_model(**fields)
    model.save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    arguments = ModelArguments(checkpoint=str(tmp_path), **given)
    assert plan_model(arguments)[0].mod_router_loss == loss
    assert load_model(arguments, seed=0)[0].config.mod_router_loss == loss
    assert ("--mod_router_loss none trains them as in the paper" in caplog.text) == (loss is not None)


def test_a_file_of_a_new_model_may_say_how_its_routers_learn(tmp_path):
    settings = json.loads((CONFIGS / "local_model.json").read_text(encoding="utf-8"))
    for stated, loss in (({}, "gradient"), ({"mod_router_loss": None}, None), ({"mod_layers": []}, None)):
        (tmp_path / "model.json").write_text(json.dumps(settings | {"model": settings["model"] | stated}))
        assert plan_model(ModelArguments(model_config=str(tmp_path / "model.json")))[0].mod_router_loss == loss


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"model_config": "nowhere.json"}, "--model_config nowhere.json: .*No such file"),
        ({"model_config": str(ROOT / "config.json")}, "config.json: it has no `model`: train/configs has files of"),
        ({"model_config": SMALL, "mod_router": "foo"}, "streamworld_model.json: `mod_router` is 'foo'; known names"),
        ({"model_config": SMALL, "mod_gate": "foo"}, "streamworld_model.json: `mod_gate` is 'foo'; known names"),
        (
            {"checkpoint": str(ROOT), "mod_router": "random", "mod_router_loss": "gradient"},
            "give --mod_router_loss none",
        ),
        ({"checkpoint": str(ROOT), "mod_gate": "foo"}, "--checkpoint .*: `mod_gate` is 'foo'; known names"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_in_one_line(given, reason, tmp_path):
    loads = [plan_model, partial(load_model, seed=0)]
    loads = [partial(load, ModelArguments(**given)) for load in loads]
    if len(given) == 1:
        arguments = VisionArguments(**given), VisionTrainingArguments(output_dir=str(tmp_path))
        loads.append(partial(pretrain_vision.main, *arguments))
    for load in loads:
        with pytest.raises(SystemExit, match=f"^error: .*{reason}") as refused:
            load()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("language_model", ["lora", "full", "frozen"])
@pytest.mark.parametrize("vision_encoder", [False, True])
@pytest.mark.parametrize("connector", [False, True])
@pytest.mark.parametrize("routers", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_chosen_parts_are_trained(language_model, vision_encoder, connector, routers, tied):
    model = tiny_model(text_overrides={"tie_word_embeddings": tied})
    whole = [name for name, _ in model.named_parameters()]
    arguments = ModelArguments(
        tune_language_model=language_model,
        tune_vision_encoder=vision_encoder,
        tune_connector=connector,
        tune_routers=routers,
        lora_r=2,
    )
    adapter = choose_parts(model, arguments)
    assert (adapter is not None) == (language_model == "lora")
    parts = {"vision_encoder": vision_encoder, "connector": connector}
    expected = {name for name in whole for part, tuned in parts.items() if tuned and name.startswith(f"model.{part}.")}
    expected |= {name for name in whole if routers and ".router." in name}
    language = {
        name for name in whole if name.startswith(("model.language_model.", "lm_head.")) and ".router." not in name
    }
    if language_model == "full":
        expected |= language
    elif language_model == "lora":
        # Every matrix of the layers and the head, but no norm and no embeddings, also where these are the head.
        linear = {name for name in language if name.endswith("_proj.weight") or name == "lm_head.weight"}
        assert len(linear) == 4 * 7 + (not tied)
        sides = ("lora_A", "lora_B")
        expected |= {name.replace(".weight", f".{side}.default.weight") for name in linear for side in sides}
        model = get_peft_model(model, adapter)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    plain = {name.removeprefix("base_model.model.").replace("modules_to_save.default.", "") for name in trained}
    assert plain == expected and len(plain) == len(trained)


# ----------------------------------------------------------------------------------------------------- configurations


@pytest.mark.parametrize(("name", "kind"), LAUNCH_CONFIGS.items())
def test_accelerate_reads_every_launch_file(name, kind):
    path = CONFIGS / f"{name}.yaml"
    config = load_config_from_file(str(path))
    assert type(config) is ClusterConfig and config.distributed_type == kind and config.mixed_precision == "bf16"
    # accelerate ignores unknown settings in these sections.
    known = vars(launch_command_parser().parse_args(["script.py"]))
    for setting in (*config.fsdp_config, *config.deepspeed_config):
        assert setting in known, setting
    assert config.deepspeed_config.get("zero_stage") == ZERO_STAGES.get(name)
    first, *lines = path.read_text(encoding="utf-8").splitlines()
    assert first.startswith("# Never run") == (kind == "DEEPSPEED")
    command = next(line for line in (first, *lines) if line.startswith("# accelerate launch"))
    assert f"--config_file train/configs/{name}.yaml" in command


def test_scripts_read_all_other_files(tmp_path, monkeypatch):
    # Each stage reads what the one before wrote.
    monkeypatch.chdir(tmp_path)
    for stage in ("vision", "alignment", "narration"):
        folder = tmp_path / "outputs" / "streamworld_cpu" / stage
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
    others = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem not in LAUNCH_CONFIGS]
    assert len(others) == 9 and len(list(CONFIGS.glob("*.yaml"))) == 9 + len(LAUNCH_CONFIGS)
    for path in others:
        vision = path.stem.endswith("_vision")
        types = [VisionArguments] if vision else [ScriptArguments, DataSource, ModelArguments]
        types.append(VisionTrainingArguments if vision else StreamingSFTConfig)
        monkeypatch.setattr(sys, "argv", ["script.py", "--config", str(path)])
        *_, training = parse(*types)
        folder = "" if path.stem in PAPER_CONFIGS else "local/" if "local" in path.stem else "streamworld_cpu/"
        assert training.output_dir.startswith(f"outputs/{folder}") and training.lr_scheduler_type == "cosine"


@pytest.mark.parametrize(
    ("name", "epochs", "rate"), [("coin", 5, 1e-4), ("ego4d_lta", 6, 2e-4), ("ego4d_narration", 2, 2e-4)]
)
def test_the_papers_runs_have_the_papers_settings(monkeypatch, name, epochs, rate):
    """VideoLLM-online, section 4 and its scripts; VideoLLM-MoD, section 4."""
    monkeypatch.setattr(sys, "argv", ["sft.py", "--config", str(CONFIGS / f"{name}.yaml")])
    script, source, training, model = parse(ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments)
    assert source.dataset == f"prepared/{name}" and (script.fps, script.max_frames) == (2.0, 1200)
    assert (training.num_train_epochs, training.learning_rate, training.warmup_steps) == (epochs, rate, 0.05)
    assert (training.optim, training.bf16, training.gradient_checkpointing) == ("adamw_torch", True, True)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * script.num_gpus == 64
    assert (model.lora_r, model.lora_alpha, model.lora_dropout) == (128, 256, 0.05)
    assert model.tune_connector and model.tune_routers and not model.tune_vision_encoder
    routing = {"mod_layers": "interleaved", "mod_keep_ratio": 0.2, "mod_router_loss": None}
    assert model.config_fields() == {**routing, "stream_loss_weight": 1.0}
    assert model.grid() == {"frame_token_pooled": [3, 3]}


# ------------------------------------------------------------------------------------------------------- data sources


def parse_data(monkeypatch, *arguments, **defaults):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    return parse(ScriptArguments, DataSource, **defaults)[1]


def test_each_source_has_its_own_options(monkeypatch, tmp_path):
    source = parse_data(monkeypatch, "--dataset", "streamworld", "--world", "tiny", "--frame_size", 32)
    assert source == StreamWorld("streamworld", world="tiny", frame_size=32)
    assert parse_data(monkeypatch, "--dataset=talk.jsonl", "--fps", 1) == TimedMessages("talk.jsonl")
    assert parse_data(monkeypatch, "--world", "small", dataset="streamworld").world == "small"
    config = tmp_path / "config.yaml"
    config.write_text("dataset: streamworld\nkinds: ask=1\nnum_clips: 3\n")
    assert parse_data(monkeypatch, "--config", config) == StreamWorld("streamworld", kinds="ask=1")
    # The command line wins over the file.
    config.write_text("dataset: streamworld\nnum_clips: 3\n")
    assert parse_data(monkeypatch, "--config", config, "--dataset", "talk.jsonl") == TimedMessages("talk.jsonl")


def test_an_option_of_another_source_is_refused(monkeypatch, tmp_path):
    message = "error: --world is an option of --dataset streamworld; leave it out for other data."
    for option in (["--world", "tiny"], ["--world=tiny"]):
        with pytest.raises(SystemExit, match=message):
            parse_data(monkeypatch, "--dataset", "talk.jsonl", *option)
    config = tmp_path / "config.yaml"
    config.write_text("dataset: talk.jsonl\nworld: tiny\n")
    with pytest.raises(SystemExit, match=message):
        parse_data(monkeypatch, "--config", config)
    with pytest.raises(SystemExit, match="are not used by .*'--worlds'"):
        parse_data(monkeypatch, "--dataset", "streamworld", "--worlds", "tiny")


def test_help_lists_the_options_of_the_chosen_source(monkeypatch, capsys):
    for arguments, is_listed in (([], False), (["--dataset", "streamworld"], True), (["--dataset", "a"], False)):
        with pytest.raises(SystemExit, match="0"):
            parse_data(monkeypatch, "--help", *arguments)
        shown = capsys.readouterr().out
        assert "--dataset" in shown and ("--frame_size" in shown) == is_listed


def test_a_script_without_a_data_set_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        parse_data(monkeypatch)
    assert "required: --dataset" in capsys.readouterr().err


def test_the_evaluation_script_reads_its_options_by_their_python_names(monkeypatch):
    command = "--checkpoint . --world tiny --kinds ask=1 --interval_threshold 0.9 --cache_dtype fp8 --weights int8"
    monkeypatch.setattr(sys, "argv", ["evaluation.py", *command.split()])
    monkeypatch.chdir(ROOT)
    source, arguments = parse(DataSource, EvaluationArguments, dataset="streamworld")
    assert source == StreamWorld("streamworld", world="tiny", kinds="ask=1")
    assert source.title("test") == "StreamWorld, tiny" and source.title("ood") == "StreamWorld, ood"
    options = {"fps": 2.0, "tolerance": 0.5, "delay_window": 5.0, "batch_size": 8, "max_new_tokens": 100}
    options |= {"interval_threshold": 0.9, "weights": "int8", "cache_dtype": torch.float8_e4m3fn}
    options |= {"similarity": "token_f1"}
    assert arguments.options() == options


def test_the_model_sees_all_frames_of_generated_clips(monkeypatch):
    """At another rate, replies would be learned and measured at frames that do not show the events."""
    for given, rate in (
        (["--dataset", "streamworld"], 2.0),
        (["--dataset", "doomworld"], 4.0),
        (["--dataset", "doomworld", "--frame_rate", "2"], 2.0),
        (["--dataset", "talk.jsonl"], 2.0),
        (["--dataset", "talk.jsonl", "--fps", "4"], 4.0),
        (["--dataset", "streamworld", "--fps=1"], 1.0),
    ):
        monkeypatch.setattr(sys, "argv", ["sft.py", *given])
        assert parse(ScriptArguments, DataSource)[0].fps == rate, given
        monkeypatch.setattr(sys, "argv", ["evaluation.py", *given, "--checkpoint", str(ROOT)])
        assert parse(DataSource, EvaluationArguments)[1].fps == rate, given
    with pytest.raises(SystemExit, match="streamworld: its clips have 2 frames per second, and --fps is 1: leave"):
        sft.main(ScriptArguments(fps=1.0), StreamWorld("streamworld"), None, None)


def test_a_new_source_is_one_line_in_the_registry(monkeypatch, capsys):
    """The script loads its rows with its own option."""

    @dataclass
    class Counting(DataSource):
        upto: int = 3

        def load(self, split, *, num_clips, first_clip=0):
            if self.upto < 1:
                raise ValueError("`upto` must be at least 1.")
            told = [f"{split} {row % self.upto}" for row in range(first_clip, first_clip + num_clips)]
            messages = [[{"role": "assistant", "content": text, "time": 0.5}] for text in told]
            return Dataset.from_dict({"messages": messages, "video": [np.zeros((2, 4, 4, 3))] * num_clips})

    monkeypatch.setitem(sources.SOURCES, "counting", Counting)
    command = ["sft.py", "--dataset", "counting", "--upto", "5", "--num_clips", "7", "--validate_only"]
    monkeypatch.setattr(sys, "argv", command)
    sft.main(*parse(ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments))
    said = capsys.readouterr().out
    assert "counting: 7 rows to train on, no fault found\n7 windows, 14 frames, 0.00 hours of video" in said
    monkeypatch.setattr(sys, "argv", ["encode.py", *command[1:], "--checkpoint", str(ROOT), "--output_dir", "unused"])
    encode.main(*parse(RowArguments, DataSource, encode.EncodeArguments))
    assert "counting: 7 rows to encode, no fault found" in capsys.readouterr().out and not Path("unused").exists()
    monkeypatch.setattr(sys, "argv", ["sft.py", "--dataset", "counting", "--upto", "0", "--validate_only"])
    with pytest.raises(SystemExit, match="--dataset counting: `upto` must be at least 1."):
        sft.main(*parse(ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments))
    with pytest.raises(SystemExit, match="--upto is an option of --dataset counting"):
        parse_data(monkeypatch, "--dataset", "streamworld", "--upto", 5)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], None),
        (["--validate_only"], "quick"),
        (["--validate_only", "full"], "full"),
        (["--validate_only", "quick", "--skip_faulty"], "quick"),
        (["--validate_only", "--fps", "4"], "quick"),
        (["--validate-only=full"], "full"),
        (["--validate_only", "true"], "quick"),
        (["--validate_only", "false"], None),
        ("validate_only: true\nskip_faulty: true", "quick"),
        ("validate_only: full", "full"),
    ],
)
def test_how_much_to_check_is_optional(tmp_path, monkeypatch, given, expected):
    if isinstance(given, str):
        (tmp_path / "config.yaml").write_text(given)
        given = ["--config", str(tmp_path / "config.yaml")]
    monkeypatch.setattr(sys, "argv", ["sft.py", "--dataset", "data.jsonl", *given])
    script, _ = parse(ScriptArguments, DataSource)
    assert script.validate_only == expected


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (ScriptArguments, ["--num_gpus", "0"], "--num_gpus must be a whole number, at least 1, got 0"),
        (ScriptArguments, ["--utilization", "0"], "--utilization must be a positive number, got 0"),
        (ScriptArguments, ["--utilization", "1.5"], "--utilization must be a positive number, at most 1, got 1.5"),
        (ScriptArguments, ["--utilization", "nan"], "--utilization must be a positive number"),
        (ScriptArguments, ["--window_replies", "-1"], "--window_replies must be a whole number, at least 0, got -1"),
        (ScriptArguments, ["--num_clips", "0"], "--num_clips must be a whole number, at least 1, got 0"),
        (ScriptArguments, ["--num_clips", "-1"], "--num_clips must be a whole number, at least 1, got -1"),
        (ScriptArguments, ["--first_clip", "-1"], "--first_clip must be a whole number, at least 0, got -1"),
        (ScriptArguments, ["--fps", "nan"], "--fps must be a positive number of frames per second"),
        (ScriptArguments, ["--num_eval_clips", "0"], "--num_eval_clips must be a whole number, at least 1, got 0"),
        (ScriptArguments, ["--num_streamed_clips", "-1"], "--num_streamed_clips must be a whole number, at least 0"),
        (ScriptArguments, ["--shuffle_buffer", "-1"], "--shuffle_buffer must be a whole number, at least 0"),
        (ScriptArguments, ["--augmentation", "2"], "--augmentation must be a finite number, at least 0 and at most 1"),
        (ScriptArguments, ["--keep_ratio_warmup_steps", "-1"], "--keep_ratio_warmup_steps must be a whole number"),
        (ScriptArguments, ["--keep_ratio_hold_steps", "-1"], "--keep_ratio_hold_steps must be a whole number"),
        (ModelArguments, ["--lora_r", "0"], "--lora_r must be a whole number, at least 1, got 0"),
        (ModelArguments, ["--lora_alpha", "0"], "--lora_alpha must be a positive number, got 0"),
        (ModelArguments, ["--lora_dropout", "2"], "--lora_dropout must be a finite number, at least 0 and at most 1"),
        (StreamingSFTConfig, ["--max_minutes", "0"], "--max_minutes must be a positive number, got 0"),
        (StreamingSFTConfig, ["--router_learning_rate", "-1"], "--router_learning_rate must be a finite number, at"),
        (StreamingSFTConfig, ["--padding_free", "true"], "--padding_free does not work, .* use --packing true"),
        (StreamingSFTConfig, ["--train_sampling_strategy", "group_by_length"], "--train_sampling_strategy group_by_l"),
        (
            StreamingSFTConfig,
            UNLIMITED,
            "--max_minutes with --lr_scheduler_type constant: A time limit needs a learning",
        ),
        (VisionTrainingArguments, UNLIMITED, "--max_minutes with --lr_scheduler_type constant: A time limit needs a"),
        (VisionTrainingArguments, ["--max_minutes", "0"], "--max_minutes must be a positive number, got 0"),
        (encode.EncodeArguments, ["--max_minutes", "-1"], "--max_minutes must be a finite number, at least 0"),
        (EvaluationArguments, ["--num_clips", "0"], "--num_clips must be a whole number, at least 1, got 0"),
        (EvaluationArguments, ["--batch_size", "0"], "--batch_size must be a whole number, at least 1, got 0"),
        (EvaluationArguments, ["--max_new_tokens", "0"], "--max_new_tokens must be a whole number, at least 1, got 0"),
        (EvaluationArguments, ["--tolerance", "-1"], "--tolerance must be a finite number of seconds, at least 0"),
        (EvaluationArguments, ["--delay_window", "nan"], "--delay_window must be a finite number of seconds"),
        (EvaluationArguments, ["--interval_threshold", "nan"], "--interval_threshold must be a finite number"),
        (encode.EncodeArguments, ["--batch_size", "0"], "--batch_size must be a whole number, at least 1, got 0"),
    ],
)
def test_numbers_without_a_meaning_are_refused(monkeypatch, tmp_path, kind, given, message):
    options = {option.name for option in fields(kind)}
    needed = ["--checkpoint", str(Path(__file__).parents[1])] if "checkpoint" in options else []
    needed += ["--output_dir", str(tmp_path)] if "output_dir" in options else []
    monkeypatch.setattr(sys, "argv", ["script.py", *needed, *given])
    with pytest.raises(SystemExit, match=f"^error: {message}"):
        parse(kind)


@pytest.mark.parametrize(
    ("text", "message"),
    [("fps: [1", "while parsing .*config.yaml"), (None, "Is a directory: .*config.yaml"), ("- fps", "YAML mapping")],
)
def test_a_configuration_that_cannot_be_read_is_one_line(monkeypatch, tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.mkdir() if text is None else path.write_text(text)
    monkeypatch.setattr(sys, "argv", ["sft.py", "--dataset", "data.jsonl", "--config", str(path)])
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        parse(ScriptArguments, DataSource)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_that_would_limit_nothing_is_refused(length):
    with pytest.raises(SystemExit, match=f"^error: --max_length must be at least 1, got {length}\\.$"):
        ScriptArguments().windows(None, None, max_length=length)


def test_other_checks_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sft.py", "--dataset", "data.jsonl", "--validate_only", "all"])
    with pytest.raises(SystemExit, match="error: --validate_only is quick or full, got 'all'"):
        parse(ScriptArguments, DataSource)


# --------------------------------------------------------------------------------------------------------- resuming


def write_checkpoint(folder, step, *, random_states):
    """Write the files that mark a checkpoint as complete."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in random_states:
        torch.save({"cpu": torch.random.get_rng_state()}, path / f"rng_state{name}.pth")
    TrainerState(global_step=step).save_to_json(str(path / "trainer_state.json"))
    return path


def resume(folder, asked, processes, monkeypatch):
    monkeypatch.setattr(StreamingSFTConfig, "world_size", processes)
    return StreamingSFTConfig(output_dir=str(folder), resume_from_checkpoint=str(asked)).last_checkpoint()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-50])


ALONE, FOUR = [""], ["_0", "_1", "_2", "_3"]


@pytest.mark.parametrize(
    ("processes", "whole", "half"),
    [(1, ALONE, []), (2, FOUR[:2], FOUR[:1]), (2, FOUR[:2], []), (4, FOUR, FOUR[:2]), (4, FOUR, ["_0", "_1", "_3"])],
)
def test_a_checkpoint_is_complete_with_the_random_states_of_every_process(
    tmp_path, monkeypatch, capsys, processes, whole, half
):
    first, second = (write_checkpoint(tmp_path, step, random_states=whole) for step in (9, 10))
    assert resume(tmp_path, "true", processes, monkeypatch) == str(second)
    assert resume(tmp_path, second, processes, monkeypatch) == str(second)
    assert capsys.readouterr().out == ""
    last = write_checkpoint(tmp_path, 11, random_states=half)
    assert resume(tmp_path, "true", processes, monkeypatch) == str(second)
    assert f"'{last}', which is incomplete" in capsys.readouterr().out
    truncate(second / f"rng_state{whole[-1]}.pth")
    assert resume(tmp_path, "true", processes, monkeypatch) == str(first)
    truncate(first / "trainer_state.json")
    (second / "trainer_state.json").unlink()
    if half == FOUR[:2]:
        with pytest.raises(SystemExit, match=rf"give --resume_from_checkpoint {last}. To start at step 0, "):
            resume(tmp_path, "true", processes, monkeypatch)
    else:
        assert resume(tmp_path, "true", processes, monkeypatch) is None
        assert "has no complete checkpoint: training starts at step 0" in capsys.readouterr().out


def test_other_folders_are_no_checkpoints_to_resume(tmp_path, monkeypatch):
    last = write_checkpoint(tmp_path, 100, random_states=ALONE)
    for name in ("best", "500-backup", "-7"):
        write_checkpoint(tmp_path, name, random_states=ALONE)
    assert resume(tmp_path, "true", 1, monkeypatch) == str(last)


def test_a_named_incomplete_checkpoint_is_refused(tmp_path, monkeypatch):
    path = write_checkpoint(tmp_path, 2, random_states=["_0"])
    fault = (
        f"checkpoint {path}: its rng_state_N.pth of a process N is missing or truncated. Name a complete checkpoint"
    )
    with pytest.raises(SystemExit, match=fault):
        resume(tmp_path, path, 2, monkeypatch)
    with pytest.raises(SystemExit, match=r"its rng_state.pth is missing or truncated"):
        resume(tmp_path, path, 1, monkeypatch)
    for name, pickled in (("model", "pytorch_model.bin"), ("adapter_model", "adapter_model.bin")):
        (path / pickled).touch()
        with pytest.raises(SystemExit, match=rf"its weights are pickled \({pickled}\)"):
            resume(tmp_path, path, 1, monkeypatch)
        (path / f"{name}.safetensors").touch()
    truncate(path / "trainer_state.json")
    for wrong in (path, tmp_path / "none"):
        with pytest.raises(SystemExit, match=r"its trainer_state.json is missing or truncated"):
            resume(tmp_path, wrong, 2, monkeypatch)


@pytest.mark.parametrize("name", ["global_step2/mp_rank_00_model_states.pt", "optimizer_0/.metadata"])
def test_what_is_unpickled_is_of_the_run_itself(tmp_path, monkeypatch, name):
    """DeepSpeed and sharded FSDP unpickle such files. PyTorch reads `optimizer.pt` without running code."""
    elsewhere = write_checkpoint(tmp_path / "other", 2, random_states=ALONE)
    (elsewhere / "optimizer.pt").touch()
    assert resume(tmp_path / "run", elsewhere, 1, monkeypatch) == str(elsewhere)
    (elsewhere / name).parent.mkdir()
    (elsewhere / name).touch()
    with pytest.raises(SystemExit, match=rf"{elsewhere}: {name} is unpickled, .* Move the checkpoint there") as error:
        resume(tmp_path / "run", elsewhere, 1, monkeypatch)
    assert "\n" not in str(error.value)
    assert resume(tmp_path / "other", elsewhere, 1, monkeypatch) == str(elsewhere)


@pytest.mark.parametrize(
    ("written", "processes"), [(ALONE, 2), (FOUR, 1), (FOUR, 2), ([*FOUR, ""], 2), ([*FOUR[:2], ""], 4)]
)
def test_training_resumes_from_another_number_of_processes(tmp_path, monkeypatch, capsys, written, processes):
    path = write_checkpoint(tmp_path, 2, random_states=written)
    assert resume(tmp_path, path, processes, monkeypatch) == str(path)
    count = max(len([name for name in written if name]), 1)
    assert f"comes from {count} processes, and this run has {processes}" in capsys.readouterr().out
    if count == 1 or count > processes:
        assert resume(tmp_path, "true", processes, monkeypatch) == str(path)


@pytest.mark.parametrize("asked", [None, "false"])
def test_training_starts_at_step_0_by_default(tmp_path, asked):
    write_checkpoint(tmp_path, 2, random_states=ALONE)
    assert StreamingSFTConfig(output_dir=str(tmp_path), resume_from_checkpoint=asked).last_checkpoint() is None
