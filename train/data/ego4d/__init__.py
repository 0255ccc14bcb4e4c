# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Ego4D (Grauman et al., CVPR 2022): narrations, GoalStep, long-term anticipation and queries."""
