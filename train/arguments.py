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
"""Arguments of the training script."""

from dataclasses import dataclass, field

from videollm_mod.train.data.shapes import DATASETS


@dataclass
class ScriptArguments:
    """
    What to train on.

    Args:
        dataset (`str`): `"shapes_alignment"`, `"shapes_narration"`, `"shapes_mixed"` or `"shapes_pairs"`, all
            generated.
        num_clips (`int`, *optional*, defaults to 1000): How many clips to generate.
        first_seed (`int`, *optional*, defaults to 0): Seed of the first clip.
    """

    dataset: str = field(
        metadata={"help": "What to train on.", "choices": list(DATASETS)},
    )
    num_clips: int = field(default=1000, metadata={"help": "How many clips to generate."})
    first_seed: int = field(default=0, metadata={"help": "Seed of the first clip; the next have the next."})


@dataclass
class ModelArguments:
    """
    What to train.

    Args:
        checkpoint (`str`, *optional*): A checkpoint of ours to go on from, a folder or a Hub id.
        model_config (`str`, *optional*): JSON file of a new model, in place of `checkpoint`.
    """

    checkpoint: str | None = field(default=None, metadata={"help": "Checkpoint to go on from: a folder or a Hub id."})
    model_config: str | None = field(default=None, metadata={"help": "JSON file of a new model, in its place."})
