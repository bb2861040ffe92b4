"""What commands open alike: a model and its SAEs, checked against one another, then loaded without decoders."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_hash
from qscope_jax.extract import ExtractStep, check_sae, make_extract_step
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.places import local_mesh, model_files
from qscope_jax.sae.formats import layers_of, load_sae, open_sae
from qscope_jax.sae.formats.facts import settle
from qscope_jax.sae.model import Contract, Sae, SaeConfig, row_norms_of, without_decoder

Precision = Literal["fast", "parity"]
# What --precision means: the dtype of weights, and how exactly features are ordered.
ARITHMETIC: dict[str, tuple[str, Contract]] = {"fast": ("bfloat16", "fast"), "parity": ("float32", "exact")}
_BATCH_TOKENS = {True: 4096, False: 16_384}


class Asked(Protocol):
    """The options that say what to open."""

    @property
    def model(self) -> str: ...
    @property
    def sae(self) -> str: ...
    @property
    def k(self) -> int | None: ...
    @property
    def layers(self) -> tuple[int, ...]: ...
    @property
    def mesh(self) -> str: ...


class Sources(NamedTuple):
    """Where a model and its SAEs (per layer) lie and what they are; no weights are read."""

    model: Source
    sae: Source
    constants: ModelConfig
    tokenizer: Any
    files: dict[int, Path]
    saes: dict[int, SaeConfig]
    k: int | None
    mesh: Mesh | None

    def hashes(self) -> dict[str, Any]:
        """SHA-256 of everything that decides results, by kind and file."""
        files = {"model": model_files(self.model), "sae": self.files.values()}
        return {kind: hash_files(paths) for kind, paths in files.items()} | {
            "tokenizer": tokenizer_hash(self.tokenizer)
        }


class Model(NamedTuple):
    """A model before its weights are read, with the tokenizer that fits it."""

    source: Source
    constants: ModelConfig
    tokenizer: Any


class Encoders(NamedTuple):
    """SAEs without their decoders, and |decoder row| [f] of each."""

    saes: dict[int, Sae]
    row_norms: dict[int, np.ndarray]


class Loaded(NamedTuple):
    """A model on its devices, with encoders and the step that applies both."""

    backbone: Backbone
    encoders: Encoders
    step: ExtractStep


def open_model(spec: str) -> Model:
    """Opens a model.

    Raises:
      ValueError, OSError: it cannot be had, or its tokenizer has more tokens than it.
    """
    source = resolve(spec, what="model")
    constants, tokenizer = read_config(source.fetch("config.json")), load_tokenizer(source)
    check_vocabulary(tokenizer, constants.vocab_size)
    return Model(source, constants, tokenizer)


def open_sources(asked: Asked) -> Sources:
    """Opens a model and SAEs and refuses what does not fit, before any weights are read.

    Raises:
      ValueError, OSError: what does not fit, or cannot be had.
    """
    mesh = local_mesh(asked.mesh)
    (model, constants, tokenizer), sae = open_model(asked.model), resolve(asked.sae, what="sae")
    if mesh is not None:
        parameter_shapes(constants, mesh=mesh)
    opened = {layer: open_sae(sae, layer) for layer in chosen_layers(asked.layers, sae)}
    saes = {layer: settle(str(one.path), one.facts, k=asked.k) for layer, one in opened.items()}
    for layer, one in saes.items():
        check_sae(constants, layer, one)
    files = {layer: one.path for layer, one in opened.items()}
    return Sources(model, sae, constants, tokenizer, files, saes, asked.k, mesh)


def load(sources: Sources, precision: Precision) -> Loaded:
    """Loads what `open_sources` found.

    Raises:
      FormatError, OSError: weights that cannot be read.
    """
    dtype, contract = ARITHMETIC[precision]
    backbone = load_backbone(sources.model, dtype=dtype, mesh=sources.mesh)
    encoders = load_encoders(sources.sae, sources.saes, k=sources.k, dtype=dtype, mesh=sources.mesh)
    return Loaded(backbone, encoders, make_extract_step(backbone.config, tuple(sources.saes), contract=contract))


def load_encoders(source: Source, layers: Iterable[int], **options: Any) -> Encoders:
    """Loads SAEs one by one and lets go of each decoder before the next; `options` as for `load_sae`."""
    found = Encoders({}, {})
    for layer in layers:
        sae = load_sae(source, layer, **options)
        found.row_norms[layer] = row_norms_of(sae)
        found.saes[layer] = without_decoder(sae)
        del sae
    return found


def chosen_layers(layers: tuple[int, ...], sae: Source) -> tuple[int, ...]:
    """The layers that are asked for, or all of the source, ascending.

    Raises:
      ValueError: none, or one twice.
    """
    layers = tuple(sorted(layers)) or layers_of(sae)
    if len(set(layers)) != len(layers):
        raise ValueError(f"--layers {' '.join(map(str, layers))}: a layer is named twice")
    if not layers:
        raise ValueError(f"{sae}: no file is called like layer3.sae.pt; name the folder of SAEs, or give --layers")
    return layers


def batch_positions(asked: int | None, data: int = 1) -> int:
    """Positions per batch: as asked, or 4,096 on a CPU and 16,384 elsewhere for each part of the mesh's DATA."""
    return asked or data * _BATCH_TOKENS[jax.default_backend() == "cpu"]
