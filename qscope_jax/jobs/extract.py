"""`qscope extract`: text in, sparse features out, per document or per token.

The input is cut into parts, fixed ranges of rows; each part becomes files of its own, whole or not at all. A rerun
makes what is missing; an interrupted part keeps its finished batches. However often a run is stopped, its files end the
same.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro
from jax.sharding import Mesh

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data import store_files as files
from qscope_jax.data.assemble import read_features
from qscope_jax.data.batches import PLAN
from qscope_jax.data.documents import Encoder, OnError, Parts, read_ahead
from qscope_jax.data.text import Corpus, Fields, open_corpus
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder, tokenizer_hash
from qscope_jax.extract import check_sae, make_extract_step, measure_sinks
from qscope_jax.extract_folder import Loaded, Target, buckets_of, count_parts, finished_parts, make_parts
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.opened import ARITHMETIC, batch_positions
from qscope_jax.jobs.places import join_processes, local_mesh, meet, model_files, parse_mesh
from qscope_jax.jobs.run import Interrupted, Run, check_local, devices, plain, say
from qscope_jax.mesh import partition
from qscope_jax.sae.formats import layers_of, load_sae, open_sae
from qscope_jax.sae.formats.facts import settle
from qscope_jax.sae.model import AXES, without_decoder

_MAX_LENGTH = 4096
_PER_OCTAVE = ((1 << 20, 1), (1 << 22, 2), (math.inf, 4))  # bytes of input, bucket lengths per octave
_NO_SETTINGS = (  # options that do not decide what the files hold, or that `store.json` says in another way
    *("data", "model", "sae", "layers", "out", "k", "keep", "on_error", "features", "values"),
    *("shard", "mesh", "coordinator", "processes", "process"),
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Extract SAE features from texts."""

    data: tyro.conf.Positional[tuple[str, ...]] = ("demo",)
    """Files, folders or globs of JSONL, parquet or text (also .gz, .zst, .bz2), local or remote; "demo" ships along."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs, likewise; one file is fine too."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all that the SAE source holds where it is local."""
    out: Path = Path("qscope-out/extract")
    """Folder of the results. The same command goes on in it; another is refused."""

    per: Literal["document", "token"] = "document"
    """A row of pooled features per document, or the codes of every token."""
    pool: Literal["max", "mean", "count", "last"] = "max"
    """Over a document's tokens: largest value, mean (zeros count), number of tokens it fires on, or the last token."""
    top: int | None = None
    """Keep this many features of each document (or token), the strongest."""
    min_value: float = 0.0
    """Keep values of at least this much."""
    features: Path | None = None
    """Keep the features listed in this file: lines `FEATURE` or `LAYER FEATURE`."""
    values: Literal["float32", "bfloat16"] | None = None
    """How values per token are stored; by default as precise as they were computed."""

    text_field: str = "text"
    """Column of the text."""
    id_field: str | None = None
    """Column of the id; by default a document is called file:line."""
    keep: tuple[str, ...] = ()
    """Columns to carry into the results."""
    format: Literal["jsonl", "parquet", "text"] | None = None
    """What the files are, where their endings do not say it."""
    document: Literal["line", "file"] = "line"
    """Whether each line or each file of plain text is a document."""
    max_row_bytes: int = 16 << 20
    """Longer rows are errors."""
    on_error: Literal["skip", "fail"] = "skip"
    """Rows that cannot be used: list them in errors.jsonl, or stop at the first."""
    special_tokens: bool = False
    """Read strings such as <|im_end|> in a text as the tokens they name."""

    long: Literal["truncate", "window"] = "truncate"
    """Documents above --max-length: keep their start, or cut them into windows (each token counts once)."""
    max_length: int | None = None
    """Longest row in tokens; by default the model's context, at most 4096."""
    overlap: int = 0
    """Tokens before a window that are repeated in it as context."""
    mask_sinks: bool = False
    """Leave out tokens of enormous residual norm; needs no threshold, but uses the one an SAE brings along."""
    precision: Literal["fast", "parity"] = "fast"
    """bfloat16, or the float32 arithmetic of the release's demo."""
    batch_tokens: int | None = None
    """Positions per batch; by default 4,096 on a CPU and 16,384 elsewhere, times DATA of the mesh."""

    shard: str = "0/1"
    """I/N: be process I of N (from 0) that share the work and know nothing of each other."""
    mesh: str = "1x1"
    """DATAxMODEL, for example 2x4: split rows over DATA and weights over MODEL of this process's devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, for processes that share the work, meet at the end and do not outlive each other."""
    processes: int | None = None
    """How many they are; on Cloud TPU and in Slurm these three are found by themselves, and 1 is alone."""
    process: int | None = None
    """Which of them this one is, from 0."""
    part_rows: int = 32_768
    """Rows per part, at most."""
    part_bytes: int = 4 << 20
    """Bytes of input per part, about."""


