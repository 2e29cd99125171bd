"""Frames of video files by time, with open decoders kept per thread."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from vla.errors import DataError, SettingsError
from vla.reading import open_file
from vla_dataset_lerobot.choice import advice
from vla_dataset_lerobot.film import is_measurement, is_pointer

OPEN_FILES = 16  # per thread
_of_parents: list[object] = []
SAME = 1e-3  # seconds: times that are nearer are equal, as time stamps are rounded
AHEAD = 8  # frames: nearer ones are reached by decoding on, others by seeking
# From version 17 on PyAV converts colours with a thread per core unless told otherwise.
ONE_THREAD = {"threads": 1} if int(av.__version__.partition(".")[0]) >= 17 else {}


class Decoder(Protocol):
    """One open video. Made by `(path, fps)`; raises FileNotFoundError, and OSError or ValueError for a damaged file."""

    def frame(self, seconds: float) -> np.ndarray:
        """uint8 [h w 3]: the frame nearest to this time, at most half a frame away."""
        ...

    def close(self) -> None:
        """Let go of the file."""
        ...


class Videos:
    """Decoders of the files used last. One set per thread, and a new one after a fork: a decoder has one user."""

    def __init__(self, fps: float, decoder: str = "auto"):
        """Choose the decoder.

        Raises:
            SettingsError: it is not installed, or does not run here.
        """
        self._fps, self._decoder = fps, decoder
        self._open = _opener(decoder)
        self._local = threading.local()

    def __getstate__(self) -> tuple[float, str]:
        return self._fps, self._decoder

    def __setstate__(self, state: tuple[float, str]) -> None:
        self.__init__(*state)

    def frame(self, path: Path, seconds: float, what: str, way_out: str = "") -> np.ndarray:
        """uint8 [h w 3]: the frame nearest to this time, at most half a frame away; `what`, `way_out`: for messages.

        Raises:
            DataError: the file is missing or damaged, or has no frame at this time.
        """
        decoders = self._decoders()
        decoder = decoders.get(path)
        try:
            if decoder is None:
                check_container(path)
                decoder = decoders[path] = self._open(path, self._fps)
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
            fix = "it is a git-lfs pointer: run `git lfs pull`" if is_pointer(path) else "copy the file again"
            raise DataError(
                "a video is damaged",
                field=f"{path} ({what})",
                got=f"at {seconds:.3f} s: {error}"[:200],
                fix=advice(fix, way_out),
            ) from error

    def _decoders(self) -> OrderedDict[Path, Decoder]:
        local = self._local
        if getattr(local, "pid", None) != os.getpid():
            # After a fork the file positions are shared with the parent: leave its decoders alone, unfreed.
            _of_parents.append(getattr(local, "decoders", None))
            local.pid, local.decoders = os.getpid(), OrderedDict()
        return local.decoders


def check_container(path: Path) -> None:
    """Refuse what is no mp4: FFmpeg also follows playlists to other files and to the network.

    Raises:
        ValueError: it is none. DataError: it is no regular file. FileNotFoundError: it is not there.
    """
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    with open_file(path, DataError) as file:
        kind = file.read(8)[4:]
    if kind not in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp"):
        raise ValueError("it is no mp4")


class PyAVDecoder:
    """One open video and where its decoder stands."""

    def __init__(self, path: Path, fps: float):
        self._container = av.open(str(path), format="mov", options={"protocol_whitelist": "file"})
        if not self._container.streams.video:
            raise ValueError("it has no video stream")
        self._stream = self._container.streams.video[0]
        if is_measurement(self._stream.codec_context.format):
            raise ValueError("it has more than 8 bits in its only channel: no pictures, but depth or the like")
        # Many samples are decoded side by side already, and threads of a decoder would not survive a fork.
        self._stream.thread_type = "NONE"
        self._stream.codec_context.thread_count = 1
        self._base = float(self._stream.time_base)
        self._step = 1 / fps
        # One for all frames: to_ndarray(format="rgb24") sets up a converter for each, which took four times longer.
        self._colors = VideoReformatter()
        self._frames = None
        self._last: av.VideoFrame | None = None
        self._before: av.VideoFrame | None = None  # the frame before `_last`
        self._spoilt = (False, False)  # whether these two, `_before` and `_last`, are damaged

    def close(self) -> None:
        self._frames = self._last = self._before = None
        self._container.close()

    def frame(self, seconds: float) -> np.ndarray:
        """The frame nearest to `seconds`."""
        half = 0.5 * self._step
        nearest = self._time(self._before or self._last) - SAME
        if self._frames is None or not nearest <= seconds <= self._time() + AHEAD * self._step:
            self._seek(seconds + SAME)
        back = 1.0
        # Frames just before a keyframe may be decodable only from an earlier one (open groups of pictures, as HEVC
        # has them), or be nearer than it: then the first frame after the seek is later than the one asked for.
        while self._advance(seconds - SAME) and self._time() > seconds + SAME and back < 2 * seconds + 2:
            self._seek(seconds - back)
            back *= 4
        found = self._last
        if self._before is not None and seconds - self._time(self._before) < abs(self._time() - seconds):
            found = self._before
        if abs(self._time(found) - seconds) > half + SAME:
            if self._time(found) < seconds:
                raise ValueError(f"the video ends at {self._time(found):.3f} s before")
            raise ValueError(f"no frame within {half:.3f} s, the next is at {self._time(found):.3f} s")
        if self._spoilt[found is self._last]:
            raise ValueError("the frame is corrupt")
        return self._colors.reformat(found, format="rgb24", **ONE_THREAD).to_ndarray()

    def _seek(self, seconds: float) -> None:
        """To the last keyframe at or before this time."""
        self._container.seek(max(0, int(seconds / self._base)), stream=self._stream, backward=True)
        self._frames, self._last, self._before = self._container.decode(self._stream), None, None
        self._spoilt = (False, False)

    def _advance(self, seconds: float) -> bool:
        """To the first frame at or after this time, or the last one; whether that is the first since the seek."""
        while self._last is None or self._time() < seconds:
            frame = next(self._frames, None)
            if frame is None:
                if self._last is None:
                    self._frames = None
                    raise ValueError("the video ends before")
                break
            if frame.pts is None:
                continue
            # What refers to a damaged frame is damaged too, though no decoder says so: up to the next keyframe.
            spoilt = frame.is_corrupt or (self._last is not None and self._spoilt[1] and not frame.key_frame)
            self._before, self._last, self._spoilt = self._last, frame, (self._spoilt[1], spoilt)
        return self._before is None

    def _time(self, frame: av.VideoFrame | None = None) -> float:
        """Of a frame; default: the one that the decoder stands at."""
        frame = self._last if frame is None else frame
        return -1.0 if frame is None else frame.pts * self._base


class TorchcodecDecoder:
    """The same frames through torchcodec; see benchmarks/results/reader.md for when that is faster."""

    def __init__(self, path: Path, fps: float):
        os.stat(path)  # FileNotFoundError: torchcodec's own is a RuntimeError like all of its errors
        try:
            # Exact: times are read from the packets, not computed from an average rate. One thread: see PyAVDecoder.
            self._video = _torchcodec().VideoDecoder(
                str(path), dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="exact", device="cpu"
            )
        except RuntimeError as error:
            raise ValueError(_first_line(error)) from error
        self._begin = float(self._video.metadata.begin_stream_seconds)
        self._end = float(self._video.metadata.end_stream_seconds)
        self._half = 0.5 / fps

    def close(self) -> None:
        """torchcodec closes the file when its decoder is freed."""
        self._video = None

    def frame(self, seconds: float) -> np.ndarray:
        """The frame nearest to `seconds`."""
        # The frame on the screen at this time, or the one after it; the last one is on the screen until the end.
        try:
            frame = self._video.get_frame_played_at(min(max(seconds + SAME, self._begin), self._end - 1e-6))
            after = frame.pts_seconds + frame.duration_seconds
            if after < self._end - SAME and abs(after - seconds) < abs(frame.pts_seconds - seconds):
                frame = self._video.get_frame_played_at(after + 1e-6)
        except (RuntimeError, IndexError) as error:
            raise ValueError(_first_line(error)) from error
        if abs(frame.pts_seconds - seconds) > self._half + SAME:
            raise ValueError(f"no frame within {self._half:.3f} s, the next is at {frame.pts_seconds:.3f} s")
        return frame.data.numpy()


def _opener(decoder: str) -> Callable[[Path, float], Decoder]:
    """What opens a file, for the setting `decoder`."""
    if decoder != "torchcodec":
        return PyAVDecoder
    _torchcodec()
    return TorchcodecDecoder


def _torchcodec() -> Any:
    """The module torchcodec.decoders. It imports PyTorch: only who asks for it waits for that.

    Raises:
        SettingsError: torchcodec is not installed, or cannot load its libraries.
    """
    try:
        import torchcodec
        from torchcodec import decoders

        if torchcodec.ffmpeg_major_version is None:  # how torchcodec >= 0.16 says that it found no FFmpeg
            raise RuntimeError("no FFmpeg libraries were found")
    except ModuleNotFoundError as error:
        raise SettingsError(
            "the video decoder is not installed", field="decoder", got=f"torchcodec ({error})",
            fix="pip install 'vla-dataset-lerobot[torchcodec]', or decoder = \"pyav\"",
        ) from error  # fmt: skip
    except (OSError, RuntimeError, ImportError) as error:
        raise SettingsError(
            "torchcodec is installed but does not load", field="decoder", got=_first_line(error),
            fix="it needs FFmpeg's shared libraries (apt install ffmpeg, or conda install ffmpeg) and the release that "
            "fits this PyTorch (its +cpu build for a PyTorch without CUDA); or decoder = \"pyav\"",
        ) from error  # fmt: skip
    return decoders


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
