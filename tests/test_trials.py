"""Recipes tried on prompts: numbers equal their definitions, and arms differ by their recipe alone."""

import jax
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import encode, to_dense
from qscope_jax.steering import Steer, steer
from qscope_jax.steering.controls import control_recipes
from qscope_jax.trials import Writing, _batches, judge, try_recipes
from tests.backbone.families import QUICK

pytestmark = pytest.mark.slow

PROMPTS = ("To save a copy of your document, open", "The old king stood on the wall and looked at the")
FEATURE = (3, 314)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("demo", dtype="float32")


@pytest.fixture(scope="module")
def saes():
    return load_saes("demo", (3,))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("demo")


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return make_encoder(tokenizer)(PROMPTS)


@pytest.fixture(scope="module")
def outcomes(backbone, saes, tokenizer, prompts):
    recipe = [Steer(*FEATURE, 70.0, "min-clamp")]
    arms = {"recipe": [recipe], **control_recipes(recipe, saes, random=2)}
    writing = Writing(max_new_tokens=12, eos=(), scripts=("Han",), languages=("en", "zh", "ja"), batch_rows=8)
    return try_recipes(backbone, tokenizer, saes, prompts, arms, features=[FEATURE], writing=writing)


def test_judgements_equal_their_definitions(backbone, saes, prompts):
    rng = np.random.default_rng(0)
    lengths = 30 - np.array([len(prompt) for prompt in prompts])  # as long together: one program serves both rows
    written = [rng.integers(0, backbone.config.vocab_size, n).astype(np.int32) for n in lengths]
    tap = steer([Steer(*FEATURE, 40.0)], saes, num_layers=backbone.config.num_layers)
    run = jax.jit(forward, static_argnames=("capture",), compiler_options=QUICK)
    found = judge(backbone, prompts, written, tap=tap, saes=saes, features=[FEATURE, (3, 7)])
    for row, (prompt, new) in enumerate(zip(prompts, written, strict=True)):
        tokens, first = np.concatenate([prompt, new])[None].astype(np.int32), len(prompt) - 1
        clean = run(backbone.params, backbone.config, tokens).logits[0]
        steered = run(backbone.params, backbone.config, tokens, tap=tap, capture=(3,))
        log_q, log_p = (np.asarray(jax.nn.log_softmax(a))[first:-1] for a in (clean, steered.logits[0]))
        np.testing.assert_allclose(found.nll[row], -log_q[np.arange(len(new)), new].mean(), rtol=1e-4)
        np.testing.assert_allclose(found.kl[row], (np.exp(log_p) * (log_p - log_q)).sum(1).mean(), rtol=1e-3)
        dense = to_dense(encode(saes[3], steered.captured[0, 0, first + 1 :]), saes[3].config.d_sae)
        np.testing.assert_allclose(found.read[row], dense[:, [FEATURE[1], 7]].mean(axis=0), rtol=1e-4, atol=1e-4)


def test_without_a_tap_the_model_is_compared_with_itself(backbone, prompts):
    found = judge(backbone, prompts[:1], [np.array([5, 6, 7])])
    assert found.kl[0] == pytest.approx(0, abs=1e-6)
    assert found.read.shape == (1, 0)


def test_the_identity_writes_what_the_model_writes(outcomes):
    assert outcomes["identity"].texts == outcomes["unsteered"].texts
    assert outcomes["identity"].kl == outcomes["unsteered"].kl == 0
    assert outcomes["identity"].changed == 0
    assert outcomes["unsteered"].selected == 0


def test_the_recipe_is_told_from_its_controls(outcomes):
    steered, others = outcomes["recipe"], [o for name, o in outcomes.items() if name != "recipe"]
    assert steered.share > 0.5 > max(o.share for o in others)
    assert steered.languages["zh"] == 1
    assert outcomes["unsteered"].languages["en"] == 1
    assert steered.read[0] > 20 > max(o.read[0] for o in others)
    assert steered.kl > 0
    assert len(outcomes["random"].texts) == 2 * len(steered.texts)


def test_an_arm_does_not_depend_on_the_batch_it_stands_in(backbone, saes, tokenizer, prompts, outcomes):
    writing = Writing(max_new_tokens=12, eos=(), scripts=("Han",), batch_rows=2)
    alone = try_recipes(
        backbone, tokenizer, saes, prompts, {"recipe": [[Steer(*FEATURE, 70.0, "min-clamp")]]}, writing=writing
    )
    assert alone["recipe"].texts == outcomes["recipe"].texts
    assert alone["recipe"].nll == pytest.approx(outcomes["recipe"].nll, rel=1e-5)


def test_rows_that_read_the_same_saes_share_a_batch():
    clamp = lambda layer: [Steer(layer, 1, 1.0, "clamp")]  # noqa: E731
    add = [Steer(5, 1, 1.0)]
    rows = [("", recipe, i) for recipe in ([], clamp(3), clamp(4), add, [*clamp(3), *add]) for i in range(2)]
    read = [
        [{entry.layer for entry in recipe if entry.mode == "clamp"} for _, recipe, _ in b] for b in _batches(rows, 4)
    ]
    assert [len(batch) for batch in read] == [4, 4, 2]
    assert all(len(set().union(*batch)) == 1 for batch in read)


def test_what_cannot_be_judged_is_refused(backbone, saes, prompts):
    with pytest.raises(ValueError, match="has no tokens"):
        judge(backbone, prompts, [np.array([1]), np.array([], int)])
    with pytest.raises(ValueError, match=r"features of layer 5 .* SAEs are of layers \[3\]"):
        judge(backbone, prompts, [np.array([1])] * 2, saes=saes, features=[(5, 0)])
