"""Discovery equals the contrast of what extraction gives, and its halves never mix."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from qscope_jax.analysis.contrast import contrast, false_discovery_rates
from qscope_jax.analysis.features import auroc
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.batches import Buckets
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract import extract_documents, make_extract_step
from qscope_jax.features.discovery import discover
from qscope_jax.features.pooled import pool_texts
from qscope_jax.mesh import make_mesh
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import row_norms_of, without_decoder

WORDS = {"positive": "fox jumps over the lazy dog", "one": "Übung macht den Meister", "two": "習慣 成 自然"}


@pytest.fixture(scope="module")
def parts(tiny_release):
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    encoder = make_encoder(load_tokenizer(tiny_release / "model"))
    return backbone, saes, encoder, make_extract_step(backbone.config, tuple(saes))


@pytest.fixture(scope="module")
def sets():
    rng = np.random.default_rng(0)
    texts = {name: [" ".join(rng.choice(line.split(), 9)) for _ in range(12)] for name, line in WORDS.items()}
    assert all(len(set(own)) == 12 for own in texts.values())
    return texts.pop("positive"), texts


@pytest.fixture(scope="module")
def found(parts, sets):
    backbone, saes, encoder, step = parts
    return discover(backbone, saes, encoder, *sets, step=step, top=7, permutations=2000, batch_tokens=256)


@pytest.fixture(scope="module")
def dense(parts, sets):
    """Per layer the dense activations [tokens, f] of every text, in order, and the median norm."""
    backbone, saes, encoder, step = parts
    texts = [*sets[0], *(text for own in sets[1].values() for text in own)]
    codes = extract_documents(backbone, saes, encoder(texts), batch_tokens=256, step=step, max_length=64)
    layers = {}
    for layer in saes:
        layers[layer] = []
        for code in codes:
            z = np.zeros((len(code.tokens), 64))
            np.put_along_axis(z, code.codes[layer].indices, code.codes[layer].values, axis=1)
            layers[layer].append(z)
    return layers, {n: np.median(np.concatenate([code.norms[n] for code in codes])) for n in saes}


def of_half(layer, half, texts=12):
    """All tokens of each group's documents that choose (0) or judge (1)."""
    return [np.concatenate([layer[g * texts + d] for d in range(half, texts, 2)]) for g in range(3)]


def test_scores_are_the_choosing_halfs_share_of_the_residual_stream(parts, found, dense):
    layers, medians = dense
    for f in found.features:
        positive, one, two = (z[:, f.feature].mean() for z in of_half(layers[f.layer], 0))
        row = np.linalg.norm(parts[1][f.layer].params.w_dec[f.feature])
        assert f.score == pytest.approx((positive - (one + two) / 2) * row / medians[f.layer], rel=1e-4)
    assert [f.score for f in found.features] == sorted((f.score for f in found.features), reverse=True)
    assert len(found.features) == 7


def test_everything_else_is_the_judging_halfs(found, dense):
    layers, _ = dense
    for f in found.features:
        groups = [z[:, f.feature] for z in of_half(layers[f.layer], 1)]
        means, rates = [z.mean() for z in groups], [(z > 0).mean() for z in groups]
        assert f.difference == pytest.approx(means[0] - (means[1] + means[2]) / 2, rel=1e-4)
        assert (f.rate, f.other_rate) == pytest.approx((rates[0], max(rates[1:])))
        assert f.other in ("one", "two")
        documents = [layers[f.layer][g * 12 + d][:, f.feature] for g in range(3) for d in range(1, 12, 2)]
        positive = np.arange(18) < 6
        for value, pooled in ((f.auroc, [z.max() for z in documents]), (f.auroc_mean, [z.mean() for z in documents])):
            assert value == pytest.approx(auroc(np.array(pooled)[:, None], positive)[0])


def test_contexts_are_where_features_are_strongest(found, dense):
    for f in found.features:
        columns = [z[:, f.feature] for z in dense[0][f.layer]]
        value, document, position, _ = (array[f.feature, 0] for array in found.contexts[f.layer])
        assert value == pytest.approx(max(c.max() for c in columns), rel=1e-5)
        assert columns[document][position] == pytest.approx(value, rel=1e-5)


