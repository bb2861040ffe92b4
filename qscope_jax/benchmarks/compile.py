"""What depth costs before the first step: tracing, lowering and compiling 64 layers of a hybrid against 8.

Qwen3.5-2B's width, 1 x 256 tokens; from shapes alone, so no memory is taken.
"""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_5_2b


def bench_compile(*, rounds: int) -> dict[str, Any]:
    """Ratios of the time of 64 layers to that of 8, for the forward pass and for the gradient.

    Every time is cold: what jax remembers is dropped before, and a cache on disk is a mistake.

    Raises:
      ValueError: jax keeps compiled programs in a folder.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        raise ValueError("the benchmark `compile` measures nothing with a cache: unset JAX_COMPILATION_CACHE_DIR")
    shallow, deep = qwen3_5_2b(8), qwen3_5_2b(64)
    result: dict[str, Any] = {"what": "time to compile 64 layers / 8 layers"}
    for name, gradient, count in (("forward", False, rounds), ("gradient", True, max(5, rounds // 4))):
        a, b = (partial(compile_cold, config, gradient=gradient) for config in (shallow, deep))
        result[name] = paired(a, b, rounds=count)
    return result


def compile_cold(config: ModelConfig, *, gradient: bool) -> None:
    """Traces, lowers and compiles the forward pass, or its gradient in all parameters, as a process does at first."""
    jax.clear_caches()

    def loss(params, tokens):
        hidden = forward(params, config, tokens, logits="none").hidden
        assert hidden is not None
        return jnp.sum(hidden)

    function = jax.grad(loss) if gradient else loss
    shapes = parameter_shapes(config, jnp.float32)
    jax.jit(function).lower(shapes, jax.ShapeDtypeStruct((1, 256), jnp.int32)).compile()
