"""One step of all SAEs: it finds planted features, alone or together, on any mesh, and survives bad input."""

import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from qscope_kernels.topk_encode import xla

from qscope_jax.mesh import MeshError, make_mesh, to_host
from qscope_jax.sae.loss import Objective
from qscope_jax.training import optimizer
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group, Norms, TrainState, abstract_group, init_group
from qscope_jax.training.step import make_fit, make_judge, make_train_step

LAYERS, D, F, N, RATE, SINK = (1, 4, 5, 7), 16, 32, 48, 1e-2, 40.0
FLAT = Schedule(RATE, 1000, decay=0)
ALL = Group(LAYERS, Objective(F, 3, aux_k=2, dead_after=2 * N), FLAT)
SOME = Group((4, 7), Objective(2 * F, 2, "batch", prefixes=(F,), aux_k=2, dead_after=N), FLAT)


@cache
def fresh(group, mesh, model_axis):
    """Fresh SAEs, in host memory, whose layers have means and scales of their own; and where they lie."""
    rng = np.random.default_rng(5)
    norms = Norms(rng.normal(size=(8, D)), rng.uniform(0.5, 2, 8), np.full(8, SINK))
    own = jax.tree.map(lambda array: array[list(group.layers)], norms)
    saes = init_group(group, own, 0, mesh=mesh, model_axis=model_axis)
    return jax.tree.map(to_host, saes), jax.tree.map(lambda leaf: leaf.sharding, saes)


def start(groups, *, mesh=None, model_axis="latents"):
    saes = [fresh(group, mesh, model_axis) for group in groups]
    if mesh is None:
        return TrainState(jnp.zeros((), jnp.int32), tuple(jax.tree.map(jnp.array, host) for host, _ in saes))
    step = jax.device_put(jnp.zeros((), jnp.int32), NamedSharding(mesh, PartitionSpec()))
    return TrainState(step, tuple(jax.device_put(*placed) for placed in saes))


def draw(count, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.normal(size=(len(LAYERS), N, D)).astype(np.float32), rng.random(N) < 0.9) for _ in range(count)]


def run(step, state, batches):
    """State and reports after the last batch, in host memory."""
    for batch in batches:
        state, reports = step(state, *map(jnp.asarray, batch))
    return jax.tree.map(to_host, (state, reports))


def of_sae(state, i):
    return jax.tree.map(lambda leaf: np.array(leaf[i]), state.groups[0])


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def step():
    return make_train_step((ALL,), LAYERS)


def planted(seed, d=32, f=64):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(f, d))
    return jnp.asarray(features / np.linalg.norm(features, axis=1, keepdims=True), jnp.float32)


def test_planted_features_are_found():
    """Two layers, each with 64 directions in 32 dimensions of which a token has three, noise, and a mean far from 0."""
    features, n, k, steps = jnp.stack([planted(0), planted(1)]), 512, 3, 600
    _, f, d = features.shape
    mean = 3 * jax.random.normal(jax.random.key(7), (2, d))

    @jax.jit
    def residuals(key):
        which, size, noise = jax.random.split(key, 3)
        which = jax.lax.top_k(jax.random.uniform(which, (n, f)), k)[1]
        size = jax.random.uniform(size, (n, k), minval=0.5, maxval=1.5)
        x = jnp.einsum("nk,lnkd->lnd", size, features[:, which])
        return x + mean[:, None] + 0.02 * jax.random.normal(noise, (2, n, d))

    group = Group((0, 1), Objective(f, k, aux_k=8, dead_after=20 * n), Schedule(1e-2, steps, warmup=50))
    seen = np.asarray(residuals(jax.random.key(steps)))
    norms = Norms(seen.mean(axis=1), seen.std(axis=1).mean(axis=1), np.full(2, 1e3))
    state = TrainState(jnp.zeros((), jnp.int32), (init_group(group, norms, 0, mesh=None, model_axis="latents"),))
    step, mask = make_train_step((group,), (0, 1)), jnp.ones(n, bool)

    def found(state):
        cosines = jnp.einsum("lfd,lgd->lfg", features, state.groups[0].weights.w_dec)
        return np.asarray(cosines.max(axis=2).mean(axis=1))

    assert found(state).max() < 0.5
    for number in range(steps):
        state, _ = step(state, residuals(jax.random.key(number)), mask)
    assert found(state).min() >= 0.95


@pytest.mark.parametrize("shape", [None, (2, 4)])
def test_untrained_encoders_get_the_scale_of_the_least_error(shape):
    mesh = None if shape is None else make_mesh(*shape)
    batch, before = draw(1)[0], start((ALL,), mesh=mesh)
    old = to_host(before.groups[0].weights.w_enc)
    state = make_fit((ALL,), LAYERS, mesh=mesh)(before, *batch)
    scale = to_host(state.groups[0].weights.w_enc)[:, 0, 0] / old[:, 0, 0]
    np.testing.assert_allclose(to_host(state.groups[0].weights.w_enc), scale[:, None, None] * old, rtol=1e-5)
    assert int(state.step) == 0
    look = make_judge((ALL,), LAYERS, mesh=mesh)

    def error(factor):
        saes = state.groups[0]
        scaled = saes._replace(weights=saes.weights._replace(w_enc=factor * saes.weights.w_enc))
        return to_host(look(state._replace(groups=(scaled,)), *batch)[0].fvu)

    least = error(1.0)
    assert (least < error(0.98)).all()
    assert (least < error(1.02)).all()
    assert (least < error(1 / scale[0])).all()


