"""Frames of video files by time, with open decoders kept per thread."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path

import av
import numpy as np

from vla.errors import DataError

OPEN_FILES = 16  # per thread
_of_parents: list[object] = []
AHEAD = 8  # frames: nearer ones are reached by decoding on, others by seeking


class Videos:
    """Decoders of the files used last. One set per thread, and a new one after a fork: a decoder has one user."""

    def __init__(self, fps: float):
        self._fps = fps
        self._local = threading.local()

    def __getstate__(self) -> float:
        return self._fps

    def __setstate__(self, fps: float) -> None:
        self.__init__(fps)

    def frame(self, path: Path, seconds: float, what: str) -> np.ndarray:
        """uint8 [h w 3]: the frame nearest to this time, at most half a frame away. `what` is for messages.

        Raises:
            DataError: the file is missing or damaged, or has no frame at this time.
        """
        decoders = self._decoders()
        decoder = decoders.get(path)
        try:
            if decoder is None:
                decoder = decoders[path] = _Decoder(path, self._fps)
                while len(decoders) > OPEN_FILES:
                    decoders.popitem(last=False)[1].close()
            decoders.move_to_end(path)
            return decoder.frame(seconds)
        except FileNotFoundError as error:
            raise DataError(
                "a video file is missing", field=f"{path} ({what})", fix="copy the folder videos/ completely"
            ) from error
        except (av.FFmpegError, OSError, ValueError) as error:
            if decoder is not None:
                decoder.close()
                decoders.pop(path, None)
            with open(path, "rb") as stream:
                pointer = stream.read(40).startswith(b"version https://git-lfs")
            fix = (
                "it is a git-lfs pointer: run `git lfs pull`"
                if pointer
                else "copy the file again, or drop this episode"
            )
            raise DataError(
                "a video is damaged", field=f"{path} ({what})", got=f"at {seconds:.3f} s: {error}"[:200], fix=fix
            ) from error

    def _decoders(self) -> OrderedDict[Path, _Decoder]:
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            # After a fork the file positions are shared with the parent: leave its decoders alone, unfreed.
            _of_parents.append(getattr(local, "decoders", None))
            local.pid, local.decoders = os.getpid(), OrderedDict()
        return local.decoders


class _Decoder:
    """One open video and where its decoder stands."""

    def __init__(self, path: Path, fps: float):
        self._container = av.open(str(path))
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        # Many samples are decoded side by side already, and threads of a decoder would not survive a fork.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._base = float(self._stream.time_base)
        self._step = 1 / fps
        self._frames = None
        self._last: av.VideoFrame | None = None

    def close(self) -> None:
        self._frames = self._last = None
        self._container.close()

    def frame(self, seconds: float) -> np.ndarray:
        """The frame nearest to `seconds`."""
        half = 0.5 * self._step
        time = self._time()
        if self._frames is None or not time - half <= seconds <= time + AHEAD * self._step:
            # Half a frame early, so that rounding of time stamps never skips the frame itself.
            target = max(0, int((seconds - half) / self._base))
            self._container.seek(target, stream=self._stream, backward=True)
            self._frames, self._last = self._container.decode(self._stream), None
        while self._last is None or self._time() < seconds - half:
            frame = next(self._frames, None)
            if frame is None:
                self._frames = None
                raise ValueError(f"the video ends {'' if self._last is None else f'at {self._time():.3f} s '}before")
            if frame.pts is None:
                continue
            self._last = frame
        if abs(self._time() - seconds) > half + 1e-3:
            raise ValueError(f"no frame within {half:.3f} s, the next is at {self._time():.3f} s")
        if self._last.is_corrupt:
            raise ValueError("the frame is corrupt")
        return self._last.to_ndarray(format="rgb24")

    def _time(self) -> float:
        return -1.0 if self._last is None else self._last.pts * self._base
