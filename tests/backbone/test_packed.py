"""Documents packed into rows equal documents alone, in every family: outputs, gradients, and nothing leaks.

The delta rule runs in chunks of 64 tokens: documents begin at a chunk's border, one token before it and after it,
several in a chunk, and one longer than a chunk.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.forward import forward
from tests.backbone.families import FAMILIES, HYBRIDS, QUICK, VOCAB, make_config, make_params, relative_l2, tokens_of

T = 200
LAYERS = (0, 3, 6)
# Id, first column and length of the documents of both rows; what they leave free are pads: left, between, right.
DOCUMENTS = (
    [(2, 0, 63), (3, 63, 2), (7, 65, 64), (8, 129, 1), (20, 130, 66)],
    [(0, 3, 61), (1, 64, 64), (5, 130, 1), (6, 131, 3), (9, 140, 52), (10, 192, 8)],
)
PLACES = [(row, slice(start, start + n)) for row, documents in enumerate(DOCUMENTS) for _, start, n in documents]
TOKENS = tokens_of(2, T)
MASK, IDS = np.zeros((2, T), bool), np.full((2, T), -3)
for (row, place), (name, *_) in zip(PLACES, DOCUMENTS[0] + DOCUMENTS[1], strict=True):
    MASK[row, place], IDS[row, place] = True, name


class Model:
    """A family's parameters and its compiled outputs and gradients, for rows of one length."""

    def __init__(self, family):
        self.config = make_config(family)
        self.params = make_params(self.config)
        run = lambda p, tokens, mask, ids: forward(  # noqa: E731
            p, self.config, tokens, mask=mask, segment_ids=ids, capture=LAYERS
        )
        self.run = functools.partial(jax.jit(run, compiler_options=QUICK), self.params)
        self.packed = functools.cache(lambda: self.run(TOKENS, MASK, IDS))
        loss = lambda *args: surprise(run(*args).logits, *args[1:])  # noqa: E731
        self.gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return _model(request.param)


_model = functools.cache(Model)


def surprise(logits, tokens, mask, ids):
    """The summed cross-entropy of every token that follows another of its document."""
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(mask[:, 1:] & mask[:, :-1] & (ids[:, 1:] == ids[:, :-1]), log_p, 0))


def alone(row, place, tokens=TOKENS):
    """The arguments that hold one document at the start of the first row, and nothing else."""
    n = place.stop - place.start
    only, mask = np.zeros((2, T), int), np.zeros((2, T), bool)
    only[0, :n], mask[0, :n] = tokens[row, place], True
    return only, mask, np.zeros((2, T), int)


def parts(out, row, place):
    return [np.asarray(a) for a in (out.hidden[row, place], out.logits[row, place], *out.captured[:, row, place])]


@pytest.mark.slow
def test_packed_documents_equal_documents_alone(model):
    assert np.isfinite(model.packed().logits).all()  # at pads too
    for row, place in PLACES:
        single = parts(model.run(*alone(row, place)), 0, slice(place.stop - place.start))
        for found, expected in zip(parts(model.packed(), row, place), single, strict=True):
            assert relative_l2(found, expected) < 1e-5, f"row {row}, {place}"


def test_no_document_sees_another(model):
    """New tokens in one document leave every bit of all others; so do new tokens and ids at pads."""
    for changed in (*PLACES, None):
        where = np.zeros((2, T), bool) if changed else ~MASK
        if changed:
            where[changed] = True
        out = model.run(np.where(where, (TOKENS + 1) % VOCAB, TOKENS), MASK, np.where(MASK, IDS, 99))
        for row, place in PLACES:
            found, expected = (parts(o, row, place) for o in (out, model.packed()))
            if changed == (row, place):
                assert not any(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
            else:
                jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_numbers_of_the_ids_do_not_matter(model):
    jax.tree.map(np.testing.assert_array_equal, model.run(TOKENS, MASK, 5 * IDS + 40), model.packed())


def blind(params, token):
    """Parameters whose first layer gives this token queries and keys of exactly zero, and tokens that begin with it."""
    first = params["period"][0]
    mixer = first["mixer"] | {name: first["mixer"][name].at[0, 0].set(0) for name in "qk"}
    embed = params["embed"].at[token].set(0).at[token, 0].set(1)
    return params | {"embed": embed, "period": (first | {"mixer": mixer}, *params["period"][1:])}


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen3", "qwen3_moe", "qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)]
)
def test_gradients_of_packed_documents_are_the_sum_of_those_alone(family):
    """Finite ones, although every document begins with a token whose query and key are zero vectors."""
    model = _model(family)
    tokens, params = TOKENS.copy(), blind(model.params, 7)
    for row, place in PLACES:
        tokens[row, place.start] = 7
    packed = model.gradients(params, tokens, MASK, IDS)
    singles = [model.gradients(params, *alone(row, place, tokens)) for row, place in PLACES]
    for path, found in jax.tree_util.tree_leaves_with_path(packed):
        expected = sum(_leaf(single, path) for single in singles)
        assert np.isfinite(found).all(), path
        # The limit of torch's gradients; one float32 ulp in the weights moves some of these by four times as much.
        assert relative_l2(found, expected) < 1e-4, path


