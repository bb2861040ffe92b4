"""Checkpoints in and out: a Hugging Face folder (or any source) <-> the parameter tree.

A layer's part of a leaf goes from the mapped file into its place of a donated device buffer, so that no stacked leaf
ever stands on the host; on a mesh every process reads only the slices that its devices hold.
"""

import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from qscope_jax.backbone.checkpoint import INDEX, SINGLE, CheckpointError, find_config, find_tensors
from qscope_jax.backbone.config import ModelConfig, Precision
from qscope_jax.backbone.parameters import Params, empty_tree, parameter_shapes, parent_of
from qscope_jax.backbone.tables import Piece, Tensor, checkpoint_tensors, to_stored
from qscope_jax.files.atomic import write_json
from qscope_jax.files.source import Source, resolve
from qscope_jax.files.tensors import TensorFile, write_order, write_tensors
from qscope_jax.mesh import finish_together, to_host

__all__ = ["Backbone", "CheckpointError", "load_backbone", "save_backbone"]

_PRECISION: dict[str, Precision] = {"float32": "highest", "bfloat16": "default"}


class Backbone(NamedTuple):
    """A backbone: static constants and the parameter tree of `forward`."""

    config: ModelConfig
    params: Params


def load_backbone(
    source: str | Path | Source, *, dtype: str = "bfloat16", mesh: Mesh | None = None, fsdp: bool = False
) -> Backbone:
    """Loads a checkpoint of any of the four families, in any dialect that the releases or `transformers` use.

    Args:
      source: "demo", a folder, a hub id `owner/name[@revision]`, a remote folder, or what `resolve` made of one.
      dtype: "float32" is the parity mode (every matmul at full precision), "bfloat16" the fast mode; the decay rates
        and output norms of linear layers are float32 in both.
      mesh: from `make_mesh`; heads, MLPs, experts and vocabulary are split over "model". None: one device.
      fsdp: split the residual dimension of every matrix over "data" too; each layer is gathered when it runs.

    Raises:
      ConfigError: config.json describes no model that can be run exactly, or generation_config.json is damaged.
      CheckpointError: tensors are unknown, missing, duplicate, misshapen or of another kind; all are listed.
      MeshError: the mesh does not divide a dimension.
      SourceError: the source or a file of it cannot be had; its subclasses tell the causes apart.
    """
    if dtype not in _PRECISION:
        raise ValueError(f"dtype = {dtype!r}; expected 'float32' (parity) or 'bfloat16' (fast)")
    if fsdp and mesh is None:
        raise ValueError("fsdp=True splits weights over a mesh; give one: load_backbone(..., mesh=make_mesh())")
    place = source if isinstance(source, Source) else resolve(source, what="model")
    config = find_config(place, precision=_PRECISION[dtype])
    shapes = parameter_shapes(config, jnp.dtype(dtype), mesh=mesh, fsdp=fsdp)
    tensors, files = find_tensors(place, config)
    params = empty_tree(config)
    slabs = _slabs(tensors)
    for slab in tqdm(slabs, desc=f"loading {place.name}", unit=" tensors", disable=None, delay=2, leave=False):
        _put(params, slab, slab[0][1].leaf_of(shapes), files)
    return Backbone(config, params)


def save_backbone(backbone: Backbone, folder: str | Path, *, shard_bytes: int = 5 << 30) -> None:
    """Writes a folder (config.json and safetensors) that `transformers` loads with equal logits.

    Names are those of the releases; Qwen3.5 is written as the text model alone. The weights keep their dtype. Files
    above `shard_bytes` are split as the hub does; config.json comes last, so that an interrupted save is never taken
    for a checkpoint. On a mesh of several processes all must call it; the first one writes.

    Raises:
      FileExistsError: the folder already holds weights.
    """
    folder = Path(folder)
    if old := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise FileExistsError(f"{folder} already holds {old[0]}; choose a new folder or remove the old checkpoint")
    config, params = backbone
    writes = jax.process_index() == 0
    finish_together("the folder was looked at")
    shards = _shards(checkpoint_tensors(config), params, shard_bytes)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        stored = {tensor.name: _Stored(params, tensor) for tensor in shard}
        if writes:
            write_tensors(folder / name, stored, {"format": "pt"})
        else:
            for key in write_order(stored):  # joins in gathering what the first process writes
                np.asarray(stored[key])
        weight_map |= {tensor.name: name for tensor in shard}
        total += sum(_nbytes(params, tensor) for tensor in shard)
    if writes and len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    if writes:
        write_json(folder / "config.json", config.to_hf() | {"dtype": str(params["embed"].dtype)})
    finish_together("the checkpoint is written")


