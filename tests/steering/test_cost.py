"""What steering costs: nothing at layers where no entry works, almost nothing for `add`, no weight moved on a mesh."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.mesh import make_mesh, sharding
from qscope_jax.sae.model import AXES, Sae, SaeParams
from qscope_jax.steering import MODES, Steer, count_applied, steer
from tests.backbone.families import QUICK, make_config, make_params
from tests.steering.conftest import LATENTS, LAYERS, LENGTHS, WIDTH, make_sae


def subprograms(equation):
    for value in equation.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if (inner := getattr(part, "jaxpr", part)) is not part or hasattr(part, "eqns"):
                yield getattr(inner, "jaxpr", inner)


def shapes_outside_conditions(jaxpr):
    """Shapes of all results that are computed whatever a condition says."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(var.aval.shape) for var in equation.outvars}
        if equation.primitive.name != "cond":
            for inner in subprograms(equation):
                found |= shapes_outside_conditions(inner)
    return found


def traced(model, recipes):
    tap = steer(recipes, model.saes)
    run = jax.jit(lambda p, tap: forward(p, model.config, model.tokens, mask=model.mask, tap=tap).logits)
    return run.trace(model.params, tap)


def test_encoders_run_behind_a_condition_only(model):
    trace = traced(model, [Steer(1, 11, 2.0, "clamp"), Steer(2, 18, 2.0, "scale")])
    pre_activations = (model.tokens.size, LATENTS)
    assert pre_activations not in shapes_outside_conditions(trace.jaxpr.jaxpr)
    assert str(pre_activations[0]) + "," + str(LATENTS) in str(trace.jaxpr)  # they are there
    text = trace.lower().compile(compiler_options=QUICK).as_text()
    always = computed_always(text)
    wide = re.compile(rf"= f32\[{pre_activations[0]},{LATENTS}\]")
    assert wide.search(text)
    assert not [name for name, body in always.items() if wide.search(body)]
    assert not re.search(rf"f32\[{WIDTH},{LATENTS}\]\S* (copy|transpose)\(", text)  # encoders are read in place


def computed_always(text):
    """The computations of a compiled program that run whatever its conditionals say, by name."""
    bodies = dict(re.findall(r"^(?:ENTRY )?%?([\w.-]+) \([^\n]*\{\n(.*?)^\}", text, re.MULTILINE | re.DOTALL))
    entry = re.search(r"^ENTRY %?([\w.-]+)", text, re.MULTILINE)[1]
    reached, left = {}, [entry]
    while left:
        name = left.pop()
        if name in reached:
            continue
        reached[name] = bodies[name]
        for line in bodies[name].splitlines():
            if " conditional(" not in line:
                left += [called for called in re.findall(r"%?([\w.-]+)", line) if called in bodies]
    return reached


def work(jaxpr):
    """FLOPs of a program: of matmuls, and one per number that anything else writes; conditions at their dearest."""
    total = 0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, list(subprograms(equation))
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "cond":
            total += max(map(work, inner))
        elif inner:
            total += equation.params.get("length", 1) * sum(map(work, inner))
        else:
            total += sum(math.prod(var.aval.shape) for var in equation.outvars)
    return total


QWEN3_1_7B = {
    "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 6144,
    "rms_norm_eps": 1e-6, "rope_theta": 1000000, "max_position_embeddings": 32768, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 1), (2, 64)])
def test_adding_costs_less_than_a_thousandth_of_the_flops(shape):
    config = ModelConfig.from_hf(QWEN3_1_7B)
    params = parameter_shapes(config, jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct(shape, jnp.int32)
    tap = steer([Steer(20, direction=np.ones(2048), strength=3.0)], {}, num_layers=28)
    run = lambda tap: jax.make_jaxpr(lambda p, t: forward(p, config, t, tap=tap))(params, tokens).jaxpr  # noqa: E731
    alone, steered = work(run(None)), work(run(tap))
    assert alone > 2 * 1.7e9 * math.prod(shape)
    assert 0 < steered - alone < 1e-3 * alone  # counted as if all 28 layers were steered


def lay_out(sae, mesh):
    arrays = sae.params._asdict().items()
    places = {name: sharding(AXES[name], array.shape, mesh) for name, array in arrays}
    return Sae(SaeParams(**{name: jax.device_put(array, places[name]) for name, array in arrays}), sae.config)


def test_on_a_mesh_it_does_what_one_device_does(model, collectives):
    mesh, latents = make_mesh(4, 2), 32
    config = make_config("qwen3", num_hidden_layers=LAYERS, vocab_size=48)
    params, shapes = make_params(config), parameter_shapes(config, jnp.float32, mesh=mesh)
    spread = jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), params, shapes)
    saes = {layer: make_sae(layer, latents=latents) for layer in range(LAYERS)}
    tokens, mask, lengths = (np.concatenate([a, a[:1]]) for a in (model.tokens % 48, model.mask, np.array(LENGTHS)))
    strengths = {"add": 2.0, "clamp": 5.0, "min-clamp": 30.0, "ablate": None, "scale": -1.0, "project": 3.0}
    always = [Steer(2, 9, 1.4), Steer(3, 5, 6.0, "clamp", positions="generated")]
    rows = [[Steer(1, 3, strengths[mode], mode), *always] for mode in (*MODES, "add", "clamp")]
    run = jax.jit(forward, static_argnums=1, compiler_options=QUICK)
    inputs = {"mask": mask, "prompt_lengths": jnp.asarray(lengths)}
    alone = run(params, config, tokens, tap=steer(rows, saes), **inputs)
    tap = steer(rows, {layer: lay_out(sae, mesh) for layer, sae in saes.items()})
    together = run(spread, config, tokens, tap=tap, **inputs)
    np.testing.assert_allclose(together.logits[mask], alone.logits[mask], rtol=1e-4, atol=1e-4)
    counts = [count_applied(out.taps) for out in (alone, together)]
    for one, many in zip(*counts, strict=True):
        np.testing.assert_array_equal(one, many)
    assert counts[0].changed.any(axis=0).all()
    moved = collectives(run.lower(spread, config, tokens, tap=tap, **inputs).compile())
    assert moved
    assert not [item for item in moved if item[0] == "all-gather" and max(item[1]) >= WIDTH * latents]
