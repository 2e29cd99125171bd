"""Which picture of a video belongs to which frame, found out before anything is decoded.

A frame's picture is the one nearest to its time. The clock of the data and that of the video may be apart: GR00T's
recordings count from 1/fps while their videos start at 0. Such an offset is taken only where both say so, which is
when the episode's part of the video holds exactly as many pictures as the episode has frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from attrs import evolve, frozen

from vla.errors import DataError
from vla_dataset_lerobot.choice import advice, leave_out
from vla_dataset_lerobot.film import Film, films_of
from vla_dataset_lerobot.meta import Clip, Meta
from vla_dataset_lerobot.video import SAME


@frozen
class Rows:
    """What the rows of an episode need of a video."""

    number: int  # of the episode
    count: int  # frames
    begin: float  # what the clock shows at the first frame
    since: np.ndarray  # [count] seconds since the first frame
    frame: int | None  # `frame_index` of the first
    timed: bool  # whether a column says when or the how-manieth each frame is


class _Misfit(Exception):
    """Why an episode's pictures cannot be had: (what, got, expected, fix)."""


def place(meta: Meta, key: str, rows: Sequence[Rows], ordered: bool) -> list[Clip]:
    """The clips of a camera with the time in the video of each episode's first frame.

    Args:
        rows: of each episode.
        ordered: frames count by their order, not by their time (`check_fps` false).

    Raises:
        DataError: a file is missing or damaged, a video ends too early, two episodes share pictures, or the clocks of
            data and video contradict each other. Names the episodes, and how to leave them out.
    """
    clips = meta.clips[key]
    films = films_of(dict.fromkeys(clip.path for clip in clips))
    _refuse(meta, key, [r for r, c in zip(rows, clips, strict=True) if isinstance(films[c.path], str)], clips, films)
    good: Mapping[Path, Film] = {path: film for path, film in films.items() if isinstance(film, Film)}
    ends = _ends(meta, key, clips, rows, good)
    out, misfits = [], []
    for clip, row, after in zip(clips, rows, ends, strict=True):
        try:
            out.append(_placed(clip, row, good[clip.path], meta, after, ordered))
        except _Misfit as misfit:
            misfits.append((row.number, clip, misfit.args))
    if misfits:
        number, clip, (what, got, expected, fix) = misfits[0]
        more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
        raise DataError(
            what, field=f"{clip.path} (camera {key}, episode {number}){more}", got=got, expected=expected,
            fix=advice(fix, leave_out([n for n, _, _ in misfits], len(rows))),
        )  # fmt: skip
    return out


def _refuse(meta: Meta, key: str, bad: Sequence[Rows], clips: Sequence[Clip], films: Mapping[Path, Film | str]) -> None:
    """The error for files that are missing or cannot be opened."""
    if not bad:
        return
    clip = clips[int(np.searchsorted(meta.numbers, bad[0].number))]
    why = str(films[clip.path])
    more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
    missing = why == "missing"
    raise DataError(
        "a video file is missing" if missing else "a video is damaged",
        field=f"{clip.path} (camera {key}, episode {bad[0].number}){more}",
        got="no such file" if missing else why[:200],
        fix=advice(
            "copy the folder videos/ completely" if missing else "copy the file again",
            leave_out([row.number for row in bad], len(meta.numbers)),
        ),
    )  # fmt: skip


def _ends(meta: Meta, key: str, clips: Sequence[Clip], rows: Sequence[Rows], films: Mapping[Path, Film]) -> list[float]:
    """Where the part of the next episode in the same file begins; the end of the file after the last.

    Raises:
        DataError: two episodes share pictures, or a file has fewer pictures than its episodes have frames.
    """
    half, out = 0.5 / meta.fps, [0.0] * len(clips)
    by_file: dict[Path, list[int]] = {}
    for i, clip in enumerate(clips):
        by_file.setdefault(clip.path, []).append(i)
    for path, mine in by_file.items():
        mine.sort(key=lambda i: clips[i].start)
        shared, before = [], mine[0]
        for i, after in zip(mine, [*mine[1:], None], strict=True):
            out[i] = films[path].end if after is None else clips[after].start
            stop = clips[before].start + rows[before].count / meta.fps
            if after is not None and clips[after].start < stop - half - SAME:
                shared.append((before, after, stop))
            elif after is not None:
                before = after
        if shared:
            i, after, stop = shared[0]
            raise DataError(
                "two episodes share pictures of a video", field=f"{path} (camera {key})",
                got=f"episode {rows[after].number} from {clips[after].start:.3f} s",
                expected=f"from {stop:.3f} s on, where episode {rows[i].number} ends that begins at "
                f"{clips[i].start:.3f} s and has {rows[i].count} frames",
                fix=advice("correct meta/", leave_out([rows[a].number for _, a, _ in shared], len(rows))),
            )  # fmt: skip
        have, need = films[path].frames, sum(rows[i].count for i in mine)
        if have and have < need:
            raise DataError(
                "a video has fewer pictures than its episodes have frames", field=f"{path} (camera {key})",
                got=f"{have} pictures", expected=f"{need}, for episodes {', '.join(str(rows[i].number) for i in mine)}",
                fix=advice("copy the file again", leave_out([rows[i].number for i in mine], len(rows))),
            )  # fmt: skip
    return out


