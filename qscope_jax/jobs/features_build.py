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
from typing import Any

from qscope_jax.analysis.statistics import QUANTILE_ERROR, LayerStatistics, summarize_tally
from qscope_jax.data import store_files
from qscope_jax.data.documents import Part, Parts, read_ahead
from qscope_jax.data.store import FeatureStore
from qscope_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from qscope_jax.extract import measure_sinks
from qscope_jax.features.count import Counted, Watch, count_text, init_counted, make_fold_step
from qscope_jax.features.count_store import check_store, count_store
from qscope_jax.features.files import contexts_path, put_aside, save_statistics, table, take_up, write_contexts
from qscope_jax.files.atomic import write_json
from qscope_jax.jobs.features_config import Config, Opened, check_numbers, open_inputs
from qscope_jax.jobs.opened import load
from qscope_jax.jobs.run import Run, check_local, devices, plain


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named.
      FloatingPointError: the model overflows.
      Interrupted: SIGTERM or SIGINT came; what was counted is put aside.
    """
    check_numbers(config)
    check_local(config.out, why="it goes on from what is in the folder")
    with Run("features build", config, config.out) as job:
        if config.store is not None:
            _build_from_store(config, job, FeatureStore(config.store))
        else:
            _build_from_text(config, job, open_inputs(config))
    print(f"\n{job.address}: statistics.json, a file per layer, contexts/")


def _build_from_text(config: Config, job: Run, opened: Opened) -> None:
    (backbone, encoders, step), parts = load(opened.sources, config.precision), opened.parts
    saes = tuple(encoders.saes.values())
    documents = (ids for part in read_ahead(parts) for ids in part.tokens)
    thresholds = measure_sinks(step, backbone.params, saes, documents, opened.buckets)
    facts = {**opened.facts, "sink_thresholds": plain(thresholds)}
    state, aside = _begin(config, job, [sae.config.d_sae for sae in saes], facts)
    job.total = None if config.tokens else len(parts.corpus)
    job.progress(rows=0, tokens=0, already=state.documents + state.bad)
    left = Parts(
        parts.corpus, parts.ranges, parts.encoder, backbone.config.vocab_size,
        chosen=range(state.part, len(parts.ranges)), on_error=config.on_error,
    )  # fmt: skip
    fold = make_fold_step()
    state, ended = count_text(
        state, left, opened.buckets, step, backbone.params, saes, [thresholds[n] for n in opened.saes],
        watch=_watch(config, job, facts), tokens=config.tokens, fold=fold,
    )  # fmt: skip
    _stop_unless(ended, job, aside, state, facts)
    store_files.join_errors(job.out, state.part)
    found = {
        layer: summarize_tally(total, sink_threshold=thresholds[layer], sae=sha)
        for (layer, sha), total in zip(opened.saes.items(), state.totals, strict=True)
    }
    name = lambda number: "{}:{}".format(*parts.corpus.place(number))  # noqa: E731
    _write(config, job, facts, found, state, opened.sources.tokenizer, name)
    job.record(compilations=step.compilations, device=devices())
    aside.unlink(missing_ok=True)


def _build_from_store(config: Config, job: Run, store: FeatureStore) -> None:
    check_store(store)
    defaults = {field.name: field.default for field in dataclasses.fields(Config)}
    kept = ("model", "store", "out", "contexts", "histograms", "save_every")
    if other := [name for name in defaults if name not in kept and getattr(config, name) != defaults[name]]:
        raise ValueError(f"--{other[0].replace('_', '-')} beside --store: the store was made with its own")
    tokenizer = load_tokenizer(config.model)
    if tokenizer_hash(tokenizer) != store.info["tokenizer"]:
        raise ValueError(f"{config.store} holds tokens of another tokenizer than {config.model}: name its --model")
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
    _write(config, job, facts, found, state, tokenizer, lambda number: ids[number].as_py())
    aside.unlink(missing_ok=True)


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
