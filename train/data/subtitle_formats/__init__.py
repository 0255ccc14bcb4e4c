# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Subtitles in any format and encoding: one file per family of formats, and one for what they share."""
