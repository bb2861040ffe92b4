"""Every implementation of grouped_matmul multiplies each row by the matrix of its group, and reads no other."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from qscope_kernels.grouped_matmul import _IMPLEMENTATIONS, grouped_matmul, xla

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
PORTABLE = [name for name in IMPLEMENTATIONS if name != "ref"]
# What is asked is what is computed, not how fast.
QUICK = {"xla_backend_optimization_level": 0}
product = jax.jit(grouped_matmul, static_argnames=("precision", "impl"), compiler_options=QUICK)


@partial(jax.jit, static_argnames="impl", compiler_options=QUICK)
def with_gradients(x, w, sizes, dy, within=None, *, impl):
    """The product, and the gradients of x and w for that of the product."""
    out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, within=within, impl=impl), x, w)
    return out, *pull(dy)


E, D, M = 5, 6, 7
SIZES = {
    "uneven": (40, [11, 0, 17, 1, 11]),
    "ends empty": (40, [0, 13, 0, 27, 0]),
    "one takes all": (40, [0, 0, 40, 0, 0]),
    "rows left over": (40, [3, 0, 9, 1, 8]),
    "no row used": (9, [0, 0, 0, 0, 0]),
    "one row": (1, [0, 0, 0, 1, 0]),
    "fewer rows than a tile": (3, [1, 0, 1, 0, 1]),
}


def inputs(n, seed=0, dtype="float32"):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in ((n, D), (E, D, M)))


def gradient_of(n):
    return jnp.asarray(np.random.default_rng(1).normal(size=(n, M)), jnp.float32)


def oracle(x, w, sizes):
    """Group by group in float64."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    out, start = np.zeros((len(x), w.shape[2])), 0
    for matrix, size in zip(w, sizes, strict=True):
        out[start : start + size] = x[start : start + size] @ matrix
        start += size
    return out


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", SIZES)
def test_it_equals_a_loop_over_groups(impl, case):
    n, sizes = SIZES[case]
    x, w = inputs(n)
    out = product(x, w, np.array(sizes, np.int32), impl=impl)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, oracle(x, w, sizes), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(out[sum(sizes) :], 0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@settings(max_examples=40, deadline=None)
@given(ends=st.lists(st.integers(0, 64), min_size=E, max_size=E))
def test_any_sizes(impl, ends):
    # Tiles of 8 rows: groups begin, end and lie anywhere in them. Small integers make every sum exact.
    sizes = np.diff(sorted(ends), prepend=0).astype(np.int32)
    x, w = (jnp.round(2 * array) for array in inputs(64))
    assert xla._tile(64, E) == 8
    np.testing.assert_array_equal(product(x, w, sizes, impl=impl), oracle(x, w, sizes))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_multiply(impl):
    x, w = inputs(0)
    assert product(x, w, np.zeros(E, np.int32), impl=impl).shape == (0, M)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bfloat16_is_summed_in_float32_and_rounded_once(impl):
    # 256 + 1 + 1 + ... stays 256 where sums are rounded to bfloat16.
    x, w = jnp.ones((4, 65), jnp.bfloat16), jnp.ones((2, 65, 3), jnp.bfloat16).at[:, 0].set(256)
    out = product(x, w, np.array([2, 1], np.int32), impl=impl)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), np.repeat([320, 320, 320, 0], 3).reshape(4, 3))


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize("case", SIZES)
def test_gradients_equal_those_of_the_definition(impl, case):
    n, sizes = SIZES[case]
    args = *inputs(n), np.array(sizes, np.int32), gradient_of(n)
    want, found = (with_gradients(*args, impl=name) for name in ("ref", impl))
    for one, other in zip(found, want, strict=True):
        assert np.any(other) == bool(sum(sizes))
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found[2][np.array(sizes) == 0], 0)


