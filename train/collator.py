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
"""Puts examples together: dialogues and videos become one batch with labels."""

from typing import Any

import torch


class StreamCollator:
    """
    Makes a training batch of examples `{"messages": ..., "video": ...}`.

    Rows are padded on the right, where causal attention keeps padding from every token that counts: the batch has
    `position_ids` in place of an attention mask, so that no mask is made and nothing waits for the device.

    Args:
        processor ([`VideoLLMMoDProcessor`]): Makes tokens, labels and pixels.
        fps (`float`, *optional*, defaults to 2.0): Frame rate of the videos, and of timed messages.
    """

    def __init__(self, processor: Any, fps: float = 2.0) -> None:
        self.processor = processor
        self.fps = fps

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch for [`VideoLLMMoDForConditionalGeneration`] of examples with `messages` and `video`."""
        batch = self.processor(
            [example["messages"] for example in examples],
            [example["video"] for example in examples],
            fps=self.fps,
            return_labels=True,
            padding_side="right",
        )
        length = batch["input_ids"].shape[1]
        batch.pop("attention_mask")
        return {**batch, "position_ids": torch.arange(length)[None]}
