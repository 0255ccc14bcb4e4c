# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ego-Exo4D's keystep recognition in the ego view."""

from videollm_mod.train.tasks.labels import LabelTask


class EgoExo4DKeystep(LabelTask):
    """
    The keystep of a segment: top-1 accuracy over the names of 278 classes.

    A name that several scenarios have is followed by its scenario in the dictionary, so that a name is one `label_id`.
    """

    has_published_scorer = False
    papers = {"VideoLLM-MoD": {"accuracy": 0.4262}}
    official_note = "The published benchmark scores class indices; the nearest name stands for its label_id here."
