"""How well an SAE reconstructs and uses its latents, folded over a corpus batch by batch.

    FVU = sum_n |x_n - x_hat_n|^2 / sum_n |x_n - mean(x)|^2,    explained variance = 1 - FVU

Both sums run over all tokens and dimensions and the mean is that of the whole corpus: neither a mean of per-batch or
per-dimension ratios nor a variance about zero. Means and centred sums are merged (Chan et al. 1979) and totals carry
their rounding error, so float32 stays exact enough for billions of tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.sae.model import Sae, SaeConfig, decode, encode

SINK_FACTOR = 10.0


class Total(NamedTuple):
    """A long sum in two float32, the rounded sum and what the rounding lost: about 48 bits together."""

    high: Float[Array, "*s"]
    low: Float[Array, "*s"]


class Quality(NamedTuple):
    """What was seen so far. Leaves of `spread` and the counts in `tokens` are per group (one group by default)."""

    tokens: Total  # [g] tokens that count
    mean: Float[Array, "g d"]
    spread: Total  # [g] sum of |x - mean of its group|^2
    error: Total  # sum of |x - x_hat|^2
    cosine: Total  # sum of cos(x, x_hat)
    active: Total  # number of latents that fired, summed over tokens
    sinks: Total  # real tokens left out for their norm
    fired: Bool[Array, "f"]


def sink_threshold(norms: Float[np.ndarray, "n"]) -> float:
    """The norm above which a token is a sink: 10x the median of the given norms of real tokens.

    Raises:
      ValueError: there are no norms, or one is not finite.
    """
    norms = np.asarray(norms, np.float64)
    if not norms.size or not np.isfinite(norms).all():
        raise ValueError(f"a sink threshold needs finite norms of at least one token, found {norms.size} norms")
    return float(SINK_FACTOR * np.median(norms))


def init_quality(config: SaeConfig, *, num_groups: int = 1) -> Quality:
    """Nothing seen yet, for SAEs of this shape and tokens of `num_groups` groups (for example languages)."""
    zero, per_group = _total(jnp.zeros(())), _total(jnp.zeros(num_groups))
    mean, fired = jnp.zeros((num_groups, config.d_model)), jnp.zeros(config.d_sae, bool)
    return Quality(per_group, mean, per_group, zero, zero, zero, zero, fired)


def update_quality(
    quality: Quality,
    sae: Sae,
    x: Float[Array, "*n d"],
    mask: Bool[Array, "*n"] | None = None,
    *,
    groups: Int[Array, "*n"] | None = None,
    sink_threshold: float | Float[Array, ""] | None = None,
) -> Quality:
    """Folds a batch of residual vectors in; pure, to be jitted by the caller.

    Args:
      quality: from `init_quality` or an earlier update.
      sae: the SAE under test.
      x: residual vectors [..., d] in raw units.
      mask: True where a token is real. Others never count, whatever they hold.
      groups: the group of each token, 0..num_groups - 1; tokens of any other group do not count.
      sink_threshold: real tokens of a larger norm do not count either, but their share is reported.
    """
    num_groups = quality.mean.shape[0]
    x = x.reshape(-1, x.shape[-1])
    real = jnp.ones(len(x), bool) if mask is None else mask.reshape(-1)
    group = jnp.zeros(len(x), jnp.int32) if groups is None else groups.reshape(-1)
    real &= (group >= 0) & (group < num_groups)
    sink = jnp.zeros_like(real)
    if sink_threshold is not None:
        sink = real & (jnp.linalg.norm(x.astype(jnp.float32), axis=-1) > sink_threshold)
    keep = real & ~sink
    x = jnp.where(keep[:, None], x, 0)  # zero times a pad that holds NaN would still be NaN
    return merge_quality(quality, _measure(sae, x, keep, sink, group, num_groups))


def merge_quality(one: Quality, other: Quality) -> Quality:
    """What both have seen, for example two shards of a corpus. The order does not matter but for rounding."""
    n_one, n_other = one.tokens.high, other.tokens.high
    share = n_other / jnp.maximum(n_one + n_other, 1)
    step = other.mean - one.mean
    between = jnp.sum(jnp.square(step), axis=-1) * n_one * share
    return Quality(
        tokens=_add(one.tokens, other.tokens),
        mean=one.mean + step * share[:, None],
        spread=_add(_add(one.spread, other.spread), _total(between)),
        error=_add(one.error, other.error),
        cosine=_add(one.cosine, other.cosine),
        active=_add(one.active, other.active),
        sinks=_add(one.sinks, other.sinks),
        fired=one.fired | other.fired,
    )


def summarize(quality: Quality) -> dict[str, float]:
    """The metrics of everything seen, as plain numbers.

    `fvu` and `explained_variance` (module docstring; nan where all tokens are equal), `l0` latents per token, `cosine`
    between x and x_hat, `dead_fraction` of latents that never fired, `tokens` that counted, `sink_fraction` of the
    real tokens. With several groups also `fvu_within_groups`, against each group's own mean: the honest figure where
    telling the groups apart already explains much.

    Raises:
      ValueError: no token counted.
    """
    sums = {name: _value(getattr(quality, name)) for name in ("tokens", "spread", "error", "cosine", "active", "sinks")}
    counts, tokens = sums["tokens"], float(sums["tokens"].sum())
    if tokens == 0:
        raise ValueError("no token counted: the mask, the groups or the sink threshold left none")
    means = np.asarray(quality.mean, np.float64)
    offsets = means - counts @ means / tokens
    within = sums["spread"].sum()
    total = within + counts @ np.square(offsets).sum(axis=-1)
    fvu = float(sums["error"] / total) if total > 0 else float("nan")
    metrics = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": float(sums["active"] / tokens),
        "cosine": float(sums["cosine"] / tokens),
        "dead_fraction": float(1 - np.mean(quality.fired)),
        "tokens": tokens,
        "sink_fraction": float(sums["sinks"] / (tokens + sums["sinks"])),
    }
    if len(counts) > 1:
        metrics["fvu_within_groups"] = float(sums["error"] / within) if within > 0 else float("nan")
    return metrics


def _measure(sae: Sae, x, keep, sink, group, num_groups: int) -> Quality:
    """The quality of one batch: x [n, d], zero where dropped; keep and sink [n] bool; group [n]."""
    code = encode(sae, x)
    x, x_hat = x.astype(jnp.float32), decode(sae, code)
    used = (code.values > 0) & keep[:, None]
    members = jax.nn.one_hot(group, num_groups) * keep[:, None]
    counts = members.sum(axis=0)
    mean = jnp.einsum("ng,nd->gd", members, x, precision="highest") / jnp.maximum(counts, 1)[:, None]
    centred = jnp.sum(jnp.square(x - mean[group]), axis=-1)
    # Rounded products of tiny norms stay away from 0 / 0; a zero vector has cosine 0 with everything.
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(x_hat, axis=-1)
    cosine = jnp.sum(x * x_hat, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    kept_sum = lambda a: _total(jnp.sum(jnp.where(keep, a, 0)))  # noqa: E731
    fired = jnp.zeros(sae.config.d_sae, bool).at[jnp.where(used, code.indices, sae.config.d_sae)].set(True, mode="drop")
    return Quality(
        tokens=_total(counts),
        mean=mean,
        spread=_total(jnp.einsum("ng,n->g", members, centred, precision="highest")),
        error=kept_sum(jnp.sum(jnp.square(x - x_hat), axis=-1)),
        cosine=kept_sum(cosine),
        active=_total(jnp.sum(used, dtype=jnp.float32)),
        sinks=_total(jnp.sum(sink, dtype=jnp.float32)),
        fired=fired,
    )


def _total(value: jax.Array) -> Total:
    return Total(value, jnp.zeros_like(value))


def _add(one: Total, other: Total) -> Total:
    """Knuth's two-sum: the high part is the rounded sum, the low part collects what rounding lost."""
    high = one.high + other.high
    seen = high - one.high
    lost = (one.high - (high - seen)) + (other.high - seen)
    return Total(high, one.low + other.low + lost)


def _value(total: Total) -> np.ndarray:
    return np.asarray(total.high, np.float64) + np.asarray(total.low, np.float64)
