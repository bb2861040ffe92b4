"""Generation is transformers' where that has a say, and one forward pass over the whole text where it does not.

The goldens are what `transformers.generate` adds (scripts/make_continuations.py); the live tests take other prompts.
"""

import functools
import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.files.tensors import open_tensors
from qscope_jax.generation import advance, bucket, finished, generate, make_steps, pad_left, result, start
from qscope_jax.mesh import MeshError, make_mesh
from qscope_jax.taps import Tap
from tests.backbone.families import FAMILIES, QUICK
from tests.generation.programs import quick_programs as quick_programs  # the fixture

GOLDENS = Path(__file__).parents[1] / "goldens"
NEW = 16
PROMPTS = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7], [2, 7, 1, 8, 2, 8]]


@functools.cache
def golden(family):
    return load_backbone(GOLDENS / f"{family}_tiny", dtype="float32")


@pytest.fixture(scope="module")
def model():
    return golden("qwen3")


def write(model, prompts=PROMPTS, *, new=NEW, **options):
    tokens, mask = pad_left(prompts)
    return generate(model.params, model.config, tokens, mask=mask, **{"max_new_tokens": new, "eos": ()} | options)


def assert_equal(found, expected):
    np.testing.assert_array_equal(found.tokens, expected["tokens"])
    np.testing.assert_array_equal(found.lengths, expected["lengths"])
    np.testing.assert_allclose(found.logprobs, expected["logprobs"], rtol=0, atol=1e-4)
    assert found.tokens.shape == found.logprobs.shape == (len(found.lengths), NEW)


def cases(eos):
    return {"greedy": {"eos": ()}, "penalty": {"eos": (), "repetition_penalty": 1.3}, "eos": {"eos": eos}}


@pytest.mark.parametrize("family", [pytest.param(f, marks=[pytest.mark.slow] * (f != "qwen3")) for f in FAMILIES])
def test_greedy_tokens_and_log_probs_equal_transformers(family):
    backbone, file = golden(family), open_tensors(GOLDENS / f"{family}_tiny" / "continuations.safetensors")
    oracle = {name: file.array(name) for name in file.names}
    eos = tuple(oracle["eos_ids"].tolist())
    for name, options in cases(eos).items():
        found = generate(
            backbone.params, backbone.config, oracle["prompts"], mask=oracle["mask"], max_new_tokens=NEW, **options
        )
        assert_equal(found, {key: oracle[f"{name}/{key}"] for key in ("tokens", "lengths", "logprobs")})
        last = found.tokens[np.arange(3), found.lengths - 1]
        np.testing.assert_array_equal(found.ended, np.isin(last, options["eos"]))
    assert make_steps(backbone.config).compilations == 2


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
def test_layers_read_in_place_write_the_same(family, monkeypatch):
    """On a CPU the weights of large layers are views, which is what `split_layers` promises; a tap sees the same."""
    model = golden(family)
    expected = write(model, tap=tap_of(model), top_logprobs=4)
    monkeypatch.setattr("qscope_jax.generation.batch._IN_CACHE", 0)
    found = write(model, tap=tap_of(model), top_logprobs=4)
    np.testing.assert_array_equal(found.tokens, expected.tokens)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=3e-5)
    stream = [out.taps.generated["stream"][: NEW - 1] for out in (found, expected)]
    np.testing.assert_allclose(*stream, atol=3e-4)


@pytest.mark.slow
@pytest.mark.parity
@pytest.mark.parametrize("family", FAMILIES)
def test_other_prompts_live_against_transformers(family, monkeypatch):
    pytest.importorskip("torch").set_num_threads(1)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    maker = importlib.import_module("make_continuations")
    backbone, theirs = golden(family), maker.read_back(GOLDENS / f"{family}_tiny")
    lengths = {"qwen3": (14, 3, 17), "qwen3_moe": (14, 3, 17)}.get(family, (66, 72, 4))
    oracle = maker.continuations(theirs, lengths, seed=50)
    eos = tuple(oracle["eos_ids"].tolist())
    for name, options in cases(eos).items():
        found = generate(
            backbone.params, backbone.config, oracle["prompts"], mask=oracle["mask"], max_new_tokens=NEW, **options
        )
        assert_equal(found, {key: oracle[f"{name}/{key}"] for key in ("tokens", "lengths", "logprobs")})


