"""What `qscope features build` is told, and what it reads."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tyro

from qscope_jax.data.batches import PLAN, Buckets
from qscope_jax.data.documents import Parts
from qscope_jax.data.text import Fields, open_corpus
from qscope_jax.data.tokenizer import make_encoder
from qscope_jax.jobs.opened import Precision, Sources, batch_positions, open_sources
from qscope_jax.jobs.places import parse_mesh
from qscope_jax.jobs.run import plain, say

_MAX_LENGTH = 4096


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
    precision: Precision = "fast"
    """bfloat16, or the float32 arithmetic of the release's demo."""
    part_rows: int = 32_768
    """Rows per part, at most."""
    part_bytes: int = 4 << 20
    """Bytes of input per part, about."""


class Opened(NamedTuple):
    """What a run reads, opened but not loaded.

    `saes` maps layers to the hashes of their files; `facts` decide every number.
    """

    sources: Sources
    saes: dict[int, str]
    parts: Parts
    buckets: Buckets
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
    sources = open_sources(config)
    constants, tokenizer = sources.constants, sources.tokenizer
    longest = config.max_length or min(constants.max_position_embeddings, _MAX_LENGTH)
    if longest > constants.max_position_embeddings:
        raise ValueError(f"--max-length {longest}: the model's context is {constants.max_position_embeddings} tokens")
    corpus = open_corpus(
        config.data, Fields(config.text_field), format=config.format, document=config.document, say=say
    )
    if not len(corpus):
        raise ValueError(f"{', '.join(config.data)}: no rows; every file is empty")
    data, _ = parse_mesh(config.mesh)
    buckets = Buckets(batch_positions(config.batch_tokens, data), longest, per_octave=1, multiple=data)
    ranges = corpus.parts(rows=config.part_rows, size=config.part_bytes)
    parts = Parts(corpus, ranges, make_encoder(tokenizer), constants.vocab_size)
    files = sources.hashes()
    hashes = {n: next(sha for name, sha in files["sae"].items() if str(path).endswith(name))
              for n, path in sources.files.items()}  # fmt: skip
    settings = ("contexts", "tokens", "text_field", "document", "precision", "part_rows", "part_bytes", "mesh")
    facts = {
        "model": {"name": sources.model.name, "files": files["model"]},
        "sae": {"name": sources.sae.name, "files": files["sae"], "k": {n: one.k for n, one in sources.saes.items()}},
        "data": corpus.fingerprint(),
        "tokenizer": files["tokenizer"],
        "settings": {
            **{name: getattr(config, name) for name in settings},
            "max_length": longest,
            "batch_tokens": buckets.batch_tokens,
            "plan": PLAN,
        },
    }
    return Opened(sources, hashes, parts, buckets, plain(facts))
