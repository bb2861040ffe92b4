"""Every implementation of topk_encode gives the k largest positive pre-activations, ties to the lowest index."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.topk_encode import _IMPLEMENTATIONS, topk_encode, xla
from qscope_kernels.topk_encode.select import group_width

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
encode = jax.jit(topk_encode, static_argnames=("k", "contract", "impl"))


def oracle(pre, k):
    """Sorts (-value, index) pairs in Python's order."""
    values, indices = [], []
    for row in np.asarray(pre, np.float64).tolist():
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
        indices.append(best)
        values.append([max(row[i], 0.0) for i in best])
    return np.array(values), np.array(indices)


def check(found, pre, k):
    """Values, and the indices of all slots in use."""
    values, indices = map(np.asarray, found)
    expected_values, expected_indices = oracle(pre, k)
    assert (values.dtype, indices.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(values, expected_values)
    used = expected_values > 0
    np.testing.assert_array_equal(indices[used], expected_indices[used])
    assert ((indices >= 0) & (indices < pre.shape[1])).all()


def small_integers(*shape, low=-8, high=9, seed=0):
    """Small integers: every product and sum is exact in float32 and bfloat16, and ties abound."""
    return np.random.default_rng(seed).integers(low, high, shape).astype(np.float32)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("k", [1, 5, 24], ids=["k=1", "k=5", "k=f"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_equals_a_sort_with_ties_to_the_lowest_index(impl, k, dtype):
    x, w, b = small_integers(7, 3), small_integers(3, 24, seed=1), small_integers(24, seed=2)
    found = encode(*(jnp.asarray(a, dtype) for a in (x, w, b)), k=k, impl=impl)
    check(found, x @ w + b, k)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pre_activations(impl, data):
    number = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, 3e38, np.inf, -np.inf]), st.floats(width=32))
    pre = data.draw(st.lists(number.filter(lambda v: not np.isnan(v)), min_size=12, max_size=12))
    pre = np.array([pre], np.float32)
    pre[np.abs(pre) < 2.0**-126] = 0  # compilers may flush subnormals
    # No input at all, so that the bias is the pre-activation.
    found = encode(jnp.zeros((1, 2)), jnp.zeros((2, 12)), pre[0], k=5, impl=impl)
    check(found, pre, 5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_where_fewer_than_k_are_positive_the_rest_is_zero(impl):
    b = np.array([-1, 0, 3, -2, 0, 1], np.float32)
    values, indices = encode(jnp.zeros((1, 2)), jnp.zeros((2, 6)), b, k=4, impl=impl)
    np.testing.assert_array_equal(values, [[3, 1, 0, 0]])
    np.testing.assert_array_equal(indices[0, :2], [2, 5])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_positive_gives_zeros(impl):
    for bias in (0.0, -1.0):
        values, _ = encode(jnp.zeros((3, 2)), jnp.ones((2, 6)), jnp.full(6, bias), k=4, impl=impl)
        assert not np.any(values)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("x", [np.nan, -np.nan, np.inf], ids=["nan", "-nan", "inf"])
def test_a_nan_is_never_hidden(impl, x):
    # inf * 0 makes the NaN of this machine, with whatever sign.
    w = np.array([[1, 0, 1, 1], [1, 1, 1, 1]], np.float32)
    values, _ = encode(np.array([[x, 1.0], [1.0, 1.0]], np.float32), w, np.zeros(4, np.float32), k=1, impl=impl)
    assert np.isnan(values[0, 0])
    assert values[1, 0] == 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pre_activations_are_accumulated_in_float32(impl):
    # 1 + 2^-10 + ... is lost where sums are rounded to bfloat16.
    x, w = jnp.full((1, 64), 2.0**-5, jnp.bfloat16), jnp.full((64, 2), 2.0**-5, jnp.bfloat16)
    w = w.at[0, 1].set(2.0**-4)
    values, indices = encode(x, w, jnp.ones(2, jnp.bfloat16), k=2, impl=impl)
    np.testing.assert_array_equal(indices, [[1, 0]])
    np.testing.assert_array_equal(values, [[1 + 65 / 1024, 1 + 64 / 1024]])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_weights_read_float32_inputs_unrounded(impl):
    x = np.array([[1 + 2.0**-12]], np.float32)
    values, _ = encode(x, jnp.ones((1, 1), jnp.bfloat16), jnp.zeros(1, jnp.bfloat16), k=1, impl=impl)
    assert values[0, 0] == x[0, 0]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(3,), (0, 3), (2, 0, 3), (2, 5, 3)], ids=str)
def test_leading_axes_are_kept(impl, shape):
    x, w, b = small_integers(*shape), small_integers(3, 24, seed=1), small_integers(24, seed=2)
    values, indices = encode(x, w, b, k=4, impl=impl)
    assert values.shape == indices.shape == (*shape[:-1], 4)
    if x.size:
        check((values.reshape(-1, 4), indices.reshape(-1, 4)), x.reshape(-1, 3) @ w + b, 4)


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_chunks_of_rows_equal_all_at_once(rows, monkeypatch):
    x, w, b = small_integers(7, 3), small_integers(3, 24, seed=1), small_integers(24, seed=2)
    seen, pre_activations = [], xla.pre_activations
    monkeypatch.setattr(xla, "pre_activations", lambda r, *a: seen.append(len(r)) or pre_activations(r, *a))
    monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", rows * 24 + 23)
    check(topk_encode(x, w, b, k=5, impl="xla"), x @ w + b, 5)
    assert max(seen) <= rows