def test_all_layers_at_once_equal_one_at_a_time(step):
    """Wherever the layer stands among those whose residual streams are given; to rounding, as XLA fuses a scan over one
    SAE in another way than one over several."""
    batches = draw(3)
    together, reports = run(step, start((ALL,)), batches)
    group = Group((4,), ALL.objective, FLAT)
    own = [(x[[3, 1]], mask) for x, mask in batches]
    alone, own_reports = run(make_train_step((group,), (7, 4)), start((group,)), own)
    one, among = of_sae(alone, 0), of_sae(together, 1)
    np.testing.assert_array_equal(one.idle, among.idle)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, one, among)
    jax.tree.map(lambda a, b: close(a[0], b[1]), own_reports, reports)


def with_a_bad_one():
    batches = draw(5)
    batches[2][0][LAYERS.index(4), np.flatnonzero(batches[2][1])[-1], 0] = np.nan
    return batches


@pytest.fixture(scope="module")
def groups_alone():
    return run(make_train_step((ALL, SOME), LAYERS), start((ALL, SOME)), with_a_bad_one())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_axis", "shape"),
    [("latents", (2, 4)), ("layers", (4, 2)), pytest.param("latents", (8, 1), marks=pytest.mark.all)],
)
def test_a_mesh_changes_nothing(groups_alone, model_axis, shape):
    """Groups of two widths, k and recipes; one layer skips a step. Sums are taken in another order, and Adam divides
    each gradient by its own size: where it nearly cancels, its rounding error moves a weight by a part of the rate."""
    expected, reports = groups_alone
    mesh = make_mesh(*shape)
    step = make_train_step((ALL, SOME), LAYERS, mesh=mesh, model_axis=model_axis)
    found, found_reports = run(step, start((ALL, SOME), mesh=mesh, model_axis=model_axis), with_a_bad_one())
    for ours, theirs in zip(found.groups, expected.groups, strict=True):
        for name in ("idle", "skipped", "failing", "norms"):
            assert_equal(getattr(ours, name), getattr(theirs, name))
        for name, weights in theirs.weights._asdict().items():
            difference = np.abs(getattr(ours.weights, name) - weights)
            assert difference.max() < RATE / 10, name
            assert np.quantile(difference, 0.99) < 1e-6, name
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found_reports, reports)
    assert all((report.batch.dead > 0).any() for report in reports)  # AuxK was at work
    assert [list(group.skipped) for group in found.groups] == [[0, 1, 0, 0], [1, 0]]


def test_one_compilation_serves_all_steps_and_the_state_is_given_away(step):
    state = start((ALL,))
    for batch in draw(4):
        before = state
        state, _ = step(before, *map(jnp.asarray, batch))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert step._cache_size() == 1
    assert state.step == 4


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_step_with_something_not_finite_is_skipped_by_its_sae_alone(step, wrong):
    (x, mask), (good, good_mask) = draw(2)
    bad = x.copy()
    bad[1, np.flatnonzero(mask)[3], 2] = wrong
    before = jax.tree.map(np.array, start((ALL,)))
    clean, _ = run(step, start((ALL,)), [(x, mask)])
    state, (report,) = run(step, start((ALL,)), [(bad, mask)])
    for i in (0, 2, 3):
        assert_equal(of_sae(state, i), of_sae(clean, i))
    unchanged = of_sae(before, 1)._replace(skipped=np.array(1), failing=np.array(1))
    assert_equal(of_sae(state, 1), unchanged)
    assert (list(report.skipped), list(report.failing)) == ([0, 1, 0, 0], [0, 1, 0, 0])

    twice, (report,) = run(step, start((ALL,)), [(bad, mask), (bad, mask)])
    assert (report.skipped[1], report.failing[1], twice.step) == (2, 2, 2)
    after, (report,) = run(step, start((ALL,)), [(bad, mask), (good, good_mask)])
    expected, _ = run(step, start((ALL,)), [(good, good_mask)])
    assert_equal(of_sae(after, 1), of_sae(expected, 1)._replace(skipped=np.array(1)))
    assert (report.skipped[1], report.failing[1]) == (1, 0)


def test_padding_never_matters(step):
    (x, mask), = draw(1)  # fmt: skip
    hostile = np.where(mask[:, None], x, np.resize([np.nan, np.inf, 3e38], x.shape)).astype(np.float32)
    assert_equal(run(step, start((ALL,)), [(hostile, mask)]), run(step, start((ALL,)), [(x, mask)]))


