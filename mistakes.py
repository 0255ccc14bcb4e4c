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
"""What a user got wrong, as one line that says so: with it scripts and the command line end, and not with a trace."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError


MISTAKES = (ValueError, OSError, ImportError, StrictDataclassError, SafetensorError)


def in_one_line(error: BaseException) -> str:
    """What an error says that matters to whoever made the mistake."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, StrictDataclassError):
        # Which validator it was comes first, and what is wrong last.
        return lines[-1].strip().removeprefix("ValueError: ")
    if isinstance(error, SafetensorError):
        return f"The weights are no whole safetensors file ({lines[0]}). Copy or download them again."
    # What a library says is a paragraph at times; its first line says what was wrong.
    return lines[0]
