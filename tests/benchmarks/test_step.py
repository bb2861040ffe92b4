"""The training step and its dense double train alike; what it is measured against; nothing here is about time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from qscope_kernels.cases import Case

from qscope_jax.benchmarks import step
from qscope_jax.benchmarks.rows import Setting
from qscope_jax.training.state import Norms, TrainState, init_group
from qscope_jax.training.step import make_train_step

CASE = Case(d=32, f=256, k=8)
SETTING = Setting((CASE,), tokens=64, dtype=jnp.dtype("float32"), rounds=3)


@pytest.fixture
def ceilings(monkeypatch):
    monkeypatch.setattr(step, "matmul_rate", lambda *_: 790e12)
    monkeypatch.setattr(step, "copy_bandwidth", lambda *_: 4.3e12)


def test_the_dense_step_is_the_same_step():
    """Weights, moments and counters after five steps on rows with padding and a sink."""
    group, rng = step.group_of(CASE, SETTING), np.random.default_rng(0)
    batches = rng.normal(size=(5, 1, SETTING.tokens, CASE.d)).astype(np.float32)
    batches[:, 0, 3] *= 100
    mask = rng.random(SETTING.tokens) < 0.9
    ended = []
    for make in (make_train_step((group,), group.layers), step.make_dense_step(group)):
        norms = Norms(*(jnp.array(a, jnp.float32) for a in (np.full((1, CASE.d), 0.3), [1.5], [60.0])))
        saes = init_group(group, norms, 0, mesh=None, model_axis="latents")
        state = TrainState(jnp.zeros((), jnp.int32), (saes,))
        for x in batches:
            state, _ = make(state, x, mask)
        ended.append(state)
    assert np.asarray(ended[0].groups[0].idle).max() > 0
    assert not np.allclose(ended[0].groups[0].adam.mu.w_enc, 0)
    for ours, dense in zip(*map(jax.tree.leaves, ended), strict=True):
        np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-6)


def test_every_row_is_measured(ceilings):
    over_product, dense = step.bench_step(SETTING)
    assert over_product["what"] == "training step / encoder's matmul"
    assert dense["what"] == "training step, dense / sparse"
    for row in (over_product, dense):
        assert "failed" not in row
        assert row["ratio"] > 0
        assert row["rate"] == pytest.approx(SETTING.tokens / row["b_seconds"])


@pytest.mark.parametrize(("tokens", "milliseconds"), [(8192, 1.392 + 1.561 + 1.061), (32768, 5.568 + 6.244 + 1.061)])
def test_the_roofline_is_the_product_four_passes_over_rows_and_the_optimisers_traffic(ceilings, tokens, milliseconds):
    setting = SETTING._replace(tokens=tokens, dtype=jnp.dtype("bfloat16"))
    assert 1e3 * step.roofline_seconds(Case(2048, 32768, 50), setting) == pytest.approx(milliseconds, rel=1e-3)
