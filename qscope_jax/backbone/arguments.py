"""What `forward` accepts: shapes, kinds and options that belong together."""

from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from qscope_jax.backbone.cache import Cache, check_room, init_cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.context import check_rows
from qscope_jax.taps import check_tap

LogitsMode = Literal["all", "last", "none"]
Remat = Literal["full", "dots"]


def check_arguments(
    config: ModelConfig, tokens, capture, logits, stop_after, remat, tap, mask, positions, segment_ids, cache
) -> int:
    """Refuses what does not fit together; returns how many layers run.

    Raises:
      ValueError: the argument, with what was expected.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [b, t], found {tokens.dtype} {tuple(tokens.shape)}")
    if 0 in tokens.shape:
        raise ValueError(f"tokens have shape {tuple(tokens.shape)}; there is nothing to run")
    for name, array in (("mask", mask), ("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and jnp.shape(array) != tokens.shape:
            raise ValueError(f"{name} has shape {jnp.shape(array)}, tokens have {tuple(tokens.shape)}")
        kinds = (jnp.integer, jnp.bool_) if name == "mask" else (jnp.integer,)
        if array is not None and not any(jnp.issubdtype(array.dtype, kind) for kind in kinds):
            wanted = "True and False" if name == "mask" else "integers"
            raise ValueError(f"{name} holds {array.dtype}; expected {wanted}")
    if logits not in get_args(LogitsMode):
        raise ValueError(f"logits = {logits!r}; expected 'all', 'last' or 'none'")
    if remat is not None and remat not in get_args(Remat):
        raise ValueError(f"remat = {remat!r}; expected None or one of {sorted(get_args(Remat))}")
    if stop_after is not None and not 0 <= stop_after < config.num_layers:
        raise ValueError(f"stop_after = {stop_after}; layers are 0..{config.num_layers - 1}")
    depth = config.num_layers if stop_after is None else stop_after + 1
    if len(set(capture)) != len(capture) or not all(0 <= layer < depth for layer in capture):
        raise ValueError(f"capture = {capture} must be different layers among 0..{depth - 1}, those that run")
    if tap is not None:
        check_tap(tap, config.num_layers)
    if cache is not None:
        _check_cache(cache, config, tokens, stop_after)
    if not any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves((mask, segment_ids, cache))):
        real = np.ones(tokens.shape, bool) if mask is None else mask
        check_rows(segment_ids, real, cache, gaps=not config.hybrid)
    return depth


def _check_cache(cache: Cache, config, tokens, stop_after) -> None:
    if stop_after is not None:
        raise ValueError("stop_after leaves the layers behind it without these tokens; it takes no cache")
    if cache.segments.shape[0] != tokens.shape[0]:
        raise ValueError(f"the cache has {cache.segments.shape[0]} rows, tokens have {tokens.shape[0]}")
    expected = jax.eval_shape(lambda: init_cache(config, tokens.shape[0], cache.capacity))
    if jax.tree.map(jnp.shape, cache) != jax.tree.map(jnp.shape, expected):
        raise ValueError("the cache was made for another model; make it with init_cache(config, ...) of this one")
    check_room(cache, tokens.shape[1])
