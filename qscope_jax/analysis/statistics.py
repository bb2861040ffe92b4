"""Statistics of an SAE's features over a corpus, folded batch by batch on the device.

density f = tokens on which f fires / tokens that count; a token of enormous norm (a sink) never counts.
Values fall into bins by the first bits of their float32 form: eight to an octave, from 2^-10 to 2^14, so a quantile is
the middle of its bin and at most 1/16 off, relatively (outside of that range: at the range's end). Norms have 128 bins
to an octave, at most 1/256 off. Per feature a tally takes 195 x 4 bytes on the device, twice that on the host.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.mesh import to_host
from qscope_jax.totals import Total, add_totals, as_total, total_value

PER_OCTAVE, LOWEST, OCTAVES = 8, -10, 24
BINS = PER_OCTAVE * OCTAVES
QUANTILE_ERROR = 1 / (2 * PER_OCTAVE)
LEVELS = (0.5, 0.9, 0.99)
_NORM_BITS = 7  # bits of the mantissa that name a norm's bin
_NORM_BINS = 1 << (8 + _NORM_BITS)
_SHIFT = 20  # a float32 has 23 bits of mantissa, of which a bin's name keeps three
_FIRST = (127 + LOWEST) * PER_OCTAVE


class Tally(NamedTuple):
    """What was counted so far; int32 and float32 on the device, for at most 2^31 tokens between two visits to the host.

    `sinks` are real tokens left out; `sums` of values per feature; `histogram` [f, BINS] of positive values, whose rows
    add up to the tokens on which a feature fired; `norms` a histogram over the residual norms of tokens that count.
    """

    tokens: Int[Array, ""]
    sinks: Int[Array, ""]
    sums: Total
    max: Float[Array, "f"]
    histogram: Int[Array, "f bins"]
    norms: Int[Array, "norm_bins"]


class HostTally(NamedTuple):
    """A `Tally` on the host, in int64 and float64, so that counts never overflow."""

    tokens: np.ndarray
    sinks: np.ndarray
    sums: np.ndarray
    max: np.ndarray
    histogram: np.ndarray
    norms: np.ndarray


class LayerStatistics(NamedTuple):
    """Statistics of one layer's features; values in the SAE's own activation units, norms in those of the residual.

    Attributes:
      tokens: that count.
      sinks: real tokens left out because their norm was above `sink_threshold`.
      sink_threshold: as measured or as the SAE brings it along.
      median_norm: of the residual stream at the tokens that count (see the module for its error).
      density: [f] share of the tokens on which each feature fires.
      mean: [f] mean value where active; 0 for a feature that never fired.
      max: [f] largest value; 0 for a feature that never fired.
      levels: for which `quantiles` are stated.
      quantiles: [levels, f] of the values where active; 0 for a feature that never fired.
      histogram: [f, bins] of the values, from bin `first_bin` on, or None where it was not kept.
      first_bin: see there.
      sae: SHA-256 of the file of the SAE they belong to, or "".
    """

    tokens: int
    sinks: int
    sink_threshold: float
    median_norm: float
    density: np.ndarray
    mean: np.ndarray
    max: np.ndarray
    levels: tuple[float, ...]
    quantiles: np.ndarray
    histogram: np.ndarray | None = None
    first_bin: int = 0
    sae: str = ""

    def quantile(self, q: float) -> np.ndarray:
        """[f]: the q-quantile of every feature's values where it is active, 0 if it never was; off by 1/16 at most.

        It is the smallest value that at least a share q of the values do not exceed.

        Raises:
          ValueError: q is not within 0..1, or no histogram was kept and q is none of the `levels`.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"quantile({q}): expected a number from 0 to 1")
        if self.histogram is None:
            if q not in self.levels:
                raise ValueError(f"quantile({q}): these statistics keep no histograms, only the levels {self.levels}")
            return self.quantiles[self.levels.index(q)]
        return _quantile(self.histogram, self.first_bin, self.max, q)


def init_tally(d_sae: int) -> Tally:
    """Nothing counted yet, for a dictionary of this width."""
    zero = lambda *shape: jnp.zeros(shape, jnp.int32)  # noqa: E731
    return Tally(zero(), zero(), as_total(jnp.zeros(d_sae)), jnp.zeros(d_sae), zero(d_sae, BINS), zero(_NORM_BINS))


