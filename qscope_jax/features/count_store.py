"""Counting what features do in a folder that `qscope extract --per token` wrote, as `statistics` does in a text."""

from collections.abc import Callable

import jax
import numpy as np

from qscope_jax.analysis.contexts import Tokens, TopContexts, add_contexts
from qscope_jax.analysis.statistics import Tally, update_tally
from qscope_jax.data.assemble import TokenCodes
from qscope_jax.data.store import FeatureStore
from qscope_jax.data.store_files import fingerprint, read_facts
from qscope_jax.features.count import Counted, Watch, finish_part

_CHUNK = 16_384  # stored tokens per call


def count_store(state: Counted, store: FeatureStore, *, watch: Watch) -> tuple[Counted, bool]:
    """Counts the rest of the codes of a store; True if it came to the end. Documents are numbered as in the store.

    Tokens that the extraction masked as sinks hold no code; they are counted as sinks here.

    Raises:
      ValueError: the store holds pooled or selected features or no sinks were masked, or it is damaged.
    """
    check_store(store)
    fold = jax.jit(update_tally, donate_argnums=0)
    for columns in zip(*(store.token_codes(layer) for layer in store.layers), strict=True):
        part, offsets, tokens, _ = columns[0]
        if part.number < state.part:
            watch.progress(rows=0, tokens=0, already=part.documents)
            continue
        if watch.stopping():
            return state, False
        lengths = np.diff(offsets)
        local = np.repeat(np.arange(part.documents), lengths)
        begin, end, place = offsets[:-1][local], offsets[1:][local], np.arange(len(tokens))
        where = Tokens(local + part.first, place - begin, tokens, place, begin, end)
        tallies = []
        for i, (_, _, _, code) in enumerate(columns):
            if (largest := int(code.idx[code.val > 0].max(initial=0))) >= store.d_sae(store.layers[i]):
                raise ValueError(f"{part.acts}: feature {largest} of layer {store.layers[i]}: the file is damaged")
            tallies.append(_count_codes(state.tallies[i], state.contexts[i], code, where, fold))
        masked = read_facts(part.path, fingerprint(store.info))["masked"]
        tallies = [t._replace(tokens=t.tokens - m, sinks=t.sinks + m) for t, m in zip(tallies, masked, strict=True)]
        state = finish_part(state._replace(tallies=tuple(tallies)), part.documents, part.tokens, 0)
        watch.progress(rows=part.documents, tokens=part.tokens)
        watch.finished(None, state)
    return state, True


def _count_codes(
    tally: Tally, contexts: TopContexts, code: TokenCodes, where: Tokens, fold: Callable[..., Tally]
) -> Tally:
    """Codes of the tokens that stand at `where`, folded in chunks of one size, so that one program serves all."""
    for start in range(0, len(code.idx), _CHUNK):
        own = slice(start, start + _CHUNK)
        values, indices = code.val[own].astype(np.float32), code.idx[own].astype(np.int32)
        each = {name: getattr(where, name)[own] for name in Tokens._fields if name != "ids"}
        add_contexts(contexts, values, indices, Tokens(ids=where.ids, **each))
        spare = ((0, _CHUNK - len(values)), (0, 0))
        tally = fold(tally, np.pad(values, spare), np.pad(indices, spare), np.arange(_CHUNK) < len(values))
    return tally


def check_store(store: FeatureStore) -> None:
    """Refuses a store whose codes are not whole, or hold sinks.

    Raises:
      ValueError: what is missing, and the option of `qscope extract` that makes it.
    """
    info = store.info
    if store.per != "token":
        raise ValueError(f"{store.folder} holds pooled features: statistics need codes (extract --per token)")
    narrowed = [name for name in ("top", "features") if info[name] is not None]
    narrowed += ["min_value"] if info["min_value"] > 0 else []
    if narrowed:
        raise ValueError(f"{store.folder} was made with {', '.join(narrowed)}, so it does not hold whole codes")
    if not info["mask_sinks"]:
        raise ValueError(f"{store.folder} holds sinks, and statistics are without them: extract with --mask-sinks")
