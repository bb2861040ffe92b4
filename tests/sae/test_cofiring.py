"""Pairs of latents counted batch by batch equal those of a dense 0/1 matrix of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.cofiring import init_cofiring, most_frequent, summarize_cofiring, update_cofiring
from qscope_jax.sae.model import SaeConfig, SparseCode, init_sae
from qscope_jax.sae.quality import Measured, init_quality, measure

CONFIG = SaeConfig(d_model=12, d_sae=40, k=4)
SAE = init_sae(jax.random.key(0), CONFIG)
see = jax.jit(measure)
update = jax.jit(update_cofiring, static_argnums=2)


def measured(values, indices, keep=None):
    keep = np.ones(len(values), bool) if keep is None else np.asarray(keep)
    code = SparseCode(jnp.asarray(values, jnp.float32), jnp.asarray(indices))
    return Measured(code, jnp.zeros((len(values), 1)), jnp.asarray(keep))


def test_counts_and_coefficients_equal_brute_force():
    x = np.random.default_rng(0).normal(size=(60, 12)).astype(np.float32)
    mask = np.random.default_rng(1).random(60) < 0.8
    quality, whole = see(init_quality(CONFIG), SAE, x, mask)
    latents = most_frequent(quality, 9)
    state = init_cofiring(latents)
    for part in np.split(np.arange(60), 3):
        state = update(state, see(init_quality(CONFIG), SAE, x[part], mask[part])[1], CONFIG.d_sae)
    fires = np.zeros((60, 40), bool)
    used = np.asarray(whole.code.values) > 0
    np.put_along_axis(fires, np.asarray(whole.code.indices), used, axis=1)
    fires = fires[mask]
    assert sorted(fires.sum(axis=0)[np.asarray(latents)])[::-1] == sorted(fires.sum(axis=0))[::-1][:9]
    chosen = fires[:, np.asarray(latents)].astype(float)
    np.testing.assert_array_equal(state.pairs.high, chosen.T @ chosen)
    found = summarize_cofiring(state, top=5)
    expected = {}
    for i in range(9):
        for j in range(i + 1, 9):
            both, either = (chosen[:, i] * chosen[:, j]).sum(), np.maximum(chosen[:, i], chosen[:, j]).sum()
            expected[int(latents[i]), int(latents[j])] = both / either
    assert found["mean_jaccard"] == pytest.approx(np.mean(list(expected.values())))
    assert [p["jaccard"] for p in found["pairs"]] == pytest.approx(sorted(expected.values())[::-1][:5])
    assert [p["jaccard"] for p in found["pairs"]] == pytest.approx(
        [expected[tuple(p["latents"])] for p in found["pairs"]]
    )


def test_twins_and_an_absorbed_latent_are_seen():
    # 3 and 5 fire always together; 7 never without 3; 9 alone.
    indices = np.array([[3, 5, 0], [3, 5, 7], [3, 5, 0], [9, 0, 0]])
    values = np.array([[2.0, 1, 0], [2, 1, 1], [2, 1, 0], [1, 0, 0]])
    state = update(init_cofiring(jnp.array([3, 5, 7, 9])), measured(values, indices), 12)
    first, second, *rest = summarize_cofiring(state)["pairs"]
    assert first == {"latents": [3, 5], "jaccard": 1.0, "given_first": 1.0, "given_second": 1.0, "tokens": 3}
    assert second == {"latents": [3, 7], "jaccard": 1 / 3, "given_first": 1 / 3, "given_second": 1.0, "tokens": 1}
    assert [pair["latents"] for pair in rest] == [[5, 7]]  # pairs that never fire together are no pairs


def test_unused_slots_and_tokens_that_do_not_count_fire_nothing():
    state = init_cofiring(jnp.array([0, 1]))
    state = update(state, measured([[1.0, 0], [1, 1]], [[0, 1], [0, 1]], [True, False]), 4)
    np.testing.assert_array_equal(state.pairs.high, [[1, 0], [0, 0]])
    assert summarize_cofiring(init_cofiring(jnp.array([0, 1]))) == {"latents": 2, "mean_jaccard": None, "pairs": []}


def test_there_are_never_more_latents_than_the_sae_has():
    assert len(most_frequent(init_quality(CONFIG), 1000)) == 40
