"""Text from a backbone: one program reads the prompts, one writes tokens in a loop on the device.

    generate = result(advance(start(prompts)));    streaming: written(advance(…, 1)) again and again

Shapes are bucketed, prompts padded left, and all settings are data, so that few programs serve all calls.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params, check_tokens
from qscope_jax.backbone.parameters import split_layers
from qscope_jax.generation.sampling import Rows, check_sampling
from qscope_jax.generation.steps import Given, State, Steps, make_steps
from qscope_jax.mesh import mesh_of, to_host
from qscope_jax.taps import Tap

Tensor = jax.Array | np.ndarray
_FEWEST = 16  # the smallest bucket
_IN_CACHE = 8 << 20  # bytes of a layer
_EOS_IDS = 8  # fewer are filled up, so that another number of them mostly does not recompile


class Taps(NamedTuple):
    """What the tap returned.

    prompt: as `forward` gives it, for rows padded left to a bucket, whose last columns are the prompt. generated:
    leaves lead with [new], entry i for token i as the model read it. The last token of a row is never read, nor is what
    follows: there the mask that the tap saw is False, and entries that no row reached are 0.
    """

    prompt: Any
    generated: Any


class GenerateOutput(NamedTuple):
    """What `generate` gives, on the host.

    tokens [b, new], pads (the first eos id, else 0) behind a row's end; lengths [b], the eos counted; logprobs [b, new]
    of the chosen tokens under the model's own distribution, before penalty, temperature and cuts; top_ids and
    top_logprobs [b, new, n], the likeliest under that distribution, or None; ended [b], True where an eos
    ended the row; taps: the tap's outputs.
    """

    tokens: Int[np.ndarray, "b new"]
    lengths: Int[np.ndarray, "b"]
    logprobs: Float[np.ndarray, "b new"]
    top_ids: Int[np.ndarray, "b new n"] | None
    top_logprobs: Float[np.ndarray, "b new n"] | None
    ended: Bool[np.ndarray, "b"]
    taps: Taps


class Written(NamedTuple):
    """Tokens so far, on the host: tokens [b, new], lengths [b] and ended [b] as in `GenerateOutput`."""

    tokens: Int[np.ndarray, "b new"]
    lengths: Int[np.ndarray, "b"]
    ended: Bool[np.ndarray, "b"]


class Generation(NamedTuple):
    """A batch under way, from `start`; `advance` uses it up and gives the next."""

    steps: "Steps"
    params: Params
    tap: Tap | None
    given: "Given"
    limit: int
    state: State
    prompt_taps: Any


def generate(
    params: Params,
    config: ModelConfig,
    tokens: Int[Tensor, "b t"],
    *,
    mask: Bool[Tensor, "b t"] | None = None,
    tap: Tap | None = None,
    max_new_tokens: int,
    temperature: Rows = 0.0,
    top_p: Rows = 1.0,
    top_k: int | Sequence[int] | np.ndarray = 0,
    repetition_penalty: Rows = 1.0,
    seeds: Sequence[int] | np.ndarray | None = None,
    eos: Sequence[int] | None = None,
    top_logprobs: int = 0,
) -> GenerateOutput:
    """Continues every row of a batch; nothing goes to the host before all rows are done.

    On a mesh (params from `load_backbone(mesh=...)`) rows are spread over "data". Neither a prompt of another length in
    its bucket nor another value of any setting recompiles, but for another `top_logprobs` and more than 8 ids in `eos`.

    Args:
      params: see `forward`; on a GPU it decodes faster with those of `split_layers(..., consume=True)`.
      config: see `forward`.
      tokens: prompts [b, t]; see `pad_left` for lists of unequal length.
      mask: True where a token is real; pads may stand anywhere.
      tap: looks at or changes the residual stream of prompt and continuation. The last token of a row is never read by
        the model, so that a tap on generated tokens sees one less than `lengths`.
      max_new_tokens: at most this many tokens per row.
      temperature: one value, or one per row, as for the next three; 0 takes the likeliest token.
      top_p: keeps the likeliest tokens up to this mass, after temperature and top_k; 1 keeps all.
      top_k: keeps this many tokens; 0 keeps all.
      repetition_penalty: divides positive and multiplies negative logits of ids in the prompt or generated; 1 is none.
      seeds: an integer in 0..2**32 - 1 per row, from which the same text comes at any batch size and order.
      eos: ids that end a row; by default the model's own, none with ().
      top_logprobs: how many of the likeliest tokens are told for each place.

    Raises:
      ValueError: an empty prompt, one that leaves no room for `max_new_tokens` in the model's context, an id outside
        the vocabulary, or an option that does not fit, named.
      FloatingPointError: logits that are no distribution (NaN, infinite).
      MeshError: the mesh does not divide the rows.
    """
    begun = start(
        params, config, tokens, mask=mask, tap=tap, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        top_k=top_k, repetition_penalty=repetition_penalty, seeds=seeds, eos=eos, top_logprobs=top_logprobs,
    )  # fmt: skip
    return result(advance(begun))


def start(
    params: Params,
    config: ModelConfig,
    tokens: Int[Tensor, "b t"],
    *,
    mask: Bool[Tensor, "b t"] | None = None,
    tap: Tap | None = None,
    max_new_tokens: int,
    eos: Sequence[int] | None = None,
    top_logprobs: int = 0,
    **sampling: Any,
) -> Generation:
    """Reads the prompts and chooses the first token of every row; arguments and errors are those of `generate`."""
    rows = _prompts(tokens, mask, config, max_new_tokens)
    if not 0 <= top_logprobs <= config.vocab_size:
        raise ValueError(f"top_logprobs = {top_logprobs}; expected 0..{config.vocab_size}, the model's vocabulary")
    ends = config.eos_token_ids if eos is None else tuple(eos)
    if ends and not np.issubdtype(np.asarray(ends).dtype, np.integer):
        raise ValueError(f"eos = {ends}; expected token ids")
    check_tokens(ends, config)
    lengths = np.array([len(row) for row in rows], np.int32)
    width, room = bucket(int(lengths.max())), bucket(max_new_tokens)
    padded, real = pad_left(rows, width)
    filled = [*ends, *[-1] * (bucket(len(ends), _EOS_IDS) - len(ends))]
    numbers: Any = np.array(filled, np.int32), np.array(ends[0] if ends else 0, np.int32), lengths
    given = Given(check_sampling(len(rows), **sampling), *numbers)
    steps, embed = make_steps(config), params["embed"]
    mesh = None if mesh_of(embed) is None else embed.sharding.mesh
    cache = init_cache(config, len(rows), width + room, dtype=embed.dtype, mesh=mesh)
    state, prompt_taps = steps.prefill(params, tap, given, padded, real, cache, room, top_logprobs)
    return Generation(steps, params, tap, given, max_new_tokens, state, prompt_taps)


def advance(
    generation: Generation, new: int | None = None, *, stopped: Bool[np.ndarray, "b"] | None = None
) -> Generation:
    """Goes on by at most `new` tokens per row (by default to the end), without the rows that are `stopped`.

    The generation given is used up: its arrays are donated. Any `new` runs the same program.
    """
    state = generation.state
    bound = generation.limit if new is None else min(int(state.number) + new, generation.limit)
    stopped = np.zeros(state.done.shape, bool) if stopped is None else np.asarray(stopped, bool)
    params, config = generation.params, generation.steps.config
    if in_place := _reads_in_place(params, config):
        params = split_layers(params, config)
    state = generation.steps.decode(params, generation.tap, generation.given, state, np.int32(bound), stopped)
    if in_place:
        jax.block_until_ready(state.token)  # the views end here
    return generation._replace(state=state)


def written(generation: Generation) -> Written:
    """The tokens so far and nothing else: for streaming, where all that `result` brings would be copied every time.

    Raises:
      FloatingPointError: logits that are no distribution.
    """
    state = generation.state
    lengths, sound = to_host(state.lengths), to_host(state.sound)
    if not sound.all():
        row = int(np.argmin(sound))
        raise FloatingPointError(
            f"the logits of row {row} are not finite at its token {lengths[row]} (0 is the first generated): the "
            "weights are damaged or overflow in this precision, or a tap gave values that are not finite"
        )
    return Written(to_host(state.tokens)[:, : generation.limit], lengths, to_host(state.ended))


def result(generation: Generation) -> GenerateOutput:
    """What stands so far; the last rows and columns are pads where nothing was generated yet.

    Raises:
      FloatingPointError: logits that are no distribution.
    """
    state, new = generation.state, generation.limit
    host = lambda a: to_host(a)[:, :new]  # noqa: E731
    tokens, lengths, ended = written(generation)
    top_ids, top_logprobs = (None, None) if state.top is None else (host(state.top[0]), host(state.top[1]))
    generated = jax.tree.map(lambda a: to_host(a)[:new], state.taps)
    taps = Taps(generation.prompt_taps, generated)
    return GenerateOutput(tokens, lengths, host(state.logprobs), top_ids, top_logprobs, ended, taps)


def finished(generation: Generation) -> bool:
    """True when `advance` has nothing left to do."""
    state = generation.state
    return bool(int(state.number) >= generation.limit or to_host(state.done).all() or not to_host(state.sound).all())


def pad_left(rows: Sequence[Sequence[int] | np.ndarray], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lists of token ids as one batch: tokens [b, t] int32, padded left with 0, and their mask [b, t].

    Raises:
      ValueError: there are no rows.
    """
    if not len(rows):
        raise ValueError("no prompts: a batch needs at least one row")
    width = max(map(len, rows)) if width is None else width
    tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], mask[i, width - len(row) :] = row, True
    return tokens, mask


