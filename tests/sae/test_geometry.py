"""Norms and largest cosines of decoder rows equal a dense float64 computation; large dictionaries are sampled."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.mesh import make_mesh
from qscope_jax.sae import geometry
from qscope_jax.sae.formats import load_sae, save_sae
from qscope_jax.sae.geometry import decoder_statistics
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams

F, D = 64, 16


def dictionary(w_dec):
    f, d = w_dec.shape
    w = jnp.asarray(w_dec, jnp.float32)
    return Sae(SaeParams(w.T, jnp.zeros(f), w, jnp.zeros(d)), SaeConfig(d, f, 4, layer=0))


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(F, D)) * rng.uniform(0.5, 2, (F, 1))


def brute_force(w):
    norms = np.linalg.norm(w, axis=1)
    with np.errstate(invalid="ignore"):
        cosines = w @ w.T / np.outer(norms, norms)
    np.fill_diagonal(cosines, -np.inf)
    return norms, np.nanmax(cosines, axis=1)


def check(found, values):
    expected = {"mean": values.mean(), "std": values.std(), "min": values.min(), "median": np.median(values)}
    assert found == pytest.approx({**expected, "p99": np.quantile(values, 0.99), "max": values.max()}, rel=1e-5)


def test_every_row_of_a_small_dictionary_is_compared(monkeypatch):
    monkeypatch.setattr(geometry, "_BLOCK", 24)  # 64 rows do not fill three blocks
    w = drawn()
    found = decoder_statistics(dictionary(w))
    norms, largest = brute_force(w.astype(np.float32).astype(np.float64))
    check(found["norm"], norms)
    check(found["max_cosine"], largest)
    assert (found["compared_rows"], found["d_sae"], found["seed"]) == (F, F, None)
    assert found["above_0.9"] == (largest > 0.9).mean()


def test_a_sample_of_rows_is_compared_with_all_and_says_its_seed():
    w = drawn()
    found, again = (decoder_statistics(dictionary(w), rows=10, seed=3) for _ in range(2))
    _, largest = brute_force(w)
    chosen = np.random.default_rng(3).choice(F, 10, replace=False)
    check(found["max_cosine"], largest[chosen])
    assert (found["compared_rows"], found["seed"]) == (10, 3)
    assert found == again


def test_rows_that_are_zero_have_no_direction_and_twins_are_found():
    w = drawn()
    w[5] = 0
    w[9] = 3 * w[2]
    found = decoder_statistics(dictionary(w))
    assert found["zero_rows"] == 1
    assert found["compared_rows"] == F - 1
    assert found["max_cosine"]["max"] == pytest.approx(1, abs=1e-6)
    assert found["above_0.9"] == 2 / (F - 1)
    empty = decoder_statistics(dictionary(np.zeros((4, 3))))
    assert (empty["max_cosine"], empty["above_0.9"], empty["zero_rows"]) == (None, None, 4)


def test_cosines_never_exist_for_all_pairs_at_once():
    w, rows = jnp.ones((F, D)), jnp.arange(F)
    text = jax.jit(geometry._largest_cosines, static_argnums=2).lower(w, rows, 8).as_text()
    assert f"tensor<8x{F}xf32>" in text
    assert f"tensor<{F}x{F}x" not in text


def test_a_dictionary_on_a_mesh_has_the_same_statistics_and_is_not_gathered(tmp_path, collectives):
    sae = dictionary(drawn())
    save_sae(sae, tmp_path)
    sharded = load_sae(tmp_path, mesh=make_mesh(2, 4))
    found, expected = decoder_statistics(sharded), decoder_statistics(sae)
    for name in ("norm", "max_cosine"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    program = geometry._largest_cosines.lower(sharded.params.w_dec, jnp.arange(F), 8).compile()
    moved = [size for _, sizes in collectives(program) for size in sizes]
    assert max(moved) <= 8 * F < F * D