@pytest.mark.parametrize("impl", [name for name in IMPLEMENTATIONS if name != "ref"])
def test_gradients_equal_those_of_the_definition(impl, monkeypatch):
    monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", 3 * 24)
    rng = np.random.default_rng(0)
    x, w, b = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((7, 3), (3, 24), (24,)))
    target = jnp.asarray(rng.normal(size=(7, 5)), jnp.float32)
    loss = lambda x, w, b, impl: jnp.sum(target * topk_encode(x, w, b, k=5, impl=impl)[0] ** 2)  # noqa: E731
    expected, found = (jax.grad(loss, argnums=(0, 1, 2))(x, w, b, name) for name in ("ref", impl))
    for one, other in zip(found, expected, strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_wide_rows_are_ranked_by_groups_and_ties_still_go_to_the_lowest_index(dtype):
    f, k = 1030, 8
    assert group_width(f, k) > 1
    x, w, b = small_integers(7, 3, low=-2, high=3), small_integers(3, f, seed=1), small_integers(f, seed=2)
    check(encode(*(jnp.asarray(a, dtype) for a in (x, w, b)), k=k, impl="xla"), x @ w + b, k)


@pytest.mark.parametrize(
    "dtypes", [("float32", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")], ids=str
)
def test_cotangents_have_the_types_of_what_they_belong_to(dtypes):
    x, w, b = jnp.ones((2, 3), dtypes[0]), jnp.ones((3, 24), dtypes[1]), jnp.zeros(24, "float16")
    found = jax.grad(lambda *a: jnp.sum(topk_encode(*a, k=2, impl="xla")[0]), argnums=(0, 1, 2))(x, w, b)
    assert [part.dtype.name for part in found] == [*dtypes, "float16"]
    np.testing.assert_array_equal(found[0], [[2] * 3] * 2)
    np.testing.assert_array_equal(found[2][:3], [2, 2, 0])


def gradient_text(argument):
    """The compiled gradient of a loss of values [6, 3] with respect to one of x [6, 5], w_enc [5, 77] and b_enc."""
    loss = lambda *arrays: jnp.sum(topk_encode(*arrays, k=3, impl="xla")[0] ** 2)  # noqa: E731
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((6, 5), (5, 77), (77,))]
    return jax.jit(jax.grad(loss, argnums=argument)).lower(*shapes).compile().as_text()


def test_what_no_gradient_asks_for_is_not_computed():
    weights = "f32[77,5]"  # the gradient of w_enc as it is added up, and w_enc as dx reads it
    adds = re.compile(r"= \(?(?:s32\[\]\S*, )?f32\[77(?:,5)?\]\S* .*scatter", re.MULTILINE)
    assert weights in gradient_text(1)
    assert weights not in gradient_text(2)
    assert adds.search(gradient_text(1))
    assert not adds.search(gradient_text(0))


def test_gradients_of_gradients():
    x, w, b = (
        jnp.asarray(a) for a in (small_integers(4, 3), small_integers(3, 24, seed=1), small_integers(24, seed=2))
    )

    def slope(impl):
        loss = lambda w: jnp.sum(topk_encode(x, w, b, k=5, impl=impl)[0] ** 3)  # noqa: E731
        return jax.grad(lambda w: jnp.sum(jax.grad(loss)(w) ** 2))(w)

    np.testing.assert_allclose(slope("xla"), slope("ref"), rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_pre_activation_of_zero_has_no_gradient(impl):
    # As torch's relu: training must not move latents that are not in use.
    grad = jax.grad(lambda b: topk_encode(jnp.zeros((1, 2)), jnp.zeros((2, 3)), b, k=3, impl=impl)[0].sum())
    np.testing.assert_array_equal(grad(jnp.array([0.0, 1.0, -1.0])), [0, 1, 0])


@pytest.mark.parametrize("k", [0, -1, 25])
def test_k_lies_among_the_latents(k):
    with pytest.raises(ValueError, match=f"k = {k} does not lie in 1..24"):
        topk_encode(jnp.zeros((2, 3)), jnp.zeros((3, 24)), jnp.zeros(24), k=k)


def test_what_does_not_fit_is_refused_with_what_was_expected():
    x, w, b = jnp.zeros((2, 3)), jnp.zeros((3, 24)), jnp.zeros(24)
    fit = r"x \(.*\), w_enc \(.*\) and b_enc \(.*\) do not fit; expected \[..., d\], \[d, f\] and \[f\]"
    for wrong in ((x.T, w, b), (x, w.T, b), (x, w, b[:23]), (x, w, b[None]), (x, w[0], b), (x[0, 0], w, b)):
        with pytest.raises(ValueError, match=fit):
            topk_encode(*wrong, k=2)
    for place, name in enumerate(("x", "w_enc", "b_enc")):
        arrays = [a.astype(int) if i == place else a for i, a in enumerate((x, w, b))]
        with pytest.raises(ValueError, match=f"{name} is int32; expected a floating dtype"):
            topk_encode(*arrays, k=2)


def test_unknown_names_are_refused_with_the_known_ones():
    arrays = jnp.zeros((2, 3)), jnp.zeros((3, 24)), jnp.zeros(24)
    with pytest.raises(ValueError, match=r"topk_encode has no implementation 'tpu9'; there are \[.*'ref', .*'xla'\]"):
        topk_encode(*arrays, k=2, impl="tpu9")
    with pytest.raises(ValueError, match="contract = 'loose'; expected 'exact' or 'fast'"):
        topk_encode(*arrays, k=2, contract="loose")
