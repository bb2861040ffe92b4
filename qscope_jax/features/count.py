"""One pass over a text that counts what every feature of every layer does.

Tallies lie on the device and are folded there, batch by batch; the best places of every feature are kept on the host.
At the end of a part of the text the tallies move to the host. What is counted depends on the text and the settings
alone, so that a run can be put aside after any batch and end with the same bits.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import jax
import numpy as np

from qscope_jax.analysis.contexts import Tokens, TopContexts, add_contexts, init_contexts
from qscope_jax.analysis.statistics import HostTally, Tally, host_tally, init_tally, merge_tallies, update_tally
from qscope_jax.backbone.forward import Params
from qscope_jax.data.batches import Batch, Buckets, Filled, Segments, cut_documents, fill_batch, plan_batches, ranges
from qscope_jax.data.documents import Part, Parts, read_ahead
from qscope_jax.evaluate import replicate
from qscope_jax.extract import ExtractStep, HostOutput, StepOutput, stream
from qscope_jax.sae.model import Sae


class Counted(NamedTuple):
    """What was counted so far.

    `part` and `batches` say where: all parts before `part`, and so many batches of it. Of these parts `documents`,
    `tokens` (a token counts once, sinks too) and `bad` rows. `totals` are the tallies of finished parts, `tallies`
    those of the part under way, on the device; both and `contexts` are in the order of the layers.
    """

    part: int
    batches: int
    documents: int
    tokens: int
    bad: int
    totals: tuple[HostTally, ...]
    tallies: tuple[Tally, ...]
    contexts: tuple[TopContexts, ...]


class Progress(Protocol):
    """Told of rows and tokens done; `already` are rows that an earlier run did."""

    def __call__(self, *, rows: int, tokens: int, already: int = 0) -> None: ...


class Watch(NamedTuple):
    """How the loop speaks with its caller: progress, whether to stop, and a call after every finished part."""

    progress: Progress
    stopping: Callable[[], bool]
    finished: Callable[[Part | None, Counted], None]


def init_counted(d_saes: Sequence[int], *, contexts: int) -> Counted:
    """Nothing counted yet, for dictionaries of these widths and so many best documents per feature."""
    tallies = tuple(map(init_tally, d_saes))
    totals, places = map(host_tally, tallies), (init_contexts(d_sae, contexts) for d_sae in d_saes)
    return Counted(0, 0, 0, 0, 0, tuple(totals), tallies, tuple(places))


class FoldStep:
    """The jitted update of all layers' tallies, which are donated: (tallies, output, mask, thresholds) -> tallies."""

    def __init__(self):
        self.shapes = list[tuple[int, ...]]()

        def fold(tallies, codes, norms, mask, thresholds):
            self.shapes.append(mask.shape)  # Python runs only while jit traces: once per compilation
            return tuple(
                update_tally(tally, code.values, code.indices, mask, norms[i], sink_threshold=thresholds[i])
                for i, (tally, code) in enumerate(zip(tallies, codes, strict=True))
            )

        self._jitted = jax.jit(fold, donate_argnums=0)

    @property
    def compilations(self) -> int:
        """How often it was compiled; equals the number of distinct batch shapes it saw."""
        return len(self.shapes)

    def __call__(
        self, tallies: tuple[Tally, ...], output: StepOutput, mask: np.ndarray, thresholds: np.ndarray
    ) -> tuple[Tally, ...]:
        return self._jitted(tallies, output.codes, output.norms, mask, thresholds)


def make_fold_step() -> FoldStep:
    """The update of tallies by what an `ExtractStep` gives; one may serve any layers."""
    return FoldStep()


def count_text(
    state: Counted,
    parts: Parts,
    buckets: Buckets,
    step: ExtractStep,
    params: Params,
    saes: Sequence[Sae],
    sink_thresholds: Sequence[float],
    *,
    watch: Watch,
    tokens: int | None = None,
    fold: FoldStep | None = None,
) -> tuple[Counted, bool]:
    """Counts the rest of a text, after what `state` says; True if it came to the end.

    Args:
      state: from `init_counted` or an earlier call; its tallies are used up.
      parts: from part number `state.part` on.
      buckets: shapes of batches; documents longer than the longest row are cut into windows.
      step: the model and its SAEs' layers.
      params: the model's.
      saes: one per layer of the step.
      sink_thresholds: one per layer; tokens of a larger norm are left out and counted as sinks.
      watch: progress, stop, and what to do after every part.
      tokens: count whole documents from the start until they have so many tokens, instead of all.
      fold: an update to use again.

    Raises:
      ValueError: an id outside the vocabulary.
      FloatingPointError: the residual stream is not finite.
    """
    fold, thresholds = fold or make_fold_step(), np.asarray(sink_thresholds, np.float32)
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        work = _Work(step, params, saes, thresholds, fold, threads)
        return _count_parts(state, parts, buckets, work, watch, tokens)


