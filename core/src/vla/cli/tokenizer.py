"""`vla tokenizer fit` and `vla tokenizer bench`: action tokenizers on your own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from vla.cli import console

USAGE = """usage: vla tokenizer {fit,bench} DATA [options]

  fit    learn an action tokenizer from the actions of a dataset
  bench  compare action tokenizers on a dataset: length, error, robustness, speed

`vla tokenizer fit --help` and `vla tokenizer bench --help` explain the options."""


def fit(
    data: str,
    /,
    tokenizer: str = "fast",
    out: str = "",
    horizon: int = 50,
    robot: str = "",
    set: tuple[str, ...] = (),
    preset: str = "",
    chunks: int = 4096,
) -> int:
    """Learn an action tokenizer from the actions of a dataset, as `vla train` does with one that is not fitted.

    Of a dataset the actions are what a policy sees: after the conversions of the robot's adapter and delta actions,
    normalised by the statistics of the data.

    Args:
        data: a dataset, or an .npz file with `actions` or `chunks`.
        tokenizer: fast, fsq or binning.
        out: a folder to write; use it with --set tokenizer.source=FOLDER. It must not exist.
        horizon: steps per chunk (spec.action_horizon of the policy).
        robot: the robot adapter; default: that of the dataset, else plain.
        set: path=value: a setting of the tokenizer, e.g. codes=2048, of the data, e.g. data.stride=2, or of the robot
            adapter, e.g. robot.delta=[7]; may be repeated.
        preset: settings of the tokenizer by name, e.g. small.
        chunks: how many chunks to learn from, at most.
    """
    from pathlib import Path

    from vla.codec_bench import load_chunks
    from vla.codecs import SlowFit
    from vla.errors import SettingsError, StoreError
    from vla.files import atomic_folder

    if not out:
        raise SettingsError("no folder is named", field="--out", fix="--out FOLDER")
    if Path(out).expanduser().exists():
        raise StoreError("the folder exists", field="--out", got=out, fix="name a new folder, or remove it")
    sets, of_data, variant = _sorted(set, data, robot, horizon)
    codec = _codec(tokenizer, preset, sets)
    normal = load_chunks(data, horizon, chunks, of_data, variant).normalised()
    if isinstance(codec, SlowFit) and not codec.fitted:
        console.note(f"{tokenizer}: the fit takes {_about(codec.fit_seconds(normal))} on this machine, alone")
        codec.on_step = _progress(tokenizer)
    codec = codec.fit(normal)
    with atomic_folder(out, "tokenizer") as folder:
        codec.save(folder)
    lengths = [len(ids) for ids in codec.encode(normal)]
    h, d = normal.shape[1:]
    console.note(f"fitted {tokenizer} on {len(normal)} chunks [{h}, {d}]: {out}")
    print(f"tokens per chunk: {sum(lengths) / len(lengths):.1f} mean, {max(lengths)} most, of {h * d} values")
    print(
        f"use it: --tokenizer {tokenizer} --set tokenizer.source={out}"
        f"   (spec.max_token_len >= prompt + {max(lengths)} + 5)"
    )
    return 0


def bench(
    data: str,
    /,
    tokenizer: str = "fast,binning,fsq",
    horizon: int = 50,
    robot: str = "",
    set: tuple[str, ...] = (),
    preset: str = "",
    chunks: int = 4096,
    limit: float = 40.0,
    picture: str = "",
    json: bool = False,
) -> int:
    """Compare action tokenizers on a dataset: fitted on 80 % of the chunks, measured on the rest.

    Args:
        data: a dataset, or an .npz file with `actions` or `chunks`.
        tokenizer: names, separated by commas.
        horizon: steps per chunk.
        robot: the robot adapter; default: that of the dataset, else plain.
        set: NAME.path=value, a setting of one of them, e.g. fast.codes=2048; or a setting of the data, e.g.
            data.stride=2, or of the robot adapter, e.g. robot.delta=[7]; may be repeated.
        preset: settings by name, for those that have a preset of this name.
        chunks: how many chunks to look at, at most.
        limit: seconds for the fit of a network (fsq), which then makes fewer steps than its settings say, and that is
            said; 0: all steps.
        picture: a PNG file to write: original against decoded, per dimension.
        json: print JSON instead of the table.
    """
    from pathlib import Path

    from vla.codec_bench import COLUMNS, LEGEND, load_chunks, measure, plain, rows
    from vla.codec_bench import picture as draw
    from vla.errors import SettingsError

    names = [name.strip() for name in tokenizer.split(",") if name.strip()]
    if not names:
        raise SettingsError(
            "no tokenizer is named", field="--tokenizer", got=tokenizer, fix="--tokenizer fast,binning,fsq"
        )
    own: dict[str, list[str]] = {name: [] for name in names}
    sets, of_data, variant = _sorted(set, data, robot, horizon)
    for word in sets:
        name, dot, rest = word.partition(".")
        if not dot or name not in own:
            raise SettingsError(
                "a setting here begins with a tokenizer's name",
                field="--set",
                got=word,
                expected=f"one of {[*names, 'data', 'robot']}",
                fix=f"--set {names[0]}.{word}",
            )
        own[name].append(rest)
    codecs = {name: _codec(name, preset, own[name]) for name in names}
    found = load_chunks(data, horizon, chunks, of_data, variant)
    results = []
    for name, codec in codecs.items():
        console.note(f"measuring {name} ...")
        results.append(measure(name, _within(limit, name, codec, found.normalised()), found))
    if json:
        import json as writer

        print(writer.dumps([plain(r) for r in results], indent=1))
    else:
        n, h, d = found.raw.shape
        title = f"{n} chunks [{h}, {d}] of {console.escape(data)}, a fifth held out and measured"
        console.show(console.table(title, COLUMNS, [tuple(map(console.escape, row)) for row in rows(results)]), LEGEND)
    if picture:
        draw(Path(picture).expanduser(), found, results)
        console.note(f"wrote {picture}")
    return 0


def _sorted(set: Sequence[str], data: str, robot: str, horizon: int) -> tuple[list[str], dict[str, Any], Any]:
    """(settings of tokenizers, those of the data, dataset -> the variant whose adapter converts)."""
    from vla.cli.stats import variant_of
    from vla.errors import SettingsError
    from vla.settings import parse_sets

    sets = [word for word in set if not word.startswith(("data.", "robot."))]
    parsed = parse_sets([word for word in set if word not in sets])
    of_data = {path.removeprefix("data."): v for path, v in parsed.items() if path.startswith("data.")}
    of_robot = {path: v for path, v in parsed.items() if path.startswith("robot.")}
    if data.endswith(".npz"):
        if parsed or robot:
            got = robot or next(iter(parsed))
            raise SettingsError(
                "an .npz file has no settings and no robot", field="--set, --robot", got=got, fix="leave them out"
            )
        return sets, {}, None
    shape = {"spec.action_horizon": max(horizon, 1)}
    return sets, of_data, lambda dataset: variant_of("", robot, {**of_robot, **shape}, dataset)


def _within(limit: float, name: str, codec: Any, chunks: Any) -> Any:
    """The codec as it is, or with fewer steps where its fit takes longer than `limit` seconds; both are said."""
    from vla.codecs import SlowFit

    if not isinstance(codec, SlowFit) or codec.fitted:
        return codec
    seconds = codec.fit_seconds(chunks)
    text = f"{name}: the fit takes {_about(seconds)} on this machine, alone"
    if 0 < limit < seconds:
        codec = codec.shortened(limit / seconds)
        text += f"; measured after {limit / seconds:.0%} of its steps, so its errors are too large (--limit 0: all)"
    console.note(text)
    codec.on_step = _progress(name)
    return codec


def _about(seconds: float) -> str:
    return f"about {seconds:.0f} s" if seconds < 120 else f"about {seconds / 60:.0f} minutes"


def _progress(name: str) -> Callable[[int, int], None]:
    """Says how far a fit is, every ten seconds."""
    import time

    last = [time.monotonic()]

    def on_step(done: int, steps: int) -> None:
        if time.monotonic() - last[0] >= 10:
            last[0] = time.monotonic()
            console.note(f"{name}: step {done} of {steps}")

    return on_step


def _codec(name: str, preset: str, sets: Iterable[str]) -> Any:
    """A codec by the name of its tokenizer; its text tokenizer is not opened."""
    from vla.compose import load_object, resolve
    from vla.errors import SettingsError
    from vla.registry import find
    from vla.settings import parse_sets

    part = find("tokenizer", name, path="tokenizer").load()
    if "text" not in part.slots:
        raise SettingsError(
            f"tokenizer {name!r} has no action codec", field="--tokenizer", got=name, expected="fast, binning or fsq"
        )
    table: dict[str, Any] = {"part": name, **parse_sets(sets)}
    if preset and preset in part.presets:
        table["preset"] = preset
    chosen = resolve("tokenizer", table, "tokenizer")
    return load_object(chosen.part.numpy or "", f"tokenizer {name!r}")(chosen.settings)


def main(argv: list[str]) -> int:
    """The verb."""
    verbs: dict[str, Callable[..., int | None]] = {"fit": fit, "bench": bench}
    if not argv or argv[0] not in verbs:
        from vla.errors import SettingsError

        if argv and argv[0] not in ("--help", "-h"):
            raise SettingsError("no such verb", field="vla tokenizer", got=argv[0], expected=list(verbs))
        print(USAGE)
        return 0
    return console.call(verbs[argv[0]], f"tokenizer {argv[0]}", argv[1:])
