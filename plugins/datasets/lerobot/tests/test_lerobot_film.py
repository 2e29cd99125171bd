"""The times of pictures, read from the tables of a file: the same as when it is played, or left to PyAV."""

from fractions import Fraction

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vla_dataset_lerobot.film import CutOff, Film, films_of, listed_film, opened_film
from vla_dataset_lerobot.video import Videos

from vla.errors import DataError
from vla.testing.closeness import close

FRAMES = 24
KINDS = {
    "plain": ("a.mp4", "libx264", {"bf": "0", "g": "2"}, {}),
    "frames out of order": ("a.mp4", "libx264", {"bf": "3", "g": "12"}, {}),
    "tables first": ("a.mp4", "libx264", {"bf": "2"}, {"movflags": "faststart"}),
    "no edit list": ("a.mp4", "libx264", {"bf": "2"}, {"use_editlist": "0"}),
    "quicktime": ("a.mov", "libx264", {"bf": "2"}, {}),
    "hevc": ("a.mp4", "libx265", {"x265-params": "keyint=12:log-level=error"}, {}),
    "av1": ("a.mp4", "libsvtav1", {"preset": "12", "g": "2"}, {}),
    "fragments": ("a.mp4", "libx264", {"bf": "0"}, {"movflags": "frag_keyframe+empty_moov"}),
    "matroska": ("a.mkv", "libx264", {"bf": "2"}, {}),
}


def make(path, codec="libx264", options=None, container_options=None, times=None, rate=10, pix="yuv420p"):
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    times = np.arange(FRAMES) / rate if times is None else times
    with av.open(str(path), "w", container_options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height = stream.width = 64
        stream.pix_fmt = pix
        stream.codec_context.time_base = base = Fraction(1, 15360)
        for i, time in enumerate(times):
            image = np.full((64, 64, 3), i * 9 % 256, np.uint8)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(time / base), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def played(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.array([float(frame.pts * stream.time_base) for frame in container.decode(stream)])


@pytest.mark.parametrize("how", KINDS)
@pytest.mark.parametrize("start", [0.0, 0.3])
def test_times_are_those_of_the_played_pictures(tmp_path, how, start):
    name, codec, options, more = KINDS[how]
    path = make(tmp_path / name, codec, options, more, times=start + np.arange(FRAMES) / 10)
    listed, opened = listed_film(path), opened_film(path)
    times = played(path)
    if how in ("fragments", "matroska"):
        assert listed is None
    else:
        close(listed.times, times, 1e-6)
        assert (listed.frames, listed.start, listed.last) == (FRAMES, listed.times[0], listed.times[-1])
        assert times[-1] < listed.end < times[-1] + 0.2
    assert isinstance(opened, Film)
    close(opened.start, times[0], 1e-3, scale=1.0)
    close(opened.rate, 10.0, 0.05)


def test_irregular_times(tmp_path):
    times = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.3, FRAMES))
    for options in ({"bf": "0"}, {"bf": "3"}):
        path = make(tmp_path / "a.mp4", options=options, times=times)
        close(listed_film(path).times, played(path), 1e-4)


def test_what_is_no_film_and_what_is_not_whole(tmp_path):
    path = make(tmp_path / "a.mp4", container_options={"movflags": "faststart"})
    (tmp_path / "cut.mp4").write_bytes(path.read_bytes()[:-50])
    with pytest.raises(CutOff, match="cut off"):
        listed_film(tmp_path / "cut.mp4")
    (tmp_path / "text.mp4").write_text("version https://git-lfs.github.com/spec/v1\n")
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "folder.mp4").mkdir()
    names = ("cut", "text", "empty", "folder", "none", "a")
    found = films_of([tmp_path / f"{name}.mp4" for name in names])
    cut, text, empty, folder, none, good = found.values()
    assert "cut off" in cut and "git lfs pull" in text and empty and "regular file" in folder and none == "missing"
    assert good.frames == FRAMES


def test_depth_in_a_video_is_no_picture(tmp_path):
    quiet = {"x265-params": "log-level=error"}
    grey = make(tmp_path / "grey.mp4", "libx265", quiet, pix="gray")
    assert films_of([grey])[grey].frames == FRAMES
    deep = make(tmp_path / "deep.mp4", "libx265", quiet, pix="gray12le")
    with pytest.raises(DataError, match=r"more than 8 bits(.|\n)*deep.mp4(.|\n)*gray12le(.|\n)*data.cameras="):
        films_of([deep])
    with pytest.raises(DataError, match=r"more than 8 bits(.|\n)*depth"):
        Videos(10).frame(deep, 0.0, "here")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_tables_are_left_to_pyav_and_never_harm(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "whole.mp4"
    if not path.exists():
        make(path, options={"bf": "2"})
    raw = bytearray(path.read_bytes())
    table = raw.index(b"moov") - 4
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(table, len(raw) - 4))
        raw[at : at + 4] = data.draw(st.sampled_from([b"\xff" * 4, b"\0" * 4, b"\0\0\0\1", b"\x7f\xff\xff\xff"]))
    if data.draw(st.booleans()):
        raw = raw[: data.draw(st.integers(0, len(raw)))]
    bent = folder / "bent.mp4"
    bent.write_bytes(raw)
    try:
        found = listed_film(bent)
    except CutOff:
        return
    assert found is None or (len(found.times) == found.frames and np.isfinite(found.times).all())
