"""How the TPU encode splits its work, and how likely a row is to need the dense fallback. Plain numbers, no arrays.

A bin is the set of columns that are equal modulo the number of bins; it keeps its `keep` largest pre-activations. A row
fails where one bin's last kept value exceeds the row's k-th value: then `keep` of its k - 1 larger values share a bin.
"""

import math
from typing import Any, NamedTuple

LANES = 128
_ROWS = 32  # rows of a part come in such steps: sublanes of the narrowest type, and two parts
# Failing rows that a call of 8192 tokens may expect: each costs a share of a dense pass.
_EXPECTED_FAILURES, _TOKENS = 0.05, 8192
_MOST_CANDIDATES = 8192


class Chip(NamedTuple):
    """A kind of TPU: tokens per tile, the parts its matmul comes in, the bytes of VMEM a call may use."""

    rows: int
    parts: int
    vmem: int


_MIB = 1 << 20
_CHIPS = {
    "TPU v5 lite": Chip(512, 1, 100 * _MIB),
    "TPU v5": Chip(512, 1, 100 * _MIB),
    "TPU v6 lite": Chip(1024, 2, 100 * _MIB),
    "TPU7x": Chip(1024, 2, 56 * _MIB),
}


KINDS = tuple(_CHIPS)
SMALLEST = Chip(512, 1, 56 * _MIB)  # for simulations, and kinds that are not known


class Plan(NamedTuple):
    """Bins and values kept per bin; rows of a tile, in `parts`; columns of a tile."""

    bins: int
    keep: int
    rows: int
    parts: int
    columns: int


def failure_probability(latents: int, k: int, bins: int, keep: int) -> float:
    """An upper bound on the probability that a row fails, its k largest latents lying anywhere with equal chance.

    P(fail) <= bins * P(X >= keep),    X = how many of k - 1 drawn from `latents` without replacement fall among the
    ceil(latents / bins) of one bin (hypergeometric). The sum over bins is Boole's inequality, within a few per cent
    where P is small. 0 where a bin never drops anything.
    """
    size, drawn = -(-latents // bins), k - 1
    if size <= keep:
        return 0.0
    total = _log_choose(latents, drawn)
    terms = (
        math.exp(_log_choose(size, j) + _log_choose(latents - size, drawn - j) - total)
        for j in range(keep, min(size, drawn) + 1)
        if drawn - j <= latents - size
    )
    return min(1.0, bins * math.fsum(terms))


def _log_choose(n: int, r: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(r + 1) - math.lgamma(n - r + 1)


def choose_bins(latents: int, k: int) -> tuple[int, int] | None:
    """The fewest candidates (bins, keep), `keep` a power of two, that hold k and rarely fail; None where none does."""
    fits = [
        (bins * keep, keep, bins)
        for bins in (LANES << i for i in range(5))
        for keep in (2, 4, 8, 16)
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
    parts = chip.parts if n > chip.rows // 2 else 1
    rows = min(chip.rows, -(-n // _ROWS) * _ROWS)
    columns = min(1024 if d <= 2048 else 512, -(-f // bins) * bins)
    columns = max(bins, columns // bins * bins)
    while rows >= _ROWS * parts:
        plan = Plan(bins, keep, rows, parts, columns)
        if vmem_bytes(plan, d, x.dtype.itemsize, w_enc.dtype.itemsize) <= chip.vmem:
            return plan
        if columns > bins and columns > LANES * 4:
            columns = max(bins, columns // 2 // bins * bins)
        else:
            rows = rows // 2 // _ROWS * _ROWS
    return None


def vmem_bytes(plan: Plan, d: int, x_bytes: int, w_bytes: int) -> int:
    """Of the blocks, two of each, the products, and as much again as the products for what the compiler spills."""
    blocks = plan.rows * d * x_bytes + d * plan.columns * w_bytes + 4 * plan.columns
    lists = 4 * plan.rows * plan.bins * (2 * plan.keep + 1)
    return 2 * (blocks + lists + 4 * plan.rows * plan.columns)


def chip(kind: str) -> Chip | None:
    """What is known of a kind of device; None where nothing is."""
    return _CHIPS.get(kind)
