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
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.mesh import sharding

pytestmark = pytest.mark.aot

RELEASED = json.loads((Path(__file__).parents[1] / "goldens" / "released.json").read_text())
ROWS, T = 8, 1024


def states(params, config, tokens):
    return forward(params, config, tokens, logits="none").hidden


def loss(params, config, tokens):
    hidden = forward(params, config, tokens, logits="none", remat="full").hidden
    return jnp.sum(jnp.square(hidden.astype(jnp.float32)))


NAMES = ["Qwen3-30B-A3B-Base", "Qwen3.5-35B-A3B-Base"]
STEPS = {"forward": states, "gradient": jax.grad(loss)}


def compiled(mesh, name, step, **changes):
    """The parameters' shapes and the program, for two periods of a released model."""
    config = ModelConfig.from_hf(RELEASED[name]["config"], precision="default")
    assert config.moe is not None
    moe, period = dataclasses.replace(config.moe, **changes), config.period
    config = dataclasses.replace(config, moe=moe, num_layers=2 * len(period), layer_types=period * 2)
    params = parameter_shapes(config, jnp.bfloat16, mesh=mesh)
    tokens = jax.ShapeDtypeStruct((ROWS, T), jnp.int32, sharding=sharding(("batch", None), (ROWS, T), mesh))
    places = jax.tree.map(lambda leaf: leaf.sharding, params) if step == "gradient" else None
    return params, jax.jit(STEPS[step], out_shardings=places).lower(params, config, tokens).compile()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", ["forward", pytest.param("gradient", marks=pytest.mark.all)])
def test_experts_stay_where_they_lie(tpu_mesh, collectives, name, step):
    params, program = compiled(tpu_mesh("v5e:2x4", 2, 4), name, step)
    stack = params["period"][0]["moe"]["gate"].shape  # periods, experts, d, m
    gathered = [max(counts) for name, counts in collectives(program) if name == "all-gather"]
    assert max(gathered, default=0) < math.prod(stack[1:]) // 4, "less than one device's experts of one layer"
    used = {name: leaf for name, leaf in params.items() if name != "head"}  # no logits are asked for
    shares = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(used)]
    assert program.memory_analysis().argument_size_in_bytes == pytest.approx(sum(shares), rel=0.01)  # padded to tiles


def test_temporaries_do_not_grow_with_the_number_of_experts(tpu_mesh):
    mesh = tpu_mesh("v5e:2x4", 1, 8)
    few, many = (
        compiled(mesh, NAMES[0], "forward", num_experts=experts)[1].memory_analysis().temp_size_in_bytes
        for experts in (32, 128)
    )
    # Router logits, their softmax and (from libtpu 0.0.52 on) part of a copy do; a layer's matrices of those experts
    # that a device holds would be twelve times as much.
    assert many - few < 3 * 4 * ROWS * T * (128 - 32)
