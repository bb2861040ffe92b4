"""sparse_decode: the weighted sum of the decoder rows that a code names; gather_dot, products with those rows.

x_hat[n] = sum_a values[n, a] * w_dec[indices[n, a]],    dvalues[n, a] = <dx_hat[n], w_dec[indices[n, a]]>
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qscope_kernels import dispatch, sparse_outer
from qscope_kernels.dispatch import deferred, pick
from qscope_kernels.manual_axes import alike
from qscope_kernels.sparse_decode import ref, xla

_IMPLEMENTATIONS = {"ref": ref.sparse_decode, "xla": xla.sparse_decode}
_KERNELS = {
    "tpu": deferred("tpu", f"{__name__}.tpu", "sparse_decode"),
    "gpu": deferred("gpu", f"{__name__}.gpu", "sparse_decode", automatic=False),
}
_DOT_IMPLEMENTATIONS = {"ref": ref.gather_dot, "xla": xla.gather_dot}
_DOT_KERNELS = {
    "tpu": deferred("tpu", f"{__name__}.tpu", "gather_dot"),
    "gpu": deferred("gpu", f"{__name__}.gpu", "gather_dot", automatic=False),
}


def sparse_decode(
    values: Float[Array, "*n k"], indices: Int[Array, "*n k"], w_dec: Float[Array, "f d"], *, impl: str | None = None
) -> Float[Array, "*n d"]:
    """Sum over the k slots of value times decoder row, accumulated in float32 [..., d].

    A slot whose value is 0 adds nothing, whatever its index (an index beyond the latents included). The gradient reads
    and writes the rows that are named; "ref" can be differentiated forward too, the others in reverse.

    Raises:
      ValueError: a shape or a dtype does not fit, or `impl` is unknown.
    """
    values, indices, w_dec = (jnp.asarray(array) for array in (values, indices, w_dec))
    check_code(values, indices)
    _check_matrix("w_dec", w_dec)
    k = values.shape[-1]
    arrays = values.reshape(-1, k), indices.reshape(-1, k), w_dec
    run = pick("sparse_decode", _IMPLEMENTATIONS, _KERNELS, impl, *arrays)
    # Inside shard_map these vary along different mesh axes; the transpose of this cast sums gradients there.
    out: jax.Array = run(*arrays) if run is ref.sparse_decode else _decode(run, impl, *alike(arrays))
    return out.reshape(*values.shape[:-1], w_dec.shape[1])


def gather_dot(
    rows: Float[Array, "n d"], indices: Int[Array, "n k"], w: Float[Array, "f d"], *, impl: str | None = None
) -> Float[Array, "n k"]:
    """The products of every row with the k rows of w that it names, accumulated in float32 [n, k].

    An index beyond w counts as the nearest one. Differentiable as `sparse_decode` is.

    Raises:
      ValueError: a shape or a dtype does not fit, or `impl` is unknown.
    """
    rows, indices, w = arrays = tuple(jnp.asarray(array) for array in (rows, indices, w))
    _check_matrix("w", w)
    _check_integers(indices)
    if rows.ndim != 2 or indices.ndim != 2 or rows.shape != (indices.shape[0], w.shape[1]):
        raise ValueError(
            f"rows {rows.shape}, indices {indices.shape} and w {w.shape} do not fit; expected [n, d], [n, k] and [f, d]"
        )
    run = pick("gather_dot", _DOT_IMPLEMENTATIONS, _DOT_KERNELS, impl, *arrays)
    return run(*arrays) if run is ref.gather_dot else _dot(run, impl, *alike(arrays))


def offered(impl: str | None) -> str | None:
    """`impl` if sparse_decode has it, else None."""
    return dispatch.offered(impl, _IMPLEMENTATIONS, _KERNELS)


def dot_offered(impl: str | None) -> str | None:
    """The same for gather_dot."""
    return dispatch.offered(impl, _DOT_IMPLEMENTATIONS, _DOT_KERNELS)


def check_code(values: Array, indices: Array) -> None:
    """Raises ValueError where values and indices do not belong together."""
    if values.shape != indices.shape or not values.ndim or not values.shape[-1]:
        raise ValueError(
            f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must have one shape, [..., k], k > 0"
        )
    if not jnp.issubdtype(values.dtype, jnp.floating):
        raise ValueError(f"values are {values.dtype}; expected a floating dtype")
    _check_integers(indices)


def _check_integers(indices: Array) -> None:
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices are {indices.dtype}; expected an integer dtype")


def _check_matrix(name: str, w: Array) -> None:
    if w.ndim != 2 or not jnp.issubdtype(w.dtype, jnp.floating):
        raise ValueError(f"{name} is {w.dtype} {tuple(w.shape)}; expected floating [f, d]")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _decode(run: Callable[..., jax.Array], impl, values, indices, w_dec) -> jax.Array:
    return run(values, indices, w_dec)


def _forward(run, impl, *arrays):
    return _decode(run, impl, *arrays), arrays  # not `run`: this is differentiated too, for gradients of gradients


def _backward(run, impl, arrays, given):
    values, indices, w_dec = arrays
    # What nobody asks for is dead code, which the compiler removes.
    dvalues = gather_dot(given, indices, w_dec, impl=dot_offered(impl))
    dw_dec, _ = sparse_outer.sparse_outer(
        values, indices, given, latents=w_dec.shape[0], impl=sparse_outer.offered(impl)
    )
    return dvalues.astype(values.dtype), None, dw_dec.astype(w_dec.dtype)


_decode.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(run: Callable[..., jax.Array], impl, rows, indices, w) -> jax.Array:
    return run(rows, indices, w)


def _dot_forward(run, impl, *arrays):
    return _dot(run, impl, *arrays), arrays


def _dot_backward(run, impl, arrays, given):
    rows, indices, w = arrays
    drows = sparse_decode(given, indices, w, impl=offered(impl))
    dw, _ = sparse_outer.sparse_outer(given, indices, rows, latents=w.shape[0], impl=sparse_outer.offered(impl))
    return drows.astype(rows.dtype), None, dw.astype(w.dtype)


_dot.defvjp(_dot_forward, _dot_backward)
