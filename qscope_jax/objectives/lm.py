"""Losses of a language model over a large vocabulary, a chunk of tokens at a time, gradient included.

    CE = - mean_i log q_i(y_i),    KL(p || q) = mean_i sum_v p_i(v) log(p_i(v) / q_i(v)),    q_i = softmax(head h_i)

in nats per token. Logits [chunk, v] are made in float32 from hidden states and made again by the backward pass; no
array [tokens, v] ever exists. Chunks are cut along time, so that rows stay spread over a mesh.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params

CHUNK_TOKENS = 512  # with 248,320 ids, 0.5 GB of logits

Metrics = dict[str, Float[Array, ""]]


def output_head(params: Params, config: ModelConfig) -> Float[Array, "v d"]:
    """The matrix that turns final-normed hidden states into logits; the embedding where they are tied."""
    return params["embed"] if config.tie_word_embeddings else params["head"]


def next_tokens(
    tokens: Int[Array, "b t"], mask: Bool[Array, "b t"], segment_ids: Int[Array, "b t"]
) -> tuple[Int[Array, "b t"], Bool[Array, "b t"]]:
    """What each position is to predict, and where there is such a token: a real one, next to it, of its own segment."""
    last = ((0, 0), (0, 1))
    after = lambda a: jnp.pad(a[:, 1:], last)  # noqa: E731
    return after(tokens), mask & after(mask) & (segment_ids == after(segment_ids))


def cross_entropy_loss(
    hidden: Float[Array, "b t d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    keep: Bool[Array, "b t"],
    *,
    precision: str | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean cross-entropy over the positions to keep, in nats; 0 where none is kept.

    Args:
      hidden: final-normed states (`ForwardOutput.hidden`).
      head: see `output_head`.
      targets: the ids to predict, from `next_tokens`.
      keep: the positions that count; others may hold anything finite.
      precision: of the matmul, `ModelConfig.precision`.
      chunk_tokens: about how many positions have logits at a time.

    Returns:
      The loss, and `cross_entropy` and `tokens`: the sum over positions, and how many there were.
    """

    def one(hidden, targets):
        return (_cross_entropy(_logits(hidden, head, precision), targets),)

    (total,), tokens = _sums(one, (hidden, targets), keep, chunk_tokens)
    return total / jnp.maximum(tokens, 1), {"cross_entropy": total, "tokens": tokens}


def kl_loss(
    hidden: Float[Array, "b t d"],
    reference: Float[Array, "b t d"],
    head: Float[Array, "v d"],
    targets: Int[Array, "b t"],
    keep: Bool[Array, "b t"],
    *,
    precision: str | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[Float[Array, ""], Metrics]:
    """Mean KL(p || q) over the positions to keep, in nats, p of the `reference` states and q of the `hidden` ones.

    Arguments as for `cross_entropy_loss`. The metrics are sums: `kl`, `tokens`, and, as the logits are there, the
    `cross_entropy` of `hidden`.
    """

    def one(hidden, reference, targets):
        logits = _logits(hidden, head, precision)
        log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(_logits(reference, head, precision))
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1), _cross_entropy(logits, targets)

    (kl, entropy), tokens = _sums(one, (hidden, reference, targets), keep, chunk_tokens)
    return kl / jnp.maximum(tokens, 1), {"kl": kl, "cross_entropy": entropy, "tokens": tokens}


def _logits(hidden: Float[Array, "b c d"], head: Float[Array, "v d"], precision: str | None) -> Float[Array, "b c v"]:
    return jnp.einsum("bcd,vd->bcv", hidden, head, precision=precision, preferred_element_type=jnp.float32)


def _cross_entropy(logits: Float[Array, "b c v"], targets: Int[Array, "b c"]) -> Float[Array, "b c"]:
    # Not by an index into the vocabulary, which a mesh may split: a masked sum needs no gather over devices.
    chosen = jnp.arange(logits.shape[-1]) == targets[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(chosen, logits, 0), axis=-1)


def _sums(
    one: Callable[..., tuple[jax.Array, ...]], arrays: tuple[jax.Array, ...], keep: Bool[Array, "b t"], chunk: int
) -> tuple[tuple[jax.Array, ...], Float[Array, ""]]:
    """Sums of what `one` gives per position [b, c] over those to keep, and their number."""
    b, t = keep.shape
    width = min(max(1, chunk // b), t)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, -t % width), *((0, 0),) * (a.ndim - 2)))
        return jnp.moveaxis(a.reshape(b, -1, width, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_sums(pieces):
        *inputs, kept = pieces
        return tuple(jnp.sum(jnp.where(kept, value, 0)) for value in one(*inputs))

    sums = jax.lax.map(chunk_sums, tuple(map(cut, (*arrays, keep))))
    return tuple(s.sum() for s in sums), keep.sum(dtype=jnp.float32)
