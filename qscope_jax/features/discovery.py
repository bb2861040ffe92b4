"""Which features of which layers stand for a concept: two sets of texts contrasted over all layers in one pass.

Half of the documents choose the features, the other half judges them: scores, p and q are the first half's, all other
figures the second's. Scores of layers are made comparable as shares of the residual stream:
    score = difference of mean activation x |decoder row| / median residual norm of the layer
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qscope_jax.analysis.contexts import TopContexts
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
    labellings,
)
from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Buckets
from qscope_jax.extract import ExtractStep
from qscope_jax.features.pooled import pool_texts
from qscope_jax.mesh import mesh_of
from qscope_jax.sae.model import Sae, row_norms_of

Encoder = Callable[[Sequence[str]], list[np.ndarray]]
ALPHA = 0.05  # below this q a feature counts as found


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


class Reach(NamedTuple):
    """How low p and q can come, whatever the texts say.

    No p is below `smallest_p`, which `at_smallest` of all `features` have. One feature alone with it has q =
    `smallest_q`; q < 0.05 takes `together` of them (more than `features`: it cannot be), or, for one alone,
    `permutations` relabellings, where the documents allow as many: there are `labellings` that differ.
    """

    features: int
    smallest_p: float
    at_smallest: int
    smallest_q: float
    together: int
    permutations: int
    labellings: int


class Discovery(NamedTuple):
    """What `discover` returns: features over all layers, best first; a profile per layer; and what it was made from.

    `table` has per layer the `Contrast` of all features that are active on the choosing half, with their numbers and q.
    `documents` that were used, `duplicates` that were not, and `tokens` are counted by group, the positive one first.
    Of the tokens, which are the same for all layers, each leaves out its own `sinks`.
    `contexts` are per layer the places where each feature is strongest, in any text: documents are numbered as the
    texts are given, the positive ones first, without duplicates.
    """

    features: tuple[FoundFeature, ...]
    profile: tuple[LayerProfile, ...]
    table: dict[int, tuple[np.ndarray, Contrast, np.ndarray]]
    documents: dict[str, int]
    duplicates: dict[str, int]
    tokens: dict[str, int]
    sinks: dict[int, int]
    sink_thresholds: dict[int, float]
    contexts: dict[int, TopContexts]
    reach: Reach


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
    row_norms: Mapping[int, np.ndarray] | None = None,
    progress: Callable[..., None] | None = None,
) -> Discovery:
    """Finds the features that fire on positive texts and not on the others.

    A text that is given several times in a group counts once.

    Args:
      backbone: the model.
      saes: per layer; with their decoders, unless `row_norms` are given.
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
      row_norms: per layer |decoder row| [f], for SAEs without decoders: only encoders are then held in memory.
      progress: told `texts` and `tokens` done.

    Raises:
      ValueError: a set of fewer than two different texts, a text of two sets, one without tokens, an id beyond the
        vocabulary, or SAEs that do not fit the model.
    """
    names, given = ("positive", *negative), [positive, *negative.values()]
    texts = distinct_texts(names, given)
    groups = np.repeat(np.arange(len(texts)), [len(own) for own in texts])
    documents = encoder([text for own in texts for text in own])
    longest = max_length or min(backbone.config.max_position_embeddings, 4096)
    mesh = mesh_of(backbone.params["embed"])
    buckets = Buckets(batch_tokens, longest, 2, multiple=1 if mesh is None else mesh.shape["data"])
    rows = {} if by != "difference" else row_norms or {n: row_norms_of(sae) for n, sae in saes.items()}
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
        chosen = {n: c._replace(score=c.score * rows[n][features[n]] / seen.median_norms[n])
                  for n, c in chosen.items()}  # fmt: skip
    q = dict(zip(chosen, false_discovery_rates([one.p for one in chosen.values()]), strict=True))
    judge = _Judge(judging, groups[half == 1], names)
    table = {n: (features[n], chosen[n], q[n]) for n in chosen}
    each = {n: _best(np.argsort(-chosen[n].score, kind="stable")[:top], n, table[n], judge) for n in chosen}
    best = sorted((one for own in each.values() for one in own), key=lambda f: (-f.score, f.layer, f.feature))
    profile = tuple(
        LayerProfile(n, own[0], int((q[n] < ALPHA).sum()), len(features[n])) for n, own in each.items() if own
    )
    lengths = np.array([len(ids) for ids in documents])
    return Discovery(
        tuple(best[:top]), profile, table,
        dict(zip(names, map(len, texts), strict=True)),
        {name: len(all_) - len(own) for name, all_, own in zip(names, given, texts, strict=True)},
        {name: int(lengths[groups == g].sum()) for g, name in enumerate(names)},
        seen.sinks, seen.sink_thresholds, seen.contexts,
        _reach(table, permutations, labellings(groups[half == 0], by)),
    )  # fmt: skip


def distinct_texts(names: Sequence[str], given: Sequence[Sequence[str]]) -> list[list[str]]:
    """Each set without its duplicates: neither may the half that judges know a text that chose, nor two sets share one.

    Raises:
      ValueError: a text of two sets, or fewer than two texts in one.
    """
    texts, owner = [list(dict.fromkeys(own)) for own in given], dict[str, str]()
    for name, own in zip(names, texts, strict=True):
        if (text := next((text for text in own if text in owner), None)) is not None:
            shown = text if len(text) <= 60 else f"{text[:59]}…"
            raise ValueError(f"a text stands in {owner[text]} and in {name}, take it out of one of them: {shown!r}")
        owner |= dict.fromkeys(own, name)
    if few := [name for name, own in zip(names, texts, strict=True) if len(own) < 2]:
        raise ValueError(
            f"{', '.join(few)}: fewer than two different texts; one half chooses the features, the other judges them"
        )
    return texts


def _reach(table: Mapping[int, tuple[np.ndarray, Contrast, np.ndarray]], permutations: int, differ: int) -> Reach:
    p = np.concatenate([np.zeros(0), *(chosen.p for _, chosen, _ in table.values())])
    least, number = 1 / (permutations + 1), len(p)
    return Reach(
        number, least, int((p <= least).sum()), min(1.0, number * least), math.floor(number * least / ALPHA) + 1,
        math.floor(number / ALPHA), differ,
    )  # fmt: skip


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
