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
"""
Quiet output for programs: the command line, the scripts in `train/` and `convert/`, and the benchmarks.

Import this module before torch and Transformers. It stands in `space/`, because a Space has no other files of ours.
"""

from videollm_mod.space.console import quiet


__all__ = ["quiet"]
