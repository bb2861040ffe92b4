"""Controls are the recipe with one thing changed."""

import jax
import numpy as np
import pytest

from qscope_jax.sae.model import SaeConfig, init_sae
from qscope_jax.steering import MODES, Steer
from qscope_jax.steering.controls import CONTROLS, control_recipes
from qscope_jax.steering.slots import resolve

D, F = 8, 32


@pytest.fixture(scope="module")
def saes():
    """Two SAEs whose decoder rows are of different lengths."""

    def make(layer):
        sae = init_sae(jax.random.key(layer), SaeConfig(D, F, 4, layer=layer))
        lengths = np.random.default_rng(layer).uniform(0.5, 2, (F, 1)).astype(np.float32)
        return sae._replace(params=sae.params._replace(w_dec=sae.params.w_dec * lengths))

    return {1: make(1), 2: make(2)}


def lengths(recipe, saes):
    return [
        abs(entry.strength) * scales.norm
        for entry, (_, scales) in zip(recipe, resolve(recipe, saes, None), strict=True)
    ]


def test_every_control_has_its_recipes(saes):
    found = control_recipes([Steer(1, 3, 2.0)], saes, random=4)
    assert tuple(found) == CONTROLS
    assert found["unsteered"] == [[]]
    assert found["identity"] == [[Steer(1, 3, 0.0)]]
    assert found["flipped"] == [[Steer(1, 3, -2.0)]]
    assert found["prompt"] == [[Steer(1, 3, 2.0, positions="prompt")]]
    assert len(found["random"]) == 4


def test_random_features_are_others_and_their_changes_as_long(saes):
    recipe = [Steer(1, 3, 2.0), Steer(1, 4, 1.0), Steer(2, 3, -1.0, "min-clamp")]
    for drawn in control_recipes(recipe, saes, random=20)["random"]:
        pairs = {(entry.layer, entry.feature) for entry in drawn}
        assert len(pairs) == 3
        assert not pairs & {(1, 3), (1, 4), (2, 3)}
        assert [entry.layer for entry in drawn] == [1, 1, 2]
        assert [entry.mode for entry in drawn] == ["add", "add", "min-clamp"]
        np.testing.assert_allclose(lengths(drawn, saes), lengths(recipe, saes), rtol=1e-5)


def test_the_seed_decides_and_excluded_features_are_never_drawn(saes):
    recipe, draw = [Steer(1, 3, 2.0)], lambda **options: control_recipes([Steer(1, 3, 2.0)], saes, **options)["random"]
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    allowed = {5, 6}
    exclude = {1: set(range(F)) - allowed}
    assert {entry.feature for row in draw(exclude=exclude, random=30) for entry in row} == allowed
    with pytest.raises(ValueError, match="layer 1: no feature is left to draw at random"):
        control_recipes(recipe, saes, exclude={1: range(F)})


def test_a_random_direction_is_as_long_as_the_one_given(saes):
    recipe = [Steer(1, strength=3.0, direction=np.arange(1.0, D + 1))]
    (drawn,) = control_recipes(recipe, saes, random=1)["random"][0]
    assert drawn.strength == 3.0
    np.testing.assert_allclose(np.linalg.norm(drawn.direction), np.linalg.norm(recipe[0].direction), rtol=1e-5)
    assert abs(drawn.direction @ recipe[0].direction) < 0.99 * np.linalg.norm(recipe[0].direction) ** 2


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_an_identity_and_an_opposite(saes, mode):
    entry = Steer(1, 3, None if mode == "ablate" else 2.0, mode)
    found = control_recipes([entry], saes)
    (identity,), (opposite,) = found["identity"][0], found["flipped"][0]
    expected = {
        "add": (Steer(1, 3, 0.0), Steer(1, 3, -2.0)),
        "project": (Steer(1, 3, 0.0), Steer(1, 3, -2.0, "project")),
        "clamp": (Steer(1, 3, 0.0, "min-clamp"), Steer(1, 3, -2.0, "clamp")),
        "min-clamp": (Steer(1, 3, 0.0, "min-clamp"), Steer(1, 3, -2.0)),
        "scale": (Steer(1, 3, 1.0, "scale"), Steer(1, 3, 0.0, "scale")),
        "ablate": (Steer(1, 3, 1.0, "scale"), Steer(1, 3, 2.0, "scale")),
    }
    assert (identity, opposite) == expected[mode]


def test_units_become_raw_so_that_controls_need_no_statistics(saes):
    class Statistics:
        max = np.full(F, 5.0)
        median_norm = 7.0

    found = control_recipes([Steer(1, 3, 2.0, units="xmax")], saes, stats={1: Statistics()})
    assert found["flipped"] == [[Steer(1, 3, -10.0)]]


def test_an_empty_recipe_has_no_controls(saes):
    with pytest.raises(ValueError, match="nothing to compare with"):
        control_recipes([], saes)
