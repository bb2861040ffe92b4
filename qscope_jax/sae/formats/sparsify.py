"""EleutherAI sparsify folders: `{hookpoint}/cfg.json` beside `sae.safetensors`; the folder's name is the hook.

    theirs: a = topk_k(relu((x - b_dec) @ w_enc + b)),    ours: a = relu(topk_k(x @ w_enc + b_enc)),
    b_enc = b - b_dec @ w_enc

ReLU before or after TopK gives the same positive values. The biases are folded in float64 and rounded once: to the
type of the file on the way out, to the loaded one on the way in, by at most half a unit in the last place each time.
Where b_dec @ w_enc is large, b has a coarser last place than b_enc: what is read back differs from what was written,
always in the same way (see `read_back`), and visibly so in bfloat16.
"""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qscope_jax.files.atomic import write_json
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.mesh import to_host
from qscope_jax.sae.formats.facts import Facts, layer_of_folder
from qscope_jax.sae.formats.json_file import read_json
from qscope_jax.sae.formats.matrices import StoredSae, check_matrices
from qscope_jax.sae.formats.stored import StoredTensor
from qscope_jax.sae.model import Sae

WEIGHTS, CONFIG = "sae.safetensors", "cfg.json"
_OURS = "qscope"  # the key of what sparsify has no place for; its loader drops keys that it does not know
_NAMES = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
# What a setting must be; sparsify takes the same where the file is silent.
_REQUIRED: dict[str, Any] = {
    "activation": "topk",
    "multi_topk": False,
    "transcode": False,
    "skip_connection": False,
    "signed": False,
}
_OTHER_HOOK = re.compile(r"(?:layers|blocks|h)\.\d+\..+|embed_tokens|wte")
_CHUNK = 1024  # rows of a matrix at once


def read(path: Path) -> StoredSae:
    """The SAE in a sparsify folder, from the path of its weights; not yet read, and not yet folded (see `folded`).

    Raises:
      FormatError: settings that mean another computation or loss, each named; see also `check_matrices`.
    """
    facts = read_facts(path.with_name(CONFIG))
    file = open_tensors(path)
    tensors = {_NAMES.get(name, name): StoredTensor(file.array(name)) for name in file.names}
    stored = check_matrices(str(path), tensors, "sparsify")
    for field in ("d_model", "d_sae"):
        said, found = getattr(facts, field), getattr(stored.facts, field)
        if said != found:
            raise FormatError(
                f"{path}: {field} is {found}, {CONFIG} beside it says {said}; they belong to different SAEs"
            )
    return stored._replace(facts=facts, centred=True)


def read_facts(path: Path) -> Facts:
    """What a cfg.json and the name of its folder say, after refusing settings that we do not compute.

    Raises:
      FormatError: see `read`.
    """
    content = read_json(path)
    wrong = [
        f"{key} must be {expected!r}, found {content[key]!r}"
        for key, expected in _REQUIRED.items()
        if content.get(key, expected) != expected
    ]
    if wrong:
        raise FormatError(f"{path}: not a plain TopK SAE of one vector: {'; '.join(wrong)}")
    for key in ("d_in", "k"):
        if type(content.get(key)) is not int:
            raise FormatError(f"{path}: {key!r} must be an integer, found {content.get(key)!r}")
    hook, known = path.parent.name, content.get(_OURS, {})
    if not isinstance(known, dict):
        raise FormatError(f"{path}: {_OURS!r} must be an object, found {type(known).__name__}")
    said, named = known.get("layer"), layer_of_folder(hook)
    if None not in (said, named) and said != named:
        raise FormatError(f"{path}: it says layer {said!r}, but its folder is called {hook!r}; rename one of them")
    return Facts(
        origin=f"{hook}/{path.name}",
        d_model=content["d_in"],
        d_sae=content.get("num_latents") or content["d_in"] * content.get("expansion_factor", 0),
        k=content["k"],
        layer=said if named is None else named,
        **{key: known.get(key) for key in ("backbone", "source", "sink_threshold")},
    )


