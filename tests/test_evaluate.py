"""SAEs evaluated on a model: every number equals a plain computation, and exact, empty and masked cases are exact."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.batches import Filled
from qscope_jax.evaluate import evaluate_saes, make_eval_step, summarize_evaluation
from qscope_jax.mesh import make_mesh
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, decode, encode, init_sae
from qscope_jax.splice import run_clean
from qscope_jax.taps import Tap

D, F, B, T, LAYERS = 16, 64, 8, 12, 2
LN_VOCABULARY = np.log(320)


@pytest.fixture(scope="module")
def backbone(tiny_release):
    return load_backbone(tiny_release / "model", dtype="float32")


@pytest.fixture(scope="module")
def saes(tiny_release):
    return load_saes(tiny_release / "sae")


@pytest.fixture(scope="module")
def batches():
    """Two batches of rows with one or two documents and pads behind them, everything at random."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2):
        cut, end = rng.integers(2, 6, (B, 1)), rng.integers(7, T + 1, (B, 1))
        columns = np.arange(T)[None]
        tokens = np.where(columns < end, rng.integers(0, 303, (B, T)), 0).astype(np.int32)
        found.append(Filled(tokens, columns < end, (columns >= cut).astype(np.int32)))
    return found


@pytest.fixture(scope="module")
def residuals(backbone, batches):
    """Raw outputs of both layers [batch, layer, b, t, d]."""
    run = jax.jit(lambda p, t, m, s: forward(p, backbone.config, t, mask=m, segment_ids=s, capture=(0, 1)).captured)
    return np.stack([run(backbone.params, *batch) for batch in batches])


@pytest.fixture(scope="module")
def thresholds(residuals, batches):
    """Of these, about one token in eight is a sink."""
    real = np.stack([batch.mask for batch in batches])
    norms = np.linalg.norm(residuals, axis=-1).swapaxes(1, 2).swapaxes(2, 3)[real]
    return {layer: float(np.quantile(norms[:, layer], 7 / 8)) for layer in range(LAYERS)}


def identity(k=2 * D):
    """An SAE that gives every vector back, with two latents for each axis, one for its negative part."""
    eye, zero = jnp.eye(D), jnp.zeros
    params = SaeParams(jnp.concatenate([eye, -eye], 1), zero(2 * D), jnp.concatenate([eye, -eye]), zero(D))
    return Sae(params, SaeConfig(D, 2 * D, k))


