"""Which tensor axis lies on which mesh axis: one dict, read by loading, saving, forward and the SAEs.

A mesh has the axes ("data", "model"). Arrays carry their mesh with them, also under `jit`, so that a function asks its
arguments and needs no context; without a mesh every helper here is a no-op.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.core import Tracer
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh
_A_YEAR = 366 * 86_400_000  # milliseconds

# Logical axis -> mesh axis; whatever is not named lies whole on every device. With FSDP, "embed" lies on "data".
RULES = {
    "batch": "data",
    "heads": "model",
    "kv_heads": "model",
    "key_heads": "model",
    "value_heads": "model",
    "mlp": "model",
    "shared_mlp": "model",
    "experts": "model",
    "vocab": "model",
    "latents": "model",
}
# Heads that several query (or value) heads share: with more shards than such heads, every shard holds all of them.
_SHARED_HEADS = frozenset({"kv_heads", "key_heads"})


class MeshError(ValueError):
    """A mesh that the devices or a tensor's shape do not allow; the message names both sizes."""


def make_mesh(data: int | None = None, model: int = 1, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of `data` x `model` devices, by default of all devices there are.

    Raises:
      MeshError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    if model < 1 or (data is None and len(devices) % model):
        raise MeshError(f"model = {model} does not divide the {len(devices)} devices; choose a divisor")
    data = len(devices) // model if data is None else data
    if data * model != len(devices):
        raise MeshError(f"a mesh of data = {data} x model = {model} needs {data * model} devices, not {len(devices)}")
    return jax.make_mesh((data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices)


def mesh_of(array: jax.Array) -> AnyMesh | None:
    """The mesh that an array lies on, traced or not.

    None without one, on a mesh of one device, and inside `shard_map`, where every device has an array of its own.
    """
    mesh = jax.typeof(array).sharding.mesh
    return None if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types else mesh


def partition(axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, *, fsdp: bool = False) -> PartitionSpec:
    """How an array with these logical axes lies on the mesh.

    Raises:
      MeshError: a mesh axis does not divide the dimension it would split, or the mesh lacks an axis.
    """
    if missing := {"data", "model"} - set(mesh.axis_names):
        raise MeshError(f"the mesh has the axes {mesh.axis_names}, not {sorted(missing)}; make it with make_mesh")
    rules = RULES | ({"embed": "data"} if fsdp else {})
    places: list[str | None] = []
    for axis, size in zip(axes, shape, strict=True):
        place = rules.get(axis) if axis is not None else None
        shards = mesh.shape[place] if place is not None else 1
        if axis in _SHARED_HEADS and shards > size and shards % size == 0:
            place = None
        elif size % shards:
            raise MeshError(
                f"{axis} = {size} cannot be split over the mesh axis {place!r} of {shards} devices; choose a size of "
                f"{place!r} that divides {size}"
            )
        places.append(place)
    return PartitionSpec(*places)


def sharding(axes: Sequence[str | None], shape: Sequence[int], mesh: AnyMesh, *, fsdp: bool = False) -> NamedSharding:
    """`partition` as a sharding."""
    return NamedSharding(mesh, partition(axes, shape, mesh, fsdp=fsdp))


def constrain(array: jax.Array, *axes: str | None, mesh: AnyMesh | None) -> jax.Array:
    """Lays an array out by its logical axes; a no-op without a mesh, and outside `jit` for an array that is on none."""
    if mesh is None:
        return array
    place = sharding(axes, array.shape, mesh)
    if not isinstance(array, Tracer) and not isinstance(array.sharding, NamedSharding):
        return array
    return jax.lax.with_sharding_constraint(array, place)


def to_host(array: Any) -> np.ndarray:
    """The whole of an array in this host's memory: a view where the host has it, else a copy.

    If processes hold different parts, all must call this; every device then needs room for the whole array.
    """
    if not isinstance(array, jax.Array) or array.is_fully_replicated:
        return np.asarray(array)
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    # np.asarray would keep its copy for as long as the array lives.
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            whole[shard.index] = shard.data
    return whole


def finish_together(what: str) -> None:
    """Waits until every process has come here, however late; a no-op for one process.

    If another process dies, JAX ends this one.
    """
    if (client := distributed.global_state.client) is not None:
        # Collectives, JAX's public barrier among them, give up after half an hour on a CPU. In a thread, because while
        # the client waits Python cannot answer signals.
        with ThreadPoolExecutor(1) as waiting:
            waiting.submit(client.wait_at_barrier, what, _A_YEAR).result()


def spans_processes(array: Any) -> bool:
    """True for an array that lies on devices of other processes too; what is done with it, all of them must do."""
    return isinstance(array, jax.Array) and not array.is_fully_addressable


def on_first_process(action: Callable[[], object]) -> None:
    """Runs `action` on process 0 while the others wait for its end; an error there is an error everywhere.

    Raises:
      RuntimeError: on the other processes, if the action failed.
    """
    done = False
    try:
        if jax.process_index() == 0:
            action()
        done = True
    finally:
        done = bool(multihost_utils.broadcast_one_to_all(np.asarray(done)))
    if not done:
        raise RuntimeError("process 0 failed in what it does for all; its own message says why")


def start_distributed(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    start_timeout: int = 300,
    silence_timeout: int = 60,
) -> None:
    """Joins this process with the others of its job, so that `jax.devices()` are those of all.

    Slurm steps of several tasks and Cloud TPU hosts are recognised, and JAX asks them for the three numbers; elsewhere
    they are given. A process that is alone, or has joined before, just goes on. Call it before anything touches a
    device, and before signal handlers are set: JAX sets its own for SIGTERM.

    Args:
      coordinator: host:port at which process 0 can be reached; the port must be free there.
      processes: how many there are; 1 is alone, wherever it runs.
      process: the number of this one, from 0.
      start_timeout: seconds in which all processes must have come.
      silence_timeout: seconds after which a silent process counts as dead; the others then end with an error. An ending
        process waits as long for the others to end: where work is uneven, meet before (`finish_together`).

    Raises:
      ValueError: some of the three are given but not all, or they contradict one another.
      RuntimeError: JAX has touched a device already, or not all processes came in time.
    """
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if jax.distributed.is_initialized() or processes == 1:
        return
    if missing := [name for name, value in given.items() if value is None]:
        if len(missing) < len(given):
            raise ValueError(f"{', '.join(missing)} missing: several processes need {', '.join(given)}, all three")
        if not _in_cluster():
            return
    elif not (process is not None and processes is not None and 0 <= process < processes):
        raise ValueError(f"--process {process} does not lie in 0..{processes} - 1, the number of --processes")
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method=None if missing else "deactivate",
        initialization_timeout=start_timeout,
        heartbeat_timeout_seconds=silence_timeout,
        shutdown_timeout_seconds=silence_timeout,  # else one that fails keeps all others waiting for minutes
    )


def _in_cluster() -> bool:
    """True where `jax.distributed.initialize()` finds its arguments by itself and there may be several processes.

    Slurm: the variables that `srun` sets for a task. Cloud TPU: JAX itself selects the platform on such a host; the
    names of all hosts are in the environment on GKE and in the metadata server, which JAX asks, on a TPU VM.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    if all(name in os.environ for name in slurm) and int(os.environ.get("SLURM_NTASKS", 1)) > 1:
        return True
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    several = hosts is None or "," in hosts or int(os.environ.get("MEGASCALE_NUM_SLICES") or 1) > 1
    platforms: str = jax.config.jax_platforms or ""  # type: ignore[attr-defined]
    return several and "tpu" in platforms.split(",")
