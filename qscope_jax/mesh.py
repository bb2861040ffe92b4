"""Which tensor axis lies on which mesh axis: one dict, read by loading, saving, forward and the SAEs.

A mesh has the axes ("data", "model"). Arrays carry their mesh with them, also under `jit`, so that a function asks its
arguments and needs no context; without a mesh every helper here is a no-op.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AnyMesh = Mesh | AbstractMesh

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
    """Lays an array out by its logical axes; a no-op without a mesh."""
    if mesh is None:
        return array
    return jax.lax.with_sharding_constraint(array, sharding(axes, array.shape, mesh))


def to_host(array: jax.Array) -> np.ndarray:
    """The whole array in NumPy; where it is spread over processes, all must call this and all get it."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def finish_together(what: str) -> None:
    """Waits until every process has come here; a no-op for one process."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
