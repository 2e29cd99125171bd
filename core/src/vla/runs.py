"""Which model a path means: the folder of a training run stands for its model, and each of its checkpoints is one too.

    runs/mine        its finished model, `runs/mine/model`; before the run has ended its newest checkpoint
    runs/mine@120    the checkpoint of step 120
    anything else    itself

Light: standard library only, until a checkpoint is opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla.errors import StoreError
from vla.reading import COPY, read_json

if TYPE_CHECKING:
    import numpy as np

    from vla.store import ModelDir

MODEL, RUN = "model", "run.json"  # inside a run directory
_STATE, _VARIANT = "train_state.json", "variant.toml"


def find_model(path: str | Path) -> Path:
    """The model directory, checkpoint or file that a path means; one that is no run stands for itself.

    Raises:
        StoreError: the run has neither a model nor a checkpoint yet, or none of that step.
    """
    folder = Path(os.path.expanduser(path))  # ~ of nobody stays as it is
    if folder.exists():
        return _of_run(folder, None) if _is_run(folder) else folder
    name, at, step = folder.name.rpartition("@")
    if at and step.isdigit() and _is_run(folder.with_name(name)):
        return _of_run(folder.with_name(name), int(step))
    return folder


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of a training run."""
    return (folder / _STATE).is_file()


def _is_run(folder: Path) -> bool:
    if not folder.is_dir() or (folder / _VARIANT).exists() or is_checkpoint(folder):
        return False
    return (folder / RUN).is_file() or (folder / "checkpoints").is_dir() or (folder / MODEL / _VARIANT).is_file()


def _of_run(run: Path, step: int | None) -> Path:
    from vla.training.checkpoints import checkpoint_folder, checkpoint_steps

    if step is None and (run / MODEL / _VARIANT).is_file():
        return run / MODEL
    steps = checkpoint_steps(run)
    if step is None and not steps:
        fix = f"wait for its first checkpoint (--save-every), or go on with it: vla train --out {run} --resume"
        raise StoreError("this run has no model and no checkpoint yet", field=str(run), fix=fix)
    if step is not None and step not in steps:
        have = f"{run}@{steps[-1]}" if steps else f"vla train --out {run} --resume"
        raise StoreError(
            "the run has no checkpoint of this step", field=str(run), got=step, expected=steps or "none yet", fix=have
        )
    return checkpoint_folder(run, steps[-1] if step is None else step)


def checkpoint_variant(folder: Path) -> Any:
    """The variant of a checkpoint.

    Raises:
        StoreError: the checkpoint is damaged.
        PartError: a part is not installed.
    """
    from vla.compose import variant_from_toml

    return variant_from_toml(checkpoint_state(folder)["variant"], str(folder / _STATE))


def open_checkpoint(folder: Path, *, verify: bool = True, tokenizer: bool = True) -> ModelDir:
    """A checkpoint as a model directory: the averaged weights where there are some, adapters merged in.

    Raises:
        StoreError: a file is missing or damaged.
        PartError: a part is not installed.
    """
    from vla.manifest import verify_folder
    from vla.store import ASSETS, STATS, ModelDir
    from vla.tokenizer import open_tokenizer
    from vla.training.checkpoints import CONTENT, FILES
    from vla.transforms.stats import load_stats

    digest = verify_folder(folder, CONTENT) if verify else ""
    variant, state = checkpoint_variant(folder), dict(checkpoint_state(folder))
    stats = load_stats(folder / STATS) if (folder / STATS).is_file() else None
    opened = open_tokenizer(variant.parts["tokenizer"], variant.spec, folder / ASSETS) if tokenizer else None
    apart = ("variant", "loop")
    record = {"steps": state.pop("step"), **{key: value for key, value in state.items() if key not in apart}}

    def read() -> dict[str, np.ndarray]:
        from vla.store import read_weights
        from vla.training.config import config_from
        from vla.training.lora import adapters_of, merged

        files = [folder / FILES[part] for part in ("params", "ema") if (folder / FILES[part]).is_file()]
        weights = {name: array for file in files for name, array in read_weights(file).items()}
        return merged(weights, adapters_of(variant, config_from(state["config"])))

    return ModelDir(folder, variant, folder / FILES["params"], stats, opened, record, digest, read)


def checkpoint_state(folder: Path) -> dict[str, Any]:
    """The plain facts in a checkpoint: step, config, variant, data, where its weights come from.

    Raises:
        StoreError: the file is damaged.
    """
    state: dict[str, Any] = read_json(folder / _STATE, "the checkpoint is damaged")
    for key, kind in (("step", int), ("variant", str), ("config", dict)):
        if not isinstance(state.get(key), kind):
            got = f"{key} = {str(state.get(key))[:40]}"
            raise StoreError("the checkpoint is damaged", field=str(folder / _STATE), got=got, fix=COPY)
    return state
