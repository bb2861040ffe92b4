"""Steering changes what its formulas say, where its rules say, and nothing else, without ever recompiling."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.forward import forward
from qscope_jax.sae.model import encode, to_dense
from qscope_jax.steering import MODES, Applied, Steer, count_applied, steer
from qscope_jax.taps import chain
from tests.backbone.families import QUICK
from tests.steering.conftest import LATENTS, LAYERS, LENGTHS, NEW, PROMPT, RULES, WIDTH, make_sae
from tests.steering.reference import steer_layer

POSITIONS = np.maximum(np.arange(PROMPT + NEW) - (PROMPT - np.array(LENGTHS)[:, None]), 0)
STRENGTHS = {"add": 1.7, "clamp": 20.0, "min-clamp": 30.0, "ablate": None, "scale": -0.7, "project": 3.1}


def entry(mode, layer=1, feature=None, **options):
    return Steer(layer, often(layer) if feature is None else feature, STRENGTHS[mode], mode, **options)


def often(layer):
    """A feature of the random SAEs that fires on some of the tokens, by `test_the_chosen_features_fire_sometimes`."""
    return (6, 11, 18, 5)[layer]


def spread(make):
    """One recipe per row, each with another position rule."""
    return [[replace(item, positions=rule) for item in make] for rule in RULES]


def codes(model, plain, layer):
    return np.asarray(to_dense(encode(model.saes[layer], plain.captured[layer]), LATENTS))


def check_layer(model, plain, out, rows, layer, rtol=1e-5):
    """The output of `layer`, the first that is steered, against the reference; and the counts."""
    expected, moved = steer_layer(plain.captured[layer], rows, layer, model.saes, POSITIONS, LENGTHS, model.mask)
    scale = np.abs(expected[model.mask]).max()
    np.testing.assert_allclose(out.captured[layer][model.mask], expected[model.mask], rtol=rtol, atol=rtol * scale)
    np.testing.assert_array_equal(out.captured[layer][~moved], plain.captured[layer][~moved])
    return moved


def test_the_chosen_features_fire_sometimes(model, plain):
    for layer in range(LAYERS):
        rate = (codes(model, plain, layer)[model.mask][:, often(layer)] > 0).mean()
        assert 0.2 < rate < 0.8, f"layer {layer}: the feature fires on {rate:.2f} of the tokens"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_position_rule_does_what_its_formula_says(model, observe, plain, mode):
    rows = spread([entry(mode)])
    out = observe(steer(rows, model.saes))
    np.testing.assert_array_equal(out.captured[0], plain.captured[0])
    moved = check_layer(model, plain, out, rows, 1)
    applied = count_applied(out.taps)
    np.testing.assert_array_equal(applied.changed[:, 0], moved.sum(axis=1))
    total = np.array(LENGTHS) + NEW
    selected = [total[0], LENGTHS[1], NEW, 1, 1, min(3, total[5] - 1), 2 + max(min(total[6], 9) - 4, 0)]
    np.testing.assert_array_equal(applied.selected[:, 0], selected)
    assert moved.any()
    assert not np.allclose(out.captured[3][moved], plain.captured[3][moved])  # and it flows on


@pytest.mark.parametrize("mode", MODES)
def test_norms_are_preserved_where_asked(model, observe, plain, mode):
    rows = spread([entry(mode, preserve_norm=True)])
    out = observe(steer(rows, model.saes))
    moved = check_layer(model, plain, out, rows, 1)
    norms = [np.linalg.norm(run.captured[1][moved], axis=-1) for run in (plain, out)]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)
    assert not np.allclose(out.captured[1][moved], plain.captured[1][moved])


def test_order_never_matters(model, observe, plain):
    entries = [
        entry("add"),
        Steer(1, 21, 25.0, "min-clamp", positions="generated"),
        Steer(1, 1, 0.9, "project", preserve_norm=True),
        Steer(1, direction=np.linspace(-1, 1, WIDTH), strength=0.8, positions="2-9"),
    ]
    orders = [entries, entries[::-1], [entries[i] for i in (2, 0, 3, 1)]]
    outs = [observe(steer(order, model.saes)) for order in orders]
    check_layer(model, plain, outs[0], [entries] * model.rows, 1)
    for order, out in zip(orders[1:], outs[1:], strict=True):
        np.testing.assert_array_equal(out.logits, outs[0].logits)
        places = [entries.index(item) for item in order]  # counts stand in the order given
        for counts, first in zip(out.taps, outs[0].taps, strict=True):
            np.testing.assert_array_equal(counts, first[..., places])


def test_several_layers_are_steered_at_once(model, observe, plain):
    entries = [entry("clamp", 1), entry("add", 2), entry("scale", 3), entry("project", 3), entry("ablate", 2)]
    out, rows = observe(steer(entries, model.saes)), [entries] * model.rows
    check_layer(model, plain, out, rows, 1)
    for layer in (2, 3):  # what comes into these layers has been steered: stop before each
        before = observe(steer([e for e in entries if e.layer < layer], model.saes))
        check_layer(model, before, out, rows, layer)
    per_layer = np.asarray(out.taps.selected).sum(axis=1)
    np.testing.assert_array_equal(per_layer > 0, [[e.layer == layer for e in entries] for layer in range(LAYERS)])


@pytest.mark.parametrize("preserve", [False, True])
def test_identities_leave_every_bit(model, observe, plain, preserve):
    identities = {
        "add 0": Steer(1, 11, 0.0, preserve_norm=preserve),
        "scale 1": Steer(1, 11, 1.0, "scale", preserve_norm=preserve),
        "min-clamp below": Steer(1, 11, -0.5, "min-clamp", preserve_norm=preserve),
        "min-clamp at 0": Steer(1, 11, 0.0, "min-clamp", preserve_norm=preserve),
    }
    for name, identity in identities.items():
        out = observe(steer([identity], model.saes))
        np.testing.assert_array_equal(out.captured, plain.captured, err_msg=name)
        np.testing.assert_array_equal(out.logits, plain.logits, err_msg=name)
        applied = count_applied(out.taps)
        np.testing.assert_array_equal(applied.selected[:, 0], model.mask.sum(axis=1))
        assert not applied.changed.any()


def test_taking_away_a_feature_that_does_not_fire_leaves_every_bit(model, observe, plain):
    silent = make_sae(1)
    silent = silent._replace(params=silent.params._replace(b_enc=silent.params.b_enc.at[4].set(-1e4)))
    out = observe(steer([Steer(1, 4, mode="ablate")], model.saes | {1: silent}))
    np.testing.assert_array_equal(out.captured, plain.captured)
    assert count_applied(out.taps).selected.sum() == model.mask.sum()


@pytest.mark.parametrize("empty", [[], [[]] * len(LENGTHS)])
def test_an_empty_recipe_leaves_every_bit(model, observe, plain, empty):
    out = observe(steer(empty, model.saes))
    np.testing.assert_array_equal(out.captured, plain.captured)
    np.testing.assert_array_equal(out.logits, plain.logits)
    assert count_applied(out.taps).selected.shape == (model.rows, 0)


def test_clamping_to_0_is_ablation(model, observe):
    outs = [observe(steer([item], model.saes)) for item in (Steer(1, 11, 0.0, "clamp"), Steer(1, 11, mode="ablate"))]
    np.testing.assert_array_equal(outs[0].captured, outs[1].captured)
    np.testing.assert_array_equal(*(count_applied(out.taps).selected for out in outs))
    # Where the feature does not fire, a clamp to 0 changes nothing either.
    np.testing.assert_array_equal(*(count_applied(out.taps).changed for out in outs))


def test_pads_keep_every_bit_and_are_never_counted(model, observe, plain):
    out = observe(steer([entry("add", 0)], model.saes))
    np.testing.assert_array_equal(out.captured[0][~model.mask], plain.captured[0][~model.mask])
    np.testing.assert_array_equal(count_applied(out.taps).selected[:, 0], model.mask.sum(axis=1))


def test_rows_are_steered_as_if_each_ran_alone(model, observe, run, plain):
    rows = [
        [], [entry("add")], [entry("clamp")], [entry("project", 3)], [entry("scale")], [entry("ablate")],
        [entry("min-clamp", preserve_norm=True), entry("add", 3)],
    ]  # fmt: skip
    out = observe(steer(rows, model.saes))
    np.testing.assert_array_equal(out.logits[0], plain.logits[0])  # an empty row beside steered ones
    for b in (1, 2, 3, 4, 5, 6):
        lengths = jnp.asarray(LENGTHS[b : b + 1])
        inputs = {"tokens": model.tokens[b : b + 1], "mask": model.mask[b : b + 1], "prompt_lengths": lengths}
        alone = run(model.params, model.config, tap=steer(rows[b], model.saes), **inputs)
        real = model.mask[b]
        np.testing.assert_allclose(out.logits[b][real], alone.logits[0][real], rtol=1e-5, atol=1e-5)
        one, every = count_applied(alone.taps), count_applied(out.taps)
        np.testing.assert_array_equal(every.changed[b, : len(rows[b])], one.changed[0])
        assert not every.selected[b, len(rows[b]) :].any()


def decode(model, run, tap, rows=slice(None)):
    """Prefill, then one token at a time with a cache: logits [b, t, v] and the tap's outputs of every call."""
    tokens, mask, lengths = model.tokens[rows], model.mask[rows], jnp.asarray(LENGTHS)[rows]
    cache = init_cache(model.config, len(tokens), PROMPT + NEW)
    out = run(model.params, model.config, tokens[:, :PROMPT], mask=mask[:, :PROMPT], cache=cache, tap=tap)
    logits, applied = [out.logits], [out.taps]
    for t in range(PROMPT, PROMPT + NEW):
        one = {"mask": mask[:, t : t + 1], "prompt_lengths": lengths}
        out = run(model.params, model.config, tokens[:, t : t + 1], cache=out.cache, tap=tap, **one)
        logits.append(out.logits)
        applied.append(out.taps)
    return np.concatenate(logits, axis=1), applied