@pytest.mark.parametrize("case", SIZES)
def test_the_form_for_tpus_equals_the_definition(case, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, default: tpu(*args))
    n, sizes = SIZES[case]
    x, w = inputs(n)
    args = x, w, np.array(sizes, np.int32), gradient_of(n), (jnp.stack([0 * w, w, w + 1]), jnp.int32(1))
    want = with_gradients(*args, impl="ref")
    found = jax.jit(partial(with_gradients.__wrapped__, impl="xla"), compiler_options=QUICK)(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, want)


@pytest.mark.parametrize("impl", PORTABLE)
def test_bfloat16_gradients_are_summed_in_float32(impl):
    n = 600  # several tiles of one group
    x, w, dy = (jnp.ones(shape, jnp.bfloat16) for shape in ((n, 2), (2, 2, 3), (n, 3)))
    _, dx, dw = with_gradients(x, w, np.array([n, 0], np.int32), dy, impl=impl)
    assert dx.dtype == dw.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dx.astype(np.float32), 3)
    np.testing.assert_array_equal(dw.astype(np.float32), np.array([600, 0]).reshape(2, 1, 1) * np.ones((2, 2, 3)))


@pytest.mark.parametrize("impl", PORTABLE)
def test_matrices_of_groups_without_rows_and_rows_past_the_groups_are_never_read(impl):
    n, sizes = SIZES["rows left over"]
    (x, w), sizes, dy = inputs(n), np.array(sizes, np.int32), gradient_of(n)
    past = sizes.sum()
    want = with_gradients(x, w, sizes, dy, impl=impl)
    nan = x.at[past:].set(jnp.nan), w.at[sizes == 0].set(jnp.nan), sizes, dy.at[past:].set(jnp.nan)
    jax.tree.map(np.testing.assert_array_equal, with_gradients(*nan, impl=impl), want)


HAND_ON = {"func", "call", "return", "}", "while", "case", "optimization_barrier"}


def operations_on(shape, function, *args):
    """(name, shape of the result) of what reads or makes an array of `shape`, without what only hands it on."""
    lines = [line for line in jax.jit(function).lower(*args).as_text().splitlines() if f"<{shape}xf32>" in line]
    names = (re.search(r"(?:stablehlo\.|func\.)(\w+)|(return|})", line) for line in lines)
    names = [name[1] or name[2] for name in names]
    results = [line.rsplit("-> tensor<")[-1].removesuffix("xf32>") for line in lines]
    return {pair for pair in zip(names, results, strict=True) if pair[0] not in HAND_ON}


@pytest.mark.parametrize("impl", PORTABLE)
def test_the_stack_is_read_and_written_one_matrix_at_a_time(impl):
    x, w = inputs(40)
    layers, sizes, dy = jnp.stack([w, w, w]), jnp.array(SIZES["uneven"][1], jnp.int32), jnp.ones((40, M))

    def forward(x, w, layers):
        return grouped_matmul(x, w, sizes, within=(layers, jnp.int32(1)), impl=impl)

    backward = lambda x, w, layers, dy: jax.vjp(partial(forward, layers=layers), x, w)[1](dy)  # noqa: E731
    one, many = f"{E}x{D}x{M}", f"3x{E}x{D}x{M}"
    read = {("dynamic_slice", f"1x1x{D}x{M}")}
    assert operations_on(many, forward, x, w, layers) == operations_on(many, backward, x, w, layers, dy) == read
    assert operations_on(one, forward, x, w, layers) == set()
    # The gradient begins as zeros.
    assert operations_on(one, backward, x, w, layers, dy) == {("broadcast_in_dim", one), ("dynamic_update_slice", one)}


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_layer_of_many_is_read_where_it_lies(impl):
    n, sizes = SIZES["uneven"]
    x, w = inputs(n)
    args = x, w, np.array(sizes, np.int32), gradient_of(n)
    layers = jnp.full((3, *w.shape), jnp.nan).at[1].set(w)
    found, want = (with_gradients(*args, within, impl=impl) for within in ((layers, jnp.int32(1)), None))
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize("impl", PORTABLE)
def test_a_loop_over_layers_copies_none_of_them(impl):
    n, d, m, layers = 64, 64, 64, 3
    sizes = jnp.zeros(32, jnp.int32).at[5].set(n)

    def run(x, w):
        def layer(x, per_layer):
            return grouped_matmul(x, per_layer[0], sizes, within=(w, per_layer[1]), impl=impl), None

        return jax.lax.scan(layer, x, (w, jnp.arange(layers)))[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, d), (layers, 32, d, m))]
    for function in (run, jax.grad(lambda *args: jnp.sum(run(*args)), argnums=(0, 1))):
        compiled = jax.jit(function, compiler_options=QUICK).lower(*shapes).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < 32 * d * m * 4 // 2


