"""Paired ratios, on a clock that is played."""

import itertools
import sys

import pytest

from qscope_jax.benchmarks import forward, paired
from qscope_jax.jobs.bench import table


def played(monkeypatch, *pairs: tuple[float, float]):
    """Makes the calls of each round take these times."""
    moments = itertools.chain.from_iterable((0.0, taken) for pair in pairs for taken in pair)
    monkeypatch.setattr(paired.time, "perf_counter", lambda: next(moments))
    return paired.paired(lambda: 0, lambda: 0, rounds=len(pairs))


def test_the_ratio_is_the_median_of_ratios_so_that_a_slow_spell_of_the_machine_changes_nothing(monkeypatch):
    result = played(monkeypatch, (1, 2), (10, 20), (1, 2), (1, 50), (2, 4))
    assert result["ratio"] == 2
    assert result["a_seconds"] == 1


def test_the_spread_of_a_against_itself_says_what_the_ratio_can_show(monkeypatch):
    assert played(monkeypatch, (1, 3), (1, 3), (1, 3), (1, 3))["spread"] == 0
    assert played(monkeypatch, (1, 3), (2, 6), (1, 3), (2, 6))["spread"] > 0.5


def test_the_comparison_with_transformers_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ValueError, match="--what prefill moe compile extract load"):
        forward.bench_forward(rounds=1)


def test_results_become_a_table_with_nested_results_under_their_heading():
    assert table("load", {"what": "x", "sae": {"ratio": 1.00436}}) == [
        "load:",
        "  what               x",
        "  sae:",
        "    ratio              1.004",
    ]
