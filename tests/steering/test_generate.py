"""Steered generation: every read token is steered, as by hooks in torch; one program serves all recipes."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.generation import generate
from qscope_jax.generation.steps import make_steps
from qscope_jax.steering import MODES, Steer, count_applied, describe, steer
from tests.backbone.families import QUICK, make_config, make_params
from tests.generation.programs import quick_programs as quick_programs  # the fixture
from tests.steering.conftest import LENGTHS, NEW, PROMPT, RULES
from tests.steering.test_tap import entry
from tests.steering.test_torch import hooked as hooked  # the fixture

pytestmark = pytest.mark.slow  # every program is two, prefill and decode


@pytest.fixture(scope="module")
def write(model):
    """Continues the prompts by NEW + 1 tokens, of which the model reads NEW."""

    def written(recipes, rows=slice(None), **options):
        tokens, mask = model.tokens[rows, :PROMPT], model.mask[rows, :PROMPT]
        options = {"eos": (), "max_new_tokens": NEW + 1} | options
        return generate(model.params, model.config, tokens, mask=mask, tap=steer(recipes, model.saes), **options)

    return written


def spread(*entries):
    return [[replace(item, positions=rule) for item in entries] for rule in RULES]


@pytest.fixture(scope="module")
def plain(model):
    tokens, mask = model.tokens[:, :PROMPT], model.mask[:, :PROMPT]
    return generate(model.params, model.config, tokens, mask=mask, eos=(), max_new_tokens=NEW + 1)


@pytest.mark.parity
@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_and_their_log_probabilities_are_those_of_hooks(model, hooked, write, mode):
    rows = spread(entry(mode, 1), entry("add", 3, preserve_norm=True))
    out = write(rows)
    tokens = np.concatenate([model.tokens[:, :PROMPT], out.tokens[:, :NEW]], axis=1)
    logits = hooked.run(rows, tokens, model.mask)[:, PROMPT - 1 :].astype(np.float64)
    np.testing.assert_array_equal(out.tokens, logits.argmax(axis=-1))
    norms = np.log(np.exp(logits).sum(axis=-1))
    chosen = np.take_along_axis(logits, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, chosen - norms, atol=1e-4)


def test_as_many_tokens_are_steered_as_were_generated_and_read(model, write):
    rows = spread(Steer(1, 11, 0.5), Steer(1, 11, 200.0, "clamp"))
    out = write(rows)
    total = count_applied(out.taps.prompt, out.taps.generated)
    np.testing.assert_array_equal(total.selected, total.changed)
    both = dict(zip(RULES, total.selected[:, 0], strict=True))
    assert both["all"] == LENGTHS[0] + out.lengths[0] - 1
    assert both["prompt"] == LENGTHS[1]
    assert both["generated"] == out.lengths[2] - 1 == count_applied(out.taps.generated).selected[2, 0]
    assert both["last"] == both["5"] == 1
    facts = describe(rows, model.saes, applied=total)
    assert [row[0]["selected"] for row in facts] == total.selected[:, 0].tolist()


def test_a_recipe_and_a_seed_give_the_same_tokens_alone_and_in_a_batch(model, write, plain):
    rows = [[entry(mode), Steer(1, 21, 25.0, "min-clamp")] for mode in (*MODES, "add")]
    rows[2] = []
    seeds, options = [5, 3, 3, 9, 1, 0, 7], {"temperature": 0.8, "top_p": 0.9}
    out = write(rows, seeds=seeds, **options)
    for b in (0, 1, 3, 4, 5, 6):
        alone = write([rows[b]], slice(b, b + 1), seeds=seeds[b : b + 1], **options)
        np.testing.assert_array_equal(alone.tokens[0], out.tokens[b])
    greedy = write(rows)
    assert not np.array_equal(greedy.tokens, plain.tokens)
    np.testing.assert_array_equal(greedy.tokens[2], plain.tokens[2])
    np.testing.assert_array_equal(greedy.logprobs[2], plain.logprobs[2])


def test_an_identity_generates_what_the_model_does_bit_for_bit(model, write, plain):
    out = write([[Steer(1, 11, 1.0, "scale"), Steer(1, 21, s, "min-clamp")] for s in np.linspace(-9, 0, model.rows)])
    np.testing.assert_array_equal(out.tokens, plain.tokens)
    np.testing.assert_array_equal(out.logprobs, plain.logprobs)
    assert not count_applied(out.taps.prompt, out.taps.generated).changed.any()


def test_one_program_serves_all_recipes(model, write):
    write(spread(entry("clamp", 1), entry("add", 3)))
    before = make_steps(model.config).compilations
    for layer, mode in enumerate(("scale", "ablate", "min-clamp", "clamp")):
        write(spread(replace(entry(mode, layer), positions="last"), entry("project", 0)))
    write([[Steer(2, b, 0.1 * b, "clamp", preserve_norm=True), Steer(0, b, 1.0)] for b in range(model.rows)])
    assert make_steps(model.config).compilations == before


def test_a_hybrid_writes_what_one_pass_over_the_whole_text_says(model):
    """Layer 1 has a recurrent state and layer 3 a cache of keys: both steered in every step, neither steered twice."""
    config = make_config("qwen3_5")
    params, rows = make_params(config), spread(entry("clamp", 1), entry("add", 3, preserve_norm=True), entry("add", 0))
    assert config.layer_types[:4] == ("linear", "linear", "linear", "full")
    tap = steer(rows, model.saes, num_layers=config.num_layers)
    tokens, mask = model.tokens[:, :PROMPT], model.mask[:, :PROMPT]
    out = generate(params, config, tokens, mask=mask, tap=tap, eos=(), max_new_tokens=NEW + 1)
    whole = np.concatenate([tokens, out.tokens[:, :NEW]], axis=1)
    once = jax.jit(forward, static_argnames="config", compiler_options=QUICK)
    passed = once(params, config, whole, mask=model.mask, tap=tap, prompt_lengths=np.array(LENGTHS))
    logits = np.asarray(passed.logits[:, PROMPT - 1 :], np.float64)
    np.testing.assert_array_equal(out.tokens, logits.argmax(axis=-1))
    chosen = np.take_along_axis(logits, out.tokens[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(out.logprobs, chosen - np.log(np.exp(logits).sum(axis=-1)), atol=1e-4)
    found, expected = count_applied(out.taps.prompt, out.taps.generated), count_applied(passed.taps)
    np.testing.assert_array_equal(found.selected, expected.selected)
    np.testing.assert_array_equal(found.changed, expected.changed)
    assert (found.changed[RULES.index("all")] == LENGTHS[0] + NEW).all()
    plain = generate(params, config, tokens, mask=mask, eos=(), max_new_tokens=NEW + 1)
    assert not np.array_equal(plain.logprobs, out.logprobs)
