"""A tiny training run with checkpoints, to be killed and started again.

python loop.py FOLDER STEPS prints a line a step and leaves `FOLDER/result.npz`.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.mesh import make_mesh, to_host
from qscope_jax.training.checkpoints import Checkpoints

EVERY = 3  # steps from one checkpoint to the next


def first_state(mesh, *, rows: int = 256):
    """Weights over both mesh axes, momentum over one, and a key and a counter on all devices."""
    rng = np.random.default_rng(0)
    state = {
        "w": (rng.normal(size=(rows, 1024)).astype(np.float32), PartitionSpec("data", "model")),
        "m": (np.zeros((rows, 1024), np.float32), PartitionSpec(None, "model")),
        "key": (jax.random.key(1), PartitionSpec()),
        "n": (np.zeros((), np.int32), PartitionSpec()),
    }
    return {name: _placed(value, NamedSharding(mesh, spec)) for name, (value, spec) in state.items()}


def _placed(value, place):
    if isinstance(value, np.ndarray):
        return jax.make_array_from_callback(value.shape, place, lambda index: value[index])
    return jax.jit(lambda: jax.random.key(1), out_shardings=place)()


@partial(jax.jit, donate_argnums=0)
def update(state):
    """A step without sums, so that every mesh gives the same bits."""
    key, now = jax.random.split(state["key"])
    noise = jax.random.normal(now, state["w"].shape)
    m = 0.875 * state["m"] + jnp.where(state["w"] > 0, noise, -noise)
    return {"w": state["w"] - 0.125 * m, "m": m, "key": key, "n": state["n"] + 1}


def run(
    folder: Path,
    mesh,
    steps: int,
    *,
    rows: int = 256,
    on_step: Callable[[int], object] = lambda step: None,
    on_save: Callable[[int], object] = lambda step: None,
):
    """Goes on from the newest checkpoint in the folder up to `steps`; returns the state."""
    state, step = first_state(mesh, rows=rows), 0
    with Checkpoints(folder / "checkpoints") as checkpoints:
        if found := checkpoints.restore(state):
            step, state, facts = found
            assert facts == {"seen": [step, step]}
        while step < steps:
            state, step = update(state), step + 1
            if step % EVERY == 0:
                checkpoints.save(step, state, {"seen": [step, step]})
                on_save(step)
            on_step(step)
    return state


def bits(state) -> dict[str, np.ndarray]:
    """The state on the host, by name; the key as its data."""
    state = state | {"key": jax.jit(jax.random.key_data)(state["key"])}
    return {name: to_host(value) for name, value in state.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    final = run(folder, make_mesh(), int(sys.argv[2]), on_step=lambda step: print(step, flush=True))
    np.savez(folder / "result.npz", **bits(final))