def test_the_rate_of_false_discoveries_spans_all_layers(found):
    q = false_discovery_rates([chosen.p for _, chosen, _ in found.table.values()])
    for (_, _, own), expected in zip(found.table.values(), q, strict=True):
        np.testing.assert_array_equal(own, expected)
    for row in found.profile:
        features, chosen, own = found.table[row.layer]
        assert row.best.feature == features[chosen.score.argmax()]
        assert row.found == (own < 0.05).sum()
        assert row.active == len(features)
    assert any(row.found for row in found.profile)  # each set has words of its own


def test_a_text_given_twice_counts_once(parts, sets, found):
    """Else it would stand in the half that chooses and in the half that judges."""
    backbone, saes, encoder, step = parts
    twice = [text for text in sets[0] for _ in range(2)], {**sets[1], "one": [*sets[1]["one"], *sets[1]["one"][:3]]}
    other = discover(backbone, saes, encoder, *twice, step=step, top=7, permutations=2000, batch_tokens=256)
    assert other.features == found.features
    assert other.documents == found.documents == {"positive": 12, "one": 12, "two": 12}
    assert other.duplicates == {"positive": 12, "one": 3, "two": 0}
    assert found.duplicates == {"positive": 0, "one": 0, "two": 0}


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (["a" * 99, "b"], {"c": ["d", "a" * 99]}, r"stands in positive and in c, .*: 'a{59}…'"),
        (["a", "b"], {"c": ["d", "e"], "f": ["e", "g"]}, "stands in c and in f, .*: 'e'"),
    ],
)
def test_a_text_of_two_sets_is_refused(parts, positive, negative, message):
    with pytest.raises(ValueError, match=message):
        discover(*parts[:3], positive, negative, step=parts[3])


def test_encoders_and_the_norms_of_decoder_rows_are_enough(parts, sets, found):
    backbone, saes, encoder, _ = parts
    light = {n: without_decoder(sae) for n, sae in saes.items()}
    norms = {n: row_norms_of(sae) for n, sae in saes.items()}
    other = discover(backbone, light, encoder, *sets, row_norms=norms, top=7, permutations=2000, batch_tokens=256)
    assert other.features == found.features
    assert all(not sae.params.w_dec.size for sae in light.values())
    with pytest.raises(ValueError, match="without its decoder"):
        discover(backbone, light, encoder, *sets)


def test_tokens_are_the_same_for_all_layers_sinks_are_not(parts, sets):
    backbone, saes, encoder, step = parts
    median = pool_texts(backbone, saes, encoder(sets[0]), Buckets(256, 64), step=step).median_norms[0]
    config = dataclasses.replace(saes[0].config, sink_threshold=median)
    cut = {**saes, 0: saes[0]._replace(config=config)}
    other = discover(backbone, cut, encoder, *sets, permutations=0, batch_tokens=256)
    assert other.tokens["positive"] == sum(map(len, encoder(sets[0])))
    assert other.sinks[0] > 0 == other.sinks[1]


def test_how_low_q_can_come(parts, sets, found):
    """q of one feature alone is its p times the number of features; Benjamini and Hochberg share it among equals."""
    backbone, saes, encoder, step = parts
    active = sum(row.active for row in found.profile)
    for permutations in (9, 199):
        options = {"permutations": permutations, "batch_tokens": 256}
        other = discover(backbone, saes, encoder, *sets, step=step, top=1, **options).reach
        assert other[:2] == (active, 1 / (permutations + 1))
        assert other.smallest_q == min(1, active / (permutations + 1))
        for together, significant in ((other.together, other.together <= active), (other.together - 1, False)):
            p = np.where(np.arange(active) < together, other.smallest_p, 1)
            assert bool(false_discovery_rates([p])[0].min() < 0.05) is significant
    alone = [np.r_[1 / (other.permutations + extra), np.ones(active - 1)] for extra in (0, 1)]
    assert [bool(false_discovery_rates([p])[0].min() < 0.05) for p in alone] == [False, True]


def test_other_statistics_rank_by_themselves(parts, sets):
    backbone, saes, encoder, step = parts
    for by in ("rate", "auroc"):
        other = discover(backbone, saes, encoder, *sets, step=step, top=3, by=by, permutations=0, batch_tokens=256)
        features, chosen, _ = other.table[other.features[0].layer]
        assert other.features[0].score == chosen.score[features == other.features[0].feature] == chosen.score.max()
        assert other.features[0].p == 1


