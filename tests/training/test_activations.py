"""Residual streams for training: no token is lost or twice, the order is that of seed, step and shard, on any mesh."""

from collections import Counter
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.batches import Filled
from qscope_jax.mesh import make_mesh
from qscope_jax.training.activations import (
    Activations,
    Mixer,
    init_mixer,
    make_collect,
    make_exchange,
    make_fill,
    measure_norms,
    own_part,
    place_rows,
)

L, V, D, BATCH, BATCHES = 2, 8, 3, 16, 3  # the buffer holds three batches: six slots in each of eight shards


def batch(number):
    """Tokens that all differ, each the same in all layers but for its sign, some of them padding."""
    x = BATCH * number + np.arange(BATCH)[:, None] + np.arange(D) / 8
    x = jnp.asarray(np.stack([x, -x]), jnp.float32)
    return Activations(x, jnp.asarray(np.arange(BATCH) % 5 != number % 5))


def tokens_of(x, mask):
    """How often each token is there, with whether it is real; layers must belong together."""
    x, mask = np.asarray(x, np.float64).reshape(L, -1, D), np.asarray(mask).reshape(-1)
    np.testing.assert_array_equal(x[1], -x[0])
    return Counter((*vector, bool(real)) for vector, real in zip(x[0], mask, strict=True))


