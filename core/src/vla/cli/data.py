"""`vla data check`: whether a dataset opens, is as it was written, and shows what it should."""

from __future__ import annotations

from vla.cli import console

USAGE = """usage: vla data check DATA [options]

  check  open a dataset, compare its files with its manifest, and with --pixels decode every frame

`vla data check --help` explains the options."""


def check(data: str, /, set: tuple[str, ...] = (), pixels: bool = False) -> int:
    """Open a dataset, compare every byte with its manifest where it has one, and say what is in it.

    Args:
        data: a dataset folder in LeRobot's format, a hub name in the local cache, or PART:PATH.
        set: path=value, a setting of the data, e.g. data.cameras='["front"]'; may be repeated.
        pixels: decode every frame, and print a digest of all pixels, states, actions and instructions: two datasets
            with the same one show the same, however they are stored.
    """
    from pathlib import Path

    from vla.datasets import open_dataset
    from vla.errors import DataError, VlaError
    from vla.manifest import MANIFEST, read_manifest, verify_folder
    from vla.settings import split_sets

    other, of_data = split_sets(set, "data")
    dataset = open_dataset(data, {**other, **of_data})
    info = dataset.info
    print(f"{info.source}: {len(dataset.episodes)} episodes, {len(dataset)} frames at {info.hz:g} Hz")
    print(f"cameras: {', '.join(f'{name} {h}x{w}' for name, (h, w) in info.cameras.items()) or 'none'}")
    folder = Path(info.source)
    if (folder / MANIFEST).is_file() and read_manifest(folder)[0]:
        try:
            verify_folder(folder, ("meta", "data", "videos"))
        except VlaError as error:
            fix = f"copy the dataset again from its source; if it was changed on purpose: rm {folder / MANIFEST}"
            raise DataError(f"not as it was written: {error.what}", field=error.field, fix=fix) from error
        print("files: every byte is as it was written (manifest.json)")
    else:
        print("files: no manifest of vla, so nobody can say whether they are as they were written")
    print(f"digest: {dataset.digest()}")
    if pixels:
        from vla.pixels import pixel_digest

        with console.progress("decoding", len(dataset.episodes)) as advance:
            print(f"pixels: {pixel_digest(dataset, progress=lambda done, of: advance(done))}")
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    from vla.errors import SettingsError

    if argv and argv[0] == "check":
        return console.call(check, "data check", argv[1:])
    if argv and argv[0] not in ("--help", "-h"):
        raise SettingsError("no such verb", field="vla data", got=argv[0], expected="check")
    print(USAGE)
    return 0