def update_tally(
    tally: Tally,
    values: Float[Array, "*n k"],
    indices: Int[Array, "*n k"],
    counted: Bool[Array, "*n"],
    norms: Float[Array, "*n"] | None = None,
    *,
    sink_threshold: float | Float[Array, ""] = jnp.inf,
) -> Tally:
    """Folds a batch of codes in; pure, to be jitted with the tally donated.

    Args:
      tally: from `init_tally` or an earlier update.
      values: of the code; a slot whose value is 0 is unused whatever its index.
      indices: of the code, no feature twice in a token.
      counted: True where a token is real.
      norms: residual norms; without them no token is a sink, and none is counted.
      sink_threshold: real tokens of a larger norm do not count.
    """
    k, d_sae = values.shape[-1], len(tally.max)
    values, indices, real = values.reshape(-1, k), indices.reshape(-1, k), counted.reshape(-1)
    norms = jnp.zeros(len(real)) if norms is None else norms.reshape(-1).astype(jnp.float32)
    keep = real & (norms <= sink_threshold)
    used = (values > 0) & keep[:, None]
    value, feature = jnp.where(used, values, 0).reshape(-1), jnp.where(used, indices, d_sae).reshape(-1)
    place = jnp.where(used.reshape(-1), feature * BINS + _bin(value), d_sae * BINS)  # beyond the end: dropped
    norm_bin = jnp.where(keep, jax.lax.bitcast_convert_type(norms, jnp.int32) >> (23 - _NORM_BITS), _NORM_BINS)
    sums = jnp.zeros(d_sae).at[feature].add(value, mode="drop")
    return Tally(
        tally.tokens + jnp.sum(keep, dtype=jnp.int32),
        tally.sinks + jnp.sum(real & ~keep, dtype=jnp.int32),
        add_totals(tally.sums, as_total(sums)),
        tally.max.at[feature].max(value, mode="drop"),
        tally.histogram.reshape(-1).at[place].add(1, mode="drop").reshape(d_sae, BINS),
        tally.norms.at[norm_bin].add(1, mode="drop"),
    )


def host_tally(tally: Tally) -> HostTally:
    """The tally on the host, wide enough to be merged with any number of others."""
    wide = lambda name: to_host(getattr(tally, name)).astype(np.int64)  # noqa: E731
    numbers = {name: wide(name) for name in ("tokens", "sinks", "histogram", "norms")}
    return HostTally(sums=total_value(tally.sums), max=to_host(tally.max).copy(), **numbers)


def merge_tallies(one: HostTally, other: HostTally) -> HostTally:
    """What both have counted, for example two halves of a corpus; the order does not matter."""
    added = {name: getattr(one, name) + getattr(other, name) for name in HostTally._fields if name != "max"}
    return HostTally(max=np.maximum(one.max, other.max), **added)


def summarize_tally(tally: HostTally, *, sink_threshold: float, sae: str = "") -> LayerStatistics:
    """The statistics of everything counted.

    Raises:
      ValueError: no token counted.
    """
    tokens = int(tally.tokens)
    if not tokens:
        raise ValueError(f"no token counted: there was no text, or all {int(tally.sinks)} tokens were sinks")
    counts = tally.histogram.sum(axis=1)
    used = np.flatnonzero(tally.histogram.any(axis=0))
    first, last = (int(used[0]), int(used[-1]) + 1) if len(used) else (0, 1)
    histogram = tally.histogram[:, first:last]
    return LayerStatistics(
        tokens=tokens,
        sinks=int(tally.sinks),
        sink_threshold=sink_threshold,
        median_norm=_median_norm(tally.norms),
        density=(counts / tokens).astype(np.float32),
        mean=(tally.sums / np.maximum(counts, 1)).astype(np.float32),
        max=tally.max,
        levels=LEVELS,
        quantiles=np.stack([_quantile(histogram, first, tally.max, q) for q in LEVELS]),
        histogram=histogram,
        first_bin=first,
        sae=sae,
    )


def bin_edges() -> np.ndarray:
    """[BINS + 1]: values v with edges[i] <= v < edges[i + 1] fall into bin i; those beyond into the first and last."""
    octave, step = np.divmod(np.arange(BINS + 1), PER_OCTAVE)
    return 2.0 ** (LOWEST + octave) * (1 + step / PER_OCTAVE)


def _bin(value: Float[Array, "n"]) -> Int[Array, "n"]:
    bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.int32)
    return jnp.clip((bits >> _SHIFT) - _FIRST, 0, BINS - 1)


def _quantile(histogram: np.ndarray, first: int, largest: np.ndarray, q: float) -> np.ndarray:
    edges = bin_edges()
    middles = (edges[1:] + edges[:-1])[first : first + histogram.shape[1]] / 2
    total = histogram.sum(axis=1)
    wanted = np.maximum(np.ceil(q * total * (1 - 1e-12)), 1)  # 0.7 * 10 is a little above 7
    place = (np.cumsum(histogram, axis=1) < wanted[:, None]).sum(axis=1).clip(0, len(middles) - 1)
    return np.where(total > 0, np.minimum(middles[place], largest), 0).astype(np.float32)


def _median_norm(norms: np.ndarray) -> float:
    """The middle of the bin of the median; nan where no norms were given, whose bin is that of zero."""
    if not norms[1:].any():
        return float("nan")
    place = int(np.searchsorted(np.cumsum(norms), (norms.sum() + 1) // 2))
    low, high = (np.array(i << (23 - _NORM_BITS), np.int32).view(np.float32) for i in (place, place + 1))
    return float(low + high) / 2
