"""A run and its bare arithmetic go through the same rows; hours are computed from what was measured, or not stated."""

import jax
import numpy as np
import pytest
from qscope_kernels.dispatch import Device

from qscope_jax.backbone.weights import load_backbone
from qscope_jax.benchmarks import train
from qscope_jax.data.batches import Filled
from qscope_jax.sae.loss import Objective
from qscope_jax.training.loop import Plan, Trainer
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group

GROUP = Group((0,), Objective(64, 4), Schedule(1e-3, 100))


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("demo", dtype="float32")


@pytest.mark.slow
def test_a_run_is_measured_against_its_own_arithmetic(backbone):
    plan = Plan((GROUP,), 0, rows=4, row_length=16, shards=2, buffer=1)
    found = train.compare(backbone, plan, steps=2, rounds=3, documents=30)
    assert found["ratio"] > 0
    assert found["tokens_per_second"] == pytest.approx(2 * 64 / found["b_seconds"])
    assert min(found["forward_tokens_per_second"], found["step_tokens_per_second"]) > 0


@pytest.mark.slow
def test_the_bare_arithmetic_ends_where_a_run_without_a_buffer_does(backbone):
    plan, rng = Plan((GROUP,), 0, rows=4, row_length=16, shards=2), np.random.default_rng(0)
    tokens, real = rng.integers(0, 1000, (3, 4, 16)).astype(np.int32), np.ones((4, 16), bool)
    batches = [Filled(rows, real, np.ones((4, 16), np.int32)) for rows in tokens]
    trainer = Trainer(backbone, plan)
    carried = trainer.init(trainer.measure(batches))
    bare = train.Bare(backbone, plan, batches, carried.train)
    assert bare() == 3
    for batch in batches:
        carried, _ = trainer.step(carried, batch)
    jax.tree.map(np.testing.assert_array_equal, bare._state, carried.train)


def test_hours_follow_from_measured_rates_and_a_cpu_states_none(monkeypatch):
    measured = {"forward_tokens_per_second": 1e5, "step_tokens_per_second": 5e4, "tokens_per_second": 3e4}
    assert "not stated" in train.hours(measured)
    assert "not stated" in train.hours(None)
    monkeypatch.setattr(train, "device_of", lambda: Device("gpu", "NVIDIA H200"))
    found = train.hours(measured)
    assert "one NVIDIA H200" in found["what"]
    assert found["from_parts"] == pytest.approx(5e8 * (1e-5 + 2e-5) / 3600)
    assert found["from_the_run"] == pytest.approx(5e8 / 3e4 / 3600)
