"""SAE files, in and out: one small module per file format, one way in (`load_sae`) and one way out (`save_sae`).

A format turns a file into `StoredSae`: mapped tensors and what the file says. Names, config.json and tensors must agree
before a byte of weights is read. A new format is a module with `read` and `write`, and a line in the tables below.
"""

import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding

from qscope_jax.files.recognise import FormatError
from qscope_jax.files.source import Source, resolve
from qscope_jax.mesh import MeshError, on_first_process, sharding, spans_processes, to_host
from qscope_jax.sae.formats import native, qwen_scope, saelens, sparsify
from qscope_jax.sae.formats.facts import Facts, facts_of_name, overruled, settle
from qscope_jax.sae.formats.find import Format, SaeFile, choose, layer_file_name, sae_files
from qscope_jax.sae.formats.matrices import StoredSae
from qscope_jax.sae.formats.native import sae_sha256
from qscope_jax.sae.formats.set_config import read_set_config, update_set_config
from qscope_jax.sae.formats.stored import as_dtype, place
from qscope_jax.sae.model import AXES, Sae, SaeConfig, SaeParams
from qscope_jax.sae.release import parse_name

__all__ = [
    "FormatError",
    "OpenSae",
    "layers_of",
    "load_sae",
    "load_saes",
    "open_sae",
    "read_back",
    "sae_sha256",
    "save_sae",
]

_MODULES = {"safetensors": native, "qwen-scope": qwen_scope, "saelens": saelens, "sparsify": sparsify}
_FOLDERS = {"saelens": saelens, "sparsify": sparsify}  # formats whose weights lie in a folder of their own


class OpenSae(NamedTuple):
    """One SAE of a source before its weights are read: where it lies, its mapped tensors, and what is said of it."""

    path: Path
    file: SaeFile
    stored: StoredSae
    facts: tuple[Facts, ...]


