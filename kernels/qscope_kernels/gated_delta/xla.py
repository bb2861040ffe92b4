"""The portable form: chunks of 64 tokens, matmuls alone, one state per chunk.

With D_ij = exp(g_j+1 + .. + g_i) for i >= j of one segment, else 0, and E_i = D from before the chunk's first token:
M = (I + strict_lower(beta_i k_i.k_j D_ij))^-1;    N = M beta (V - E K S);
O = E Q S + (Q K^T * D) N;    S <- E_C S + (D_C K)^T N
"""

import functools

import jax
import jax.numpy as jnp

CHUNK = 64
_einsum = functools.partial(jnp.einsum, precision="highest")


def gated_delta(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array, reset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, j, dv] and final state [b, j, dk, dv], by a scan over chunks of a power of two of tokens."""
    (b, t, i, dk), (j, dv) = q.shape, v.shape[2:]
    chunk = min(CHUNK, 1 << (t - 1).bit_length())
    count = -(-t // chunk)

    def chunks(
        x, *heads
    ):  # [b, t, ...] -> [count, b, chunk, ...]; the zeros behind the last token leave the state alone
        x = jnp.pad(x, [(0, 0), (0, count * chunk - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, count, chunk, *heads), 1, 0)

    grouped = (i, j // i)
    xs = (chunks(q, i, dk), chunks(k, i, dk), chunks(v, *grouped, dv), chunks(g, *grouped), chunks(beta, *grouped))
    state, out = jax.lax.scan(_chunk, state.reshape(b, *grouped, dk, dv), (*xs, chunks(reset)))
    out = jnp.moveaxis(out, 0, 1).reshape(b, count * chunk, j, dv)[:, :t]
    return out, state.reshape(b, j, dk, dv)


# Checkpointed: the backward pass keeps the state before each chunk and makes the rest again.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _chunk(state, xs):
    """The state after one chunk and its outputs [b, c, i, r, dv]; r counts the value heads of a key head."""
    q, k, v, g, beta, reset = xs
    inside, entering = _decays(g, reset)
    strict = jnp.tril(jnp.ones(inside.shape[-2:], bool), -1)
    beta = jnp.moveaxis(beta, 1, -1)[..., None]
    kk = _einsum("bcid,beid->bice", k, k)[:, :, None]
    qk = _einsum("bcid,beid->bice", q, k)[:, :, None]
    inverse = _unit_lower_inverse(jnp.where(strict, beta * kk * inside, 0))
    read = entering[..., None] * _einsum("bcid,birdv->bircv", k, state)
    new = _einsum("birce,birev->bircv", inverse, beta * (jnp.transpose(v, (0, 2, 3, 1, 4)) - read))
    out = entering[..., None] * _einsum("bcid,birdv->bircv", q, state)
    out = out + _einsum("birce,birev->bircv", qk * inside, new)
    state = entering[..., -1:, None] * state + _einsum("bcid,bircv->birdv", k, inside[..., -1, :, None] * new)
    return state, jnp.transpose(out, (0, 3, 1, 2, 4))


def _decays(g, reset):
    """D [b, i, r, c, c] within a chunk and E [b, i, r, c] from before it, zero across the borders of segments."""
    lower = jnp.tril(jnp.ones((g.shape[1],) * 2, bool))
    g = jnp.moveaxis(g, 1, -1)
    ordinal = jnp.cumsum(reset, axis=1)
    same = (ordinal[:, :, None] == ordinal[:, None, :]) & lower
    # Summed pair by pair: differences of running sums would lose a small decay that follows a strong one.
    sums = _einsum("ce,birej->bircj", lower.astype(g.dtype), jnp.where(jnp.tril(lower, -1), g[..., :, None], 0))
    entering = _einsum("ce,bire->birc", lower.astype(g.dtype), g)
    # Masked before the exponential: across a border, or above the diagonal, it may overflow and poison gradients.
    inside = jnp.exp(jnp.where(same[:, None, None], sums, -jnp.inf))
    return inside, jnp.exp(jnp.where(ordinal[:, None, None] == 0, entering, -jnp.inf))


@jax.custom_jvp
def _unit_lower_inverse(a):
    """(I + a)^-1 of strictly lower triangular a [..., c, c], c a power of two, by halves: no power of a ever exists."""
    half = a.shape[-1] // 2
    if not half:
        return jnp.ones_like(a)
    halves = jnp.stack([a[..., :half, :half], a[..., half:, half:]])
    top, bottom = _unit_lower_inverse(halves)
    corner = -_einsum("...ij,...jk,...kl->...il", bottom, a[..., half:, :half], top)
    return jnp.block([[top, jnp.zeros_like(corner)], [corner, bottom]])


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    inverse = _unit_lower_inverse(*primals)
    return inverse, -_einsum("...ij,...jk,...kl->...il", inverse, tangents[0], inverse)
