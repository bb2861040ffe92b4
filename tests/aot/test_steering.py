"""A steered decode step of a Qwen3-1.7B-shaped model compiles for TPUs and H200s, and copies no encoder.

Four layers (a scan makes all depths one program), two of them with SAEs of 32,768 latents.
"""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.mesh import sharding
from qscope_jax.sae.model import AXES, Sae, SaeConfig, SaeParams
from qscope_jax.steering.slots import Entries
from qscope_jax.steering.tap import PerLayer, Shared, apply_recipes
from qscope_jax.taps import Tap

pytestmark = pytest.mark.aot

RELEASED = json.loads((Path(__file__).parents[1] / "goldens" / "released.json").read_text())
LAYERS, D, F, K, ROWS, E = 4, 2048, 32768, 50, 64, 2


def shapes(mesh):
    """The tap of two clamps, as shapes: nothing of this size is made."""
    place = lambda shape, dtype, *axes: jax.ShapeDtypeStruct(  # noqa: E731
        shape, dtype, sharding=sharding(axes or (None,) * len(shape), shape, mesh)
    )
    sizes = {"w_enc": (D, F), "b_enc": (F,), "w_dec": (F, D), "b_dec": (D,)}
    sae = Sae(SaeParams(**{n: place(s, jnp.float32, *AXES[n]) for n, s in sizes.items()}), SaeConfig(D, F, K))
    numbers = {"direction": (jnp.float32, (D,)), "strength": (jnp.float32, ()), "ranges": (jnp.int32, (8, 3))}
    numbers["preserve"] = (jnp.bool_, ())
    entries = {
        name: place((1, E, *numbers.get(name, (None, ()))[1]), numbers.get(name, (jnp.int32,))[0])
        for name in Entries._fields
    }
    per_layer = PerLayer(*(place((LAYERS,), kind) for kind in (jnp.int32, jnp.bool_, jnp.int32)))
    return Tap(apply_recipes, per_layer, Shared(Entries(**entries), (sae, sae)))


def compile_decode(mesh, tap):
    raw = RELEASED["Qwen3-1.7B-Base"]["config"]
    config = ModelConfig.from_hf(raw, precision="default")
    config = dataclasses.replace(config, num_layers=LAYERS, layer_types=config.layer_types[:LAYERS])
    params = parameter_shapes(config, jnp.bfloat16, mesh=mesh)
    places = lambda *axes: sharding(axes, (ROWS,) * len(axes), mesh)  # noqa: E731
    cache = jax.eval_shape(lambda: init_cache(config, ROWS, 256, mesh=mesh))
    token = jax.ShapeDtypeStruct((ROWS, 1), jnp.int32, sharding=places("batch", None))
    lengths = jax.ShapeDtypeStruct((ROWS,), jnp.int32, sharding=places("batch"))

    def decode(params, cache, token, tap, lengths, steps):
        def step(state):
            i, cache, token = state
            out = forward(params, config, token, cache=cache, tap=tap, prompt_lengths=lengths)
            return i + 1, out.cache, jnp.argmax(out.logits, axis=-1).astype(jnp.int32)

        return jax.lax.while_loop(lambda state: state[0] < steps, step, (0, cache, token))

    return jax.jit(decode, donate_argnums=1).lower(params, cache, token, tap, lengths, 9).compile()


@pytest.mark.parametrize(("data", "model"), [(1, 8), pytest.param(8, 1, marks=pytest.mark.all)])
def test_a_steered_decode_copies_no_encoder_on_tpus(tpu_mesh, collectives, data, model):
    mesh = tpu_mesh("v5e:2x4", data, model)
    steered = compile_decode(mesh, shapes(mesh))
    check(steered, model)
    assert not [sizes for name, sizes in collectives(steered) if name == "all-gather" and max(sizes) >= D * F // 8]


def test_a_steered_decode_copies_no_encoder_on_h200s(h200s):
    mesh = h200s(1)
    plain, steered = (compile_decode(mesh, tap) for tap in (None, shapes(mesh)))
    check(steered, 1)
    more = steered.memory_analysis().temp_size_in_bytes - plain.memory_analysis().temp_size_in_bytes
    assert more < 2**20  # what the logits need is there for the codes as well


def check(program, shards):
    text, encoder = program.as_text(), rf"\[{D},{F // shards}\]"
    assert re.search("f32" + encoder, text)
    assert not re.findall(rf"= (?:f32|bf16){encoder}\S* (?:copy|transpose|convert|fusion)\(", text)