def log_probabilities(backbone, batch, tap=None):
    """[b, t, v] in float64, from all logits at once."""
    logits = jax.jit(forward, static_argnums=1)(
        backbone.params, backbone.config, batch.tokens, mask=batch.mask, segment_ids=batch.segment_ids, tap=tap
    ).logits
    logits = np.asarray(logits, np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def put(h, new, shared, ctx):
    """A tap that replaces the residual stream of a layer by what the test made of it, wherever that is finite."""
    return jnp.where(jnp.isnan(new), h, new), ()


def predicted(backbone, batch, layer, replacement, keep):
    """Sums over positions with a next token of their document: cross-entropy clean, replaced, KL, and their number."""
    stream = np.full((LAYERS, B, T, D), np.nan, np.float32)
    stream[layer] = np.where(keep[..., None], replacement, np.nan)
    clean, changed = log_probabilities(backbone, batch), log_probabilities(backbone, batch, Tap(put, stream))
    ids, real = batch.segment_ids, batch.mask
    where = real[:, :-1] & real[:, 1:] & (ids[:, :-1] == ids[:, 1:])
    entropy = lambda p: -np.take_along_axis(p[:, :-1], batch.tokens[:, 1:, None], -1)[where].sum()  # noqa: E731
    kl = (np.exp(clean) * (clean - changed)).sum(axis=-1)[:, :-1][where].sum()
    return np.array([entropy(clean), entropy(changed), kl, where.sum()])


@pytest.fixture(scope="module")
def step(backbone, saes):
    return make_eval_step(backbone.config, {n: sae.config for n, sae in saes.items()})


@pytest.fixture(scope="module")
def found(backbone, saes, batches, thresholds, step):
    return evaluate_saes(backbone, saes, batches, sink_thresholds=thresholds, step=step)


def test_layers_share_their_programs_and_only_new_shapes_compile(found, backbone, saes, batches, thresholds, step):
    assert sorted(part for part, _ in step.traces) == ["clean", f"fold {F} 4", "swap"]
    other = {n: Sae(sae.params, dataclasses.replace(sae.config, layer=9, source="x")) for n, sae in saes.items()}
    evaluate_saes(backbone, other, batches, sink_thresholds={0: 1e9, 1: 1e9}, step=step)
    assert step.compilations == 3
    narrow = [Filled(*(array[:, :9] for array in batch)) for batch in batches]
    evaluate_saes(backbone, saes, narrow, sink_thresholds=thresholds, predict_tokens=0, step=step)
    assert step.compilations == 5


@pytest.mark.parametrize("layer", range(LAYERS))
def test_every_number_equals_a_plain_computation(found, backbone, saes, batches, residuals, thresholds, layer):
    real = np.stack([batch.mask for batch in batches])
    x = residuals[:, layer]
    keep = real & (np.linalg.norm(x, axis=-1) <= thresholds[layer])
    code = jax.jit(encode)(saes[layer], x)
    x_hat = np.asarray(decode(saes[layer], code))
    metrics, (a, b) = found[layer], (x[keep].astype(np.float64), x_hat[keep].astype(np.float64))
    zero = sum(
        predicted(backbone, *each, np.zeros_like(x[0]), k) for *each, k in zip(batches, [layer] * 2, keep, strict=True)
    )
    spliced = sum(predicted(backbone, batches[i], layer, x_hat[i], keep[i]) for i in range(2))
    tokens = spliced[3]
    expected = {
        "fvu": np.square(a - b).sum() / np.square(a - a.mean(axis=0)).sum(),
        "l0": (np.asarray(code.values)[keep] > 0).sum() / keep.sum(),
        "cosine": ((a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).mean(),
        "tokens": keep.sum(),
        "sink_fraction": 1 - keep.sum() / real.sum(),
        "pad_fraction": 1 - real.mean(),
        "sink_threshold": thresholds[layer],
        "predicted_tokens": tokens,
        "ce_clean": spliced[0] / tokens,
        "ce_spliced": spliced[1] / tokens,
        "ce_zero": zero[1] / tokens,
        "ce_recovered": (zero[1] - spliced[1]) / (zero[1] - spliced[0]),
        "kl": spliced[2] / tokens,
        "kl_zero": zero[2] / tokens,
    }
    assert 0.05 < metrics["sink_fraction"] < 0.2
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert metrics["decoder"]["norm"]["max"] == pytest.approx(1, rel=1e-5)
    assert metrics["cofiring"]["latents"] == F
    assert sum(metrics["density"]["latents"]) + metrics["density"]["never"] == F


def test_an_sae_that_gives_everything_back_costs_nothing_and_an_empty_one_everything(backbone, batches, step):
    both = {0: identity(), 1: Sae(jax.tree.map(jnp.zeros_like, identity().params), identity().config)}
    metrics = evaluate_saes(backbone, both, batches, sink_thresholds={0: np.inf, 1: np.inf}, step=step)
    assert metrics[0]["fvu"] == 0
    assert metrics[0]["cosine"] == pytest.approx(1, abs=1e-6)
    assert metrics[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert metrics[0]["ce_recovered"] == pytest.approx(1, abs=1e-6)
    assert metrics[1]["ce_recovered"] == 0
    assert metrics[1]["dead_fraction"] == 1
    assert metrics[1]["ce_spliced"] == pytest.approx(LN_VOCABULARY)  # zeros go through every layer as zeros
    assert metrics[1]["sink_threshold"] is None


def test_what_stands_at_pads_changes_nothing(found, backbone, saes, batches, thresholds, step):
    junk = np.random.default_rng(5).integers(0, 320, (B, T)).astype(np.int32)
    other = [batch._replace(tokens=np.where(batch.mask, batch.tokens, junk)) for batch in batches]
    assert evaluate_saes(backbone, saes, other, sink_thresholds=thresholds, step=step) == found


def test_sinks_and_pads_keep_their_own_residual(backbone, saes, batches, step):
    # Every token is a sink: nothing is replaced, so nothing is lost, and nothing counts for the FVU.
    args = backbone.params, saes, {0: 1e-9, 1: 1e-9}
    state = step(*args, step.start(*args, batches[0]), batches[0])
    assert state.layers[1].zeroed.kl.high == 0
    assert state.layers[1].zeroed.cross_entropy.high == pytest.approx(float(state.clean.high), rel=1e-6)
    with pytest.raises(ValueError, match="no token counted"):
        summarize_evaluation(state, *args[1:])


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device(found, backbone, batches, thresholds, tiny_release):
    mesh = make_mesh(4, 2)
    sharded = load_backbone(tiny_release / "model", dtype="float32", mesh=mesh)
    saes = load_saes(tiny_release / "sae", mesh=mesh)
    step = make_eval_step(sharded.config, {n: sae.config for n, sae in saes.items()})
    other = evaluate_saes(sharded, saes, batches, sink_thresholds=thresholds, step=step)
    assert step.compilations == 3
    for layer, metrics in found.items():
        for name, value in metrics.items():
            if isinstance(value, float):
                assert other[layer][name] == pytest.approx(value, rel=1e-4), name
        assert other[layer]["density"] == metrics["density"]
        assert other[layer]["cofiring"]["mean_jaccard"] == pytest.approx(metrics["cofiring"]["mean_jaccard"])


def test_cross_entropy_can_be_measured_on_the_first_batches_alone_or_not_at_all(
    found, backbone, saes, batches, thresholds, step
):
    options = {
        "sink_thresholds": thresholds,
        "step": make_eval_step(backbone.config, {n: s.config for n, s in saes.items()}),
    }
    none = evaluate_saes(backbone, saes, batches, predict_tokens=0, **options)
    assert (none[0]["predicted_tokens"], none[0]["ce_clean"], none[0]["ce_recovered"], none[0]["kl"]) == (
        0,
        None,
        None,
        None,
    )
    assert none[0]["fvu"] == found[0]["fvu"]
    one = evaluate_saes(backbone, saes, batches, predict_tokens=1, **options)
    alone = evaluate_saes(backbone, saes, batches[:1], **options)
    for name in ("predicted_tokens", "ce_clean", "ce_spliced", "ce_zero", "kl"):
        assert one[1][name] == alone[1][name]
    assert one[1]["tokens"] == found[1]["tokens"]


def test_where_nothing_is_predicted_no_logits_are_computed(backbone, batches):
    def logits(jaxpr, found=()):
        """The conditionals, from the outside in, around every operation that gives something for each id."""
        for equation in jaxpr.eqns:
            name = equation.primitive.name
            inner = (*found, *equation.params["branches"]) if name == "cond" else found
            if any(v.aval.shape[-1:] == (320,) and len(v.aval.shape) > 2 for v in equation.outvars):
                yield inner
            for part in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(part, "eqns") or hasattr(part, "jaxpr"):
                    yield from logits(getattr(part, "jaxpr", part), inner)

    run = lambda predict: run_clean(backbone.params, backbone.config, batches[0], (0, 1), predict)  # noqa: E731
    around = list(logits(jax.make_jaxpr(run)(True).jaxpr))
    assert around
    assert all(around)
    with_sums, without = jax.jit(run)(True), jax.jit(run)(False)
    assert with_sums.sums["tokens"] > 0
    assert without.sums == {"cross_entropy": 0, "tokens": 0}
    np.testing.assert_array_equal(without.hidden, with_sums.hidden)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        ("width", "reads vectors of 8, the model's residual stream has 16"),
        ("layer", "the model has the layers 0..1"),
        ("none", "no SAE to evaluate"),
        ("batches", "no text to evaluate on"),
        ("threshold", r"no sink threshold is known for layers \[0\]"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(backbone, saes, what, reason):
    chosen = {
        "width": {0: init_sae(jax.random.key(0), SaeConfig(8, 16, 2, sink_threshold=1.0))},
        "layer": {2: saes[0]},
        "none": {},
        "threshold": {0: saes[0], 1: Sae(saes[1].params, dataclasses.replace(saes[1].config, sink_threshold=5.0))},
    }.get(what, {0: saes[0]})
    with pytest.raises(ValueError, match=reason):
        evaluate_saes(backbone, chosen, [], sink_thresholds={0: 1.0} if what == "batches" else None)


def test_a_model_that_overflows_is_an_error_not_a_number(backbone, saes, batches, step):
    broken = backbone._replace(params={**backbone.params, "embed": backbone.params["embed"].at[7].set(np.inf)})
    sevens = batches[0]._replace(tokens=np.full((B, T), 7, np.int32))
    with pytest.raises(FloatingPointError, match=r"not finite at layers \[0, 1\]"):
        evaluate_saes(broken, saes, [sevens], sink_thresholds={0: np.inf, 1: np.inf}, step=step)
