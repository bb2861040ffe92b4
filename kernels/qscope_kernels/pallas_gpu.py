"""The one door to Pallas on NVIDIA GPUs (Mosaic GPU): its names, and what differs between JAX 0.10 and 0.12."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qscope_kernels.dispatch import SPLIT, Device
from qscope_kernels.manual_axes import varying_axes

__all__ = ["call", "load", "not_hopper", "pl", "plgpu", "strided", "vector_length"]

WARPGROUP = 128  # threads that run as one "thread" of Pallas


def not_hopper(device: Device) -> str | None:
    """Why a kernel for Hopper cannot run there, or None."""
    if not any(name in device.kind for name in ("H100", "H200", "GH200")):
        return f"it is made for Hopper (H100, H200, GH200), not for {device.kind}"
    return SPLIT if device.split else None


def vector_length(size: int, dtype: Any) -> int:
    """How many of `size` neighbours one thread of a warpgroup reads at once: 16 bytes where 128 threads divide so."""
    return math.gcd(size // WARPGROUP, 16 // jax.numpy.dtype(dtype).itemsize)


def strided(size: int, dtype: Any) -> Any:
    """The layout of a vector [size] over the registers of a warpgroup, read from memory in the longest pieces."""
    return plgpu.Layout.WG_STRIDED((size,), vec_size=vector_length(size, dtype))


def load(ref: Any, layout: Any) -> jax.Array:
    """Reads a whole ref (a view made with `.at[...]`) into registers, laid out so."""
    # Unlike plgpu.load, whose arguments changed, this is known to the simulation of JAX 0.10 too.
    return plgpu.layout_cast(ref[...], layout)


def call(body: Callable[..., None], *arrays: jax.Array, out: Sequence[tuple], blocks: int, **options: Any) -> list:
    """Runs `body(*array_refs, *out_refs, *scratch_refs)` in `blocks` blocks, `jax.lax.axis_index("block")` being its.

    `out` lists (shape, dtype) of the results, `options` are those of `plgpu.kernel`. Inside `shard_map` the results
    vary along the mesh axes that any of the arrays varies along.
    """
    types = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in out]
    results = plgpu.kernel(body, out_type=types, grid=(blocks,), grid_names=("block",), **options)(*arrays)
    axes = varying_axes(*arrays)
    return [jax.lax.pcast(result, tuple(axes - varying_axes(result)), to="varying") for result in results]
