"""The definition: one token after the other."""

import jax
import jax.numpy as jnp


def gated_delta(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array, reset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, j, dv] and final state [b, j, dk, dv]: decay, read, write, output, for every token in turn."""
    q, k = (jnp.repeat(x, v.shape[2] // q.shape[2], axis=2) for x in (q, k))

    def step(s, token):
        q_t, k_t, v_t, g_t, beta_t, reset_t = token
        s = jnp.where(reset_t[:, None, None, None], 0, s)
        s = jnp.exp(g_t)[..., None, None] * s
        delta = beta_t[..., None] * (v_t - jnp.einsum("bjde,bjd->bje", s, k_t, precision="highest"))
        s = s + k_t[..., :, None] * delta[..., None, :]
        return s, jnp.einsum("bjde,bjd->bje", s, q_t, precision="highest")

    tokens = (jnp.moveaxis(x, 1, 0) for x in (q, k, v, g, beta, reset))
    state, out = jax.lax.scan(step, state, tuple(tokens))
    return jnp.moveaxis(out, 0, 1), state
