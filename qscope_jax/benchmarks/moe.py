"""What experts that are there but not chosen cost: a layer of Qwen3-30B-A3B's width (top-8, float32) with 128 experts
against the same with 16. Both do the same arithmetic, on smaller or larger groups of tokens."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.layers import Moe
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_30b_a3b


def bench_moe(*, rounds: int) -> dict[str, Any]:
    """`compare_experts` for 16 and 128 experts and 4096 tokens."""
    few, many = qwen3_30b_a3b(1, 16), qwen3_30b_a3b(1, 128)
    return {"what": "time with 128 experts / with 16", **compare_experts(few, many, 4096, rounds=rounds)}


def compare_experts(few: ModelConfig, many: ModelConfig, tokens: int, *, rounds: int) -> dict[str, Any]:
    """Ratios of time(many) to time(few) for forward and gradient (in weights and input) of one layer's experts on
    `tokens` tokens, and for the forward pass of a single one; beside each the bytes that it needs for a while."""
    cases = [_cases(config, tokens) for config in (few, many)]
    pairs = {"forward": rounds, "gradient": rounds, "decode": 5 * rounds}
    result = {}
    for name, count in pairs.items():
        a, b = (case[name] for case in cases)
        memory = {"temporary_few": float(a.temporary), "temporary_many": float(b.temporary)}
        result[name] = memory | paired(a.run, b.run, rounds=count)
    return result


class _Case(NamedTuple):
    """A compiled program with its arguments, and the bytes it needs besides them and its results."""

    run: Callable[[], Any]
    temporary: int


def _cases(config: ModelConfig, tokens: int) -> dict[str, _Case]:
    layer = Moe(config)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, tokens, config.hidden_size))
    weights = jax.random.normal(keys[1], x.shape)
    params = jax.jit(layer.init)(keys[2], x[:, :1])

    def run(params: Any, x: jax.Array) -> Any:
        return layer.apply(params, x)

    def loss(params, x):
        return jnp.vdot(run(params, x), weights)

    def case(function: Callable[..., Any], x: jax.Array) -> _Case:
        compiled = jax.jit(function).lower(params, x).compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        return _Case(partial(compiled, params, x), memory.temp_size_in_bytes)

    return {
        "forward": case(run, x),
        "gradient": case(jax.grad(loss, argnums=(0, 1)), x),
        "decode": case(run, x[:, :1]),
    }
