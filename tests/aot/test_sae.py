"""On v5e:2x4, an SAE of a released shape stays where it lies: no weight and no [tokens, latents] travels."""

import jax
import jax.numpy as jnp
import pytest

from qscope_jax.mesh import sharding
from qscope_jax.sae.model import AXES, Sae, SaeConfig, SaeParams, decode, encode, init_sae

pytestmark = [pytest.mark.aot, pytest.mark.slow]
D, F, K, N = 2048, 32768, 50, 8192  # Qwen3-1.7B-Base, W32K, L0_50
CONFIG = SaeConfig(D, F, K)


def round_trip(params, x):
    sae = Sae(params, CONFIG)
    return decode(sae, encode(sae, x))


def gradient(params, x):
    return jax.grad(lambda params: jnp.sum((round_trip(params, x) - x) ** 2))(params)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (round_trip, (2, 4)),
        (round_trip, (8, 1)),
        pytest.param(gradient, (2, 4), marks=pytest.mark.all),  # a minute or two
    ],
)
def test_nothing_large_travels_and_memory_is_divided(tpu_mesh, collectives, step, shape):
    mesh, (data, model) = tpu_mesh("v5e:2x4", *shape), shape
    place = lambda shape, *axes: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding(axes, shape, mesh))  # noqa: E731
    shapes = jax.eval_shape(lambda: init_sae(jax.random.key(0), CONFIG)).params._asdict()
    params = SaeParams(**{name: place(leaf.shape, *AXES[name]) for name, leaf in shapes.items()})
    compiled = jax.jit(step).lower(params, place((N, D), "batch", "embed")).compile()

    rows, latents = N // data, F // model
    expected = 4 * (2 * D * latents + latents + D + rows * D)
    assert compiled.memory_analysis().argument_size_in_bytes == expected
    candidates = ("all-gather", (rows * model * K,))
    found = collectives(compiled)
    assert [entry for entry in found if entry[0] != "all-reduce"] == ([candidates] * 2 if model > 1 else [])
    # Summed are a token's vector and its values over `model`, and one shard's gradient over `data`.
    sums = {size for name, sizes in found if name == "all-reduce" for size in sizes}
    allowed = {rows * D, rows * K} if model > 1 else set()
    assert sums <= (allowed | {D * latents, latents, D} if step is gradient else allowed)