class Sources(NamedTuple):
    """What a run reads, opened but not loaded."""

    model: Source
    sae: Source
    shapes: dict[int, tuple[int, int]]
    vocab_size: int
    encoder: Encoder
    corpus: Corpus
    ranges: list[tuple[int, int]]
    stamps: dict[Path, tuple[int, int]]
    mesh: Mesh | None

    def parts(self, chosen: Sequence[int], *, on_error: OnError = "skip") -> Parts:
        return Parts(self.corpus, self.ranges, self.encoder, self.vocab_size, chosen=chosen, on_error=on_error)


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named; no file is left half done.
      Interrupted: SIGTERM or SIGINT came; everything finished is saved.
    """
    _check_numbers(config)
    check_local(config.out, why="its processes share the folder and go on from what is in it")
    shard, shards = join_processes(config.coordinator, config.processes, config.process, shard=config.shard)
    try:
        _extract(config, shard, shards)
    except Interrupted:
        meet()
        raise


def _extract(config: Config, shard: int, shards: int) -> None:
    manifest = "manifest.json" if shards == 1 else f"manifest-{shard}-of-{shards}.json"
    with Run("extract", config, config.out, manifest=manifest) as job:
        sources, info = _open(config)
        loaded = None
        if not (config.out / "store.json").exists():
            loaded = _load(config, sources)
            info |= _measured(config, sources, loaded, info)
        info = files.claim_folder(config.out, info)
        mode = "float32, the release's arithmetic" if config.precision == "parity" else "bfloat16 (fast mode)"
        job.record(mode=mode, store=info)
        mine = range(shard, len(sources.ranges), shards)
        done = finished_parts(config.out, info, mine)
        todo = [part for part in mine if part not in done]
        say(f"{len(sources.corpus):,} rows; {len(todo)} of {len(mine)} parts to do")
        if todo:
            loaded = loaded or _load(config, sources)
            sizes = {part: stop - start for part, (start, stop) in enumerate(sources.ranges)}
            job.total = sum(sizes[part] for part in mine)
            job.progress(rows=0, tokens=0, already=sum(sizes[part] for part in done))
            parts = sources.parts(todo, on_error=config.on_error)
            target = Target(config.out, info, sources.corpus.schema)
            make_parts(target, parts, loaded, progress=job.progress, stopping=lambda: job.stopping)
            job.record(device=devices(), compilations=loaded.step.compilations, shapes=loaded.step.shapes)
        else:  # the manifest goes on saying what made the files
            kept = ("device", "compilations", "shapes")
            job.record(**{name: job.earlier[name] for name in kept if name in job.earlier})
        _conclude(config.out, job, info, mine, shards)


def _check_numbers(config: Config) -> None:
    for name in ("k", "top", "max_length", "batch_tokens", "part_rows", "part_bytes", "max_row_bytes"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if config.values and config.per == "document":
        raise ValueError(f"--values {config.values}: only values per token can be stored so (--per token)")
    if not 0 <= config.min_value < math.inf:
        raise ValueError(f"--min-value {config.min_value}: expected a number of at least 0")


def _open(config: Config) -> tuple[Sources, dict[str, Any]]:
    """Opens everything that is read, and says what `store.json` is to say: all that the results depend on."""
    mesh = local_mesh(config.mesh)
    model, sae = resolve(config.model, what="model"), resolve(config.sae, what="sae")
    constants = read_config(model.fetch("config.json"))
    opened = {layer: open_sae(sae, layer) for layer in _layers(config, sae)}
    known = {layer: settle(str(o.path), o.facts, k=config.k) for layer, o in opened.items()}
    for layer, one in known.items():
        check_sae(constants, layer, one)
    if mesh is not None:  # before anything large is read
        parameter_shapes(constants, mesh=mesh)
        for one in known.values():
            partition(AXES["b_enc"], (one.d_sae,), mesh)
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, constants.vocab_size)
    corpus = _corpus(config, tuple(known))
    ranges = corpus.parts(rows=config.part_rows, size=config.part_bytes)
    shapes = {layer: (one.d_sae, one.k) for layer, one in known.items()}
    weights = model_files(model)
    stamps = {path: _stamp(path) for path in (*weights, *(o.path for o in opened.values()))}
    info = {
        **_settings(config, constants, shapes, corpus),
        "model": {"name": model.name, "files": hash_files(weights)},
        "sae": {"name": sae.name, "files": hash_files(o.path for o in opened.values())},
        "tokenizer": tokenizer_hash(tokenizer),
        "data": corpus.fingerprint(),
        "rows": len(corpus),
        "parts": len(ranges),
        "keep": {field.name: str(field.type) for field in corpus.schema},
    }
    encoder = make_encoder(tokenizer, special_tokens=config.special_tokens)
    return Sources(model, sae, shapes, constants.vocab_size, encoder, corpus, ranges, stamps, mesh), info


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _settings(
    config: Config, constants: ModelConfig, shapes: dict[int, tuple[int, int]], corpus: Corpus
) -> dict[str, Any]:
    """The options that decide what the files hold, with their defaults filled in."""
    chosen = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    for name in _NO_SETTINGS:
        del chosen[name]
    data, model = parse_mesh(config.mesh)
    widths = {layer: d_sae for layer, (d_sae, _) in shapes.items()}
    longest = config.max_length or min(constants.max_position_embeddings, _MAX_LENGTH)
    if not 0 <= config.overlap < longest:
        raise ValueError(f"--overlap {config.overlap}: expected at least 0 and less than the longest row, {longest}")
    if longest > constants.max_position_embeddings:
        raise ValueError(f"--max-length {longest}: the model's context is {constants.max_position_embeddings} tokens")
    return plain(
        {
            **chosen,
            "layers": list(shapes),
            "shapes": {layer: {"d_sae": d_sae, "k": k} for layer, (d_sae, k) in shapes.items()},
            "features": None if config.features is None else read_features(config.features, widths),
            "values": config.values or ("float32" if config.precision == "parity" else "bfloat16"),
            "max_length": longest,
            "batch_tokens": batch_positions(config.batch_tokens, data),
            # A shape costs a compilation, which a small corpus never earns back in padding.
            "plan": PLAN,
            "per_octave": next(n for limit, n in _PER_OCTAVE if corpus.bytes < limit),
            **({"pool": None} if config.per == "token" else {"values": "float32"}),
            **({"mesh": {"data": data, "model": model}} if data * model > 1 else {}),
        }
    )


def _layers(config: Config, sae: Source) -> tuple[int, ...]:
    if len(set(config.layers)) != len(config.layers):
        raise ValueError(f"--layers {' '.join(map(str, config.layers))}: a layer is named twice")
    if config.layers:
        return tuple(sorted(config.layers))
    held = layers_of(sae)
    if not held:
        raise ValueError(f"{sae}: no file is called like layer3.sae.pt; name the folder of SAEs, or give --layers")
    if sae.kind in ("demo", "folder", "file"):
        return held
    raise ValueError(f"{sae} holds SAEs of layers {', '.join(map(str, held))}: choose with --layers")


def _corpus(config: Config, layers: tuple[int, ...]) -> Corpus:
    keep = tuple(name for names in config.keep for name in names.split(",") if name)
    made = {"id", "n_tokens", "truncated", *(f"layer{n}_{what}" for n in layers for what in ("features", "values"))}
    if clash := sorted(made & set(keep)) or sorted({name for name in keep if keep.count(name) > 1}):
        raise ValueError(f"--keep {clash[0]}: the results have a column of this name already; rename it in the data")
    corpus = open_corpus(
        config.data,
        Fields(config.text_field, config.id_field, keep),
        format=config.format,
        document=config.document,
        max_row_bytes=config.max_row_bytes,
        say=say,
    )
    if not len(corpus):
        raise ValueError(f"{', '.join(config.data)}: no rows; every file is empty")
    return corpus


def _load(config: Config, sources: Sources) -> Loaded:
    dtype, contract = ARITHMETIC[config.precision]
    backbone = load_backbone(sources.model, dtype=dtype, mesh=sources.mesh)
    options: Any = {"k": config.k, "dtype": dtype, "mesh": sources.mesh}
    saes = tuple(without_decoder(load_sae(sources.sae, layer, **options)) for layer in sources.shapes)
    for path, stamp in sources.stamps.items():
        if _stamp(path) != stamp:
            raise ValueError(f"{path} was replaced while this command began; run it again")
    step = make_extract_step(backbone.config, tuple(sources.shapes), contract=contract)
    return Loaded(backbone.params, saes, step)


def _measured(config: Config, sources: Sources, loaded: Loaded, info: dict[str, Any]) -> dict[str, Any]:
    """The norm above which a token is masked, per layer; if measured, then at the start of the whole input."""
    if not config.mask_sinks:
        return {}
    documents = (ids for part in read_ahead(sources.parts(range(len(sources.ranges)))) for ids in part.tokens)
    found = measure_sinks(loaded.step, loaded.params, loaded.saes, documents, buckets_of(info))
    return {"measured_sinks": {str(layer): value for layer, value in found.items()}}


def _conclude(out: Path, job: Run, info: dict[str, Any], mine: range, shards: int) -> None:
    """Counts what is there; the process that finds every part done joins the errors and says so for the whole.

    Processes of one job meet before, and it is the first that speaks.
    """
    finished = len(finished_parts(out, info, mine)) == len(mine)
    if finished:
        meet()
    done = finished_parts(out, info, range(info["parts"]))
    counts = count_parts(info, done.values())
    job.record(counts=counts)
    if not finished:
        raise job.interrupted(f"{counts['parts']} parts are done, finished batches of the next are put aside")
    if jax.process_index() > 0:
        return
    if len(done) == info["parts"]:
        files.join_errors(out, info["parts"])
        if shards > 1:
            job.manifests.append("manifest.json")
    say(
        f"{counts['parts']} parts: {counts['documents']:,} documents ({counts['truncated']:,} truncated), "
        f"{counts['tokens']:,} tokens; {counts['bad']:,} rows left out (errors.jsonl); "
        f"{counts['wasted_positions']:.1%} of positions padding"
    )
