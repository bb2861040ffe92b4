"""sparse_decode and gather_dot over a mesh: every device adds, or multiplies with, the rows it holds.

Neither the matrix nor a row of it travels, only [tokens, d] sums, and in the gradient [tokens, k] values.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_kernels.manual_axes import own_latents
from qscope_kernels.sparse_decode import check_code, gather_dot, sparse_decode


def sparse_decode_sharded(
    values: Float[Array, "*n k"],
    indices: Int[Array, "*n k"],
    w_dec: Float[Array, "f d"],
    *,
    mesh: Mesh | AbstractMesh,
    data: str,
    model: str,
    impl: str | None = None,
) -> Float[Array, "*n d"]:
    """`sparse_decode` with tokens split over the mesh axis `data` and latents over `model`.

    The result is split over `data` and whole on every device along `model`; it differs by the order of summation only.

    Raises:
      ValueError: see `sparse_decode`; or an axis does not divide the tokens or the latents.
    """
    check_code(values, indices)

    tokens, latents = PartitionSpec(data, None), PartitionSpec(model, None)
    share = partial(sparse_decode_shard, axis=model, impl=impl)
    decode = jax.shard_map(share, mesh=mesh, in_specs=(tokens, tokens, latents), out_specs=tokens)
    k = values.shape[-1]
    return decode(values.reshape(-1, k), indices.reshape(-1, k), w_dec).reshape(*values.shape[:-1], w_dec.shape[1])


def sparse_decode_shard(
    values: Float[Array, "n k"],
    indices: Int[Array, "n k"],
    w_dec: Float[Array, "f d"],
    *,
    axis: str,
    impl: str | None = None,
) -> Float[Array, "n d"]:
    """The same inside `shard_map`, where `w_dec` is this device's latents along the mesh axis `axis`.

    `values` and `indices`, into all latents, are equal along that axis, and so is the result.
    """
    local, mine = own_latents(indices, w_dec.shape[0], axis)
    # Another shard's slot is an unused one here: values differ along `axis` from now on.
    values = jax.lax.pcast(values, axis, to="varying")
    return jax.lax.psum(sparse_decode(jnp.where(mine, values, 0), local, w_dec, impl=impl), axis)


def gather_dot_sharded(
    rows: Float[Array, "n d"],
    indices: Int[Array, "n k"],
    w: Float[Array, "f d"],
    *,
    mesh: Mesh | AbstractMesh,
    data: str,
    model: str,
    impl: str | None = None,
) -> Float[Array, "n k"]:
    """`gather_dot` with tokens split over `data` and the rows of w over `model`; an index beyond w gives 0.

    Raises:
      ValueError: see `gather_dot`; or an axis does not divide the tokens or the rows of w.
    """

    def products(rows, indices, w):
        local, mine = own_latents(indices, w.shape[0], model)
        return jax.lax.psum(jnp.where(mine, gather_dot(rows, local, w, impl=impl), 0), model)

    tokens, latents = PartitionSpec(data, None), PartitionSpec(model, None)
    return jax.shard_map(products, mesh=mesh, in_specs=(tokens, tokens, latents), out_specs=tokens)(rows, indices, w)
