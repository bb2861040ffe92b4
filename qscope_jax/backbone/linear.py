"""Gated DeltaNet, the linear attention of Qwen3.5: a short convolution, then a state that forgets and corrects itself.

    S <- e^g S;  S <- S + k (beta (v - S^T k))^T;  o = S^T q        per value head, k and q of unit length

(Yang et al. 2024, "Gated Delta Networks"; constants as in the released checkpoints.) A pad leaves everything as it was.
Shape letters: i key heads, j value heads, c key dim, w value dim, u = conv_width - 1 tokens before.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from qscope_kernels.gated_delta import gated_delta

from qscope_jax.backbone.cache import LinearSlot
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.context import BlockContext, place_before
from qscope_jax.backbone.norms import RMSNorm

_INIT = nn.initializers.normal(0.02)


class GatedDeltaNet(nn.Module):
    """x [b, t, d] to [b, t, d]; everything of the recurrence is float32."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, ctx: BlockContext, slot: LinearSlot | None, period):
        cfg, linear = self.config, self.config.linear
        assert linear is not None
        d, i, j = cfg.hidden_size, linear.num_key_heads, linear.num_value_heads
        c, w = linear.key_dim, linear.value_dim
        before = None if slot is None else jax.tree.map(lambda a: _at(a, period), slot)

        def convolved(name: str, heads: int, width: int):
            """A projection behind its convolution, and what the convolution must remember of it."""
            weight = self.param(name, _INIT, (d, heads, width))
            inputs = jnp.einsum("btd,dhc->bthc", x, weight, precision=cfg.precision)
            taps = self.param(f"conv_{name}", nn.initializers.normal(0.5), (linear.conv_width, heads, width))
            return convolve(inputs, taps, ctx, None if before is None else getattr(before, name))

        (q, last_q), (k, last_k), (v, last_v) = convolved("q", i, c), convolved("k", i, c), convolved("v", j, w)
        per_head = lambda name: jnp.einsum(  # noqa: E731
            "btd,dj->btj", x, self.param(name, _INIT, (d, j)), precision=cfg.precision
        )
        decay = -jnp.exp(self.param("a_log", nn.initializers.zeros, (j,)).astype(jnp.float32))
        bias = self.param("dt_bias", nn.initializers.ones, (j,)).astype(jnp.float32)
        g = decay * nn.softplus(per_head("a").astype(jnp.float32) + bias)
        beta = nn.sigmoid(per_head("b")).astype(jnp.float32)
        g, beta = (jnp.where(ctx.mask[..., None], a, 0.0) for a in (g, beta))
        state = None if before is None else before.state
        out, state = gated_delta(unit(q) * c**-0.5, unit(k), v, g, beta, state=state, reset=ctx.reset)
        z = jnp.einsum("btd,djw->btjw", x, self.param("z", _INIT, (d, j, w)), precision=cfg.precision)
        out = RMSNorm(cfg.rms_norm_eps, name="norm")(out.astype(x.dtype)).astype(jnp.float32)
        out = (out * nn.silu(z.astype(jnp.float32))).astype(x.dtype)
        o = self.param("o", _INIT, (j, w, d)).reshape(j * w, d)  # as one axis: see FullAttention
        out = jnp.einsum("bti,id->btd", out.reshape(*x.shape[:2], j * w), o, precision=cfg.precision)
        if slot is None:
            return out, None
        new = LinearSlot(last_q, last_k, last_v, state)
        return out, jax.tree.map(lambda a, b: _put(a, b, period), slot, new)


def convolve(inputs, weight, ctx: BlockContext, before):
    """silu of the causal depthwise convolution over the real tokens of a segment; [b, t, h, c], weight [u+1, h, c].

    y_t = sum_s weight[u - s] * inputs[t - s]. Also the inputs of the last u real tokens [b, u, h, c], for the cache.
    """
    u, t, conv = weight.shape[0] - 1, inputs.shape[1], ctx.conv
    assert conv is not None
    if before is None:
        extended = jnp.pad(inputs, ((0, 0), (u, 0), (0, 0), (0, 0)))
    else:
        extended = place_before(before.astype(inputs.dtype), inputs, conv.first)
    total = inputs * weight[u]
    for s in range(1, u + 1):
        same = conv.extended[:, u - s : u - s + t] == ctx.segments
        total += jnp.where(same[..., None, None], extended[:, u - s : u - s + t], 0) * weight[u - s]
    last = jnp.take_along_axis(extended, jnp.maximum(conv.last, 0)[..., None, None], axis=1)
    return nn.silu(total), last


def unit(x: jax.Array) -> jax.Array:
    """x / |x| over the last axis in float32; the 1e-6 inside the root keeps zero vectors and their gradients finite."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-6)


def _at(array, period):
    return jax.lax.dynamic_index_in_dim(array, period, keepdims=False)


def _put(array, value, period):
    return jax.lax.dynamic_update_index_in_dim(array, value.astype(array.dtype), period, 0)