def test_the_models_own_eos_ends_a_row_unless_told_otherwise(model):
    options = {"temperature": 3.0, "seeds": [9, 19, 2]}
    free, own = write(model, **options), write(model, eos=None, **options)
    assert model.config.eos_token_ids == (60,)
    ends = [row.tolist().index(60) + 1 if 60 in row else NEW for row in free.tokens]
    assert sorted(ends)[0] < sorted(ends)[1] < NEW
    assert own.lengths.tolist() == ends
    np.testing.assert_array_equal(own.ended, [60 in row for row in free.tokens])
    for found, whole, n in zip(own.tokens, free.tokens, ends, strict=True):
        assert found.tolist() == [*whole[:n], *[60] * (NEW - n)]  # pads are the eos, as in transformers
    assert (own.logprobs[np.arange(NEW) >= own.lengths[:, None]] == 0).all()


def test_pads_may_stand_anywhere_and_rows_may_be_alone(model):
    expected = write(model)
    right = np.zeros((3, 14), np.int32), np.zeros((3, 14), bool)
    for i, prompt in enumerate(PROMPTS):
        at = np.sort(np.random.default_rng(i).choice(14, len(prompt), replace=False))
        right[0][i, at], right[1][i, at] = prompt, True
    spread = generate(model.params, model.config, right[0], mask=right[1], max_new_tokens=NEW, eos=())
    np.testing.assert_array_equal(spread.tokens, expected.tokens)
    for i, prompt in enumerate(PROMPTS):
        alone = generate(model.params, model.config, np.array([prompt]), max_new_tokens=NEW, eos=())
        np.testing.assert_array_equal(alone.tokens[0], expected.tokens[i])


def test_a_seed_gives_the_same_text_alone_in_a_batch_and_in_another_order(model):
    options = {"temperature": 1.0, "top_p": 0.95, "top_k": 40, "repetition_penalty": 1.1}
    seeds = [11, 12, 13]
    together = write(model, seeds=seeds, **options)
    back = write(model, PROMPTS[::-1], seeds=seeds[::-1], **options)
    np.testing.assert_array_equal(back.tokens[::-1], together.tokens)
    for i, prompt in enumerate(PROMPTS):
        alone = write(model, [prompt], seeds=[seeds[i]], **options)
        np.testing.assert_array_equal(alone.tokens[0], together.tokens[i])
    assert (write(model, seeds=[1, 2, 3], **options).tokens != together.tokens).any()


def note(h, scale, shared, ctx):
    """Adds to generated tokens alone; tells what it saw and how many tokens of each kind."""
    new = (ctx.positions >= ctx.prompt_lengths) & ctx.mask
    h = jnp.where(new[..., None], h + scale * shared, h)
    return h, {"stream": h, "generated": new.sum(axis=1), "prompt": (ctx.mask & ~new).sum(axis=1)}


def tap_of(model, scale=0.3, seed=0):
    direction = jax.random.normal(jax.random.key(seed), (model.config.hidden_size,))
    return Tap(note, jnp.full(model.config.num_layers, scale), direction)


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen3_5", marks=pytest.mark.slow)])
def test_a_teacher_forced_pass_gives_what_decoding_gave(family):
    """Tokens, log-probs and all that the tap saw, with a tap that changes generated tokens."""
    model = golden(family)
    tap = tap_of(model)
    eos = (int(write(model, tap=tap, top_logprobs=4).tokens[0, 3]),)
    out = write(model, tap=tap, eos=eos, top_logprobs=4)
    assert len(set(out.lengths)) > 1
    lengths = jnp.array([len(prompt) for prompt in PROMPTS])
    texts = [[*p, *row[: n - 1]] for p, row, n in zip(PROMPTS, out.tokens, out.lengths, strict=True)]
    tokens, mask = pad_left(texts)
    once = jax.jit(forward, compiler_options=QUICK)
    whole = once(model.params, model.config, tokens, mask=mask, tap=tap, prompt_lengths=lengths)
    for i, prompt in enumerate(PROMPTS):
        n, own, chosen = int(out.lengths[i]), mask[i], out.tokens[i, : out.lengths[i]]
        log_probs = jax.nn.log_softmax(whole.logits[i, own][len(prompt) - 1 :])
        np.testing.assert_array_equal(log_probs.argmax(-1), chosen)
        np.testing.assert_allclose(out.logprobs[i, :n], log_probs[np.arange(n), chosen], atol=3e-5)
        np.testing.assert_array_equal(out.top_ids[i, :n, 0], chosen)
        np.testing.assert_allclose(out.top_logprobs[i, :n], jax.lax.top_k(log_probs, 4)[0], atol=3e-5)
        stream = whole.taps["stream"][:, i, own]
        read = out.taps.generated["stream"][: n - 1, :, i, 0]
        np.testing.assert_allclose(np.moveaxis(read, 0, 1), stream[:, len(prompt) :], atol=3e-4)
        np.testing.assert_allclose(out.taps.prompt["stream"][:, i, -len(prompt) :], stream[:, : len(prompt)], atol=3e-4)


