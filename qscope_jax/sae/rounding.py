"""What it costs to store an SAE in fewer bits: the same vectors through the SAE as it is and as it would be stored.

index agreement = |top-k of the one  and  top-k of the other| / |top-k of the one|, over all vectors
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qscope_jax.sae.model import Sae, SaeParams, SparseCode, encode
from qscope_jax.sae.quality import init_quality, summarize, update_quality

_NOISE = 0.3


def cast_sae(sae: Sae, dtype) -> Sae:
    """The SAE with all parameters rounded to `dtype`."""
    return Sae(SaeParams(*(p.astype(dtype) for p in sae.params)), sae.config)


def synthetic_vectors(sae: Sae, key: jax.Array, count: int) -> Float[Array, "n d"]:
    """Stand-ins for residual vectors where no model is at hand: b_dec + k random decoder rows + noise, float32 [n, d].

    Coefficients are exponential; the sum of rows is as long as b_dec (or 1, where b_dec is zero) and the noise has 0.3
    of that length. They show the effect of rounding, not the quality of the SAE.
    """
    config, params = sae.config, sae.params
    pick, weigh, shake = jax.random.split(key, 3)
    rows = jax.random.randint(pick, (count, config.k), 0, config.d_sae)
    weights = jax.random.exponential(weigh, rows.shape)
    b_dec = params.b_dec.astype(jnp.float32)
    signal = jnp.einsum("nk,nkd->nd", weights, params.w_dec[rows].astype(jnp.float32), precision="highest")
    noise = jax.random.normal(shake, signal.shape)
    length = jnp.where(jnp.any(b_dec != 0), jnp.linalg.norm(b_dec), 1.0)
    return b_dec + length * (_unit(signal) + _NOISE * _unit(noise))


def rounding_cost(sae: Sae, rounded: Sae, x: Float[Array, "n d"]) -> dict[str, float]:
    """Index agreement, and FVU before and after, of two versions of one SAE on vectors [n, d].

    Returns:
      `index_agreement` in 0..1, `fvu` of `sae`, `fvu_rounded` of `rounded`, `vectors` = n.
    """
    agreement = index_agreement(encode(sae, x), encode(rounded, x))
    before, after = (summarize(update_quality(init_quality(s.config), s, x))["fvu"] for s in (sae, rounded))
    return {"index_agreement": agreement, "fvu": before, "fvu_rounded": after, "vectors": len(x)}


def index_agreement(code: SparseCode, other: SparseCode) -> float:
    """The share of the active indices of `code` [n, k] that are active in `other` too; 1 where none is active."""
    active = [
        [set(row[used].tolist()) for row, used in zip(np.asarray(c.indices), np.asarray(c.values) > 0, strict=True)]
        for c in (code, other)
    ]
    total = sum(len(one) for one in active[0])
    return sum(len(one & two) for one, two in zip(*active, strict=True)) / total if total else 1.0


def _unit(x: jax.Array) -> jax.Array:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
