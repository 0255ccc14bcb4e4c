# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Supervised fine-tuning on streaming dialogues, with TRL.

```bash
# Your own video, with its subtitles as narration
python train/data/subtitles.py talk.mp4 --out talk.jsonl
python train/sft.py --dataset talk.jsonl --checkpoint . --tune_language_model full --output_dir out

# A new model from any vision encoder and language model, with VideoLLM-online's recipe
accelerate launch --config_file train/configs/ddp.yaml train/sft.py --dataset data \
    --vision_model google/siglip-large-patch16-384 --language_model meta-llama/Meta-Llama-3-8B-Instruct \
    --output_dir out

# One stage of the embedded checkpoint; train/recipe.py runs all stages
python train/sft.py --config train/configs/streamworld_alignment.yaml
```
"""

from pathlib import Path
from typing import Any

from videollm_mod.console import quiet

from videollm_mod.train.arguments import run
from videollm_mod.train.callbacks import Announcement, KeepRatioWarmup, TimeLimit
from videollm_mod.train.collator import EpochTeller, StreamCollator
from videollm_mod.train.data.faults import RowRecord, counted, row_record
from videollm_mod.train.data.sources import DataSource, first_rows, load_split
from videollm_mod.train.data.streamed import (
    RowCounter,
    RowOrder,
    check_stream,
    open_stream,
    repeat_rows,
    rows_before,
)
from videollm_mod.train.data.windows import parts_of, split_rows
from videollm_mod.train.dry_run import plan_run, plan_windows
from videollm_mod.train.new_model import choose_parts, load_model, merge_adapter
from videollm_mod.train.sft_arguments import ModelArguments, ScriptArguments, StreamingSFTConfig
from videollm_mod.train.trainer import StreamingSFTTrainer


def main(script: ScriptArguments, source: DataSource, training: StreamingSFTConfig, arguments: ModelArguments) -> None:
    """Train a model and save it."""
    with row_record() as record:
        train_model(script, source, training, arguments, record)


def train_model(
    script: ScriptArguments,
    source: DataSource,
    training: StreamingSFTConfig,
    arguments: ModelArguments,
    record: RowRecord,
) -> None:
    """Train a model and save it. The record names the rows that each worker reads and that were left out."""
    if script.streaming and script.dry_run:
        raise SystemExit("error: --dry_run counts rows that --streaming does not know: leave --streaming out.")
    if script.streaming and script.validate_only:
        _, windows = plan_windows(script, training, arguments)
        total = check_stream(source, script.train_split, **script.checks(record), windows=windows)
        print(f"{source.dataset}: {counted(total, 'row')} to train on, {record.count_faults()}")
        return
    train, evaluation, spare = _load_rows(script, source, record)
    if script.validate_only or script.dry_run:
        # A text that fits into no window is a fault too, which only this finds.
        before = len(record.left_out())
        lines = list(plan_run(train, script, training, arguments, record))
        total = len(train) - (len(record.left_out()) - before)
        print(f"{source.dataset}: {counted(total, 'row')} to train on, {record.count_faults()}")
        for line in lines:
            print(line)
        return
    if script.streaming and training.max_steps < 0:
        raise SystemExit("error: --streaming needs --max_steps, because the number of rows is unknown.")
    if evaluation is None and training.eval_strategy != "no":
        raise SystemExit(
            f"error: --eval_strategy {training.eval_strategy.value} needs --eval_split, the held-out split."
        )
    if training.n_gpu > 1:
        raise SystemExit(
            f"error: this machine has {training.n_gpu} GPUs, and one process trains on one. To use all, run "
            "`accelerate launch train/sft.py ...`; to use one, set `CUDA_VISIBLE_DEVICES=0`."
        )
    if arguments.load_in_4bit and not (training.bf16 or training.fp16):
        raise SystemExit("error: --load_in_4bit computes in bfloat16: add --bf16 true.")

    # Model and processor
    checkpoint = training.last_checkpoint()
    model, processor = load_model(arguments, seed=training.seed)
    model.config.speak = "learned"  # The loss at frames teaches when to speak.
    adapter = choose_parts(model, arguments)
    if adapter is None and training.max_steps != 0 and not any(w.requires_grad for w in model.parameters()):
        raise SystemExit(
            "error: no weight would learn: choose parts with --tune_language_model, --tune_connector, ..."
        )

    # Data. A session has no limit, so the rows that the model streams freely are not split.
    windows = script.windows(model.config, processor, max_length=training.max_length)
    streamed = [] if evaluation is None else first_rows(evaluation, script.num_streamed_clips)
    left_out = record if script.skip_faulty else None
    counter = None
    if script.streaming:
        counter = RowCounter(rows_before(checkpoint))
        order = _order(script, training, counter.num_rows)
        train = repeat_rows(train, order, windows=windows, left_out=left_out)
        spare = [part for row in spare for part in parts_of(row, windows)]
        # The stream itself begins where the checkpoint ends.
        training.ignore_data_skip = True
    else:
        longest = source.longest_row_of(script.train_split)
        train = spare = split_rows(train, windows, longest_row=longest, left_out=left_out)
        if len(train) == 0:
            raise SystemExit(
                f"error: --dataset {source.dataset}: the split '{script.train_split}' has no row to learn."
            )
    if evaluation is not None:
        longest = source.longest_row_of(script.eval_split)
        evaluation = split_rows(evaluation, windows, longest_row=longest, left_out=left_out)

    # Training. The collator packs, because TRL can only pack a data set of tokens.
    packing, training.packing = training.packing, False
    collator = StreamCollator(
        processor,
        script.fps,
        augmentation=script.augmentation,
        seed=training.seed,
        packing=packing,
        record=record,
        replacements=spare if script.skip_faulty else None,
        frame_feature_shape=model.config.frame_feature_shape,
    )
    try:
        trainer = StreamingSFTTrainer(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=processor,
            data_collator=collator,
            peft_config=adapter,
            stream_examples=streamed,
            fps=script.fps,
            router_learning_rate=training.router_learning_rate,
            about={"dataset": source.dataset, "base_models": arguments.base_models()},
        )
    except ValueError as error:  # options that do not go together
        raise SystemExit(f"error: {error}") from None
    if counter is not None:
        trainer.add_callback(counter)
    trainer.add_callback(Announcement())
    trainer.add_callback(EpochTeller(collator))
    if training.max_minutes is not None:
        trainer.add_callback(TimeLimit(training.max_minutes))
    if (warmup := (script.keep_ratio_warmup_steps, script.keep_ratio_hold_steps)) != (0, 0):
        trainer.add_callback(KeepRatioWarmup(model.config, *warmup))
    # With max_steps=0 the trainer would still run one step.
    if training.max_steps != 0:
        trainer.train(resume_from_checkpoint=checkpoint)
    if adapter is not None and arguments.merge_adapter:
        merge_for_saving(trainer)
    if training.push_to_hub:
        trainer.push_to_hub()  # This also saves the model and its card.
    else:
        trainer.create_model_card()
        trainer.save_model(training.output_dir)  # Its last file marks the folder as complete.
    if trainer.is_world_process_zero():
        print(f"saved to {training.output_dir}")


def _order(script: ScriptArguments, training: StreamingSFTConfig, first_row: int) -> RowOrder:
    return RowOrder(
        batch_size=training.train_batch_size,
        first_row=first_row,
        num_processes=training.world_size,
        num_workers=training.dataloader_num_workers,
        seed=training.seed if training.data_seed is None else training.data_seed,
        buffer_size=script.shuffle_buffer,
    )


def _load_rows(script: ScriptArguments, source: DataSource, record: RowRecord) -> tuple[Any, Any, Any]:
    """Return the rows to train on, those to evaluate on or `None`, and those that may replace rows of a stream."""
    if script.eval_split and Path(source.dataset).is_file():
        raise SystemExit(
            f"--eval_split {script.eval_split}: '{source.dataset}' is one split. Give a folder with train.jsonl and "
            f"{script.eval_split}.jsonl."
        )
    if script.eval_split == script.train_split:
        raise SystemExit(f"--eval_split {script.eval_split}: this is the training split. Name a held-out split.")
    if script.streaming:
        train, spare = open_stream(source, script.train_split, fps=script.fps, may_replace=script.skip_faulty)
    else:
        spare = []
        train = load_split(source, script.train_split, script.num_clips, script.first_clip, **script.checks(record))
    if not script.eval_split:
        return train, None, spare
    # All measures of an evaluation are of the same rows.
    checks = script.checks(record, decode=True)
    return train, load_split(source, script.eval_split, script.num_eval_clips, **checks), spare


def merge_for_saving(trainer: StreamingSFTTrainer) -> None:
    """
    Merge the adapter, so that `save_model` writes complete weights.

    If ZeRO-3 shards the weights, keep the adapter and print how to merge it later.
    """
    plugin = trainer.accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        if trainer.is_world_process_zero():
            folder = trainer.args.output_dir
            print(
                f"ZeRO-3 shards the weights, so '{folder}' gets only the adapter. To merge it, first write its base "
                "model in one process, with the same arguments but --max_steps 0 and another --output_dir. Load that "
                f"model with AutoModel, and save `PeftModel.from_pretrained(model, '{folder}').merge_and_unload()`."
            )
        return
    trainer.model = merge_adapter(trainer.accelerator.unwrap_model(trainer.model))
    # With DeepSpeed the trainer would save the weights of its engine, under the adapter's names. Below stage 3 each
    # process has all weights, so the model can be saved as without DeepSpeed.
    trainer.is_deepspeed_enabled = False


if __name__ == "__main__":
    quiet()
    run(main, ScriptArguments, DataSource, StreamingSFTConfig, ModelArguments)