def test_sinks_are_left_out_and_their_share_is_told(step):
    (x, mask), = draw(1)  # fmt: skip
    real = np.flatnonzero(mask)
    loud, quiet = x.copy(), mask.copy()
    loud[:, real[[2, 9]]] *= 1000 / np.linalg.norm(x[:, real[[2, 9]]], axis=-1, keepdims=True)
    loud[:, real[4]] = 3e38  # its norm overflows
    quiet[real[[2, 9, 4]]] = False
    state, (report,) = run(step, start((ALL,)), [(loud, mask)])
    expected, (without,) = run(step, start((ALL,)), [(x, quiet)])
    assert_equal(state, expected)
    assert_equal(report.batch, without.batch)
    np.testing.assert_allclose(report.sinks, 3 / len(real), rtol=1e-5)
    np.testing.assert_array_equal(without.sinks, 0)


def test_a_batch_of_padding_has_no_sinks_and_counts_no_tokens(step):
    (x, _), = draw(1)  # fmt: skip
    state, (report,) = run(step, start((ALL,)), [(x, np.zeros(N, bool))])
    np.testing.assert_array_equal(report.sinks, 0)
    np.testing.assert_array_equal(report.batch.loss, 0)
    np.testing.assert_array_equal(report.failing, 0)
    assert not state.groups[0].idle.any()
    for found, before in zip(state.groups[0].weights, start((ALL,)).groups[0].weights, strict=True):
        np.testing.assert_allclose(found, before, rtol=3e-7)  # decoder rows are brought to norm 1 once more


def test_silence_is_counted_in_tokens(step):
    """By NumPy from the weights before each step: who is not among the k largest, positive ones of any real token."""
    state = start((ALL,))
    idle = np.zeros((len(LAYERS), F), int)
    for x, mask in draw(4):
        x[0, np.flatnonzero(mask)[0]] *= 1e3  # a sink of the first layer is no token for its latents
        for i in range(len(LAYERS)):
            sae = of_sae(state, i)
            keep = mask & (np.linalg.norm(x[i], axis=1) <= SINK)
            pre = (x[i] - sae.norms.mean) / sae.norms.scale @ sae.weights.w_enc.T + sae.weights.b_enc
            ranks = np.argsort(np.argsort(-pre, axis=1), axis=1)
            fired = ((ranks < ALL.objective.k) & (pre > 0) & keep[:, None]).any(axis=0)
            idle[i] = np.where(fired, 0, idle[i] + keep.sum())
        dead = (np.asarray(state.groups[0].idle) > ALL.objective.dead_after).mean(axis=1)
        state, (report,) = step(state, jnp.asarray(x), jnp.asarray(mask))
        np.testing.assert_array_equal(state.groups[0].idle, idle)
        np.testing.assert_allclose(report.batch.dead, dead)
    assert idle.max() > ALL.objective.dead_after


def test_judging_reports_what_a_step_would_and_changes_nothing(step):
    state, batch = start((ALL,)), [jnp.asarray(array) for array in draw(1)[0]]
    (judged,) = make_judge((ALL,), LAYERS)(state, *batch)
    _, (report,) = step(state, *batch)
    for name in ("fvu", "l0", "dead", "tokens"):
        np.testing.assert_allclose(getattr(judged, name), getattr(report.batch, name), rtol=1e-6)


def compile_wide(layers):
    """The program for SAEs of 2,048 latents and 1,024 tokens."""
    group = Group(tuple(range(layers)), Objective(2048, 4, aux_k=8), FLAT)
    saes = abstract_group(group, D, mesh=None, model_axis="latents")
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), (saes,))
    x, mask = jax.ShapeDtypeStruct((layers, 1024, D), jnp.float32), jax.ShapeDtypeStruct((1024,), bool)
    return make_train_step((group,), group.layers).lower(state, x, mask).compile()


@pytest.mark.slow
def test_memory_holds_one_layers_gradients_and_no_dense_codes(monkeypatch):
    monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", 64 * 2048)  # 64 tokens are encoded at a time
    monkeypatch.setattr(optimizer, "_CACHED", 512 * D)
    few, many = compile_wide(2), compile_wide(8)
    arrays = {np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\[([\d,]+)\]", many.as_text())}
    assert 64 * 2048 in arrays
    assert 1024 * 2048 not in arrays
    small, large = few.memory_analysis(), many.memory_analysis()
    assert large.alias_size_in_bytes > 6 * 4 * 8 * 2048 * D  # weights and moments stay in place
    # Six more layers have gradients, weights or moments of 262,144 bytes each.
    assert large.temp_size_in_bytes - small.temp_size_in_bytes < 4 * 2048 * D


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"layers \[4, 7\] are to be trained but not among \(1, 5\)"):
        make_train_step((SOME,), (1, 5))
    with pytest.raises(MeshError, match="2 layers cannot be split over the mesh axis 'model' of 4"):
        start((SOME,), mesh=make_mesh(2, 4), model_axis="layers")
