"""`qscope features find`: the features that tell one set of texts from others, over all layers in one pass.

Half of the documents of every set choose the features (by difference of mean activation; p by exchanging documents, q
over all features of all layers), the other half judges them. features.json has the best ones and the profile of the
layers, features.parquet all of them, profile.png shows the layers.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from qscope_jax.analysis.contexts import BEFORE
from qscope_jax.analysis.contrast import By
from qscope_jax.data.inputs import Format
from qscope_jax.data.text import Fields, open_corpus
from qscope_jax.data.tokenizer import make_encoder
from qscope_jax.explorer.figures import draw_profile
from qscope_jax.explorer.tokens import token_labels
from qscope_jax.features.concepts import LANGUAGES, TextSets, canonical_name, concept_names, concept_texts, text_sets
from qscope_jax.features.discovery import ALPHA, Discovery, FoundFeature, discover, distinct_texts
from qscope_jax.files.atomic import atomic_path, write_json
from qscope_jax.jobs.opened import Precision, Sources, batch_positions, load, open_sources
from qscope_jax.jobs.places import parse_mesh
from qscope_jax.jobs.run import Run, devices, plain, say


@dataclasses.dataclass(frozen=True)
class Config:
    """Find the features of a concept."""

    concept: tyro.conf.Positional[str | None] = None
    """A set of texts that ships along: a language (english, chinese, russian, korean, japanese, german, french,
    spanish) or a register (manual, story, everyday), against the others of its kind; chinese if nothing is named."""
    positive: tuple[str, ...] = ()
    """Texts that show the concept instead: files, folders or globs as everywhere, or names of shipped sets."""
    negative: tuple[str, ...] = ()
    """Texts that do not, likewise; each name is a group of its own, and all groups weigh the same."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs, likewise. Only encoders stay in memory: of Qwen3-8B with 65,536 features 0.5 GiB a layer in bfloat16, 1 GiB
    in float32."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all that the SAE source holds by default."""
    out: Path = Path("qscope-out/features-find")
    """Folder of features.json, features.parquet, profile.png and manifest.json."""

    by: By = "difference"
    """What scores: the difference of mean activation as a share of the residual stream, of the firing rate, or the
    AUROC of documents' maxima."""
    top: int = 10
    """Features to show."""
    permutations: int = 1000
    """Relabellings of the documents behind each p, which is no smaller than 1 / (permutations + 1)."""
    seed: int = 0
    """Of the relabellings."""
    documents: int = 200
    """Take at most so many documents of a set, evenly spread over it; per layer they take 24 bytes of memory for every
    document and feature that fires in it."""

    text_field: str = "text"
    """Column of the text."""
    format: Format | None = None
    """What the files are, where their endings do not say it."""
    document: Literal["line", "file"] = "line"
    """Whether each line or each file of plain text is a document."""
    max_length: int | None = None
    """Longest row in tokens; longer documents are cut into windows. By default the model's context, at most 4096."""
    batch_tokens: int | None = None
    """Positions per batch; by default 4,096 on a CPU and 16,384 elsewhere, times DATA of the mesh."""
    precision: Precision = "fast"
    """bfloat16, or the float32 arithmetic of the release's demo."""
    mesh: str = "1x1"
    """DATAxMODEL: split rows over DATA and weights over MODEL of this process's devices."""


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named.
      FloatingPointError: the model overflows.
      Interrupted: SIGTERM or SIGINT came; nothing is kept, the same command begins anew.
    """
    for name, least in (("k", 1), ("top", 1), ("documents", 2), ("permutations", 0), ("max_length", 1)):
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least {least}")
    with Run("features find", config, config.out) as job:
        sets, files = _sets(config)
        kept = distinct_texts(("positive", *sets.negative), (sets.positive, *sets.negative.values()))
        sources = open_sources(config)
        backbone, encoders, step = load(sources, config.precision)
        job.total = sum(map(len, kept))
        job.progress(texts=0, tokens=0)

        def progress(**amounts: int) -> None:
            job.progress(**amounts)
            if job.stopping:
                raise job.interrupted("nothing is kept of a search", resumes=False)

        found = discover(
            backbone, encoders.saes, make_encoder(sources.tokenizer), sets.positive, sets.negative, top=config.top,
            by=config.by, permutations=config.permutations, seed=config.seed, max_length=config.max_length, step=step,
            row_norms=encoders.row_norms, progress=progress,
            batch_tokens=batch_positions(config.batch_tokens, parse_mesh(config.mesh)[0]),
        )  # fmt: skip
        _write(config, job, sets, found, sources)
        counts = {name: getattr(found, name) for name in ("documents", "duplicates", "tokens", "sinks")}
        job.record(
            counts=counts,
            hashes=sources.hashes() | {"data": files},
            sink_thresholds=found.sink_thresholds,
            device=devices(),
        )
    _print(sets, found, sources.tokenizer)
    print(f"\n{job.address}: features.json, features.parquet (every feature), profile.png")


def _sets(config: Config) -> tuple[TextSets, dict[str, Any]]:
    """The texts, and name and hash of every file that they come from."""
    files: dict[str, Any] = {}

    def texts(names: Sequence[str]) -> list[str]:
        found = []
        for name in names:
            if name.lower() in (*concept_names(), *LANGUAGES.values()):
                found += concept_texts(name)
                files[name] = "shipped"
                continue
            options = {"format": config.format, "document": config.document, "say": say}
            corpus = open_corpus([name], Fields(config.text_field), **options)
            files[name] = corpus.fingerprint()
            chosen = np.unique(np.linspace(0, len(corpus) - 1, min(config.documents, len(corpus))).astype(int))
            good, bad = 0, 0
            for number in chosen.tolist():
                documents, wrong = corpus.read(number, number + 1)
                found += [document.text for document in documents]
                good, bad = good + len(documents), bad + len(wrong)
            say(f"{name}: {good} of {len(corpus)} documents" + (f"; {bad} rows cannot be used" if bad else ""))
        return found

    if config.positive and not config.negative:
        raise ValueError("--positive without --negative: name texts that do not show the concept, or a shipped set")
    concept = config.concept if config.concept or config.positive else "chinese"
    if concept is not None and not config.positive:
        concept = canonical_name(concept)
    positive = texts(config.positive) if config.positive else None
    negative = {name: texts([name]) for name in config.negative} or None
    return text_sets(concept, positive=positive, negative=negative), files


def _write(config: Config, job: Run, sets: TextSets, found: Discovery, sources: Sources) -> None:
    content = {
        "concept": sets.name,
        "negative": list(sets.negative),
        "by": config.by,
        "halves": "score, p and q: the documents that chose (every other one of each set); all else: the others",
        "reach": found.reach._asdict(),
        "features": [
            {**dataclasses.asdict(f), "contexts": _contexts(f, sets, found, sources.tokenizer)} for f in found.features
        ],
        "profile": [dataclasses.asdict(row) for row in found.profile],
    }
    write_json(job.out / "features.json", plain(content))
    columns: dict[str, list[np.ndarray]] = {}
    for layer, (features, chosen, q) in found.table.items():
        own = {"layer": np.full(len(features), layer, np.int32), "feature": features.astype(np.int32), "q": q}
        own |= {name: np.asarray(array, np.float64) for name, array in chosen._asdict().items() if name != "other"}
        own["other"] = np.array(["positive", *sets.negative])[chosen.other.astype(int)]
        for name, array in own.items():
            columns.setdefault(name, []).append(array)
    table = pa.table({name: np.concatenate(arrays) for name, arrays in columns.items()})
    with atomic_path(job.out / "features.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")
    rows, total = found.profile, sum(found.documents.values())
    judge = sum(number // 2 for number in found.documents.values())
    note = f"against {', '.join(sets.negative)}  ·  {total} documents: {total - judge} choose, {judge} judge"
    draw_profile(
        job.out / "profile.png", [r.layer for r in rows], [r.best.score for r in rows], [r.best.auroc for r in rows],
        [r.found for r in rows], title=f"{sets.name}: {sources.sae.name}",
        note=note,
    )  # fmt: skip


def _contexts(feature: FoundFeature, sets: TextSets, found: Discovery, tokenizer: Any) -> list[dict[str, Any]]:
    """The places where a feature is strongest, of all texts: which set it is, the tokens, and which is the one."""
    value, document, _, window = (array[feature.feature] for array in found.contexts[feature.layer])
    names = np.repeat([sets.name, *sets.negative], list(found.documents.values()))
    rows = []
    for i in np.flatnonzero(value):
        inside = window[i] >= 0
        labels = token_labels(tokenizer, window[i][inside].tolist())
        rows.append({"set": str(names[document[i]]), "value": float(value[i]), "tokens": labels,
                     "at": int(inside[:BEFORE].sum())})  # fmt: skip
    return rows


def _print(sets: TextSets, found: Discovery, tokenizer: Any) -> None:
    """The tables for a person, on stdout."""
    print(f"{sets.name} against {', '.join(sets.negative)}; half of the documents choose, the other half judges\n")
    print("               chosen by                  judged by the other half")
    print("layer feature   score      p      q       AUROC  (mean)  fires  elsewhere at most")
    for f in found.features:
        print(
            f"{f.layer:>5} {f.feature:>7} {f.score:>7.3g} {f.p:>6.2g} {f.q:>6.2g}{'*' if f.q < ALPHA else ' '}"
            f"     {f.auroc:>6.3f} {f.auroc_mean:>7.3f} {f.rate:>6.1%}  {f.other_rate:>6.1%} {f.other}"
        )
    print("\nwhere they are strongest")
    for f in found.features:
        for context in _contexts(f, sets, found, tokenizer)[:1]:
            labels, at = context["tokens"], context["at"]
            text = "".join(f"[{label}]" if i == at else label for i, label in enumerate(labels))
            print(f"{f.layer:>5} {f.feature:>7} {context['value']:>7.3g}  {context['set']}: {text}")
    if not any(row.found for row in found.profile):
        print(f"\n{_why_none(found)}")
    if repeated := {name: number for name, number in found.duplicates.items() if number}:
        names = ", ".join(f"{number} in {name}" for name, number in repeated.items())
        print(f"\nTexts that were there before count once; left out: {names}.")
    print(f"\n* q < {ALPHA}. The layers:\n\nlayer   best   score   AUROC   features with q < {ALPHA}")
    for row in found.profile:
        best = row.best
        print(f"{row.layer:>5} {best.feature:>6} {best.score:>7.3g} {best.auroc:>7.3f}   {row.found} of {row.active}")


def _why_none(found: Discovery) -> str:
    """What q could have been, where none is below 0.05."""
    reach, least = found.reach, min((float(q.min()) for *_, q in found.table.values() if len(q)), default=1.0)
    lines = [
        f"No feature has q < {ALPHA}; the smallest is {least:.3g}. No p is below {reach.smallest_p:.3g} with these "
        f"relabellings, with which one of {reach.features} features alone has q = {reach.smallest_q:.3g}; "
        f"{reach.at_smallest} have this p."
    ]
    if reach.smallest_q >= ALPHA:
        lines.append(f"q < {ALPHA} for one alone takes --permutations {reach.permutations}.")
        if reach.labellings <= reach.permutations:
            lines.append(f"These documents have {reach.labellings} labellings that differ: more documents are needed.")
    return "\n".join(lines)
