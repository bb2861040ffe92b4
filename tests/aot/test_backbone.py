"""On v5e:2x4, the released mixtures of experts compile without a dense expansion, and no weight travels.

Cut to one period (a scan makes all depths one program); real widths, bfloat16, eight rows of 1,024 tokens.
"""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import parameter_shapes
from qscope_jax.mesh import sharding

pytestmark = pytest.mark.aot

RELEASED = json.loads((Path(__file__).parents[1] / "goldens" / "released.json").read_text())
ROWS, T = 8, 1024


def states(params, config, tokens):
    return forward(params, config, tokens, logits="none").hidden


def loss(params, config, tokens):
    hidden = forward(params, config, tokens, logits="none", remat="full").hidden
    return jnp.sum(jnp.square(hidden.astype(jnp.float32)))


@pytest.fixture(params=["Qwen3-30B-A3B-Base", "Qwen3.5-35B-A3B-Base"])
def config(request):
    config = ModelConfig.from_hf(RELEASED[request.param]["config"], precision="default")
    period = config.period
    return dataclasses.replace(config, num_layers=2 * len(period), layer_types=period * 2)


@pytest.mark.parametrize("step", [states, jax.grad(loss)], ids=["forward", "gradient"])
def test_experts_stay_where_they_lie(tpu_mesh, collectives, config, step):
    mesh = tpu_mesh("v5e:2x4", 2, 4)
    params = parameter_shapes(config, jnp.bfloat16, mesh=mesh)
    tokens = jax.ShapeDtypeStruct((ROWS, T), jnp.int32, sharding=sharding(("batch", None), (ROWS, T), mesh))
    places = None if step is states else jax.tree.map(lambda leaf: leaf.sharding, params)
    compiled = jax.jit(step, out_shardings=places).lower(params, config, tokens).compile()
    stack = params["period"][0]["moe"]["gate"].shape  # periods, experts, d, m
    gathered = [max(counts) for name, counts in collectives(compiled) if name == "all-gather"]
    assert max(gathered, default=0) < math.prod(stack[1:]) // 4, "less than one device's experts of one layer"
    memory = compiled.memory_analysis()
    used = {name: leaf for name, leaf in params.items() if name != "head"}  # no logits are asked for
    shares = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(used)]
    assert memory.argument_size_in_bytes == pytest.approx(sum(shares), rel=0.01)  # padded to tiles
    # A dense expansion would multiply every token by every expert: [tokens, experts, m] on each device.
    dense = ROWS // 2 * T * stack[1] // 4 * stack[3] * 2
    if step is states:
        assert memory.temp_size_in_bytes < dense
