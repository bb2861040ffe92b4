"""The parameter tree: its leaves' shapes, dtypes and places on a mesh, as the table of tensors says.

{"embed", "period": ({...} per slot, leaves lead with the period axis), "final_norm", "head" if it is not tied}

or "layers": ({...} per layer) in the place of "period", see `split_layers`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.tables import checkpoint_tensors
from qscope_jax.mesh import AnyMesh, sharding

Params = dict[str, Any]


def parameter_shapes(
    config: ModelConfig, dtype=jnp.bfloat16, *, mesh: AnyMesh | None = None, fsdp: bool = False
) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s (with shardings if there is a mesh), without memory.

    Raises:
      MeshError: the mesh does not divide a dimension.
    """
    shapes = empty_tree(config)
    for piece in (piece for tensor in checkpoint_tensors(config) for piece in tensor.pieces):
        if any(piece.place):
            continue  # a later period or expert of the same leaf
        lead = () if piece.period is None else (config.num_periods,)
        experts = () if piece.expert is None or config.moe is None else (config.moe.num_experts,)
        shape, axes = (*lead, *experts, *piece.shape), (*(None for _ in lead), *piece.row.axes)
        place = None if mesh is None else sharding(axes, shape, mesh, fsdp=fsdp)
        kind = jnp.float32 if piece.row.float32 else dtype
        parent_of(shapes, piece.leaf)[piece.leaf[-1]] = jax.ShapeDtypeStruct(shape, kind, sharding=place)
    return shapes


def split_layers(params: Params, config: ModelConfig, *, consume: bool = False) -> Params:
    """Parameters with "layers", a tuple of trees without the period axis, in the place of "period".

    `forward` reads them where they lie, while a scan's slice of a layer is a copy on CPUs and, of most matrices, on
    GPUs; its program grows with depth.

    Args:
      params: on one device.
      config: the model.
      consume: copy layer by layer and free every stack when it is copied. By default the layers are views of a CPU's
        memory, copied only where they do not begin at a multiple of 64 bytes, and not to be used beyond `params`.

    Raises:
      ValueError: views are asked for of arrays that are not on a CPU.
    """
    device = next(iter(params["embed"].devices()))
    p, numbers = len(config.period), range(config.num_layers)
    if not consume and device.platform != "cpu":
        raise ValueError(f"only a CPU's memory has views, not that of a {device.platform}; use consume=True")
    rest = {name: leaf for name, leaf in params.items() if name != "period"}
    if not consume:
        # Of the shard, since an array would keep its view in NumPy for as long as it lives.
        stacks = jax.tree.map(lambda a: np.asarray(a.addressable_shards[0].data), params["period"])
        views = tuple(jax.tree.map(lambda a: a[l // p], stacks[l % p]) for l in numbers)  # noqa: B023
        return rest | {"layers": jax.device_put(views, device, may_alias=True)}

    def parts(stack: jax.Array) -> list[jax.Array]:
        found = [stack[i] for i in range(len(stack))]
        jax.block_until_ready(found)
        stack.delete()
        return found

    leaves, trees = zip(*(jax.tree.flatten(slot) for slot in params["period"]), strict=True)
    cut = [[parts(leaf) for leaf in slot] for slot in leaves]
    return rest | {"layers": tuple(trees[l % p].unflatten([a[l // p] for a in cut[l % p]]) for l in numbers)}


def empty_tree(config: ModelConfig) -> Params:
    """The tree without its leaves."""
    return {"period": tuple({} for _ in config.period)}


def parent_of(params: Any, leaf: tuple[str | int, ...]) -> Any:
    """The dictionary that holds a leaf, made on the way if need be."""
    for key in leaf[:-1]:
        params = params.setdefault(key, {}) if isinstance(params, dict) else params[key]
    return params
