"""Finds the constants and every tensor of a model in the files of a source, whatever dialect they are written in.

Whatever does not fit (unknown, missing, duplicate, misshapen, of two dialects) is reported together, before anything
loads.
"""

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from qscope_jax.backbone.config import ModelConfig, Precision, read_config
from qscope_jax.backbone.config_reader import Reader, read_object, unique_keys
from qscope_jax.backbone.tables import HEAD_NAME, Dialect, Tensor, checkpoint_tensors
from qscope_jax.files.source import Source
from qscope_jax.files.tensors import TensorFile, open_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("bfloat16", "float16", "float32")
# The other parts of a multimodal Qwen3.5 release: speculative decoding and the image encoder.
_OTHER_PARTS = re.compile(r"mtp\.|model\.visual\.")


class CheckpointError(ValueError):
    """A checkpoint that does not hold exactly the tensors of its config; the message lists every difference."""


def find_config(place: Source, *, precision: Precision = "highest") -> ModelConfig:
    """The constants of config.json, with the ids that end a text as `transformers` finds them.

    Where there is a generation_config.json it alone decides these, even where it names none.

    Raises:
      ConfigError: see `read_config`; or generation_config.json names something else than ids.
      SourceError: a file cannot be had.
    """
    config = read_config(place.fetch("config.json"), precision=precision)
    if not place.has("generation_config.json"):
        return config
    path = place.fetch("generation_config.json")
    said = read_object(path)
    reader = Reader(said, said, config.model_type, str(path))
    ids = reader.eos()
    reader.raise_faults()
    return dataclasses.replace(config, eos_token_ids=ids)


def find_tensors(place: Source, config: ModelConfig) -> tuple[list[Tensor], dict[str, TensorFile]]:
    """The tensors of the model under the names the files use, and the file of each.

    Raises:
      CheckpointError: everything that does not fit.
    """
    faults: list[str] = []
    files: dict[str, TensorFile] = {}
    for file in _open_files(place, faults):
        for name in file.names:
            if config.hybrid and _OTHER_PARTS.match(name):
                continue
            if name in files:
                faults.append(f"{name} stands in both {files[name].path.name} and {file.path.name}")
            files[name] = file
    tensors = checkpoint_tensors(config, _dialect(files, config, faults))
    wanted = {tensor.name: tensor for tensor in tensors}
    known = wanted.keys() | ({HEAD_NAME} if config.tie_word_embeddings else set())
    faults += [f"{name} is unknown to a {config.model_type} model" for name in sorted(files.keys() - known)]
    faults += [f"{name} is missing" for name in wanted if name not in files]
    for name in (name for name in wanted if name in files):
        info = files[name].info(name)
        if info.shape != wanted[name].stored_shape:
            faults.append(f"{name} has shape {info.shape}, config.json implies {wanted[name].stored_shape}")
        if info.dtype.name not in _FLOATS:
            faults.append(f"{name} holds {info.dtype.name}, expected one of {', '.join(_FLOATS)}")
    if not faults and config.tie_word_embeddings and HEAD_NAME in files:
        faults += _check_tied(files, tensors[0].name)
    if faults:
        listed = "\n  ".join(faults[:40] + ([f"… and {len(faults) - 40} more"] if len(faults) > 40 else []))
        raise CheckpointError(f"{place}: the checkpoint does not fit its config.json:\n  {listed}")
    return tensors, files


def _dialect(names: Mapping[str, TensorFile], config: ModelConfig, faults: list[str]) -> Dialect:
    """How the names are written; two ways at once are a fault."""
    nested, plain = "model.language_model.", "model."
    has_nested = config.hybrid and any(name.startswith(nested) for name in names)
    has_plain = any(name.startswith(plain) and not (config.hybrid and name.startswith(nested)) for name in names)
    if has_nested and has_plain:
        faults.append(f"some names begin with {nested!r} and others with {plain!r}: two checkpoints are mixed")
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in names)
    single = any(re.search(r"mlp\.experts\.\d+\.", name) for name in names)
    if fused and single:
        faults.append("experts are stored both fused (experts.gate_up_proj) and one by one (experts.0.gate_proj)")
    return Dialect(nested if has_nested else plain, fused)


def _open_files(place: Source, faults: list[str]) -> Iterator[TensorFile]:
    """Opens the single file, or every shard that the index names and checks the index against them."""
    if place.has(SINGLE):
        yield open_tensors(place.fetch(SINGLE))
        return
    if not place.has(INDEX):
        found = ", ".join(n for n in place.names() if n.endswith((".bin", ".pt", ".safetensors", ".gguf"))) or "none"
        raise CheckpointError(f"{place}: expected {SINGLE} or {INDEX}, found weight files: {found}")
    weight_map = _read_index(place.fetch(INDEX))
    for shard in sorted(set(weight_map.values())):
        if not place.has(shard):
            faults.append(f"{INDEX} names the shard {shard}, which is missing")
            continue
        file = open_tensors(place.fetch(shard))
        promised = {name for name, where in weight_map.items() if where == shard}
        faults += [
            f"{name} should be in {shard} by the index, but is not" for name in sorted(promised - set(file.names))
        ]
        faults += [f"{name} is in {shard} but not in the index" for name in sorted(set(file.names) - weight_map.keys())]
        yield file


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)["weight_map"]
        if not all(isinstance(shard, str) and shard.endswith(".safetensors") for shard in weight_map.values()):
            raise ValueError("weight_map must map tensor names to .safetensors files")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors index ({error})") from None
    return weight_map


def _check_tied(files: Mapping[str, TensorFile], embed: str) -> list[str]:
    head, table = files[HEAD_NAME].array(HEAD_NAME), files[embed].array(embed)
    if head.shape == table.shape and np.array_equal(head, table):
        return []
    return [f"{HEAD_NAME} differs from {embed}, although config.json says tie_word_embeddings; set it to false"]
