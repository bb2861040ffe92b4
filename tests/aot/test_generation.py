"""Decoding on an H200 that is not there: single layers are read where they lie, a scan's slices of them are copies.

Four layers of Qwen3-1.7B in bfloat16, one row.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.generation.sampling import check_sampling
from qscope_jax.generation.steps import Given, Steps
from qscope_jax.mesh import sharding

pytestmark = pytest.mark.aot

RELEASED = json.loads((Path(__file__).parents[1] / "goldens" / "released.json").read_text())
LAYERS, NEW = 4, 128


def test_a_decode_step_on_an_h200_copies_no_mlp(h200s):
    mesh = h200s(1)
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding((None,) * a.ndim, a.shape, mesh))  # noqa: E731
    config = ModelConfig.from_hf(RELEASED["Qwen3-1.7B-Base"]["config"], precision="default")
    config = dataclasses.replace(config, num_layers=LAYERS, layer_types=config.layer_types[:LAYERS])
    stacked, steps = parameter_shapes(config, jnp.bfloat16, mesh=mesh), Steps(config)
    one = jax.tree.map(lambda a: place(jax.ShapeDtypeStruct(a.shape[1:], a.dtype)), stacked["period"][0])
    split = {name: leaf for name, leaf in stacked.items() if name != "period"} | {"layers": (one,) * LAYERS}
    given = Given(check_sampling(1), jnp.zeros(8, jnp.int32), jnp.zeros((), jnp.int32), jnp.ones(1, jnp.int32))
    cache = jax.eval_shape(lambda: init_cache(config, 1, 2 * NEW))
    prompt = np.zeros((1, NEW), np.int32), np.ones((1, NEW), bool)
    prefill = lambda *arrays: steps._prefill(*arrays, NEW, 0)[0]  # noqa: E731
    state = jax.tree.map(place, jax.eval_shape(prefill, stacked, None, given, *prompt, cache))
    rest = jax.tree.map(place, (given, jnp.int32(NEW), jnp.zeros(1, bool)))

    def copies(params):
        program = steps.decode.lower(params, None, rest[0], state, *rest[1:]).compile()
        made = r"= bf16\[(?:1,)?(?:2048,6144|6144,2048)\]\S* (?:copy|fusion|dynamic-slice)\("
        return re.findall(made, program.as_text())

    assert not copies(split)
    assert copies(stacked)  # what this test would find
