# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on uploaded videos, checked before anything else reads them."""

from dataclasses import dataclass
from pathlib import Path

import av
from captions import SAFE, container_seconds


@dataclass(frozen=True)
class Limits:
    """
    Limits on a video.

    Args:
        megabytes (`int`): Largest file.
        seconds (`float`): Longest video.
        pixels (`int`): Largest picture, width times height.
        compared (`float`): Seconds of a video that the comparison shows.
        burnt (`float`): Longest video for burnt-in captions, in seconds.
    """

    megabytes: int = 200
    seconds: float = 1800.0
    pixels: int = 4096 * 2304
    compared: float = 60.0
    burnt: float = 300.0

    def check(self, path: str | Path) -> float:
        """
        Return the length of a video in seconds.

        Raises:
            `ValueError`: If the file is not a video or exceeds a limit. The message is for the person who uploaded it.
        """
        size = Path(path).stat().st_size
        if size > self.megabytes * 1_000_000:
            raise ValueError(f"This file has {size / 1e6:.0f} MB. The limit is {self.megabytes} MB: cut or shrink it.")
        try:
            with av.open(str(path), options=SAFE) as container:
                if not container.streams.video:
                    raise ValueError("This file has no video stream. Choose a video.")
                for stream in container.streams.video:
                    if stream.width * stream.height > self.pixels:
                        raise ValueError(
                            f"This video has {stream.width}x{stream.height} pixels. Choose a smaller one."
                        )
                next(container.decode(video=0))
                seconds = container_seconds(container)
        except (av.error.FFmpegError, StopIteration):
            raise ValueError("This file cannot be read as a video. Choose an mp4, webm or mov.") from None
        if seconds > self.seconds:
            raise ValueError(f"This video lasts {seconds / 60:.0f} min. The limit is {self.seconds / 60:.0f} min.")
        return seconds
