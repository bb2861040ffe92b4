"""Checkpoints in and out: a Hugging Face folder (or any source) <-> the parameter tree.

Each tensor is written into its place of a donated device buffer as it is read, so that no stacked leaf ever stands on
the host. Whatever does not fit (unknown, missing, duplicate, misshapen) is reported together, before anything loads.
"""

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from qscope_jax.backbone.config import ModelConfig, Precision, read_config
from qscope_jax.backbone.config_reader import unique_keys
from qscope_jax.backbone.forward import Params
from qscope_jax.backbone.tables import HEAD, Tensor, checkpoint_tensors, from_stored, leaf_of, to_stored
from qscope_jax.files.atomic import write_json
from qscope_jax.files.source import Source, resolve
from qscope_jax.files.tensors import TensorFile, open_tensors, write_tensors

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PRECISION: dict[str, Precision] = {"float32": "highest", "bfloat16": "default"}
_FLOATS = ("bfloat16", "float16", "float32")


class CheckpointError(ValueError):
    """A checkpoint that does not hold exactly the tensors of its config; the message lists every difference."""


class Backbone(NamedTuple):
    """A backbone: static constants and the parameter tree of `forward`."""

    config: ModelConfig
    params: Params


def load_backbone(source: str | Path, *, dtype: str = "bfloat16", mesh: None = None) -> Backbone:
    """Loads a checkpoint.

    Args:
      source: "demo", a folder, a hub id `owner/name[@revision]`, or a remote folder.
      dtype: "float32" is the parity mode (every matmul at full precision), "bfloat16" the fast mode.
      mesh: None, the default device; sharded loading is not there yet.

    Raises:
      ConfigError: config.json describes no model that can be run exactly.
      CheckpointError: tensors are unknown, missing, duplicate, misshapen or of another kind; all are listed.
      SourceError: the source or a file of it cannot be had; its subclasses tell the causes apart.
    """
    if dtype not in _PRECISION:
        raise ValueError(f"dtype = {dtype!r}; expected 'float32' (parity) or 'bfloat16' (fast)")
    if mesh is not None:
        raise NotImplementedError("load_backbone(mesh=...) is not supported yet; load without a mesh")
    place = resolve(source, what="model")
    config = read_config(place.fetch("config.json"), precision=_PRECISION[dtype])
    tensors = checkpoint_tensors(config)
    files = _match(place, config, tensors)
    params = _allocate(tensors, config, jnp.dtype(dtype))
    for tensor in tqdm(tensors, desc=f"loading {place.name}", unit=" tensors", disable=None, delay=2, leave=False):
        _put(params, tensor, files[tensor.name].array(tensor.name))
    return Backbone(config, params)


def save_backbone(backbone: Backbone, folder: str | Path, *, shard_bytes: int = 5 << 30) -> None:
    """Writes a folder (config.json and safetensors) that `transformers` loads with equal logits.

    The weights keep their dtype. Files above `shard_bytes` are split as the hub does; config.json comes last, so that
    an interrupted save is never taken for a checkpoint.

    Raises:
      FileExistsError: the folder already holds weights.
    """
    folder = Path(folder)
    if old := sorted(path.name for path in folder.glob("model*.safetensors*")):
        raise FileExistsError(f"{folder} already holds {old[0]}; choose a new folder or remove the old checkpoint")
    config, params = backbone
    shards = _shards(checkpoint_tensors(config), params, shard_bytes)
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = _SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, _Stored(params, shard), {"format": "pt"})
        weight_map |= {tensor.name: name for tensor in shard}
        total += sum(_nbytes(params, tensor) for tensor in shard)
    if len(shards) > 1:
        write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    write_json(folder / "config.json", config.to_hf() | {"dtype": str(params["embed"].dtype)})


