"""The form for any CUDA device: XLA's matmul, then two small top-ks that do not promise an order of ties.

At most k groups hold one of a row's k largest values, and each of those groups has a maximum at least as large as the
k-th value; so the k groups of largest maxima hold k values that no other value exceeds, whatever the data.
"""

from typing import Any

import jax
import jax.numpy as jnp

from qscope_kernels.blocks import map_blocks
from qscope_kernels.dispatch import Device
from qscope_kernels.topk_encode.ref import pre_activations
from qscope_kernels.topk_encode.select import group_width, members, ordered

# Bound on the pre-activations that exist at once, in elements: 2 GiB of float32.
CHUNK_ELEMENTS = 1 << 29


def unsuited(device: Device, x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str) -> str | None:
    """Why `topk_encode` cannot serve this, or None."""
    del device, x, b_enc, contract
    f = w_enc.shape[1]
    width = group_width(f, k)
    return f"{f} latents are not in groups of {width}" if width == 1 or f % width else None


def topk_encode(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str
) -> tuple[jax.Array, jax.Array]:
    """Top k of x [n, d] @ w_enc [d, f] + b_enc, a chunk of tokens at a time; ties go to any."""
    del contract  # exact in both
    width = group_width(w_enc.shape[1], k)

    def encode_rows(rows):
        pre = pre_activations(rows, w_enc, b_enc)
        return largest(pre, jnp.max(pre.reshape(len(rows), -1, width), axis=2), k)

    return map_blocks(encode_rows, (x,), CHUNK_ELEMENTS // w_enc.shape[1])


def largest(pre: jax.Array, maxima: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The k largest of pre [n, f], at least 0 and sorted, from the maxima [n, groups] of its groups of columns."""
    width = pre.shape[1] // maxima.shape[1]
    _, groups = _top_k(maxima, k)
    values, slots = _top_k(members(pre, groups, width).reshape(len(pre), k * width), k)
    indices = jnp.take_along_axis(groups, slots // width, axis=1, mode="clip") * width + slots % width
    return jax.nn.relu(values), indices


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # Where ties have an order, XLA sorts whole rows on CUDA; JAX 0.10 can do nothing else.
    free: dict[str, Any] = {"is_stable": False} if jax.__version_info__ >= (0, 11) else {}
    return jax.lax.top_k(ordered(x), k, **free)
