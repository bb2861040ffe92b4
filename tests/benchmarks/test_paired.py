"""Paired ratios, on a clock that is played."""

import itertools
import json
import sys

import pytest

from qscope_jax.benchmarks import forward, paired
from qscope_jax.jobs import bench
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


def test_a_short_call_is_repeated_until_a_sample_is_long_enough_and_pairs_end_with_the_budget(monkeypatch):
    now, calls = [0.0], {"a": 0, "b": 0}

    def call(name: str, taken: float) -> None:
        now[0] += taken
        calls[name] += 1

    monkeypatch.setattr(paired.time, "perf_counter", lambda: now[0])
    a, b = (lambda: call("a", 0.001)), (lambda: call("b", 0.03))
    result = paired.paired(a, b, rounds=20, sample=0.02, budget=0.5)
    assert result["ratio"] == pytest.approx(30)
    assert 20 <= result["a_calls"] <= 60
    assert result["b_calls"] == 1
    assert 5 <= result["rounds"] < 20
    assert calls["a"] > result["rounds"] * result["a_calls"]
    assert paired.paired(a, b, rounds=20, budget=0.0)["rounds"] == 5
    assert paired.seconds(a, sample=0.02) == pytest.approx(0.001)


def test_rows_are_written_one_by_one_beside_the_device_and_versions(tmp_path, monkeypatch, capsys):
    rows = [{"case": "c", "what": f"w{i}", "ratio": 2.0, "spread": 0.1, "rounds": 20.0} for i in range(2)]
    monkeypatch.setitem(bench._SPARSE, "decode", lambda setting: iter(rows))
    bench.run(bench.Config(what=("decode",), out=tmp_path))
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written["decode"] == rows
    assert written["device"]
    assert "jaxlib" in written["versions"]
    assert "| c | w1 | 2 | ±0.1 | 20 |" in (tmp_path / "bench.md").read_text()
    assert capsys.readouterr().out.count("| case |") == 1
