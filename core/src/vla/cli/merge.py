"""`vla merge`: a model directory from a base model and what a training run with LoRA kept."""

from __future__ import annotations

from vla.cli import console


def merge(base: str, adapter: str, /, out: str, overwrite: bool = False) -> int:
    """Put what LoRA trained into the model that it was trained on. The result is a plain model directory.

    A run with LoRA writes it already, as `model/`; `adapter/` is the small part of it, to be kept or sent around.

    Args:
        base: the model directory that training started from.
        adapter: the run, or its folder `adapter/`.
        out: the model directory to write.
        overwrite: replace a model directory that is there.
    """
    from vla.training.lora import merge_adapter

    merge_adapter(base, adapter, out, overwrite=overwrite)
    console.note(f"wrote {out}")
    return 0


def main(argv: list[str]) -> int:
    """The verb."""
    return console.call(merge, "merge", argv)
