"""Ratios that survive a noisy machine: two things timed in turns (A B A B …), compared pair by pair.

The spread of A against A, from the same run, says how fine a difference the ratio can show.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax


def paired(a: Callable[[], Any], b: Callable[[], Any], *, rounds: int = 20) -> dict[str, float]:
    """Times `a` and `b` in turns after one warm-up each; both must return what has to be waited for.

    Returns:
      `ratio`: median over rounds of time(b) / time(a), above 1 where `a` is faster; `ratio_low`, `ratio_high`: its
      quartiles; `spread`: half the interquartile range of time(a) / time(a of the next round); `a_seconds`,
      `b_seconds`: medians, true on this machine at this hour only.
    """
    for call in (a, b):
        jax.block_until_ready(call())
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, taken in zip((a, b), times, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            taken.append(time.perf_counter() - start)
    of_a, of_b = times
    low, ratio, high = statistics.quantiles([y / x for x, y in zip(of_a, of_b, strict=True)], n=4)
    first, _, third = statistics.quantiles([x / y for x, y in itertools.pairwise(of_a)], n=4)
    return {
        "ratio": ratio,
        "ratio_low": low,
        "ratio_high": high,
        "spread": (third - first) / 2,
        "a_seconds": statistics.median(of_a),
        "b_seconds": statistics.median(of_b),
        "rounds": float(rounds),
    }