@pytest.mark.parametrize("mode", MODES)
def test_every_decoded_token_is_steered_as_in_one_pass(model, run, observe, mode):
    tap = steer(spread([entry(mode)]), model.saes)
    logits, applied = decode(model, run, tap)
    once = observe(tap)
    np.testing.assert_allclose(logits[model.mask], once.logits[model.mask], rtol=1e-4, atol=1e-4)
    for name in Applied._fields:
        np.testing.assert_array_equal(getattr(count_applied(*applied), name), getattr(count_applied(once.taps), name))
    generated = count_applied(*applied[1:])
    assert generated.selected[RULES.index("all")] == generated.selected[RULES.index("generated")] == NEW
    assert generated.selected[RULES.index("prompt")] == generated.selected[RULES.index("last")] == 0


def test_parameters_are_untouched(model, observe):
    before = jax.tree.map(np.array, (model.params, model.saes))
    observe(steer([entry("clamp"), entry("add", 2)], model.saes))
    jax.tree.map(np.testing.assert_array_equal, before, (model.params, model.saes))


def test_nothing_about_a_recipe_recompiles(model):
    traces = []

    @partial(jax.jit, compiler_options=QUICK)
    def counted(tap, tokens, mask, lengths):
        traces.append(1)
        return forward(model.params, model.config, tokens, mask=mask, tap=tap, prompt_lengths=lengths).logits

    def go(recipes, shift=0):
        tap = steer(recipes, {layer: make_sae(layer, seed=shift) for layer in model.saes})
        return counted(tap, (model.tokens + shift) % 48, model.mask, jnp.asarray(LENGTHS) + shift)

    first = go([entry("clamp"), entry("add", 2)])
    second = go([entry("ablate", 3, feature=2), Steer(0, 7, -9.0, positions="generated", preserve_norm=True)], 1)
    assert len(traces) == 1
    for mode in ("clamp", "min-clamp", "ablate", "scale"):
        for rule in RULES:
            go([entry(mode, 0, feature=3, positions=rule), Steer(0, 5, 0.3, "project")], 1)
    assert len(traces) == 1
    assert not np.allclose(first, second)
    go([Steer(0, 7, 1.0), Steer(1, 7, 1.0)])  # no activation is read: another program
    go([Steer(3, 1, 2.0, "project"), Steer(1, direction=np.ones(WIDTH), strength=1.0)])
    assert len(traces) == 2
    rows = [[Steer(2, 1, float(s))] for s in range(model.rows)]
    go(rows)
    go([[Steer(1, 4, 1.0, "project")], *([] for _ in rows[1:])])
    assert len(traces) == 3


