"""What steering costs a writing model of Qwen3-1.7B's width: 4 layers, float32, greedy, one row; paired with itself.

`add` needs a direction; `clamp` reads one SAE of 32,768 latents for every token, which by bytes read is
|w_enc| / |weights of the model| of its time.
"""

from typing import Any

import jax
import numpy as np

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_1p7b, random_params
from qscope_jax.generation import generate, make_steps
from qscope_jax.sae.model import SaeConfig, init_sae
from qscope_jax.steering import Steer, steer
from qscope_jax.steering.recipe import Mode

_PROMPT = _NEW = 32
_LATENTS, _ACTIVE = 32_768, 50
_MODES: tuple[Mode, ...] = ("add", "clamp")


def bench_steer(*, rounds: int) -> dict[str, Any]:
    """`compare_steering` at the released width; a call takes seconds, so that there are half of the rounds."""
    return compare_steering(qwen3_1p7b(4), _LATENTS, _ACTIVE, rounds=max(5, rounds // 2))


def compare_steering(config: ModelConfig, latents: int, active: int, *, rounds: int) -> dict[str, Any]:
    """Per mode the time with one entry over the time without, and for `clamp` the bound that bytes read give.

    Raises:
      AssertionError: a program was compiled again while it was timed.
    """
    params = random_params(config)
    layer = config.num_layers // 2
    sae = init_sae(jax.random.key(1), SaeConfig(config.hidden_size, latents, active, layer=layer))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, _PROMPT))
    found: dict[str, Any] = {"what": "time of writing, steered / not steered"}

    def write(tap=None):
        return generate(params, config, tokens, tap=tap, max_new_tokens=_NEW, eos=()).tokens

    for mode in _MODES:
        tap = steer([Steer(layer, 7, 1.0, mode)], {layer: sae}, num_layers=config.num_layers)
        steered = lambda tap=tap: write(tap)  # noqa: E731
        for warm_up in (write, steered):
            warm_up()
        before = make_steps(config).compilations
        result = paired(write, steered, rounds=rounds)
        if make_steps(config).compilations != before:
            raise AssertionError("our programs were compiled again while they were timed")
        found[mode] = result
    # One token reads all weights once; of a tied embedding one row more, which does not count.
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    found["clamp"]["bound_by_bytes"] = 1 + sae.params.w_enc.nbytes / read
    return found
