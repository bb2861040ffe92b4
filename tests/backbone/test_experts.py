"""Experts run on their own tokens only, on one device as on many."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from qscope_jax.backbone.experts import _experts_here, expert_mlp, route
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.mesh import make_mesh
from tests.backbone.families import QUICK, make_config

N, E, A, D, M = 24, 8, 3, 6, 5


def inputs(n=N, e=E, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    x, gate, up, down = (rng.normal(size=s) for s in ((n, D), (e, D, M), (e, D, M), (e, M, D)))
    weights, experts = route(jnp.asarray(2 * rng.normal(size=(n, e)), jnp.float32), A, normalise=True)
    x, gate, up, down = (jnp.asarray(array, dtype) for array in (x, gate, up, down))
    return x, weights.astype(dtype), experts, gate, up, down


def oracle(x, weights, experts, gate, up, down):
    """Token by token, expert by expert, in float64."""
    x, weights, gate, up, down = (np.asarray(array, np.float64) for array in (x, weights, gate, up, down))
    out = np.zeros_like(x)
    for i, (row, ws, js) in enumerate(zip(x, weights, np.asarray(experts), strict=True)):
        for w, j in zip(ws, js, strict=True):
            g = row @ gate[j]
            out[i] += w * ((g / (1 + np.exp(-g)) * (row @ up[j])) @ down[j])
    return out


def dense(x, weights, experts, gate, up, down):
    """Every expert on every token, for `jax.grad`."""
    hidden = jax.nn.silu(jnp.einsum("nd,edm->nem", x, gate)) * jnp.einsum("nd,edm->nem", x, up)
    share = jnp.sum(jax.nn.one_hot(experts, gate.shape[0]) * weights[:, :, None], axis=1)
    return jnp.einsum("nem,emd,ne->nd", hidden, down, share)


def with_gradients(function):
    """(a scalar loss, the output), (gradients of x, weights, gate, up, down): compiled quickly, not for speed."""

    def loss(x, weights, experts, gate, up, down):
        out = function(x, weights, experts, gate, up, down)
        return jnp.sum(out**2), out

    step = jax.value_and_grad(loss, argnums=(0, 1, 3, 4, 5), has_aux=True)
    return jax.jit(step, compiler_options=QUICK)


compute = jax.jit(partial(expert_mlp, precision="highest"), compiler_options=QUICK)
compute_with_gradients = with_gradients(partial(expert_mlp, precision="highest"))


def close(found, want, rtol=2e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert np.any(np.asarray(other))
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * np.abs(other).max())


@pytest.mark.parametrize("normalise", [True, False])
def test_the_router_keeps_the_largest_of_a_softmax_over_all(normalise):
    logits = np.random.default_rng(0).normal(size=(N, E)).astype(np.float32)
    weights, experts = route(jnp.asarray(logits, jnp.bfloat16), A, normalise=normalise)
    assert (weights.dtype, experts.dtype) == (jnp.float32, jnp.int32)
    p = np.exp(np.asarray(jnp.asarray(logits, jnp.bfloat16), np.float64))
    p /= p.sum(1, keepdims=True)
    best = np.argsort(-p, axis=1, kind="stable")[:, :A]
    kept = np.take_along_axis(p, best, axis=1)
    np.testing.assert_array_equal(experts, best)
    np.testing.assert_allclose(weights, kept / (kept.sum(1, keepdims=True) if normalise else 1), rtol=1e-6)


@pytest.mark.parametrize("n", [1, 2, N])
def test_it_is_the_weighted_sum_of_each_tokens_experts(n):
    args = inputs(n)
    np.testing.assert_allclose(compute(*args), oracle(*args), rtol=1e-5, atol=1e-5)


def test_bfloat16_keeps_its_type_and_its_accuracy():
    args = inputs(dtype="bfloat16")
    out = compute(*args)
    assert out.dtype == jnp.bfloat16
    want = oracle(*args)
    assert np.linalg.norm(np.asarray(out, np.float64) - want) < 1e-2 * np.linalg.norm(want)


def test_one_expert_may_take_all_tokens():
    x, weights, _, *stacks = inputs()
    args = x, weights, jnp.full((N, A), 5, jnp.int32), *stacks
    np.testing.assert_allclose(compute(*args), oracle(*args), rtol=1e-5, atol=1e-5)


def test_gradients_equal_those_of_every_expert_on_every_token():
    args = inputs()
    close(compute_with_gradients(*args), with_gradients(dense)(*args))


def test_a_token_reads_only_its_own_experts():
    x, weights, experts, *stacks = inputs(n=1)
    unused = np.setdiff1d(np.arange(E), experts)
    poisoned = [stack.at[unused].set(jnp.nan) for stack in stacks]
    want, found = (compute_with_gradients(x, weights, experts, *s) for s in (stacks, poisoned))
    jax.tree.map(np.testing.assert_array_equal, found, want)


@pytest.mark.parametrize("function", [compute, compute_with_gradients], ids=["forward", "gradient"])
def test_temporary_memory_does_not_grow_with_the_experts(function):
    n, d, m = 128, 64, 96

    def temporary(e):
        shapes = [(n, d), (n, A), (n, A), (e, d, m), (e, d, m), (e, m, d)]
        types = [jnp.float32, jnp.float32, jnp.int32, *[jnp.float32] * 3]
        args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, types, strict=True)]
        return function.lower(*args).compile().memory_analysis().temp_size_in_bytes

    assert temporary(128) - temporary(16) < d * m * 4


def layers_of(args):
    """Three layers of experts for the tokens of `args`."""
    return *args[:3], *(jnp.stack([stack, 2 * stack, stack - 1]) for stack in args[3:])


def scanned(reads_in_place, x, weights, experts, *stacks):
    """The sum of all layers, in a loop that says where each layer's experts lie, or hands them out."""

    def layer(total, per_layer):
        *own, index = per_layer
        within = (stacks, index) if reads_in_place else None
        return total + expert_mlp(x, weights, experts, *own, within=within, precision="highest"), None

    return jax.lax.scan(layer, jnp.zeros_like(x), (*stacks, jnp.arange(3)))[0]


