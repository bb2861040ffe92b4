"""`qscope features build`: what every feature of every layer does on a text, counted in one pass.

Density, maximum, mean and quantiles where active, median residual norm, and the places where each feature is strongest;
tokens of enormous norm (sinks) are left out and counted. A run that is stopped puts aside what it has counted; the same
command goes on and ends with the same bits.
"""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro

from qscope_jax.analysis.statistics import QUANTILE_ERROR, LayerStatistics, summarize_tally
from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data import store_files
from qscope_jax.data.batches import PLAN, Buckets
from qscope_jax.data.documents import Part, Parts, read_ahead
from qscope_jax.data.store import FeatureStore
from qscope_jax.data.text import Fields, open_corpus
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder, tokenizer_hash
from qscope_jax.extract import check_sae, make_extract_step, measure_sinks
from qscope_jax.files.atomic import write_json
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.places import model_files
from qscope_jax.jobs.run import Run, check_local, devices, hash_files, plain, say
from qscope_jax.sae.formats import layers_of, load_sae, open_sae
from qscope_jax.sae.formats.facts import settle
from qscope_jax.sae.model import Contract
from qscope_jax.statistics import Counted, Watch, check_store, count_store, count_text, init_counted, make_fold_step
from qscope_jax.statistics_files import contexts_path, put_aside, save_statistics, table, take_up, write_contexts

_MAX_LENGTH = 4096
_BATCH_TOKENS = {True: 4096, False: 16_384}
_ARITHMETIC: dict[str, tuple[str, Contract]] = {"fast": ("bfloat16", "fast"), "parity": ("float32", "exact")}


@dataclasses.dataclass(frozen=True)
class Config:
    """Count what features do on a text."""

    data: tyro.conf.Positional[tuple[str, ...]] = ("demo",)
    """Files, folders or globs of JSONL, parquet or text, local or remote; "demo" ships along."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs, likewise; one file is fine too."""
    store: Path | None = None
    """Count the codes in this folder, made by `qscope extract --per token --mask-sinks`, instead of a text's; the model
    is asked for its tokenizer only."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all that the SAE source holds by default."""
    out: Path = Path("qscope-out/features")
    """Folder of the results. The same command goes on in it."""

    contexts: int = 8
    """Best documents to keep per feature, with the text around the best token; 0: none. They take 112 bytes each."""
    tokens: int | None = None
    """Take whole documents until they have so many tokens; by default all."""
    histograms: bool = True
    """Keep each feature's histogram, of which any quantile can be asked; without: the 50, 90 and 99 % quantiles."""
    save_every: float = 300.0
    """Seconds after which what is counted is put aside, at the next end of a part; on SIGTERM it always is."""

    text_field: str = "text"
    """Column of the text."""
    format: Literal["jsonl", "parquet", "text"] | None = None
    """What the files are, where their endings do not say it."""
    document: Literal["line", "file"] = "line"
    """Whether each line or each file of plain text is a document."""
    on_error: Literal["skip", "fail"] = "skip"
    """Rows that cannot be used: list them in errors.jsonl, or stop at the first."""
    max_length: int | None = None
    """Longest row in tokens; longer documents are cut into windows. By default the model's context, at most 4096."""
    batch_tokens: int | None = None
    """Positions per batch; by default 4,096 on a CPU and 16,384 elsewhere."""
    precision: Literal["fast", "parity"] = "fast"
    """bfloat16, or the float32 arithmetic of the release's demo."""
    part_rows: int = 32_768
    """Rows per part, at most."""
    part_bytes: int = 4 << 20
    """Bytes of input per part, about."""


