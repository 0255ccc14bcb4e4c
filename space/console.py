# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
Quiet output for programs: the command line, the scripts in `train/` and `convert/`, and the benchmarks.

Importing this module silences Python warnings, and the notices that libraries log while they are imported. Import it
before torch and Transformers. ruff sorts it there. Then call [`quiet`] in `main`.

`python -W default` and `TRANSFORMERS_VERBOSITY=info` bring the messages back.
"""

import logging
import os
import sys
import warnings


# Loggers that warn about their own optional parts or deprecations at import.
_NOISY = ("bitsandbytes", "peft", "torch.utils._pytree", "torchao")

if not sys.warnoptions:
    warnings.simplefilter("ignore")
for _name in _NOISY:
    logging.getLogger(_name).setLevel(logging.ERROR)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def quiet() -> None:
    """
    Turn off the bars that Transformers draws for loading and saving weights.

    Hub downloads keep their bars, since they can take minutes.
    """
    import transformers
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

    no_downloads = are_progress_bars_disabled()
    transformers.logging.disable_progress_bar()
    if not no_downloads:
        enable_progress_bars()
