"""What holds for the program of every family, whatever it computes."""

import re

import jax
import jax.numpy as jnp
import pytest

from qscope_jax.backbone.forward import forward, init_params
from qscope_jax.backbone.parameters import parameter_shapes
from tests.backbone.families import FAMILIES, make_config, tokens_of

TOKENS = tokens_of(2, 70)


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def shapes_of(family, dtype=jnp.float32, **changes):
    config = make_config(family, **changes)
    return config, parameter_shapes(config, dtype)


@pytest.mark.slow
def test_the_program_does_not_grow_with_depth(family):
    def lines(layers):
        config, shapes = shapes_of(family, num_hidden_layers=layers)
        go = lambda p: jnp.sum(forward(p, config, TOKENS, capture=(0, 2), remat="full").logits)  # noqa: E731
        return jax.jit(jax.grad(go)).lower(shapes).as_text().count("\n")

    assert lines(64) == lines(8)


def test_it_grows_neither_with_the_number_of_experts():
    def lines(experts):
        config, shapes = shapes_of("qwen3_5_moe", num_experts=experts)
        return jax.jit(lambda p: forward(p, config, TOKENS).logits).lower(shapes).as_text().count("\n")

    assert lines(128) == lines(8)


def test_every_matmul_of_the_parity_mode_is_float32(family):
    config, shapes = shapes_of(family)
    text = str(jax.make_jaxpr(lambda p: forward(p, config, TOKENS).logits)(shapes))
    made = re.findall(r"dot_general\[(.*?)\n\s*\]", text, re.DOTALL)
    assert len(made) >= 10
    assert all("HIGHEST" in options and "DEFAULT" not in options for options in made)


def test_the_fast_mode_computes_in_bfloat16_but_for_the_delta_rules_own_weights(family):
    config, shapes = shapes_of(family, jnp.bfloat16)
    kinds = {jax.tree_util.keystr(path[-2:]) for path, leaf in
             jax.tree_util.tree_leaves_with_path(shapes) if leaf.dtype == jnp.float32}  # fmt: skip
    assert kinds == ({"['mixer']['a_log']", "['norm']['scale']"} if config.hybrid else set())
    out = jax.eval_shape(lambda p: forward(p, config, TOKENS, capture=(1,)), shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(out)} == {jnp.dtype("bfloat16")}


def test_init_gives_the_tree_that_loading_gives(family):
    for dtype in (jnp.float32, jnp.bfloat16):
        config, shapes = shapes_of(family, dtype)
        assert jax.eval_shape(lambda c=config, d=dtype: init_params(jax.random.key(0), c, dtype=d)) == shapes
