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

# A small model that learns to see and to narrate from nothing
python train/sft.py --config train/configs/shapes_alignment.yaml
```
"""

from typing import Any

from transformers import AutoProcessor, BitsAndBytesConfig
from trl import TrlParser

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.train.arguments import ModelArguments, ScriptArguments, StreamingSFTConfig
from videollm_mod.train.callbacks import KeepRatioWarmup
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.loading import load_split
from videollm_mod.train.new_model import model_from_parts, new_model
from videollm_mod.train.trainer import StreamingSFTTrainer


def main(script: ScriptArguments, training: StreamingSFTConfig, arguments: ModelArguments) -> None:
    """Trains and saves."""
    # Data
    train = load_split(script, script.train_split, script.num_clips, script.first_seed)
    evaluation = load_split(script, script.eval_split, script.num_eval_clips) if script.eval_split else None
    if script.validate_only:
        print(f"{script.dataset}: {len(train)} rows to train on, no fault found")
        return

    # Model and processor
    model, processor = load_model(arguments, seed=training.seed)
    adapter = choose_parts(model, arguments)

    # Training
    trainer = StreamingSFTTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        processing_class=processor,
        data_collator=StreamCollator(
            processor, script.fps, augmentation=script.augmentation, seed=training.seed + training.process_index
        ),
        peft_config=adapter,
    )
    if script.keep_ratio_warmup_steps > 0:
        trainer.add_callback(KeepRatioWarmup(model.config, script.keep_ratio_warmup_steps))
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if adapter is not None and arguments.merge_adapter:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    trainer.save_model(training.output_dir)
    if training.push_to_hub:
        trainer.push_to_hub()


def load_model(arguments: ModelArguments, *, seed: int) -> tuple[VideoLLMMoDForConditionalGeneration, Any]:
    """The model to train and its processor."""
    parts = arguments.vision_model is not None and arguments.language_model is not None
    given = [arguments.checkpoint is not None, arguments.model_config is not None, parts]
    if sum(given) != 1:
        raise SystemExit("Give exactly one of --checkpoint, --model_config, and --vision_model with --language_model.")
    if arguments.load_in_4bit and arguments.checkpoint is None:
        raise SystemExit("--load_in_4bit needs a --checkpoint: save the new model first, with --max_steps 0.")
    options: dict[str, Any] = arguments.config_fields()
    if arguments.model_config is not None:
        model, processor = new_model(arguments.model_config, seed=seed, **options)
    elif parts:
        options["frame_token_pooled"] = arguments.frame_token_pooled
        model, processor = model_from_parts(
            arguments.vision_model, arguments.language_model, seed=seed, dtype=arguments.dtype, **options
        )
    else:
        if arguments.load_in_4bit:
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_compute_dtype="bfloat16",
                llm_int8_skip_modules=["lm_head", "connector", "vision_encoder", "routers"],
            )
        model = VideoLLMMoDForConditionalGeneration.from_pretrained(
            arguments.checkpoint, dtype=arguments.dtype, **options
        )
        processor = AutoProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    if arguments.attn_implementation is not None:
        model.set_attn_implementation(arguments.attn_implementation)
    return model, processor


def choose_parts(model: VideoLLMMoDForConditionalGeneration, arguments: ModelArguments) -> Any | None:
    """Freezes what is not trained; returns the adapter's configuration if the language model gets one."""
    tuned = {
        "vision_encoder": arguments.tune_vision_encoder,
        "connector": arguments.tune_connector,
        "language_model": arguments.tune_language_model == "full",
        "routers": arguments.tune_routers,
    }
    for name, is_tuned in tuned.items():
        getattr(model.model, name).requires_grad_(is_tuned)
    model.lm_head.requires_grad_(tuned["language_model"])
    if arguments.tune_language_model != "lora":
        return None
    saved = [name for name in ("vision_encoder", "connector") if tuned[name]]
    saved += [f"routers.{layer}" for layer in model.model.routers] if tuned["routers"] else []
    return model.make_lora_config(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        modules_to_save=saved or None,
        # TRL reads the head's weight itself and would never train an adapter on it: it refuses one.
        exclude_modules=r"(.*\.)?lm_head",
    )


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, StreamingSFTConfig, ModelArguments)).parse_args_and_config())
