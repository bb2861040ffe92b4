"""Forward to layer 20 of Qwen3-1.7B's shape and encode there, over the forward pass alone: what looking costs.

Random weights. On a CPU two layers are measured in place of 21. The extraction of texts with the same weights is
`qscope bench --what extract`.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from qscope_kernels.cases import RELEASED, Case
from qscope_kernels.dispatch import device_of

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params, forward
from qscope_jax.benchmarks.ceilings import matmul_rate
from qscope_jax.benchmarks.rows import Row, Setting, Work, measure
from qscope_jax.benchmarks.shapes import qwen3_1p7b, random_params
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, encode

_LENGTH = 512  # tokens of a row


class Model(NamedTuple):
    """A backbone that ends where its SAE looks."""

    config: ModelConfig
    params: Params
    sae: Sae


def released_model(case: Case, dtype: Any, *, layers: int) -> Model:
    """The first layers of Qwen3-1.7B's shape and an SAE of their last one's output, of this dtype, random."""
    precision = "highest" if dtype == jnp.float32 else "default"
    config = replace(qwen3_1p7b(layers), precision=precision)
    w_enc = jax.random.normal(jax.random.key(1), (case.d, case.f), dtype) / case.d**0.5
    unused = jnp.zeros((0, case.d), dtype)
    params = SaeParams(w_enc, jnp.zeros(case.f, dtype), unused, jnp.zeros(case.d, dtype))
    return Model(config, random_params(config, dtype=dtype), Sae(params, SaeConfig(case.d, case.f, case.k, layers - 1)))


def depth() -> int:
    """Layers up to the 21st on an accelerator, two on a CPU."""
    return 2 if device_of().platform == "cpu" else 21


def bench_end_to_end(setting: Setting) -> Iterator[Row]:
    """Forward and encode over forward, for both contracts; W32K, k = 50."""
    model = released_model(RELEASED[0], setting.dtype, layers=depth())
    length = min(_LENGTH, setting.tokens)
    shape = (setting.tokens // length, length)
    tokens = jax.random.randint(jax.random.key(2), shape, 0, model.config.vocab_size)
    alone = partial(make_forward(model), model.params, tokens)
    case = f"Qwen3-1.7B-shaped, {depth()} layers, W32K k50, {shape[0]} x {shape[1]} {setting.dtype}"
    flops = partial(_flops, model, *shape, matmul_rate(setting.dtype, setting.sample))
    row = partial(measure, setting, case)
    for contract in ("fast", "exact"):
        call = partial(make_forward(model, contract=contract), model.params, tokens, model.sae)
        yield from row(f"forward + encode {contract} / forward", call, alone, flops(encoded=True))
        yield from row(f"forward / forward + encode {contract}", alone, call, flops(encoded=False))


def make_forward(model: Model, *, contract: Any = None) -> Any:
    """(params, tokens [b, t]) -> the last layer's residual [b, t, d]; with a contract (..., sae) -> its code."""
    layer, config = model.config.num_layers - 1, model.config

    def residual(params: Params, tokens: jax.Array) -> jax.Array:
        return forward(params, config, tokens, capture=(layer,), stop_after=layer, logits="none").captured[0]

    if contract is None:
        return jax.jit(residual)
    return jax.jit(lambda params, tokens, sae: encode(sae, residual(params, tokens), contract=contract))


def _flops(model: Model, rows: int, length: int, ceiling: float, *, encoded: bool) -> Work:
    """Two per weight and token, four per token, head width and token attended to (half of the row)."""
    config, mlp = model.config, model.config.intermediate_size or 0
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    per_token = 2.0 * config.num_layers * config.hidden_size * (heads + 3 * mlp)
    per_token += 4.0 * config.num_layers * config.num_heads * config.head_dim * length / 2
    per_token += 2.0 * model.sae.params.w_enc.size if encoded else 0.0
    return Work(per_token * rows * length, "FLOP/s", ceiling)
