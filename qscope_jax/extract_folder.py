"""Parts of a corpus become files: the loop of `qscope extract`, and what makes it resumable.

Batches are dispatched ahead, results absorbed in order, finished parts written by a thread. When asked to stop, the
batches under way are still fetched and put aside; a later run takes them up and ends with the same bytes.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa

from qscope_jax.backbone.forward import Params
from qscope_jax.data import store_files as files
from qscope_jax.data.assemble import Assembly, Selection
from qscope_jax.data.batches import Buckets, Filled, cut_documents, fill_batch, plan_batches
from qscope_jax.data.documents import Part, Parts, read_ahead
from qscope_jax.extract import ExtractStep, stream
from qscope_jax.sae.model import Sae


class Loaded(NamedTuple):
    """What computes."""

    params: Params
    saes: tuple[Sae, ...]
    step: ExtractStep


class Target(NamedTuple):
    """Where results go and what they are: `info` is the content of `store.json`."""

    out: Path
    info: dict[str, Any]
    schema: pa.Schema

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.info["layers"])

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(d_sae, k) of every layer."""
        return [(shape["d_sae"], shape["k"]) for shape in (self.info["shapes"][str(n)] for n in self.layers)]

    @property
    def fingerprint(self) -> str:
        return files.fingerprint(self.info)

    @property
    def buckets(self) -> Buckets:
        return buckets_of(self.info)

    def selection(self) -> Selection:
        """What is kept of every code."""
        info, allowed = self.info, None
        if info["features"] is not None:
            named = [info["features"][str(layer)] for layer in self.layers]
            allowed = tuple(
                np.isin(np.arange(d_sae), chosen) for (d_sae, _), chosen in zip(self.shapes, named, strict=True)
            )
        pool = info["pool"] or "max"
        return Selection(info["per"], pool, info["top"], info["min_value"], allowed, info["values"])


def buckets_of(info: Mapping[str, Any]) -> Buckets:
    """The shapes of batches by what `store.json` says; on a mesh, "data" divides the rows."""
    multiple = info["mesh"]["data"] if "mesh" in info else 1
    return Buckets(info["batch_tokens"], info["max_length"], info["per_octave"], multiple)


class Work(NamedTuple):
    """A part under way; `first` [segments] is True at the first segment of each document."""

    part: Part
    assembly: Assembly
    first: np.ndarray

    def documents(self, places: list[int]) -> int:
        """How many documents begin in these batches, for the progress display."""
        return sum(int(self.first[self.assembly.plan[place].segments].sum()) for place in places)


class Progress(Protocol):
    """Told of documents and tokens done; `already` are documents that an earlier run did."""

    def __call__(self, *, rows: int, tokens: int, already: int = 0) -> None: ...


def make_parts(
    target: Target, parts: Parts, loaded: Loaded, *, progress: Progress, stopping: Callable[[], bool]
) -> None:
    """Makes the files of every part in `parts`, or as many as it can before `stopping()` says True.

    Raises:
      ValueError: a bad row under "fail", an id outside the vocabulary, or a damaged file of finished batches.
      FloatingPointError: the model overflows.
    """
    selection, layers = target.selection(), map(str, target.layers)
    limits = np.array([target.info.get("measured_sinks", {}).get(n, np.inf) for n in layers])[:, None, None]
    unfinished: dict[int, Work] = {}
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1) as writer:

        def finish(work: Work) -> None:
            del unfinished[work.part.number]
            while len(writes) > 1:  # bounds how many finished parts wait in memory
                writes.popleft().result()
            writes.append(writer.submit(_write_part, target, work))
            progress(rows=len(work.part.bad), tokens=0)

        def feed() -> Iterator[tuple[tuple[Work, int], Filled]]:
            for part in read_ahead(parts):
                if stopping():
                    return
                work = unfinished[part.number] = _start(target, part, selection)
                missing = work.assembly.missing
                progress(rows=0, tokens=0, already=work.documents(work.assembly.done))
                if not missing:
                    finish(work)
                for place in missing:
                    if stopping():
                        return
                    yield (work, place), fill_batch(work.assembly.plan[place], work.assembly.segments)

        for (work, place), output in stream(loaded.step, loaded.params, loaded.saes, feed()):
            work.assembly.absorb(place, output.codes, output.norms <= limits)
            lengths = work.assembly.segments.lengths[work.assembly.plan[place].segments]
            progress(rows=work.documents([place]), tokens=int(lengths.sum()))
            if not work.assembly.missing:
                finish(work)
        for work in unfinished.values():
            if work.assembly.done:
                work.assembly.save(files.partial_path(target.out, work.part.number), target.fingerprint)
        for write in writes:
            write.result()


