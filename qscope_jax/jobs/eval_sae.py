"""`qscope eval-sae`: how much SAEs explain of a model on a text, and what the model predicts through them.

quality.json has every number per layer with its definition, quality.png shows them. A run that is stopped puts aside
what it has added up and the number of batches behind it; the same command reads the text again up to there and goes on.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tyro

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.batches import PLAN, Buckets, Filled, cut_documents, fill_batch, plan_batches
from qscope_jax.data.documents import Encoder, Parts, read_ahead
from qscope_jax.data.text import Corpus, Fields, open_corpus
from qscope_jax.data.tokenizer import make_encoder
from qscope_jax.evaluate import (
    DEFINITIONS,
    EvalStep,
    Evaluation,
    known_thresholds,
    make_eval_step,
    replicate,
    scored_tokens,
    summarize_evaluation,
)
from qscope_jax.explorer.figures import draw_quality
from qscope_jax.extract import make_extract_step, measure_sinks
from qscope_jax.files.atomic import write_json
from qscope_jax.files.source import Source
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.jobs.opened import ARITHMETIC, Sources, batch_positions, open_sources
from qscope_jax.jobs.places import model_name, parse_mesh
from qscope_jax.jobs.run import Run, devices, plain, say
from qscope_jax.mesh import to_host
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae, SaeConfig

_PART_ROWS, _PART_BYTES = 32_768, 4 << 20
_MAX_LENGTH = 4096


@dataclasses.dataclass(frozen=True)
class Config:
    """Evaluate SAEs on a model and a text."""

    data: tyro.conf.Positional[tuple[str, ...]] = ("demo",)
    """Files, folders or globs of JSONL, parquet or text, local or remote; "demo" ships along."""
    model: str = "demo"
    """Backbone: "demo", a folder, owner/name[@revision], or a remote folder; another than the SAEs' own is fine."""
    sae: str = "demo"
    """SAEs, likewise."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all that the SAE source holds by default."""
    out: Path = Path("qscope-out/eval-sae")
    """Folder of quality.json, quality.png and manifest.json."""

    tokens: int | None = None
    """Stop after the batch that reaches so many tokens; by default the whole text is used."""
    predict_tokens: int = 131_072
    """Measure cross-entropy and KL on so many tokens at least (0: not), which takes about a forward more per layer."""
    max_length: int | None = None
    """Longest row in tokens; longer documents are cut into windows. By default the model's context, at most 4096."""
    batch_tokens: int | None = None
    """Positions per batch; by default 4,096 on a CPU and 16,384 elsewhere, times DATA of the mesh."""
    precision: Literal["fast", "parity"] = "fast"
    """The model in bfloat16, or in float32. SAEs and statistics are float32 in both."""
    mesh: str = "1x1"
    """DATAxMODEL: split rows over DATA and weights over MODEL of this process's devices."""

    text_field: str = "text"
    """Column of the text."""
    format: Literal["jsonl", "parquet", "text"] | None = None
    """What the files are, where their endings do not say it."""
    document: Literal["line", "file"] = "line"
    """Whether each line or each file of plain text is a document."""


class Text(NamedTuple):
    """The text as batches, always the same ones in the same order."""

    corpus: Corpus
    parts: Parts
    buckets: Buckets

    def documents(self) -> Iterator[np.ndarray]:
        return (ids for part in read_ahead(self.parts) for ids in part.tokens)

    def batches(self) -> Iterator[tuple[int, Filled]]:
        """Each with the number of rows of the corpus that it or bad rows before it end."""
        for part in read_ahead(self.parts):
            segments = cut_documents(part.tokens, self.buckets.max_length, long="window")
            begins, bad = np.diff(segments.document, prepend=-1) > 0, len(part.bad)
            for batch in plan_batches(segments.lengths, self.buckets):
                yield bad + int(begins[batch.segments].sum()), fill_batch(batch, segments)
                bad = 0


