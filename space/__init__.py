# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""The page, and what it shares with the command line. A published Space has only these files."""