def bucket(size: int, fewest: int = _FEWEST) -> int:
    """The smallest of fewest, 1.5 fewest, 2 fewest, 3 fewest, 4 fewest … that holds `size`."""
    found = fewest
    while found < size:
        found = found * 3 // 2 if found.bit_count() == 1 else found // 3 * 4
    return found


def _reads_in_place(params: Params, config: ModelConfig) -> bool:
    """Whether decoding reads views of single layers: a CPU would copy a scan's slices, all weights for every token.

    The program then grows with depth; where a layer's copy stays in the cache that is not worth its compilation.
    """
    embed = params["embed"]
    if "layers" in params or mesh_of(embed) is not None or next(iter(embed.devices())).platform != "cpu":
        return False
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params["period"])) >= config.num_layers * _IN_CACHE


def _prompts(tokens, mask, config: ModelConfig, new: int) -> list[np.ndarray]:
    """The real tokens of every row, which fit with `new` more into the model's context."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer) or not tokens.shape[0]:
        raise ValueError(f"tokens must be integers [b, t], found {tokens.dtype} {tokens.shape}; see pad_left")
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask).astype(bool)
    if real.shape != tokens.shape:
        raise ValueError(f"mask has shape {real.shape}, tokens have {tokens.shape}")
    if not isinstance(new, int | np.integer) or new < 1:
        raise ValueError(f"max_new_tokens = {new}; expected a whole number of at least 1")
    rows = [row[own] for row, own in zip(tokens, real, strict=True)]
    for i, row in enumerate(rows):
        context = config.max_position_embeddings
        if not len(row):
            raise ValueError(f"row {i} has no tokens; a prompt needs at least one")
        if len(row) > context:
            raise ValueError(f"row {i} has {len(row)} tokens, the model's context {context}: shorten the prompt")
        if len(row) + new > context:
            raise ValueError(
                f"row {i} has {len(row)} tokens, and {new} more would go beyond the model's context of {context}: "
                f"shorten the prompt or ask for max_new_tokens of at most {context - len(row)}"
            )
        check_tokens(row, config)
    return rows