def check_hook(where: str, folder: str) -> None:
    """Refuses the SAE in a folder that is named after another hook than the output of a decoder layer.

    Raises:
      FormatError: it is.
    """
    if is_other_hook(folder):
        raise FormatError(f"{where}: the hook is {folder!r}; only the output of a decoder layer is supported")


def is_other_hook(folder: str) -> bool:
    """Whether a folder is named after a module that is not a whole decoder layer: `layers.10.mlp`, `embed_tokens`."""
    return layer_of_folder(folder) is None and _OTHER_HOOK.fullmatch(folder) is not None


def folded(stored: StoredSae) -> StoredSae:
    """The same SAE for an encoder that subtracts nothing: b_enc is b - b_dec @ w_enc, in float64. Reads `w_enc`."""
    shift = _shift(stored.w_enc.array, stored.b_dec.array)
    b_enc = stored.b_enc.array.astype(np.float64) - shift
    return stored._replace(b_enc=StoredTensor(b_enc), centred=False)


def write(sae: Sae, path: Path) -> None:
    """Writes a sparsify folder, given by the path of its weights, that `sparsify.Sae.load_from_disk` reads.

    The old cfg.json goes first and the new one comes last: a folder with both files is always of one SAE.

    Raises:
      FormatError: the folded bias does not fit into the SAE's dtype.
    """
    named, layer = layer_of_folder(path.parent.name), sae.config.layer
    if None not in (named, layer) and named != layer:
        raise FormatError(f"{path}: the folder of layer {named} cannot hold the SAE of layer {layer}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(CONFIG).unlink(missing_ok=True)
    config, params = sae.config, jax.tree.map(np.asarray, sae.params)
    arrays = {
        "encoder.weight": params.w_enc.T,
        "encoder.bias": _their_bias(str(path), params),
        "W_dec": params.w_dec,
        "b_dec": params.b_dec,
    }
    write_tensors(path, arrays)
    known = {key: getattr(config, key) for key in ("layer", "backbone", "source", "sink_threshold")}
    content = {
        "activation": "topk",
        "expansion_factor": config.d_sae // config.d_model,
        "normalize_decoder": False,
        "num_latents": config.d_sae,
        "k": config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": config.d_model,
        _OURS: {key: value for key, value in known.items() if value is not None},
    }
    write_json(path.with_name(CONFIG), content)


def read_back(sae: Sae) -> Sae:
    """The SAE that reading gives after writing, on the host: the same but for roundings of `b_enc`."""
    params = jax.tree.map(to_host, sae.params)
    b_enc = _their_bias("the SAE", params).astype(np.float64) - _shift(params.w_enc, params.b_dec)
    return Sae(params._replace(b_enc=b_enc.astype(params.b_enc.dtype)), sae.config)


def _their_bias(where: str, params: Any) -> np.ndarray:
    exact = params.b_enc.astype(np.float64) + _shift(params.w_enc, params.b_dec)
    with np.errstate(over="ignore"):
        bias = exact.astype(params.b_enc.dtype)
    if np.isfinite(exact).all() and not np.isfinite(bias.astype(np.float64)).all():
        raise FormatError(f"{where}: b_enc + b_dec @ w_enc does not fit into {bias.dtype}; write it as bfloat16")
    return bias


def _shift(w_enc: np.ndarray, b_dec: np.ndarray) -> np.ndarray:
    """b_dec @ w_enc as float64 [f], the same to the bit whatever the memory layout of `w_enc` [d, f] is."""
    b_dec, rows = b_dec.astype(np.float64), w_enc.T
    with np.errstate(invalid="ignore", over="ignore"):  # weights that are not finite are for the reader to judge
        parts = [
            np.sum(np.ascontiguousarray(rows[start : start + _CHUNK]).astype(np.float64) * b_dec, axis=1)
            for start in range(0, len(rows), _CHUNK)
        ]
    return np.concatenate(parts)
