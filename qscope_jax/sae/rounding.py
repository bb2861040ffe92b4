"""What it costs to store an SAE in fewer bits: the same vectors through the SAE as it is and as it would be stored.

index agreement = |top-k of the one  and  top-k of the other| / |top-k of the one|, over all vectors
"""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float

from qscope_jax.sae.model import Sae, SaeParams, SparseCode, decode, encode

_NOISE = 0.3


def cast_sae(sae: Sae, dtype) -> Sae:
    """The SAE with all parameters rounded to `dtype`."""
    return Sae(SaeParams(*(p.astype(dtype) for p in sae.params)), sae.config)


def synthetic_vectors(sae: Sae, count: int, *, seed: int) -> Float[np.ndarray, "n d"]:
    """Stand-ins for residual vectors where no model is at hand: b_dec + k random decoder rows + noise, float32 [n, d].

    Coefficients are exponential; the sum of rows is as long as b_dec (or 1, where b_dec is zero) and the noise has 0.3
    of that length. They show the effect of rounding, not the quality of the SAE.
    """
    config, random = sae.config, np.random.default_rng(seed)
    w_dec, b_dec = np.asarray(sae.params.w_dec), np.asarray(sae.params.b_dec, np.float32)
    rows = random.integers(0, config.d_sae, (count, config.k))
    weights = random.exponential(size=rows.shape).astype(np.float32)
    # One vector at a time: k gathered rows of all vectors would be as large as the SAE.
    signal = np.stack([w @ w_dec[row].astype(np.float32) for w, row in zip(weights, rows, strict=True)])
    noise = random.standard_normal(signal.shape, np.float32)
    length = np.linalg.norm(b_dec) or np.float32(1)
    return b_dec + length * (_unit(signal) + np.float32(_NOISE) * _unit(noise))


def make_rounding_cost() -> Callable[[Sae, Sae, Float[np.ndarray, "n d"]], dict[str, float]]:
    """A function (sae, rounded, x) -> index agreement and FVU before and after, of two versions of one SAE on x [n, d].

    It returns `index_agreement` in 0..1, `fvu` of `sae`, `fvu_rounded` of `rounded` (sum of squared errors over sum of
    squares about the mean of x), and `vectors` = n. SAEs of one shape and dtype share one compilation.
    """

    @jax.jit
    def through(sae: Sae, x):
        code = encode(sae, x)
        return code, decode(sae, code)

    def cost(sae: Sae, rounded: Sae, x: Float[np.ndarray, "n d"]) -> dict[str, float]:
        # What is static must not differ from layer to layer, or every layer compiles anew.
        config = dataclasses.replace(sae.config, layer=None, backbone=None, source=None, sink_threshold=None)
        code, x_hat = through(Sae(sae.params, config), x)
        other, y_hat = through(Sae(rounded.params, config), x)
        agreement = index_agreement(code, other)
        return {"index_agreement": agreement, "fvu": _fvu(x, x_hat), "fvu_rounded": _fvu(x, y_hat), "vectors": len(x)}

    return cost


def index_agreement(code: SparseCode, other: SparseCode) -> float:
    """The share of the active indices of `code` [n, k] that are active in `other` too; 1 where none is active."""
    active = [
        [set(row[used].tolist()) for row, used in zip(np.asarray(c.indices), np.asarray(c.values) > 0, strict=True)]
        for c in (code, other)
    ]
    total = sum(len(one) for one in active[0])
    return sum(len(one & two) for one, two in zip(*active, strict=True)) / total if total else 1.0


def _fvu(x: np.ndarray, x_hat) -> float:
    x, x_hat = np.asarray(x, np.float64), np.asarray(x_hat, np.float64)
    return float(np.square(x - x_hat).sum() / np.square(x - x.mean(axis=0)).sum())


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), np.finfo(np.float32).tiny)
