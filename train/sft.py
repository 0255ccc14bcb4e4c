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

A new small model learns to see, from descriptions of every frame, then to narrate (two cores of a CPU, about an hour):

```bash
python train/sft.py --config train/configs/shapes_alignment.yaml
python train/sft.py --config train/configs/shapes_narration.yaml
```
"""

from transformers import AutoProcessor
from trl import SFTConfig, SFTTrainer, TrlParser

from videollm_mod import VideoLLMMoDForConditionalGeneration
from videollm_mod.train.arguments import ModelArguments, ScriptArguments
from videollm_mod.train.collator import StreamCollator
from videollm_mod.train.data.shapes import shapes_dataset
from videollm_mod.train.new_model import new_model


def main(script: ScriptArguments, training: SFTConfig, arguments: ModelArguments) -> None:
    """Trains and saves."""
    # Model and processor
    if (arguments.checkpoint is None) == (arguments.model_config is None):
        raise SystemExit("Give exactly one of --checkpoint and --model_config.")
    if arguments.checkpoint is not None:
        model = VideoLLMMoDForConditionalGeneration.from_pretrained(arguments.checkpoint)
        processor = AutoProcessor.from_pretrained(arguments.checkpoint, trust_remote_code=True)
    else:
        model, processor = new_model(arguments.model_config, seed=training.seed)

    # Data
    dataset = shapes_dataset(script.dataset, num_clips=script.num_clips, first_seed=script.first_seed)

    # Training
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    training.remove_unused_columns = False
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=dataset,
        processing_class=processor,
        data_collator=StreamCollator(processor),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    main(*TrlParser((ScriptArguments, SFTConfig, ModelArguments)).parse_args_and_config())
