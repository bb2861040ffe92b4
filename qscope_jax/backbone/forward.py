"""The whole backbone as one pure function: embed, scan over periods of layers, norm, logits.

A period is the repeating pattern of layer kinds (("full",) for Qwen3); every leaf of `params["period"]` leads with the
period axis, so the compiled program does not grow with depth. Layer l sits in period l // p at slot l % p.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.layers import Block, BlockContext, rms_norm, rope_tables
from qscope_jax.taps import Tap, TapContext, check_tap

Params = dict[str, Any]
LogitsMode = Literal["all", "last", "none"]
Remat = Literal["full", "dots"]

_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class ForwardOutput(NamedTuple):
    """What a forward pass gives; parts that were not asked for are None (`captured` then has no rows).

    logits [b, t, v], or [b, v] of each row's last real token; hidden [b, t, d] after the final norm;
    captured [len(capture), b, t, d]; taps: the tap's outputs, leaves [layers run, ...].
    """

    logits: Float[Array, "..."] | None
    hidden: Float[Array, "b t d"] | None
    captured: Float[Array, "n b t d"]
    taps: Any


def init_params(key: jax.Array, config: ModelConfig, *, dtype=jnp.float32) -> Params:
    """Random parameters (normal, std 0.02; norms one) in the tree that `forward` takes."""
    keys = jax.random.split(key, len(config.period) + 2)
    h = jnp.zeros((1, 1, config.hidden_size), dtype)
    ctx, _ = _contexts(jnp.zeros((1, 1), jnp.int32), None, None, None, config, dtype)

    def init_slot(slot: int):
        block = Block(config, config.period[slot])
        slot_keys = jax.random.split(keys[slot], config.num_periods)
        return jax.vmap(lambda k: block.init(k, h, ctx)["params"])(slot_keys)

    table = (config.vocab_size, config.hidden_size)
    params = {
        "embed": 0.02 * jax.random.normal(keys[-2], table),
        "period": tuple(init_slot(slot) for slot in range(len(config.period))),
        "final_norm": {"scale": jnp.ones(config.hidden_size)},
    }
    if not config.tie_word_embeddings:
        params["head"] = 0.02 * jax.random.normal(keys[-1], table)
    return jax.tree.map(lambda a: a.astype(dtype), params)


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "b t"],
    *,
    mask: Bool[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    tap: Tap | None = None,
    capture: tuple[int, ...] = (),
    logits: LogitsMode = "all",
    stop_after: int | None = None,
    remat: Remat | None = None,
) -> ForwardOutput:
    """Runs the backbone on a batch of token ids.

    Args:
      params: the tree of `init_params` or `load_backbone`; its dtype is the compute dtype.
      config: static constants; `config.precision` is the precision of every matmul.
      tokens: ids [b, t]; ids outside the vocabulary must be refused before (see `check_tokens`).
      mask: True where a token is real; padding may stand left or right. Outputs at pads are finite and meaningless.
      positions: rotary positions; by default the running count of real tokens in each segment.
      segment_ids: documents packed in a row; attention stops where the id changes.
      tap: looks at or changes the residual stream after every layer.
      capture: 0-based layers whose raw output (before the final norm, after the tap) is returned in `captured`. For
        gradients prefer small tap outputs: the buffer is kept once per layer by the backward pass.
      logits: all positions, each row's last real token, or none.
      stop_after: run layers 0..stop_after alone; then `hidden` and `logits` are None.
      remat: recompute each period in the backward pass: "full", or "dots" to keep matmul results.

    Raises:
      ValueError: an option or a shape that does not fit, named.
    """
    depth = _check(config, tokens, capture, logits, stop_after, remat, tap, mask, positions, segment_ids)
    h = jnp.take(params["embed"], tokens, axis=0)
    ctx, tap_ctx = _contexts(tokens, mask, positions, segment_ids, config, h.dtype)
    h, captured, outs = _run_layers(params["period"], config, h, ctx, tap_ctx, tap, capture, depth, remat)
    if stop_after is not None:
        return ForwardOutput(None, None, captured, outs)
    hidden = rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps)
    head = params["embed"] if config.tie_word_embeddings else params["head"]
    return ForwardOutput(_logits(hidden, head, tap_ctx.mask, config, logits), hidden, captured, outs)


def check_tokens(tokens, config: ModelConfig) -> None:
    """Refuses ids that the embedding does not have: on device a negative one wraps around and others give NaN.

    Raises:
      ValueError: the first such id and the size of the vocabulary.
    """
    tokens = np.asarray(tokens)
    wrong = tokens[(tokens < 0) | (tokens >= config.vocab_size)]
    if wrong.size:
        raise ValueError(
            f"token id {wrong[0]} lies outside the model's vocabulary of {config.vocab_size}; the tokenizer does not "
            "belong to this model"
        )


def _run_layers(period, config, h, ctx, tap_ctx, tap, capture, depth, remat) -> tuple[Any, Any, Any]:
    """Scans over whole periods, then runs what `depth` leaves of the last one."""
    p = len(config.period)
    whole, rest = divmod(depth, p)
    slots = jnp.full(config.num_layers, -1).at[jnp.array(capture, int)].set(jnp.arange(len(capture)))
    per_layer = (slots, tap.per_layer if tap is not None else ())
    per_layer = jax.tree.map(lambda a: a.reshape(config.num_periods, p, *a.shape[1:]), per_layer)
    buffer = jnp.zeros((len(capture), *h.shape), h.dtype)

    def layer(carry, slot, weights, data):
        h, buffer = carry
        h = Block(config, config.period[slot]).apply({"params": weights}, h, ctx)
        row, tap_data = jax.tree.map(lambda a: a[slot], data)
        h, out = (h, ()) if tap is None else tap.fn(h, tap_data, tap.shared, tap_ctx)
        if capture:
            buffer = jax.lax.cond(row >= 0, lambda b: b.at[row].set(h), lambda b: b, buffer)
        return (h, buffer), out

    def body(carry, xs):
        weights, data = xs if depth == config.num_layers else _at((period, per_layer), xs)
        outs = []
        for slot in range(p):
            carry, out = layer(carry, slot, weights[slot], data)
            outs.append(out)
        return carry, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    if remat is not None:
        body = jax.checkpoint(body, policy=_REMAT_POLICIES[remat], prevent_cse=False)
    # A cut depth indexes the stacked weights inside the body: slicing them beforehand would copy the slice.
    xs = (period, per_layer) if depth == config.num_layers else jnp.arange(whole)
    carry, outs = jax.lax.scan(body, (h, buffer), xs)
    outs = jax.tree.map(lambda a: a.reshape(whole * p, *a.shape[2:]), outs)
    if rest:
        weights, data = _at((period, per_layer), whole)
        tail = []
        for slot in range(rest):
            carry, out = layer(carry, slot, weights[slot], data)
            tail.append(out)
        outs = jax.tree.map(lambda a, *b: jnp.concatenate([a, jnp.stack(b)]), outs, *tail)
    h, buffer = carry
    return h, buffer, outs


def _at(tree, index):
    # Without the handling of negative indices the program is that of scan's own slices, so that XLA fuses both alike
    # and a cut depth gives the bits of the full one.
    at = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False, allow_negative_indices=False)  # noqa: E731
    return jax.tree.map(at, tree)


def _contexts(tokens, mask, positions, segment_ids, config, dtype) -> tuple[BlockContext, TapContext]:
    mask = jnp.ones(tokens.shape, bool) if mask is None else mask.astype(bool)
    segments = jnp.zeros(tokens.shape, jnp.int32) if segment_ids is None else _ordinals(segment_ids, mask)
    if positions is None:
        positions = _running_positions(segments, mask)
    cos, sin = rope_tables(positions, config, dtype)
    return BlockContext(cos, sin, mask, segments), TapContext(positions, mask, segments)


def _ordinals(segment_ids, mask):
    """Numbers the segments of each row in order; an id that comes back later starts a new one."""
    columns = jnp.arange(mask.shape[1])
    last_real = jax.lax.cummax(jnp.where(mask, columns, -1), axis=1)
    previous = jnp.pad(last_real, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    before = jnp.take_along_axis(segment_ids, jnp.maximum(previous, 0), axis=1)
    starts = mask & (previous >= 0) & (segment_ids != before)
    return jnp.cumsum(starts, axis=1)


def _running_positions(segments, mask):
    """0, 1, 2, … over the real tokens of each segment; pads take the position before them."""
    count = jnp.cumsum(mask, axis=1)
    starts = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)))
    offset = jax.lax.cummax(jnp.where(starts, count - mask, 0), axis=1)
    return jnp.maximum(count - offset - 1, 0)


def _logits(hidden, head, mask, config, mode: LogitsMode):
    if mode == "none":
        return None
    if mode == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return jnp.einsum("...d,vd->...v", hidden, head, precision=config.precision)


def _check(config, tokens, capture, logits, stop_after, remat, tap, mask, positions, segment_ids) -> int:
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [b, t], found {tokens.dtype} {tuple(tokens.shape)}")
    for name, array in (("mask", mask), ("positions", positions), ("segment_ids", segment_ids)):
        if array is not None and array.shape != tokens.shape:
            raise ValueError(f"{name} has shape {tuple(array.shape)}, tokens have {tuple(tokens.shape)}")
    if logits not in ("all", "last", "none"):
        raise ValueError(f"logits = {logits!r}; expected 'all', 'last' or 'none'")
    if remat is not None and remat not in _REMAT_POLICIES:
        raise ValueError(f"remat = {remat!r}; expected None or one of {sorted(_REMAT_POLICIES)}")
    if stop_after is not None and not 0 <= stop_after < config.num_layers:
        raise ValueError(f"stop_after = {stop_after}; layers are 0..{config.num_layers - 1}")
    depth = config.num_layers if stop_after is None else stop_after + 1
    if len(set(capture)) != len(capture) or not all(0 <= layer < depth for layer in capture):
        raise ValueError(f"capture = {capture} must be different layers among 0..{depth - 1}, those that run")
    if tap is not None:
        check_tap(tap, config.num_layers)
    return depth
