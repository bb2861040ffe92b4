"""The portable form: a matmul and `select` over chunks of tokens, so that memory does not grow with their number."""

import jax
import jax.numpy as jnp

from qscope_kernels.topk_encode.ref import pre_activations
from qscope_kernels.topk_encode.select import select

# Bound on the pre-activations that exist at once: 256 MiB of float32.
_CHUNK_ELEMENTS = 1 << 26


def topk_encode(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str = "exact"
) -> tuple[jax.Array, jax.Array]:
    """Top k of x [n, d] in even chunks; the last one is padded with zero rows that are dropped again."""
    del contract  # exact in both

    def encode_rows(rows):
        values, indices = select(pre_activations(rows, w_enc, b_enc), k)
        return jax.nn.relu(values), indices

    n = x.shape[0]
    largest = max(1, _CHUNK_ELEMENTS // w_enc.shape[1])
    if n <= largest:
        return encode_rows(x)
    chunks = -(-n // largest)
    chunk = -(-n // chunks)  # even chunks: little padding
    padded = jnp.pad(x, ((0, chunks * chunk - n), (0, 0))).reshape(chunks, chunk, x.shape[1])
    values, indices = jax.lax.map(encode_rows, padded)
    return values.reshape(-1, k)[:n], indices.reshape(-1, k)[:n]
