"""The two programs that write text: one reads the prompts, one adds tokens in a loop on the device.

    state = prefill(prompts);    decode: while not all are done: state = choose(forward(last tokens), state)

The state (cache, tokens so far) is donated from step to step; `bound` is data, so that one token at a time, for
streaming, is the same program as all at once.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.backbone.cache import Cache
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.generation.sampling import Sampling, next_token, top_of


class State(NamedTuple):
    """A batch on the device between two steps; donated to each.

    `number` tokens are chosen; `token` [b] is the last, which the model has not read. `done` rows take no more tokens;
    rows that are not `sound` met a distribution that is none.
    """

    cache: Cache
    number: Int[Array, ""]
    token: Int[Array, "b"]
    done: Bool[Array, "b"]
    ended: Bool[Array, "b"]
    sound: Bool[Array, "b"]
    lengths: Int[Array, "b"]
    seen: Bool[Array, "b v"]
    tokens: Int[Array, "b n"]
    logprobs: Float[Array, "b n"]
    top: tuple[Int[Array, "b n top"], Float[Array, "b n top"]] | None
    taps: Any


class Given(NamedTuple):
    """What stays the same for all tokens of a batch; data.

    `eos` may be filled up with ids that do not exist; `pad` stands behind a row's end.
    """

    sampling: Sampling
    eos: Int[Array, "e"]
    pad: Int[Array, ""]
    prompt_lengths: Int[Array, "b"]


class Steps:
    """The two programs of a model, made by `make_steps`; `shapes` lists what each was compiled for."""

    def __init__(self, config: ModelConfig):
        self.config, self.shapes = config, list[tuple[str, tuple[int, ...]]]()
        self.prefill = jax.jit(self._prefill, static_argnums=(6, 7), donate_argnums=5)
        self.decode = jax.jit(self._decode, donate_argnums=3)

    @property
    def compilations(self) -> int:
        """How often one of them was compiled."""
        return len(self.shapes)

    def _prefill(self, params, tap, given: Given, tokens, mask, cache: Cache, room: int, top: int):
        self.shapes.append(("prefill", (*tokens.shape, room, top)))  # runs only while jit traces: once per compilation
        b, v = tokens.shape[0], self.config.vocab_size
        options = {"tap": tap, "prompt_lengths": given.prompt_lengths}
        one = {"mask": mask[:, :1], "cache": cache, **options}
        later = jax.eval_shape(lambda: forward(params, self.config, tokens[:, :1], **one).taps)
        out = forward(params, self.config, tokens, mask=mask, cache=cache, logits="last", **options)
        assert out.cache is not None
        assert out.logits is not None
        rows = jnp.arange(b)[:, None]
        buffer = lambda *shape, kind: jnp.zeros((b, room, *shape), kind)  # noqa: E731
        state = State(
            cache=out.cache, number=jnp.zeros((), jnp.int32), token=jnp.zeros(b, jnp.int32),
            done=jnp.zeros(b, bool), ended=jnp.zeros(b, bool), sound=jnp.ones(b, bool), lengths=jnp.zeros(b, jnp.int32),
            seen=jnp.zeros((b, v), bool).at[rows, jnp.where(mask, tokens, v)].set(True, mode="drop"),
            tokens=jnp.full((b, room), given.pad, jnp.int32), logprobs=buffer(kind=jnp.float32),
            top=(buffer(top, kind=jnp.int32), buffer(top, kind=jnp.float32)) if top else None,
            taps=jax.tree.map(lambda a: jnp.zeros((room, *a.shape), a.dtype), later),
        )  # fmt: skip
        return _choose(state, out.logits, given), out.taps

    def _decode(self, params, tap, given: Given, state: State, bound, stopped):
        self.shapes.append(("decode", (*state.tokens.shape, state.cache.capacity)))

        def goes_on(state: State):
            return (state.number < bound) & ~jnp.all(state.done) & jnp.all(state.sound)

        def step(state: State):
            out = forward(
                params, self.config, state.token[:, None], mask=~state.done[:, None], cache=state.cache, tap=tap,
                prompt_lengths=given.prompt_lengths,
            )  # fmt: skip
            assert out.cache is not None
            assert out.logits is not None
            taps = jax.tree.map(lambda a, new: a.at[state.number - 1].set(new), state.taps, out.taps)
            return _choose(state._replace(cache=out.cache, taps=taps), out.logits[:, 0], given)

        return jax.lax.while_loop(goes_on, step, state._replace(done=state.done | stopped))


@functools.lru_cache(maxsize=16)
def make_steps(config: ModelConfig) -> Steps:
    """The programs of a model, the same ones for every call."""
    return Steps(config)


def _choose(state: State, logits, given: Given) -> State:
    """Every row that is not done takes its next token."""
    logits = logits.astype(jnp.float32)
    total = jax.nn.logsumexp(logits, axis=-1)
    sound = state.sound & (jnp.isfinite(total) | state.done)
    token = next_token(logits, state.seen, state.number, given.sampling)
    takes = ~state.done & sound
    token = jnp.where(takes, token, given.pad)
    rows = jnp.arange(len(token))
    chance = jnp.where(takes, logits[rows, token] - total, 0)
    top = state.top
    if top is not None:
        found = top_of(logits - total[:, None], top[0].shape[2])
        keep = lambda a, new: a.at[:, state.number].set(jnp.where(takes[:, None], new, 0))  # noqa: E731
        top = (keep(top[0], found[0]), keep(top[1], found[1]))
    ends = takes & jnp.any(token[:, None] == given.eos, axis=-1)
    return state._replace(
        number=state.number + 1, token=token, done=state.done | ends, ended=state.ended | ends, sound=sound,
        lengths=state.lengths + takes, seen=state.seen.at[rows, token].max(takes),
        tokens=state.tokens.at[:, state.number].set(token), logprobs=state.logprobs.at[:, state.number].set(chance),
        top=top,
    )  # fmt: skip
