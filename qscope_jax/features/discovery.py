"""Which features of which layers stand for a concept: two sets of texts contrasted over all layers in one pass.

Half of the documents choose the features, the other half judges them: scores, p and q are the first half's, all other
figures the second's. Scores of layers are made comparable as shares of the residual stream:
    score = difference of mean activation x |decoder row| / median residual norm of the layer
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qscope_jax.analysis.contexts import Tokens, TopContexts, add_contexts, init_contexts
from qscope_jax.analysis.contrast import (
    By,
    Contrast,
    Pooled,
    active_features,
    choose_documents,
    contrast,
    document_auroc,
    false_discovery_rates,
    halves,
    join_pooled,
    pool_tokens,
)
from qscope_jax.backbone.forward import check_tokens
from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Buckets, cut_documents, plan_batches, ranges
from qscope_jax.extract import ExtractStep, check_sae, feed_batches, make_extract_step, measure_sinks, stream
from qscope_jax.mesh import mesh_of
from qscope_jax.sae.model import Sae

Encoder = Callable[[Sequence[str]], list[np.ndarray]]
ALPHA = 0.05  # below this q a feature counts as found
CONTEXTS = 3  # kept per feature


@dataclasses.dataclass(frozen=True)
class FoundFeature:
    """A feature that one half of the documents chose; `score`, `p` and `q` are that half's, the rest the other's."""

    layer: int
    feature: int
    score: float
    """By the chosen statistic (see `discover`)."""
    p: float
    """Share of relabellings of the documents that score as high."""
    q: float
    """False discovery rate by Benjamini and Hochberg, over all features of all layers."""
    difference: float
    """Mean activation on positive tokens less the unweighted mean over the other groups of theirs; raw units."""
    rate: float
    """Share of positive tokens on which it fires."""
    other_rate: float
    """The largest such share in another group, and that group's name."""
    other: str
    auroc: float
    """Of the document's maximum, as a test for positive documents."""
    auroc_mean: float
    """The same of the document's mean."""


@dataclasses.dataclass(frozen=True)
class LayerProfile:
    """How well one layer knows the concept: its best feature, and the number of features with q < 0.05."""

    layer: int
    best: FoundFeature
    found: int
    active: int


class Discovery(NamedTuple):
    """What `discover` returns: features over all layers, best first; a profile per layer; and what it was made from.

    `table` has per layer the `Contrast` of all features that are active on the choosing half, with their numbers and q.
    `documents` and `tokens` are counted by group, the positive one first; sinks are left out and counted per layer.
    `contexts` are per layer the places where each feature is strongest, in any text: documents are numbered as the
    texts are given, the positive ones first.
    """

    features: tuple[FoundFeature, ...]
    profile: tuple[LayerProfile, ...]
    table: dict[int, tuple[np.ndarray, Contrast, np.ndarray]]
    documents: dict[str, int]
    tokens: dict[str, int]
    sinks: dict[int, int]
    sink_thresholds: dict[int, float]
    contexts: dict[int, TopContexts]


class PooledTexts(NamedTuple):
    """All layers' pooled activations of some documents, with median norm, sinks and best contexts of each layer."""

    pooled: dict[int, Pooled]
    median_norms: dict[int, float]
    sinks: dict[int, int]
    sink_thresholds: dict[int, float]
    contexts: dict[int, TopContexts]


def discover(
    backbone: Backbone,
    saes: Mapping[int, Sae],
    encoder: Encoder,
    positive: Sequence[str],
    negative: Mapping[str, Sequence[str]],
    *,
    top: int = 10,
    by: By = "difference",
    permutations: int = 1000,
    seed: int = 0,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    step: ExtractStep | None = None,
    progress: Callable[..., None] | None = None,
) -> Discovery:
    """Finds the features that fire on positive texts and not on the others.

    Args:
      backbone: the model.
      saes: per layer; whole, with their decoders.
      encoder: texts to token ids, from `make_encoder`.
      positive: texts that show the concept, at least two.
      negative: groups of texts that do not, at least two in each.
      top: how many features to return, over all layers.
      by: what scores: "difference" of mean activation (with several groups monolinguality) as a share of the residual
        stream, the difference of firing "rate", or "auroc" of documents' maxima.
      permutations: relabellings for p, which is at least 1 / (permutations + 1).
      seed: of those.
      batch_tokens: positions per batch.
      max_length: longer texts are cut into windows; by default the model's context, at most 4096.
      step: a step to use again, made for the same model and layers.
      progress: told `texts` and `tokens` done.

    Raises:
      ValueError: a set of fewer than two texts, a text without tokens, an id beyond the vocabulary, or SAEs that do not
        fit the model.
    """
    names = ("positive", *negative)
    texts = [list(positive), *map(list, negative.values())]
    if few := [name for name, own in zip(names, texts, strict=True) if len(own) < 2]:
        raise ValueError(
            f"{', '.join(few)}: fewer than two texts; one half chooses the features, the other judges them"
        )
    groups = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    documents = encoder([text for own in texts for text in own])
    longest = max_length or min(backbone.config.max_position_embeddings, 4096)
    mesh = mesh_of(backbone.params["embed"])
    buckets = Buckets(batch_tokens, longest, 2, multiple=1 if mesh is None else mesh.shape["data"])
    seen = pool_texts(backbone, saes, documents, buckets, step=step, progress=progress)
    half = halves(groups)
    choosing = {n: choose_documents(one, half == 0) for n, one in seen.pooled.items()}
    judging = {n: choose_documents(one, half == 1) for n, one in seen.pooled.items()}
    features = {n: active_features(one) for n, one in choosing.items()}
    chosen = {
        n: contrast(one, groups[half == 0], features[n], by=by, permutations=permutations, seed=seed)
        for n, one in choosing.items()
    }
    if by == "difference":
        chosen = {n: c._replace(score=c.score * _share(saes[n], features[n], seen.median_norms[n]))
                  for n, c in chosen.items()}  # fmt: skip
    q = dict(zip(chosen, false_discovery_rates([one.p for one in chosen.values()]), strict=True))
    judge = _Judge(judging, groups[half == 1], names)
    table = {n: (features[n], chosen[n], q[n]) for n in chosen}
    each = {n: _best(np.argsort(-chosen[n].score, kind="stable")[:top], n, table[n], judge) for n in chosen}
    best = sorted((one for own in each.values() for one in own), key=lambda f: (-f.score, f.layer, f.feature))
    profile = tuple(
        LayerProfile(n, own[0], int((q[n] < ALPHA).sum()), len(features[n])) for n, own in each.items() if own
    )
    kept = next(iter(seen.pooled.values())).tokens
    return Discovery(
        tuple(best[:top]), profile, table,
        dict(zip(names, map(len, texts), strict=True)),
        {name: int(kept[groups == g].sum()) for g, name in enumerate(names)},
        seen.sinks, seen.sink_thresholds, seen.contexts,
    )  # fmt: skip


