"""The cost of steering is timed on programs that do not change while they are timed."""

import pytest

from qscope_jax.benchmarks.steer import compare_steering
from tests.backbone.families import make_config


@pytest.mark.slow
def test_both_modes_are_paired_and_the_bound_stands_beside():
    config = make_config("qwen3", num_hidden_layers=2)
    found = compare_steering(config, latents=32, active=4, rounds=5)
    assert {"ratio", "spread", "rounds"} <= set(found["add"])
    assert 1 < found["clamp"]["bound_by_bytes"] < 2
    assert found["clamp"]["rounds"] == 5