def test_a_mesh_finds_the_same(tiny_release, sets, found, parts):
    mesh = make_mesh(2, 2, devices=jax.devices()[:4])
    backbone = load_backbone(tiny_release / "model", dtype="float32", mesh=mesh)
    saes = load_saes(tiny_release / "sae", mesh=mesh)
    other = discover(backbone, saes, parts[2], *sets, top=7, permutations=0, batch_tokens=256)
    assert [(f.layer, f.feature) for f in other.features] == [(f.layer, f.feature) for f in found.features]
    np.testing.assert_allclose([f.score for f in other.features], [f.score for f in found.features], rtol=1e-4)


def test_sinks_are_left_out(parts, sets):
    backbone, saes, encoder, step = parts
    documents = encoder(sets[0])
    plain = pool_texts(backbone, saes, documents, Buckets(256, 64), step=step)
    limits = {n: plain.median_norms[n] for n in saes}
    known = {n: sae._replace(config=sae.config.__class__(**{**vars(sae.config), "sink_threshold": limits[n]}))
             for n, sae in saes.items()}  # fmt: skip
    cut = pool_texts(backbone, known, documents, Buckets(256, 64))
    for n in saes:
        assert cut.sink_thresholds[n] == limits[n]
        assert cut.sinks[n] + cut.pooled[n].tokens.sum() == plain.pooled[n].tokens.sum()
        assert cut.sinks[n] > 0.3 * plain.pooled[n].tokens.sum()


@pytest.mark.parametrize(
    ("positive", "negative", "message"),
    [
        (["a"], {"b": ["c", "d"]}, "positive: fewer than two different texts"),
        (["a", "b"], {"b": ["c"]}, "b: fewer than two different texts"),
        (["a", "a"], {"b": ["c", "d"]}, "positive: fewer than two different texts"),
        (["a", ""], {"b": ["c", "d"]}, "text 1 .* no tokens"),
    ],
)
def test_too_few_texts_are_refused(parts, positive, negative, message):
    with pytest.raises(ValueError, match=message):
        discover(*parts[:3], positive, negative, step=parts[3])


def test_an_id_beyond_the_vocabulary_is_refused(parts):
    with pytest.raises(ValueError, match="320"):  # D7
        discover(*parts[:2], lambda texts: [np.array([1, 400])] * len(texts), ["a", "b"], {"c": ["d", "e"]})


@pytest.mark.slow
def test_p_is_calibrated_on_shuffled_labels_of_real_texts():
    """Features of real text are sparse and alike; with shuffled labels p <= 0.05 in about one case of twenty."""
    from qscope_jax.features.concepts import LANGUAGES, concept_texts

    backbone, saes = load_backbone("demo", dtype="float32"), load_saes("demo", (1,))
    texts = [text for name in LANGUAGES for text in concept_texts(name)]
    seen = pool_texts(backbone, saes, make_encoder(load_tokenizer("demo"))(texts), Buckets(2048, 512, 1)).pooled[1]
    dense = np.bincount(seen.feature, minlength=1536) >= 24  # fire in enough of the 64 texts to tell labels apart
    features, rng = np.flatnonzero(dense), np.random.default_rng(0)
    assert len(features) > 300
    p = [
        contrast(seen, rng.permutation(np.arange(64) % 4 > 0).astype(int), features, permutations=99, seed=i).p
        for i in range(150)
    ]
    shares = {level: float((np.stack(p) <= level).mean()) for level in (0.01, 0.05, 0.25, 0.5)}
    assert shares == pytest.approx({level: level for level in shares}, rel=0.3)
    assert np.stack(p).mean() == pytest.approx(0.5, abs=0.04)


@pytest.mark.slow
def test_the_embedded_saes_know_their_languages():
    """Chosen on half of the shipped texts, judged on the other: one feature tells each language from the others."""
    from qscope_jax.features.concepts import LANGUAGES, text_sets

    backbone, saes = load_backbone("demo", dtype="float32"), load_saes("demo", (3, 4))
    encoder, step = make_encoder(load_tokenizer("demo")), make_extract_step(backbone.config, (3, 4))
    for name in LANGUAGES:
        sets = text_sets(name)
        found = discover(backbone, saes, encoder, sets.positive, sets.negative, step=step, top=1, permutations=200)
        assert found.features[0].auroc > 0.95, name
        assert found.features[0].p < 0.05, name
        json.dumps(vars(found.features[0]))
