"""What `qscope features build` is told, and what it reads."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import tyro
from jax.sharding import Mesh

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.data.batches import PLAN, Buckets
from qscope_jax.data.documents import Parts
from qscope_jax.data.text import Fields, open_corpus
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder, tokenizer_hash
from qscope_jax.extract import check_sae
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.places import local_mesh, model_files, parse_mesh
from qscope_jax.jobs.run import plain, say
from qscope_jax.sae.formats import layers_of, open_sae
from qscope_jax.sae.formats.facts import settle

_MAX_LENGTH = 4096
_BATCH_TOKENS = {True: 4096, False: 16_384}


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
    """Positions per batch; by default 4,096 on a CPU and 16,384 elsewhere, times DATA of the mesh."""
    mesh: str = "1x1"
    """DATAxMODEL: split rows over DATA and weights over MODEL of this process's devices."""
    precision: Literal["fast", "parity"] = "fast"
    """bfloat16, or the float32 arithmetic of the release's demo."""
    part_rows: int = 32_768
    """Rows per part, at most."""
    part_bytes: int = 4 << 20
    """Bytes of input per part, about."""


class Opened(NamedTuple):
    """What a run reads, opened but not loaded.

    `saes` maps layers to the hashes of their files, `shapes` are their widths; `facts` decide every number.
    """

    model: Source
    sae: Source
    saes: dict[int, str]
    shapes: tuple[int, ...]
    parts: Parts
    buckets: Buckets
    constants: ModelConfig
    mesh: Mesh | None
    facts: dict[str, Any]


def check_numbers(config: Config) -> None:
    """Refuses numbers out of range.

    Raises:
      ValueError: which one.
    """
    for name in ("k", "tokens", "max_length", "batch_tokens", "part_rows", "part_bytes"):
        if (value := getattr(config, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected at least 1")
    if config.contexts < 0:
        raise ValueError(f"--contexts {config.contexts}: expected at least 0")


def open_inputs(config: Config) -> Opened:
    """Opens everything and refuses what does not fit, before any weights are read.

    Raises:
      ValueError, OSError: what does not fit, or cannot be had.
    """
    mesh = local_mesh(config.mesh)
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
    data, _ = parse_mesh(config.mesh)
    positions = config.batch_tokens or data * _BATCH_TOKENS[jax.default_backend() == "cpu"]
    buckets = Buckets(positions, longest, per_octave=1, multiple=data)
    ranges = corpus.parts(rows=config.part_rows, size=config.part_bytes)
    parts = Parts(corpus, ranges, make_encoder(tokenizer), constants.vocab_size)
    files = hash_files(o.path for o in opened.values())
    hashes = {n: next(sha for name, sha in files.items() if str(o.path).endswith(name)) for n, o in opened.items()}
    settings = ("contexts", "tokens", "text_field", "document", "precision", "part_rows", "part_bytes", "mesh")
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
    return Opened(model, sae, hashes, shapes, parts, buckets, constants, mesh, plain(facts))
