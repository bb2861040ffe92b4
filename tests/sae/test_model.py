"""An SAE computes the release's formula: relu(topk(W_enc x + b_enc)), then W_dec a + b_dec."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.model import (
    Sae,
    SaeConfig,
    SaeParams,
    SparseCode,
    decode,
    encode,
    from_dense,
    init_sae,
    to_dense,
)

D, F, K = 24, 160, 10
CONFIG = SaeConfig(d_model=D, d_sae=F, k=K)


@pytest.fixture(scope="module")
def release():
    """Weights in the release's layout: W_enc [f, d], W_dec [d, f]; nothing is tied, no bias is zero."""
    rng = np.random.default_rng(0)
    draw = lambda scale, *shape: (scale * rng.normal(size=shape)).astype(np.float32)  # noqa: E731
    return {"W_enc": draw(0.2, F, D), "b_enc": draw(0.1, F), "W_dec": draw(0.2, D, F), "b_dec": draw(0.5, D)}


@pytest.fixture(scope="module")
def sae(release):
    params = SaeParams(release["W_enc"].T, release["b_enc"], release["W_dec"].T, release["b_dec"])
    return Sae(SaeParams(*map(jnp.asarray, params)), CONFIG)


@pytest.fixture(scope="module")
def x():
    """Residual vectors of very different norms, as with sinks, and one of zeros."""
    rng = np.random.default_rng(1)
    scale = np.array([1, 1, 0.01, 300, 1, 0, 5, 1])
    return (scale[:, None] * rng.normal(size=(8, D)) + 0.2 * (scale > 0)[:, None]).astype(np.float32)


def check_equal_to_the_release(sae, x, pre, expected_z, expected_x_hat):
    """Index sets equal wherever the k-th and the next pre-activation differ by more than rounding."""
    code = jax.jit(encode)(sae, x)
    x_hat = jax.jit(decode)(sae, code)
    z = np.asarray(to_dense(code, F))
    ordered = np.sort(pre, axis=1)[:, ::-1]
    rounding = 1e-6 * np.abs(x).max(axis=1) * D
    clear = ordered[:, K - 1] - ordered[:, K] > rounding
    assert clear.sum() >= 7
    np.testing.assert_array_equal(z[clear] > 0, expected_z[clear] > 0)
    assert (np.abs(z - expected_z)[clear] <= rounding[clear, None] + 1e-7).all()
    error = np.linalg.norm(x_hat - expected_x_hat, axis=1) / np.linalg.norm(expected_x_hat, axis=1)
    assert error[clear].max() < 1e-6


@pytest.mark.parity
def test_it_equals_a_torch_implementation_of_the_release(sae, release, x):
    torch = pytest.importorskip("torch")
    w = {name: torch.from_numpy(array) for name, array in release.items()}
    pre = torch.from_numpy(x) @ w["W_enc"].T + w["b_enc"]
    values, indices = pre.topk(K, dim=-1)
    z = torch.zeros_like(pre).scatter_(-1, indices, torch.relu(values))
    x_hat = z @ w["W_dec"].T + w["b_dec"]
    check_equal_to_the_release(sae, x, pre.numpy(), z.numpy(), x_hat.numpy())


def test_it_equals_the_formula_in_float64(sae, release, x):
    w = {name: array.astype(np.float64) for name, array in release.items()}
    pre = x @ w["W_enc"].T + w["b_enc"]
    z = np.where(pre >= np.sort(pre, axis=1)[:, -K, None], np.maximum(pre, 0), 0)
    check_equal_to_the_release(sae, x, pre, z, z @ w["W_dec"].T + w["b_dec"])


def test_encoding_subtracts_no_decoder_bias_and_normalises_nothing(sae, x):
    moved = Sae(sae.params._replace(b_dec=sae.params.b_dec + 100, w_dec=7 * sae.params.w_dec), CONFIG)
    for one, other in zip(encode(sae, x), encode(moved, x), strict=True):
        np.testing.assert_array_equal(one, other)
    unbiased = Sae(sae.params._replace(b_enc=jnp.zeros(F)), CONFIG)
    np.testing.assert_allclose(encode(unbiased, 8 * x).values, 8 * encode(unbiased, x).values, rtol=1e-6)


def test_codes_are_sorted_by_value_and_typed(sae, x):
    code = encode(sae, x.reshape(2, 4, D))
    assert code.values.shape == code.indices.shape == (2, 4, K)
    assert (code.values.dtype, code.indices.dtype) == (jnp.float32, jnp.int32)
    assert (np.diff(code.values, axis=-1) <= 0).all()
    assert (np.asarray(code.values) >= 0).all()


