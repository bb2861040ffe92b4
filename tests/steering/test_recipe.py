"""What a recipe may say; whatever could only be a mistake is refused by name, before anything runs."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.model import Sae
from qscope_jax.steering import MODES, Steer, steer
from qscope_jax.steering.positions import EVER, parse_positions
from tests.steering.conftest import LATENTS, LAYERS, WIDTH, FakeStats
from tests.steering.reference import chosen


def strengths(tap):
    """The raw strengths of a recipe's one row, in the order given."""
    entries = tap.shared.entries
    return np.asarray(entries.strength)[0][np.asarray(entries.slot)[0]]


@pytest.mark.parametrize(
    ("rule", "ranges"),
    [
        ("all", [(0, EVER, 0)]),
        ("prompt", [(-EVER, 0, 1)]),
        ("generated", [(0, EVER, 1)]),
        ("last", [(-1, 0, 1)]),
        ("5", [(5, 6, 0)]),
        ("3-7", [(3, 8, 0)]),
        ("0,2,5-8", [(0, 1, 0), (2, 3, 0), (5, 9, 0)]),
        ("5-8, 0-3,4, 7-9", [(0, 10, 0)]),
        ("last,generated", [(-1, 0, 1), (0, EVER, 1)]),
        ("4,4", [(4, 5, 0)]),
    ],
)
def test_position_rules_are_ranges(rule, ranges):
    assert list(parse_positions(rule)) == ranges
    for position in range(12):
        inside = any(low <= (position - 6 if end else position) < high for low, high, end in ranges)
        assert inside == chosen(rule.replace(" ", ""), position, 6)


@pytest.mark.parametrize(
    "rule", ["", "every", "7-3", "-1", "3-", "1,,2", "1;2", "0x3", "٣", "3000000000", 5, None, "1.5"]
)
def test_other_position_rules_are_refused(rule):
    with pytest.raises(ValueError, match=r"positions = .*(expected 'all', 'prompt', 'generated', 'last'|ends before)"):
        Steer(0, 1, 1.0, positions=rule)


def test_more_ranges_than_usual_get_a_wider_program(model):
    few, many = ",".join("02468"), ",".join(str(2 * i) for i in range(9))
    shape = lambda rule: steer([Steer(1, 2, 1.0, positions=rule)], model.saes).shared.entries.ranges.shape  # noqa: E731
    assert shape(few) == (1, 1, 8, 3)
    assert shape(many) == (1, 1, 16, 3)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"layer": -1}, "layer = -1; expected a whole number"),
        ({"layer": 1.0}, "layer = 1.0; expected a whole number"),
        ({"layer": True}, "layer = True; expected a whole number"),
        ({"feature": -3}, "feature = -3; expected a whole number"),
        ({"feature": "7"}, "feature = '7'; expected a whole number"),
        ({"feature": None}, "a feature .* or a direction"),
        ({"strength": np.nan}, "strength = nan; expected a finite number within"),
        ({"strength": -np.inf}, "strength = -inf; expected a finite number within"),
        ({"strength": 1e30}, r"strength = 1e\+30; expected a finite number within ±1e\+12"),
        ({"strength": "much"}, "strength = 'much'; expected a number"),
        ({"strength": True}, "strength = nan; expected a finite number"),
        ({"strength": None}, "mode 'add' needs a strength"),
        ({"mode": "set"}, "mode = 'set'; expected one of add, clamp, min-clamp, ablate, scale, project"),
        ({"units": "sigma"}, "units = 'sigma'; expected one of raw, xmax, xnorm"),
        ({"mode": "scale", "units": "xmax"}, "'scale' multiplies the activation and has no units"),
        ({"mode": "ablate"}, "'ablate' takes the feature away and has no strength"),
        ({"mode": "ablate", "strength": None, "units": "xmax"}, "'ablate' takes the feature away and has no strength"),
        ({"preserve_norm": "yes"}, "preserve_norm = 'yes'; expected True or False"),
        ({"feature": None, "direction": np.zeros(4)}, "direction is zero"),
        ({"feature": None, "direction": np.array([1, np.nan])}, "not finite"),
        ({"feature": None, "direction": np.ones((2, 4))}, r"direction has shape \(2, 4\); expected \[d\]"),
        ({"feature": None, "direction": np.ones(4), "mode": "clamp"}, "'clamp' reads the activation of a feature"),
        ({"feature": None, "direction": np.ones(4), "units": "xmax"}, "'xmax' are multiples of a feature's maximum"),
    ],
)
def test_an_entry_that_means_nothing_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Steer(**{"layer": 1, "feature": 2, "strength": 1.0} | fields)


