"""The portable form: a matmul and `select` over chunks of tokens, so that memory does not grow with their number."""

import jax

from qscope_kernels.blocks import map_blocks
from qscope_kernels.topk_encode.ref import pre_activations
from qscope_kernels.topk_encode.select import select

# Bound on the pre-activations that exist at once: 256 MiB of float32.
_CHUNK_ELEMENTS = 1 << 26


def topk_encode(
    x: jax.Array, w_enc: jax.Array, b_enc: jax.Array, *, k: int, contract: str = "exact"
) -> tuple[jax.Array, jax.Array]:
    """Top k of x [n, d] @ w_enc [d, f] + b_enc, a chunk of tokens at a time."""
    del contract  # exact in both

    def encode_rows(rows):
        values, indices = select(pre_activations(rows, w_enc, b_enc), k)
        return jax.nn.relu(values), indices

    return map_blocks(encode_rows, (x,), _CHUNK_ELEMENTS // w_enc.shape[1])
