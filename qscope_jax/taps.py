"""One concept for looking at and changing the residual stream while it flows.

    h, out_l = fn(h, per_layer_l, shared, ctx)        after decoder layer l, for every l

Capture, steering, clamping and feature read-out are all taps. `fn` is static and the rest is data, so another
strength, feature or layer never recompiles.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int


class TapContext(NamedTuple):
    """What a tap may know besides the residual stream: positions, which tokens are real, segments and prompts.

    `segment_ids` counts the segments of a row from 0 (an ordinal, so a repeated id never joins two documents).
    `prompt_lengths` is that of every token's segment: a token was generated if its position is not below it.
    """

    positions: Int[Array, "b t"]
    mask: Bool[Array, "b t"]
    segment_ids: Int[Array, "b t"]
    prompt_lengths: Int[Array, "b t"]


TapFn = Callable[[Float[Array, "b t d"], Any, Any, TapContext], tuple[Float[Array, "b t d"], Any]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Tap:
    """A function of the residual stream and its data.

    Attributes:
      fn: `fn(h, per_layer_l, shared, ctx) -> (h, out_l)`, a module-level function or a frozen dataclass of such.
        Lambdas and `functools.partial` hash by identity and would recompile at every call.
      per_layer: pytree whose leaves lead with the layer axis; the function sees one layer's slice.
      shared: pytree that every layer sees whole.

    Raises:
      TypeError: `fn` is not hashable.
    """

    fn: TapFn = field(metadata={"static": True})
    per_layer: Any = ()
    shared: Any = ()

    def __post_init__(self):
        hash(self.fn)  # here the caller is in sight; under jit the error would name none of this


@dataclass(frozen=True)
class _Chain:
    """Runs tap functions in order; equal chains of equal functions share one compilation."""

    fns: tuple[TapFn, ...]

    def __call__(self, h, per_layer, shared, ctx):
        outs = []
        for fn, layer_data, shared_data in zip(self.fns, per_layer, shared, strict=True):
            h, out = fn(h, layer_data, shared_data, ctx)
            outs.append(out)
        return h, tuple(outs)


def chain(*taps: Tap) -> Tap:
    """One tap that applies `taps` in order at every layer; its outputs are the tuple of theirs.

    Raises:
      ValueError: no tap was given.
    """
    if not taps:
        raise ValueError("chain() needs at least one tap")
    return Tap(_Chain(tuple(t.fn for t in taps)), tuple(t.per_layer for t in taps), tuple(t.shared for t in taps))


def check_tap(tap: Tap, num_layers: int) -> None:
    """Refuses per-layer data that does not lead with the layer axis.

    Raises:
      ValueError: names the first leaf at fault, with the expected and the found length.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tap.per_layer):
        shape = jax.numpy.shape(leaf)
        if not shape or shape[0] != num_layers:
            name = jax.tree_util.keystr(path)
            raise ValueError(
                f"tap.per_layer{name} has shape {shape}; its first axis must be the {num_layers} layers of the model"
            )
