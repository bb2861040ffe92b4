"""gated_delta: the gated delta rule of linear attention, a state per value head that decays, is corrected and is read.

S <- exp(g_t) S;    S <- S + k_t (beta_t (v_t - S^T k_t))^T;    o_t = S^T q_t
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from qscope_kernels.dispatch import Kernel, pick
from qscope_kernels.gated_delta import ref, xla

_IMPLEMENTATIONS = {"ref": ref.gated_delta, "xla": xla.gated_delta}
_KERNELS: dict[str, Kernel] = {}


def gated_delta(
    q: Float[Array, "b t i dk"],
    k: Float[Array, "b t i dk"],
    v: Float[Array, "b t j dv"],
    g: Float[Array, "b t j"],
    beta: Float[Array, "b t j"],
    *,
    state: Float[Array, "b j dk dv"] | None = None,
    reset: Bool[Array, "b t"] | None = None,
    impl: str | None = None,
) -> tuple[Float[Array, "b t j dv"], Float[Array, "b j dk dv"]]:
    """The outputs of t tokens and the state after them, both float32 (Gated Delta Networks, arXiv 2412.06464, eq. 10).

    Value head n reads key head n // (j // i). The caller normalises k and q and scales q; g <= 0 is the logarithm of
    the decay, beta the strength of the write. Where `reset` is True the state is zeroed before the token is taken in
    (a new segment). A token with g = 0, beta = 0 and no reset leaves the state as it was: pads are made so, and their
    outputs mean nothing. No state stands for zeros. Computed in float32 at full precision, whatever the inputs.

    Raises:
      ValueError: a shape does not fit the others, j is no multiple of i, or `impl` is unknown.
    """
    _check(q, k, v, g, beta, state, reset)
    (b, t, _, dk), (j, dv) = q.shape, v.shape[2:]
    first = jnp.zeros((b, j, dk, dv), jnp.float32) if state is None else state.astype(jnp.float32)
    resets = jnp.zeros((b, t), bool) if reset is None else reset
    q, k, v, g, beta = (x.astype(jnp.float32) for x in (q, k, v, g, beta))
    arrays = q, k, v, g, beta, first, resets
    return pick("gated_delta", _IMPLEMENTATIONS, _KERNELS, impl, *arrays)(*arrays)


def _check(q, k, v, g, beta, state, reset) -> None:
    """Refuses arguments whose shapes contradict q [b, t, i, dk] and v [b, t, j, dv]."""
    if q.ndim != 4 or v.ndim != 4:
        raise ValueError(f"q {q.shape} and v {v.shape} must have four axes: [b, t, heads, width]")
    (b, t, i, dk), (j, dv) = q.shape, v.shape[2:]
    if not i or j % i:
        raise ValueError(f"v has {j} heads and q has {i}: the value heads must be a multiple of the key heads")
    expected = {
        "k": (k, (b, t, i, dk)),
        "v": (v, (b, t, j, dv)),
        "g": (g, (b, t, j)),
        "beta": (beta, (b, t, j)),
        "state": (state, (b, j, dk, dv)),
        "reset": (reset, (b, t)),
    }
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            raise ValueError(f"{name} has shape {array.shape}; expected {shape} beside q {q.shape} and v {v.shape}")
