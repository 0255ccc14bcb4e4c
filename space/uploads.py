# Copyright 2026 The VideoLLM-MoD contributors.
# SPDX-License-Identifier: Apache-2.0
"""Limits on uploaded videos, checked before anything else reads them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


# FFmpeg detects formats by content. Other formats, such as playlists, may name further files that FFmpeg opens.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,flv,gif,apng,ogg,mpeg,mpegvideo,m4v,h264,hevc,ivf"


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
        burnt_pixels (`int`): Largest picture with burnt-in captions, width times height. Larger ones are shrunk.
    """

    megabytes: int = 200
    seconds: float = 1800.0
    pixels: int = 4096 * 2304
    compared: float = 60.0
    burnt: float = 300.0
    burnt_pixels: int = 1280 * 720

    def check(self, path: str | Path, open_video: Callable[..., Any]) -> float:
        """
        Return the length of a video in seconds.

        Args:
            path (`str` or `Path`): The file.
            open_video (`Callable`): Opens it, as `processor.open_video` does.

        Raises:
            `ValueError`: If the file is not a video or exceeds a limit. The message is for the person who uploaded it.
        """
        size = Path(path).stat().st_size
        if size > self.megabytes * 1_000_000:
            raise ValueError(f"This file has {size / 1e6:.0f} MB. The limit is {self.megabytes} MB: cut or shrink it.")
        try:
            with open_video(path, formats=FORMATS, max_pixels=self.pixels) as reader:
                largest = max(reader.container.streams.video, key=lambda stream: stream.width * stream.height)
                is_small = largest.width * largest.height <= self.pixels
                seconds = reader.seconds if is_small and next(reader.frames(), None) else 0.0
        except ValueError as error:
            if "has no video stream" in str(error):
                raise ValueError("This file has no video stream. Choose a video.") from None
            raise ValueError("This file cannot be read as a video. Choose an mp4, webm or mov.") from None
        if is_small and not seconds:
            raise ValueError("This file has no readable frame. Choose another one.")
        if not is_small:
            raise ValueError(f"This video has {largest.width}x{largest.height} pixels. Choose a smaller one.")
        if seconds > self.seconds:
            raise ValueError(f"This video lasts {seconds / 60:.0f} min. The limit is {self.seconds / 60:.0f} min.")
        return seconds