@pytest.mark.parametrize("impl", PORTABLE)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temporary_memory_does_not_grow_with_the_groups(impl, dtype):
    n, d, m = 512, 64, 96

    def temporary(e):
        shapes = [jax.ShapeDtypeStruct(s, dtype) for s in ((n, d), (e, d, m))] + [jax.ShapeDtypeStruct((e,), jnp.int32)]
        forward = lambda x, w, sizes: grouped_matmul(x, w, sizes, impl=impl)  # noqa: E731
        loss = lambda *args: jnp.sum(forward(*args).astype(jnp.float32) ** 2)  # noqa: E731
        compiled = [
            jax.jit(f, compiler_options=QUICK).lower(*shapes).compile()
            for f in (forward, jax.grad(loss, argnums=(0, 1)))
        ]
        return [c.memory_analysis().temp_size_in_bytes for c in compiled]

    # What does grow: the sizes, their sums, the list of groups in use; never a matrix.
    for few, many in zip(temporary(16), temporary(128), strict=True):
        assert many - few < d * m * 2


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_it_runs_inside_shard_map_with_weights_replicated_or_split(impl):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(3)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, D), (4, D, M)))
    sizes = jnp.array([[5], [2]], jnp.int32)  # per data shard, of its 8 rows

    def shard(x, w, sizes):  # each shard of "model" has one group, and all rows
        return jax.lax.psum(grouped_matmul(x, w, sizes[0], impl=impl), "model")

    split = jax.jit(jax.shard_map(shard, mesh=mesh, in_specs=(P("data"), P("model"), P("data")), out_specs=P("data")))
    used = jnp.arange(16)[:, None] % 8 < jnp.repeat(sizes, 8, axis=0)
    whole = lambda x, w: jnp.where(used, x @ w.sum(0), 0)  # noqa: E731
    found = jax.value_and_grad(lambda x, w: jnp.sum(split(x, w, sizes) ** 2), argnums=(0, 1))(x, w)
    want = jax.value_and_grad(lambda x, w: jnp.sum(whole(x, w) ** 2), argnums=(0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, want)


def test_what_does_not_fit_is_refused():
    x, w, sizes = jnp.zeros((4, 3)), jnp.zeros((2, 3, 5)), jnp.zeros(2, int)
    with pytest.raises(ValueError, match=r"x \(4, 3\), w \(2, 4, 5\) and group_sizes \(2,\) do not fit"):
        grouped_matmul(x, jnp.zeros((2, 4, 5)), sizes)
    with pytest.raises(ValueError, match=r"group_sizes \(3,\) do not fit; expected"):
        grouped_matmul(x, w, jnp.zeros(3, int))
    with pytest.raises(ValueError, match="x is float32 and w is bfloat16; cast one of them"):
        grouped_matmul(x, w.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match=r"w \(2, 3, 5\) is no layer of the stacks \(4, 2, 3, 6\)"):
        grouped_matmul(x, w, sizes, within=(jnp.zeros((4, 2, 3, 6)), jnp.int32(0)))
    with pytest.raises(ValueError, match=r"grouped_matmul has no implementation 'tpu9'; there are \['ref', 'xla'\]"):
        grouped_matmul(x, w, sizes, impl="tpu9")
