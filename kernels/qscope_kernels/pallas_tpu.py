"""The one door to Pallas on TPUs (Mosaic): its names, and what every call of it needs."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qscope_kernels.dispatch import SPLIT, Device
from qscope_kernels.manual_axes import alike

__all__ = ["LANES", "SUBLANES", "call", "not_tpu", "pl", "pltpu", "vmem_bytes"]

SUBLANES, LANES = 8, 128  # a vector register holds 8 x 128 words of 32 bits, and memory is tiled likewise

# MiB of vector memory of a core, by the name that devices give themselves: what kernels were compiled for.
_VMEM = {
    "TPU v5 lite": 128,
    "TPU v5e": 128,
    "TPU v5": 64,
    "TPU v5p": 64,
    "TPU v6 lite": 128,
    "TPU v6e": 128,
    "TPU7x": 64,
}


def not_tpu(device: Device) -> str | None:
    """Why kernels that are compiled for v5e, v5p, v6e and TPU7x do not run there, or None."""
    if device.kind not in _VMEM:
        return f"it is made for {sorted(_VMEM)}, not for {device.kind}"
    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        return "with jax_enable_x64 its addresses would have 64 bits, which Mosaic does not compile"
    return SPLIT if device.split else None


def vmem_bytes(device: Device) -> int:
    """Bytes of vector memory of a core; a simulation elsewhere plans with as many as the smallest has."""
    return _VMEM.get(device.kind, min(_VMEM.values())) << 20


def call(
    body: Callable[..., None],
    *arrays: jax.Array,
    out: Sequence[tuple[tuple[int, ...], Any]],
    semantics: Sequence[Literal["parallel", "arbitrary"]],
    vmem: int,
    interpret: Any = None,
    checks: bool = True,
    **options: Any,
) -> list[jax.Array]:
    """Runs `body(*array_refs, *out_refs, *scratch_refs)` over a grid.

    `out` lists (shape, dtype) of the results, `semantics` says of each grid axis "parallel" or "arbitrary", `vmem` is
    the limit in bytes, `interpret` is True or `pltpu.InterpretParams` to simulate, `checks` of addresses may be left
    out where they are known to be good, `options` are those of `pl.pallas_call`. Inside `shard_map` the results vary
    along the mesh axes that any of the arrays varies along. Under `vmap` it runs once per element of the batch.
    """
    arrays = tuple(alike(arrays))
    varying = jax.typeof(arrays[0]).manual_axis_type
    types = [jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying) for shape, dtype in out]
    params = pltpu.CompilerParams(
        dimension_semantics=tuple(semantics), vmem_limit_bytes=vmem, disable_bounds_checks=not checks
    )
    run = pl.pallas_call(body, out_shape=types, compiler_params=params, interpret=interpret or False, **options)
    # A batch is one call after another: Pallas cannot give a kernel a part of an array that it reads by itself.
    return jax.custom_batching.sequential_vmap(lambda *arrays: run(*arrays))(*arrays)