def _count_parts(
    state: Counted, parts: Parts, buckets: Buckets, work: "_Work", watch: Watch, tokens: int | None
) -> tuple[Counted, bool]:
    for part in read_ahead(parts):
        if watch.stopping():
            return state, False
        layout = _lay_out(part, buckets, None if tokens is None else tokens - state.tokens)
        rows = [int(layout.opens[batch.segments].sum()) for batch in layout.plan]
        watch.progress(rows=0, tokens=0, already=sum(rows[: state.batches]))
        state = _count_part(state, layout, work, watch)
        if state.batches < len(layout.plan):
            return state, False
        state = finish_part(state, sum(rows), int(layout.segments.lengths.sum()), len(part.bad))
        watch.progress(rows=len(part.bad), tokens=0)
        watch.finished(part, state)
        if tokens is not None and state.tokens >= tokens:
            break
    return state, True


class _Work(NamedTuple):
    """What computes."""

    step: ExtractStep
    params: Params
    saes: Sequence[Sae]
    thresholds: np.ndarray
    fold: FoldStep
    threads: ThreadPoolExecutor


def _count_part(state: Counted, layout: "_Layout", work: _Work, watch: Watch) -> Counted:
    """Counts the batches that are left of a part, or as many as it can before it is asked to stop."""
    tallies, done = replicate(state.tallies, work.params), state.batches
    begin = done

    def feed() -> Iterator[tuple[int, Filled]]:
        for place in range(begin, len(layout.plan)):
            if watch.stopping():
                return
            yield place, fill_batch(layout.plan[place], layout.segments)

    def folded(content: Filled, output: StepOutput) -> None:
        nonlocal tallies
        tallies = work.fold(tallies, output, content.mask, work.thresholds)

    for place, output in stream(work.step, work.params, work.saes, feed(), watch=folded):
        batch, done = layout.plan[place], place + 1
        _add_batch(state.contexts, layout, batch, output, work)
        tokens = int(layout.segments.lengths[batch.segments].sum())
        watch.progress(rows=int(layout.opens[batch.segments].sum()), tokens=tokens)
    return state._replace(tallies=tallies, batches=done)


class _Layout(NamedTuple):
    """A part cut and planned; of each segment the number, begin and end of its document, and whether it opens it."""

    segments: Segments
    plan: list[Batch]
    number: np.ndarray
    begin: np.ndarray
    end: np.ndarray
    opens: np.ndarray


def _lay_out(part: Part, buckets: Buckets, limit: int | None) -> _Layout:
    """Only as many of the part's documents as it takes to reach `limit` tokens."""
    lengths = np.array([len(ids) for ids in part.tokens], np.int64)
    ends = np.cumsum(lengths)
    chosen = len(lengths) if limit is None else int((ends - lengths < limit).sum())
    segments = cut_documents(part.tokens[:chosen], buckets.max_length, long="window")
    number = np.array([document.number for document in part.documents], np.int64)
    begin = (ends - lengths)[segments.document]
    plan = plan_batches(segments.lengths, buckets)
    opens = begin == segments.begin
    return _Layout(segments, plan, number[segments.document], begin, ends[segments.document], opens)


def _add_batch(
    contexts: tuple[TopContexts, ...], layout: _Layout, batch: Batch, output: HostOutput, work: _Work
) -> None:
    """Looks for better places in a batch; a thread for each layer."""
    begin, end = layout.segments.begin[batch.segments], layout.segments.end[batch.segments]
    real = ranges(batch.begin, batch.begin + end - begin)
    number, first, last = (
        np.repeat(array[batch.segments], end - begin) for array in (layout.number, layout.begin, layout.end)
    )
    place = ranges(begin, end)
    tokens = Tokens(number, place - first, layout.segments.tokens, place, first, last)

    def add(layer: int) -> None:
        values, indices = (array.reshape(-1, array.shape[-1])[real] for array in output.codes[layer])
        counted = output.norms[layer].reshape(-1)[real, None] <= work.thresholds[layer]
        add_contexts(contexts[layer], np.where(counted, values, 0), indices, tokens)

    for _ in work.threads.map(add, range(len(contexts))):  # raises what a thread raised
        pass


def finish_part(state: Counted, documents: int, tokens: int, bad: int) -> Counted:
    """A part is done: its tallies move to the host, and new ones begin."""
    totals = tuple(map(merge_tallies, state.totals, map(host_tally, state.tallies)))
    fresh = tuple(init_tally(len(total.max)) for total in totals)
    return state._replace(
        part=state.part + 1, batches=0, documents=state.documents + documents, tokens=state.tokens + tokens,
        bad=state.bad + bad, totals=totals, tallies=fresh,
    )  # fmt: skip
