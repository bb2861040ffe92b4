"""The form for Hopper GPUs: a matmul that also gives group maxima, and two small top-ks. Exact for any data.

At most k groups hold one of a row's k largest values, and each of those groups has a maximum at least as large as the
k-th value; so the k groups of largest maxima hold k values that no other value exceeds.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.dispatch import Device
from qscope_kernels.pallas_gpu import not_hopper
from qscope_kernels.topk_encode.gpu_matmul import GROUP, Tiling, matmul_maxima

# Bound on the pre-activations that exist at once, in elements: 2 GiB of float32.
_CHUNK_ELEMENTS = 1 << 29
# Fewer rows than this do not fill the tiles of the matmul.
_FEWEST_ROWS = 128


def unsuited(device: Device, x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str) -> str | None:
    """Why `topk_encode` cannot serve this, or None."""
    del b_enc, contract
    (n, d), f, tiling = x.shape, w_enc.shape[1], Tiling()
    if why := not_hopper(device):
        return why
    if not x.dtype == w_enc.dtype == jnp.bfloat16:
        return f"it multiplies bfloat16 by bfloat16, not {x.dtype} by {w_enc.dtype}"
    if d % tiling.inner or f % tiling.columns:
        return f"it needs d in steps of {tiling.inner} and latents in steps of {tiling.columns}, not {d} and {f}"
    if k > f // GROUP:
        return f"k = {k} exceeds {f // GROUP}, the number of groups of {GROUP} latents"
    return f"it needs {_FEWEST_ROWS} vectors, not {n}" if n < _FEWEST_ROWS else None


def topk_encode(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str, cores: int = 132, tiling: Tiling = Tiling()
) -> tuple[jax.Array, jax.Array]:
    """Top k of x [n, d], in even chunks of rows that the matmul's tiles divide.

    "exact" ranks float32 pre-activations, "fast" those rounded to bfloat16, which then are the values. Ties go to any.
    """
    dtype = jnp.float32 if contract == "exact" else jnp.bfloat16

    def encode_rows(rows):
        pre, maxima = matmul_maxima(rows, w_enc, b_enc, sms=cores, dtype=dtype, tiling=tiling)
        return _largest(pre, maxima.T, k)

    n, tile = x.shape[0], 2 * tiling.rows * tiling.cluster
    tiles = -(-n // tile)
    chunks = -(-tiles * tile // max(tile, _CHUNK_ELEMENTS // w_enc.shape[1]))
    chunk = -(-tiles // chunks) * tile
    padded = jnp.pad(x, ((0, chunks * chunk - n), (0, 0)))
    if chunks == 1:
        values, indices = encode_rows(padded)
        return values[:n], indices[:n]
    values, indices = jax.lax.map(encode_rows, padded.reshape(chunks, chunk, x.shape[1]))
    return values.reshape(-1, k)[:n], indices.reshape(-1, k)[:n]


def _largest(pre: jax.Array, maxima: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of pre [n, f], sorted, from the maxima [n, f / GROUP] of its groups."""
    n = pre.shape[0]
    _, groups = _top_k(maxima, k)
    held = jnp.take_along_axis(pre.reshape(n, -1, GROUP), groups[:, :, None], axis=1)
    values, slots = _top_k(held.reshape(n, k * GROUP), k)
    indices = jnp.take_along_axis(groups, slots // GROUP, axis=1) * GROUP + slots % GROUP
    return jax.nn.relu(values.astype(jnp.float32)), indices


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # A NaN with its sign bit set would rank below all numbers and go unseen.
    x = jnp.where(jnp.isnan(x), jnp.nan, x)
    # Stable, XLA sorts whole rows on CUDA; JAX 0.10 knows nothing else.
    unstable: dict[str, Any] = {"is_stable": False} if jax.__version_info__ >= (0, 11) else {}
    return jax.lax.top_k(x, k, **unstable)