def test_ties_go_to_the_lowest_index():
    params = SaeParams(jnp.zeros((D, F)), jnp.tile(jnp.array([1.0, 2.0]), F // 2), jnp.zeros((F, D)), jnp.zeros(D))
    code = encode(Sae(params, CONFIG), jnp.ones((1, D)))
    np.testing.assert_array_equal(code.indices, [np.arange(1, 2 * K, 2)])


def test_fewer_than_k_positive_leave_unused_slots(sae):
    few = Sae(sae.params._replace(b_enc=jnp.full(F, -1.0).at[jnp.array([3, 90])].set(2.0)), CONFIG)
    code = encode(few, jnp.zeros((1, D)))
    np.testing.assert_array_equal(code.values, [[2, 2] + [0] * (K - 2)])
    dense = np.zeros((1, F), np.float32)
    dense[0, [3, 90]] = 2
    np.testing.assert_array_equal(to_dense(code, F), dense)
    np.testing.assert_allclose(decode(few, code), dense @ sae.params.w_dec + sae.params.b_dec, rtol=1e-6)


def test_an_empty_code_decodes_to_the_bias(sae):
    silent = Sae(sae.params._replace(b_enc=jnp.full(F, -1.0)), CONFIG)
    code = encode(silent, jnp.zeros((2, D)))
    assert not np.any(code.values)
    np.testing.assert_array_equal(decode(silent, code), np.tile(sae.params.b_dec, (2, 1)))


@pytest.mark.parametrize("k", [1, F])
def test_the_extremes_of_k(sae, x, k):
    code = encode(Sae(sae.params, SaeConfig(D, F, k)), x)
    pre = np.asarray(x @ sae.params.w_enc + sae.params.b_enc)
    if k == 1:
        np.testing.assert_array_equal(code.indices[:, 0], pre.argmax(axis=1))
    np.testing.assert_array_equal((np.asarray(code.values) > 0).sum(axis=1), np.minimum((pre > 0).sum(axis=1), k))


def test_dense_and_sparse_forms_are_inverse(sae, x):
    code = encode(sae, x.reshape(2, 4, D))
    again = from_dense(to_dense(code, F), K)
    np.testing.assert_array_equal(again.values, code.values)
    used = np.asarray(code.values) > 0
    np.testing.assert_array_equal(again.indices[used], code.indices[used])


def test_unused_slots_are_nothing_in_the_dense_form_whatever_their_index():
    values, indices = jnp.array([[2.0, 0.0, 0.0, 1.0]]), jnp.array([[1, 1, 99, 0]])
    np.testing.assert_array_equal(to_dense(SparseCode(values, indices), 3), [[1, 2, 0]])


def test_negative_activations_are_no_features():
    code = from_dense(jnp.array([[-3.0, 0.5, -1.0]]), 2)
    np.testing.assert_array_equal(code.values, [[0.5, 0]])
    assert np.isnan(from_dense(jnp.array([[-np.nan, 0.5, 1.0]]), 1).values).all()


def test_bfloat16_weights_choose_nearly_the_same_features(sae):
    """N3: the k-th place is close to the next; float32 accumulation keeps the damage to what rounding weights does."""
    x = np.random.default_rng(2).normal(size=(200, D)).astype(np.float32)
    narrow = Sae(jax.tree.map(lambda a: a.astype(jnp.bfloat16), sae.params), CONFIG)
    rounded = Sae(jax.tree.map(lambda a: a.astype(jnp.float32), narrow.params), CONFIG)
    sets = [np.asarray(to_dense(encode(s, x), F)) > 0 for s in (sae, narrow, rounded)]
    # Inputs are float32: nothing but the weights is rounded.
    np.testing.assert_array_equal(sets[1], sets[2])
    agreement = (sets[0] & sets[1]).sum() / sets[0].sum()
    assert 0.97 < agreement < 1
    code = encode(narrow, jnp.asarray(x, jnp.bfloat16))
    assert code.values.dtype == jnp.float32
    both = np.asarray(to_dense(code, F)) > 0
    assert (sets[0] & both).sum() / sets[0].sum() > 0.95


def test_initial_directions_have_norm_one_and_tie_the_encoder():
    sae = init_sae(jax.random.key(0), CONFIG)
    np.testing.assert_allclose(jnp.linalg.norm(sae.params.w_dec, axis=1), 1, rtol=1e-6)
    np.testing.assert_array_equal(sae.params.w_enc, sae.params.w_dec.T)
    narrow = init_sae(jax.random.key(0), CONFIG, dtype=jnp.bfloat16)
    assert {leaf.dtype.name for leaf in narrow.params} == {"bfloat16"}


def test_another_sae_of_the_same_shape_never_recompiles(x):
    traces = []

    @jax.jit
    def counted(sae, x):
        traces.append(1)
        return decode(sae, encode(sae, x))

    for seed in range(3):
        counted(init_sae(jax.random.key(seed), CONFIG), x)
    assert len(traces) == 1


def test_what_does_not_fit_is_named(sae):
    with pytest.raises(ValueError, match=r"x has shape \(3, 25\); its last axis must be d_model = 24"):
        encode(sae, jnp.zeros((3, 25)))
    with pytest.raises(ValueError, match=r"x has shape \(\); its last axis"):
        encode(sae, jnp.zeros(()))
    for k in (0, F + 1):
        with pytest.raises(ValueError, match=f"k = {k} does not lie in 1..d_sae = {F}"):
            SaeConfig(D, F, k)
        with pytest.raises(ValueError, match=f"k = {k} does not lie in 1..{F}"):
            from_dense(jnp.zeros((1, F)), k)
