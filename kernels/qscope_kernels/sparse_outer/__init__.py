"""sparse_outer: a code's transpose times rows, the gradient of both matrices of a sparse autoencoder.

out[f] = sum of values[n, a] * rows[n],  total[f] = sum of values[n, a],    over all (n, a) with indices[n, a] = f
"""

from jaxtyping import Array, Float, Int

from qscope_kernels.dispatch import Kernel, pick
from qscope_kernels.sparse_outer import ref, xla

_IMPLEMENTATIONS = {"ref": ref.sparse_outer, "xla": xla.sparse_outer}
_KERNELS: dict[str, Kernel] = {}


def sparse_outer(
    values: Float[Array, "n k"],
    indices: Int[Array, "n k"],
    rows: Float[Array, "n d"],
    *,
    latents: int,
    impl: str | None = None,
) -> tuple[Float[Array, "f d"], Float[Array, "f"]]:
    """Per latent, the float32 sum over the slots that name it of value times row [f, d], and of the values alone [f].

    An index beyond the latents counts as the nearest one.

    Raises:
      ValueError: the shapes do not fit, or `impl` is unknown.
    """
    if values.shape != indices.shape or values.shape[:1] != rows.shape[:1]:
        raise ValueError(
            f"values {values.shape}, indices {indices.shape} and rows {rows.shape} do not fit; expected [n, k] twice "
            "and [n, d]"
        )
    arrays = values, indices, rows
    return pick("sparse_outer", _IMPLEMENTATIONS, _KERNELS, impl, *arrays, latents=latents)(*arrays, latents=latents)
