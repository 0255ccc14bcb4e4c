# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The collator in training: the choice of corrupted replies depends on the epoch, and survives a resume."""

import pytest
import torch
from accelerate.utils import slice_tensors
from tiny import random_features, tiny_config, tiny_model, tiny_processor
from torch.nn.parallel import scatter_gather
from transformers import Trainer, TrainingArguments

from videollm_mod.train.collator import EpochTeller, StreamCollator


class Witness(torch.nn.Module):
    """Learn nothing, and record the dialogues of each step without their padding."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.shown = []

    def forward(self, input_ids, **_):
        self.shown.append([tuple(row[row != 0].tolist()) for row in input_ids])
        return {"loss": self.weight**2}


def train(folder, resume=None, *, workers=0, persistent=False):
    """Return the inputs of three epochs over six dialogues of nine replies each, two dialogues per step."""
    config = tiny_config()
    rows = [
        {
            "frame_features": random_features(config, 20, seed=row)[0],
            "messages": [{"role": "assistant", "content": f"Ball {row}{k}.", "time": 1.0 * k} for k in range(1, 10)],
        }
        for row in range(6)
    ]
    collator = StreamCollator(tiny_processor(), augmentation=0.5)
    options = {"num_train_epochs": 3, "per_device_train_batch_size": 2, "save_steps": 1, "report_to": "none"}
    options |= {"dataloader_num_workers": workers, "dataloader_persistent_workers": persistent}
    arguments = TrainingArguments(str(folder), remove_unused_columns=False, use_cpu=True, disable_tqdm=True, **options)
    model = Witness()
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator, callbacks=[EpochTeller(collator)])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model.shown


def test_each_epoch_corrupts_other_replies_and_a_resumed_one_the_same(tmp_path):
    whole = train(tmp_path)
    assert len(whole) == 9
    epochs = [{ids for step in whole[begin : begin + 3] for ids in step} for begin in (0, 3, 6)]
    assert [len(epoch) for epoch in epochs] == [6, 6, 6] and not epochs[0] & epochs[1] | epochs[1] & epochs[2]
    # In the middle of an epoch, and between two.
    for step in (4, 6):
        assert train(tmp_path / "resumed", tmp_path / f"checkpoint-{step}") == whole[step:]


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_corrupt_the_same_replies(tmp_path, persistent):
    assert train(tmp_path / "workers", workers=1, persistent=persistent) == train(tmp_path / "none")


def clips(*lengths):
    """Rows with features of so many frames each, and one reply."""
    message = {"role": "assistant", "content": "A ball.", "time": 0.5}
    return [{"messages": [message], "frame_features": random_features(tiny_config(), n)[0]} for n in lengths]


def test_a_batch_can_be_split_by_rows(monkeypatch):
    """As accelerate's dispatcher and `nn.DataParallel` split it, with another number of frames in each row."""
    batch = StreamCollator(tiny_processor())(clips(2, 3, 4, 5))
    # Without GPUs, stand in for the copies to them.
    monkeypatch.setattr(scatter_gather.Scatter, "apply", lambda gpus, _sizes, dim, x: x.chunk(len(gpus), dim))
    replicas = scatter_gather.scatter_kwargs((), batch, [0, 1])[1]
    assert len(replicas) == 2
    model = tiny_model()
    whole = model(**batch).logits
    for rows, replica in zip((slice(0, 2), slice(2, 4)), replicas, strict=True):
        part = slice_tensors(batch, rows)
        assert part.keys() == replica.keys() == batch.keys()
        assert all(torch.equal(replica[name], part[name]) for name in part)
        torch.testing.assert_close(model(**part).logits, whole[rows], rtol=1e-4, atol=1e-5)
