"""Where a dataset is: a folder, a hub cache folder, or a hub name in the local caches. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from vla.errors import DataError
from vla.reading import read_text


def find_root(path: str) -> Path:
    """The folder with meta/info.json: the path itself, a hub cache folder, or a hub name in the local caches.

    Raises:
        DataError: nothing is there.
    """
    if not path:
        raise DataError(
            "which dataset?", field="path", got="''", fix="name a folder with meta/info.json, or a hub name org/name"
        )
    given = Path(os.path.expanduser(path))
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    tried = [given]
    if not given.is_absolute() and len(given.parts) == 2 and not given.is_dir():
        cached = "datasets--" + path.replace("/", "--")
        lerobot = Path(os.environ.get("HF_LEROBOT_HOME", hub / "lerobot")).expanduser()
        hub_cache = Path(os.environ.get("HF_HUB_CACHE", hub / "hub")).expanduser()
        tried += [lerobot / path, lerobot / "hub" / cached, hub_cache / cached]
    for folder in tried:
        if (folder / "meta" / "info.json").is_file():
            return folder
        if (snapshot := _snapshot(folder)) is not None:
            return snapshot
    if not given.is_dir():
        raise DataError(
            "no such dataset folder",
            field="path",
            got=path,
            expected="a folder with meta/info.json, or a hub name in one of " + ", ".join(map(str, tried[1:]))
            if tried[1:]
            else "a folder with meta/info.json",
            fix="check the path; a hub dataset must be downloaded first (nothing is downloaded here)",
        )
    raise DataError(
        "not a LeRobotDataset: it has no meta/info.json",
        field="path",
        got=path,
        fix="point at the folder that holds `meta` and `data`",
    )


def _snapshot(folder: Path) -> Path | None:
    """The current snapshot of a hub cache folder."""
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return None
    main = folder / "refs" / "main"
    current = [read_text(main, 1024, DataError).strip()] if main.is_file() else []
    names = current or sorted(p.name for p in snapshots.iterdir())
    for name in reversed(names):
        if (snapshots / name / "meta" / "info.json").is_file():
            return snapshots / name
    return None