class Opened(NamedTuple):
    """What a run reads, opened but not loaded; `facts` decide every number."""

    model: Source
    sae: Source
    saes: dict[int, str]
    shapes: tuple[int, ...]
    parts: Parts
    buckets: Buckets
    constants: ModelConfig
    facts: dict[str, Any]


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named.
      FloatingPointError: the model overflows.
      Interrupted: SIGTERM or SIGINT came; what was counted is put aside.
    """
    for name in ("k", "tokens", "max_length", "batch_tokens", "part_rows", "part_bytes"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if config.contexts < 0:
        raise ValueError(f"--contexts {config.contexts}: expected at least 0")
    check_local(config.out, why="it goes on from what is in the folder")
    with Run("features build", config, config.out) as job:
        if config.store is not None:
            _build_from_store(config, job, FeatureStore(config.store))
        else:
            _build_from_text(config, job, _open(config))
    print(f"\n{job.address}: statistics.json, a file per layer, contexts/")


def _build_from_text(config: Config, job: Run, opened: Opened) -> None:
    dtype, contract = _ARITHMETIC[config.precision]
    backbone = load_backbone(opened.model, dtype=dtype)
    saes = tuple(_encoder(load_sae(opened.sae, layer, k=config.k, dtype=dtype)) for layer in opened.saes)
    step = make_extract_step(backbone.config, tuple(opened.saes), contract=contract)
    documents = (ids for part in read_ahead(opened.parts) for ids in part.tokens)
    thresholds = measure_sinks(step, backbone.params, saes, documents, opened.buckets)
    facts = {**opened.facts, "sink_thresholds": plain(thresholds)}
    state, aside = _begin(config, job, opened.shapes, facts)
    job.total = None if config.tokens else len(opened.parts.corpus)
    job.progress(rows=0, tokens=0, already=state.documents + state.bad)
    parts = Parts(
        opened.parts.corpus, opened.parts.ranges, opened.parts.encoder, opened.constants.vocab_size,
        chosen=range(state.part, len(opened.parts.ranges)), on_error=config.on_error,
    )  # fmt: skip
    fold = make_fold_step()
    state, ended = count_text(
        state, parts, opened.buckets, step, backbone.params, saes, [thresholds[n] for n in opened.saes],
        watch=_watch(config, job, facts), tokens=config.tokens, fold=fold,
    )  # fmt: skip
    _stop_unless(ended, job, aside, state, facts)
    store_files.join_errors(job.out, state.part)
    found = {
        layer: summarize_tally(total, sink_threshold=thresholds[layer], sae=sha)
        for (layer, sha), total in zip(opened.saes.items(), state.totals, strict=True)
    }
    tokenizer, corpus = load_tokenizer(opened.model), opened.parts.corpus
    _write(config, job, facts, found, state, tokenizer, lambda number: "{}:{}".format(*corpus.place(number)))
    job.record(compilations=step.compilations, device=devices())
    aside.unlink(missing_ok=True)


def _build_from_store(config: Config, job: Run, store: FeatureStore) -> None:
    check_store(store)
    sae = store.info["sae"]
    facts = plain(
        {"store": store_files.fingerprint(store.info), "settings": {"contexts": config.contexts}}
        | {name: store.info[name] for name in ("model", "sae", "tokenizer", "data")}
    )
    thresholds = {layer: store.info["measured_sinks"][str(layer)] for layer in store.layers}
    state, aside = _begin(config, job, tuple(map(store.d_sae, store.layers)), facts)
    job.total = len(store)
    job.progress(rows=0, tokens=0)
    state, ended = count_store(state, store, watch=_watch(config, job, facts))
    _stop_unless(ended, job, aside, state, facts)
    found = {}
    for layer, total in zip(store.layers, state.totals, strict=True):
        sha = next((digest for name, digest in sae["files"].items() if f"layer{layer}." in name), "")
        one = summarize_tally(total, sink_threshold=thresholds[layer], sae=sha)
        # A store keeps no norms; its threshold is ten times the median that was measured for it.
        found[layer] = one._replace(median_norm=thresholds[layer] / 10)
    ids = store.documents().column("id")
    _write(config, job, facts, found, state, load_tokenizer(config.model), lambda number: ids[number].as_py())
    aside.unlink(missing_ok=True)


def _open(config: Config) -> Opened:
    """Opens everything and refuses what does not fit, before any weights are read."""
    model, sae = resolve(config.model, what="model"), resolve(config.sae, what="sae")
    constants = read_config(model.fetch("config.json"))
    layers = tuple(sorted(config.layers)) or layers_of(sae)
    if len(set(layers)) != len(layers) or not layers:
        raise ValueError(f"{sae}: layers {layers}: expected different layers; name them with --layers")
    opened = {layer: open_sae(sae, layer) for layer in layers}
    known = {layer: settle(str(o.path), o.facts, k=config.k) for layer, o in opened.items()}
    for layer, one in known.items():
        check_sae(constants, layer, one)
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, constants.vocab_size)
    longest = config.max_length or min(constants.max_position_embeddings, _MAX_LENGTH)
    if longest > constants.max_position_embeddings:
        raise ValueError(f"--max-length {longest}: the model's context is {constants.max_position_embeddings} tokens")
    corpus = open_corpus(
        config.data, Fields(config.text_field), format=config.format, document=config.document, say=say
    )
    if not len(corpus):
        raise ValueError(f"{', '.join(config.data)}: no rows; every file is empty")
    buckets = Buckets(config.batch_tokens or _BATCH_TOKENS[jax.default_backend() == "cpu"], longest, per_octave=1)
    ranges = corpus.parts(rows=config.part_rows, size=config.part_bytes)
    parts = Parts(corpus, ranges, make_encoder(tokenizer), constants.vocab_size)
    files = hash_files(o.path for o in opened.values())
    hashes = {layer: next(iter(hash_files([o.path]).values())) for layer, o in opened.items()}
    settings = ("contexts", "tokens", "text_field", "document", "precision", "part_rows", "part_bytes")
    facts = {
        "model": {"name": model.name, "files": hash_files(model_files(model))},
        "sae": {"name": sae.name, "files": files, "k": {layer: one.k for layer, one in known.items()}},
        "data": corpus.fingerprint(),
        "tokenizer": tokenizer_hash(tokenizer),
        "settings": {
            **{name: getattr(config, name) for name in settings},
            "max_length": longest,
            "batch_tokens": buckets.batch_tokens,
            "plan": PLAN,
        },
    }
    shapes = tuple(one.d_sae for one in known.values())
    return Opened(model, sae, hashes, shapes, parts, buckets, constants, plain(facts))


def _encoder(sae):
    """The SAE without its decoder: half of its memory, which encoding never reads."""
    return sae._replace(params=sae.params._replace(w_dec=sae.params.w_dec[:0]))


def _begin(config: Config, job: Run, shapes: Sequence[int], facts: dict[str, Any]) -> tuple[Counted, Path]:
    """What an earlier run put aside, or nothing; and the file for it."""
    aside, earlier = job.out / "partial.safetensors", job.out / "statistics.json"
    if (
        earlier.exists()
        and {name: json.loads(earlier.read_text(encoding="utf-8")).get(name) for name in facts} != facts
    ):
        raise ValueError(f"{job.out} holds statistics of other input or options: choose another --out")
    if not aside.exists():
        return init_counted(shapes, contexts=config.contexts), aside
    return take_up(aside, facts), aside


def _watch(config: Config, job: Run, facts: dict[str, Any]) -> Watch:
    saved = time.monotonic()

    def finished(part: Part | None, state: Counted) -> None:
        nonlocal saved
        if part is not None:
            store_files.write_errors(store_files.errors_path(job.out, part.number), part.bad)
        if time.monotonic() - saved >= config.save_every:
            put_aside(job.out / "partial.safetensors", state, facts)
            saved = time.monotonic()

    return Watch(job.progress, lambda: job.stopping, finished)


def _stop_unless(ended: bool, job: Run, aside: Path, state: Counted, facts: dict[str, Any]) -> None:
    if not ended:
        put_aside(aside, state, facts)
        raise job.interrupted(f"{state.part} parts and {state.batches} batches of the next are counted and put aside")


def _write(
    config: Config,
    job: Run,
    facts: dict[str, Any],
    found: Mapping[int, LayerStatistics],
    state: Counted,
    tokenizer: Any,
    name: Callable[[int], str],
) -> None:
    rows = table(found)
    places = 0
    if config.contexts:
        decode = lambda ids: tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)  # noqa: E731
        for layer, contexts in zip(found, state.contexts, strict=True):
            places += write_contexts(contexts_path(job.out, layer), contexts, name=name, decode=decode)
    save_statistics(job.out, found, histograms=config.histograms)
    write_json(job.out / "statistics.json", {**facts, "quantile_error": QUANTILE_ERROR, "layers": rows})
    counts = {name: getattr(state, name) for name in ("documents", "tokens", "bad")}
    job.record(
        counts={**counts, "layers": len(found), "contexts": places},
        sinks={
            layer: {"threshold": row["sink_threshold"], "share": row["sinks"] / (row["tokens"] + row["sinks"])}
            for layer, row in rows.items()
        },
        hashes={kind: facts[kind]["files"] for kind in ("model", "sae")},
    )
    _print(rows)


def _print(rows: Mapping[str, Mapping[str, Any]]) -> None:
    shown = ("features", "never_active", "active_per_token", "median_density", "median_max", "median_p99")
    shown = (*shown, "median_norm", "tokens", "sinks")
    print("layer " + " ".join(f"{name:>16}" for name in shown))
    for layer, row in rows.items():
        cells = ("-" if row[name] is None else f"{row[name]:.6g}" for name in shown)
        print(f"{layer:>5} " + " ".join(f"{cell:>16}" for cell in cells))
