"""The form for Hopper GPUs: one matmul that also gives group maxima, so that pre-activations are not read again."""

import jax
import jax.numpy as jnp

from qscope_kernels.blocks import map_blocks
from qscope_kernels.dispatch import Device, device_of
from qscope_kernels.pallas_gpu import not_hopper
from qscope_kernels.topk_encode.cuda import CHUNK_ELEMENTS, largest
from qscope_kernels.topk_encode.gpu_matmul import GROUP, Tiling, matmul_maxima

_TILING = Tiling()
_CORES = 132  # of an H100 or H200, where the device does not tell


def unsuited(device: Device, x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str) -> str | None:
    """Why `topk_encode` cannot serve this, or None."""
    del contract
    (_, d), f = x.shape, w_enc.shape[1]
    if why := not_hopper(device):
        return why
    if not x.dtype == w_enc.dtype == b_enc.dtype == jnp.bfloat16:
        return f"it takes bfloat16 alone, not {x.dtype}, {w_enc.dtype} and {b_enc.dtype}"
    if d % _TILING.inner or f % _TILING.columns:
        return f"it needs d in steps of {_TILING.inner} and latents in steps of {_TILING.columns}, not {d} and {f}"
    return f"k = {k} exceeds {f // GROUP}, the number of groups of {GROUP} latents" if k > f // GROUP else None


def topk_encode(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str, tiling: Tiling = _TILING
) -> tuple[jax.Array, jax.Array]:
    """Top k of x [n, d] @ w_enc [d, f] + b_enc, a chunk of tokens at a time; ties go to any.

    "exact" ranks float32 pre-activations; "fast" rounds them to bfloat16 first, and these are then the values.
    """
    dtype = jnp.float32 if contract == "exact" else jnp.bfloat16
    cores = device_of(x).cores or _CORES

    def encode_rows(rows):
        spare = -len(rows) % tiling.height
        padded = jnp.pad(rows, ((0, spare), (0, 0)))
        pre, maxima = matmul_maxima(padded, w_enc, b_enc, cores=cores, dtype=dtype, tiling=tiling)
        values, indices = largest(pre, maxima.T, k)
        return values[: len(rows)], indices[: len(rows)]

    return map_blocks(encode_rows, (x,), CHUNK_ELEMENTS // w_enc.shape[1])
