"""grouped_matmul: rows sorted by group, each times the matrix of its group; the expert compute of a mixture of experts.

out[i] = x[i] @ w[g]    for i in group g, that is for sum(group_sizes[:g]) <= i < sum(group_sizes[:g + 1])
"""

import jax
from jaxtyping import Array, Float, Int

from qscope_kernels.dispatch import Kernel, pick
from qscope_kernels.grouped_matmul import ref, xla

_IMPLEMENTATIONS = {"ref": ref.grouped_matmul, "xla": xla.grouped_matmul}
_KERNELS: dict[str, Kernel] = {}


def grouped_matmul(
    x: Float[Array, "n d"],
    w: Float[Array, "e d m"],
    group_sizes: Int[Array, "e"],
    *,
    within: tuple[Float[Array, "l e d m"], Int[Array, ""]] | None = None,
    precision: jax.lax.PrecisionLike = None,
    impl: str | None = None,
) -> Float[Array, "n m"]:
    """Rows of x, sorted by group, times their group's matrix; accumulated in float32, returned in x's dtype.

    Rows past sum(group_sizes) give zeros and cost nothing. The sizes must not add up to more than n.

    `within` = (stacks, layer) says that w is stacks[layer], for a loop over layers: the matrices are then read where
    they lie in `stacks`, no copy of a whole w is made, and w is only where the gradient goes.

    Raises:
      ValueError: the shapes or the dtypes of `x`, `w` and `within` do not fit, or `impl` is unknown.
    """
    if x.shape[1] != w.shape[1] or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"x {x.shape}, w {w.shape} and group_sizes {group_sizes.shape} do not fit; expected [n, d], [e, d, m], [e]"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"x is {x.dtype} and w is {w.dtype}; cast one of them")
    if within is not None and within[0].shape[1:] != w.shape:
        raise ValueError(f"w {w.shape} is no layer of the stacks {within[0].shape} that it should lie within")
    arrays, options = (x, w, group_sizes), {"within": within, "precision": precision}
    return pick("grouped_matmul", _IMPLEMENTATIONS, _KERNELS, impl, *arrays, **options)(*arrays, **options)
