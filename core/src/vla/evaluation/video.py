"""Episodes as small mp4 files that browsers play."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vla.errors import DataError

if TYPE_CHECKING:
    from vla.evaluation.rollout import Clip

GREEN, RED, BAR = (46, 160, 67), (218, 54, 51), (24, 24, 27)
BAR_HEIGHT, EDGE = 22, 4
HOLD = 0.8  # seconds that the last frame stays, with the outcome around it


def clip_frames(clip: Clip, height: int = 192) -> list[np.ndarray]:
    """The frames of a clip, enlarged, with the instruction above and, at the end, the outcome as a coloured edge."""
    scale = max(1, round(height / clip.frames[0].shape[0]))
    told = clip.episode.told
    text = told if told == clip.episode.prompt else f"told: {told} (asked: {clip.episode.prompt})"
    color = GREEN if clip.episode.success else RED
    frames = [_decorate(frame, scale, text, None) for frame in clip.frames]
    last = _decorate(clip.frames[-1], scale, text, color)
    return [*frames, *[last] * max(1, round(HOLD * clip.hz))]


def montage(clips: Sequence[Clip], columns: int = 2, height: int = 128) -> list[np.ndarray]:
    """Several clips as one film, side by side; shorter ones wait at their last frame."""
    films = [clip_frames(clip, height) for clip in clips]
    length = max(map(len, films))
    films = [[*film, *[film[-1]] * (length - len(film))] for film in films]
    h, w = (max(f[0].shape[i] for f in films) for i in (0, 1))
    columns = min(columns, len(films))
    rows = -(-len(films) // columns)
    out = []
    for t in range(length):
        page = np.full((rows * h, columns * w, 3), 255, np.uint8)
        for i, film in enumerate(films):
            y, x = i // columns * h, i % columns * w
            page[y : y + film[t].shape[0], x : x + film[t].shape[1]] = film[t]
        out.append(page)
    return out


def encode(frames: Sequence[np.ndarray], hz: float, crf: int = 26) -> bytes:
    """An mp4 (H.264) from frames uint8 [h w 3].

    Raises:
        DataError: PyAV is not installed, or has no H.264 encoder.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        fix = "pip install 'vla-core[video]'"
        raise DataError("videos need PyAV", field="video", got="no module av", fix=fix) from error
    height, width = (side - side % 2 for side in frames[0].shape[:2])  # H.264 wants even sides
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=round(hz))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return file.getvalue()


def _decorate(frame: np.ndarray, scale: int, text: str, edge: tuple[int, int, int] | None) -> np.ndarray:
    from PIL import Image, ImageDraw

    big = np.repeat(np.repeat(frame, scale, 0), scale, 1)
    h, w = big.shape[:2]
    page = np.zeros((h + BAR_HEIGHT + 2 * EDGE, w + 2 * EDGE, 3), np.uint8)
    page[:] = BAR if edge is None else edge
    page[EDGE : EDGE + BAR_HEIGHT, EDGE:-EDGE] = BAR
    page[EDGE + BAR_HEIGHT : -EDGE, EDGE:-EDGE] = big
    image = Image.fromarray(page)
    ImageDraw.Draw(image).text((EDGE + 6, EDGE + 5), text, fill=(240, 240, 240))
    return np.asarray(image)