def test_a_tap_on_generated_tokens_sees_all_but_the_last(model):
    eos = (int(write(model, tap=tap_of(model)).tokens[0, 3]),)
    out = write(model, tap=tap_of(model), eos=eos)
    assert out.lengths.min() < out.lengths.max()
    prompts = np.array([len(prompt) for prompt in PROMPTS])
    for layer in range(model.config.num_layers):
        np.testing.assert_array_equal(out.taps.generated["generated"].sum(axis=0)[layer], out.lengths - 1)
        np.testing.assert_array_equal(out.taps.prompt["prompt"][layer], prompts)
    assert not out.taps.generated["prompt"].any()
    assert not out.taps.prompt["generated"].any()
    assert out.taps.generated["generated"].shape == (NEW, model.config.num_layers, 3)


def test_token_by_token_is_the_same_text_and_the_same_program(model):
    tokens, mask = pad_left(PROMPTS)
    options = {"temperature": 0.8, "seeds": [1, 2, 3], "eos": (7,), "top_logprobs": 4, "tap": tap_of(model)}
    once = generate(model.params, model.config, tokens, mask=mask, max_new_tokens=NEW, **options)
    before = make_steps(model.config).compilations
    running, seen = start(model.params, model.config, tokens, mask=mask, max_new_tokens=NEW, **options), []
    while not finished(running):
        seen.append(result(running).lengths.sum())
        running = advance(running, 1)
    assert make_steps(model.config).compilations == before
    assert seen == sorted(set(seen))  # more at every step
    jax.tree.map(np.testing.assert_array_equal, result(running), once)


def test_a_row_that_is_stopped_from_outside_takes_no_more_tokens(model):
    tokens, mask = pad_left(PROMPTS)
    whole = write(model)
    running = advance(start(model.params, model.config, tokens, mask=mask, max_new_tokens=NEW, eos=()), 3)
    out = result(advance(running, stopped=np.array([False, True, False])))
    assert out.lengths.tolist() == [NEW, 4, NEW]
    assert not out.ended.any()
    np.testing.assert_array_equal(out.tokens[[0, 2]], whole.tokens[[0, 2]])
    np.testing.assert_array_equal(out.tokens[1], [*whole.tokens[1, :4], *[0] * (NEW - 4)])


def test_nothing_but_shapes_recompiles(model):
    first = write(model, tap=tap_of(model), eos=(5,), temperature=1.0, seeds=[1, 2, 3])
    before = list(make_steps(model.config).shapes)
    options = [
        {"temperature": 0.0}, {"temperature": 0.3, "seeds": [4, 5, 6]}, {"temperature": [1, 0, 2], "seeds": [4, 5, 6]},
        {"top_p": 0.5}, {"top_k": 3}, {"repetition_penalty": 1.7}, {"eos": (1, 2, 3)}, {"eos": ()},
        {"tap": tap_of(model, 1.0, seed=3)}, {"new": 9}, {"new": 1},
        {"prompts": [[1], [2] * 16, [3, 4]]}, {"prompts": PROMPTS[::-1]},
    ]  # fmt: skip
    for changed in options:
        write(model, **{"tap": tap_of(model), "eos": (5,), "temperature": 1.0, "seeds": [1, 2, 3]} | changed)
    assert make_steps(model.config).shapes == before
    again = write(model, tap=tap_of(model), eos=(5,), temperature=1.0, seeds=[1, 2, 3])
    np.testing.assert_array_equal(again.tokens, first.tokens)


