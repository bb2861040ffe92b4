"""The k largest positive pre-activations of dead latents, for the AuxK loss (Gao et al. 2024, arXiv 2406.04093, §A.2).

Not exact, as this loss is a heuristic that needs no exactness: latents lie in B bins of neighbours, about 4k of them,
each bin offers its largest dead one alone, and the k best offers are taken. A bin that holds one of the true k offers
one of them, and it is taken; so with the true k spread at random over bins,
expected recall = E[bins that hold one] / k = (B / k) (1 - (1 - 1/B)^k),    88 % at B = 4k, whatever k.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_kernels.blocks import map_blocks
from qscope_kernels.topk_encode import check_choice, check_encoder, gradient, xla
from qscope_kernels.topk_encode.ref import pre_activations
from qscope_kernels.topk_encode.select import best_groups, members, ordered

_BINS_PER_SLOT = 4


def topk_encode_aux(
    x: Float[Array, "*n d"], w_enc: Float[Array, "d f"], b_enc: Float[Array, "f"], dead: Bool[Array, "f"], *, k: int
) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
    """About the k largest positive entries of x @ w_enc + b_enc among dead latents, sorted by value, descending.

    Every value returned belongs to its index, and no live latent has a positive one. Where fewer than k are found the
    remaining values are 0 and their indices mean nothing. Differentiable in reverse, as `topk_encode`.

    Raises:
      ValueError: a shape or a dtype does not fit, or k is not in 1..f.
    """
    x, w_enc, b_enc, dead = (jnp.asarray(array) for array in (x, w_enc, b_enc, dead))
    check_encoder(x, w_enc, b_enc)
    check_choice(k, w_enc.shape[1], "fast")
    if dead.shape != b_enc.shape or dead.dtype != bool:
        raise ValueError(f"dead is {dead.dtype} {dead.shape}; expected bool {b_enc.shape}, one per latent")
    values, indices = gradient.encode(partial(_encode, k=k), None, x.reshape(-1, x.shape[-1]), w_enc, b_enc, dead)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def bin_width(f: int, k: int) -> int:
    """Latents per bin; 1 where there are too few for that: then nothing is lost."""
    return max(1, f // (_BINS_PER_SLOT * k))


def _encode(x, w_enc, b_enc, dead, *, k: int) -> tuple[jax.Array, jax.Array]:
    width = bin_width(w_enc.shape[1], k)

    def encode_rows(rows):
        pre = jnp.where(dead, pre_activations(rows, w_enc, b_enc), -jnp.inf)
        offers, bins = best_groups(pre, k, width)
        place = jnp.argmax(ordered(members(pre, bins, width)), axis=2).astype(jnp.int32)
        return jax.nn.relu(offers), jnp.minimum(bins * width + place, w_enc.shape[1] - 1)

    return map_blocks(encode_rows, (x,), xla._CHUNK_ELEMENTS // w_enc.shape[1])
