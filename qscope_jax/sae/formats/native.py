"""Our own files: `layer{n}.sae.safetensors`, the release's tensor names and shapes, k and origin in the metadata.

Metadata: format, version, k, layer, hook, backbone, source, sink_threshold, and SHA-256 of every tensor, so that
damage is noticed on loading; `sha256` names the SAE as a whole, whatever file it lies in.
"""

import hashlib
from pathlib import Path

import numpy as np

from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.sae.formats.facts import Facts
from qscope_jax.sae.formats.matrices import KEYS, StoredSae, check_matrices
from qscope_jax.sae.formats.qwen_scope import release_arrays
from qscope_jax.sae.formats.set_config import FORMAT, HOOK
from qscope_jax.sae.formats.stored import Checksum, StoredTensor, sha256_of
from qscope_jax.sae.model import Sae

ENDING = ".sae.safetensors"
_VERSION = "1"


def read(path: Path) -> StoredSae:
    """The SAE in a native file, not yet read. Files of the same tensors without our metadata are read too.

    Raises:
      FormatError: see `open_tensors` and `check_matrices`; also metadata of another version or type.
    """
    file = open_tensors(path)
    known = file.metadata if file.metadata.get("format") == FORMAT else {}
    if known and known.get("version") != _VERSION:
        raise FormatError(f"{path}: version {known.get('version')!r}, expected {_VERSION!r}; use a newer qscope-jax")
    tensors = {
        name: StoredTensor(
            file.array(name), Checksum("sha256", known[key]) if (key := f"sha256.{name}") in known else None
        )
        for name in file.names
    }
    stored = check_matrices(str(path), tensors, "release")
    return stored._replace(facts=_facts(path, known, stored.facts)) if known else stored


def write(sae: Sae, path: Path) -> None:
    """Writes a native file with everything that is known of the SAE."""
    arrays, config = release_arrays(sae.params), sae.config
    digests = {name: sha256_of(array) for name, array in arrays.items()}
    known = {
        "format": FORMAT,
        "version": _VERSION,
        "hook": HOOK,
        "k": config.k,
        "layer": config.layer,
        "backbone": config.backbone,
        "source": config.source,
        "sink_threshold": config.sink_threshold,
        "sha256": _combined(arrays, digests),
        **{f"sha256.{name}": digest for name, digest in digests.items()},
    }
    write_tensors(path, arrays, {key: str(value) for key, value in known.items() if value is not None})


def sae_sha256(sae: Sae) -> str:
    """The name of an SAE by its content: SHA-256 over its tensors as the release stores them, dtype included.

    It is the same for every file format, and differs between float32 and bfloat16.
    """
    arrays = release_arrays(sae.params)
    return _combined(arrays, {name: sha256_of(array) for name, array in arrays.items()})


def _combined(arrays: dict[str, np.ndarray], digests: dict[str, str]) -> str:
    lines = [f"{name} {arrays[name].dtype} {arrays[name].shape} {digests[name]}\n" for name in KEYS]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _facts(path: Path, known: dict[str, str], tensors: Facts) -> Facts:
    if known.get("hook", HOOK) != HOOK:
        raise FormatError(f"{path}: the hook is {known['hook']!r}; only {HOOK!r} is supported")
    try:
        return tensors._replace(
            origin=f"the file {path.name}",
            k=int(known["k"]) if "k" in known else None,
            layer=int(known["layer"]) if "layer" in known else None,
            sink_threshold=float(known["sink_threshold"]) if "sink_threshold" in known else None,
            backbone=known.get("backbone"),
            source=known.get("source"),
        )
    except ValueError as error:
        raise FormatError(f"{path}: damaged metadata ({error}); write or download the file again") from None