def test_buckets_grow_by_halves():
    assert [bucket(n) for n in (1, 16, 17, 24, 25, 33, 49, 65, 1000)] == [16, 16, 24, 24, 32, 48, 64, 96, 1024]
    assert bucket(3, 8) == 8


def test_parameters_and_prompts_stay_as_they_were(model):
    before = jax.tree.map(np.array, model.params)
    write(model, tap=tap_of(model), new=4)
    jax.tree.map(np.testing.assert_array_equal, model.params, before)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_moe"])
def test_a_mesh_writes_the_same(family):
    one = golden(family)
    many = load_backbone(GOLDENS / f"{family}_tiny", dtype="float32", mesh=make_mesh(4, 2))
    prompts = [*PROMPTS, [1, 2]]
    options = {"temperature": [0, 1, 0, 1], "seeds": [1, 2, 3, 4], "top_logprobs": 3, "eos": (7,)}
    for new in (NEW, NEW - 3):  # twice, and compiled once: what a step gives lies as the next one takes it
        expected, found = write(one, prompts, new=new, **options), write(many, prompts, new=new, **options)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        np.testing.assert_array_equal(found.top_ids, expected.top_ids)
        np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=3e-5)
    running = start(many.params, many.config, *[np.array([p[:2] for p in prompts])], max_new_tokens=3, eos=())
    before = make_steps(many.config).compilations
    advance(advance(running, 1), 1)
    assert make_steps(many.config).compilations <= before + 1
    with pytest.raises(MeshError, match="batch = 3 cannot be split"):
        write(many)


def spoil(h, layer, at, ctx):
    wrong = (ctx.positions - ctx.prompt_lengths == at) & (jnp.arange(len(h)) == 1)[:, None]
    return jnp.where(wrong[..., None] & (layer == 1), jnp.nan, h), ()


def test_logits_that_are_no_distribution_end_in_an_error(model):
    for at, token in ((-1, 0), (2, 3)):  # the prompt's last token decides token 0, the third one generated token 3
        tap = Tap(spoil, jnp.arange(model.config.num_layers), at)
        with pytest.raises(FloatingPointError, match=f"logits of row 1 are not finite at its token {token} "):
            write(model, tap=tap)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        ([[1] * 300], {}, "row 0 has 300 tokens, the model's context 256: shorten the prompt"),
        ([[1] * 250], {}, "and 16 more would go beyond the model's context of 256: .* max_new_tokens of at most 6"),
        ([[1, 2]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1, 2], [3, 4]], {"mask": [[True, True], [False, False]]}, "row 1 has no tokens"),
        ([[1, 2]], {"mask": [[True]]}, r"mask has shape \(1, 1\), tokens have \(1, 2\)"),
        ([[1, 64]], {}, "token id 64 lies outside the model's vocabulary of 64"),
        ([[1, -1]], {}, "token id -1 lies outside"),
        ([[1, 2]], {"max_new_tokens": 2.5}, "max_new_tokens = 2.5; expected a whole number"),
        ([[1, 2]], {"eos": (64,)}, "token id 64 lies outside the model's vocabulary of 64"),
        ([[1, 2]], {"eos": (1.5,)}, r"eos = \(1.5,\); expected token ids"),
        ([[1, 2]], {"top_logprobs": 65}, "top_logprobs = 65; expected 0..64"),
        ([1, 2], {}, r"tokens must be integers \[b, t\]"),
        ([[1.5]], {}, r"tokens must be integers \[b, t\]"),
        ([[1, 2]], {"temperature": -1.0}, "temperature = -1.0"),
        ([[1, 2]], {"temperature": 1.0, "seeds": [1, 2]}, "seeds are int64 of shape"),
    ],
)
def test_what_cannot_be_generated_is_refused_before_any_work(model, tokens, options, message, monkeypatch):
    monkeypatch.setattr("qscope_jax.generation.batch.init_cache", None)
    with pytest.raises(ValueError, match=message):
        generate(model.params, model.config, np.array(tokens), **{"max_new_tokens": NEW, "eos": ()} | options)
