"""SAEs in the release's form, for raw residual vectors, do what they did in training on centred, scaled ones."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.formats import load_sae
from qscope_jax.sae.loss import Objective, Weights
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, decode, encode
from qscope_jax.training.export import export_group
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group, Norms, folded, init_group

LAYERS, D, F, K, N = (2, 6), 16, 64, 5, 40
GROUP = Group(LAYERS, Objective(F, K), Schedule(1e-3, 10))


@pytest.fixture(scope="module")
def saes():
    """Two SAEs in training form; no bias is zero, nothing is tied, means are far from zero and scales from one."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    norms = Norms(10 * rng.normal(size=(2, D)), np.array([0.03, 7.0]), np.array([12.5, 1234.0625]))
    fresh = init_group(GROUP, norms, 0, mesh=None, model_axis="latents")
    moved = Weights(*(leaf + 0.1 * draw(*leaf.shape) for leaf in fresh.weights))
    return fresh._replace(weights=moved)


def residuals(saes, i):
    rng = np.random.default_rng(i)
    mean, scale = np.asarray(saes.norms.mean[i], np.float64), float(saes.norms.scale[i])
    return mean + scale * rng.normal(size=(N, D))


def by_hand(weights, x):
    """Codes [n, f] and reconstruction of the training form in float64, from x as training sees it."""
    w_enc, b_enc, w_dec, b_dec = (np.asarray(leaf, np.float64) for leaf in weights)
    pre = x @ w_enc.T + b_enc
    codes = np.where(pre >= np.sort(pre, axis=1)[:, -K, None], np.maximum(pre, 0), 0)
    return codes, codes @ w_dec + b_dec


@pytest.mark.parametrize("i", [0, 1])
def test_the_released_form_encodes_and_decodes_raw_vectors_alike(saes, i):
    """Codes and reconstructions are scaled, to the rounding of float32 of numbers as large as the raw ones."""
    x, weights = residuals(saes, i), jax.tree.map(lambda leaf: leaf[i], saes.weights)
    mean, scale = np.asarray(saes.norms.mean[i], np.float64), float(saes.norms.scale[i])
    codes, x_hat = by_hand(weights, (x - mean) / scale)
    params = folded(weights, mean, scale)
    exact = x @ params.w_enc + params.b_enc
    ranks = np.argsort(np.argsort(-exact, axis=1), axis=1)
    np.testing.assert_allclose(np.where(ranks < K, np.maximum(exact, 0), 0), scale * codes, rtol=1e-9, atol=1e-9)

    sae = Sae(SaeParams(*(jnp.asarray(leaf, jnp.float32) for leaf in params)), SaeConfig(D, F, K))
    found = encode(sae, jnp.asarray(x, jnp.float32))
    atol = 1e-6 * np.linalg.norm(x, axis=1).max()
    expected = np.argsort(-codes, axis=1, kind="stable")[:, :K]
    used = np.asarray(found.values) > atol
    assert used.mean() > 0.9
    np.testing.assert_array_equal(np.where(used, found.indices, -1), np.where(used, expected, -1))
    np.testing.assert_allclose(found.values, scale * np.take_along_axis(codes, expected, axis=1), rtol=0, atol=atol)
    np.testing.assert_allclose(decode(sae, found), scale * x_hat + mean, rtol=0, atol=4 * atol)


@pytest.mark.parametrize(("format", "dtype"), [("safetensors", "float32"), ("qwen-scope", "bfloat16")])
def test_files_hold_the_folded_weights_and_what_is_known_of_them(saes, tmp_path, format, dtype):
    configs = export_group(GROUP, saes, tmp_path, backbone="owner/model", format=format, dtype=dtype)
    for i, layer in enumerate(LAYERS):
        loaded = load_sae(tmp_path, layer)
        weights = jax.tree.map(lambda leaf, i=i: leaf[i], saes.weights)
        expected = folded(weights, np.asarray(saes.norms.mean[i], np.float64), float(saes.norms.scale[i]))
        for name, value in expected._asdict().items():
            stored = jnp.asarray(value, dtype).astype(jnp.float32)
            np.testing.assert_array_equal(getattr(loaded.params, name), stored, err_msg=name)
        assert (loaded.config.d_model, loaded.config.d_sae, loaded.config.k, loaded.config.layer) == (D, F, K, layer)
        assert loaded.config.sink_threshold == pytest.approx(float(saes.norms.sink[i]), rel=1e-5)
        assert loaded.config.backbone == "owner/model"
        assert replace(loaded.config, source=None) == replace(configs[i], source=None)