def mixed(steps, *, seed=0, mesh=None):
    """The filled buffer, and after some steps: the buffer, and what each step gave out."""
    fill, exchange = make_fill(mesh), make_exchange(seed, mesh)
    mixer = init_mixer((L, V, BATCHES * BATCH // V, D), jnp.float32, mesh)
    for number in range(BATCHES):
        mixer = fill(mixer, batch(number), number)
    filled, given = jax.tree.map(np.asarray, mixer), []
    for step in range(steps):
        mixer, out = exchange(mixer, batch(BATCHES + step), step)
        given.append(jax.tree.map(np.asarray, out))
    return filled, jax.tree.map(np.asarray, mixer), given


@pytest.fixture(scope="module")
def alone():
    return mixed(20)


def test_the_buffer_is_filled_batch_by_batch(alone):
    filled, _, _ = alone
    assert tokens_of(*filled) == sum((tokens_of(*batch(number)) for number in range(BATCHES)), Counter())


def test_no_token_is_lost_or_given_twice(alone):
    _, mixer, given = alone
    went_in = sum((tokens_of(*batch(number)) for number in range(BATCHES + 20)), Counter())
    assert sum((tokens_of(*out) for out in given), tokens_of(*mixer)) == went_in
    assert max(went_in.values()) == 1


def test_a_step_gives_tokens_of_many_batches_and_shard_by_shard(alone):
    numbers = np.stack([np.floor(out.x[0, :, 0]).astype(int) for out in alone[2]])
    np.testing.assert_array_equal(numbers % BATCH // (BATCH // V), np.tile(np.arange(BATCH) // (BATCH // V), (20, 1)))
    assert np.mean([len(set(row // BATCH)) for row in numbers[5:]]) > 4
    slots = [row % 2 + row // BATCH for row in numbers]
    assert any(len(set(row[::2])) > 1 for row in slots)  # shards do not all take the same slots


def test_the_order_is_the_same_on_every_mesh(alone):
    for shape in ((8, 1), (2, 4)):
        found = mixed(4, mesh=make_mesh(*shape))
        jax.tree.map(np.testing.assert_array_equal, (found[0], found[2]), (alone[0], alone[2][:4]))


def test_the_order_depends_on_the_seed_and_the_step():
    slots = np.arange(V * 6, dtype=np.float32).reshape(1, V, 6, 1)
    exchanges = [make_exchange(seed) for seed in (0, 1)]
    fresh = Activations(jnp.zeros((1, BATCH, 1)), jnp.ones(BATCH, bool))

    def order(seed, step):
        mixer = Mixer(jnp.asarray(slots), jnp.ones((V, 6), bool))
        return tuple(np.asarray(exchanges[seed](mixer, fresh, step)[1].x[0, :, 0]))

    assert order(0, 0) == order(0, 0)
    assert len({order(0, 0), order(0, 1), order(1, 0)}) == 3


def test_a_buffer_of_one_batch_mixes_it_with_the_fresh_one():
    slots, fresh = jnp.zeros((1, V, 8, 1)), Activations(jnp.ones((1, 8 * V, 1)), jnp.ones(8 * V, bool))
    mixer, out = make_exchange(0)(Mixer(slots, jnp.ones((V, 8), bool)), fresh, 0)
    assert 0.3 < out.x.mean() < 0.7
    np.testing.assert_array_equal(mixer.x.sum(axis=2)[0, :, 0] + out.x.reshape(V, 8).sum(axis=1), np.full(V, 8))


@pytest.fixture(scope="module")
def backbone(tiny_release):
    return load_backbone(tiny_release / "model", dtype="float32")


def rows(seed, count=4, t=12):
    rng = np.random.default_rng(seed)
    mask = np.arange(t) < rng.integers(5, t + 1, (count, 1))
    segments = np.where(mask, 1 + (np.arange(t) >= 4), 0).astype(np.int32)
    return Filled(rng.integers(0, 320, (count, t)).astype(np.int32), mask, segments)


def test_collected_are_the_outputs_of_layers(backbone):
    data = rows(0)
    x, mask = make_collect(backbone.config, (0, 1))(backbone.params, *place_rows(data, None))
    found = forward(
        backbone.params, backbone.config, data.tokens, mask=data.mask, segment_ids=data.segment_ids, capture=(0, 1)
    )
    real = data.mask.reshape(-1)
    np.testing.assert_array_equal(mask, real)
    expected = np.asarray(found.captured).reshape(2, -1, 16)
    np.testing.assert_allclose(x[:, real], expected[:, real], rtol=1e-6, atol=1e-6)


def test_norms_are_those_of_all_tokens_but_sinks():
    """Against float64, over batches of which one holds most sinks; what padding holds is not seen."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, L, 40, D)) * np.array([1, 5])[:, None, None] + np.array([[[4.0]], [[-9.0]]])
    mask = rng.random((3, 40)) < 0.8
    x[:, :, 7] *= 200  # padding in some
    x[0, 1, 3:6] *= 1000
    x[~np.broadcast_to(mask[:, None], x.shape[:3])] = np.nan
    given = [Activations(jnp.asarray(part, jnp.float32), jnp.asarray(real)) for part, real in zip(x, mask, strict=True)]
    found = measure_norms(lambda _, number: given[number], {}, ((number,) for number in range(3)))
    x = x.astype(np.float32)
    for layer in range(L):
        real = x[:, layer][mask].astype(np.float64)
        norms = np.linalg.norm(real, axis=1)
        sink = 10 * np.median(norms)
        kept = real[norms <= sink]
        assert len(kept) < len(real)
        np.testing.assert_allclose(found.sink[layer], sink, rtol=1e-6)
        np.testing.assert_allclose(found.mean[layer], kept.mean(axis=0), rtol=1e-5)
        np.testing.assert_allclose(found.scale[layer], np.sqrt(kept.var(axis=0).mean()), rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "mask", "error"),
    [(np.nan, True, FloatingPointError), (np.inf, True, FloatingPointError), (1.0, False, ValueError)],
)
def test_norms_of_nothing_or_of_something_not_finite_are_refused(value, mask, error):
    given = Activations(jnp.full((L, 4, D), value), jnp.full(4, mask))
    with pytest.raises(error, match="finite"):
        measure_norms(lambda _, number: given, {}, [(0,)])


def test_a_process_reads_the_places_of_its_own_devices_wherever_they_are():
    def mesh(*processes):
        devices = np.array([[SimpleNamespace(process_index=p)] for p in processes])
        return SimpleNamespace(devices=devices, shape={"data": len(processes), "model": 1})

    assert own_part(None, 3) == (0, 1, 2)
    assert own_part(mesh(0, 1, 1, 0), 8) == (0, 1, 6, 7)
    assert own_part(mesh(1, 0, 1), 3) == (1,)
