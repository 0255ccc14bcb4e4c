# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Run `train/sft.py` under FSDP2 on CPU processes.

accelerate shards on accelerators only, and runs CPU processes as plain DDP. This script reports them as GPUs. At the
end, each process checks that it can read the saved weights and that no process group is left.
"""

import runpy
import sys
from pathlib import Path

import torch
from accelerate.state import DistributedType, PartialState
from safetensors.torch import load_file


original = PartialState.__init__


def init(self, *args, **kwargs):
    """Initialise as the original does, but report CPU processes as GPUs."""
    original(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


PartialState.__init__ = init
runpy.run_path("train/sft.py", run_name="__main__")
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
# There is no file before this run, and an incomplete file cannot be read.
assert load_file(folder / "model.safetensors"), f"'{folder}' has no weights"
assert not torch.distributed.is_initialized(), "the script left its process group behind"
