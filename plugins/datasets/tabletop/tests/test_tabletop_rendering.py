"""Rendering: each way is tried in a process of its own; what happens when none works."""

import importlib.util
import os
import subprocess
import sys

import pytest
from vla_dataset_tabletop import rendering

SCRIPT = """
from vla_dataset_tabletop.config import EnvSettings
from vla_dataset_tabletop.env import make
from vla_dataset_tabletop import rendering
env = make(EnvSettings(image_size=32, families=("touch",)))
image = env.reset(seed=0)[0]["images"]["front"]
other = make(EnvSettings(image_size=32), 1)
other.reset()
print(rendering.setup(), image.shape, int(image.std()))
"""


def run(code: str, **env) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM", rendering.REMEMBER)}
    return subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, timeout=120
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere MuJoCo chooses by itself")
def test_it_finds_a_way_and_leaves_quietly():
    done = run("import mujoco" + SCRIPT)  # also when mujoco was imported before, with its default backend
    way, *_, spread = done.stdout.split()
    assert way in ("egl", "osmesa", "wheel") and int(spread) > 10
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(importlib.util.find_spec("OpenGL") is None, reason="PyOpenGL is not installed")
def test_the_wheel_renders_where_it_is_installed():
    if rendering._probe("wheel").startswith("ImportError: lavavu-osmesa is not installed"):
        pytest.skip("lavavu-osmesa is not installed")
    done = run(SCRIPT, **{rendering.REMEMBER: "wheel"})
    assert done.stdout.startswith("wheel (32, 32, 3)") and "Traceback" not in done.stderr, done.stderr


def test_no_way_to_render_is_one_clear_error(monkeypatch):
    for name in ("MUJOCO_GL", rendering.REMEMBER):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    tried = []
    monkeypatch.setattr(rendering, "_probe", lambda way: tried.append(way) or f"no {way} here")
    with pytest.raises(
        rendering.RenderError, match=r"no egl here(.|\n)*no wheel here(.|\n)*pip install --no-deps lavavu-osmesa"
    ):
        rendering._choose()
    assert tried == ["egl", "osmesa", "wheel"]


def test_what_the_user_asks_for_is_tried_alone(monkeypatch):
    monkeypatch.setenv(rendering.REMEMBER, "")  # so that what is set below is forgotten again
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(rendering, "_probe", lambda way: f"no {way} here")
    with pytest.raises(rendering.RenderError, match=r"got:      osmesa(.|\n)*unset MUJOCO_GL"):
        rendering._choose()
    monkeypatch.setattr(rendering, "_probe", lambda way: "")
    assert rendering._choose() == "osmesa" == os.environ[rendering.REMEMBER]


def test_a_probe_reports_why_it_failed():
    found = rendering._probe("wheel")
    assert found == "" or "lavavu" in found
