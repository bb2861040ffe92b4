"""Layers one by one are the stack: the same memory, the same outputs, cut anywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import split_layers
from qscope_jax.taps import Tap
from tests.backbone.families import QUICK, make_config, make_params, relative_l2, tokens_of


def nudge(h, by, shared, ctx):
    return h + by, (h[..., 0], by)


@pytest.mark.parametrize("family", ["qwen3", pytest.param("qwen3_5_moe", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("stop_after", "consume"), [(None, False), (5, True)])
def test_they_give_what_the_scan_gives(family, stop_after, consume):
    config = make_config(family)
    params, tokens = make_params(config), tokens_of(2, 9)
    run = jax.jit(forward, static_argnames=("capture", "stop_after"), compiler_options=QUICK)
    options = {"tap": Tap(nudge, jnp.linspace(0.1, 0.3, 8)), "capture": (4, 1), "stop_after": stop_after}
    expected = run(params, config, tokens, **options)
    found = run(split_layers(params, config, consume=consume), config, tokens, **options)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.shape == theirs.shape
        assert relative_l2(ours, theirs) < 1e-5


def test_they_lie_where_the_stack_lies():
    stack = jnp.arange(3 * 4 * 16, dtype=jnp.float32).reshape(3, 4, 16)
    config = make_config("qwen3", num_hidden_layers=3)
    layers = split_layers({"embed": stack, "period": ({"w": stack},)}, config)["layers"]
    for number, layer in enumerate(layers):
        assert layer["w"].unsafe_buffer_pointer() == stack.unsafe_buffer_pointer() + number * stack[0].nbytes
        np.testing.assert_array_equal(layer["w"], stack[number])


def test_copies_free_every_stack():
    config = make_config("qwen3_5")
    params = make_params(config)
    expected = split_layers(jax.tree.map(jnp.copy, params), config)
    found = split_layers(params, config, consume=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params["period"]))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(found))