class Opened(NamedTuple):
    """What a run reads, opened but not loaded; `facts` go into quality.json and decide every number in it."""

    sources: Sources
    text: Text
    step: EvalStep
    facts: dict[str, Any]


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named.
      FloatingPointError: the model overflows.
      Interrupted: SIGTERM or SIGINT came; what was added up is put aside.
    """
    _check_numbers(config)
    with Run("eval-sae", config, config.out, resumes=True) as job:
        opened = _open(config)
        say(opened.facts["note"])
        sources = opened.sources
        backbone = load_backbone(sources.model, dtype=ARITHMETIC[config.precision][0], mesh=sources.mesh)
        saes = load_saes(sources.sae, sources.saes, k=config.k, mesh=sources.mesh)
        thresholds = known_thresholds(saes)
        measured = [layer for layer in saes if layer not in thresholds]
        if measured:
            look = make_extract_step(backbone.config, measured)
            few = tuple(saes[layer] for layer in measured)
            thresholds |= measure_sinks(look, backbone.params, few, opened.text.documents(), opened.text.buckets)
        state = _fold(config, job, opened, backbone, saes, thresholds)
        metrics = summarize_evaluation(state, saes, thresholds)
        _write(job.out, {**opened.facts, "sink_thresholds_measured_here": measured}, metrics)
        job.record(
            counts={
                "layers": len(saes),
                "rows": len(opened.text.corpus),
                "tokens": metrics[next(iter(saes))]["tokens"],
            },
            hashes={name: opened.facts[name]["files"] for name in ("model", "sae")},
            device=devices(),
            compilations=opened.step.compilations,
        )
    print_table(metrics)
    print(f"\n{job.address}/quality.json has every number, quality.png beside it shows them.")


def _check_numbers(config: Config) -> None:
    for name in ("k", "tokens", "max_length", "batch_tokens"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if config.predict_tokens < 0:
        raise ValueError(f"--predict-tokens {config.predict_tokens}: expected at least 0")


def _open(config: Config) -> Opened:
    """Opens everything and refuses what does not fit, before any weights are read."""
    sources = open_sources(config)
    step = make_eval_step(sources.constants, sources.saes)
    text, files = _open_text(config, make_encoder(sources.tokenizer), sources.constants), sources.hashes()
    facts: dict[str, Any] = {
        "model": {"name": sources.model.name, "files": files["model"]},
        "sae": {"name": sources.sae.name, "files": files["sae"]},
        "data": text.corpus.fingerprint(),
        "tokenizer": files["tokenizer"],
        "settings": {
            "k": {layer: one.k for layer, one in sources.saes.items()},
            "precision": config.precision,
            "tokens": config.tokens,
            "predict_tokens": config.predict_tokens,
            "max_length": text.buckets.max_length,
            "batch_tokens": text.buckets.batch_tokens,
            "mesh": config.mesh,
            "text_field": config.text_field,
            "document": config.document,
            "plan": PLAN,
        },
        **_whose(sources.model, sources.saes),
    }
    return Opened(sources, text, step, plain(facts))


def _open_text(config: Config, encoder: Encoder, constants: ModelConfig) -> Text:
    longest = config.max_length or min(constants.max_position_embeddings, _MAX_LENGTH)
    if longest > constants.max_position_embeddings:
        raise ValueError(f"--max-length {longest}: the model's context is {constants.max_position_embeddings} tokens")
    options = {"format": config.format, "document": config.document, "say": say}
    corpus = open_corpus(config.data, Fields(config.text_field), **options)
    if not len(corpus):
        raise ValueError(f"{', '.join(config.data)}: no rows; every file is empty")
    data, _ = parse_mesh(config.mesh)
    positions = batch_positions(config.batch_tokens, data)
    ranges = corpus.parts(rows=_PART_ROWS, size=_PART_BYTES)
    buckets = Buckets(positions, longest, per_octave=1, multiple=data)  # each shape is compiled three times
    return Text(corpus, Parts(corpus, ranges, encoder, constants.vocab_size), buckets)


def _whose(model: Source, saes: Mapping[int, SaeConfig]) -> dict[str, Any]:
    """Whether the SAEs were made for this model, by the last part of both names; None where theirs is not known."""
    name, short = model_name(model), lambda full: full.rsplit("/", 1)[-1]
    made_for = sorted({sae.backbone for sae in saes.values() if sae.backbone is not None})
    if not made_for:
        note = f"which model the SAEs were made for is not known; evaluated on {name}"
        return {"made_for": None, "model_differs": None, "note": note}
    differs = set(map(short, made_for)) != {short(name)}
    note = f"the SAEs were made for this model, {name}"
    if differs:
        others = ", ".join(made_for)
        note = f"model differs from the one the SAE was made for: made for {others}, evaluated on {name}"
    return {"made_for": made_for, "model_differs": differs, "note": note}


def _fold(
    config: Config, job: Run, opened: Opened, backbone: Backbone, saes: dict[int, Sae], thresholds: dict[int, float]
) -> Evaluation:
    """Adds up all batches, after those that an earlier run put aside."""
    text, step, aside = opened.text, opened.step, job.out / "partial.safetensors"
    job.total = len(text.corpus)
    job.progress(rows=0, tokens=0)
    state, behind, seen = None, 0, 0
    for number, (rows, batch) in enumerate(text.batches()):
        if state is None:
            state = step.start(backbone.params, saes, thresholds, batch)
            if aside.exists():
                state, behind = _take_up(aside, state, opened.facts)
                state = replicate(state, backbone.params)
        if number < behind:
            job.progress(rows=0, tokens=0, already=rows)
        else:
            if job.stopping:
                _put_aside(aside, state, number, opened.facts)
                raise job.interrupted(f"{number} batches of {seen:,} tokens are added up and put aside")
            predict = scored_tokens(state) < config.predict_tokens
            state = step(backbone.params, saes, thresholds, state, batch, predict=predict)
            job.progress(rows=rows, tokens=int(batch.mask.sum()))
        seen += int(batch.mask.sum())
        if config.tokens is not None and seen >= config.tokens:
            break
    if state is None:
        raise ValueError(f"{', '.join(config.data)}: there is no text to evaluate on; no row could be used")
    aside.unlink(missing_ok=True)
    return state


def _put_aside(path: Path, state: Evaluation, batches: int, facts: dict[str, Any]) -> None:
    arrays = {str(i): to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    write_tensors(path, arrays, {"batches": str(batches), "run": json.dumps(facts, sort_keys=True)})


def _take_up(path: Path, state: Evaluation, facts: dict[str, Any]) -> tuple[Evaluation, int]:
    """What was put aside, in the form of `state`, and the number of batches in it."""
    file = open_tensors(path)
    if file.metadata.get("run") != json.dumps(facts, sort_keys=True):
        raise ValueError(f"{path} belongs to a run with other input or options: remove it, or choose another --out")
    leaves, form = jax.tree.flatten(state)
    return form.unflatten([file.array(str(i)) for i in range(len(leaves))]), int(file.metadata["batches"])


def _write(out: Path, facts: dict[str, Any], metrics: dict[int, dict[str, Any]]) -> None:
    write_json(out / "quality.json", {**facts, "definitions": DEFINITIONS, "layers": plain(metrics)})
    draw_quality(
        out / "quality.png", metrics, title=f"{facts['sae']['name']} on {facts['model']['name']}", note=facts["note"]
    )


def print_table(metrics: dict[int, dict[str, Any]]) -> None:
    """The numbers that one looks at first, a line per layer, on stdout."""
    shown = (
        "fvu",
        "cosine",
        "l0",
        "dead_fraction",
        "sink_fraction",
        "ce_clean",
        "ce_spliced",
        "ce_zero",
        "ce_recovered",
        "kl",
    )
    print("layer " + " ".join(f"{name:>13}" for name in shown))
    for layer, row in metrics.items():
        cells = ("-" if row[name] is None else f"{row[name]:.4g}" for name in shown)
        print(f"{layer:>5} " + " ".join(f"{cell:>13}" for cell in cells))
