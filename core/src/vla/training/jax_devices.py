"""Several devices for the JAX engine, of one process or of many. Mirror of `torch_devices.py`.

Every process prepares its rows of the same global batch with the same draws and puts them on its own devices; the
compiler derives all exchanges from where the arrays are. So the loss curve is that of one device. Several processes
are started by hand, one per host, with these in the environment:

    JAX_COORDINATOR_ADDRESS=HOST:PORT   of process 0
    JAX_NUM_PROCESSES=N
    JAX_PROCESS_ID=0 ... N-1

or by Slurm, Open MPI or on a TPU pod, where JAX finds them by itself (`JAX_NUM_PROCESSES=1` alone: one process all the
same).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
from attrs import evolve
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vla.contracts import Actions, Observation
from vla.errors import SettingsError
from vla.training.config import TrainConfig

AXIS = "devices"
SMALL = 1 << 12  # values below which an array is not worth cutting
BY_HAND = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
MicroBatch = tuple[Observation, Actions, Any]


def join(config: TrainConfig) -> tuple[int, int]:
    """Meet the other processes of this run, if it was started with several: (which one this is, how many).

    Must come before the first JAX computation of the process.

    Raises:
        SettingsError: the environment names the processes incompletely, or they cannot be reached.
    """
    if config.distributed == "none":
        return 0, 1
    if not jax.distributed.is_initialized() and (given := _started_with()) is not None:
        try:
            jax.config.update("jax_cpu_collectives_implementation", "gloo")
            jax.distributed.initialize(**given)
        except (RuntimeError, ValueError) as error:
            fix = f"start every process with {', '.join(BY_HAND)}, before anything else uses JAX"
            got = str(error).splitlines()[0]
            raise SettingsError(
                "the processes of this run cannot be joined", field="train.distributed", got=got, fix=fix
            ) from error
    return jax.process_index(), jax.process_count()


def _started_with() -> dict[str, Any] | None:
    """Arguments of `jax.distributed.initialize`; None when this is the only process."""
    given = {name: os.environ[name] for name in BY_HAND if os.environ.get(name)}
    if given.get("JAX_NUM_PROCESSES") == "1":
        return None
    if len(given) == len(BY_HAND):
        try:
            count, number = int(given["JAX_NUM_PROCESSES"]), int(given["JAX_PROCESS_ID"])
        except ValueError as error:
            raise SettingsError("not a number", field=", ".join(BY_HAND[1:]), got=given) from error
        return {"coordinator_address": given["JAX_COORDINATOR_ADDRESS"], "num_processes": count, "process_id": number}
    # Launchers that JAX knows: what they leave out it finds out.
    counts = [os.environ.get(name, "") for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    if any(n.isdigit() and int(n) > 1 for n in counts) or find_spec("libtpu"):
        return {}
    if given:
        missing = [name for name in BY_HAND if name not in given]
        raise SettingsError(
            "the processes of a run are described by three variables", field=missing[0], got="not set",
            fix=f"set all of {', '.join(BY_HAND)}",
        )  # fmt: skip
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SettingsError(
            "JAX processes are not started with torchrun", field="train.framework", got="jax under torchrun",
            fix=f"start one process per host with {', '.join(BY_HAND)} in its environment",
        )  # fmt: skip
    return None


def pick_device(name: str) -> Any:
    """The device of this process that a config asks for."""
    if name == "auto":
        return jax.local_devices()[0]
    platform, _, index = name.partition(":")
    try:
        return jax.local_devices(backend="gpu" if platform == "cuda" else platform)[int(index or 0)]
    except (RuntimeError, ValueError, IndexError) as error:
        have = ", ".join(sorted({d.platform for d in jax.devices()}))
        raise SettingsError(
            "JAX finds no such device here", field="train.device", got=name, expected=f"auto, {have}"
        ) from error


def make_mesh(device: Any, config: TrainConfig) -> Mesh | None:
    """All devices of this kind in one row, those of a process side by side; or None to train on one.

    Raises:
        SettingsError: the rows of a micro-batch do not divide over the devices.
    """
    if config.distributed == "none":
        return None
    devices = sorted(jax.devices(device.platform), key=lambda d: (d.process_index, d.id))
    rows = config.batch_size // config.accumulate
    if rows % len(devices):
        expected = f"a multiple of {len(devices)} devices"
        raise SettingsError(
            "a micro-batch splits evenly over the devices", field="train.batch_size", got=rows, expected=expected
        )
    return Mesh(np.array(devices), (AXIS,))


def shard(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """openpi's rule: the longest axis that divides over the devices; small arrays and vectors are kept whole."""
    longest = sorted(range(len(shape)), key=lambda i: -shape[i])
    size = mesh.devices.size
    axis = next((i for i in longest if shape[i] % size == 0), None)
    if len(shape) < 2 or np.prod(shape) < SMALL or axis is None:
        return whole(mesh)
    return NamedSharding(mesh, PartitionSpec(*[AXIS if i == axis else None for i in range(len(shape))]))


