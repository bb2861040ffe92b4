"""topk_encode: the k largest positive pre-activations of a TopK SAE.

values, indices = relu(topk_k(x @ w_enc + b_enc)),    sorted by value, descending
"""

from typing import Literal

from jaxtyping import Array, Float, Int

from qscope_kernels.dispatch import Kernel, pick
from qscope_kernels.topk_encode import ref, xla

_IMPLEMENTATIONS = {"ref": ref.topk_encode, "xla": xla.topk_encode}
_KERNELS: dict[str, Kernel] = {}


def topk_encode(
    x: Float[Array, "*n d"],
    w_enc: Float[Array, "d f"],
    b_enc: Float[Array, "f"],
    *,
    k: int,
    contract: Literal["exact", "fast"] = "exact",
    impl: str | None = None,
) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
    """The k largest positive entries of x @ w_enc + b_enc, as float32 values and int32 indices.

    Pre-activations are accumulated in float32: float32 inputs at full precision, others in their own products. Both
    contracts order by them exactly here ("fast" allows a rounded key); ties go to the lowest index. Where fewer than k
    are positive, the remaining values are 0 and their indices mean nothing. A NaN pre-activation ranks above all.

    Raises:
      ValueError: k is not in 1..f, or `contract` or `impl` is unknown.
    """
    check_choice(k, w_enc.shape[1], contract)
    arrays, options = (x.reshape(-1, x.shape[-1]), w_enc, b_enc), {"k": k, "contract": contract}
    values, indices = pick("topk_encode", _IMPLEMENTATIONS, _KERNELS, impl, *arrays, **options)(*arrays, **options)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def check_choice(k: int, latents: int, contract: str) -> None:
    """Raises ValueError for a k or a contract that no encoder has."""
    if not 0 < k <= latents:
        raise ValueError(f"k = {k} does not lie in 1..{latents}, the number of latents")
    if contract not in ("exact", "fast"):
        raise ValueError(f"contract = {contract!r}; expected 'exact' or 'fast'")
