"""sparse_outer over a mesh: every device adds up the slots of its tokens that name its latents.

Only sums travel, along the tokens' axis: each device's share of [f, d]. No rows do.
"""

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_kernels.manual_axes import own_latents
from qscope_kernels.sparse_outer import sparse_outer


def sparse_outer_sharded(
    values: Float[Array, "n k"],
    indices: Int[Array, "n k"],
    rows: Float[Array, "n d"],
    *,
    latents: int,
    mesh: Mesh | AbstractMesh,
    data: str,
    model: str,
    impl: str | None = None,
) -> tuple[Float[Array, "f d"], Float[Array, "f"]]:
    """`sparse_outer` with tokens split over the mesh axis `data` and latents, and the result, over `model`.

    A slot that names no latent counts nowhere. If a token's row is not finite, then latents that it does not name may
    become NaN too, on other shards.

    Raises:
      ValueError: see `sparse_outer`; or an axis does not divide the tokens or the latents.
    """
    shards = mesh.shape[model]
    if latents % shards:
        raise ValueError(f"latents = {latents} are not divisible by the {shards} devices of the mesh axis {model!r}")

    def share(values, indices, rows):
        local, mine = own_latents(indices, latents // shards, model)
        sums = sparse_outer(jnp.where(mine, values, 0), local, rows, latents=latents // shards, impl=impl)
        return jax.lax.psum(sums, data)

    tokens, out = PartitionSpec(data, None), (PartitionSpec(model, None), PartitionSpec(model))
    return jax.shard_map(share, mesh=mesh, in_specs=(tokens,) * 3, out_specs=out)(values, indices, rows)
