"""Ratios that survive a noisy machine: two things timed in turns (A B A B …), compared pair by pair.

The spread of A against A, from the same run, says how fine a difference the ratio can show.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

FEWEST = 5  # pairs that a median with quartiles needs at least


def paired(
    a: Callable[[], Any], b: Callable[[], Any], *, rounds: int = 20, sample: float = 0.0, budget: float = math.inf
) -> dict[str, float]:
    """Times `a` and `b` in turns after one warm-up each; both must return what has to be waited for.

    Args:
      a: one side.
      b: the other.
      rounds: pairs.
      sample: seconds that a timed sample shall take at least: each side is called as often as that needs before
        anything is waited for, so that what a call costs to enqueue does not count where a device works behind.
      budget: seconds for all; where they do not suffice there are fewer pairs, but at least five.

    Returns:
      `ratio`: median over rounds of time(b) / time(a), above 1 where `a` is faster; `ratio_low`, `ratio_high`: its
      quartiles; `spread`: half the interquartile range of time(a) / time(a of the next round); `a_seconds`,
      `b_seconds`: medians per call, true on this machine at this hour only; `a_calls`, `b_calls`: calls per sample.
    """
    calls, expected = list[int](), 0.0
    for call in (a, b):
        jax.block_until_ready(call())
        count, taken = _calls(call, sample) if sample or budget < math.inf else (1, 0.0)
        calls.append(count)
        expected += taken
    if expected:
        rounds = int(min(rounds, max(FEWEST, budget / expected)))
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for call, count, taken in zip((a, b), calls, times, strict=True):
            taken.append(_seconds(call, count) / count)
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
        "a_calls": float(calls[0]),
        "b_calls": float(calls[1]),
    }


def seconds(call: Callable[[], Any], *, rounds: int = 20, sample: float = 0.0) -> float:
    """Median seconds of one call over `rounds` samples, after a warm-up; for ceilings, which nothing is compared to."""
    jax.block_until_ready(call())
    count, _ = _calls(call, sample)
    return statistics.median(_seconds(call, count) / count for _ in range(rounds))


def _seconds(call: Callable[[], Any], count: int) -> float:
    """The time of `count` calls: a device runs them in order, so the last result stands for all."""
    start = time.perf_counter()
    for _ in range(count - 1):
        call()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def _calls(call: Callable[[], Any], sample: float) -> tuple[int, float]:
    """How many calls take `sample` seconds, and what that many take."""
    count = 1
    while (taken := _seconds(call, count)) < sample:
        count = max(count + 1, math.ceil(1.2 * count * min(sample / taken, 20)))
    return count, taken
