"""Controls are the recipe with one thing changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.sae.model import SaeConfig, init_sae
from qscope_jax.steering import MODES, Steer, steer
from qscope_jax.steering.controls import CONTROLS, control_recipes
from qscope_jax.taps import TapContext

D, F = 8, 32


@pytest.fixture(scope="module")
def saes():
    """Two SAEs whose decoder rows are of different lengths."""

    def make(layer):
        sae = init_sae(jax.random.key(layer), SaeConfig(D, F, 4, layer=layer))
        lengths = np.random.default_rng(layer).uniform(0.5, 2, (F, 1)).astype(np.float32)
        return sae._replace(params=sae.params._replace(w_dec=sae.params.w_dec * lengths))

    return {1: make(1), 2: make(2)}


def test_every_control_has_its_recipes(saes):
    found = control_recipes([Steer(1, 3, 2.0)], saes, random=4)
    assert tuple(found) == CONTROLS
    assert found["unsteered"] == [[]]
    assert found["identity"] == [[Steer(1, 3, 0.0)]]
    assert found["flipped"] == [[Steer(1, 3, -2.0)]]
    assert found["prompt"] == [[Steer(1, 3, 2.0, positions="prompt")]]
    assert len(found["random"]) == 4


def test_random_recipes_go_along_other_features_and_are_as_long(saes):
    recipe = [Steer(1, 3, 2.0), Steer(1, 4, 1.0), Steer(2, 3, -1.0, "min-clamp"), Steer(2, 5, mode="ablate")]
    unit = lambda w: w / np.linalg.norm(w, axis=1, keepdims=True)  # noqa: E731
    rows = {layer: unit(np.asarray(sae.params.w_dec)) for layer, sae in saes.items()}
    for drawn in control_recipes(recipe, saes, random=20)["random"]:
        pairs = set()
        for entry, given in zip(drawn, recipe, strict=True):
            assert (entry.layer, entry.feature, entry.strength, entry.mode) == (
                given.layer, given.feature, given.strength, given.mode,
            )  # fmt: skip
            length = np.linalg.norm(entry.direction)
            np.testing.assert_allclose(length, np.linalg.norm(saes[given.layer].params.w_dec[given.feature]), rtol=1e-5)
            pairs.add((entry.layer, int(np.argmax(rows[entry.layer] @ entry.direction / length))))
        assert len(pairs) == 4
        assert not pairs & {(1, 3), (1, 4), (2, 3), (2, 5)}


def test_the_seed_decides_and_excluded_features_are_never_drawn(saes):
    recipe, draw = [Steer(1, 3, 2.0)], lambda **options: control_recipes([Steer(1, 3, 2.0)], saes, **options)["random"]
    assert draw(seed=1) == draw(seed=1) != draw(seed=2)
    exclude = {1: set(range(F)) - {5, 6}}
    rows, drawn = np.asarray(saes[1].params.w_dec[np.array([5, 6])]), set()
    for (entry,) in draw(exclude=exclude, random=30):
        cosines = rows @ entry.direction / np.linalg.norm(rows, axis=1) / np.linalg.norm(entry.direction)
        np.testing.assert_allclose(cosines.max(), 1, rtol=1e-5)
        drawn.add(int(cosines.argmax()))
    assert drawn == {0, 1}
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


@pytest.mark.parametrize("mode", ["add", "clamp", "min-clamp", "ablate", "scale"])
def test_a_random_change_is_as_long_at_every_token(saes, mode):
    recipe = [Steer(2, 3, None if mode == "ablate" else 1.5, mode)]
    h = jax.random.normal(jax.random.key(0), (1, 40, D))
    place = jnp.zeros((1, 40), jnp.int32)
    ctx = TapContext(place, jnp.ones((1, 40), bool), place, place)

    def change(entries):
        tap = steer(entries, saes)
        return tap.fn(h, jax.tree.map(lambda a: a[2], tap.per_layer), tap.shared, ctx)[0] - h

    length = lambda delta: np.linalg.norm(delta, axis=-1)  # noqa: E731
    own, (drawn,) = change(recipe), control_recipes(recipe, saes, random=1)["random"]
    assert np.count_nonzero(length(own)) > 0
    np.testing.assert_allclose(length(change(drawn)), length(own), rtol=1e-4, atol=1e-6)
    assert not np.allclose(change(drawn), own)
