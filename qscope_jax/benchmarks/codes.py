"""Random sparse codes as TopK autoencoders make them: k different latents per token, some far busier than others.

The latent of rank r is active in a share min(1, c / r) of the tokens ("heavy"), or all in the same share ("uniform"),
where c makes the shares add up to k. Systematic sampling gives exactly k different latents per token at these shares.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Usage = Literal["heavy", "uniform"]


def random_code(
    tokens: int, latents: int, k: int, *, usage: Usage, dtype=jnp.float32, seed: int = 0
) -> tuple[jax.Array, jax.Array]:
    """Values [tokens, k], log-normal, falling, of `dtype`, and int32 indices [tokens, k], different within a token."""
    rng = np.random.default_rng(seed)
    ends = np.cumsum(shares(latents, k, usage))
    # Points one apart on a line on which every latent holds a stretch as long as its share: at most one falls on each.
    points = rng.random((tokens, 1)) * (1 - 1e-6) + np.arange(k)
    places = np.minimum(np.searchsorted(ends, points.ravel(), side="right"), latents - 1).reshape(points.shape)
    # Neighbours on the line must not be neighbours in memory, nor the order of the slots say how busy a latent is.
    indices = rng.permuted(rng.permutation(latents)[places], axis=1).astype(np.int32)
    values = -np.sort(-rng.lognormal(0.0, 0.5, (tokens, k)), axis=1)
    return jnp.asarray(values, dtype), jnp.asarray(indices)


def shares(latents: int, k: int, usage: Usage) -> np.ndarray:
    """The share of tokens in which each latent is active, by rank; they add up to k."""
    if usage == "uniform":
        return np.full(latents, k / latents)
    harmonic = 1 / np.arange(1, latents + 1)
    low, high = 0.0, float(latents)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if np.minimum(1, middle * harmonic).sum() < k else (low, middle)
    return np.minimum(1, high * harmonic)
