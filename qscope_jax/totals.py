"""Long sums in two float32: the rounded sum, and what the rounding lost; about 48 bits together."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from qscope_jax.mesh import to_host


class Total(NamedTuple):
    """A long sum in two float32, the rounded sum and what the rounding lost: about 48 bits together."""

    high: Float[Array, "*s"]
    low: Float[Array, "*s"]


def as_total(value: jax.Array) -> Total:
    """A sum of this one term."""
    return Total(value, jnp.zeros_like(value))


def add_totals(one: Total, other: Total) -> Total:
    """Knuth's two-sum: the high part is the rounded sum, the low part collects what rounding lost."""
    high = one.high + other.high
    seen = high - one.high
    lost = (one.high - (high - seen)) + (other.high - seen)
    return Total(high, one.low + other.low + lost)


def total_value(total: Total) -> np.ndarray:
    """The sum in float64."""
    return to_host(total.high).astype(np.float64) + to_host(total.low)
