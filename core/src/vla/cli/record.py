"""`vla record`: demonstrations of an environment's expert, as a dataset."""

from __future__ import annotations

from vla.cli import console


def record(
    env: str = "tabletop",
    episodes: int = 100,
    out: str = "",
    set: tuple[str, ...] = (),
    preset: str = "",
    seed: int = 0,
    noise: float = 0.15,
    workers: int = 2,
    video: bool = False,
    overwrite: bool = False,
    digest: bool = False,
) -> int:
    """Record demonstrations of the expert of an environment.

    Args:
        env: the environment, e.g. tabletop.
        episodes: successful episodes to keep.
        out: a folder for the dataset (LeRobotDataset v3.0); nothing may be there.
        set: path=value, a setting of the environment, e.g. env.families='["touch"]'; may be repeated.
        preset: settings of the environment by name, e.g. tiny.
        seed: chooses the episodes; none of them occurs in an evaluation with small seeds.
        noise: sd of the noise on executed actions in half of the episodes; stored actions stay the expert's.
        workers: processes that act and render.
        video: store cameras as H.264 video instead of exactly.
        overwrite: replace the dataset that is there, when the new one is complete.
        digest: read it back and print a digest of every pixel, as `vla data check --pixels` does.
    """
    from vla.cli.eval import env_table
    from vla.errors import SettingsError
    from vla.recording import record as run

    if not out:
        raise SettingsError("no folder is named", field="--out", fix="--out FOLDER")
    table = env_table(env, preset, set)
    with console.progress("recording", episodes) as advance:
        done = run(
            table, out, episodes, seed=seed, noise=noise, workers=workers, video=video, overwrite=overwrite,
            progress=lambda kept, of: advance(kept),
        )  # fmt: skip
    share = ", ".join(f"{task} {n}" for task, n in sorted(done.tasks.items()))
    console.note(f"{done.episodes} episodes ({share}), {done.frames} frames, {done.tries} tries: {done.path}")
    if digest:
        from vla.datasets import open_dataset
        from vla.pixels import pixel_digest

        with console.progress("reading back", episodes) as advance:
            print(f"pixels: {pixel_digest(open_dataset(done.path), progress=lambda n, of: advance(n))}")
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(record, "record", argv)
