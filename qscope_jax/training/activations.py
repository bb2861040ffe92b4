"""Residual streams for training: token rows through the backbone to its last trained layer, then mixed.

Neighbouring tokens of one document make poor batches. With a buffer, every step trains on a random choice of what it
holds and of what is fresh, and keeps the rest, so that a step sees tokens of many documents. Choices are made within
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
from qscope_jax.mesh import AnyMesh, to_host
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


def own_part(mesh: Mesh | None, count: int) -> tuple[int, ...]:
    """Which of `count` rows or virtual shards, split over "data", lie on devices of this process, in their order.

    They are those that it must read; where "model" goes over processes, several read the same. On TPUs a process often
    has places on "data" that are not neighbours.
    """
    if mesh is None:
        return tuple(range(count))
    each = count // mesh.shape["data"]
    places = [i for i, row in enumerate(mesh.devices) if any(d.process_index == jax.process_index() for d in row)]
    return tuple(i * each + j for i in places for j in range(each))


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
    """Jitted: (mixer, fresh, step) -> (mixer, a random batch of what it holds and what is fresh); the mixer is donated.

    What is left stays in the buffer. The order is a function of the seed, the step and the virtual shard.
    """

    def exchange(mixer: Mixer, fresh: Activations, step) -> tuple[Mixer, Activations]:
        x, mask = _split(fresh, mixer)
        shards, count = mask.shape
        first = 0 if mesh is None else jax.lax.axis_index("data") * shards
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        keys = jax.vmap(lambda shard: jax.random.fold_in(key, shard))(first + jnp.arange(shards))
        plan = jax.vmap(lambda key: _draw(key, mixer.mask.shape[1], count))(keys)
        held, out = _swap(mixer.x, x, plan)
        held_mask, out_mask = _swap(mixer.mask[None, ..., None], mask[None, ..., None], plan)
        return Mixer(held, held_mask[0, ..., 0]), Activations(
            out.reshape(len(x), -1, x.shape[-1]), out_mask.reshape(-1)
        )

    return jax.jit(_on_data(exchange, mesh, (*_SPECS, PartitionSpec()), _SPECS), donate_argnums=0)


class _Draw(NamedTuple):
    """For one virtual shard: what is drawn, slots of the buffer and behind them the fresh ones; and which fresh ones
    [count] go to which slots that this leaves empty, s where there is none."""

    drawn: jax.Array
    kept: jax.Array
    slots: jax.Array


def _draw(key, s: int, count: int) -> _Draw:
    drawn = jax.random.permutation(key, s + count)[:count]
    leaves = jnp.zeros(s + count, bool).at[drawn].set(True)
    empty = jnp.nonzero(leaves[:s], size=count, fill_value=s)[0]
    kept = jnp.nonzero(~leaves[s:], size=count, fill_value=0)[0]  # as many as there are empty slots
    return _Draw(drawn, kept, empty)


def _swap(held, fresh, plan: _Draw) -> tuple[jax.Array, jax.Array]:
    """held [L, V, s, d] with what is kept of fresh [L, V, count, d], and what is drawn [L, V, count, d].

    By rows of flat arrays: for other scatters XLA for TPUs turns the buffer round and back at every step.
    """
    layers, shards, s, d = held.shape
    block = jnp.arange(layers * shards).reshape(layers, shards, 1)
    flat, new = held.reshape(-1, d), fresh.reshape(-1, d)
    count = fresh.shape[2]
    old = jnp.take(flat, block * s + jnp.minimum(plan.drawn, s - 1), axis=0, mode="clip")
    now = jnp.take(new, block * count + jnp.maximum(plan.drawn - s, 0), axis=0, mode="clip")
    place = jnp.where(plan.slots < s, block * s + plan.slots, len(flat))
    rows = jnp.take(new, block * count + plan.kept, axis=0, mode="clip")
    # Never so, which the compiler cannot know: writing waits for reading, where it would copy all of the buffer.
    rows = jnp.where(plan.drawn[0, 0] < 0, old, rows)
    flat = flat.at[place.reshape(-1)].set(rows.reshape(-1, d), mode="drop")
    return flat.reshape(held.shape), jnp.where((plan.drawn < s)[..., None], old, now)


def measure_norms(collect: Collect, params: Params | tuple[()], batches: Iterable[tuple[jax.Array, ...]]) -> Norms:
    """Mean, scale and sink threshold of every layer, as NumPy arrays, measured over batches that are gone over twice.

    The scale makes |x - mean|^2 / d one on average. Sinks, above ten times the median norm, count in neither.

    Raises:
      ValueError: there is no real token.
      FloatingPointError: a residual vector is not finite.
    """
    batches = list(batches)
    norms = []
    for batch in batches:  # one at a time: each holds the residual streams of its tokens
        seen = collect(params, *batch)
        norms.append(to_host(_norms(seen.x))[:, to_host(seen.mask)])
    found = np.concatenate(norms, axis=1)
    if wrong := np.flatnonzero(~np.isfinite(found).all(axis=1)).tolist():
        raise FloatingPointError(
            f"the residual stream is not finite at the layers at places {wrong} of those that are trained; the weights "
            "are damaged or overflow in this precision: try --precision parity"
        )
    sinks = np.array([sink_threshold(of_layer) for of_layer in found])
    sums = [0.0, 0.0, 0.0]
    for batch in batches:
        parts = _moments(*collect(params, *batch), sinks.astype(np.float32))
        sums = [old + to_host(part).astype(np.float64) for old, part in zip(sums, parts, strict=True)]
    count, total, squares = map(np.asarray, sums)
    mean = total / count[:, None]
    variance = squares / count - np.sum(mean * mean, axis=1)
    scale = np.sqrt(np.maximum(variance, np.finfo(np.float32).tiny) / mean.shape[1])
    return Norms(mean, scale, sinks)  # type: ignore[arg-type]


@jax.jit
def _norms(x):
    return jax.lax.map(lambda x: jnp.linalg.norm(x.astype(jnp.float32), axis=-1), x)


@jax.jit
def _moments(x, mask, sinks):
    """Per layer: how many tokens count, their sum and the sum of their squares. A layer at a time, to save memory."""

    def of_layer(layer):
        x, sink = layer
        x = jnp.where(mask[:, None], x.astype(jnp.float32), 0)
        keep = mask & (jnp.linalg.norm(x, axis=-1) <= sink)
        x = jnp.where(keep[:, None], x, 0)
        return jnp.sum(keep), jnp.sum(x, axis=0), jnp.sum(x * x)

    return jax.lax.map(of_layer, (x, sinks))


def _split(fresh: Activations, mixer: Mixer) -> tuple[jax.Array, jax.Array]:
    """Fresh tokens by virtual shard: [L, V, n / V, d] and [V, n / V]."""
    shards = mixer.mask.shape[0]
    x, mask = fresh
    return x.reshape(x.shape[0], shards, -1, x.shape[-1]), mask.reshape(shards, -1)


def _on_data(function: Callable[..., Any], mesh: AnyMesh | None, given: Any, result: Any) -> Callable[..., Any]:
    if mesh is None:
        return function
    return jax.shard_map(function, mesh=mesh, in_specs=given, out_specs=result)
