"""Adam for SAEs with unit-norm decoder rows.

The part of the decoder's gradient along its rows is removed, the whole gradient is clipped, Adam moves every weight
(moments of latents that did not fire decay: it is the exact Adam), and decoder rows are brought back to norm 1 (Bricken
et al. 2023; Gao et al. 2024, A.1).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from qscope_kernels.dispatch import device_of

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


class Applied(NamedTuple):
    """Stacks [l, ...] in which one SAE has moved, the norm of its gradient before clipping, and whether it moved."""

    weights: Weights
    adam: optax.ScaleByAdamState
    norm: Float[Array, ""]
    taken: Bool[Array, ""]


def apply_gradients(
    weights: Weights,
    adam: optax.ScaleByAdamState,
    number: int | Int[Array, ""],
    gradients: Weights,
    rate: Float[Array, ""],
    *,
    clip: float,
    sound: Bool[Array, ""],
    axes: Axes = ALONE,
) -> Applied:
    """One step of SAE `number`, in its place; not taken where it is not `sound` or the gradient is not finite.

    Args:
      weights: of all SAEs, leaves [l, ...].
      adam: their moments.
      number: which of them moves.
      gradients: its own, leaves without l.
      rate: the learning rate.
      clip: the largest norm of the gradient; what is longer is scaled to it.
      sound: whether the loss is finite.
      axes: the mesh axes, if any.
    """
    own = jax.lax.dynamic_index_in_dim(weights.w_dec, number, keepdims=False)
    along = jnp.sum(gradients.w_dec * own, axis=-1, keepdims=True)
    squares = jax.tree.map(lambda g: jnp.sum(g * g), gradients._replace(w_dec=gradients.w_dec - along * own))
    split = squares.w_enc + squares.b_enc + squares.w_dec
    norm = jnp.sqrt((split if axes.latents is None else jax.lax.psum(split, axes.latents)) + squares.b_dec)
    scale = jnp.minimum(1, clip / jnp.maximum(norm, jnp.finfo(jnp.float32).tiny))
    taken, counts = sound & jnp.isfinite(norm), jnp.asarray(adam.count)

    def step(old: _Leaf, gradient: jax.Array, along: jax.Array | None = None) -> _Leaf:
        if along is not None:
            gradient = gradient - along * old.weight
        update: Any
        new: Any
        update, new = _ADAM.update(scale * gradient, optax.ScaleByAdamState(counts[number], old.mu, old.nu))
        weight = old.weight - rate * update
        if along is not None:
            weight = weight / jnp.linalg.norm(weight, axis=-1, keepdims=True)
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), _Leaf(weight, new.mu, new.nu), old)

    def moved(name: str, *given: jax.Array) -> _Leaf:
        stacks = _Leaf(*(getattr(tree, name) for tree in (weights, adam.mu, adam.nu)))
        return _in_place(step, stacks, number, (getattr(gradients, name), *given))

    leaves = [moved("w_enc"), moved("b_enc"), moved("w_dec", along), moved("b_dec")]
    weights, mu, nu = (Weights(*parts) for parts in zip(*leaves, strict=True))
    counts = counts.at[number].add(taken.astype(counts.dtype))
    return Applied(weights, optax.ScaleByAdamState(counts, mu, nu), norm, taken)


class _Leaf(NamedTuple):
    """One leaf of the weights and its moments."""

    weight: jax.Array
    mu: jax.Array
    nu: jax.Array


_CACHED = 1 << 18  # numbers of a block: with its moments and its gradient 4 MiB


def _in_place(step: Callable[..., _Leaf], stacks: _Leaf, number, given: tuple[jax.Array, ...]) -> _Leaf:
    """step(rows of SAE `number`, the same rows of what is given) in place, row by row independent.

    On a CPU in blocks, two at least, so that passes over them run in caches. A block is read as soon as the one before
    it is written: where one fusion reads a part of a stack and writes it, XLA for CPUs copies all of the stack.
    """
    rows = stacks.weight.shape[1]
    cpu = device_of(*given).platform == "cpu"
    size = max(1, min(rows // 2, _CACHED * rows // stacks.weight[0].size)) if cpu else rows

    def read(stacks: _Leaf, begin) -> _Leaf:
        take = lambda a: jax.lax.dynamic_slice(a, _place(a, number, begin), (1, size, *a.shape[2:]))[0]  # noqa: E731
        return jax.tree.map(take, stacks)

    def write(stacks: _Leaf, begin, new: _Leaf) -> _Leaf:
        put = lambda a, b: jax.lax.dynamic_update_slice(a, b[None], _place(a, number, begin))  # noqa: E731
        return jax.tree.map(put, stacks, new)

    def moved(old: _Leaf, begin) -> _Leaf:
        return step(old, *(jax.lax.dynamic_slice_in_dim(a, begin, size) for a in given))

    if size == rows:
        return write(stacks, 0, moved(read(stacks, 0), 0))

    def move(i, state: tuple[_Leaf, _Leaf]) -> tuple[_Leaf, _Leaf]:
        (stacks, old), begin = state, jnp.minimum(i * size, rows - size)
        new = moved(old, begin)
        if rows % size:  # the last block goes back over rows that have moved
            fresh = begin + jnp.arange(size) >= i * size
            new = jax.tree.map(lambda a, b: jnp.where(fresh.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, old)
        stacks = write(stacks, begin, new)
        return stacks, read(stacks, jnp.minimum((i + 1) * size, rows - size))

    return jax.lax.fori_loop(0, -(-rows // size), move, (stacks, read(stacks, 0)))[0]


def _place(stack: jax.Array, number, begin) -> tuple[Any, ...]:
    return number, begin, *(0,) * (stack.ndim - 2)
