"""The extract step: codes of the true residual stream, whatever the batch, and one compilation per batch shape."""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data import batches
from qscope_jax.data.batches import Buckets, cut_documents, plan_batches
from qscope_jax.extract import check_sae, extract_documents, feed_batches, make_extract_step, measure_sinks, stream
from qscope_jax.mesh import make_mesh, sharding
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import AXES, SaeConfig, SaeParams, encode, init_sae
from tests.backbone.families import VOCAB, make_config, make_params

pytestmark = pytest.mark.usefixtures("compiled_once")
LENGTHS = (5, 30, 1, 5, 14, 30, 14)


@pytest.fixture(scope="module")
def backbone(tiny_release):
    return load_backbone(tiny_release / "model", dtype="float32")


@pytest.fixture(scope="module")
def saes(tiny_release):
    return load_saes(tiny_release / "sae", (0, 1), dtype="float32")


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 300, n).astype(np.uint32) for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(backbone, saes, documents):
    """What each document gives by itself, unpadded: layer -> (values, indices), and norms."""
    layers = tuple(saes)

    @jax.jit
    def look(tokens):
        residual = forward(backbone.params, backbone.config, tokens, capture=layers).captured[:, 0]
        codes = [encode(saes[layer], x) for layer, x in zip(layers, residual, strict=True)]
        return list(zip(codes, jnp.linalg.norm(residual, axis=-1), strict=True))

    return [look(document[None].astype(np.int32)) for document in documents]


def assert_same_codes(found, expected):
    """Equal up to rounding: values close, and indices equal except where values tie within rounding."""
    np.testing.assert_allclose(found.values, expected.values, rtol=2e-4, atol=2e-5)
    differ = np.asarray(found.indices) != np.asarray(expected.indices)
    assert differ.mean() < 0.01
    assert differ[..., 0].sum() == 0


@pytest.mark.slow
@pytest.mark.parametrize(("batch_tokens", "shared"), [(64, ()), (256, ()), (64, (64,)), (256, (64,)), (256, (128,))])
def test_batches_of_any_composition_give_what_each_document_gives_alone(
    backbone, saes, documents, alone, monkeypatch, batch_tokens, shared
):
    monkeypatch.setattr(batches, "_SHARED", shared)
    documents, alone = 3 * documents, 3 * alone
    plan = plan_batches(np.array(3 * LENGTHS), Buckets(batch_tokens, 64))
    assert bool(sum(batch.sharing for batch in plan)) == bool(shared)
    found = extract_documents(backbone, saes, documents, batch_tokens=batch_tokens, max_length=64)
    for document, codes, expected in zip(documents, found, alone, strict=True):
        np.testing.assert_array_equal(codes.tokens, document)
        for layer in (0, 1):
            assert_same_codes(codes.codes[layer], expected[layer][0])
            np.testing.assert_allclose(codes.norms[layer], expected[layer][1], rtol=1e-4)


def assert_codes_of_one_device(backbone, saes, spread, sharded, documents):
    """Values equal up to rounding, and so do indices where the k-th value is clear of the next."""
    step = make_extract_step(backbone.config, tuple(saes))
    found = extract_documents(spread, sharded, documents, batch_tokens=64, max_length=64, step=step)
    assert step.compilations == len(set(step.shapes))
    # One more latent tells what the next value is.
    more = {n: sae._replace(config=dataclasses.replace(sae.config, k=sae.config.k + 1)) for n, sae in saes.items()}
    expected = extract_documents(backbone, more, documents, batch_tokens=64, max_length=64)
    clear = []
    for a, b in itertools.product(range(len(documents)), saes):
        np.testing.assert_allclose(found[a].norms[b], expected[a].norms[b], rtol=1e-5)
        one, other = found[a].codes[b], expected[a].codes[b]
        np.testing.assert_allclose(one.values, other.values[:, :-1], rtol=1e-4, atol=1e-5)
        clear.append(other.values[:, -2] - other.values[:, -1] > 1e-4)
        chosen, wanted = (np.sort(indices[clear[-1]], axis=1) for indices in (one.indices, other.indices[:, :-1]))
        np.testing.assert_array_equal(chosen, wanted)
    assert np.concatenate(clear).mean() > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(8, 1), (4, 2), (1, 2)], ids=str)
