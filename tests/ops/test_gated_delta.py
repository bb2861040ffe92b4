"""Every implementation of gated_delta follows the recurrence, in value and in gradient.

Errors are the largest difference over the largest value. The chunked form adds the same float32 terms in another order
and inverts I + A, whose condition here stays below some tens: 1e-5 is about a hundred roundings of 6e-8.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from qscope_kernels.gated_delta import _IMPLEMENTATIONS, gated_delta, xla

IMPLEMENTATIONS = sorted(_IMPLEMENTATIONS)
LENGTHS = [1, 5, 63, 64, 65, 130, 200]
NAMES = ("q", "k", "v", "g", "beta", "state")


def draw(t, *, b=2, i=2, j=4, dk=6, dv=10, seed=0):
    """q, k, v, g, beta and state: unit keys that resemble each other, decays from none to nearly all."""
    rng = np.random.default_rng(seed)
    unit = lambda x: x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True))  # noqa: E731
    q, k = (unit(rng.normal(0.5, 1, (b, t, i, dk))) for _ in range(2))
    v, state = rng.normal(size=(b, t, j, dv)), rng.normal(size=(b, j, dk, dv))
    g, beta = -(rng.uniform(0, 1.2, (b, t, j)) ** 6), rng.uniform(0, 1, (b, t, j))
    return dict(zip(NAMES, (np.asarray(x, np.float32) for x in (q / dk**0.5, k, v, g, beta, state)), strict=True))


def oracle(q, k, v, g, beta, state, reset=None):
    """The recurrence in float64, with one loop per index that it runs over."""
    q, k, v, g, beta, state = (np.array(x, np.float64) for x in (q, k, v, g, beta, state))
    out = np.zeros(v.shape)
    for b, t, j in np.ndindex(g.shape):
        head = j // (v.shape[2] // q.shape[2])
        s = state[b, j] * np.exp(g[b, t, j]) * (reset is None or not reset[b, t])
        s += np.outer(k[b, t, head], beta[b, t, j] * (v[b, t, j] - s.T @ k[b, t, head]))
        out[b, t, j], state[b, j] = s.T @ q[b, t, head], s
    return out, state


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert np.max(np.abs(np.asarray(one, np.float64) - other)) <= tolerance * np.max(np.abs(other))


@functools.partial(jax.jit, static_argnames="impl")
def follow(inputs, reset, impl):
    """(out, state), and the gradients of a loss in which every entry of both counts differently."""

    def loss(inputs):
        found = gated_delta(**inputs, reset=reset, impl=impl)
        return sum(jnp.sum(x * jnp.cos(jnp.arange(x.size)).reshape(x.shape)) for x in found), found

    (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(inputs)
    return found, gradients


def run(inputs, reset=None, impl="xla"):
    return follow(inputs, no_reset(inputs) if reset is None else reset, impl)[0]


def gradients(inputs, reset=None, impl="xla"):
    return follow(inputs, no_reset(inputs) if reset is None else reset, impl)[1]


def no_reset(inputs):
    return np.zeros(inputs["g"].shape[:2], bool)


def resets_at(t, *places, b=2):
    """The first row is reset at all places, the others at the last one alone."""
    reset = np.zeros((b, t), bool)
    reset[0, list(places)] = True
    reset[1:, places[-1]] = True
    return reset


def assert_same_gradients(inputs, reset=None):
    found, expected = (gradients(inputs, reset, impl) for impl in ("xla", "ref"))
    assert all(np.any(expected[name]) for name in NAMES)
    assert_close([found[name] for name in NAMES], [expected[name] for name in NAMES])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("t", LENGTHS)
def test_it_follows_the_recurrence(impl, t):
    inputs = draw(t)
    assert_close(run(inputs, impl=impl), oracle(**inputs))


@pytest.mark.parametrize("t", LENGTHS)
def test_gradients_equal_those_of_the_definition(t):
    assert_same_gradients(draw(t, seed=1))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("i", "j"), [(3, 3), (1, 3)])
def test_each_value_head_reads_its_own_key_head(impl, i, j):
    inputs = draw(20, b=1, i=i, j=j, dk=8, dv=4, seed=2)
    assert_close(run(inputs, impl=impl), oracle(**inputs))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_state_stands_for_zeros_and_no_reset_for_none(impl):
    inputs = draw(5)
    inputs["state"] = np.zeros_like(inputs["state"])
    found = gated_delta(**{name: inputs[name] for name in NAMES[:5]}, impl=impl)
    assert_close(found, oracle(**inputs))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("parts", [(130, 5, 65), (1, 64, 0, 5, 130), (63, 1, 5, 1, 130)], ids=str)
def test_a_split_changes_nothing(impl, parts):
    inputs = draw(200, seed=3)
    outs, state, start = [], inputs["state"], 0
    for length in parts:
        part = {name: inputs[name][:, start : start + length] for name in NAMES[:5]}
        out, state = run(part | {"state": state}, impl=impl)
        outs.append(out)
        start += length
    assert_close([np.concatenate(outs, axis=1), state], run(inputs, impl=impl))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("places", [(0,), (63,), (64,), (65,), (129,), (1, 2, 3, 40, 63, 64, 127, 128)], ids=str)
def test_a_reset_begins_anew(impl, places):
    inputs, reset = draw(130, seed=4), resets_at(130, *places)
    assert_close(run(inputs, reset, impl), oracle(**inputs, reset=reset))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_single_token_may_begin_anew(impl):
    inputs, reset = draw(1, seed=4), np.array([[True], [False]])
    assert_close(run(inputs, reset, impl), oracle(**inputs, reset=reset))


def test_gradients_end_at_resets():
    inputs = draw(130, seed=5)
    assert_same_gradients(inputs, resets_at(130, 1, 2, 40, 63, 64, 65, 128))
    everywhere = gradients(inputs, np.ones((2, 130), bool))
    assert not np.any(everywhere["state"])
    assert not np.any(everywhere["g"])
    assert np.any(everywhere["v"])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_pads_leave_the_state_alone(impl):
    inputs, real = draw(130, seed=6), np.zeros((2, 130), bool)
    # Row 0: two segments of 50 and 40 tokens, pads between them and at both ends; row 1: nothing but pads.
    real[0, 5:55] = real[0, 80:120] = True
    inputs["g"][~real], inputs["beta"][~real] = 0, 0
    reset = np.zeros((2, 130), bool)
    reset[0, 80] = True
    out, state = run(inputs, reset, impl)
    dense = {name: inputs[name][:1, real[0]] for name in NAMES[:5]} | {"state": inputs["state"][:1]}
    assert_close([out[:1, real[0]], state[:1]], oracle(**dense, reset=reset[:1, real[0]]))
    np.testing.assert_array_equal(state[1], inputs["state"][1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_strong_decay_spares_the_small_ones_after_it(impl):
    inputs = draw(64, seed=7)
    inputs["g"][:, :40] = -50
    inputs["g"][:, 40:] = -1e-3
    assert_close(run(inputs, impl=impl), oracle(**inputs), 2e-6)


def test_gradients_stay_finite_where_nothing_is_left():
    inputs = draw(130, seed=8)
    inputs["k"][0], inputs["q"][0, 3], inputs["beta"][:, ::2], inputs["g"][1, 10:] = 0, 0, 0, -50
    reset = resets_at(130, 2, 64)
    assert_same_gradients(inputs, reset)
    assert all(np.all(np.isfinite(x)) for x in gradients(inputs, reset).values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_narrow_inputs_are_computed_in_float32(impl):
    inputs = {name: jnp.asarray(x, jnp.bfloat16) for name, x in draw(5, seed=9).items()}
    out, state = run(inputs, impl=impl)
    assert out.dtype == state.dtype == jnp.float32
    assert_close((out, state), oracle(**{name: x.astype(jnp.float32) for name, x in inputs.items()}))


def test_mapped_over_a_new_axis():
    inputs, reset = draw(70, b=3, seed=10), resets_at(70, 4, 66, b=3)
    lead = {name: x[:, None] for name, x in inputs.items()} | {"reset": reset[:, None]}
    out, state = jax.jit(jax.vmap(lambda one: gated_delta(**one)))(lead)
    assert_close((out[:, 0], state[:, 0]), oracle(**inputs, reset=reset))


def test_sharded_heads_and_rows_need_no_communication():
    inputs, reset = draw(130, i=4, j=8, seed=11), resets_at(130, 4, 66)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    placed = {name: place(inputs[name], "data", None, "model") for name in NAMES[:5]}
    placed["state"] = place(inputs["state"], "data", "model")
    compiled = follow.lower(placed, place(reset, "data"), "xla").compile()
    assert_close(compiled(placed, place(reset, "data"))[0], oracle(**inputs, reset=reset))
    text = compiled.as_text()
    assert "f32[1,130,2,10]" in text  # the values of one device: half of the rows, a quarter of the heads
    for word in ("all-gather", "all-to-all", "all-reduce", "collective-permute", "reduce-scatter"):
        assert word not in text


@pytest.mark.slow
def test_the_backward_pass_keeps_one_state_per_group_of_chunks():
    b, t, i, j, d = 1, 16384, 16, 32, 128
    shapes = [(b, t, i, d), (b, t, i, d), (b, t, j, d), (b, t, j), (b, t, j), (b, j, d, d)]
    inputs = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in zip(NAMES, shapes, strict=True)}
    compiled = follow.lower(inputs, jax.ShapeDtypeStruct((b, t), bool), "xla").compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 3 * 4 * sum(map(math.prod, shapes))


def test_the_inverse_and_its_derivative():
    rng = np.random.default_rng(12)
    a, tangent = (np.tril(rng.uniform(-1, 1, (3, 16, 16)), -1).astype(np.float32) for _ in range(2))
    inverse, moved = jax.jvp(xla._unit_lower_inverse, (a,), (tangent,))
    exact = np.linalg.inv(np.eye(16) + a.astype(np.float64))
    assert_close((inverse, moved), (exact, -exact @ tangent @ exact))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 5, 6), r"q \(2, 5, 6\) and v \(2, 5, 4, 10\) must have four axes"),
        ("q", (2, 5, 3, 6), "v has 4 heads and q has 3: the value heads must be a multiple"),
        ("k", (2, 5, 2, 7), r"k has shape \(2, 5, 2, 7\); expected \(2, 5, 2, 6\)"),
        ("v", (2, 4, 4, 10), r"v has shape \(2, 4, 4, 10\); expected \(2, 5, 4, 10\)"),
        ("g", (2, 5, 2), r"g has shape \(2, 5, 2\); expected \(2, 5, 4\)"),
        ("beta", (2, 5), r"beta has shape \(2, 5\); expected \(2, 5, 4\)"),
        ("state", (2, 4, 10, 6), r"state has shape \(2, 4, 10, 6\); expected \(2, 4, 6, 10\)"),
        ("reset", (5,), r"reset has shape \(5,\); expected \(2, 5\)"),
    ],
)
def test_what_does_not_fit_is_refused(name, shape, message):
    with pytest.raises(ValueError, match=message):
        gated_delta(**(draw(5) | {name: np.zeros(shape, np.float32)}))


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"gated_delta has no implementation 'tpu9'; there are \['ref', 'xla'\]"):
        gated_delta(**draw(5), impl="tpu9")
