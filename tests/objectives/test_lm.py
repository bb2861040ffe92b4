"""Chunked losses equal their definitions in float64, gradients included, and never hold logits of all tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.mesh import make_mesh
from qscope_jax.objectives.lm import cross_entropy_loss, kl_loss, next_tokens

B, T, D, V = 3, 11, 6, 37
RNG = np.random.default_rng(0)
HIDDEN, OTHER = (RNG.normal(size=(B, T, D)).astype(np.float32) for _ in range(2))
HEAD = RNG.normal(size=(V, D)).astype(np.float32)
TARGETS, KEEP = RNG.integers(0, V, (B, T)), RNG.random((B, T)) < 0.7


def log_softmax(hidden, head=HEAD):
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def plain_entropy(hidden):
    return -np.take_along_axis(log_softmax(hidden), TARGETS[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 3, 4 * B, 1000])
def test_cross_entropy_equals_its_definition_whatever_the_chunk(chunk):
    loss, sums = cross_entropy_loss(HIDDEN, HEAD, TARGETS, KEEP, chunk_tokens=chunk, precision="highest")
    each = plain_entropy(HIDDEN)[KEEP]
    assert loss == pytest.approx(each.mean(), rel=1e-6)
    assert sums["cross_entropy"] == pytest.approx(each.sum(), rel=1e-6)
    assert sums["tokens"] == KEEP.sum()


def test_kl_equals_its_definition_and_brings_the_cross_entropy_of_the_second():
    loss, sums = kl_loss(HIDDEN, OTHER, HEAD, TARGETS, KEEP, chunk_tokens=7, precision="highest")
    log_q, log_p = log_softmax(HIDDEN), log_softmax(OTHER)
    each = (np.exp(log_p) * (log_p - log_q)).sum(axis=-1)[KEEP]
    assert loss == pytest.approx(each.mean(), rel=1e-6)
    assert sums["kl"] == pytest.approx(each.sum(), rel=1e-6)
    assert sums["cross_entropy"] == pytest.approx(plain_entropy(HIDDEN)[KEEP].sum(), rel=1e-6)


def test_kl_of_a_model_from_itself_is_exactly_zero():
    assert kl_loss(HIDDEN, HIDDEN, HEAD, TARGETS, KEEP)[0] == 0


def test_gradients_equal_those_of_the_whole_at_once():
    def whole(hidden, head):
        log_p = jax.nn.log_softmax(jnp.einsum("btd,vd->btv", hidden, head, precision="highest"))
        return -jnp.mean(jnp.take_along_axis(log_p, TARGETS[..., None], axis=-1)[..., 0], where=KEEP)

    def chunked(hidden, head):
        return cross_entropy_loss(hidden, head, TARGETS, KEEP, chunk_tokens=2 * B, precision="highest")[0]

    for found, expected in zip(*(jax.grad(f, argnums=(0, 1))(HIDDEN, HEAD) for f in (chunked, whole)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def shapes_of(jaxpr):
    """The shapes of every value in a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield from (getattr(v.aval, "shape", ()) for v in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from shapes_of(inner)


def test_no_array_of_all_tokens_times_the_vocabulary_exists_not_even_in_the_gradient():
    b, t, v, chunk = 2, 64, 512, 16
    hidden, head = jnp.zeros((b, t, D)), jnp.zeros((v, D))
    targets, keep = jnp.zeros((b, t), int), jnp.ones((b, t), bool)

    def losses(hidden, head):
        return (
            cross_entropy_loss(hidden, head, targets, keep, chunk_tokens=chunk)[0]
            + kl_loss(hidden, hidden + 1, head, targets, keep, chunk_tokens=chunk)[0]
        )

    jaxpr = jax.make_jaxpr(jax.value_and_grad(losses, argnums=(0, 1)))(hidden, head).jaxpr
    largest = max(int(np.prod(shape)) for shape in shapes_of(jaxpr))
    assert chunk * v <= largest < b * t * v // 2


def test_bfloat16_states_have_float32_losses():
    hidden, head = jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(HEAD, jnp.bfloat16)
    loss, _ = cross_entropy_loss(hidden, head, TARGETS, KEEP)
    log_p = log_softmax(hidden, head)
    assert loss.dtype == jnp.float32
    expected = -np.take_along_axis(log_p, TARGETS[..., None], axis=-1)[..., 0][KEEP].mean()
    assert loss == pytest.approx(expected, rel=1e-5)


def test_positions_that_do_not_count_may_hold_anything_and_none_at_all_gives_zero():
    junk = np.where(KEEP[..., None], HIDDEN, 1e30).astype(np.float32)
    expected = cross_entropy_loss(HIDDEN, HEAD, TARGETS, KEEP)[0]
    assert cross_entropy_loss(junk, HEAD, np.where(KEEP, TARGETS, V + 5), KEEP)[0] == expected
    assert cross_entropy_loss(HIDDEN, HEAD, TARGETS, np.zeros_like(KEEP))[0] == 0


def test_the_next_token_is_a_real_one_of_the_same_document():
    tokens = np.array([[5, 6, 7, 8, 9, 0]])
    mask = np.array([[True, True, True, True, True, False]])
    targets, keep = next_tokens(tokens, mask, np.array([[0, 0, 1, 1, 1, 1]]))
    assert keep.tolist() == [[True, False, True, True, False, False]]
    assert targets[keep].tolist() == [6, 8, 9]


def test_on_a_mesh_neither_the_head_nor_logits_travel(collectives):
    mesh = make_mesh(2, 4)
    place = lambda a, *axes: jax.device_put(a, NamedSharding(mesh, PartitionSpec(*axes)))  # noqa: E731
    rng, (b, t, v) = np.random.default_rng(1), (4, 8, 64)
    hidden, other = (rng.normal(size=(b, t, D)).astype(np.float32) for _ in range(2))
    head = rng.normal(size=(v, D)).astype(np.float32)
    targets, keep = rng.integers(0, v, (b, t)), rng.random((b, t)) < 0.7

    def losses(hidden, other, head, targets, keep):
        options = {"chunk_tokens": 16, "precision": "highest"}
        entropy = cross_entropy_loss(hidden, head, targets, keep, **options)[0]
        return entropy + kl_loss(hidden, other, head, targets, keep, **options)[0]

    arrays = (
        [place(a, "data") for a in (hidden, other)]
        + [place(head, "model")]
        + [place(a, "data") for a in (targets, keep)]
    )
    program = jax.jit(jax.value_and_grad(losses, argnums=0)).lower(*arrays).compile()
    (loss, gradient), expected = program(*arrays), jax.value_and_grad(losses)(hidden, other, head, targets, keep)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, expected[1], rtol=1e-4, atol=1e-7)
    moved = [size for _, sizes in collectives(program) for size in sizes]
    assert max(moved) <= 8 * D  # a chunk's gradient per device; a shard of the head has 16 rows, logits 16 columns
