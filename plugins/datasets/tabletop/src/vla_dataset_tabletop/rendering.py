"""Find a way to render on this machine: EGL, OSMesa, or the OSMesa inside the `lavavu-osmesa` wheel.

A wrong GL library can end the process, so each way is tried in a process of its own, once; the answer is kept in the
environment, so that child processes do not try again. `python -m vla_dataset_tabletop.rendering` says what works.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import importlib.util
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np

from vla.errors import VlaError

REMEMBER = "VLA_TABLETOP_GL"
WHEEL = "wheel"
# The wheel's libraries know each other by soname only: loading them in this order resolves them without a search path.
_WHEEL_LIBS = ("libtinfo", "libzstd", "libffi", "libpcre2", "libselinux", "libdrm", "libglapi", "libLLVM", "libOSMesa")
_PROBE = "from vla_dataset_tabletop.rendering import _try; _try({way!r})"
_open: weakref.WeakSet[Renderer] = weakref.WeakSet()
_ready: str | None = None


class RenderError(VlaError):
    """No way to render was found."""


def setup() -> str:
    """Choose the GL backend and load it. Returns "egl", "osmesa", "wheel", or what `MUJOCO_GL` says.

    Order: `MUJOCO_GL` when the user set it, else EGL, OSMesa, and the wheel. Outside Linux, MuJoCo's own choice.

    Raises:
        RenderError: none works; says what to install.
    """
    global _ready
    if _ready is None:
        _ready = _choose()
        _load(_ready)
    return _ready


def _choose() -> str:
    if remembered := os.environ.get(REMEMBER):
        return remembered
    asked = os.environ.get("MUJOCO_GL", "").lower().strip()
    if not sys.platform.startswith("linux") or asked == "glfw":
        return asked or "default"
    tried = {}
    for way in (asked,) if asked else ("egl", "osmesa", WHEEL):
        tried[way] = _probe(way)
        if not tried[way]:
            os.environ[REMEMBER] = way
            return way
    raise RenderError(
        "MuJoCo cannot render on this machine",
        field="MUJOCO_GL",
        got=asked or "not set",
        expected="; ".join(f"{way}: {why}" for way, why in tried.items()),
        fix=("unset MUJOCO_GL to try every way, or " if asked else "")
        + "pip install --no-deps lavavu-osmesa   (needs nothing else), or "
        "apt-get install libegl1 libgl1-mesa-dri   (EGL), or apt-get install libosmesa6",
    )


def _probe(way: str) -> str:
    """Render one frame in a process of its own; "" when it worked, else the reason."""
    env = {k: v for k, v in os.environ.items() if k not in (REMEMBER, "PYOPENGL_PLATFORM")}
    code = _PROBE.format(way=way)
    try:
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        return "no answer in 120 s"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return lines[-1][:160] if lines else f"process ended with status {done.returncode}"


def _try(way: str) -> None:
    """What the probing process runs: one frame, checked, then out before any exit handler of the GL library."""
    _load(way)
    import mujoco

    body = "<geom type='box' size='1 1 1' rgba='1 0 0 1'/><camera name='c' pos='0 0 5'/>"
    xml = f"<mujoco><worldbody>{body}</worldbody></mujoco>"
    renderer = mujoco.Renderer(mujoco.MjModel.from_xml_string(xml), 32, 32)
    data = mujoco.MjData(renderer.model)
    mujoco.mj_forward(renderer.model, data)
    renderer.update_scene(data, "c")
    if renderer.render()[16, 16, 0] < 20:
        raise RuntimeError("the rendered frame is black")
    sys.stdout.flush()
    os._exit(0)


def _load(way: str) -> None:
    """Make mujoco use this backend, also when mujoco was imported before with another."""
    if way not in ("egl", "osmesa", WHEEL):
        return
    platform = "osmesa" if way == WHEEL else way
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = platform
    if way == WHEEL:
        _load_wheel()
    import mujoco.renderer  # noqa: F401  so that the modules below exist

    context = importlib.import_module(f"mujoco.{platform}").GLContext
    for name in ("mujoco.rendering.classic.gl_context", "mujoco.gl_context"):
        if name in sys.modules:
            sys.modules[name].GLContext = context


def _load_wheel() -> None:
    """Load the libOSMesa of the wheel and hand it to PyOpenGL, which else looks for a system library."""
    folders = [Path(p) / "lavavu_osmesa.libs" for p in sys.path]
    folder = next((f for f in folders if f.is_dir()), None)
    if folder is None:
        raise ImportError("lavavu-osmesa is not installed")
    path = None
    for stem in _WHEEL_LIBS:
        path = next(iter(sorted(folder.glob(stem + "*.so*"))), None)
        if path is None:
            raise ImportError(f"lavavu-osmesa lacks {stem}")
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    # PyOpenGL looks for its libraries while `OpenGL.platform` is imported, so its loader is put in place before.
    name = "OpenGL.platform.ctypesloader"
    if "OpenGL.platform" in sys.modules:
        raise ImportError("PyOpenGL is already loaded with another library; start a new process")
    import OpenGL

    spec = importlib.util.spec_from_file_location(name, Path(OpenGL.__file__).parent / "platform" / "ctypesloader.py")
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    system = loader.loadLibrary

    def load(dll_type, library, mode=ctypes.RTLD_GLOBAL):
        return ctypes.CDLL(str(path), mode=mode) if library == "OSMesa" else system(dll_type, library, mode)

    loader.loadLibrary = load
    sys.modules[name] = loader


class Renderer:
    """Frames of one model at one size, without shadows, reflections or multisampling; closed at exit at the latest."""

    def __init__(self, model, size: int):
        setup()
        import mujoco

        self._flags = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)
        self._renderer = mujoco.Renderer(model, size, size)
        # Contexts that the garbage collector frees at exit print tracebacks: by then the GL library is gone. Registered
        # after the first context was made, so that it runs before the exit handler that the backend registers then.
        if not _open:
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _open.add(self)

    def frame(self, data, camera: str) -> np.ndarray:
        """uint8 [size size 3] as this camera sees the scene."""
        self._renderer.update_scene(data, camera)
        for flag in self._flags:
            self._renderer.scene.flags[flag] = 0
        return self._renderer.render()

    def close(self) -> None:
        """Free the GL context (again: no effect)."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None


def _close_all() -> None:
    for renderer in list(_open):
        renderer.close()


if __name__ == "__main__":
    try:
        print(setup())
    except RenderError as error:
        sys.exit(str(error))
