"""How the TPU encode splits its work, and how likely a row is to need the dense fallback. Plain numbers, no arrays.

A bin is the set of columns that are equal modulo the number of bins; it keeps its `keep` largest pre-activations. A row
fails where one bin's last kept value exceeds the row's k-th value: then `keep` of its k - 1 larger values share a bin.
"""

import math
from functools import cache
from typing import Any, NamedTuple

from qscope_kernels.pallas_tpu import LANES

_FEW_ROWS = 128  # of a tile: fewer leave the matrix unit waiting for weights
_ROWS = 32  # rows of a tile come in such steps, which sublanes of every type divide
# Failing rows that a call of 8192 tokens may expect: each costs a share of a dense pass.
_EXPECTED_FAILURES, _TOKENS = 0.05, 8192
_NEVER = 1e-9  # what each list of the merge adds at most to the probability of a row to fail
_MOST_CANDIDATES, _MOST_KEPT = 8192, 16


class Chip(NamedTuple):
    """A kind of TPU: tokens of a tile; (width, number) of the parts of its columns, the first that fits being taken;
    multiply-adds of a tile, as its program is unrolled and compiling takes seconds per 2^30; bytes of VMEM."""

    rows: int
    parts: tuple[tuple[int, int], ...]
    most_work: int
    vmem: int


_MIB = 1 << 20
_PARTS = (512, 2), (512, 1), (256, 2)
_V5E, _V5P = Chip(512, _PARTS, 3 << 29, 112 * _MIB), Chip(512, _PARTS, 3 << 29, 56 * _MIB)
# Fewer than 560 rows wait for w_enc there, and two narrow parts beat a wide one.
_V6E = Chip(1024, ((512, 2), (256, 2)), 3 << 30, 112 * _MIB)
_CHIPS = {
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": Chip(512, ((512, 2), (256, 2)), 3 << 30, 56 * _MIB),
}
KINDS = tuple(_CHIPS)
SMALLEST = _V5P  # for simulations, and kinds that are not known


class Plan(NamedTuple):
    """Bins and values kept per bin; rows and columns of a tile; parts of its columns, multiplied one by one."""

    bins: int
    keep: int
    rows: int
    parts: int
    columns: int

    def lengths(self, latents: int, k: int) -> tuple[int, ...]:
        """How long lists are kept when 1, 2, 4, ... up to all bins are merged; the last is no shorter than k."""
        return _lengths(self.bins, self.keep, latents, k)

    def failure_probability(self, latents: int, k: int) -> float:
        """An upper bound for a row, all lists of the merge included: the sum of theirs."""
        lengths = self.lengths(latents, k)
        first = failure_probability(latents, k, self.bins, self.keep)
        # A list of all that two lists held drops nothing.
        return first + sum(
            failure_probability(latents, k, self.bins, length, 1 << i)
            for i, length in enumerate(lengths)
            if i and length < 2 * lengths[i - 1]
        )


@cache
def _lengths(bins: int, keep: int, latents: int, k: int) -> tuple[int, ...]:
    lengths, merged = [keep], 1
    while merged < bins:
        merged, whole = 2 * merged, 2 * lengths[-1]
        rare = (n for n in range(lengths[-1], whole) if failure_probability(latents, k, bins, n, merged) <= _NEVER)
        lengths.append(next(rare, whole))
    return tuple(lengths)


def columns_of(latents: int, bins: int, merged: int) -> int:
    """The columns that so many bins together have at most."""
    return min(latents, merged * -(-latents // bins))


def failure_probability(latents: int, k: int, bins: int, keep: int, merged: int = 1) -> float:
    """An upper bound on the probability that a row fails, its k largest latents lying anywhere with equal chance.

    P(fail) <= lists * P(X >= keep),    lists = bins / merged, X = how many of k - 1 drawn from `latents` without
    replacement fall among the `columns_of` one list (hypergeometric). The sum over lists is Boole's inequality, within
    a few per cent where P is small. 0 where a list never drops anything.
    """
    size, drawn = columns_of(latents, bins, merged), k - 1
    if size <= keep:
        return 0.0
    total = _log_choose(latents, drawn)
    terms = (
        math.exp(_log_choose(size, j) + _log_choose(latents - size, drawn - j) - total)
        for j in range(keep, min(size, drawn) + 1)
        if drawn - j <= latents - size
    )
    return min(1.0, bins // merged * math.fsum(terms))


def _log_choose(n: int, r: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)


@cache
def choose_bins(latents: int, k: int) -> tuple[int, int] | None:
    """The fewest candidates (bins, keep) that hold k and rarely fail; None where too many would be needed."""
    fits = [
        (bins * keep, keep, bins)
        for bins in (LANES << i for i in range(5))
        for keep in range(1, _MOST_KEPT + 1)
        if k <= bins * keep <= _MOST_CANDIDATES
        and _TOKENS * failure_probability(latents, k, bins, keep) <= _EXPECTED_FAILURES
    ]
    if not fits:
        return None
    _, keep, bins = min(fits)
    return bins, keep


def make_plan(chip: Chip, x: Any, w_enc: Any, k: int) -> Plan | None:
    """The plan for x [n, d] and w_enc [d, f], anything with a shape and a dtype; None where no tile fits in VMEM."""
    (n, d), f = x.shape, w_enc.shape[1]
    if (found := choose_bins(f, k)) is None:
        return None
    bins, keep = found
    fewest = -(-n // _ROWS) * _ROWS
    sizes = x.dtype.itemsize, w_enc.dtype.itemsize
    passes = 6 if 4 in sizes else 1  # float32 is made of bfloat16 products
    for rows in (chip.rows >> i for i in range(6)):
        for part, number in chip.parts:
            width = max(bins, min(part, -(-f // bins) * bins))
            parts = min(number, -(-f // width))
            plan = Plan(bins, keep, min(rows, fewest), parts, width * parts)
            short = passes * plan.rows * d * plan.columns <= chip.most_work or rows <= _FEW_ROWS
            if short and vmem_bytes(plan, d, *sizes) <= chip.vmem:
                return plan
    return None


def vmem_bytes(plan: Plan, d: int, x_bytes: int, w_bytes: int) -> int:
    """Of the blocks, two of each, the products, and as much again as the products for what the compiler spills.

    Besides, of a number of x a copy, or 8 bytes where float32 is multiplied; then 4 too of one of the columns at hand:
    the bfloat16 parts that the compiler makes, fitted to what libtpu 0.0.51 says it needs.
    """
    blocks = plan.rows * d * x_bytes + d * plan.columns * w_bytes + 4 * plan.columns
    lists = 8 * plan.rows * plan.bins * plan.keep
    split = 8 * plan.rows * d + 4 * d * plan.columns // plan.parts if 4 in (x_bytes, w_bytes) else 2 * plan.rows * d
    return 2 * (blocks + lists + 4 * plan.rows * plan.columns) + split


def chip(kind: str) -> Chip | None:
    """What is known of a kind of device; None where nothing is."""
    return _CHIPS.get(kind)
