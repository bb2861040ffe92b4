"""sparse_decode: the weighted sum of the decoder rows that a code names.

x_hat[n] = sum_a values[n, a] * w_dec[indices[n, a]]
"""

from jaxtyping import Array, Float, Int

from qscope_kernels.dispatch import Kernel, pick
from qscope_kernels.sparse_decode import ref, xla

_IMPLEMENTATIONS = {"ref": ref.sparse_decode, "xla": xla.sparse_decode}
_KERNELS: dict[str, Kernel] = {}


def sparse_decode(
    values: Float[Array, "*n k"], indices: Int[Array, "*n k"], w_dec: Float[Array, "f d"], *, impl: str | None = None
) -> Float[Array, "*n d"]:
    """Sum over the k slots of value times decoder row, accumulated in float32 [..., d].

    A slot whose value is 0 adds nothing, whatever its index (an index beyond the latents included).

    Raises:
      ValueError: `values` and `indices` differ in shape, or `impl` is unknown.
    """
    check_code(values, indices)
    k = values.shape[-1]
    arrays = values.reshape(-1, k), indices.reshape(-1, k), w_dec
    out = pick("sparse_decode", _IMPLEMENTATIONS, _KERNELS, impl, *arrays)(*arrays)
    return out.reshape(*values.shape[:-1], w_dec.shape[1])


def check_code(values: Array, indices: Array) -> None:
    """Raises ValueError where values and indices do not belong together."""
    if values.shape != indices.shape:
        raise ValueError(f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must have one shape")
