"""The decoders of videos: the same frames in any order from both, and what is said when one is not here."""

import importlib.util
import pickle
import subprocess
import sys
import types

import av
import numpy as np
import pytest
from vla_dataset_lerobot.video import Videos

from vla.datasets import DatasetInfo, create_dataset, open_dataset
from vla.errors import DataError, SettingsError

FPS, FRAMES = 10, 40


def _torchcodec_missing() -> str:
    if importlib.util.find_spec("torchcodec") is None:
        return "torchcodec is not installed"
    try:
        Videos(FPS, "torchcodec")
    except SettingsError as error:
        return str(error)
    return ""


MISSING = _torchcodec_missing()
DECODERS = ["pyav", pytest.param("torchcodec", marks=pytest.mark.skipif(bool(MISSING), reason=MISSING or "here"))]
# Keyframes often; far apart with frames out of order; and HEVC's open groups, whose last frames need the group before.
CODECS = {
    "often": ("libx264", {"g": "2", "bf": "0"}),
    "rare": ("libx264", {"g": "250", "bf": "3"}),
    "open": ("libx265", {"x265-params": "keyint=12:open-gop=1:log-level=error"}),
}


def _video(path, codec: str, options: dict[str, str]):
    """A file, and its frames as they come when it is played."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    y, x = np.mgrid[:64, :64]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options=options)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(FRAMES):
            image = np.stack([(y * 3 + i * 5) % 256, (x * 3 + i * 2) % 256, np.full_like(x, i * 5)], -1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode())
    with av.open(str(path)) as container:
        played = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(played) == FRAMES
    return path, played


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("how", CODECS)
def test_any_order_gives_the_frames_as_played(tmp_path, how, decoder):
    path, played = _video(tmp_path / "video.mp4", *CODECS[how])
    videos = Videos(FPS, decoder)
    for i in [*range(FRAMES), *np.random.default_rng(0).permutation(FRAMES)]:
        np.testing.assert_array_equal(videos.frame(path, i / FPS, "here"), played[i], str(i))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(videos)).frame(path, 1.0, "here"), played[FPS])


@pytest.mark.parametrize("decoder", DECODERS)
def test_times_between_frames_and_past_the_end(tmp_path, decoder):
    path, played = _video(tmp_path / "video.mp4", *CODECS["often"])
    videos = Videos(FPS, decoder)
    for off in (-0.04, 0.04):
        np.testing.assert_array_equal(videos.frame(path, 30 / FPS + off, "here"), played[30])
    with pytest.raises(DataError, match="video is damaged(.|\n)*6.500 s"):
        videos.frame(path, 6.5, "here")
    np.testing.assert_array_equal(videos.frame(path, 0.0, "here"), played[0])


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_nearest_frame_wins_whatever_the_rate_of_the_video(tmp_path, decoder):
    path, played = _video(tmp_path / "video.mp4", *CODECS["often"])
    videos = Videos(FPS / 4, decoder)  # the data has a quarter of the pictures
    for i in (0, 4, 8, 36, 16):
        for off in (0, 0.02, -0.04 if i else 0):
            np.testing.assert_array_equal(videos.frame(path, i / FPS + off, "here"), played[i], f"{i} {off}")


def test_what_refers_to_a_damaged_frame_is_damaged_too(tmp_path):
    path, played = _video(tmp_path / "video.mp4", "libx264", {"g": "20", "bf": "0", "sc_threshold": "0"})
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    raw = bytearray(path.read_bytes())
    begin, size = packets[8]
    raw[begin + 12 : begin + size] = bytes(b ^ 0x5A for b in raw[begin + 12 : begin + size])
    path.write_bytes(raw)
    videos = Videos(FPS)
    for i in [*range(FRAMES), *np.random.default_rng(0).permutation(FRAMES)]:
        if 8 <= i < 20:  # up to the next keyframe
            with pytest.raises(DataError, match="video is damaged"):
                videos.frame(path, i / FPS, "here")
        else:
            np.testing.assert_array_equal(videos.frame(path, i / FPS, "here"), played[i], str(i))


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_file_that_is_no_video_or_missing(tmp_path, decoder):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(DataError, match="video is damaged(.|\n)*text.mp4"):
        Videos(FPS, decoder).frame(tmp_path / "text.mp4", 0.0, "here")
    with pytest.raises(DataError, match="video file is missing(.|\n)*none.mp4"):
        Videos(FPS, decoder).frame(tmp_path / "none.mp4", 0.0, "here")


class _Tensor:
    def __init__(self, array):
        self.numpy = lambda: array


class _StandIn:
    """As torchcodec documents its VideoDecoder: a frame is on the screen from its time to that of the next one."""

    def __init__(self, source, *, dimension_order, num_ffmpeg_threads, seek_mode, device):
        assert (dimension_order, num_ffmpeg_threads, seek_mode, device) == ("NHWC", 1, "exact", "cpu")
        try:
            with av.open(source) as container:
                frames = [(float(f.time), f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]
        except av.FFmpegError as error:
            raise RuntimeError(f"Could not open input file: {source}\nmore lines") from error
        self.frames, end = frames, frames[-1][0] + 1 / FPS
        self.metadata = types.SimpleNamespace(begin_stream_seconds=frames[0][0], end_stream_seconds=end)

    def get_frame_played_at(self, seconds):
        if not self.metadata.begin_stream_seconds <= seconds < self.metadata.end_stream_seconds:
            raise IndexError(f"Invalid pts in seconds: {seconds}.")
        time, image = [frame for frame in self.frames if frame[0] <= seconds][-1]
        after = min(t for t in [*(t for t, _ in self.frames), self.metadata.end_stream_seconds] if t > time)
        return types.SimpleNamespace(data=_Tensor(image), pts_seconds=time, duration_seconds=after - time)


@pytest.fixture
def stand_in(monkeypatch):
    package, decoders = types.ModuleType("torchcodec"), types.ModuleType("torchcodec.decoders")
    package.ffmpeg_major_version, package.decoders, decoders.VideoDecoder = 7, decoders, _StandIn
    monkeypatch.setitem(sys.modules, "torchcodec", package)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    return package


def test_what_is_asked_of_torchcodec(tmp_path, stand_in):
    """With a stand-in of its documented interface, so that it is checked where torchcodec is not installed."""
    test_times_between_frames_and_past_the_end(tmp_path, "torchcodec")
    test_a_file_that_is_no_video_or_missing(tmp_path, "torchcodec")
    test_the_nearest_frame_wins_whatever_the_rate_of_the_video(tmp_path, "torchcodec")
    path, played = _video(tmp_path / "video.mp4", *CODECS["often"])
    videos = Videos(FPS, "torchcodec")
    for i in (0, 7, 6, FRAMES - 1):
        np.testing.assert_array_equal(videos.frame(path, i / FPS, "here"), played[i])


def _small_set(path):
    info = DatasetInfo(cameras={"front": (32, 32)}, state_dim=2, action_dim=2, hz=FPS)
    with create_dataset(path, info, video=True) as writer:
        image = np.zeros((32, 32, 3), np.uint8)
        writer.add({"images": {"front": image}, "state": np.zeros(2), "action": np.zeros(2), "prompt": "go"})
        writer.end_episode()
    return path


def test_a_decoder_that_is_not_here_is_one_error(tmp_path, monkeypatch, stand_in):
    folder = _small_set(tmp_path / "set")
    open_dataset(folder, {"decoder": "torchcodec"})
    stand_in.ffmpeg_major_version = None
    with pytest.raises(SettingsError, match="does not load(.|\n)*decoder(.|\n)*apt install ffmpeg"):
        open_dataset(folder, {"decoder": "torchcodec"})
    monkeypatch.setitem(sys.modules, "torchcodec", None)  # importing it fails now
    with pytest.raises(SettingsError, match=r"not installed(.|\n)*pip install 'vla-dataset-lerobot\[torchcodec\]'"):
        open_dataset(folder, {"decoder": "torchcodec"})
    with pytest.raises(SettingsError, match=r"decoder(.|\n)*'auto' or 'pyav' or 'torchcodec'"):
        open_dataset(folder, {"decoder": "opencv"})


def test_pytorch_is_not_imported_unless_chosen(tmp_path):
    code = (
        "import sys; from vla.datasets import open_dataset\n"
        f"open_dataset({str(_small_set(tmp_path / 'set'))!r}).sample(0, 1)\n"
        "assert 'torch' not in sys.modules and 'torchcodec' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
