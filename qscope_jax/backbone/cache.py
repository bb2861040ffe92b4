"""What a backbone remembers of the tokens it has seen: keys and values, or the state of a delta rule.

Every call of `forward` fills the next t columns of all rows, pads included; `segments` says which columns count. The
cache lives in the scan's carry: donate it to a jitted step and no copy of it is made.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.mesh import AnyMesh, sharding


class FullSlot(NamedTuple):
    """Keys (normed and turned) and values of one slot's layers, one per period."""

    k: Float[Array, "p b s k c"]
    v: Float[Array, "p b s k c"]


class LinearSlot(NamedTuple):
    """The inputs of the last u = conv_width - 1 real tokens and the delta rule's state (float32), per period."""

    q: Float[Array, "p b u i c"]
    k: Float[Array, "p b u i c"]
    v: Float[Array, "p b u j w"]
    state: Float[Array, "p b j c w"]


class Cache(NamedTuple):
    """A pytree; made by `init_cache`, read and returned by `forward`.

    Attributes:
      slots: per slot of the period.
      length: columns filled so far, the same for all rows.
      segments: [b, s] ordinal of every column's segment in its row; -1 where it is a pad or not filled.
      conv_segments: [b, u] the same for the tokens that the convolutions remember.
      last_segment, ordinal, position: [b] of the last real token its segment id and ordinal (-1: none yet), and the
        position that the next token of that segment takes.
    """

    slots: tuple[FullSlot | LinearSlot, ...]
    length: Int[Array, ""]
    segments: Int[Array, "b s"]
    conv_segments: Int[Array, "b u"]
    last_segment: Int[Array, "b"]
    ordinal: Int[Array, "b"]
    position: Int[Array, "b"]

    @property
    def capacity(self) -> int:
        """How many columns there are."""
        return self.segments.shape[1]


def init_cache(config: ModelConfig, batch: int, capacity: int, *, dtype=None, mesh: AnyMesh | None = None) -> Cache:
    """An empty cache for `batch` rows of at most `capacity` columns, pads included.

    Args:
      config: the model.
      batch: rows b.
      capacity: columns s; `forward` refuses to go beyond it.
      dtype: of keys, values and convolution inputs; by default float32 in parity mode, else bfloat16.
      mesh: spreads rows over "data" and heads over "model".

    Raises:
      ValueError: a size below one.
      MeshError: the mesh does not divide the rows or the heads.
    """
    dtype = dtype or (jnp.float32 if config.precision == "highest" else jnp.bfloat16)
    if batch < 1 or capacity < 1:
        raise ValueError(f"a cache of {batch} rows and {capacity} columns; both must be at least 1")

    def array(shape, axes, value=0, kind=jnp.int32):
        place = None if mesh is None else sharding(axes, shape, mesh)
        return jnp.full(shape, value, kind, device=place)

    def slot(kind: str) -> FullSlot | LinearSlot:
        lead, p = (None, "batch", None), config.num_periods
        if kind == "full":
            shape, axes = (p, batch, capacity, config.num_kv_heads, config.head_dim), (*lead, "kv_heads", None)
            return FullSlot(array(shape, axes, kind=dtype), array(shape, axes, kind=dtype))
        linear = config.linear
        assert linear is not None
        i, j, width = linear.num_key_heads, linear.num_value_heads, linear.conv_width - 1
        keys = lambda: array((p, batch, width, i, linear.key_dim), (*lead, "key_heads", None), kind=dtype)  # noqa: E731
        values = array((p, batch, width, j, linear.value_dim), (*lead, "value_heads", None), kind=dtype)
        state = (p, batch, j, linear.key_dim, linear.value_dim)
        axes = (None, "batch", "value_heads", None, None)
        return LinearSlot(keys(), keys(), values, array(state, axes, kind=jnp.float32))

    u = 0 if config.linear is None else config.linear.conv_width - 1
    rows = lambda value: array((batch,), ("batch",), value)  # noqa: E731
    return Cache(
        slots=tuple(slot(kind) for kind in config.period),
        length=array((), ()),
        segments=array((batch, capacity), ("batch", None), -1),
        conv_segments=array((batch, u), ("batch", None), -1),
        last_segment=rows(0),
        ordinal=rows(-1),
        position=rows(0),
    )


def check_room(cache: Cache, new: int) -> None:
    """Refuses `new` more columns than the cache has left, as far as that can be known.

    Under `jit` the length is not known to Python; `forward` then gives NaN instead of wrong numbers.

    Raises:
      ValueError: what is filled, asked for and there.
    """
    filled = None if isinstance(cache.length, Tracer) else int(np.asarray(cache.length))
    if (filled or 0) + new > cache.capacity:
        raise ValueError(
            f"the cache has {cache.capacity} columns, of which {'some' if filled is None else filled} are filled; "
            f"{new} more do not fit: make it larger with init_cache(capacity=...)"
        )
