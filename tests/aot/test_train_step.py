"""A training step of a released shape, compiled for v5e:2x4 and for 8 H200s: what travels, and what memory holds."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.sae.loss import Objective
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group, TrainState, abstract_group
from qscope_jax.training.step import make_train_step

pytestmark = [pytest.mark.aot, pytest.mark.all]  # two minutes of compiling
D, F, K, N, AUX_K = 2048, 32768, 50, 8192, 512  # Qwen3-1.7B-Base, W32K, L0_50


def compiled_step(mesh, layers):
    objective = Objective(F, K, aux_k=AUX_K, dtype=jnp.bfloat16, contract="fast")
    group = Group(tuple(range(layers)), objective, Schedule(1e-4, 1000, warmup=100))
    place = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=place())
    state = TrainState(number, (abstract_group(group, D, mesh=mesh, model_axis="latents"),))
    x = jax.ShapeDtypeStruct((layers, N, D), jnp.bfloat16, sharding=place(None, "data"))
    mask = jax.ShapeDtypeStruct((N,), bool, sharding=place("data"))
    return make_train_step((group,), group.layers, mesh=mesh).lower(state, x, mask).compile()


def check(mesh, collectives):
    data, model = mesh.devices.shape
    rows, latents = N // data, F // model
    two, four = (compiled_step(mesh, layers) for layers in (2, 4))

    # No w_enc, w_dec or [tokens, latents] is gathered: candidates of the encoder are, and who is idle for longest.
    pool = min(4 * AUX_K, latents)
    gathered = [size for name, sizes in collectives(two) if name == "all-gather" for size in sizes]
    assert set(gathered) <= ({rows * model * K, model * pool} if model > 1 else set())
    assert {name for name, _ in collectives(two)} <= {"all-gather", "all-reduce"}

    # Both matrices' gradients are summed, once, over "data" alone; all else is smaller.
    sums = [size for name, sizes in collectives(two) if name == "all-reduce" for size in sizes]
    assert sorted(size for size in sums if size >= latents * D) == [latents * D] * 2
    lines = re.findall(rf"= .*\w\[(?:{latents},{D}|{D},{latents})\].* all-reduce(?:-start)?\(.*", two.as_text())
    over_data = ",".join("{" + ",".join(str(r * model + c) for r in range(data)) + "}" for c in range(model))
    assert lines
    assert all(f"replica_groups={{{over_data}}}" in line for line in lines)

    # Weights and moments stay in place; temporaries are those of one layer, however many there are.
    matrix = 4 * latents * D
    memory = [step.memory_analysis() for step in (two, four)]
    assert memory[1].alias_size_in_bytes >= 4 * 6 * matrix
    assert abs(memory[1].temp_size_in_bytes - memory[0].temp_size_in_bytes) < matrix / 8
    assert memory[1].temp_size_in_bytes < 12 * matrix


def test_on_tpus_by_tokens_and_latents(tpu_mesh, collectives):
    check(tpu_mesh("v5e:2x4", 2, 4), collectives)


def test_on_h200s_by_tokens(h200s, collectives):
    check(h200s(8, 1), collectives)
