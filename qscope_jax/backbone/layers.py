"""The leaf blocks: small linen modules of `self.param` and einsum, used only through `init` and `apply`.

A decoder layer is h + Mixer(norm(h)), then h + FeedForward(norm(h)); families differ in both. A mixer takes and gives
back its slot of the cache (None without one), of which it touches one period.
Shape letters: b batch, t time, d residual, h heads, k kv heads, g = h/k, c head dim, m mlp, e experts.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from qscope_jax.backbone.cache import FullSlot
from qscope_jax.backbone.config import LayerKind, ModelConfig
from qscope_jax.backbone.context import BlockContext
from qscope_jax.backbone.experts import expert_mlp, route
from qscope_jax.backbone.linear import GatedDeltaNet
from qscope_jax.backbone.norms import RMSNorm

_INIT = nn.initializers.normal(0.02)
# Query rows handled at once: bounds the score matrix at long context without changing any row's arithmetic.
_QUERY_CHUNK = 1024


class FullAttention(nn.Module):
    """Grouped-query causal attention with per-head query and key norms and rotary positions; gated in Qwen3.5."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, ctx: BlockContext, slot: FullSlot | None, period):
        cfg = self.config
        d, h, k, c = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        project = lambda name, heads, width: jnp.einsum(  # noqa: E731
            "btd,dhc->bthc", x, self.param(name, _INIT, (d, heads, width)), precision=cfg.precision
        )
        norm = lambda name: RMSNorm(cfg.rms_norm_eps, cfg.hybrid, name=name)  # noqa: E731
        # The gate of a head stands behind its query: a per-head split, not one of halves.
        q, gate = jnp.split(project("q", h, 2 * c), 2, axis=-1) if cfg.hybrid else (project("q", h, c), None)
        key, value = norm("k_norm")(project("k", k, c)), project("v", k, c)
        q, key = rotate(norm("q_norm")(q), ctx.cos, ctx.sin), rotate(key, ctx.cos, ctx.sin)
        if slot is not None:
            slot, key, value = _remember(slot, key, value, period, ctx.start)
        q = q.reshape(*q.shape[:2], k, h // k, c)
        out = attend(q, key, value, ctx, cfg).reshape(*x.shape[:2], h, c)
        if gate is not None:
            out = out * nn.sigmoid(gate)
        # As one axis: contracting two, XLA on a CPU would bring them into another order, with a copy of the weights.
        o = self.param("o", _INIT, (h, c, d)).reshape(h * c, d)
        return jnp.einsum("bti,id->btd", out.reshape(*x.shape[:2], h * c), o, precision=cfg.precision), slot


class Mlp(nn.Module):
    """down(silu(gate(x)) * up(x)), of the given width."""

    width: int
    precision: str

    @nn.compact
    def __call__(self, x):
        d, m = x.shape[-1], self.width
        gate = jnp.einsum("btd,dm->btm", x, self.param("gate", _INIT, (d, m)), precision=self.precision)
        up = jnp.einsum("btd,dm->btm", x, self.param("up", _INIT, (d, m)), precision=self.precision)
        hidden = nn.silu(gate) * up
        return jnp.einsum("btm,md->btd", hidden, self.param("down", _INIT, (m, d)), precision=self.precision)


class Moe(nn.Module):
    """The `num_active` likeliest experts of every token, weighed by the router; in Qwen3.5 plus a gated shared one."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x, within=None):
        cfg, moe = self.config, self.config.moe
        assert moe is not None
        b, t, d = x.shape
        e, m = moe.num_experts, moe.intermediate_size
        logits = jnp.einsum("btd,de->bte", x, self.param("router", _INIT, (d, e)), precision=cfg.precision)
        weights, experts = route(logits.reshape(-1, e), moe.num_active, normalise=moe.normalise)
        gate, up, down = (
            self.param(name, _INIT, shape)
            for name, shape in (("gate", (e, d, m)), ("up", (e, d, m)), ("down", (e, m, d)))
        )
        options = {"within": within, "precision": cfg.precision}
        out = expert_mlp(x.reshape(-1, d), weights, experts, gate, up, down, **options).reshape(b, t, d)
        if moe.shared_intermediate_size is None:
            return out
        share = jnp.einsum("btd,ds->bts", x, self.param("shared_gate", _INIT, (d, 1)), precision=cfg.precision)
        return out + nn.sigmoid(share) * Mlp(moe.shared_intermediate_size, cfg.precision, name="shared")(x)


_MIXERS = {"full": FullAttention, "linear": GatedDeltaNet}


class Block(nn.Module):
    """One decoder layer of the given kind: residual stream in, residual stream out, both [b, t, d]."""

    config: ModelConfig
    kind: LayerKind

    @nn.compact
    def __call__(self, h, ctx: BlockContext, slot, period, experts=None):
        cfg = self.config
        norm = lambda name: RMSNorm(cfg.rms_norm_eps, cfg.hybrid, name=name)  # noqa: E731
        mixed, slot = _MIXERS[self.kind](cfg, name="mixer")(norm("mixer_norm")(h), ctx, slot, period)
        h = h + mixed
        width = cfg.intermediate_size
        x = norm("mlp_norm")(h)
        if width is None:
            return h + Moe(cfg, name="moe")(x, None if experts is None else (experts, period)), slot
        return h + Mlp(width, cfg.precision, name="mlp")(x), slot


def rotate(x: Float[Array, "b t h c"], cos: Float[Array, "b t r"], sin: Float[Array, "b t r"]):
    """Rotary embedding of the first r dimensions in halves: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)."""
    turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = jnp.split(turning, 2, axis=-1)
    turned = turning * cos[:, :, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, :, None]
    return jnp.concatenate([turned, rest], axis=-1)


def attend(q, key, value, ctx: BlockContext, config: ModelConfig) -> Float[Array, "b t k g c"]:
    """Causal attention inside segments over real keys; q [b, t, k, g, c], key and value [b, s, k, c].

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
    columns, own = jnp.arange(key.shape[1]), ctx.start + rows[:, None]
    visible = ctx.segments[:, rows, None] == ctx.key_segments[:, None, :]
    visible &= columns <= own
    visible |= columns == own
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
    return jnp.einsum("bkgts,bskc->btkgc", weights, value, precision=config.precision)


def _remember(slot: FullSlot, key, value, period, start):
    """Enters this call's keys and values into the cache; gives the slot and all columns of this layer."""
    zero = jnp.zeros((), start.dtype)
    where = (period, zero, start, zero, zero)
    k = jax.lax.dynamic_update_slice(slot.k, key[None].astype(slot.k.dtype), where)
    v = jax.lax.dynamic_update_slice(slot.v, value[None].astype(slot.v.dtype), where)
    read = lambda a: jax.lax.dynamic_index_in_dim(a, period, keepdims=False).astype(key.dtype)  # noqa: E731
    return FullSlot(k, v), read(k), read(v)
