# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
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
