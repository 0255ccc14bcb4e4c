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
Runs `train/sft.py` under FSDP2 on CPU processes. accelerate shards on accelerators only, and takes the CPU's processes
for plain DDP; told that they are GPUs, it shards them all the same. In the end each process must find the weights
whole, and no process group.
"""

import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file


original = PartialState.__init__


def init(self, *args, **kwargs):
    """As the original, with another name for the kind of processes."""
    original(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
runpy.run_path("train/sft.py", run_name="__main__")
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
# A file that is not whole cannot be opened, and there is none before this run.
assert load_file(folder / "model.safetensors"), f"'{folder}' has no weights"
assert not torch.distributed.is_initialized(), "the script left its process group behind"