def test_a_loop_over_layers_reads_the_experts_where_they_lie():
    args = layers_of(inputs())
    close(*(with_gradients(partial(scanned, reads_in_place))(*args) for reads_in_place in (True, False)))


@pytest.mark.parametrize("stop_after", [None, 2])
def test_a_model_copies_none_of_its_experts(stop_after):
    def temporary(e):
        config = make_config("qwen3_moe", num_experts=e)
        options = {"logits": "none", "stop_after": stop_after, "capture": (2,)}
        run = lambda params, tokens: forward(params, config, tokens, **options).captured  # noqa: E731
        shapes = parameter_shapes(config, jnp.float32), jax.ShapeDtypeStruct((1, 1), jnp.int32)
        return jax.jit(run, compiler_options=QUICK).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporary(256) - temporary(16) < 240 * 16 * 12 * 4 // 2  # half of the growth of one layer's gate


def laid_out(args, mesh):
    x, weights, experts, *stacks = args
    split = "data" if len(x) % mesh.shape["data"] == 0 else None
    tokens = [jax.device_put(array, NamedSharding(mesh, P(split))) for array in (x, weights, experts)]
    return *tokens, *(jax.device_put(stack, NamedSharding(mesh, P("model"))) for stack in stacks)


@pytest.mark.parametrize(("shape", "n"), [((2, 4), N), ((2, 4), 1), ((8, 1), N), ((1, 8), N)], ids=str)
def test_a_mesh_computes_the_same(shape, n):
    args = inputs(n)
    found = compute_with_gradients(*laid_out(args, make_mesh(*shape)))
    close(found, compute_with_gradients(*args))
    for gradient in found[1][2:]:
        assert gradient.sharding.shard_shape(gradient.shape)[0] == E // shape[1]


def gathered(compiled, args):
    """Arrays of three or more dimensions, as stacks of experts are, that devices hand to one another."""
    text = compiled.lower(*args).compile().as_text()
    moved = re.findall(r"= \(?\w+\[([\d,]*)\].* (?:all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    return [shape for shape in moved if shape.count(",") > 1]


def test_no_experts_weights_travel():
    mesh = make_mesh(2, 4)
    args = laid_out(inputs(), mesh)
    x, weights, experts, *stacks = layers_of(args)
    layers = x, weights, experts, *(jax.device_put(a, NamedSharding(mesh, P(None, "model"))) for a in stacks)
    in_place = jax.jit(partial(scanned, True), compiler_options=QUICK)
    close(in_place(*layers), in_place(*layers_of(inputs())))
    assert gathered(compute, args) == gathered(compute_with_gradients, args) == gathered(in_place, layers) == []
    # What the search is for: left alone, the compiler hands out whole stacks.
    whole = lambda x, w, experts, *own: _experts_here(x, w, experts, own, None, first=0, precision=None)  # noqa: E731
    assert gathered(jax.jit(whole, compiler_options=QUICK), args)
