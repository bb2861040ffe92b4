"""sparse_outer: a code's transpose times rows, the gradient of both matrices of a sparse autoencoder.

out[f] = sum of values[n, a] * rows[n],  total[f] = sum of values[n, a],    over all (n, a) with indices[n, a] = f
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qscope_kernels import dispatch
from qscope_kernels.dispatch import deferred, pick
from qscope_kernels.manual_axes import alike
from qscope_kernels.sparse_outer import ref, xla

_IMPLEMENTATIONS = {"ref": ref.sparse_outer, "xla": xla.sparse_outer}
_KERNELS = {
    "tpu": deferred("tpu", f"{__name__}.tpu", "sparse_outer"),
    # Unmeasured, and yet automatic: what XLA makes of the portable form on CUDA gives other bits at every run.
    "gpu": deferred("gpu", f"{__name__}.gpu", "sparse_outer"),
}


def sparse_outer(
    values: Float[Array, "n k"],
    indices: Int[Array, "n k"],
    rows: Float[Array, "n d"],
    *,
    latents: int,
    impl: str | None = None,
) -> tuple[Float[Array, "f d"], Float[Array, "f"]]:
    """Per latent, the float32 sum over the slots that name it of value times row [f, d], and of the values alone [f].

    An index beyond the latents counts as the nearest one. "ref" can be differentiated forward too, the others in
    reverse.

    Raises:
      ValueError: a shape or a dtype does not fit, or `impl` is unknown.
    """
    values, indices, rows = arrays = tuple(jnp.asarray(array) for array in (values, indices, rows))
    _check(values, indices, rows, latents)
    if indices.dtype.itemsize < 4:  # may be too narrow for the number of latents
        arrays = values, indices.astype(jnp.int32), rows
    run = pick("sparse_outer", _IMPLEMENTATIONS, _KERNELS, impl, *arrays, latents=latents)
    if run is ref.sparse_outer:
        return run(*arrays, latents=latents)
    return _outer(run, impl, latents, *alike(arrays))


def offered(impl: str | None) -> str | None:
    """`impl` if this operation has it, else None."""
    return dispatch.offered(impl, _IMPLEMENTATIONS, _KERNELS)


def _check(values: Array, indices: Array, rows: Array, latents: int) -> None:
    if values.ndim != 2 or values.shape != indices.shape or rows.ndim != 2 or len(values) != len(rows):
        raise ValueError(
            f"values {values.shape}, indices {indices.shape} and rows {rows.shape} do not fit; expected [n, k] twice "
            "and [n, d]"
        )
    for name, array, kind in (
        ("values", values, "floating"),
        ("indices", indices, "integer"),
        ("rows", rows, "floating"),
    ):
        if not jnp.issubdtype(array.dtype, getattr(jnp, kind)):
            raise ValueError(f"{name} are {array.dtype}; expected a{'n' * (kind == 'integer')} {kind} dtype")
    if latents < 1:
        raise ValueError(f"latents = {latents}; expected at least 1")


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _outer(run: Callable[..., tuple[jax.Array, jax.Array]], impl, latents, *arrays) -> tuple[jax.Array, jax.Array]:
    return run(*arrays, latents=latents)


def _forward(run, impl, latents, *arrays):
    return _outer(run, impl, latents, *arrays), arrays  # not `run`: this is differentiated too


def _backward(run, impl, latents, arrays, given):
    from qscope_kernels import sparse_decode as decoding  # whose gradients are made here in turn

    (values, indices, rows), (of_sums, of_totals) = arrays, given
    dvalues = decoding.gather_dot(rows, indices, of_sums, impl=decoding.dot_offered(impl))
    dvalues += jnp.take(of_totals, indices, mode="clip")
    drows = decoding.sparse_decode(values, indices, of_sums, impl=decoding.offered(impl))
    return dvalues.astype(values.dtype), None, drows.astype(rows.dtype)


_outer.defvjp(_forward, _backward)
