"""select gives the k largest entries of every row, ties to the lowest index, whatever the width and the ties."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from qscope_kernels.cases import RELEASED
from qscope_kernels.topk_encode.select import group_width, select

# (f, k): with groups that divide f, with some that do not, with none; k = 1 and k = f.
SHAPES = [(384, 3), (300, 2), (257, 1), (1000, 8), (1021, 4), (24, 24), (12, 5), (1, 1)]
VALUES = [0.0, -0.0, 1.0, -1.0, 2.5, 3e38, np.inf, -np.inf, np.nan, -np.nan]
chosen = jax.jit(select, static_argnums=1)


def oracle(rows, k):
    """The columns of every row in Python's order: NaN first, then by value, then by index."""
    order = [
        sorted(range(len(row)), key=lambda i: (not np.isnan(row[i]), 0 if np.isnan(row[i]) else -row[i], i))[:k]
        for row in np.asarray(rows, np.float64).tolist()
    ]
    return np.array(order)


def check(rows, k):
    values, indices = chosen(rows, k)
    expected = oracle(rows, k)
    assert (values.dtype, indices.dtype) == (rows.dtype, jnp.int32)
    np.testing.assert_array_equal(indices, expected)
    np.testing.assert_array_equal(
        np.asarray(values, np.float32), np.take_along_axis(np.asarray(rows, np.float32), expected, axis=1)
    )


def test_the_shapes_tried_have_groups_and_have_none():
    widths = {group_width(f, k) for f, k in SHAPES}
    assert widths >= {1, 8, 16}
    assert any(f % group_width(f, k) for f, k in SHAPES)


@pytest.mark.parametrize(("f", "k"), SHAPES, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_it_equals_a_sort(f, k, data):
    few = data.draw(st.lists(st.sampled_from(VALUES), min_size=1, max_size=4))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    rows = rng.choice(np.array(few, np.float32), (3, f))  # ties everywhere
    distinct = data.draw(st.integers(0, f))
    rows[:, rng.permutation(f)[:distinct]] = rng.normal(size=(3, distinct))
    check(rows, k)


@pytest.mark.parametrize(("f", "k"), SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_keep_their_type(f, k, dtype):
    check(jnp.asarray(np.random.default_rng(f).normal(size=(4, f)), dtype), k)


@pytest.mark.parametrize("place", ["first", "last", "spread"])
def test_where_the_largest_lie_does_not_matter(place):
    f, k = 1000, 8
    row = np.random.default_rng(0).uniform(-1, 0, f).astype(np.float32)
    columns = {"first": range(k), "last": range(f - k, f), "spread": range(0, f, f // k)}[place]
    row[list(columns)[:k]] = 1
    check(row[None], k)


def test_large_entries_spread_as_evenly_as_can_be_among_smaller_ones():
    """Every bin of group maxima has the same maximum, which one of its groups attains."""
    f, k = 3072, 6
    width = group_width(f, k)
    for every in range(2, 9):
        row = np.random.default_rng(every).uniform(-1, 1, f).astype(np.float32)
        row[(every - 1) * width :: every * width] = 2
        check(row[None], k)


def test_the_last_columns_count_where_groups_do_not_divide_the_width():
    assert 1021 % group_width(1021, 4)
    for value in (-np.inf, -1.0, 0.0):
        row = np.full((1, 1021), value, np.float32)
        row[0, -2:] = 3, 4
        check(row, 4)


@pytest.mark.parametrize(("f", "k"), [(4096, 4), (32_768, 50), (32_768, 100)], ids=str)
@pytest.mark.parametrize("nan", [np.nan, -np.nan], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_nan_among_thousands_is_never_hidden(f, k, nan, dtype):
    """XLA for CPUs takes maxima of 4096 floats and more with a library that skips NaNs."""
    rows = np.random.default_rng(f).integers(-4, 4, (2, f)).astype(np.float32)
    rows[0, [0, f // 2 + 3, f - 1]] = nan
    rows[0, 7] = np.inf
    rows = jnp.asarray(rows, dtype)
    check(rows, k)
    assert np.isnan(np.asarray(chosen(rows, k)[0], np.float32)[0, :3]).all()


def test_outside_jit_a_second_call_compiles_nothing(compilations):
    rng = np.random.default_rng(0)
    first, second, wider = (jnp.asarray(rng.normal(size=(2, f)), jnp.float32) for f in (4096, 4096, 8192))
    select(first, 3)
    with compilations() as seen:
        select(second, 3)
        assert not seen
        select(wider, 3)
    assert seen


@pytest.mark.parametrize("n", [0, 1])
def test_few_rows(n):
    values, indices = chosen(jnp.ones((n, 1000)), 8)
    assert values.shape == indices.shape == (n, 8)


def test_the_gradient_goes_to_the_chosen_entries():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 384)), jnp.float32)
    weights = jnp.arange(1.0, 4.0)
    found = jax.grad(lambda rows: jnp.sum(weights * select(rows, 3)[0]))(rows)
    expected = np.zeros((3, 384))
    np.put_along_axis(expected, oracle(rows, 3), np.broadcast_to(weights, (3, 3)), axis=1)
    np.testing.assert_array_equal(found, expected)


def test_groups_divide_all_released_widths_and_leave_a_tenth_to_rank():
    for case in RELEASED:
        width = group_width(case.f, case.k)
        assert case.f % width == 0
        assert case.f / width + case.k * width < case.f / 8


def test_no_copy_of_the_rows_is_made():
    shape = jax.ShapeDtypeStruct((64, 8192), jnp.float32)
    memory = jax.jit(functools.partial(select, k=16)).lower(shape).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 8192 * 4 // 2
