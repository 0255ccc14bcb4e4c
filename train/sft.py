# Copyright 2026 The VideoLLM-MoD contributors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Supervised fine-tuning on streaming dialogues, with TRL.

```bash
# Your own video, with its subtitles as narration
python train/data/subtitles.py talk.mp4 --out talk.jsonl
python train/sft.py --dataset talk.jsonl --checkpoint space/checkpoint --tune_language_model full --output_dir out

# A new model of any vision encoder and language model, by VideoLLM-online's recipe
accelerate launch --config_file train/configs/ddp.yaml train/sft.py --dataset data \
    --vision_model google/siglip-large-patch16-384 --language_model meta-llama/Meta-Llama-3-8B-Instruct \
    --output_dir out

# A stage of the embedded checkpoint; train/recipe.py runs them all, from nothing
python train/sft.py --config train/configs/streamworld_alignment.yaml
```
"""

from pathlib import Path

from videollm_mod.train.arguments import ModelArguments, ScriptArguments, StreamingSFTConfig, parse
from videollm_mod.train.callbacks import Announcement, KeepRatioWarmup, TimeLimit
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.loading import first_rows, load_split
from videollm_mod.train.new_model import choose_parts, load_model, merge_adapter
from videollm_mod.train.trainer import StreamingSFTTrainer


def main(script: ScriptArguments, training: StreamingSFTConfig, arguments: ModelArguments) -> None:
    """Trains and saves."""
    # Data
    train = load_split(script, script.train_split, script.num_clips, script.first_seed)
    if script.eval_split and Path(script.dataset).is_file():
        raise SystemExit(
            f"--eval_split {script.eval_split}: '{script.dataset}' is one split. Give a folder with train.jsonl and "
            f"{script.eval_split}.jsonl."
        )
    evaluation = load_split(script, script.eval_split, script.num_eval_clips) if script.eval_split else None
    if script.validate_only:
        print(f"{script.dataset}: {len(train)} rows to train on, no fault found")
        return

    # Model and processor
    model, processor = load_model(arguments, seed=training.seed)
    adapter = choose_parts(model, arguments)

    # Training. Packing is the collator's: TRL's would need a data set of tokens.
    packing, training.packing = training.packing, False
    trainer = StreamingSFTTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=StreamCollator(
            processor, script.fps, augmentation=script.augmentation, seed=training.seed, packing=packing
        ),
        peft_config=adapter,
        stream_examples=[] if evaluation is None else first_rows(evaluation, script.num_streamed_clips),
        fps=script.fps,
        about={"dataset": script.dataset, "base_models": arguments.base_models()},
    )
    trainer.add_callback(Announcement())
    if training.max_minutes is not None:
        trainer.add_callback(TimeLimit(training.max_minutes))
    if script.keep_ratio_warmup_steps > 0:
        trainer.add_callback(KeepRatioWarmup(model.config, script.keep_ratio_warmup_steps))
    trainer.train(resume_from_checkpoint=training.last_checkpoint())
    if adapter is not None and arguments.merge_adapter:
        trainer.model = merge_adapter(trainer.accelerator.unwrap_model(trainer.model))
    trainer.save_model(training.output_dir)
    trainer.create_model_card()
    if training.push_to_hub:
        trainer.push_to_hub()


if __name__ == "__main__":
    main(*parse(ScriptArguments, StreamingSFTConfig, ModelArguments))
