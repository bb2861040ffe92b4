"""sparse_decode over a mesh: every device adds the rows it holds, and the partial sums are added up.

Neither w_dec nor a row of it travels, only [tokens, d] sums, and in the gradient [tokens, k] values.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_kernels.sparse_decode import check_code, sparse_decode


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

    def partial_sum(values, indices, w_dec):
        local = indices - jax.lax.axis_index(model) * w_dec.shape[0]
        mine = (local >= 0) & (local < w_dec.shape[0])
        # Another shard's slot is an unused one here: values differ along `model` from now on.
        values = jax.lax.pcast(values, model, to="varying")
        total = sparse_decode(jnp.where(mine, values, 0), jnp.where(mine, local, 0), w_dec, impl=impl)
        return jax.lax.psum(total, model)

    tokens = PartitionSpec(data, None)
    decode = jax.shard_map(
        partial_sum, mesh=mesh, in_specs=(tokens, tokens, PartitionSpec(model, None)), out_specs=tokens
    )
    k = values.shape[-1]
    return decode(values.reshape(-1, k), indices.reshape(-1, k), w_dec).reshape(*values.shape[:-1], w_dec.shape[1])
