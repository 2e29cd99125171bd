"""`vla import`: a model directory from another system's checkpoint."""

from __future__ import annotations

from vla.cli import console


def import_(
    system: str,
    path: str,
    /,
    out: str,
    type: str = "",
    set: tuple[str, ...] = (),
    asset_id: str = "",
    name: str = "",
    lora_alpha: float | None = None,
    lora_rslora: bool = False,
    overwrite: bool = False,
) -> int:
    """Make a model directory from a checkpoint of another system. Every tensor is accounted for, or nothing is written.

    Sizes come from the shapes of the weights. What no shape shows comes from the model type or from --set:
    spec.action_horizon, spec.max_token_len, for pi0_fast also spec.action_dim and spec.state_dim.

    Args:
        system: who wrote the checkpoint: openpi.
        path: its folder: a released checkpoint, a run of openpi's training (its last step is taken), or `params`.
        out: the model directory to write.
        type: model type to make: pi0, pi05, pi0_fast, pi05_ki; default: what the checkpoint is.
        set: path=value, any setting, e.g. spec.action_horizon=10; may be repeated.
        asset_id: which of the checkpoint's normalisation statistics, when it has several.
        name: the name of the variant; default: the model type.
        lora_alpha: alpha of the LoRA weights, which are merged; default: their rank, as in openpi's variants.
        lora_rslora: their scale is alpha / sqrt(rank) (in openpi's variants it is not).
        overwrite: replace a model directory that is there.
    """
    from vla import store
    from vla.compose import renamed
    from vla.errors import SettingsError
    from vla.files import atomic_folder
    from vla.interop import openpi

    if system != "openpi":
        raise SettingsError("vla cannot read checkpoints of this system", field="system", got=system, expected="openpi")
    checkpoint = openpi.open_checkpoint(path, lora_alpha, lora_rslora)
    stats_file = openpi.find_stats(path, asset_id or None)
    stats = None
    if stats_file is not None:
        from vla.transforms.stats import load_stats

        stats = load_stats(stats_file)
    variant = openpi.variant_of(checkpoint, type or None, {}, set)
    if name:
        variant = renamed(variant, name)
    with atomic_folder(out, store.KIND, overwrite=overwrite) as temp:  # a folder in the way costs no reading
        weights = openpi.convert(checkpoint, variant)
        source = {"system": system, "type": checkpoint.type, "arrays": len(checkpoint.leaves)}
        record = {"imported": {**source, "lora_ranks": list(checkpoint.ranks)}}
        store.write_model(temp, variant, weights, stats, None, record=record)
    count = sum(w.size for w in weights.values())
    console.note(f"{checkpoint.params}: {checkpoint.type}, {len(checkpoint.leaves)} arrays, {count:,} parameters")
    if checkpoint.ranks:
        rule = "their rank" if lora_alpha is None else f"{lora_alpha:g}"
        console.note(f"LoRA weights of rank {', '.join(map(str, checkpoint.ranks))} are merged, with alpha {rule}")
    console.note(f"statistics: {stats_file or 'none beside the weights, so the policy will not normalise'}")
    console.note(f"wrote {out}")
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(import_, "import", argv)
