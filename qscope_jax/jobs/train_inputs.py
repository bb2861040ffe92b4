"""What `qscope train-sae` reads, opened: the model's constants, the data, and rows to train and to measure on."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.sharding import Mesh

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.data.corpora import open_sources
from qscope_jax.data.feed import DocumentSource, Feed, open_feed
from qscope_jax.data.seeding import split_documents
from qscope_jax.data.tokenizer import load_tokenizer
from qscope_jax.data.vectors import VectorFeed, open_vectors
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.places import model_files
from qscope_jax.jobs.run import plain, say
from qscope_jax.jobs.train_config import Config, fewer_shards, mesh_for, plan_for
from qscope_jax.training.loop import Plan, Rows


class Inputs(NamedTuple):
    """What a run reads, opened; `settings` are all that decide what comes out, besides the data."""

    model: Source
    constants: ModelConfig
    sources: list[DocumentSource]
    plan: Plan
    steps: int
    mesh: Mesh | None
    settings: dict[str, Any]


def open_inputs(config: Config) -> Inputs:
    """Opens everything and refuses what does not fit, before any weights are read.

    Raises:
      ValueError, OSError: what is wrong with the model, the data or the options.
    """
    model = resolve(config.model, what="model")
    constants = read_config(model.fetch("config.json"))
    mesh, stored = mesh_for(config), None
    if config.activations:
        # Cheap, and says of which type the buffer is and how many rows there are to share out.
        stored = open_vectors(
            config.activations, d=constants.hidden_size, row_length=config.row_length or 512, rows=1, shards=1,
            seed=config.seed, held_out=config.held_out,
        )  # fmt: skip
    elif mesh is not None:
        parameter_shapes(constants, mesh=mesh, fsdp=config.fsdp)
    plan, steps = plan_for(config, constants, mesh, stored=stored and stored.dtype)
    sources = [] if stored else _open_text(config, constants, model)
    if config.shards is None:
        fewest = min(stored.documents if stored else map(len, sources))
        documents = fewest if stored else len(split_documents(fewest, "train", config.held_out, 0))
        plan = fewer_shards(plan, documents, mesh)
    settings = {
        "plan": {name: value for name, value in plain(plan).items() if name != "model_axis"},  # only where arrays lie
        "precision": config.precision,
        "model": hash_files([model.fetch("config.json")] if stored else model_files(model)),
    }
    return Inputs(model, constants, sources, plan, steps, mesh, json.loads(json.dumps(settings, default=_dtype_name)))


def _open_text(config: Config, constants: ModelConfig, model: Source) -> list[DocumentSource]:
    tokenizer = None if config.data == ("synthetic",) or config.token_field else load_tokenizer(model)
    return open_sources(
        config.data, vocab_size=constants.vocab_size, tokenizer=tokenizer, weights=config.weights or None, say=say,
        text_field=config.text_field, token_field=config.token_field, whole_files=config.document == "file",
    )  # fmt: skip


def _dtype_name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


def open_rows(config: Config, inputs: Inputs, own: Sequence[int], *, held_out: bool = False) -> Feed | VectorFeed:
    """The rows of some virtual shards, without end; or those that are held out, once and not shared out."""
    plan = inputs.plan
    options: Any = {
        "row_length": plan.row_length, "rows": plan.rows, "shards": 1 if held_out else plan.shards, "own": own,
        "seed": config.seed, "held_out": config.held_out, "split": "held-out" if held_out else "train",
        "once": held_out,
    }  # fmt: skip
    if config.activations:
        return open_vectors(config.activations, d=inputs.constants.hidden_size, **options)
    vocabulary = {"vocab_size": inputs.constants.vocab_size, "end_token": config.end_token}
    return open_feed(inputs.sources, weights=config.weights or None, **vocabulary, **options)


class HeldOut:
    """Batches of held-out data, enough for `wanted` tokens or all that there are; no document comes twice.

    Every process gets all rows. `documents` (rows, of vectors on disk) and `tokens` say how many real ones were in the
    batches taken so far.
    """

    def __init__(self, config: Config, inputs: Inputs, wanted: int):
        self._config, self._inputs = config, inputs
        self.wanted, self.documents, self.tokens = wanted, 0, 0

    def __iter__(self) -> Iterator[Rows]:
        feed = open_rows(self._config, self._inputs, (0,), held_out=True)
        try:
            while self.tokens < self.wanted and (rows := next(feed)).mask.any():
                self.documents, self.tokens = feed.counts["documents"], self.tokens + int(rows.mask.sum())
                yield rows
        finally:
            feed.close()
