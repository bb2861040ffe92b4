"""Recipes tried on prompts: what the model writes under each, judged by what it is and by the model left alone.

Every pair of a recipe and a prompt is a row of a batch, so that a sweep, or a recipe with its controls, is one call.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.analysis.text import distinct_ngrams, language_shares, script_share
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import Backbone
from qscope_jax.generation import bucket, generate, pad_left
from qscope_jax.mesh import to_host
from qscope_jax.objectives.lm import kl_loss, next_tokens, output_head
from qscope_jax.sae.model import Sae, activations_of, without_provenance
from qscope_jax.steering import Steer, count_applied, steer
from qscope_jax.steering.recipe import READS
from qscope_jax.steering.units import Stats
from qscope_jax.taps import Tap, TapContext, chain


class Judged(NamedTuple):
    """Of every row's continuation, per token of it, the mean over tokens.

    nll [b]: -log p under the unsteered model, in nats. kl [b]: KL(steered || unsteered) of the next-token
    distributions, in nats. read [b, n]: activations of the features asked for, in the steered stream.
    """

    nll: Float[np.ndarray, "b"]
    kl: Float[np.ndarray, "b"]
    read: Float[np.ndarray, "b n"]


class Outcome(NamedTuple):
    """What came of one arm of a trial; means over its rows.

    share: of letters in the scripts asked for, NaN without; nll, kl and read as in `Judged`; distinct: different
    3-grams over all 3-grams of token ids (rows with fewer than 3 tokens left out, NaN if all are); languages: share of
    rows in each; selected and changed: tokens per row that its entries chose and changed, summed over entries; texts:
    the continuations.
    """

    share: float
    nll: float
    kl: float
    read: tuple[float, ...]
    distinct: float
    languages: dict[str, float]
    selected: float
    changed: float
    texts: tuple[str, ...]


class Writing(NamedTuple):
    """How continuations are written and looked at; options of `generate`, and the scripts and languages that count."""

    max_new_tokens: int = 48
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    eos: tuple[int, ...] | None = None
    scripts: tuple[str, ...] = ()
    languages: tuple[str, ...] = ()
    batch_rows: int = 64


def try_recipes(
    backbone: Backbone,
    tokenizer: Any,
    saes: Mapping[int, Sae],
    prompts: Sequence[np.ndarray],
    arms: Mapping[str, Sequence[Sequence[Steer]]],
    *,
    stats: Stats | None = None,
    features: Sequence[tuple[int, int]] = (),
    writing: Writing | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Outcome]:
    """Continues every prompt under every recipe of every arm, and says per arm what came of it.

    Row i of every arm is sampled with the same seed, `writing.seed` + i.

    Args:
      backbone: the model.
      tokenizer: from `load_tokenizer`.
      saes: per layer, as `steer` takes them.
      prompts: token ids, one array each.
      arms: per name, recipes; the empty recipe is the model left alone.
      stats: as `steer` takes them.
      features: (layer, feature) whose activations are read back.
      writing: how; by default `Writing()`.
      progress: told after every batch how many rows and tokens were written.

    Raises:
      ValueError: no prompts, or what `generate` and `steer` refuse.
    """
    writing = writing or Writing()
    rows = [(name, recipe, i) for name, recipes in arms.items() for recipe in recipes for i in range(len(prompts))]
    found: dict[str, list[Any]] = {name: [] for name in arms}
    batches = _batches(rows, writing.batch_rows)
    for part in batches:
        # A batch of another size would be compiled anew: shorter ones are filled up.
        filled = part + part[-1:] * (max(map(len, batches)) - len(part))
        written = _write(backbone, saes, prompts, filled, stats, features, writing)[: len(part)]
        for (name, _, _), row in zip(part, written, strict=True):
            found[name].append(row)
        if progress is not None:
            progress(len(part), sum(len(row[0]) for row in written))
    return {name: _outcome(rows, tokenizer, writing) for name, rows in found.items()}


def _batches(rows: list[Any], size: int) -> list[list[Any]]:
    """Rows whose recipes read the same SAEs stand together: how many a batch reads shapes its program."""
    read = [frozenset(entry.layer for entry in recipe if entry.mode in READS) for _, recipe, _ in rows]
    first = next(filter(None, read), frozenset())
    groups: dict[frozenset[int], list[Any]] = {}
    for row, layers in zip(rows, read, strict=True):
        groups.setdefault(layers or first, []).append(row)  # a recipe that reads none may stand anywhere
    return [group[start : start + size] for group in groups.values() for start in range(0, len(group), size)]


def judge(
    backbone: Backbone,
    prompts: Sequence[np.ndarray],
    continuations: Sequence[np.ndarray],
    *,
    tap: Tap | None = None,
    saes: Mapping[int, Sae] | None = None,
    features: Sequence[tuple[int, int]] = (),
) -> Judged:
    """One pass with the tap and one without over prompt and continuation; see `Judged`.

    Args:
      backbone: the model.
      prompts: token ids per row; none empty.
      continuations: token ids per row, as they were generated under `tap`, or real text; none empty.
      tap: what changed the residual stream; rows of its data are those of the batch.
      saes: for `features`, per layer.
      features: (layer, feature) to read.

    Raises:
      ValueError: an empty prompt or continuation, or a feature of a layer without SAE.
    """
    if not all(map(len, prompts)) or not all(map(len, continuations)):
        raise ValueError("a prompt or a continuation has no tokens; every row needs at least one of each")
    whole = [np.concatenate(pair) for pair in zip(prompts, continuations, strict=True)]
    tokens, mask = pad_left(whole, bucket(max(map(len, whole))))
    lengths = jnp.array([len(prompt) for prompt in prompts], jnp.int32)
    reading = _reading(saes or {}, features, backbone.config.num_layers)
    run = _judge(backbone.config)
    return Judged(*map(to_host, run(backbone.params, tokens, mask, lengths, tap, reading)))


@functools.lru_cache(maxsize=8)
def _judge(config: ModelConfig):
    def run(params, tokens, mask, prompt_lengths, tap, reading):
        options: dict[str, Any] = {"mask": mask, "prompt_lengths": prompt_lengths, "logits": "none"}
        clean = forward(params, config, tokens, **options)
        steered = forward(params, config, tokens, tap=reading if tap is None else chain(tap, reading), **options)
        read = steered.taps if tap is None else steered.taps[1]
        targets, pairs = next_tokens(tokens, mask, jnp.zeros_like(tokens))
        position = jnp.cumsum(mask, axis=1) - 1
        written = mask & (position >= prompt_lengths[:, None])
        keep = pairs & (position + 1 >= prompt_lengths[:, None])
        head = output_head(params, config)

        def row(data):
            own = tuple(a[None] for a in data)
            sums = kl_loss(own[0], own[1], head, own[2], own[3], precision=config.precision)[1]
            return sums["cross_entropy"] / sums["tokens"], sums["kl"] / sums["tokens"]

        nll, kl = jax.lax.map(row, (clean.hidden, steered.hidden, targets, keep))
        count = jnp.sum(written, axis=1)[:, None]
        return nll, kl, jnp.sum(jnp.where(written[None, :, :, None], read, 0), axis=(0, 2)) / count

    return jax.jit(run)


class _Read(NamedTuple):
    """Which SAE of the tuple a layer has (-1: none); which feature of which layer stands in each column."""

    sae: Int[Array, "l"]
    layer: Int[Array, "l"]


def _reading(saes: Mapping[int, Sae], features: Sequence[tuple[int, int]], depth: int) -> Tap:
    layers = sorted({layer for layer, _ in features})
    if missing := [layer for layer in layers if layer not in saes]:
        raise ValueError(f"features of layer {missing[0]} are to be read, but the SAEs are of layers {sorted(saes)}")
    which = np.full(depth, -1)
    which[layers] = np.arange(len(layers))
    bare = tuple(without_provenance(saes[n]) for n in layers)
    wanted = jnp.asarray(np.array(features, np.int32).reshape(-1, 2))
    return Tap(_read, _Read(jnp.asarray(which, jnp.int32), jnp.arange(depth, dtype=jnp.int32)), (wanted, bare))


def _read(h: Float[Array, "b t d"], at: _Read, shared: Any, ctx: TapContext) -> tuple[jax.Array, Float[Array, "b t n"]]:
    """Activations of the wanted features at their own layer, 0 elsewhere."""
    wanted, saes = shared
    none = jnp.zeros((*h.shape[:2], len(wanted)), jnp.float32)

    def read(sae: Sae):
        return jnp.where(wanted[:, 0] == at.layer, activations_of(sae, h, wanted[:, 1]), 0)

    branches = [lambda: none, *((lambda sae=sae: read(sae)) for sae in saes)]
    return h, jax.lax.switch(at.sae + 1, branches)


def _write(backbone, saes, prompts, rows, stats, features, writing: Writing):
    """Per row: its tokens, its judgement, and how many tokens were chosen and changed."""
    depth = backbone.config.num_layers
    tap = steer([recipe for _, recipe, _ in rows], saes, stats=stats, num_layers=depth)
    own = [prompts[i] for _, _, i in rows]
    tokens, mask = map(jnp.asarray, pad_left(own))
    out = generate(
        backbone.params, backbone.config, tokens, mask=mask, tap=tap, max_new_tokens=writing.max_new_tokens,
        temperature=writing.temperature, top_p=writing.top_p, seeds=[writing.seed + i for _, _, i in rows],
        eos=writing.eos,
    )  # fmt: skip
    written = [row[:length] for row, length in zip(out.tokens, out.lengths, strict=True)]
    judged = judge(backbone, own, written, tap=tap, saes=saes, features=features)
    applied = count_applied(out.taps.prompt, out.taps.generated)
    return list(zip(written, *judged, applied.selected.sum(axis=1), applied.changed.sum(axis=1), strict=True))


def _outcome(rows: list[Any], tokenizer: Any, writing: Writing) -> Outcome:
    tokens, nll, kl, read, selected, changed = zip(*rows, strict=True)
    texts = tuple(tokenizer.decode(row, skip_special_tokens=True) for row in tokens)
    mean = lambda values: float(np.mean(values))  # noqa: E731
    distinct = [distinct_ngrams(row.tolist()) for row in tokens if len(row) >= 3]
    return Outcome(
        share=mean([script_share(text, *writing.scripts) for text in texts]) if writing.scripts else float("nan"),
        nll=mean(nll),
        kl=mean(kl),
        read=tuple(map(float, np.mean(read, axis=0))),
        distinct=mean(distinct) if distinct else float("nan"),
        languages=language_shares(texts, writing.languages) if writing.languages else {},
        selected=mean(selected),
        changed=mean(changed),
        texts=texts,
    )
