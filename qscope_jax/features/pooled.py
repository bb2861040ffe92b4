"""Activations of some documents pooled per layer, document and feature: what contrasts and profiles are made of."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from qscope_jax.analysis.contexts import Tokens, TopContexts, add_contexts, init_contexts
from qscope_jax.analysis.contrast import Pooled, join_pooled, pool_tokens
from qscope_jax.backbone.forward import check_tokens
from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Buckets, cut_documents, plan_batches, ranges
from qscope_jax.extract import ExtractStep, check_sae, feed_batches, make_extract_step, measure_sinks, stream
from qscope_jax.sae.model import Sae

CONTEXTS = 3  # kept per feature


class PooledTexts(NamedTuple):
    """All layers' pooled activations of some documents, with median norm, sinks and best contexts of each layer."""

    pooled: dict[int, Pooled]
    median_norms: dict[int, float]
    sinks: dict[int, int]
    sink_thresholds: dict[int, float]
    contexts: dict[int, TopContexts]


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