def test_entries_are_values():
    assert Steer(np.int64(1), np.int32(2), np.float32(0.5)) == Steer(1, 2, 0.5)
    assert Steer(1, 2, 3) != Steer(1, 2, 3, positions="last")
    one, same, other = (Steer(1, direction=vector, strength=1.0) for vector in ([1.0, 2.0], np.array([1, 2]), [1, 3]))
    assert one == same != other
    assert len({one, same, other}) == 2
    assert Steer(4, 2, 1.0).hook == "model.layers.4"
    vector = np.ones(3)
    kept = Steer(1, direction=vector, strength=1.0)
    vector[0] = 9
    np.testing.assert_array_equal(kept.direction, [1, 1, 1])


def test_recipes_that_do_not_fit_are_refused(model):
    saes, fine = model.saes, Steer(1, 2, 1.0)
    without = {layer: saes[layer] for layer in (0, 2)}
    shifted = saes | {1: saes[2]}
    zero = saes[1].params._replace(w_dec=saes[1].params.w_dec.at[2].set(0))
    for recipes, given, says in [
        ([Steer(1, LATENTS, 1.0)], saes, f"feature {LATENTS} of layer 1: its SAE has the features 0..{LATENTS - 1}"),
        ([fine], without, r"feature 2 of layer 1: saes has the layers \[0, 2\]"),
        ([fine], {}, r"feature 2 of layer 1: saes has the layers \[\]"),
        ([fine], shifted, r"saes\[1\] is the SAE of layer 2"),
        ([Steer(LAYERS, direction=np.ones(WIDTH), strength=1.0)], saes, r"layer 4, but the layers are 0..3"),
        ([fine, Steer(1, 2, 9.0)], saes, "feature 2 is steered twice at layer 1 with mode 'add'"),
        ([[], [fine, Steer(1, 2, 9.0, positions="last")]], saes, "feature 2 is steered twice .* in row 1"),
        ([Steer(1, direction=np.ones(WIDTH), strength=s) for s in (1.0, 2.0)], saes, "the same direction .* twice"),
        ([fine], saes | {1: Sae(zero, saes[1].config)}, "layer 1, feature 2: its direction has the norm 0"),
        ([fine, Steer(1, direction=np.ones(5), strength=1.0)], saes, f"directions of {WIDTH} and of 5"),
    ]:
        with pytest.raises(ValueError, match=says):
            steer(recipes, given)
    for recipes in (fine, 3, None, [fine, [fine]], ["add"], [[fine, "add"]]):
        with pytest.raises(TypeError, match=r"expected a list of Steer|is no Steer"):
            steer(recipes, saes)


def test_the_same_feature_may_be_steered_in_other_ways_and_rows(model):
    steer([Steer(1, 2, 1.0), Steer(2, 2, 1.0), Steer(1, 3, 1.0), Steer(1, 2, 1.0, "clamp")], model.saes)
    steer([[Steer(1, 2, 1.0)], [Steer(1, 2, 2.0)]], model.saes)


def test_a_tap_for_another_model_is_refused_where_it_runs(model, observe):
    narrow = Steer(1, direction=np.ones(WIDTH + 4), strength=1.0)
    with pytest.raises(ValueError, match=f"directions of {WIDTH + 4}, the model's residual stream has {WIDTH}"):
        observe(steer([narrow], {}, num_layers=LAYERS))
    with pytest.raises(ValueError, match=r"per_layer.* its first axis must be the 4 layers of the model"):
        observe(steer([Steer(1, 2, 1.0)], {1: model.saes[1]}))
    with pytest.raises(ValueError, match="recipes for 3 rows, but the batch has 7"):
        observe(steer([[Steer(1, 2, 1.0)]] * 3, model.saes))


