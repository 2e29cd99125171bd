"""`vla build`: names -> a checked variant -> variant.toml."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vla.cli import console


def build(
    head: str = "",
    tokenizer: str = "",
    backbone: str = "",
    robot: str = "",
    type: str = "",
    base: str = "",
    for_: tuple[str, ...] = (),
    preset: str = "",
    set: tuple[str, ...] = (),
    name: str = "",
    out: str = "",
    init: str = "",
    reinit: tuple[str, ...] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Compose a variant from named parts, check that they fit, and print it as TOML.

    Args:
        head: how tokens or chunks of actions come out, e.g. ki, flow, ar.
        tokenizer: prompt format and action codec, e.g. fast, binning, paligemma.
        backbone: the vision-language model, e.g. paligemma.
        robot: the adapter between a robot's data and the model, e.g. plain, droid.
        type: start from a model type: pi0, pi05, pi0_fast, pi05_ki.
        base: start from a variant file or a model directory instead.
        for_: a dataset to build for, or several: widths, cameras, rate and robot are read from it, and shapes, which
            camera is which, and the lengths of chunks and prompts follow. What --set says wins.
        preset: sizes for every part that has a preset of this name, and for the spec: tiny, small.
        set: path=value, any setting or inner part, e.g. head.tokens=ar or spec.action_dim=7; may be repeated.
        name: the name in the file.
        out: a folder to write variant.toml into; with --init a model directory.
        init: also make weights: those of a model directory or run (with --base of the same, what may change is what
            `vla train MODEL --set` may change), or paligemma:PATH, which fills the backbone, or transformers:PATH,
            which fills the parts `hf` of it; the rest is made anew.
        reinit: weights of the model to make anew, by names or beginnings of names; may be repeated.
        seed: of the new weights.
        overwrite: replace a variant.toml that is there and another, or with --init a model directory.
    """
    from vla import compose, registry
    from vla.errors import SettingsError

    if reinit and not init:
        fix = "add --init MODEL, or leave out --reinit"
        raise SettingsError("--reinit is for weights of a model", field="--reinit", got=",".join(reinit), fix=fix)
    of_variant = [text for text in set if not (for_ and text.startswith("data."))]
    variant = compose.build(
        head=head or None, tokenizer=tokenizer or None, backbone=backbone or None, robot=robot or None,
        type=type or None, base=base or None, preset=preset or None, set=of_variant, name=name or None,
    )  # fmt: skip
    if for_:
        variant, reinit = _for_data(variant, for_, set, robot, init, reinit)
    if registry.listed(registry.HOOKS):
        from vla import hooks
        from vla.errors import PartError

        found = hooks.findings(variant)
        for finding in found:
            console.note(str(finding))
        if bad := [finding for finding in found if finding.level == "error"]:
            raise PartError(f"a listener refuses this variant: {bad[0].message}", fix=bad[0].fix)
    text = variant.to_toml()
    print(text, end="")
    print(f"\n# runs in: {', '.join(variant.frameworks()) or 'no framework: its parts have none in common'}")
    if init:
        write_started(out, variant, init, reinit, seed, overwrite)
    elif out:
        console.note(f"wrote {write_variant(Path(out), text, overwrite)}")
    return 0


def _for_data(
    variant: Any, data: tuple[str, ...], sets: tuple[str, ...], robot: str, init: str, reinit: tuple[str, ...]
) -> tuple[Any, tuple[str, ...]]:
    """The variant with what the data says, and the weights of `init` that this makes anew; all of it is said."""
    from vla.datasets import mixture_table, open_dataset
    from vla.refit import names_of
    from vla.runs import find_model
    from vla.settings import split_sets
    from vla.training.for_data import fitted, room_for
    from vla.training.start import is_trained

    of_variant, of_data = split_sets(sets, "data")
    dataset = open_dataset(mixture_table(data, of_data))
    given = [*of_variant, *(["robot"] if robot else [])]
    trained = bool(init) and is_trained(find_model(init))
    out, anew = fitted(variant, dataset, given, names_of(reinit), trained, console.note)
    if "spec.max_token_len" not in given:
        out = room_for(out, dataset, console.note)
    return out, anew


def write_started(out: str, variant: Any, init: str, reinit: tuple[str, ...], seed: int, overwrite: bool) -> None:
    """Write a model directory with starting weights, and say which weights are new.

    Raises:
        SettingsError: no folder is given, `init` names no known source, or weights do not fit and are not in `reinit`.
        StoreError: the source does not fit, or the folder cannot be written.
    """
    from vla.errors import SettingsError
    from vla.files import atomic_folder
    from vla.refit import names_of
    from vla.store import KIND, write_model
    from vla.training.start import start_from

    if not out:
        raise SettingsError("--init makes weights, which need a folder", field="--out", got="", fix="add --out DIR")
    with atomic_folder(out, KIND, overwrite=overwrite) as temp:  # a folder in the way costs no reading
        start = start_from(variant, init, names_of(reinit), seed)
        record = {"weights": start.origin.to_table(), **start.record}
        write_model(temp, variant, start.weights or {}, start.stats, start.tokenizer, record=record)
    console.note(f"{start.origin}\nwrote {out}")


def write_variant(folder: Path, text: str, overwrite: bool) -> Path:
    """Write `variant.toml` into a folder, whole or not at all.

    Raises:
        StoreError: the folder cannot be written, holds weights, which belong to the variant that is there, or holds
            another variant, which people edit by hand.
    """
    from vla.compose import VARIANT_FILE
    from vla.errors import StoreError
    from vla.files import write_text

    target = folder.expanduser() / VARIANT_FILE
    folder = target.parent
    if (folder / "model.safetensors").exists():
        fix = "choose another folder, or remove the weights"
        raise StoreError("this folder holds the weights of another variant", field="--out", got=str(folder), fix=fix)
    if target.is_file() and not overwrite and target.read_bytes() != text.encode():
        fix = "choose another folder, or add --overwrite"
        raise StoreError("another variant is there, or it was edited", field=str(target), fix=fix)
    return write_text(target, text, "the variant", b"vla = ")


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(build, "build", argv)
