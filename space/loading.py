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
"""A checkpoint, made ready to stream on this machine."""

from typing import Any

import torch
from transformers import AutoModel


# Parameters below which threads on a CPU wait for each other longer than they work.
SMALL = 20_000_000


# Dtypes of eight bits, by the names of the command line.
CACHE_DTYPES = {"fp8": torch.float8_e4m3fn}
WEIGHTS = ("int8", "fp8")


def quantization(weights: str | None) -> dict[str, Any]:
    """
    Options of `AutoModel.from_pretrained` for linear layers in eight bits, a scale a row; routers, embeddings and head
    stay as they are.

    Args:
        weights (`str`, *optional*): `"int8"` or `"fp8"`; without, no options.

    Raises:
        `ValueError`: If it is neither, or torchao is not installed.
    """
    if weights is None:
        return {}
    if weights not in WEIGHTS:
        raise ValueError(f"Weights can be {' or '.join(WEIGHTS)}, not {weights!r}.")
    # Only where it is asked for: torchao has much to say when it is loaded.
    try:
        from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig
        from transformers import TorchAoConfig
    except ImportError:
        raise ValueError("Weights in eight bits need torchao: `pip install torchao`.") from None
    made = Int8WeightOnlyConfig() if weights == "int8" else Float8WeightOnlyConfig()
    return {"quantization_config": TorchAoConfig(made)}


def load_model(name: str, *, weights: str | None = None, **options: Any) -> Any:
    """
    A model in evaluation mode, on the GPU if there is one; where there is none a small one has the process run on one
    thread.

    Args:
        name (`str`): A folder or a Hub id. Its code is run.
        weights (`str`, *optional*): See [`quantization`].
        options: Of `AutoModel.from_pretrained`, such as `revision`, or fields of the configuration.

    Raises:
        `OSError`: If there is no such checkpoint.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options |= quantization(weights)
    model = AutoModel.from_pretrained(name, trust_remote_code=True, dtype="auto", **options).to(device).eval()
    if device == "cpu" and model.num_parameters() < SMALL:
        torch.set_num_threads(1)
    return model