def test_units_are_multiples_of_what_was_measured(model):
    saes, maxima = model.saes, np.linspace(1, 40, LATENTS)
    stats = {1: FakeStats(maxima, 12.0)}
    d = np.asarray(saes[1].params.w_dec[2], np.float64)
    norm = np.linalg.norm(d)
    vector = np.full(WIDTH, 0.5)
    expected = {
        Steer(1, 2, -1.5): -1.5,
        Steer(1, 2, 0.5, "clamp", "xmax"): 0.5 * maxima[2],
        Steer(1, 2, 0.5, "min-clamp", "xnorm"): 0.5 * 12 / norm,
        Steer(1, 3, 2.0, "add", "xmax"): 2 * maxima[3],
        Steer(1, 2, 0.25, "add", "xnorm"): 0.25 * 12 / norm,
        Steer(1, 2, 0.25, "project", "raw"): 0.25,
        Steer(1, 3, 0.25, "project", "xnorm"): 3.0,
        Steer(1, 4, 0.25, "project", "xmax"): 0.25 * maxima[4] * np.linalg.norm(saes[1].params.w_dec[4]),
        Steer(1, 2, 3.0, "scale"): 3.0,
        Steer(1, 2, mode="ablate"): 0.0,
        Steer(1, direction=vector, strength=0.5, units="xnorm"): 0.5 * 12 / np.linalg.norm(vector),
        Steer(1, direction=vector, strength=0.5, units="xnorm", mode="project"): 6.0,
    }
    found = steer([[item] for item in expected], saes, stats=stats).shared.entries.strength[:, 0]
    np.testing.assert_allclose(found, list(expected.values()), rtol=1e-6)


def test_half_the_median_norm_is_half_the_median_norm(model, observe, plain):
    out = observe(steer([Steer(1, 2, 0.5, units="xnorm")], model.saes, stats={1: FakeStats(np.ones(LATENTS), 12.0)}))
    change = (out.captured[1] - plain.captured[1])[model.mask]
    np.testing.assert_allclose(np.linalg.norm(change, axis=-1), 6.0, rtol=1e-4)


def test_a_sink_threshold_knows_the_median_norm(model):
    params, config = model.saes[1]
    saes = model.saes | {1: Sae(params, replace(config, sink_threshold=120.0))}
    norm = np.linalg.norm(params.w_dec[2])
    np.testing.assert_allclose(strengths(steer([Steer(1, 2, 0.5, units="xnorm")], saes)), 0.5 * 12 / norm, rtol=1e-6)
    stats = {1: FakeStats(np.ones(LATENTS), 50.0)}  # what was measured goes before
    found = strengths(steer([Steer(1, 2, 0.5, units="xnorm")], saes, stats=stats))
    np.testing.assert_allclose(found, 0.5 * 50 / norm, rtol=1e-6)


@pytest.mark.parametrize("mode", ["add", "clamp", "min-clamp", "project"])
def test_units_that_nothing_is_known_for_are_refused(model, mode):
    for units, stats, says in [
        ("xmax", None, "layer 1, feature 2: units 'xmax' .* unknown; build statistics with `qscope features build`"),
        ("xnorm", None, "layer 1, feature 2: units 'xnorm' .* unknown; build statistics with `qscope features build`"),
        ("xmax", {0: FakeStats(np.ones(LATENTS), 1.0)}, "units 'xmax' .* unknown"),
        ("xmax", {1: FakeStats(np.zeros(LATENTS), 1.0)}, "one xmax is 0.0 .*never fired"),
        ("xmax", {1: FakeStats(np.full(LATENTS, np.nan), 1.0)}, "one xmax is nan"),
        ("xnorm", {1: FakeStats(np.ones(LATENTS), 0.0)}, "one xnorm is 0.0"),
        ("xmax", {1: FakeStats(np.ones(LATENTS + 1), 1.0)}, "maxima of shape .* the SAE has 27 features"),
        ("xmax", {1: FakeStats(np.full(LATENTS, 1e15), 1.0)}, "strength 2.0 xmax, in raw units, .* expected a finite"),
    ]:
        with pytest.raises(ValueError, match=says):
            steer([Steer(1, 2, 2.0, mode, units)], model.saes, stats=stats)
    assert mode in MODES


def test_directions_need_no_sae(model, observe, plain):
    vector = np.linspace(-1, 1, WIDTH)
    out = observe(steer([Steer(2, direction=jnp.asarray(vector), strength=2.0)], {}, num_layers=LAYERS))
    change = (out.captured[2] - plain.captured[2])[model.mask]
    np.testing.assert_allclose(change, np.broadcast_to(2 * vector, change.shape), rtol=1e-4, atol=1e-5)