def _leaf(tree, path):
    for key in path:
        tree = tree[getattr(key, "key", getattr(key, "idx", None))]
    return np.asarray(tree, np.float64)


def test_ids_that_go_backwards_are_refused_with_their_place():
    config = make_config("qwen3")
    params = make_params(config)
    ids, mask = np.array([[0, 0, 1, 1], [4, 5, 3, 6]]), np.ones((2, 4), bool)
    message = r"segment_ids go backwards in row 1: 5 at column 1, 3 at column 2; number the documents of a row"
    with pytest.raises(ValueError, match=message):
        forward(params, config, np.zeros((2, 4), int), segment_ids=ids)
    mask[1, 1] = False  # a pad's id says nothing; the tokens beside it still go from 4 to 3
    with pytest.raises(ValueError, match="row 1: 4 at column 0, 3 at column 2"):
        forward(params, config, np.zeros((2, 4), int), mask=mask, segment_ids=ids)
    mask[1, 2] = False
    forward(params, config, np.zeros((2, 4), int), mask=mask, segment_ids=ids)
    # Where `jit` hides the mask nothing is judged by ids that may be those of pads.
    jax.eval_shape(lambda mask: forward(params, config, np.zeros((2, 4), int), mask=mask, segment_ids=ids), mask)


def test_ids_that_go_backwards_from_one_call_to_the_next_are_refused():
    config = make_config("qwen3")
    params, cache = make_params(config), init_cache(make_config("qwen3"), 1, 8)
    cache = forward(params, config, np.zeros((1, 3), int), segment_ids=np.array([[2, 2, 5]]), cache=cache).cache
    with pytest.raises(ValueError, match="in row 0: 5 at the end of the cache, 4 at column 0"):
        forward(params, config, np.zeros((1, 2), int), segment_ids=np.array([[4, 6]]), cache=cache)


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_pads_inside_a_segment_are_refused_where_layers_cannot_skip_them(family):
    config = make_config(family, num_hidden_layers=4)
    params, tokens = make_params(config), tokens_of(2, 9)
    mask = np.ones((2, 9), bool)
    mask[1, 4] = False
    with pytest.raises(ValueError, match="mask has pads inside a segment of row 1, behind column 3; linear layers"):
        forward(params, config, tokens, mask=mask)
    hidden = jax.jit(lambda mask: forward(params, config, tokens, mask=mask).hidden, compiler_options=QUICK)(mask)
    assert np.isfinite(hidden[0]).all()
    assert np.isnan(hidden[1]).all()
    forward(params, config, tokens, mask=mask, segment_ids=np.array([[0] * 9, [0] * 4 + [1] * 5]))


@pytest.mark.slow
@pytest.mark.parametrize("family", HYBRIDS)
def test_zero_vectors_pass_through_the_l2_norm_with_finite_gradients(family):
    config = make_config(family, num_hidden_layers=4)
    params = make_params(config)
    for slot in params["period"]:
        slot["mixer"] |= {name: jnp.zeros_like(slot["mixer"][name]) for name in ("q", "k")}
    loss = lambda params: jnp.sum(forward(params, config, tokens_of(1, 9)).hidden ** 2)  # noqa: E731
    gradients = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
