"""One training step of a TopK SAE with sparse operations against the same step written densely.

loss = |x - x_hat|^2 / |x - mean(x)|^2, the fraction of variance unexplained; then gradients of all weights, and Adam.
Weights and moments are float32 and donated; matmuls and gathers read copies in the setting's dtype. The encoder's are
kept as rows [f, d], the form in which its gradient comes: Adam would read six arrays against the grain otherwise.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from qscope_kernels import sparse_decode as decoding
from qscope_kernels import topk_encode as encoding
from qscope_kernels.cases import Case
from qscope_kernels.dispatch import device_of

from qscope_jax.benchmarks.ceilings import precision
from qscope_jax.benchmarks.rows import Row, Setting, Work, implementations, measure
from qscope_jax.benchmarks.sparse import matmul, random_data, to_dense
from qscope_jax.sae.model import SaeParams

Reconstruct = Callable[[SaeParams, jax.Array, int], jax.Array]
_OPTIMIZER = optax.adam(1e-4)


class State(NamedTuple):
    """Float32 weights, w_enc as [f, d], and what Adam keeps."""

    params: SaeParams
    optimizer: Any


def bench_step(setting: Setting) -> Iterator[Row]:
    """The dense step over the sparse one, and the sparse step over its encoder's matmul alone, with its tokens/s."""
    for case in setting.cases:
        data, row = random_data(case, setting), partial(measure, setting, case.name)
        dense = make_training(reconstruct_dense, data, case, setting)
        product = partial(matmul(jnp.float32), data.x, data.w_enc)
        for encoder, decoder in _choices(setting):
            name = f"sparse ({encoder or 'default'} encode, {decoder or 'default'} decode)"
            reconstruct = partial(reconstruct_sparse, encoder=encoder, decoder=decoder)
            sparse = make_training(reconstruct, data, case, setting)
            tokens = Work(setting.tokens, "tokens/s")
            yield from row(f"training step, {name} / encoder's matmul", sparse, product, tokens)
            yield from row(f"training step, dense / {name}", dense, sparse, tokens)


def _choices(setting: Setting) -> list[tuple[str | None, str | None]]:
    """Encoder and decoder to train with: those asked for; or what runs by itself, and kernels that do not yet."""
    if setting.impl:
        encoders, decoders = (implementations(setting, module._KERNELS) for module in (encoding, decoding))
        return list(zip(encoders, decoders, strict=False))
    platform, kernels = device_of().platform, decoding._KERNELS
    named = [name for name, kernel in kernels.items() if kernel.platform == platform and not kernel.automatic]
    return [(None, None), *((None, name) for name in named)]


def make_training(reconstruct: Reconstruct, data: Any, case: Case, setting: Setting) -> Callable[[], jax.Array]:
    """A function without arguments that trains by one step on the same tokens and returns the loss before it."""
    step = make_step(reconstruct, case.k, setting.dtype)
    held: list[State] = []

    def call() -> jax.Array:
        if not held:
            held.append(init_state(data))
        loss, held[0] = step(held[0], data.x)
        return loss

    return call


def make_step(reconstruct: Reconstruct, k: int, dtype: Any) -> Callable[[State, jax.Array], tuple[jax.Array, State]]:
    """(state, x [n, d]) -> (loss, state), jitted; the state is donated."""

    def loss_of(params: SaeParams, x: jax.Array) -> jax.Array:
        copies = params._replace(w_enc=params.w_enc.astype(dtype).T, w_dec=params.w_dec.astype(dtype))
        x_hat, want = reconstruct(copies, x, k), x.astype(jnp.float32)
        return jnp.sum((x_hat - want) ** 2) / jnp.sum((want - want.mean(0)) ** 2)

    def step(state: State, x: jax.Array) -> tuple[jax.Array, State]:
        loss, gradients = jax.value_and_grad(loss_of)(state.params, x)
        updates, optimizer = _OPTIMIZER.update(gradients, state.optimizer, state.params)
        params: Any = optax.apply_updates(state.params, updates)
        return loss, State(params, optimizer)

    return jax.jit(step, donate_argnums=0)


def init_state(data: Any) -> State:
    """Fresh float32 weights, of the values that the other operations are measured with."""
    params = SaeParams(data.w_enc.T, data.b_enc, data.w_dec, jnp.zeros(data.x.shape[1]))
    params = jax.tree.map(lambda a: jnp.array(a, jnp.float32), params)  # copies: they are donated
    return State(params, _OPTIMIZER.init(params))


def reconstruct_sparse(
    params: SaeParams, x: jax.Array, k: int, *, encoder: str | None = None, decoder: str | None = None
) -> jax.Array:
    """decode(encode(x)) with this project's operations, in the implementations named."""
    values, indices = encoding.topk_encode(x, params.w_enc, params.b_enc, k=k, contract="fast", impl=encoder)
    return decoding.sparse_decode(values, indices, params.w_dec, impl=decoder) + params.b_dec


def reconstruct_dense(params: SaeParams, x: jax.Array, k: int) -> jax.Array:
    """The same with `lax.top_k`, a dense code [n, f] and two matmuls, left to autodiff."""
    options: Any = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}
    pre = jnp.matmul(x, params.w_enc, **options) + params.b_enc
    values, indices = jax.lax.top_k(pre, k)
    code = to_dense(jax.nn.relu(values), indices, pre.shape[1], params.w_dec.dtype)
    return jnp.matmul(code, params.w_dec, **options) + params.b_dec