def _placed(clip: Clip, row: Rows, film: Film, meta: Meta, after: float, ordered: bool) -> Clip:
    """The clip from the picture of the first frame on."""
    fps, own_file = meta.fps, meta.files_of is not None
    step, half, length = 1 / fps, 0.5 / fps + SAME, float(row.since[-1])
    begin = film.start if own_file else clip.start
    end = film.end if own_file else clip.stop if clip.stop is not None else clip.start + row.count * step
    if end < begin + (row.count - 1) * step - half and not ordered:
        raise _Misfit(
            "an episode's part of a video is shorter than the episode", f"{begin:.3f} s to {end:.3f} s",
            f"{row.count * step:.3f} s, for {row.count} frames at {fps:g} fps", "correct meta/",
        )  # fmt: skip
    held = _held(film, begin, end)
    if ordered and len(held) == row.count and length < row.count * step:  # no gap in frame_index
        return evolve(clip, start=begin, moments=held)
    last = clip.start + row.begin + length
    fits = clip.start + row.begin >= max(begin, film.start) - half and last <= film.last + half
    if not own_file:  # beyond are pictures of the next episode; some writers note the last picture as the end
        fits = fits and last <= max(end - step, min(end, after - step)) + half
    whole = not ordered and len(held) == row.count and abs(end - begin - row.count * step) <= step + SAME
    if whole and begin + length <= film.last + half and begin >= film.start - half:
        if not fits and row.begin > 0 and last + step <= after + half:
            raise _Misfit(
                "the clocks of data and video contradict each other, and both could be meant",
                f"timestamps from {row.begin:.3f} s on, pictures from {begin:.3f} s to {end:.3f} s",
                "timestamps that start at 0, or a part of the video that starts earlier or ends later",
                "correct from_timestamp and to_timestamp in meta/, or the timestamps in data/",
            )  # fmt: skip
        return _checked(evolve(clip, start=begin), row, film, fps)
    if not row.timed:
        raise _Misfit(
            "nothing says which pictures of a video are those of an episode", f"{len(held)} pictures",
            f"{row.count}, one a frame, as there is neither timestamp nor frame_index", "add one of these columns",
        )  # fmt: skip
    if not fits:
        raise _Misfit(
            "a video does not hold the pictures of an episode",
            f"pictures from {max(begin, film.start):.3f} s to {min(end, film.end):.3f} s",
            f"{clip.start + row.begin:.3f} s to {last + step:.3f} s, for {row.count} frames at {fps:g} fps"
            + ("" if ordered else ", by their timestamps"),
            "copy the file again",
        )  # fmt: skip
    if not ordered and row.frame is not None and abs(row.begin - (begin - clip.start) - row.frame * step) > half:
        raise _Misfit(
            "frame_index and timestamp contradict each other about where an episode begins in its video",
            f"frame_index {row.frame} and timestamp {row.begin:.3f} at the first frame",
            f"timestamp {row.frame * step + begin - clip.start:.3f} for it, or a video of {row.count} pictures",
            "repair one of the two columns, or go by frame_index: --set data.check_fps=false",
        )  # fmt: skip
    return _checked(evolve(clip, start=clip.start + row.begin), row, film, fps)


def _held(film: Film, begin: float, end: float) -> np.ndarray:
    """The times of the pictures in a part of a video."""
    if film.times is not None:
        margin = 0.25 / film.rate  # from_timestamp is often a sum of rounded lengths
        first, past = np.searchsorted(film.times, [begin - margin, end - margin])
        return film.times[first:past]
    whole = film.frames and begin <= film.start + SAME and end >= film.end - SAME
    count = film.frames if whole else max(0, round((end - begin) * film.rate))
    return begin + np.arange(count) / film.rate


def _checked(clip: Clip, row: Rows, film: Film, fps: float) -> Clip:
    """The clip, in which every frame has a picture of its own, at most half a frame away."""
    if film.times is None:  # of a file that does not list its pictures
        if film.rate < 0.98 * fps:
            raise _Misfit(
                "a video has fewer pictures a second than the data has frames", f"{film.rate:.3f} a second",
                f"{fps:g}, fps in meta/info.json", "encode it again at the rate of the data",
            )  # fmt: skip
        return clip
    asked = clip.start + row.since
    nearest = _nearest(film.times, asked)
    apart = np.abs(film.times[nearest] - asked)
    if (bad := apart > max(0.48 / fps, 0.5 / fps - SAME)).any():  # at half a frame rounding would choose
        at = int(np.argmax(bad))
        raise _Misfit(
            "a frame has no picture within half a frame of its time",
            f"frame {at} of the episode at {asked[at]:.3f} s, the nearest picture at {film.times[nearest[at]]:.3f} s",
            f"one at most {0.5 / fps:.3f} s away ({fps:g} fps)",
            "copy the file again, or encode it at the rate of the data",
        )  # fmt: skip
    if (bad := np.diff(nearest) < 1).any():
        at = int(np.argmax(bad))
        raise _Misfit(
            "two frames would get the same picture",
            f"frames {at} and {at + 1} of the episode, at {asked[at]:.3f} s and {asked[at + 1]:.3f} s",
            f"a picture for each; the nearest is at {film.times[nearest[at]]:.3f} s",
            "copy the file again, or encode it at the rate of the data",
        )  # fmt: skip
    return clip


def _nearest(times: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Which of the rising times is nearest to each of those asked for."""
    later = np.minimum(np.searchsorted(times, asked), len(times) - 1)
    before = np.maximum(later - 1, 0)
    return np.where(np.abs(times[before] - asked) <= np.abs(times[later] - asked), before, later)


def rows_of(
    meta: Meta, episodes: Iterable[range], begin: np.ndarray, since: np.ndarray, columns: Mapping[str, np.ndarray]
) -> list[Rows]:
    """What each episode needs of its videos, from the clock of its frames (see `spans.clock`) and their columns."""
    number = columns.get("frame_index")
    timed = number is not None or "timestamp" in columns
    return [
        Rows(
            int(n), len(span), float(begin[span.start]), since[span.start : span.stop],
            None if number is None else int(number[span.start]), timed,
        )
        for n, span in zip(meta.numbers, episodes, strict=True)
    ]  # fmt: skip
