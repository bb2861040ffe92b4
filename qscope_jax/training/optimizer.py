"""Adam for SAEs with unit-norm decoder rows.

The part of the decoder's gradient along its rows is removed, the whole gradient is clipped, Adam moves every weight
(moments of latents that did not fire decay: it is the exact Adam), and decoder rows are brought back to norm 1 (Bricken
et al. 2023; Gao et al. 2024, A.1).
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from qscope_jax.sae.loss import ALONE, Axes, Weights

_ADAM = optax.scale_by_adam(b1=0.9, b2=0.999, eps=6.25e-10)  # Gao et al. 2024


@dataclass(frozen=True)
class Schedule:
    """Rises linearly over `warmup` steps, stays, and falls linearly to 0 over the last `decay` share of all `steps`."""

    peak: float
    steps: int
    warmup: int = 0
    decay: float = 0.2

    def __post_init__(self):
        if not 0 < self.peak < math.inf:
            raise ValueError(f"a learning rate of {self.peak}: expected a positive number")
        if self.steps < 1 or self.warmup < 0 or not 0 <= self.decay <= 1:
            raise ValueError(
                f"{self.steps} steps (at least 1), {self.warmup} of warmup (at least 0) and a decay over a share of "
                f"{self.decay} (0 to 1) make no schedule"
            )

    def __call__(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step, counted from 0."""
        rising = (step + 1) / max(self.warmup, 1)
        falling = (self.steps - step) / max(self.decay * self.steps, 1)
        return self.peak * jnp.clip(jnp.minimum(rising, falling), 0, 1)


def default_rate(d_sae: int) -> float:
    """2e-4 sqrt(2^14 / d_sae): the rate of Gao et al. 2024 (A.3), as public trainers scale it by the width."""
    return 2e-4 * math.sqrt(2**14 / d_sae)


def init_adam(weights: Weights) -> optax.ScaleByAdamState:
    """Moments of one SAE's weights, all 0."""
    state = _ADAM.init(weights)
    assert isinstance(state, optax.ScaleByAdamState)
    return state


def apply_gradients(
    weights: Weights,
    gradients: Weights,
    adam: optax.ScaleByAdamState,
    rate: Float[Array, ""],
    *,
    clip: float,
    axes: Axes = ALONE,
) -> tuple[Weights, optax.ScaleByAdamState, Float[Array, ""]]:
    """One step: new weights and moments, and the gradient's norm before it was clipped to `clip`."""
    along = jnp.sum(gradients.w_dec * weights.w_dec, axis=-1, keepdims=True)
    gradients = gradients._replace(w_dec=gradients.w_dec - along * weights.w_dec)
    squares = jax.tree.map(lambda g: jnp.sum(g * g), gradients)
    split = squares.w_enc + squares.b_enc + squares.w_dec
    norm = jnp.sqrt((split if axes.latents is None else jax.lax.psum(split, axes.latents)) + squares.b_dec)
    scale = jnp.minimum(1, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    updates, adam = _ADAM.update(jax.tree.map(lambda g: scale * g, gradients), adam)  # type: ignore[assignment]
    moved = jax.tree.map(lambda w, u: w - rate * u, weights, updates)
    length = jnp.linalg.norm(moved.w_dec, axis=-1, keepdims=True)
    return moved._replace(w_dec=moved.w_dec / length), adam, norm
