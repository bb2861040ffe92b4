"""Residual streams for training: token rows through the backbone to its last trained layer, then mixed.

Neighbouring tokens of one document make poor batches. With a buffer, every step puts its fresh tokens into random
slots of it and trains on what was there, so that a step sees tokens of many documents. Slots are exchanged within
virtual shards, each with a random order of its own: what a step sees depends on no mesh and no number of processes.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params, forward
from qscope_jax.data.batches import Filled
from qscope_jax.data.vectors import VectorRows
from qscope_jax.mesh import AnyMesh, MeshError, to_host
from qscope_jax.sae.quality import sink_threshold
from qscope_jax.training.state import Norms

_X, _MASK = PartitionSpec(None, "data"), PartitionSpec("data")


class Activations(NamedTuple):
    """Residual vectors of L layers, raw, and which of them are of real tokens."""

    x: Float[Array, "L n d"]
    mask: Bool[Array, "n"]


class Mixer(NamedTuple):
    """The buffer: tokens with all their layers, in V virtual shards of s slots."""

    x: Float[Array, "L V s d"]
    mask: Bool[Array, "V s"]


_SPECS: Any = Mixer(_X, _MASK), Activations(_X, _MASK)  # type: ignore[arg-type]

Collect = Callable[..., Activations]


class Stored(NamedTuple):
    """In the place of a backbone where the residual vectors of one layer are on disk: their width and type."""

    d: int
    dtype: Any


def make_collect(config: ModelConfig, layers: Sequence[int]) -> Collect:
    """The jitted forward pass: (params, tokens [b, t], mask, segment_ids) -> the outputs of `layers`, b * t tokens.

    It ends behind the last of them and computes no logits.
    """
    layers = tuple(layers)

    def collect(params, tokens, mask, segment_ids):
        captured = forward(
            params, config, tokens, mask=mask, segment_ids=segment_ids,
            capture=layers, stop_after=max(layers), logits="none",
        ).captured  # fmt: skip
        return Activations(captured.reshape(len(layers), -1, config.hidden_size), mask.reshape(-1))

    return jax.jit(collect)


def collect_stored(params: tuple[()], x: Float[Array, "b t d"], mask: Bool[Array, "b t"]) -> Activations:
    """The same of rows that are residual vectors already; `params` are none."""
    del params
    return Activations(x.reshape(1, -1, x.shape[-1]), mask.reshape(-1))


def own_part(mesh: Mesh | None, count: int) -> range:
    """Which of `count` rows or virtual shards, split over "data", lie on devices of this process.

    They are those that it must read; where "model" goes over processes, several read the same.

    Raises:
      MeshError: they are not neighbours.
    """
    if mesh is None:
        return range(count)
    own = [i for i, row in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in row)]
    if own[-1] - own[0] >= len(own):
        raise MeshError(
            f"of the mesh axis 'data' this process has the places {own}, which are not neighbours; choose sizes that "
            "keep the devices of a process together"
        )
    each = count // mesh.shape["data"]
    return range(own[0] * each, (own[-1] + 1) * each)


def place_rows(rows: Filled | VectorRows, mesh: Mesh | None, *, whole: bool = False) -> tuple[jax.Array, ...]:
    """A batch on its devices: this process's rows become its share of the global batch.

    With `whole`, every process gives the same rows, all of the batch.
    """
    if mesh is None:
        return tuple(jnp.asarray(array) for array in rows)
    place = NamedSharding(mesh, PartitionSpec("data", None))
    if whole:
        return tuple(jax.make_array_from_callback(array.shape, place, array.__getitem__) for array in rows)
    return tuple(jax.make_array_from_process_local_data(place, np.asarray(array)) for array in rows)


def abstract_mixer(shape: tuple[int, int, int, int], dtype: Any, mesh: AnyMesh | None) -> Mixer:
    """Shapes, dtypes and places of a buffer of shape [L, V, s, d]."""
    x, mask = (None, None) if mesh is None else (NamedSharding(mesh, _X), NamedSharding(mesh, _MASK))
    arrays: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=x), jax.ShapeDtypeStruct(shape[1:3], bool, sharding=mask)
    return Mixer(*arrays)


def init_mixer(shape: tuple[int, int, int, int], dtype: Any, mesh: AnyMesh | None) -> Mixer:
    """An empty buffer on its devices."""
    wanted = abstract_mixer(shape, dtype, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return jax.jit(lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), wanted), out_shardings=places)()


def make_fill(mesh: AnyMesh | None = None) -> Callable[[Mixer, Activations, int], Mixer]:
    """Jitted: puts batch number i, counted from 0, into the slots that it finds empty; the buffer is donated."""

    def fill(mixer: Mixer, fresh: Activations, number) -> Mixer:
        x, mask = _split(fresh, mixer)
        begin = number * mask.shape[1]
        return Mixer(
            jax.lax.dynamic_update_slice_in_dim(mixer.x, x, begin, axis=2),
            jax.lax.dynamic_update_slice_in_dim(mixer.mask, mask, begin, axis=1),
        )

    return jax.jit(_on_data(fill, mesh, (*_SPECS, PartitionSpec()), _SPECS[0]), donate_argnums=0)


def make_exchange(seed: int, mesh: AnyMesh | None = None) -> Callable[..., tuple[Mixer, Activations]]:
    """Jitted: (mixer, fresh, step) -> (mixer, what random slots held), fresh tokens in their place; donates the buffer.

    The order is a function of the seed, the step and the virtual shard.
    """

    def exchange(mixer: Mixer, fresh: Activations, step) -> tuple[Mixer, Activations]:
        x, mask = _split(fresh, mixer)
        shards, count = mask.shape
        first = 0 if mesh is None else jax.lax.axis_index("data") * shards
        key = jax.random.fold_in(jax.random.key(seed), step)
        keys = jax.vmap(lambda shard: jax.random.fold_in(key, shard))(first + jnp.arange(shards))
        slots = jax.vmap(lambda key: jax.random.permutation(key, mixer.mask.shape[1])[:count])(keys)
        each = jnp.arange(shards)[:, None]
        old = Activations(
            mixer.x[:, each, slots].reshape(x.shape[0], -1, x.shape[-1]), mixer.mask[each, slots].reshape(-1)
        )
        return Mixer(mixer.x.at[:, each, slots].set(x), mixer.mask.at[each, slots].set(mask)), old

    return jax.jit(_on_data(exchange, mesh, (*_SPECS, PartitionSpec()), _SPECS), donate_argnums=0)


def measure_norms(collect: Collect, params: Params | tuple[()], batches: Iterable[tuple[jax.Array, ...]]) -> Norms:
    """Mean, scale and sink threshold of every layer, as NumPy arrays, measured over batches that are gone over twice.

    The scale makes |x - mean|^2 / d one on average. Sinks, above ten times the median norm, count in neither.

    Raises:
      ValueError: there is no real token, or a residual vector is not finite.
    """
    batches = list(batches)
    norms_of = jax.jit(lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1))
    norms = []
    for batch in batches:
        seen = collect(params, *batch)
        norms.append(to_host(norms_of(seen.x))[:, to_host(seen.mask)])
    sinks = np.array([sink_threshold(of_layer) for of_layer in np.concatenate(norms, axis=1)])
    sums = [_moments(*collect(params, *batch), sinks.astype(np.float32)) for batch in batches]
    count, total, squares = (_added(parts) for parts in zip(*sums, strict=True))
    mean = total / count[:, None]
    variance = squares / count - np.sum(mean * mean, axis=1)
    scale = np.sqrt(np.maximum(variance, np.finfo(np.float32).tiny) / mean.shape[1])
    return Norms(mean, scale, sinks)  # type: ignore[arg-type]


def _added(parts: Sequence[jax.Array]) -> np.ndarray:
    return np.asarray(np.sum([to_host(part) for part in parts], axis=0, dtype=np.float64))


@jax.jit
def _moments(x, mask, sinks):
    x = jnp.where(mask[:, None], x.astype(jnp.float32), 0)
    keep = mask & (jnp.linalg.norm(x, axis=-1) <= sinks[:, None])
    x = jnp.where(keep[..., None], x, 0)
    return jnp.sum(keep, axis=1), jnp.sum(x, axis=1), jnp.sum(x * x, axis=(1, 2))


def _split(fresh: Activations, mixer: Mixer) -> tuple[jax.Array, jax.Array]:
    """Fresh tokens by virtual shard: [L, V, n / V, d] and [V, n / V]."""
    shards = mixer.mask.shape[0]
    x, mask = fresh
    return x.reshape(x.shape[0], shards, -1, x.shape[-1]), mask.reshape(shards, -1)


def _on_data(function: Callable[..., Any], mesh: AnyMesh | None, given: Any, result: Any) -> Callable[..., Any]:
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=result)
