"""Write one camera's frames as H.264 video, several episodes in a row."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

# Every second frame is a key frame, so that any frame is at most one away from where decoding can start; no frames out
# of order. crf 18: hardly visible losses.
GOP, CRF, PRESET = 2, 18, "veryfast"


class VideoWriter:
    """One mp4 file. Sides that are odd cannot be stored with half-resolution colour, so those files keep it whole."""

    def __init__(self, path: Path, fps: float, height: int, width: int, place: tuple[int, int]):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.fps, self.place, self.frames = path, fps, place, 0
        self._bytes = 0
        self._height, self._width = height, width
        self._format = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
        self._container: Any = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps).limit_denominator(10_000))
        self._stream.height, self._stream.width, self._stream.pix_fmt = height, width, self._format
        self._stream.options = {"crf": str(CRF), "preset": PRESET, "g": str(GOP), "bf": "0"}
        self._stream.thread_count = 1

    def write(self, images: Sequence[np.ndarray]) -> None:
        """Append uint8 [h w 3] images."""
        for image in images:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = self.frames
            frame.time_base = 1 / Fraction(self.fps).limit_denominator(10_000)
            self._mux(self._stream.encode(frame))
            self.frames += 1

    def _mux(self, packets: Sequence[Any]) -> None:
        self._bytes += sum(packet.size for packet in packets)
        self._container.mux(packets)

    def size(self) -> int:
        """Bytes that the encoder gave so far; it holds the last frames back."""
        return self._bytes

    def close(self) -> None:
        """Write what the encoder holds back, and the index."""
        if self._container is not None:
            self._mux(self._stream.encode())
            container, self._container = self._container, None
            container.close()

    def discard(self) -> None:
        """Close after a failure; the file is removed anyway."""
        container, self._container = self._container, None
        if container is not None:
            try:
                container.close()
            except (av.FFmpegError, OSError):
                return

    def describe(self) -> dict[str, Any]:
        """The `info` of the camera's feature in info.json."""
        return {
            "video.height": self._height,
            "video.width": self._width,
            "video.codec": "h264",
            "video.pix_fmt": self._format,
            "video.fps": int(self.fps) if float(self.fps).is_integer() else self.fps,
            "video.channels": 3,
            "has_audio": False,
            "video.g": GOP,
            "video.crf": CRF,
            "video.preset": PRESET,
            "video.fast_decode": 0,
            "video.video_backend": "pyav",
            "video.extra_options": {},
            "is_depth_map": False,
        }
