"""The whole backbone as one pure function: embed, scan over periods of layers, norm, logits.

A period is the repeating pattern of layer kinds (("full",) for Qwen3); every leaf of `params["period"]` leads with the
period axis, so the compiled program does not grow with depth. Layer l sits in period l // p at slot l % p.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.arguments import LogitsMode, Remat, check_arguments
from qscope_jax.backbone.cache import Cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.context import BlockContext, make_contexts
from qscope_jax.backbone.layers import Block
from qscope_jax.backbone.norms import rms_norm
from qscope_jax.backbone.parameters import Params, parameter_shapes
from qscope_jax.mesh import AnyMesh, constrain, mesh_of
from qscope_jax.taps import Tap, TapContext

_REMAT_POLICIES = {"full": None, "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable}


class ForwardOutput(NamedTuple):
    """What a forward pass gives; parts that were not asked for are None (`captured` then has no rows).

    logits [b, t, v], or [b, v] of each row's last real token; hidden [b, t, d] after the final norm;
    captured [len(capture), b, t, d]; taps: the tap's outputs, leaves [layers run, ...]; cache: the one given, with
    these tokens entered.
    """

    logits: Float[Array, "..."] | None
    hidden: Float[Array, "b t d"] | None
    captured: Float[Array, "n b t d"]
    taps: Any
    cache: Cache | None


def init_params(key: jax.Array, config: ModelConfig, *, dtype=jnp.float32) -> Params:
    """Random parameters (matrices normal with std 0.02, norms the identity) in the tree that `forward` takes."""
    keys = jax.random.split(key, len(config.period) + 2)
    h = jnp.zeros((1, 1, config.hidden_size), dtype)
    ctx, _, _ = make_contexts(jnp.zeros((1, 1), jnp.int32), None, None, None, None, config, dtype)

    def init_slot(slot: int):
        block = Block(config, config.period[slot])
        slot_keys = jax.random.split(keys[slot], config.num_periods)
        return jax.vmap(lambda k: block.init(k, h, ctx, None, 0)["params"])(slot_keys)

    table = (config.vocab_size, config.hidden_size)
    params = {
        "embed": 0.02 * jax.random.normal(keys[-2], table),
        "period": tuple(init_slot(slot) for slot in range(len(config.period))),
        "final_norm": {"scale": jnp.full(config.hidden_size, 0.0 if config.hybrid else 1.0)},
    }
    if not config.tie_word_embeddings:
        params["head"] = 0.02 * jax.random.normal(keys[-1], table)
    return jax.tree.map(lambda a, leaf: a.astype(leaf.dtype), params, parameter_shapes(config, dtype))


def forward(
    params: Params,
    config: ModelConfig,
    tokens: Int[Array, "b t"],
    *,
    mask: Bool[Array, "b t"] | None = None,
    positions: Int[Array, "b t"] | None = None,
    segment_ids: Int[Array, "b t"] | None = None,
    cache: Cache | None = None,
    tap: Tap | None = None,
    prompt_lengths: Int[Array, "b"] | Int[Array, "b t"] | None = None,
    capture: tuple[int, ...] = (),
    logits: LogitsMode = "all",
    stop_after: int | None = None,
    remat: Remat | None = None,
) -> ForwardOutput:
    """Runs the backbone on a batch of token ids.

    Args:
      params: the tree of `init_params`, `load_backbone` or `split_layers`; its dtype is the compute dtype.
      config: static constants; `config.precision` is the precision of every matmul.
      tokens: ids [b, t]; ids outside the vocabulary must be refused before (see `check_tokens`).
      mask: True where a token is real; pads may stand left, right and between segments. Outputs at pads are finite and
        meaningless. Linear layers cannot skip pads inside a segment: an error, or where `jit` hides them, NaN.
      positions: rotary positions; by default the running count of real tokens in each segment.
      segment_ids: documents packed in a row, their ids never going backwards; attention, convolution and recurrent
        state begin anew where the id changes. Without ids a row is one segment, or goes on with that of the cache.
      cache: what came before these tokens, from `init_cache` or an earlier call; donate it to a jitted step. Beyond its
        capacity there is an error, or where `jit` hides its length, NaN everywhere.
      tap: looks at or changes the residual stream after every layer.
      prompt_lengths: for taps that tell prompts from what a model generated: per row, or for packed rows per token, how
        many tokens were given. By default all of them, those of this call being the last.
      capture: 0-based layers whose raw output (before the final norm, after the tap) is returned in `captured`. For
        gradients prefer small tap outputs: the buffer is kept once per layer by the backward pass.
      logits: all positions, each row's last real token (NaN for a row of pads), or none.
      stop_after: run layers 0..stop_after alone; then `hidden` and `logits` are None.
      remat: recompute each period in the backward pass: "full", or "dots" to keep matmul results.

    On a mesh (params from `load_backbone(mesh=...)`) rows are spread over "data".

    Raises:
      ValueError: an option or a shape that does not fit, named.
      MeshError: the mesh does not divide the rows.
    """
    depth = check_arguments(
        config, tokens, capture, logits, stop_after, remat, tap, mask, positions, segment_ids, cache
    )
    if prompt_lengths is not None and jnp.shape(prompt_lengths) not in (tokens.shape[:1], tokens.shape):
        raise ValueError(
            f"prompt_lengths has shape {jnp.shape(prompt_lengths)}; expected {tokens.shape[:1]} or {tokens.shape}"
        )
    mesh = mesh_of(params["embed"])
    h = constrain(jnp.take(params["embed"], tokens, axis=0), "batch", None, None, mesh=mesh)
    ctx, tap_ctx, entered = make_contexts(
        tokens, mask, positions, segment_ids, cache, config, h.dtype, prompt_lengths=prompt_lengths
    )
    slots: tuple[Any, ...] = (None,) * len(config.period)
    if entered is not None:
        slots = entered.slots
        h = jnp.where(entered.length > entered.capacity, jnp.nan, h)
    if config.hybrid:
        h = jnp.where(ctx.sound[:, None, None], h, jnp.nan)
    layers = params.get("layers")
    experts = _experts(params["period"], mesh) if layers is None else (None,) * len(config.period)
    run = _Run(config, ctx, tap_ctx, tap, bool(capture), mesh, experts)
    h, captured, slots, outs = _run_layers(run, params.get("period"), layers, h, slots, capture, depth, remat)
    cache = None if entered is None else entered._replace(slots=slots)
    if stop_after is not None:
        return ForwardOutput(None, None, captured, outs, None)
    hidden = rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps, zero_centred=config.hybrid)
    head = params["embed"] if config.tie_word_embeddings else params["head"]
    return ForwardOutput(_logits(hidden, head, tap_ctx.mask, config, logits), hidden, captured, outs, cache)


def forward_after(
    params: Params,
    config: ModelConfig,
    h: Float[Array, "b t d"],
    layer: int | Int[Array, ""],
    *,
    mask: Bool[Array, "b t"],
    segment_ids: Int[Array, "b t"] | None = None,
) -> Float[Array, "b t d"]:
    """`ForwardOutput.hidden` if the output of `layer` were `h`: only the layers behind it run, and none recompiles.

    Args:
      params: see `forward`.
      config: see `forward`.
      h: a residual stream [b, t, d], changed or captured.
      layer: 0-based; it may be traced, and lies in 0..num_layers - 1.
      mask: of the tokens that `h` belongs to.
      segment_ids: theirs; positions are counted from both as in `forward`.
    """
    mesh, p = mesh_of(params["embed"]), len(config.period)
    h = constrain(h, "batch", None, None, mesh=mesh)
    ctx, tap_ctx, _ = make_contexts(mask, mask, None, segment_ids, None, config, h.dtype)
    if config.hybrid:
        h = jnp.where(ctx.sound[:, None, None], h, jnp.nan)
    run = _Run(config, ctx, tap_ctx, None, False, mesh, _experts(params["period"], mesh))
    nothing = (jnp.full(p, -1), ())

    def run_period(period, h):
        weights = _at(params["period"], period)
        for slot in range(p):
            go = lambda h, slot=slot: run.layer((h, (), (None,) * p), slot, period, weights[slot], nothing)[0][0]  # noqa: E731
            h = go(h) if p == 1 else jax.lax.cond(period * p + slot > layer, go, lambda h: h, h)
        return h

    h = jax.lax.fori_loop((jnp.asarray(layer) + 1) // p, config.num_periods, run_period, h)
    return rms_norm(h, params["final_norm"]["scale"], config.rms_norm_eps, zero_centred=config.hybrid)


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


class _Run(NamedTuple):
    """What every layer of one call shares."""

    config: ModelConfig
    ctx: BlockContext
    tap_ctx: TapContext
    tap: Tap | None
    captures: bool
    mesh: AnyMesh | None
    experts: tuple[Any, ...]

    def layer(self, carry, slot: int, period, weights, data):
        """One layer, its tap and its capture; the carry holds the residual stream, captures and the cache."""
        h, buffer, slots = carry
        block = Block(self.config, self.config.period[slot])
        h, new = block.apply({"params": weights}, h, self.ctx, slots[slot], period, self.experts[slot])
        h = constrain(h, "batch", None, None, mesh=self.mesh)
        row, tap_data = jax.tree.map(lambda a: a[slot], data)
        tap = self.tap
        h, out = (h, ()) if tap is None else tap.fn(h, tap_data, tap.shared, self.tap_ctx)
        if self.captures:
            buffer = jax.lax.cond(row >= 0, lambda b: b.at[row].set(h), lambda b: b, buffer)
        return (h, buffer, (*slots[:slot], new, *slots[slot + 1 :])), out


def _run_layers(run: _Run, period, layers, h, slots, capture, depth, remat) -> tuple[Any, Any, Any, Any]:
    """Scans over whole periods, then runs what `depth` leaves of the last one; or runs `layers` one after the other."""
    config, tap = run.config, run.tap
    p = len(config.period)
    whole, rest = divmod(depth, p)
    rows = jnp.full(config.num_layers, -1).at[jnp.array(capture, int)].set(jnp.arange(len(capture)))
    per_layer = (rows, tap.per_layer if tap is not None else ())
    per_layer = jax.tree.map(lambda a: a.reshape(config.num_periods, p, *a.shape[1:]), per_layer)
    buffer = constrain(jnp.zeros((len(capture), *h.shape), h.dtype), None, "batch", None, None, mesh=run.mesh)

    if layers is not None:
        if remat is not None:
            raise ValueError("remat recomputes periods of stacked layers; these parameters come from split_layers")
        carry, outs = (h, buffer, slots), []
        for layer in range(depth):
            data = jax.tree.map(lambda a: a[layer // p], per_layer)  # noqa: B023
            carry, out = run.layer(carry, layer % p, layer // p, layers[layer], data)
            outs.append(out)
        h, buffer, slots = carry
        return h, buffer, slots, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    def body(number: int, gather: bool):
        """The first `number` layers of a period; it gets the period's weights, or finds them by its index."""

        def run_slots(carry, xs):
            index, (weights, data) = (xs, _at((period, per_layer), xs)) if gather else xs
            outs = []
            for slot in range(number):
                carry, out = run.layer(carry, slot, index, weights[slot], data)
                outs.append(out)
            return carry, jax.tree.map(lambda *a: jnp.stack(a), *outs)

        if remat is None:
            return run_slots
        return jax.checkpoint(run_slots, policy=_REMAT_POLICIES[remat], prevent_cse=False)

    # A cut depth indexes the stacked weights inside the body: slicing them beforehand would copy the slice.
    cut, index = depth < config.num_layers, jnp.arange(whole)
    carry, outs = jax.lax.scan(body(p, cut), (h, buffer, slots), index if cut else (index, (period, per_layer)))
    outs = jax.tree.map(lambda a: a.reshape(whole * p, *a.shape[2:]), outs)
    if rest:
        carry, tail = body(rest, cut)(carry, jnp.asarray(whole))
        outs = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), outs, tail)
    h, buffer, slots = carry
    return h, buffer, slots, outs


def _experts(period, mesh: AnyMesh | None) -> tuple[tuple[jax.Array, ...] | None, ...]:
    """For every slot the experts of all periods, which layers read in place: a scan's slice of them would be a copy.

    Where "data" may split weights (FSDP) there is no place to read: each layer's slice is gathered when it runs, and
    these are None.
    """
    in_place = mesh is None or mesh.shape["data"] == 1
    stacks = lambda moe: tuple(moe[name] for name in ("gate", "up", "down"))  # noqa: E731
    return tuple(stacks(slot["moe"]) if in_place and "moe" in slot else None for slot in period)


def _at(tree, index):
    # Without the handling of negative indices the program is that of scan's own slices, so that XLA fuses both alike
    # and a cut depth gives the bits of the full one.
    at = lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False, allow_negative_indices=False)  # noqa: E731
    return jax.tree.map(at, tree)


def _logits(hidden, head, mask, config, mode: LogitsMode):
    if mode == "none":
        return None
    if mode == "last":
        last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
        hidden = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        hidden = jnp.where(jnp.any(mask, axis=1)[:, None], hidden, jnp.nan)
    return jnp.einsum("...d,vd->...v", hidden, head, precision=config.precision)
