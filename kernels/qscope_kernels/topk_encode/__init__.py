"""topk_encode: the k largest positive pre-activations of a TopK SAE.

values, indices = relu(topk_k(x @ w_enc + b_enc)),    sorted by value, descending
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from qscope_kernels.dispatch import deferred, pick
from qscope_kernels.topk_encode import gradient, ref, xla

_IMPLEMENTATIONS = {"ref": ref.topk_encode, "xla": xla.topk_encode}
_KERNELS = {
    "tpu": deferred("tpu", f"{__name__}.tpu", "topk_encode"),
    "cuda": deferred("gpu", f"{__name__}.cuda", "topk_encode"),
    "gpu": deferred("gpu", f"{__name__}.gpu", "topk_encode", automatic=False),
}


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

    Pre-activations are accumulated in float32: float32 inputs at full precision, others in their own products. "exact"
    ranks these; "fast" lets a kernel rank and return them rounded, "ref" and "xla" make no difference. Ties go to the
    lowest index in "ref" and "xla", to any in kernels. Where fewer than k are positive, the remaining values are 0 and
    their indices mean nothing. A NaN pre-activation ranks above all.
    The gradient reads and writes active latents alone; "ref" can be differentiated forward too, the others in reverse.

    Raises:
      ValueError: a shape or a dtype does not fit, k is not in 1..f, or `contract` or `impl` is unknown.
    """
    x, w_enc, b_enc = (jnp.asarray(array) for array in (x, w_enc, b_enc))
    check_encoder(x, w_enc, b_enc)
    check_choice(k, w_enc.shape[1], contract)
    arrays, options = (x.reshape(-1, x.shape[-1]), w_enc, b_enc), {"k": k, "contract": contract}
    run = pick("topk_encode", _IMPLEMENTATIONS, _KERNELS, impl, *arrays, **options)
    if run is ref.topk_encode:
        values, indices = run(*arrays, **options)
    else:
        values, indices = gradient.encode(partial(run, **options), impl, *arrays)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def check_encoder(x: jax.Array, w_enc: jax.Array, b_enc: jax.Array) -> None:
    """Raises ValueError where x [..., d], w_enc [d, f] and b_enc [f] do not belong together or are not floating."""
    if x.ndim == 0 or w_enc.ndim != 2 or x.shape[-1] != w_enc.shape[0] or b_enc.shape != w_enc.shape[1:]:
        raise ValueError(
            f"x {x.shape}, w_enc {w_enc.shape} and b_enc {b_enc.shape} do not fit; expected [..., d], [d, f] and [f]"
        )
    for name, array in (("x", x), ("w_enc", w_enc), ("b_enc", b_enc)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} is {array.dtype}; expected a floating dtype, such as float32 or bfloat16")


def check_choice(k: int, latents: int, contract: str) -> None:
    """Raises ValueError for a k or a contract that no encoder has."""
    if not 0 < k <= latents:
        raise ValueError(f"k = {k} does not lie in 1..{latents}, the number of latents")
    if contract not in ("exact", "fast"):
        raise ValueError(f"contract = {contract!r}; expected 'exact' or 'fast'")
