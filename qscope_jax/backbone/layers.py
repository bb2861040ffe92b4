"""The leaf blocks: small linen modules of `self.param` and einsum, used only through `init` and `apply`.

A decoder layer is h + Mixer(norm(h)), then h + Mlp(norm(h)). Other families are other mixers and feed-forwards.
Shape letters: b batch, t time, d residual, h heads, k kv heads, g = h/k, c head dim, m mlp.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.config import LayerKind, ModelConfig

_INIT = nn.initializers.normal(0.02)
# Query rows handled at once: bounds the score matrix at long context without changing any row's arithmetic.
_QUERY_CHUNK = 1024


class BlockContext(NamedTuple):
    """What every block of one forward pass shares."""

    cos: Float[Array, "b t c"]
    sin: Float[Array, "b t c"]
    mask: Bool[Array, "b t"]
    segment_ids: Int[Array, "b t"]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """scale * x / rms(x); statistics in float32, cast back before the weight product as Qwen3 does."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


class RMSNorm(nn.Module):
    """`rms_norm` over the last axis with its weight."""

    eps: float

    @nn.compact
    def __call__(self, x):
        return rms_norm(x, self.param("scale", nn.initializers.ones, (x.shape[-1],)), self.eps)


class FullAttention(nn.Module):
    """Grouped-query causal attention with per-head query and key norms and rotary positions (Qwen3)."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, ctx: BlockContext):
        cfg = self.config
        d, h, k, c = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        project = lambda name, heads: jnp.einsum(  # noqa: E731
            "btd,dhc->bthc", x, self.param(name, _INIT, (d, heads, c)), precision=cfg.precision
        )
        q = RMSNorm(cfg.rms_norm_eps, name="q_norm")(project("q", h))
        key = RMSNorm(cfg.rms_norm_eps, name="k_norm")(project("k", k))
        v = project("v", k)
        q, key = rotate(q, ctx.cos, ctx.sin), rotate(key, ctx.cos, ctx.sin)
        q = q.reshape(*q.shape[:2], k, h // k, c)
        out = attend(q, key, v, ctx, cfg).reshape(*x.shape[:2], h, c)
        return jnp.einsum("bthc,hcd->btd", out, self.param("o", _INIT, (h, c, d)), precision=cfg.precision)


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x):
        cfg = self.config
        d, m = cfg.hidden_size, cfg.intermediate_size
        gate = jnp.einsum("btd,dm->btm", x, self.param("gate", _INIT, (d, m)), precision=cfg.precision)
        up = jnp.einsum("btd,dm->btm", x, self.param("up", _INIT, (d, m)), precision=cfg.precision)
        hidden = nn.silu(gate) * up
        return jnp.einsum("btm,md->btd", hidden, self.param("down", _INIT, (m, d)), precision=cfg.precision)


_MIXERS = {"full": FullAttention}


class Block(nn.Module):
    """One decoder layer of the given kind: residual stream in, residual stream out, both [b, t, d]."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(self, h, ctx: BlockContext):
        eps = self.config.rms_norm_eps
        h = h + _MIXERS[self.kind](self.config, name="mixer")(RMSNorm(eps, name="mixer_norm")(h), ctx)
        return h + Mlp(self.config, name="mlp")(RMSNorm(eps, name="mlp_norm")(h))


def rope_tables(positions: Int[Array, "b t"], config: ModelConfig, dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [b, t, c] of the rotary angles, computed in float32.

    The frequencies are made on the host and rounded where PyTorch rounds: one float32 ulp in them is 2.5e-4 in the
    cosine at position 32,767.
    """
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    powers = np.power(config.rope_theta, exponents.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1) / powers
    angles = positions.astype(jnp.float32)[..., None] * inverse
    angles = jnp.concatenate([angles, angles], axis=-1)
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: Float[Array, "b t h c"], cos: Float[Array, "b t c"], sin: Float[Array, "b t c"]):
    """Rotary embedding in halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * cos[:, :, None] + turned * sin[:, :, None]


def attend(q, key, value, ctx: BlockContext, config: ModelConfig) -> Float[Array, "b t k g c"]:
    """Causal attention inside segments over real keys; q [b, t, k, g, c], key and value [b, t, k, c].

    Softmax runs in float32. A pad query sees at least itself, so that its row is finite.
    """
    t = q.shape[1]
    if t <= _QUERY_CHUNK:
        return _attend_rows(q, key, value, jnp.arange(t), ctx, config)
    chunks = -(-t // _QUERY_CHUNK)
    padded = jnp.pad(q, ((0, 0), (0, chunks * _QUERY_CHUNK - t), (0, 0), (0, 0), (0, 0)))
    q_chunks = jnp.moveaxis(padded.reshape(q.shape[0], chunks, _QUERY_CHUNK, *q.shape[2:]), 1, 0)
    rows = jnp.minimum(jnp.arange(chunks * _QUERY_CHUNK), t - 1).reshape(chunks, _QUERY_CHUNK)
    # Checkpointed: the backward pass recomputes one chunk's scores instead of keeping them all.
    step = jax.checkpoint(lambda args: _attend_rows(args[0], key, value, args[1], ctx, config))
    out = jnp.moveaxis(jax.lax.map(step, (q_chunks, rows)), 0, 1)
    return out.reshape(q.shape[0], chunks * _QUERY_CHUNK, *q.shape[2:])[:, :t]


def _attend_rows(q, key, value, rows, ctx: BlockContext, config: ModelConfig):
    scores = jnp.einsum("btkgc,bskc->bkgts", q, key, precision=config.precision, preferred_element_type=jnp.float32) * (
        config.head_dim**-0.5
    )
    columns = jnp.arange(key.shape[1])
    visible = (ctx.segment_ids[:, rows, None] == ctx.segment_ids[:, None, :]) & ctx.mask[:, None, :]
    visible &= columns <= rows[:, None]
    visible |= columns == rows[:, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, value, precision=config.precision)