def pool_texts(
    backbone: Backbone,
    saes: Mapping[int, Sae],
    documents: Sequence[np.ndarray],
    buckets: Buckets,
    *,
    step: ExtractStep | None = None,
    progress: Callable[..., None] | None = None,
) -> PooledTexts:
    """Pools the codes of documents [n_tokens] each, none empty, without sinks.

    Raises:
      ValueError: an empty document, an id beyond the vocabulary, or SAEs that do not fit the model.
    """
    for layer, sae in saes.items():
        check_sae(backbone.config, layer, sae.config)
    if empty := [i for i, ids in enumerate(documents) if not len(ids)]:
        raise ValueError(f"text {empty[0]} (from 0): no tokens are left of it")
    step = step or make_extract_step(backbone.config, tuple(saes))
    encoders = tuple(saes.values())
    segments = cut_documents(documents, buckets.max_length, long="window")
    check_tokens(segments.tokens, backbone.config)
    thresholds = measure_sinks(step, backbone.params, encoders, documents, buckets)
    parts: dict[int, list[Pooled]] = {layer: [] for layer in saes}
    norms: dict[int, list[np.ndarray]] = {layer: [] for layer in saes}
    sinks = dict.fromkeys(saes, 0)
    contexts = {layer: init_contexts(sae.config.d_sae, CONTEXTS) for layer, sae in saes.items()}
    starts = np.cumsum([0, *map(len, documents)])
    plan = plan_batches(segments.lengths, buckets)
    for batch, output in stream(step, backbone.params, encoders, feed_batches(plan, segments)):
        lengths = segments.lengths[batch.segments]
        real = ranges(batch.begin, batch.begin + lengths)
        document = np.repeat(segments.document[batch.segments], lengths)
        begin = segments.begin[batch.segments]
        place = ranges(begin, begin + lengths)
        where = Tokens(
            document, place - starts[document], segments.tokens, place, starts[document], starts[document + 1]
        )
        for i, layer in enumerate(saes):
            own = output.norms[i].reshape(-1)[real]
            keep = own <= thresholds[layer]
            values, indices = (array.reshape(-1, array.shape[-1])[real] for array in output.codes[i])
            add_contexts(contexts[layer], np.where(keep[:, None], values, 0), indices, where)
            parts[layer].append(pool_tokens(values[keep], indices[keep], document[keep], len(documents)))
            norms[layer].append(own[keep])
            sinks[layer] += int((~keep).sum())
        if progress is not None:
            progress(texts=int((begin == starts[segments.document[batch.segments]]).sum()), tokens=len(real))
    medians = {layer: float(np.median(np.concatenate(own))) for layer, own in norms.items()}
    return PooledTexts({n: join_pooled(own) for n, own in parts.items()}, medians, sinks, thresholds, contexts)


class _Judge(NamedTuple):
    """The half that judges."""

    pooled: Mapping[int, Pooled]
    groups: np.ndarray
    names: tuple[str, ...]


def _best(
    places: np.ndarray, layer: int, table: tuple[np.ndarray, Contrast, np.ndarray], judge: _Judge
) -> list[FoundFeature]:
    """Judges the features at some places of a layer's table."""
    features, chosen, q = table[0][places], table[1], table[2]
    pooled, positive = judge.pooled[layer], judge.groups == 0
    judged = contrast(pooled, judge.groups, features)
    by_max, by_mean = (document_auroc(pooled, positive, features, of=of) for of in ("max", "mean"))
    return [
        FoundFeature(
            layer=layer,
            feature=int(feature),
            score=float(chosen.score[place]),
            p=float(chosen.p[place]),
            q=float(q[place]),
            difference=float(judged.difference[i]),
            rate=float(judged.rate[i]),
            other_rate=float(judged.other_rate[i]),
            other=judge.names[int(judged.other[i])],
            auroc=float(by_max[i]),
            auroc_mean=float(by_mean[i]),
        )
        for i, (place, feature) in enumerate(zip(places, features, strict=True))
    ]


def _share(sae: Sae, features: np.ndarray, median_norm: float) -> np.ndarray:
    """What an activation of 1 adds to the residual stream, in median norms of the layer."""
    rows = np.asarray(sae.params.w_dec[features], np.float32)
    return np.linalg.norm(rows, axis=-1) / median_norm
