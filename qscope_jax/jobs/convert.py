"""`qscope convert`: SAE files from one layout to another, one layer at a time.

A file is there whole or not at all, and a rerun keeps what is complete. Storing fewer bits changes features: for every
layer converted to another dtype the command prints what share of the active indices stays, and the FVU on both sides.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from qscope_jax.backbone.forward import check_tokens, forward
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.inputs import SHIPPED_TEXTS
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract import check_sae
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.run import Run
from qscope_jax.sae.formats import FormatError, layers_of, open_sae, read_back, read_sae, sae_sha256, save_sae
from qscope_jax.sae.formats.facts import settle
from qscope_jax.sae.formats.find import layer_file_name
from qscope_jax.sae.model import Sae, SaeConfig
from qscope_jax.sae.quality import sink_threshold
from qscope_jax.sae.rounding import cast_sae, make_rounding_cost, synthetic_vectors

_TOKENS = 64  # of each text


@dataclasses.dataclass(frozen=True)
class Config:
    """Convert SAE files between layouts."""

    source: tyro.conf.Positional[str]
    """SAEs: "demo" (embedded), a folder, a file, owner/name[@revision] on the hub, or a remote folder."""
    to: Literal["safetensors", "qwen-scope", "saelens", "sparsify"]
    """Layout to write: native safetensors, the release's layer{n}.sae.pt for torch, SAELens or sparsify folders."""
    out: Path
    """Folder of the results; folders appear in it as layer{n}/ (SAELens) or layers.{n}/ (sparsify)."""
    layers: tuple[int, ...] = ()
    """Layers to convert; all by default."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the written weights; by default as they are stored."""
    k: int | None = None
    """Active latents per token, where neither config.json nor the set's name says it, or against them."""
    model: str | None = None
    """Backbone that judges a change of dtype on the shipped texts; by default synthetic vectors do."""
    vectors: int = 256
    """Number of vectors on which it is judged."""
    seed: int = 0
    """Seed that makes or chooses them."""


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: the source cannot be read, or --out holds other SAEs; no file is left half done.
      Interrupted: SIGTERM or SIGINT came; every finished layer is kept.
    """
    source = resolve(config.source, what="sae")
    layers = config.layers or layers_of(source) or (None,)
    with Run("convert", config, config.out, total=len(layers), resumes=True) as job:
        earlier = job.earlier.get("layers", {})
        job.record(source={"name": source.name, "revision": source.revision})
        judge = _Judge(config)
        if config.dtype:
            print(f"What {config.dtype} costs is measured on {judge.what}.")
        for done, layer in enumerate(layers):
            if job.stopping:
                raise job.interrupted(f"{done} of {len(layers)} layers are converted")
            name, facts, kept = _convert(config, job.out, judge, source, layer)
            facts = {**earlier.get(name, {}), **facts} if kept else facts
            print(f"{name}: {_in_words(facts)}{', kept from an earlier run' if kept else ''}", flush=True)
            job.record(layers={name: facts})
            job.progress(layers=int(not kept), already=int(kept))
            job.publish()


def _convert(
    config: Config, out: Path, judge: "_Judge", source: Source, layer: int | None
) -> tuple[str, dict[str, Any], bool]:
    """Converts one layer, or finds it done: the name of the file, what the manifest says of it, and which it was."""
    opened = open_sae(source, layer)
    expected = settle(str(opened.path), opened.facts, k=config.k)
    if expected.layer is None:
        raise FormatError(f"{opened.path}: its layer is unknown; name the file layer{{n}}.sae.pt, or give --layers")
    name = layer_file_name(config.to, expected.layer)
    path = out / name
    dtype = config.dtype or opened.stored.w_enc.array.dtype.name
    if path.exists() and _is_complete(path, expected, dtype):
        wanted = cast_sae(read_sae(opened, k=config.k, dtype=None), dtype)
        _check_same_weights(path, read_back(wanted, format=config.to))
        return name, {"dtype": dtype, "bytes": path.stat().st_size}, True
    sae = read_sae(opened, k=config.k, dtype=None)
    facts: dict[str, Any] = {"dtype": dtype}
    if sae.params.w_enc.dtype.name != dtype:
        rounded = cast_sae(sae, dtype)
        facts["cost"] = {**judge.cost(sae, rounded, judge.vectors(sae)), "on": judge.what}
        sae = rounded
    save_sae(sae, path.parent, format=config.to)
    return name, {**facts, "bytes": path.stat().st_size, "sha256": sae_sha256(read_back(sae, format=config.to))}, False


def _check_same_weights(path: Path, wanted: Sae) -> None:
    """Refuses to keep a file that another set of the same name and shape left behind."""
    there = read_sae(open_sae(path), k=wanted.config.k, dtype=None)
    if sae_sha256(there) != sae_sha256(wanted):
        raise FormatError(f"{path} is there and holds other weights; choose another --out or delete it")


class _Judge:
    """The vectors on which an SAE and its rounded self are compared, and what to call them."""

    def __init__(self, config: Config):
        self.config, self.cost = config, make_rounding_cost()
        self.what = (
            f"{config.vectors} synthetic vectors (seed {config.seed}): sums of the SAE's own decoder rows, b_dec "
        )
        self.what += "and noise, not text (give --model to judge on text)"
        if config.model is not None:
            self.what = (
                f"{config.vectors} residual vectors of the shipped texts through {config.model} (seed {config.seed})"
            )

    def vectors(self, sae: Sae) -> np.ndarray:
        """Float32 vectors [n, d] of the SAE's layer; tokens of enormous norm are left out, as in all statistics."""
        if self.config.model is None:
            return synthetic_vectors(sae, self.config.vectors, seed=self.config.seed)
        backbone, captured = self.captured
        layer = sae.config.layer
        assert layer is not None  # `_convert` has refused the others
        check_sae(backbone.config, layer, sae.config)
        x = captured[layer]
        norms = np.linalg.norm(x, axis=-1)
        x = x[norms <= (sae.config.sink_threshold or sink_threshold(norms))]
        return np.random.default_rng(self.config.seed).permutation(x)[: self.config.vectors]

    @functools.cached_property
    def captured(self) -> tuple[Backbone, np.ndarray]:
        """The backbone and its residual stream [layer, n, d] at the real tokens of some shipped texts."""
        assert self.config.model is not None
        backbone = load_backbone(self.config.model)
        texts = [json.loads(line)["text"] for line in SHIPPED_TEXTS.read_text(encoding="utf-8").splitlines()]
        encode_texts = make_encoder(load_tokenizer(self.config.model))
        # Twice as many tokens as vectors, from texts spread over all languages and registers.
        count = min(len(texts), max(1, 2 * self.config.vectors // _TOKENS))
        rows = [ids[:_TOKENS] for ids in encode_texts(texts[:: len(texts) // count])]
        mask = np.arange(_TOKENS) < np.array([len(row) for row in rows])[:, None]
        tokens = np.zeros(mask.shape, np.int32)
        tokens[mask] = np.concatenate(rows)
        check_tokens(tokens, backbone.config)
        every = tuple(range(backbone.config.num_layers))
        run = functools.partial(forward, capture=every, logits="none", stop_after=every[-1])
        output = jax.jit(run, static_argnums=1)(backbone.params, backbone.config, tokens, mask=mask)
        return backbone, np.asarray(output.captured, np.float32)[:, mask]


def _is_complete(path: Path, expected: SaeConfig, dtype: str) -> bool:
    """Whether a file of an earlier run is what this one would write. Writing is atomic, so it is whole."""
    try:
        opened = open_sae(path)
        found = settle(str(path), opened.facts)
    except FileNotFoundError:  # a folder that was cut off before its cfg.json
        return False
    theirs = {**dataclasses.asdict(found), "dtype": opened.stored.w_enc.array.dtype.name}
    ours = {**dataclasses.asdict(expected), "dtype": dtype}
    different = [f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in ours if theirs[key] != ours[key]]
    if different:
        raise FormatError(f"{path} is there and has {', '.join(different)}; choose another --out or delete it")
    return True


def _in_words(facts: dict[str, Any]) -> str:
    text = f"{facts['dtype']}, {facts['bytes'] / 1e6:,.1f} MB"
    if "cost" in facts:
        cost = facts["cost"]
        text += (
            f"; {cost['index_agreement']:.3%} of the active indices agree, "
            f"FVU {cost['fvu']:.4f} -> {cost['fvu_rounded']:.4f}"
        )
    return text
