# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Encode frames once, before training. A frozen vision encoder then does not see the same frames in every epoch.

```bash
python train/encode.py --dataset data/train.jsonl --output_dir features --checkpoint my-model
accelerate launch --num_processes 8 train/encode.py --dataset data --output_dir features --checkpoint my-model
python train/sft.py --dataset features --checkpoint my-model ...
```

The script writes one safetensors file per video clip, and rows that name these files. It skips existing files, so an
interrupted run continues where it stopped. A file gets its name only when it is complete. The name depends on the
clip, the frame rate, the encoder and the data type. Only one run at a time may write to a folder.
"""

from dataclasses import dataclass, field

from videollm_mod.console import quiet

from videollm_mod.checks_videollm_mod import check_count, check_number
from videollm_mod.space.checkpoint_names import check_checkpoint
from videollm_mod.train.arguments import RowArguments, naming_options, run
from videollm_mod.train.data.faults import row_record
from videollm_mod.train.data.sources import DataSource


@dataclass
class EncodeArguments:
    """
    Which encoder to use, and where to write.

    Args:
        checkpoint (`str`): Model with the vision encoder: a folder or a Hub id.
        output_dir (`str`): Folder to write to.
        batch_size (`int`, *optional*, defaults to 64): Number of frames to encode at a time.
        dtype (`str`, *optional*, defaults to `"auto"`): Data type of the encoder and the features.
        max_minutes (`float`, *optional*): Time limit in minutes. Rows that do not fit are left out.
    """

    checkpoint: str = field(metadata={"help": "Model with the vision encoder: a folder or a Hub id."})
    output_dir: str = field(metadata={"help": "Folder to write to."})
    batch_size: int = field(default=64, metadata={"help": "Number of frames to encode at a time."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the encoder and the features."})
    max_minutes: float | None = field(default=None, metadata={"help": "Time limit in minutes."})

    def __post_init__(self) -> None:
        self.checkpoint = check_checkpoint(self.checkpoint)
        with naming_options():
            check_count("batch_size", self.batch_size)
            if self.max_minutes is not None:
                check_number("max_minutes", self.max_minutes, least=0)


def main(script: RowArguments, source: DataSource, arguments: EncodeArguments) -> None:
    """Encode a split."""
    # Imported here, because `--help` does without torch.
    from videollm_mod.train.encoding import encode_split

    with row_record() as record:
        encode_split(script, source, arguments, record)


if __name__ == "__main__":
    quiet()
    run(main, RowArguments, DataSource, EncodeArguments)
