"""topk_encode over a mesh: every device ranks its own latents, only the candidates travel, and their merge is exact.

The k largest of all latents are among the k largest of each shard; shards are merged in the order of their latents, so
that ties still go to the lowest index. Neither w_enc nor [tokens, latents] is ever gathered, in the gradient neither.
"""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_kernels.topk_encode import check_choice, check_encoder, topk_encode
from qscope_kernels.topk_encode.select import select


def topk_encode_sharded(
    x: Float[Array, "*n d"],
    w_enc: Float[Array, "d f"],
    b_enc: Float[Array, "f"],
    *,
    k: int,
    mesh: Mesh | AbstractMesh,
    data: str,
    model: str,
    contract: Literal["exact", "fast"] = "exact",
    impl: str | None = None,
) -> tuple[Float[Array, "*n k"], Int[Array, "*n k"]]:
    """`topk_encode` with tokens split over the mesh axis `data` and latents over `model`; equal to it, and so are ties
    where each device gives them to the lowest index. "fast" rounds as it does for the latents of one device.

    The result is split over `data` and whole on every device along `model`. [tokens, shards * k] candidates travel.

    Raises:
      ValueError: see `topk_encode`; or an axis does not divide the tokens or the latents.
    """
    check_encoder(x, w_enc, b_enc)
    check_choice(k, w_enc.shape[1], contract)
    tokens = PartitionSpec(data, None)
    encode = jax.shard_map(
        partial(topk_encode_shard, k=k, axis=model, contract=contract, impl=impl),
        mesh=mesh,
        in_specs=(tokens, PartitionSpec(None, model), PartitionSpec(model)),
        out_specs=(tokens, tokens),
    )
    values, indices = encode(x.reshape(-1, x.shape[-1]), w_enc, b_enc)
    shape = (*x.shape[:-1], k)
    return values.reshape(shape), indices.reshape(shape)


def topk_encode_shard(
    x: Float[Array, "n d"],
    w_enc: Float[Array, "d f"],
    b_enc: Float[Array, "f"],
    *,
    k: int,
    axis: str,
    contract: Literal["exact", "fast"] = "exact",
    impl: str | None = None,
) -> tuple[Float[Array, "n k"], Int[Array, "n k"]]:
    """The same inside `shard_map`, where `w_enc` and `b_enc` are this device's latents along the mesh axis `axis`.

    Values and indices, into all latents, are equal on every device of that axis.
    """
    mine = w_enc.shape[1]
    values, indices = topk_encode(x, w_enc, b_enc, k=min(k, mine), contract=contract, impl=impl)
    indices += jax.lax.axis_index(axis) * mine
    values, indices = (jax.lax.all_gather(part, axis, axis=1, tiled=True, to="invarying") for part in (values, indices))
    best, slots = select(values, k)
    return best, jnp.take_along_axis(indices, slots, axis=1)
