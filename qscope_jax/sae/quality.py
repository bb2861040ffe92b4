"""How well an SAE reconstructs and uses its latents, folded over a corpus batch by batch.

    FVU = sum_n |x_n - x_hat_n|^2 / sum_n |x_n - mean(x)|^2,    explained variance = 1 - FVU

Both sums run over all tokens and dimensions and the mean is that of the whole corpus: neither a mean of per-batch or
per-dimension ratios nor a variance about zero. Means and centred sums are merged (Chan et al. 1979) and totals carry
their rounding error, so float32 stays exact enough for billions of tokens; counts are exact to 2^48.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.mesh import to_host
from qscope_jax.sae.model import Sae, SaeConfig, SparseCode, decode, encode
from qscope_jax.totals import Total, add_totals, as_total, total_value

SINK_FACTOR = 10.0
_BINS_PER_DECADE = 4


class Quality(NamedTuple):
    """What was seen so far. Leaves of `spread` and the counts in `tokens` are per group (one group by default)."""

    tokens: Total  # [g] tokens that count
    mean: Float[Array, "g d"]
    spread: Total  # [g] sum of |x - mean of its group|^2
    error: Total  # sum of |x - x_hat|^2
    cosine: Total  # sum of cos(x, x_hat)
    active: Total  # number of latents that fired, summed over tokens
    sinks: Total  # real tokens left out for their norm
    counts: Total  # [f] tokens on which each latent fired


class Measured(NamedTuple):
    """What `measure` saw of a batch of n tokens: codes and reconstructions, meaningful where `keep` is True."""

    code: SparseCode
    x_hat: Float[Array, "n d"]
    keep: Bool[Array, "n"]


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
    zero, per_group = as_total(jnp.zeros(())), as_total(jnp.zeros(num_groups))
    mean, counts = jnp.zeros((num_groups, config.d_model)), as_total(jnp.zeros(config.d_sae))
    return Quality(per_group, mean, per_group, zero, zero, zero, zero, counts)


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
    return measure(quality, sae, x, mask, groups=groups, sink_threshold=sink_threshold)[0]


def measure(
    quality: Quality,
    sae: Sae,
    x: Float[Array, "*n d"],
    mask: Bool[Array, "*n"] | None = None,
    *,
    groups: Int[Array, "*n"] | None = None,
    sink_threshold: float | Float[Array, ""] | None = None,
) -> tuple[Quality, Measured]:
    """As `update_quality`, and what the SAE made of the batch, for other statistics of the same tokens."""
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
    code = encode(sae, x)
    measured = Measured(code, decode(sae, code), keep)
    return merge_quality(quality, _batch_quality(measured, sae.config.d_sae, x, sink, group, num_groups)), measured


def merge_quality(one: Quality, other: Quality) -> Quality:
    """What both have seen, for example two shards of a corpus. The order does not matter but for rounding."""
    n_one, n_other = one.tokens.high, other.tokens.high
    share = n_other / jnp.maximum(n_one + n_other, 1)
    step = other.mean - one.mean
    between = jnp.sum(jnp.square(step), axis=-1) * n_one * share
    return Quality(
        tokens=add_totals(one.tokens, other.tokens),
        mean=one.mean + step * share[:, None],
        spread=add_totals(add_totals(one.spread, other.spread), as_total(between)),
        error=add_totals(one.error, other.error),
        cosine=add_totals(one.cosine, other.cosine),
        active=add_totals(one.active, other.active),
        sinks=add_totals(one.sinks, other.sinks),
        counts=add_totals(one.counts, other.counts),
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
    sums = {
        name: total_value(getattr(quality, name)) for name in ("tokens", "spread", "error", "cosine", "active", "sinks")
    }
    counts, tokens = sums["tokens"], float(sums["tokens"].sum())
    if tokens == 0:
        raise ValueError("no token counted: the mask, the groups or the sink threshold left none")
    means = to_host(quality.mean).astype(np.float64)
    offsets = means - counts @ means / tokens
    within = sums["spread"].sum()
    total = within + counts @ np.square(offsets).sum(axis=-1)
    fvu = float(sums["error"] / total) if total > 0 else float("nan")
    metrics = {
        "fvu": fvu,
        "explained_variance": 1 - fvu,
        "l0": float(sums["active"] / tokens),
        "cosine": float(sums["cosine"] / tokens),
        "dead_fraction": float(np.mean(total_value(quality.counts) == 0)),
        "tokens": tokens,
        "sink_fraction": float(sums["sinks"] / (tokens + sums["sinks"])),
    }
    if len(counts) > 1:
        metrics["fvu_within_groups"] = float(sums["error"] / within) if within > 0 else float("nan")
    return metrics


def density(quality: Quality) -> dict[str, Any]:
    """How often latents fire, log10 of the share of tokens, as a histogram of four bins to the decade.

    `edges` of the bins (they reach from the bin of one firing on all tokens seen to 0, which is every token), `latents`
    in each, those that never fired in `never`; `median` over the latents that fired at all (None if none did).

    Raises:
      ValueError: no token counted.
    """
    tokens, counts = total_value(quality.tokens).sum(), total_value(quality.counts)
    if tokens == 0:
        raise ValueError("no token counted: the mask, the groups or the sink threshold left none")
    rates = np.log10(counts[counts > 0] / tokens)
    lowest = np.floor(np.log10(1 / tokens) * _BINS_PER_DECADE) / _BINS_PER_DECADE
    edges = np.linspace(min(lowest, -1.0), 0, max(round(-lowest * _BINS_PER_DECADE), _BINS_PER_DECADE) + 1)
    return {
        "edges": edges.tolist(),
        "latents": np.histogram(rates, edges)[0].tolist(),
        "never": int((counts == 0).sum()),
        "median": float(np.median(rates)) if rates.size else None,
    }


def _batch_quality(measured: Measured, d_sae: int, x, sink, group, num_groups: int) -> Quality:
    """The quality of one batch: x [n, d], zero where dropped; sink [n] bool; group [n]."""
    (code, x_hat, keep), x = measured, x.astype(jnp.float32)
    used = (code.values > 0) & keep[:, None]
    members = jax.nn.one_hot(group, num_groups) * keep[:, None]
    counts = members.sum(axis=0)
    mean = jnp.einsum("ng,nd->gd", members, x, precision="highest") / jnp.maximum(counts, 1)[:, None]
    centred = jnp.sum(jnp.square(x - mean[group]), axis=-1)
    # Rounded products of tiny norms stay away from 0 / 0; a zero vector has cosine 0 with everything.
    norms = jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(x_hat, axis=-1)
    cosine = jnp.sum(x * x_hat, axis=-1) / jnp.maximum(norms, jnp.finfo(jnp.float32).tiny)
    kept_sum = lambda a: as_total(jnp.sum(jnp.where(keep, a, 0)))  # noqa: E731
    fired = jnp.zeros(d_sae, jnp.int32).at[jnp.where(used, code.indices, d_sae)].add(1, mode="drop")
    return Quality(
        tokens=as_total(counts),
        mean=mean,
        spread=as_total(jnp.einsum("ng,n->g", members, centred, precision="highest")),
        error=kept_sum(jnp.sum(jnp.square(x - x_hat), axis=-1)),
        cosine=kept_sum(cosine),
        active=as_total(jnp.sum(used, dtype=jnp.float32)),
        sinks=as_total(jnp.sum(sink, dtype=jnp.float32)),
        counts=as_total(fired.astype(jnp.float32)),
    )