def finished_parts(out: Path, info: Mapping[str, Any], chosen: Iterable[int]) -> dict[int, dict[str, Any]]:
    """The parts among `chosen` whose files are there, with the facts in them.

    Raises:
      ValueError: a file is damaged, or belongs to another run.
    """
    expected = files.fingerprint(info)
    paths = {part: files.documents_path(out, part) for part in chosen}
    return {part: files.read_facts(path, expected) for part, path in paths.items() if path.exists()}


def count_parts(info: Mapping[str, Any], facts: Collection[Mapping[str, Any]]) -> dict[str, Any]:
    """What finished parts add up to, for the manifest."""
    names = ("documents", "bad", "tokens", "truncated", "positions", "sharing")
    totals = {name: sum(f[name] for f in facts) for name in names}
    tokens, positions = totals["tokens"], totals["positions"]
    masked = np.sum([np.zeros(len(info["layers"])), *(f["masked"] for f in facts)], 0) / max(tokens, 1)
    return {
        **totals,
        "wasted_positions": 1 - tokens / positions if positions else 0.0,
        "masked_share": dict(zip(info["layers"], masked.tolist(), strict=True)),
        "parts": f"{len(facts)} of {info['parts']}",
    }


def _start(target: Target, part: Part, selection: Selection) -> Work:
    """Cuts and plans a part, and takes up the batches an earlier run put aside."""
    info = target.info
    segments = cut_documents(part.tokens, info["max_length"], long=info["long"], overlap=info["overlap"])
    plan = plan_batches(segments.lengths, target.buckets)
    assembly = Assembly(segments, plan, len(part.documents), target.shapes, selection)
    files.clear_leftovers(target.out, part.number)
    aside = files.partial_path(target.out, part.number)
    if aside.exists():
        assembly.restore(aside, target.fingerprint)
    return Work(part, assembly, np.diff(segments.document, prepend=-1) > 0)


def _write_part(target: Target, work: Work) -> None:
    """Writes a part's files; the table comes last and says that the part is done."""
    part, assembly, info = work.part, work.assembly, target.info
    lengths = np.array([len(tokens) for tokens in part.tokens], np.int64)
    used = np.minimum(lengths, info["max_length"]) if info["long"] == "truncate" else lengths
    facts: dict[str, Any] = {
        "fingerprint": target.fingerprint,
        "part": part.number,
        "rows": [part.start, part.stop],
        "documents": len(part.documents),
        "bad": len(part.bad),
        "tokens": int(used.sum()),
        "truncated": int((used < lengths).sum()),
        "positions": assembly.positions,
        "sharing": sum(batch.sharing for batch in assembly.plan),
        "masked": assembly.masked(),
    }
    pooled = {}
    if info["per"] == "token":
        tokens = np.concatenate([np.zeros(0, np.uint32), *(t[:n] for t, n in zip(part.tokens, used, strict=True))])
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(used)])
        codes = {layer: assembly.tokens(i) for i, layer in enumerate(target.layers)}
        path = files.tokens_path(target.out, part.number)
        facts["acts_sha256"] = files.write_tokens(path, tokens, offsets, codes, target.fingerprint)
    else:
        pooled = {layer: assembly.pooled(i) for i, layer in enumerate(target.layers)}
    kept = {name: [d.kept[i] for d in part.documents] for i, name in enumerate(target.schema.names)}
    numbers = {"n_tokens": used.astype(np.int32), "truncated": used < lengths}
    table = files.document_table([d.id for d in part.documents], kept, target.schema, numbers, pooled)
    files.write_errors(files.errors_path(target.out, part.number), part.bad)
    files.write_documents(files.documents_path(target.out, part.number), table, facts)
    files.partial_path(target.out, part.number).unlink(missing_ok=True)