def parameter_shapes(config: ModelConfig, dtype=jnp.bfloat16) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct`s, without memory."""
    return jax.eval_shape(lambda: _allocate(checkpoint_tensors(config), config, jnp.dtype(dtype)))


def _match(place: Source, config: ModelConfig, tensors: list[Tensor]) -> dict[str, TensorFile]:
    """Finds the file of every tensor, or raises with everything that does not fit."""
    faults: list[str] = []
    files: dict[str, TensorFile] = {}
    for file in _open_files(place, faults):
        for name in file.names:
            if name in files:
                faults.append(f"{name} stands in both {files[name].path.name} and {file.path.name}")
            files[name] = file
    wanted = {tensor.name: tensor for tensor in tensors}
    known = wanted.keys() | ({HEAD.name} if config.tie_word_embeddings else set())
    faults += [f"{name} is unknown to a {config.model_type} model" for name in sorted(files.keys() - known)]
    faults += [f"{name} is missing" for name in wanted if name not in files]
    for name in (name for name in wanted if name in files):
        info = files[name].info(name)
        if info.shape != wanted[name].stored_shape:
            faults.append(f"{name} has shape {info.shape}, config.json implies {wanted[name].stored_shape}")
        if info.dtype.name not in _FLOATS:
            faults.append(f"{name} holds {info.dtype.name}, expected one of {', '.join(_FLOATS)}")
    if not faults and config.tie_word_embeddings and HEAD.name in files:
        faults += _check_tied(files, tensors[0].name)
    if faults:
        listed = "\n  ".join(faults[:40] + ([f"… and {len(faults) - 40} more"] if len(faults) > 40 else []))
        raise CheckpointError(f"{place}: the checkpoint does not fit its config.json:\n  {listed}")
    return files


def _open_files(place: Source, faults: list[str]) -> Iterator[TensorFile]:
    """Opens the single file, or every shard that the index names and checks the index against them."""
    if place.has(_SINGLE):
        yield open_tensors(place.fetch(_SINGLE))
        return
    if not place.has(_INDEX):
        found = ", ".join(n for n in place.names() if n.endswith((".bin", ".pt", ".safetensors", ".gguf"))) or "none"
        raise CheckpointError(f"{place}: expected {_SINGLE} or {_INDEX}, found weight files: {found}")
    weight_map = _read_index(place.fetch(_INDEX))
    for shard in sorted(set(weight_map.values())):
        if not place.has(shard):
            faults.append(f"{_INDEX} names the shard {shard}, which is missing")
            continue
        file = open_tensors(place.fetch(shard))
        promised = {name for name, where in weight_map.items() if where == shard}
        faults += [
            f"{name} should be in {shard} by the index, but is not" for name in sorted(promised - set(file.names))
        ]
        faults += [f"{name} is in {shard} but not in the index" for name in sorted(set(file.names) - weight_map.keys())]
        yield file


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
        if not all(isinstance(shard, str) and shard.endswith(".safetensors") for shard in weight_map.values()):
            raise ValueError("weight_map must map tensor names to .safetensors files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors index ({error})") from None
    return weight_map


def _check_tied(files: Mapping[str, TensorFile], embed: str) -> list[str]:
    head, table = files[HEAD.name].array(HEAD.name), files[embed].array(embed)
    if head.shape == table.shape and np.array_equal(head, table):
        return []
    return [f"{HEAD.name} differs from {embed}, although config.json says tie_word_embeddings; set it to false"]


def _allocate(tensors: list[Tensor], config: ModelConfig, dtype) -> Params:
    leaves: dict[tuple[str | int, ...], jax.Array] = {}
    for tensor in tensors:
        if tensor.leaf not in leaves:
            lead = () if tensor.period is None else (config.num_periods,)
            leaves[tensor.leaf] = jnp.zeros(lead + tensor.shape, dtype)
    params: Params = {"period": tuple({} for _ in config.period)}
    for leaf, array in leaves.items():
        parent = _parent(params, leaf)
        parent[leaf[-1]] = array
    return params


def _parent(params: Any, leaf: tuple[str | int, ...]) -> Any:
    for key in leaf[:-1]:
        params = params.setdefault(key, {}) if isinstance(params, dict) else params[key]
    return params


def _put(params: Params, tensor: Tensor, stored: np.ndarray) -> None:
    parent, key = _parent(params, tensor.leaf), tensor.leaf[-1]
    parent[key] = _write(parent[key], stored, tensor.period or 0, tensor.row.inputs, tensor.shape)


# Static: how the tensor is stored and its shape, so one compilation serves all layers.
@functools.partial(jax.jit, static_argnums=(3, 4), donate_argnums=0)
def _write(buffer: jax.Array, stored: jax.Array, period: int, inputs: int, shape: tuple[int, ...]) -> jax.Array:
    value = from_stored(stored, inputs, shape).astype(buffer.dtype)
    if buffer.ndim == value.ndim:
        return value
    return jax.lax.dynamic_update_index_in_dim(buffer, value, period, 0)


class _Stored(Mapping):
    """The tensors of one file in the layout of the checkpoint, made one at a time as the writer asks."""

    def __init__(self, params: Params, tensors: list[Tensor]):
        self._params = params
        self._tensors = {tensor.name: tensor for tensor in tensors}

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        return to_stored(np.asarray(leaf_of(self._params, tensor)), tensor.row.inputs)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _nbytes(params: Params, tensor: Tensor) -> int:
    return math.prod(tensor.shape) * _parent(params, tensor.leaf)[tensor.leaf[-1]].dtype.itemsize


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
