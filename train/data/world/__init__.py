# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""StreamWorld: its clips, events, pictures, dialogues and files."""
