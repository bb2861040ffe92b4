"""The articles' four lines, on the embedded model."""

import numpy as np
import pytest

import qscope_jax as qs
from qscope_jax.analysis.text import script_share

PROMPT = "The old king"


@pytest.fixture(scope="module")
def model():
    return qs.SAEModel.from_pretrained("demo")


@pytest.fixture(scope="module")
def chinese(model):
    return qs.FeatureExplorer(model, layer=3).discover_top_features("chinese", top=3, permutations=100)


def test_an_intervention_is_data():
    none = qs.Intervention()
    both = none.activate(7, 0.8, layer=3).suppress(8, 1.5, layer=4, positions="generated")
    assert none.ablate(np.int64(5), layer=3).entries == (qs.Steer(3, 5, mode="ablate"),)
    assert none.entries == ()
    assert both.entries == (
        qs.Steer(3, 7, 0.8, units="xmax"),
        qs.Steer(4, 8, -1.5, units="xmax", positions="generated"),
    )


@pytest.mark.parametrize("strength", [0, -1.0, float("nan")])
def test_a_strength_is_above_zero(strength):
    with pytest.raises(ValueError, match="expected above 0: activate"):
        qs.Intervention().activate(7, strength, layer=3)


def test_an_index_alone_names_no_feature():
    with pytest.raises(ValueError, match=r"feature 7: of which layer\?"):
        qs.Intervention().suppress(7)


@pytest.mark.slow
def test_a_feature_is_found_by_a_concept_and_changes_what_is_written(model, chinese):
    best = chinese[0]
    assert best.layer == 3
    assert best.auroc > 0.98 > 0.5 > best.other_rate
    plain = model.generate(PROMPT, max_new_tokens=24)
    steered = model.generate(PROMPT, intervention=qs.Intervention().activate(best, strength=1.0), max_new_tokens=24)
    assert script_share(plain, "Han") == 0
    assert script_share(steered, "Han") > 0.8
    assert model.generate(PROMPT, intervention=qs.Intervention(), max_new_tokens=24) == plain


@pytest.mark.slow
def test_several_texts_give_several_continuations(model):
    texts = [PROMPT, "To open a file"]
    written = model.generate(texts, max_new_tokens=8, temperature=1.0, seed=5)
    assert len(written) == 2
    assert written[0] == model.generate(PROMPT, max_new_tokens=8, temperature=1.0, seed=5)
    assert written[1] == model.generate(texts[1], max_new_tokens=8, temperature=1.0, seed=6)


def test_saes_are_read_when_they_are_needed(model, monkeypatch):
    read = []
    monkeypatch.setattr(
        "qscope_jax.api.load_sae", lambda source, layer, **_: read.append(layer) or qs.load_sae(source, layer)
    )
    saes = type(model.saes)(model.saes._source, {})
    assert list(saes) == [0, 1, 2, 3, 4, 5]
    assert read == []
    assert saes[2] is saes[2]
    assert read == [2]
    with pytest.raises(KeyError):
        saes[6]


def test_texts_of_ones_own_are_a_concept_too(model):
    numbers = [f"{n} + {n} = {2 * n}, {n} - 1 = {n - 1}" for n in range(3, 13)]
    words = ["The king looked at the city.", "She opened the window.", "They walked home.", "It rained all day."]
    explorer = qs.FeatureExplorer(model, layer=3)
    (found,) = explorer.discover_top_features(positive=numbers, negative=words, top=1, permutations=20)
    assert found.rate > found.other_rate


def test_what_cannot_be_is_refused(model):
    with pytest.raises(ValueError, match="'gothic' is no set of texts that ships along"):
        qs.FeatureExplorer(model).discover_top_features("gothic")
    with pytest.raises(ValueError, match="layer 9: the SAEs are of layers"):
        qs.FeatureExplorer(model, layer=9).discover_top_features("chinese")
    without = qs.SAEModel(model.backbone, model.tokenizer, model.saes)
    with pytest.raises(ValueError, match="qscope features build"):
        without.generate(PROMPT, intervention=qs.Intervention().activate(7, layer=3))
    with pytest.raises(ValueError, match="layer 9: the SAEs are of layers"):
        model.generate(PROMPT, intervention=qs.Intervention().activate(7, layer=9))


def test_a_set_whose_name_tells_no_model_asks_for_it(tmp_path):
    qs.save_sae(qs.load_sae("demo", 3), tmp_path / "saes")
    with pytest.raises(ValueError, match="which model are these SAEs for"):
        qs.SAEModel.from_pretrained(tmp_path / "saes")
    model = qs.SAEModel.from_pretrained(tmp_path / "saes", model="demo")
    assert list(model.saes) == [3]
    assert model.statistics is None
    np.testing.assert_array_equal(model.saes[3].params.w_dec, qs.load_sae("demo", 3).params.w_dec)


def test_statistics_of_other_saes_are_refused(tmp_path):
    sae = qs.load_sae("demo", 3)
    qs.save_sae(sae._replace(params=sae.params._replace(b_dec=sae.params.b_dec + 1)), tmp_path / "saes")
    other = qs.SAEModel.from_pretrained(tmp_path / "saes", model="demo", statistics="demo")
    with pytest.raises(ValueError, match="the statistics of layer 3 are of an SAE with sha256"):
        other.generate(PROMPT, intervention=qs.Intervention().activate(7, layer=3))