def test_a_steered_stream_in_bfloat16_is_changed_in_float32(model, run):
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model.params)
    rows = [[entry(mode)] for mode in (*MODES, "add")]
    inputs = {"tokens": model.tokens, "mask": model.mask, "prompt_lengths": jnp.asarray(LENGTHS), "capture": (1,)}
    plain, out = (run(half, model.config, tap=tap, **inputs) for tap in (None, steer(rows, model.saes)))
    assert out.captured.dtype == jnp.bfloat16
    h = np.asarray(plain.captured[0], np.float32)
    expected, moved = steer_layer(h, rows, 1, model.saes, POSITIONS, LENGTHS, model.mask)
    rounded = np.asarray(jnp.asarray(expected, jnp.float32).astype(jnp.bfloat16), np.float32)
    found = np.asarray(out.captured[0], np.float32)
    # At most one rounding: where the two sums lie on two sides of a border, they round apart.
    np.testing.assert_allclose(found[moved], rounded[moved], rtol=2**-7, atol=1e-6)
    assert (found == rounded).mean() > 0.99
    np.testing.assert_array_equal(found[~moved], h[~moved])


def test_it_can_be_chained_with_other_taps(model, observe):
    first, second = steer([entry("add")], model.saes), steer([entry("scale", 2)], model.saes)
    out = observe(chain(first, second))
    both = observe(steer([entry("add"), entry("scale", 2)], model.saes))
    np.testing.assert_allclose(out.logits[model.mask], both.logits[model.mask], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        [count_applied(part).changed[:, 0].sum() for part in out.taps], count_applied(both.taps).changed.sum(axis=0)
    )
