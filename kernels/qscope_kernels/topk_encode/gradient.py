"""The gradient of an encoder that returns (values, indices): only active latents pass it on.

With e = dvalues where values > 0, else 0, written as a dense [n, f] matrix E that never exists:
dx = E @ w_enc.T,    dw_enc = x.T @ E,    db_enc = sum of E over tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import cast

import jax
import jax.numpy as jnp

from qscope_kernels import sparse_decode, sparse_outer
from qscope_kernels.manual_axes import alike


def encode(
    run: Callable[..., tuple[jax.Array, jax.Array]],
    impl: str | None,
    x: jax.Array,
    w_enc: jax.Array,
    b_enc: jax.Array,
    *others: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """run(x [n, d], w_enc, b_enc, *others) -> (values, indices) [n, k], with that gradient; none for `others`.

    The gradient's operations run in `impl` where they have it, else in what suits the device. Reverse mode only.
    """
    # Inside shard_map these vary along different mesh axes; the transpose of this cast sums gradients there.
    return _encode(run, impl, *alike((x, w_enc, b_enc, *others)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _encode(run, impl, *arrays) -> tuple[jax.Array, jax.Array]:
    return run(*arrays)


def _forward(run, impl, *arrays):
    # Not `run`: this is differentiated too, for gradients of gradients.
    values, indices = cast(tuple[jax.Array, jax.Array], _encode(run, impl, *arrays))
    return (values, indices), (arrays, values, indices)


def _backward(run, impl, saved, cotangents):
    (x, w_enc, b_enc, *others), values, indices = saved
    given = jnp.where(values > 0, cotangents[0], 0)
    # What nobody asks for is dead code, which the compiler removes.
    dx = sparse_decode.sparse_decode(given, indices, w_enc.T, impl=sparse_decode.offered(impl))
    dw_enc, db_enc = sparse_outer.sparse_outer(
        given, indices, x, latents=w_enc.shape[1], impl=sparse_outer.offered(impl)
    )
    return dx.astype(x.dtype), dw_enc.T.astype(w_enc.dtype), db_enc.astype(b_enc.dtype), *(None for _ in others)


_encode.defvjp(_forward, _backward)