def whole(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(value: Array, where: NamedSharding) -> Array:
    """A value that every process has, as one array over all devices."""
    if where.is_fully_addressable:
        return jax.device_put(value, where)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def put_rows(batch: Any, mesh: Mesh) -> Any:
    """The rows of this process, as its part of the batch of all."""
    where = NamedSharding(mesh, PartitionSpec(AXIS))
    if where.is_fully_addressable:
        return jax.device_put(batch, where)
    return jax.tree.map(lambda rows: jax.make_array_from_process_local_data(where, np.asarray(rows)), batch)


def fetch(tree: Any) -> Any:
    """Arrays as numpy, shards of other processes included. Every process must call it."""

    def one(value: Array) -> np.ndarray:
        if isinstance(value, Array) and not (value.is_fully_addressable or value.is_fully_replicated):
            return multihost_utils.process_allgather(value, tiled=True)
        return np.asarray(value)

    return jax.tree.map(one, tree)


def alike(micro_batches: Sequence[MicroBatch], cameras: Sequence[str]) -> list[MicroBatch]:
    """Micro-batches with the cameras, prompt lengths and numbers of targets that the rows of all processes need.

    `pack` leaves out what no row of one process has; one array over all processes needs one shape. So the processes
    exchange a few numbers, and the shapes are those of one process that has all rows.
    """
    mine = np.stack([needs(obs, cameras) for obs, _, _ in micro_batches])
    everyones = np.asarray(multihost_utils.process_allgather(mine)).max(0)
    return [(widen(obs, most, cameras), *rest) for (obs, *rest), most in zip(micro_batches, everyones, strict=True)]


def needs(obs: Observation, cameras: Sequence[str]) -> np.ndarray:
    """What a packed observation holds: prompt length, targets, one flag and (height, width) per camera; int32."""
    prompt = 0 if obs.tokenized_prompt is None else obs.tokenized_prompt.shape[1]
    targets = obs.extra["target_index"].shape[1] if "target_index" in obs.extra else 0
    sizes = [obs.images[name].shape[1:3] if name in obs.images else (0, 0) for name in cameras]
    return np.array([prompt, targets, *(n for size in sizes for n in size)], np.int32)


def widen(obs: Observation, most: np.ndarray, cameras: Sequence[str]) -> Observation:
    """A packed observation with padding up to `most` (see `needs`): nothing added is valid."""
    prompt, targets, sizes = int(most[0]), int(most[1]), most[2:].reshape(-1, 2)

    def to(array: Any, width: int) -> Any:
        return array if array is None else np.pad(array, ((0, 0), (0, width - array.shape[1])))

    images, masks = {}, {}
    some = next(iter(obs.images.values()), None)
    for name, (height, width) in zip(cameras, sizes, strict=True):
        if name in obs.images:
            images[name], masks[name] = obs.images[name], obs.image_masks[name]
        elif height:
            dtype = np.uint8 if some is None else some.dtype
            images[name] = np.zeros((obs.batch, height, width, 3), dtype)
            masks[name] = np.zeros(obs.batch, bool)
    marks = {name: to(obs.extra[name], targets) for name in ("target_index", "target_valid") if name in obs.extra}
    return evolve(
        obs,
        images=images,
        image_masks=masks,
        tokenized_prompt=to(obs.tokenized_prompt, prompt),
        tokenized_prompt_mask=to(obs.tokenized_prompt_mask, prompt),
        token_ar_mask=to(obs.token_ar_mask, prompt),
        token_loss_mask=to(obs.token_loss_mask, prompt),
        extra={**obs.extra, **marks},
    )


def any_of(flag: bool) -> bool:
    """Whether any process raises this flag."""
    if jax.process_count() == 1:
        return flag
    return bool(np.asarray(multihost_utils.process_allgather(np.array([flag]))).any())


def leave() -> None:
    """Wait for the others: a process that just goes away takes them down with it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("vla: end of training")
