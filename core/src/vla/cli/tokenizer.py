"""`vla tokenizer fit` and `vla tokenizer bench`: action tokenizers on your own data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    set: tuple[str, ...] = (),
    preset: str = "",
    chunks: int = 4096,
) -> int:
    """Learn an action tokenizer from the actions of a dataset, after quantile normalisation.

    `vla train` fits an unfitted tokenizer by itself, on actions as its robot adapter makes them (deltas, say). This
    verb takes the actions as they are stored.

    Args:
        data: a dataset, or an .npz file with `actions` or `chunks`.
        tokenizer: fast, fsq or binning.
        out: a folder to write; use it with --set tokenizer.source=FOLDER. It must not exist.
        horizon: steps per chunk (spec.action_horizon of the policy).
        set: path=value, a setting of the tokenizer, e.g. codes=2048; may be repeated.
        preset: settings of the tokenizer by name, e.g. small.
        chunks: how many chunks to learn from, at most.
    """
    from pathlib import Path

    from vla.codec_bench import load_chunks
    from vla.errors import SettingsError, StoreError
    from vla.files import atomic_folder

    if not out:
        raise SettingsError("no folder is named", field="--out", fix="--out FOLDER")
    if Path(out).exists():
        raise StoreError("the folder exists", field="--out", got=out, fix="name a new folder, or remove it")
    codec = _codec(tokenizer, preset, set)
    normal = load_chunks(data, horizon, chunks).normalised()
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
    set: tuple[str, ...] = (),
    preset: str = "",
    chunks: int = 4096,
    picture: str = "",
    json: bool = False,
) -> int:
    """Compare action tokenizers on a dataset: fitted on 80 % of the chunks, measured on the rest.

    Args:
        data: a dataset, or an .npz file with `actions` or `chunks`.
        tokenizer: names, separated by commas.
        horizon: steps per chunk.
        set: NAME.path=value, a setting of one of them, e.g. fast.codes=2048; may be repeated.
        preset: settings by name, for those that have a preset of this name.
        chunks: how many chunks to look at, at most.
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
    for word in set:
        name, dot, rest = word.partition(".")
        if not dot or name not in own:
            raise SettingsError(
                "a setting here begins with a tokenizer's name",
                field="--set",
                got=word,
                expected=f"one of {names}",
                fix=f"--set {names[0]}.{word}",
            )
        own[name].append(rest)
    codecs = {name: _codec(name, preset, own[name]) for name in names}
    found = load_chunks(data, horizon, chunks)
    results = []
    for name, codec in codecs.items():
        console.note(f"measuring {name} ...")
        results.append(measure(name, codec, found))
    if json:
        import json as writer

        print(writer.dumps([plain(r) for r in results], indent=1))
    else:
        n, h, d = found.raw.shape
        title = f"{n} chunks [{h}, {d}] of {console.escape(data)}, a fifth held out and measured"
        console.show(console.table(title, COLUMNS, [tuple(map(console.escape, row)) for row in rows(results)]), LEGEND)
    if picture:
        draw(Path(picture), found, results)
        console.note(f"wrote {picture}")
    return 0


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
