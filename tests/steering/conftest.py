"""A tiny random model, SAEs whose decoder rows have different lengths, and left-padded prompts of unequal length."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams
from tests.backbone.families import QUICK, make_config, make_params

LAYERS, WIDTH, LATENTS, K = 4, 16, 27, 6
LENGTHS = (3, 6, 1, 5, 4, 2, 6)  # of the prompts; one row per position rule
PROMPT, NEW = max(LENGTHS), 3
RULES = ("all", "prompt", "generated", "last", "5", "1-3", "0,2,4-8")


@dataclass(frozen=True)
class Model:
    config: Any
    params: Any
    saes: dict[int, Sae]
    tokens: np.ndarray  # [b, prompt + new]: prompts, left-padded, and what follows them
    mask: np.ndarray

    @property
    def rows(self):
        return len(self.tokens)


class FakeStats(NamedTuple):
    """What steering asks of a layer's statistics."""

    max: np.ndarray
    median_norm: float


def make_sae(layer, seed=0, latents=LATENTS):
    rng = np.random.default_rng(100 * seed + layer)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = SaeParams(draw(WIDTH, latents), draw(latents), draw(latents, WIDTH) * (0.2 + layer), draw(WIDTH))
    return Sae(params, SaeConfig(d_model=WIDTH, d_sae=latents, k=K, layer=layer, source=f"layer {layer}"))


@pytest.fixture(scope="session")
def model():
    config = make_config("qwen3", num_hidden_layers=LAYERS)
    tokens = np.random.default_rng(1).integers(0, 48, (len(LENGTHS), PROMPT + NEW))
    mask = np.arange(PROMPT + NEW) >= PROMPT - np.array(LENGTHS)[:, None]
    return Model(config, make_params(config), {layer: make_sae(layer) for layer in range(LAYERS)}, tokens, mask)


@pytest.fixture(scope="session")
def run():
    """`forward` as one program, compiled once for all tests that ask the same of it."""
    return jax.jit(forward, static_argnames=("capture", "logits", "stop_after"), compiler_options=QUICK)


@pytest.fixture(scope="session")
def observe(model, run):
    """Runs the prompts and what follows them at once: logits, every layer's output, the tap's outputs."""

    def observed(tap=None, **options):
        lengths = jnp.asarray(LENGTHS)
        inputs = {"tokens": model.tokens, "mask": model.mask, "prompt_lengths": lengths} | options
        return run(model.params, model.config, tap=tap, capture=tuple(range(LAYERS)), **inputs)

    return observed


@pytest.fixture(scope="session")
def plain(observe):
    return observe()
