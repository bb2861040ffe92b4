"""SAELens folders (version 6): cfg.json beside sae_weights.safetensors with W_enc (d_sae last) and W_dec (d_sae first).

Only SAEs that compute what ours compute are read: architecture "topk", no decoder bias subtracted from the input, no
normalisation, no rescaling by decoder norms, at the output of a decoder layer.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.files.atomic import write_json
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.sae.formats.facts import Facts
from qscope_jax.sae.formats.json_file import read_json
from qscope_jax.sae.formats.matrices import StoredSae, check_matrices
from qscope_jax.sae.formats.stored import StoredTensor
from qscope_jax.sae.model import Sae

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
_VERSION = "6.54.12"  # whose loader these files are written for
# What a setting must be, and what SAELens takes where the file is silent.
_REQUIRED: dict[str, tuple[Any, Any]] = {
    "architecture": ("topk", "standard"),
    "apply_b_dec_to_input": (False, True),
    "normalize_activations": ("none", "none"),
    "reshape_activations": ("none", "none"),
    "rescale_acts_by_decoder_norm": (False, False),
}
_HOOKS = (re.compile(r"blocks\.(\d{1,4})\.hook_resid_post"), re.compile(r"model\.layers\.(\d{1,4})"))


def read(path: Path) -> StoredSae:
    """The SAE in a SAELens folder, from the path of its weights; not yet read.

    Raises:
      FormatError: settings that mean another computation, each named; a wrong hook; see also `check_matrices`.
    """
    facts = read_facts(path.with_name(CONFIG))
    file = open_tensors(path)
    tensors = {name: StoredTensor(file.array(name)) for name in file.names}
    stored = check_matrices(str(path), tensors, "saelens")
    for field in ("d_model", "d_sae"):
        said, found = getattr(facts, field), getattr(stored.facts, field)
        if said != found:
            raise FormatError(
                f"{path}: {field} is {found}, {CONFIG} beside it says {said}; they belong to different SAEs"
            )
    return stored._replace(facts=facts)


def read_facts(path: Path) -> Facts:
    """What a cfg.json says, after refusing settings that we do not compute.

    Raises:
      FormatError: see `read`.
    """
    content = read_json(path)
    wrong = []
    for key, (expected, default) in _REQUIRED.items():
        found = content.get(key, default)
        if found != expected:
            silent = "" if key in content else " (SAELens's default where it is not stated)"
            wrong.append(f"{key} must be {expected!r}, found {found!r}{silent}")
    if wrong:
        raise FormatError(f"{path}: this SAE computes something else than a Qwen-Scope SAE: {'; '.join(wrong)}")
    for key in ("d_in", "d_sae", "k"):
        if type(content.get(key)) is not int:
            raise FormatError(f"{path}: {key!r} must be an integer, found {content.get(key)!r}")
    metadata = content.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: 'metadata' must be an object, found {type(metadata).__name__}")
    threshold = metadata.get("sink_threshold")
    return Facts(
        origin=f"{path.parent.name}/{path.name}",
        d_model=content["d_in"],
        d_sae=content["d_sae"],
        k=content["k"],
        layer=_layer(path, metadata),
        backbone=_text(metadata.get("model_name")),
        source=_text(metadata.get("source")),
        sink_threshold=float(threshold) if isinstance(threshold, int | float) else None,
    )


def write(sae: Sae, path: Path) -> None:
    """Writes a SAELens folder, given by the path of its weights, that `sae_lens.SAE.load_from_disk` reads.

    The old cfg.json goes first and the new one comes last: a folder with both files is always of one SAE.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(CONFIG).unlink(missing_ok=True)
    params, config = sae.params, sae.config
    arrays = {name: np.asarray(array) for name, array in zip(("W_enc", "b_enc", "W_dec", "b_dec"), params, strict=True)}
    write_tensors(path, arrays)
    hooks = {}
    if config.layer is not None:
        hooks = {
            "hook_name": f"blocks.{config.layer}.hook_resid_post",
            "hf_hook_name": f"model.layers.{config.layer}",
        }
    known = {"model_name": config.backbone, "source": config.source, "sink_threshold": config.sink_threshold}
    content = {
        "architecture": "topk",
        "d_in": config.d_model,
        "d_sae": config.d_sae,
        "k": config.k,
        "dtype": str(params.w_enc.dtype),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            "sae_lens_version": _VERSION,
            "sae_lens_training_version": None,
            **hooks,
            "hook_head_index": None,
            "prepend_bos": False,
            **{key: value for key, value in known.items() if value is not None},
        },
    }
    write_json(path.with_name(CONFIG), content)


def _layer(path: Path, metadata: dict[str, Any]) -> int | None:
    names = [metadata.get("hook_name"), metadata.get("hf_hook_name")]
    layers = set()
    for name, pattern in zip(names, _HOOKS, strict=True):
        if name is None:
            continue
        found = pattern.fullmatch(name) if isinstance(name, str) else None
        if found is None:
            raise FormatError(f"{path}: the hook is {name!r}; only the output of a decoder layer is supported")
        layers.add(int(found[1]))
    if len(layers) > 1:
        raise FormatError(f"{path}: hook_name {names[0]!r} and hf_hook_name {names[1]!r} name different layers")
    return layers.pop() if layers else None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None
