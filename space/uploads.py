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
"""What a video may be before anything looks into it."""

from dataclasses import dataclass
from pathlib import Path

import av
from captions import SAFE


@dataclass(frozen=True)
class Limits:
    """
    What a video may be.

    Args:
        megabytes (`int`): Largest file.
        seconds (`float`): Longest video.
        pixels (`int`): Largest picture, width times height.
        compared (`float`): Seconds of a video that are compared.
        burnt (`float`): Longest video that captions are burnt into, in seconds.
    """

    megabytes: int = 200
    seconds: float = 1800.0
    pixels: int = 4096 * 2304
    compared: float = 60.0
    burnt: float = 300.0

    def check(self, path: str | Path) -> float:
        """
        Length of a video in seconds.

        Raises:
            `ValueError`: With a message for its owner, if it is not a video or is beyond a limit.
        """
        size = Path(path).stat().st_size
        if size > self.megabytes * 1_000_000:
            raise ValueError(
                f"This file has {size / 1e6:.0f} MB; at most {self.megabytes} are taken. Cut or shrink it."
            )
        try:
            with av.open(str(path), options=SAFE) as container:
                if not container.streams.video:
                    raise ValueError("This file has no picture in it. Choose a video.")
                for stream in container.streams.video:
                    if stream.width * stream.height > self.pixels:
                        raise ValueError(
                            f"This video's picture has {stream.width}x{stream.height} pixels. Choose a smaller one."
                        )
                next(container.decode(video=0))
                seconds = _length(container)
        except (av.error.FFmpegError, StopIteration):
            raise ValueError("This file cannot be read as a video. Choose an mp4, webm or mov.") from None
        if seconds > self.seconds:
            raise ValueError(f"This video lasts {seconds / 60:.0f} min; at most {self.seconds / 60:.0f} are watched.")
        return seconds


def _length(container: av.container.InputContainer) -> float:
    lengths = [float(s.duration * s.time_base) for s in container.streams.video if s.duration is not None]
    if lengths or container.duration is not None:
        return max([*lengths, (container.duration or 0) / av.time_base])
    # Recordings of a browser do not say how long they are.
    ends = [float(packet.pts * packet.time_base) for packet in container.demux(video=0) if packet.pts is not None]
    return max(ends, default=0.0)