def load_sae(
    source: str | os.PathLike[str] | Source,
    layer: int | None = None,
    *,
    k: int | None = None,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Sae:
    """Loads the SAE of one layer from any supported file, reading (and downloading) that layer's file only.

    Args:
      source: "demo", a folder, one file, `owner/name[@revision]` on the hub, a remote folder, or a resolved `Source`.
      layer: 0-based decoder layer; may be left out where the source holds one SAE.
      k: overrules what config.json, metadata or the set's name say, with a warning; needed where none of them speaks.
      dtype: of the parameters, "float32", "bfloat16" or "float16"; None keeps what the file holds.
      mesh: lays latents over "model" (see `qscope_jax.mesh`); a process then reads the slices of its own devices only.
        None is the default device.
      allow_nonfinite: accept NaN and infinite weights.

    Raises:
      FormatError: the file is damaged, hostile or of another kind; or names, config.json and tensors disagree; or k is
        unknown; or the layer is not there; or weights are not finite. The message says what was expected and found.
      SourceError: the source or a file of it cannot be had (see `qscope_jax.files.source`).
      MeshError: the mesh does not divide the number of latents.
    """
    return read_sae(open_sae(source, layer), k=k, dtype=dtype, mesh=mesh, allow_nonfinite=allow_nonfinite)


def load_saes(
    source: str | os.PathLike[str] | Source, layers: Iterable[int] | None = None, **options: Any
) -> dict[int, Sae]:
    """Loads the SAEs of several layers, all of the source by default, as {layer: Sae}. `options` as for `load_sae`.

    Raises:
      FormatError, SourceError: see `load_sae`.
    """
    source = source if isinstance(source, Source) else resolve(source, what="sae")
    wanted = layers_of(source) if layers is None else tuple(layers)
    return {layer: load_sae(source, layer, **options) for layer in wanted}


def layers_of(source: str | os.PathLike[str] | Source) -> tuple[int, ...]:
    """The layers for which a source holds an SAE, ascending, from file names alone.

    Raises:
      FormatError, SourceError: see `load_sae`.
    """
    source = source if isinstance(source, Source) else resolve(source, what="sae")
    return tuple(sorted({file.layer for file in sae_files(source) if file.layer is not None}))


def open_sae(source: str | os.PathLike[str] | Source, layer: int | None = None) -> OpenSae:
    """Finds and opens the SAE of one layer and gathers what is said of it, without reading weights.

    Raises:
      FormatError, SourceError: see `load_sae`; disagreements are found by `settle`, not here.
    """
    if layer is not None and (isinstance(layer, bool) or layer < 0):
        raise FormatError(f"layer {layer!r}: expected a layer number, counted from 0")
    source = source if isinstance(source, Source) else resolve(source, what="sae")
    file = choose(source, layer)
    if file.format in _FOLDERS and not source.file:
        source.fetch(str(Path(file.name).with_name(_FOLDERS[file.format].CONFIG)))
    if file.format == "sparsify":
        sparsify.check_hook(str(source), Path(file.name).parent.name or source.name)
    path = source.fetch(file.name)
    stored = _MODULES[file.format].read(path)
    said = file.layer if file.layer is not None else stored.facts.layer
    facts = [
        *_config_facts(source, path, file, layer if said is None else said),
        stored.facts,
        Facts(f"the name of the file {path.name}", layer=file.layer),
        Facts("the layer asked for", layer=layer),
        Facts("the source", source=_provenance(source)),
    ]
    if (name := parse_name(source.name) or parse_name(path.name)) is not None:
        facts.append(facts_of_name(name))
    return OpenSae(path, file, stored, tuple(facts))


def read_sae(
    opened: OpenSae,
    *,
    k: int | None = None,
    dtype: str | None = "float32",
    mesh: Mesh | None = None,
    allow_nonfinite: bool = False,
) -> Sae:
    """Reads the weights of an opened SAE once, checking them on the way; options and errors as for `load_sae`."""
    kind = None if dtype is None else as_dtype(dtype)
    config = settle(str(opened.path), opened.facts, k=k)
    if k is not None and (others := overruled(opened.facts, k)):
        warnings.warn(f"{opened.path}: using k = {k} as given; {others}", stacklevel=3)
    shardings = _shardings(opened, mesh)
    arrays, tensors = {}, sparsify.folded(opened.stored) if opened.stored.centred else opened.stored
    for name in ("w_enc", "w_dec", "b_dec", "b_enc"):  # what is wrong with the others shows in a folded b_enc
        stored, where = getattr(tensors, name), f"{opened.path}: {name}"
        options = {"where": where, "allow_nonfinite": allow_nonfinite, "sharding": shardings.get(name)}
        arrays[name] = place(stored, kind or getattr(opened.stored, name).array.dtype, **options)
    return Sae(SaeParams(**arrays), config)


def save_sae(sae: Sae, path: str | os.PathLike[str], *, format: Format = "safetensors") -> Path:
    """Writes one SAE, whole or not at all, and reads it back; returns the path of the file with its weights.

    An SAE on a mesh is gathered, one tensor after the other. If it spans processes, all of them call this, the first
    writes, and all return or fail together.

    Args:
      sae: the SAE; its dtype is kept.
      path: a folder, in which the file is named after the layer and config.json is kept up to date; or, for
        "safetensors" and "qwen-scope", a file name that ends in .safetensors or .pt. For "saelens" and "sparsify"
        always the folder of this one SAE; sparsify knows the layer by its name, `layers.{n}`.
      format: "safetensors" (native), "qwen-scope" (the release's, for torch), "saelens", or "sparsify" (which rounds
        `b_enc`: see `read_back`).

    Raises:
      ValueError: an unknown format, or a folder for an SAE whose layer is unknown.
      FormatError: the folder's config.json describes other SAEs; non-float dtypes.
      OSError: what was read back differs, or the disk is full. Files that were there before are then untouched.
    """
    if format not in _MODULES:
        raise ValueError(f"format {format!r}: expected one of {', '.join(_MODULES)}")
    file, in_set = _file_of(sae.config, Path(path), format)
    whole = jax.tree.map(to_host, sae)

    def write():
        if in_set:
            update_set_config(file.parent, sae.config)
        _MODULES[format].write(whole, file)

    if spans_processes(sae.params.w_enc):
        on_first_process(write)
    else:
        write()
    return file


def read_back(sae: Sae, *, format: Format) -> Sae:
    """What loading an SAE gives after saving it in `format`: itself, but for sparsify's roundings of `b_enc`."""
    return sparsify.read_back(sae) if format == "sparsify" else sae


def _file_of(config: SaeConfig, path: Path, format: Format) -> tuple[Path, bool]:
    """The file that the weights go to, and whether the config.json beside it must speak of it."""
    if format in _FOLDERS:
        return path / _FOLDERS[format].WEIGHTS, False
    ending = ".pt" if format == "qwen-scope" else ".safetensors"
    if path.suffix == ending and not path.is_dir():
        return path, format == "qwen-scope"  # which has no place for k of its own
    if config.layer is None:
        raise ValueError(f"{path}: the SAE's layer is unknown; give a file name that ends in {ending}")
    return path / layer_file_name(format, config.layer), True


def _shardings(opened: OpenSae, mesh: Mesh | None) -> dict[str, NamedSharding]:
    """Where each tensor lies; empty without a mesh."""
    if mesh is None:
        return {}
    try:
        shapes = {name: getattr(opened.stored, name).array.shape for name in SaeParams._fields}
        return {name: sharding(AXES[name], shape, mesh) for name, shape in shapes.items()}
    except MeshError as error:
        raise MeshError(f"{opened.path}: {error}") from None


def _config_facts(source: Source, path: Path, file: SaeFile, layer: int | None) -> list[Facts]:
    """What a config.json says. Beside a single file it may be anybody's, and then says nothing."""
    if file.format in _FOLDERS:
        return []
    if source.file:
        beside = path.with_name("config.json")
        config = read_set_config(beside, foreign_ok=True) if beside.is_file() else None
    else:
        config = read_set_config(source.fetch("config.json")) if source.has("config.json") else None
    return [config.facts(layer)] if config else []


def _provenance(source: Source) -> str:
    """Where an SAE came from, without this machine's folders: a repository at its commit, or a folder's name."""
    name = source.spec.removeprefix("hf://").split("@")[0] if source.kind == "hub" else source.name
    if source.revision:
        return f"{name}@{source.revision}"
    return f"{name}/{source.file}" if source.file else name
