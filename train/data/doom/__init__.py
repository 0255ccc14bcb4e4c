# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""DoomWorld: clips of a scripted player in ViZDoom, with exact narration."""