def test_a_mesh_gives_the_codes_of_one_device(tiny_release, backbone, saes, documents, shape):
    mesh = make_mesh(*shape, devices=jax.devices()[: math.prod(shape)])
    spread = load_backbone(tiny_release / "model", dtype="float32", mesh=mesh)
    sharded = load_saes(tiny_release / "sae", (0, 1), mesh=mesh)
    assert_codes_of_one_device(backbone, saes, spread, sharded, documents * 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
def test_experts_and_delta_rule_on_a_mesh_give_the_codes_of_one_device(family):
    config, mesh = make_config(family, num_hidden_layers=4), make_mesh(4, 2)
    backbone = Backbone(config, make_params(config))
    sae = init_sae(jax.random.key(0), SaeConfig(config.hidden_size, 64, k=4))
    places = jax.tree.map(lambda leaf: leaf.sharding, parameter_shapes(config, mesh=mesh))
    spread = Backbone(config, jax.device_put(backbone.params, places))
    weights = (jax.device_put(a, sharding(AXES[n], a.shape, mesh)) for n, a in sae.params._asdict().items())
    sharded = sae._replace(params=SaeParams(*weights))
    rng = np.random.default_rng(1)
    documents = [rng.integers(0, VOCAB, n).astype(np.uint32) for n in (*LENGTHS, 64, 60)]
    assert_codes_of_one_device(backbone, {3: sae}, spread, {3: sharded}, documents)


def test_codes_are_sorted_and_never_negative(backbone, saes, documents):
    for codes in extract_documents(backbone, saes, documents[:3], max_length=64):
        for code in codes.codes.values():
            assert (code.values >= 0).all()
            assert (np.diff(code.values, axis=-1) <= 0).all()


def test_windows_join_to_the_whole_document(backbone, saes, documents, alone):
    (found,) = extract_documents(backbone, saes, documents[1:2], max_length=16, long="window")
    np.testing.assert_array_equal(found.tokens, documents[1])
    first = found.codes[1].values[:16]
    np.testing.assert_allclose(first, alone[1][1][0].values[:16], rtol=2e-4, atol=2e-5)
    (cut,) = extract_documents(backbone, saes, documents[1:2], max_length=16)
    assert len(cut.tokens) == 16


def test_the_step_is_compiled_once_per_shape(backbone, saes, documents):
    step = make_extract_step(backbone.config, (0, 1))
    segments = cut_documents(documents * 8, 64)
    plan = plan_batches(segments.lengths, Buckets(64, 64, 1))
    for _ in range(2):
        assert len(list(stream(step, backbone.params, tuple(saes.values()), feed_batches(plan, segments)))) == len(plan)
    assert step.compilations == len(step.shapes) == len(set(step.shapes))
    assert set(step.shapes) == {(batch.size, batch.length) for batch in plan}
    assert step.compilations < len(plan)


def test_results_arrive_in_the_order_of_the_feed(backbone, saes, documents):
    step = make_extract_step(backbone.config, (0, 1))
    segments = cut_documents(documents * 8, 64)
    plan = plan_batches(segments.lengths, Buckets(64, 64, 1))
    feed = feed_batches(plan, segments)
    keys = [batch for batch, _ in stream(step, backbone.params, tuple(saes.values()), feed, ahead=3)]
    assert [id(key) for key in keys] == [id(batch) for batch in plan]


def test_weights_that_overflow_are_named_and_give_no_number(backbone, saes, documents):
    broken = backbone._replace(params=jax.tree.map(lambda a: a * np.float32(1e30), backbone.params))
    with pytest.raises(FloatingPointError, match=r"not finite at layers \[0, 1\]"):
        extract_documents(broken, saes, documents[:1], max_length=64)


def test_sink_threshold_is_ten_times_the_median_norm_of_the_first_tokens(backbone, saes, documents, alone):
    step = make_extract_step(backbone.config, (0, 1))
    found = measure_sinks(step, backbone.params, tuple(saes.values()), documents, Buckets(64, 64, 1))
    for layer in (0, 1):
        norms = np.concatenate([expected[layer][1] for expected in alone])
        assert found[layer] == pytest.approx(10 * np.median(norms), rel=1e-4)


def test_layers_and_widths_that_do_not_fit_are_refused(backbone, saes, documents):
    for layers in ((), (0, 0), (2,), (-1,)):
        with pytest.raises(ValueError, match=r"among 0\.\.1"):
            make_extract_step(backbone.config, layers)
    with pytest.raises(ValueError, match="reads vectors of 8, the model's residual stream has 16"):
        check_sae(backbone.config, 0, SaeConfig(d_model=8, d_sae=32, k=2))
    with pytest.raises(ValueError, match="an SAE of layer 7"):
        check_sae(backbone.config, 7, SaeConfig(d_model=16, d_sae=32, k=2))
    with pytest.raises(ValueError, match="token id 320 lies outside"):
        extract_documents(backbone, saes, [np.array([320], np.uint32)], max_length=64)
    with pytest.raises(ValueError, match="expected 1 to 64"):
        extract_documents(backbone, saes, [np.zeros(0, np.uint32)], max_length=64)
    assert extract_documents(backbone, saes, []) == []