Slab = list[tuple[str, Piece]]


def _slabs(tensors: list[Tensor]) -> list[Slab]:
    """Pieces with the names of their tensors, those of one layer of one leaf together."""
    slabs: dict[Any, Slab] = {}
    for tensor in tensors:
        for piece in tensor.pieces:
            slabs.setdefault((piece.leaf, piece.period), []).append((tensor.name, piece))
    return list(slabs.values())


def _put(params: Params, slab: Slab, leaf: jax.ShapeDtypeStruct, files: Mapping[str, TensorFile]) -> None:
    """Reads one layer's part of a leaf and writes it into its place."""
    piece = slab[0][1]
    views = [piece.view(files[name].array(name)) for name, piece in slab]
    kinds = {view.dtype for view in views}
    kind = kinds.pop() if len(kinds) == 1 else np.dtype(np.float32)  # experts in different dtypes meet in the widest
    turn, shape = piece.permutation, views[0].shape
    if piece.expert is not None:
        turn, shape = (0, *(1 + axis for axis in turn)), (len(views), *shape)

    def read(index: Any) -> np.ndarray:
        if piece.expert is None:
            return views[0][index]
        return np.stack([view[index[1:]].astype(kind, copy=False) for view in views[index[0]]])

    if isinstance(leaf.sharding, NamedSharding):
        spec = leaf.sharding.spec[0 if piece.period is None else 1 :]
        stored = PartitionSpec(*(spec[i] for i in np.argsort(turn)))
        value = jax.make_array_from_callback(shape, NamedSharding(leaf.sharding.mesh, stored), read)
    else:
        value = read((slice(None),) * len(shape))
    parent, key = parent_of(params, piece.leaf), piece.leaf[-1]
    if piece.period is None:
        parent[key] = _held(value, turn, leaf)
    else:
        buffer = parent[key] if piece.period else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
        parent[key] = _write(buffer, value, piece.period, turn, leaf)


# Static: how the file stores it and the leaf, so one compilation serves all layers.
@functools.partial(jax.jit, static_argnums=(1, 2))
def _held(value: jax.Array, turn: tuple[int, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    value = value.transpose(turn).astype(leaf.dtype)
    return value if leaf.sharding is None else jax.lax.with_sharding_constraint(value, leaf.sharding)


@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write(buffer: jax.Array, value: jax.Array, period, turn: tuple[int, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
    value = value.transpose(turn).astype(leaf.dtype)
    buffer = jax.lax.dynamic_update_index_in_dim(buffer, value, period, 0)
    return buffer if leaf.sharding is None else jax.lax.with_sharding_constraint(buffer, leaf.sharding)


class _Stored:
    """One tensor in the layout of the checkpoint, made (and on a mesh gathered) when NumPy asks for it."""

    def __init__(self, params: Params, tensor: Tensor):
        self._params, self._tensor = params, tensor
        self.shape, self.dtype = tensor.stored_shape, tensor.pieces[0].leaf_of(params).dtype

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        held = [to_host(piece.leaf_of(self._params)[piece.place]) for piece in self._tensor.pieces]
        return to_stored(self._tensor, held)


def _nbytes(params: Params, tensor: Tensor) -> int:
    return math.prod(tensor.stored_shape) * tensor.pieces[0].leaf_of(params).dtype.itemsize


def _shards(tensors: list[Tensor], params: Params, limit: int) -> list[list[Tensor]]:
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in tensors:
        nbytes = _nbytes(params, tensor)
        if shards[-1] and size + nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += nbytes
    return shards
