"""The portable form: chunks of 64 tokens and matmuls; one token at a time it is a single step.

With D_ij = exp(g_j+1 + .. + g_i) for i >= j of one segment, else 0; E_i the same from before the chunk's first token:
M = (I + strict_lower(beta_i k_i.k_j D_ij))^-1;    N = M beta (V - E K S);
O = E Q S + (Q K^T * D) N;    S <- E_C S + K^T (D_C N)
"""

import functools

import jax
import jax.numpy as jnp

CHUNK = 64
# So many [chunk, chunk] blocks (chunks x rows x heads) are made ready at once: enough to fill a device, few enough to
# stay in a cache, whatever the length.
BLOCKS = 128
# Blocks up to this size are inverted by rank-one updates: smaller matmuls than this cost more than they compute.
SMALL = 16

_einsum = functools.partial(jnp.einsum, precision="highest")


def gated_delta(
    q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, beta: jax.Array, state: jax.Array, reset: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs [b, t, j, dv] and final state [b, j, dk, dv], by a scan over groups of chunks."""
    (b, t, i, dk), (j, dv) = q.shape, v.shape[2:]
    if t == 1:
        return _step(q, k, v, g, beta, state, reset)
    chunk = min(CHUNK, 1 << (t - 1).bit_length())
    count = -(-t // chunk)
    groups = -(-count // max(1, BLOCKS // (b * j)))
    size = -(-count // max(1, groups))  # even groups: little padding
    heads = (i, j // i)

    def split(x, *shape):  # [b, t, ...] to [groups, size, b, chunk, *shape]; zeros after the end leave the state alone
        x = jnp.pad(x, [(0, 0), (0, groups * size * chunk - t)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(b, groups, size, chunk, *shape), 0, 2)

    xs = (split(q, i, dk), split(k, i, dk), split(v, *heads, dv), split(g, *heads), split(beta, *heads), split(reset))
    # [b, i, dk, r, dv]: the r value heads of a key head, side by side, are the columns of one matmul.
    state, out = jax.lax.scan(_group, jnp.moveaxis(state.reshape(b, *heads, dk, dv), 2, 3), xs)
    out = jnp.moveaxis(out, 2, 0).reshape(b, groups * size * chunk, j, dv)[:, :t]
    return out, jnp.moveaxis(state, 3, 2).reshape(b, j, dk, dv)


def _step(q, k, v, g, beta, state, reset):
    """One token, with the state read once, for k and q together, and written once."""
    q, k = (jnp.repeat(x[:, 0], v.shape[2] // x.shape[2], axis=1) for x in (q, k))
    decay = jnp.where(reset, 0, jnp.exp(g[:, 0]))[..., None]
    read = decay[..., None] * _einsum("bjsd,bjde->bjse", jnp.stack([k, q], axis=2), state)
    new = beta[:, 0, :, None] * (v[:, 0] - read[:, :, 0])
    out = read[:, :, 1] + jnp.sum(q * k, axis=-1, keepdims=True) * new
    return out[:, None], decay[..., None] * state + k[..., :, None] * new[..., None, :]


# Checkpointed: the backward pass keeps the state before each group and makes the rest again.
@functools.partial(jax.checkpoint, prevent_cse=False)
def _group(state, xs):
    """The state after n chunks and their outputs [n, b, c, i, r, dv]; what needs no state is made for all at once."""
    q, k, v, g, beta, reset = xs
    q, k = (jnp.moveaxis(x, 2, 3) for x in (q, k))
    g, beta = (jnp.moveaxis(x, 2, -1) for x in (g, beta))
    inside, entering = _decays(g, reset)
    kk, qk = (_einsum("nbicd,nbied->nbice", x, k)[:, :, :, None] * inside for x in (k, q))
    inverse = _unit_lower_inverse(jnp.tril(beta[..., None] * kk, -1))
    return jax.lax.scan(_chunk, state, (q, k, v, beta, inverse, qk, entering, inside[..., -1, :]))


def _chunk(state, xs):
    """The state [b, i, dk, r, dv] after one chunk, and its outputs [b, c, i, r, dv]."""
    q, k, v, beta, inverse, score, entering, leaving = xs
    by_k, by_q = jnp.split(_einsum("bicd,bidrv->bicrv", jnp.concatenate([k, q], axis=2), state), 2, axis=2)
    decay, strength = (jnp.moveaxis(x, 2, 3)[..., None] for x in (entering, beta))
    new = _einsum("birce,bierv->bircv", inverse, strength * (jnp.moveaxis(v, 1, 2) - decay * by_k))
    out = jnp.moveaxis(decay * by_q, 2, 3) + _einsum("birce,birev->bircv", score, new)
    added = _einsum("bicd,bircv->bidrv", k, leaving[..., None] * new)
    return entering[:, :, None, :, -1, None] * state + added, jnp.moveaxis(out, 3, 1)


def _decays(g, reset):
    """D [..., i, r, c, c] within a chunk and E [..., i, r, c] from before it, zero across the borders of segments."""
    lower = jnp.tril(jnp.ones((g.shape[-1],) * 2, bool))
    # Summed pair by pair: differences of running sums would lose a small decay that follows a strong one.
    pairs = jnp.where(jnp.tril(lower, -1), g[..., :, None], 0)
    inside = _einsum("ce,...ej->...cj", lower.astype(g.dtype), pairs)
    entering = _einsum("ce,...e->...c", lower.astype(g.dtype), g)
    # Segments by the count of resets before them; axes for i and r.
    segment = jnp.cumsum(reset, axis=-1)[..., None, None, :]
    same = (segment[..., :, None] == segment[..., None, :]) & lower
    # Masked before the exponential: what is masked may overflow, and would poison the gradients.
    return jnp.exp(jnp.where(same, inside, -jnp.inf)), jnp.exp(jnp.where(segment == 0, entering, -jnp.inf))


@jax.custom_jvp
def _unit_lower_inverse(a):
    """(I + a)^-1 of strictly lower triangular a [..., c, c], c a power of two, without powers of a, which may grow.

    A small block column by column: I + a = L_0 .. L_c-2, where L_m is I plus column m of a, and L_m^-1 I minus it.
    A larger one by halves: [[P, 0], [a, Q]]^-1 = [[P^-1, 0], [-Q^-1 a P^-1, Q^-1]].
    """
    c = a.shape[-1]
    if c <= SMALL:
        inverse = jnp.broadcast_to(jnp.eye(c, dtype=a.dtype), a.shape)
        for m in range(c - 1):
            inverse = inverse - a[..., :, m, None] * inverse[..., m, None, :]
        return inverse
    half = c // 2
    top, bottom = _unit_lower_inverse(jnp.stack([a[..., :half, :half], a[..., half:, half:]]))
    corner = -_einsum("...ij,...jk,...kl->...il", bottom, a[..., half:, :half], top)
    return jnp.block([[top, jnp.zeros_like(corner)], [corner, bottom]])


@_unit_lower_inverse.defjvp
def _unit_lower_inverse_jvp(primals, tangents):
    """d (I + a)^-1 = -(I + a)^-1 da (I + a)^-1."""
    inverse = _unit_lower_inverse(*primals)
    return inverse, -_einsum("...ij,...jk,...kl->...il", inverse, tangents[0], inverse)
