# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""
What a vision encoder has learned to see in each patch: the linear head of `train/pretrain_vision.py`.

The head lies beside the checkpoint, in `patch_labels.safetensors`. It is not part of the model.

```python
from videollm_mod.train.objectness import load_patch_labels

head = load_patch_labels("outputs/local/vision")
scores = head.objectness(model.encode_frames(pixels))  # (frames, tokens)
```
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from videollm_mod.outputs import replacing


FILE = "patch_labels.safetensors"


@dataclass(frozen=True)
class PatchLabels:
    """
    A linear head that reads the features of a patch.

    Args:
        things (`tuple[str, ...]`): Names of the kinds of things. Two more labels follow them: nothing, and the wall.
        colors (`tuple[str, ...]`): Names of the colors, which may be none.
        weight (`torch.Tensor` of shape `(labels, width)`): A row for each thing, nothing, the wall, each color, and
            the thing's place (x, y and width).
        bias (`torch.Tensor` of shape `(labels,)`): Added to the products.
    """

    things: tuple[str, ...]
    colors: tuple[str, ...]
    weight: torch.Tensor
    bias: torch.Tensor

    def objectness(self, frame_features: torch.Tensor) -> torch.Tensor:
        """
        Return how probably each token shows a thing: 1 - P(nothing or the wall).

        Args:
            frame_features (`torch.Tensor` of shape `(..., tokens, width)`): Features of `model.encode_frames`, where
                each token is one patch.

        Returns:
            `torch.Tensor` of shape `(..., tokens)`: Probabilities in float32, on the device of the features.

        Raises:
            `ValueError`: If the features have another width.
        """
        width = frame_features.shape[-1]
        if width != self.weight.shape[1]:
            raise ValueError(f"Frame features have width {width}, but the patch labels read {self.weight.shape[1]}.")
        labels, device = len(self.things) + 2, frame_features.device
        weight, bias = self.weight[:labels].float().to(device), self.bias[:labels].float().to(device)
        logits = F.linear(frame_features.float(), weight, bias)
        return logits.softmax(-1)[..., : len(self.things)].sum(-1)

    def save(self, folder: str | Path) -> None:
        """Write the head into the folder of a checkpoint."""
        tensors = {name: getattr(self, name).detach().cpu().contiguous() for name in ("weight", "bias")}
        names = {name: json.dumps(getattr(self, name)) for name in ("things", "colors")}
        with replacing(Path(folder) / FILE) as part:
            save_file(tensors, part, metadata=names)


def load_patch_labels(folder: str | Path) -> PatchLabels:
    """
    Load the head that lies beside a checkpoint of `train/pretrain_vision.py`.

    Raises:
        `FileNotFoundError`: If the folder has none.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {FILE}. train/pretrain_vision.py writes it beside the encoder.")
    with safe_open(path, framework="pt") as file:
        things, colors = (tuple(json.loads(file.metadata()[name])) for name in ("things", "colors"))
        return PatchLabels(things, colors, file.get_tensor("weight"), file.get_tensor("bias"))
