"""`qscope info`: the released SAE sets, and what can be known of a model or SAE without loading it.

Shapes, dtypes and k come from names, config.json and headers. Weights are read (decoder norms, hash, NaN) only for the
layers asked for with --layers, for a single file, and where everything together is small.
"""

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tyro

from qscope_jax.files.atomic import write_json
from qscope_jax.files.source import Source, resolve
from qscope_jax.files.tensors import open_tensors
from qscope_jax.jobs.run import Run, plain
from qscope_jax.sae.formats import OpenSae, open_sae, read_sae, sae_sha256
from qscope_jax.sae.formats.facts import facts_of_name, origins_of, settle
from qscope_jax.sae.formats.find import SaeFile, sae_files
from qscope_jax.sae.formats.json_file import read_json
from qscope_jax.sae.formats.matrices import KEYS
from qscope_jax.sae.formats.stored import StoredTensor
from qscope_jax.sae.release import RELEASED, parse_name

_SMALL = 256 << 20  # bytes of weights that are read without being asked
_LOCAL = ("demo", "folder", "file")


@dataclasses.dataclass(frozen=True)
class Config:
    """Show the released SAE sets, or what is known of a model or SAE."""

    source: tyro.conf.Positional[str | None] = None
    """SAEs or a model: "demo", a folder, a file, owner/name[@revision], a remote folder. Without it: the release."""
    layers: tuple[int, ...] = ()
    """SAE layers whose weights to read (and, on the hub, to download): decoder norms, hash, NaN."""
    k: int | None = None
    """k of the SAEs, where nothing states it."""
    out: Path | None = None
    """Folder for info.json and manifest.json; by default nothing is written."""


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: the source cannot be had, or a file of it is damaged.
    """
    with Run("info", config, config.out) as job:
        if config.source is None:
            facts: dict[str, Any] = {"released": [_released_facts(row) for row in RELEASED]}
            print(release_table())
        else:
            facts = {what: _describe(config, resolve(config.source, what=what)) for what in _kinds(config.source)}
        if config.out is not None:
            write_json(job.out / "info.json", plain(facts))
            job.record(results=["info.json"])


def release_table() -> str:
    """The 14 released sets as a table for people."""
    head = ("repository (Qwen/...)", "trained on", "layers", "d_model", "latents", "x", "k", "MB/layer", "GB")
    rows = [
        (
            row.name,
            row.kind + (", MoE" if row.mixture_of_experts else ""),
            f"0..{row.layers - 1}",
            f"{row.d_model:,}",
            f"{row.d_sae:,}",
            str(row.expansion),
            str(row.k),
            f"{row.layer_bytes / 1e6:,.0f}",
            f"{row.repo_bytes / 1e9:,.1f}",
        )
        for row in RELEASED
    ]
    total = sum(row.repo_bytes for row in RELEASED) / 1e12
    notes = (
        f"{len(RELEASED)} sets, {sum(row.layers for row in RELEASED)} SAEs, {total:.2f} TB in float32; files "
        "layer{n}.sae.pt. The SAE of layer n reads the output of decoder layer n, before the final norm."
    )
    return f"{_table(head, rows, left=2)}\n\n{notes}"


def _released_facts(row) -> dict[str, Any]:
    derived = {"repo": row.repo, "kind": row.kind, "expansion": row.expansion}
    return {**derived, **row._asdict(), "layer_bytes": row.layer_bytes, "repo_bytes": row.repo_bytes}


def _kinds(spec: str) -> tuple[Any, ...]:
    """What a source is asked as: the embedded one is both a model and SAEs, any other shows by its files."""
    if spec == "demo":
        return ("model", "sae")
    source = resolve(spec, what="sae")
    return ("sae",) if sae_files(source) or parse_name(source.name) else ("model",)


def _describe(config: Config, source: Source) -> dict[str, Any]:
    facts = {"source": source.spec, "kind": source.kind, "name": source.name, "revision": source.revision}
    print("\n".join(_lines({key: value for key, value in facts.items() if value})))
    files = sae_files(source)
    if files or parse_name(source.name):
        return {**facts, **_describe_saes(config, source, files)}
    return {**facts, **_describe_model(source)}


def _describe_saes(config: Config, source: Source, files: list[SaeFile]) -> dict[str, Any]:
    facts: dict[str, Any] = {"files": [file.name for file in files]}
    known = [layer for file in files if (layer := file.layer) is not None]
    if name := parse_name(source.name):
        said = facts_of_name(name)
        facts["name_says"] = {
            key: value for key, value in said._asdict().items() if value is not None and key != "origin"
        }
        print("\n".join(_lines({"by its name": ", ".join(f"{k} {v}" for k, v in facts["name_says"].items())})))
    if not files:
        print("No SAE files are here (offline, a hub source shows what its cache holds).")
    local = source.kind in _LOCAL
    looked = [file for file in files if local or file.layer in config.layers]
    if missing := set(config.layers) - set(known):
        raise ValueError(f"{source}: no SAE for layer {min(missing)} in it; it has {sorted(known)}")
    opened = {file.name: open_sae(source, file.layer) for file in looked}
    size = sum(_bytes(one) for one in opened.values())
    facts["layers"] = {}
    for file in files:
        if file.name not in opened:
            print(f"{file.name}: {file.format}; --layers {file.layer} downloads it and looks inside")
            continue
        deep = file.layer in config.layers or len(files) == 1 or (not config.layers and size <= _SMALL)
        facts["layers"][file.name] = _describe_sae(config, opened[file.name], deep)
    if looked and not any("sha256" in one for one in facts["layers"].values()):
        print(f"{size / 1e9:,.1f} GB of weights were not read; --layers N shows decoder norms and hash of layer N.")
    return facts


def _describe_sae(config: Config, opened: OpenSae, deep: bool) -> dict[str, Any]:
    origins = origins_of(opened.facts, "k")
    k = config.k if config.k or origins else 1  # any will do to look at the rest
    settled = settle(str(opened.path), opened.facts, k=k)
    known = bool(config.k or origins)
    facts: dict[str, Any] = {
        **dataclasses.asdict(settled),
        "k": settled.k if known else None,
        "k_from": origins.get(settled.k, ["the option --k"]) if known else [],
        "format": opened.file.format,
        "bytes": opened.path.stat().st_size,
        "tensors": {
            name: {"dtype": stored.array.dtype.name, "shape": list(stored.array.shape)}
            for name, stored in _as_filed(opened).items()
        },
    }
    if deep:
        facts |= _read_facts(k, opened)
    print(f"\n{opened.file.name}")
    print("\n".join(_lines(_in_words(facts), indent=2)))
    return facts


def _as_filed(opened: OpenSae) -> dict[str, StoredTensor]:
    """The tensors under the names and in the orientation of their file."""
    enc, b_enc, dec, b_dec = opened.stored[:4]
    if opened.file.format != "saelens":
        enc = enc.transposed()
    if opened.file.format in ("safetensors", "qwen-scope"):
        dec = dec.transposed()
    return dict(zip(KEYS, (enc, dec, b_enc, b_dec), strict=True))


def _read_facts(k: int | None, opened: OpenSae) -> dict[str, Any]:
    sae = read_sae(opened, k=k, dtype=None, allow_nonfinite=True)
    norms = np.asarray(jnp.linalg.norm(sae.params.w_dec.astype(jnp.float32), axis=-1))
    bad = sum(int(p.size - jnp.isfinite(p).sum()) for p in sae.params)
    finite = norms[np.isfinite(norms)]
    spread = (
        dict(zip(("min", "median", "max"), np.quantile(finite, (0, 0.5, 1)).tolist(), strict=True))
        if len(finite)
        else {}
    )
    return {"decoder_norms": spread, "nonfinite": bad, "sha256": sae_sha256(sae)}


def _in_words(facts: dict[str, Any]) -> dict[str, str]:
    tensors = ", ".join(f"{name} {tuple(t['shape'])} {t['dtype']}" for name, t in facts["tensors"].items())
    words = {
        "format": f"{facts['format']}, {facts['bytes'] / 1e6:,.1f} MB",
        "tensors": tensors,
        "k": f"{facts['k']} (from {' and '.join(facts['k_from'])})" if facts["k"] else "unknown: give it as --k",
        "layer": facts["layer"],
        "backbone": facts["backbone"],
        "from": facts["source"],
        "sink threshold": facts["sink_threshold"],
    }
    if "sha256" in facts:
        norms = facts["decoder_norms"]
        words["decoder norms"] = ", ".join(f"{name} {value:.4g}" for name, value in norms.items())
        words["NaN or Inf"] = f"{facts['nonfinite']:,}" if facts["nonfinite"] else "none"
        words["sha256"] = facts["sha256"]
    return {key: value for key, value in words.items() if value is not None}


def _describe_model(source: Source) -> dict[str, Any]:
    if not source.has("config.json"):
        raise ValueError(f"{source}: neither SAEs nor a model: no layer{{n}}.sae.pt or the like, and no config.json")
    content = read_json(source.fetch("config.json"))
    text = content.get("text_config") or content
    names = (
        "model_type",
        "num_hidden_layers",
        "hidden_size",
        "vocab_size",
        "num_attention_heads",
        "num_key_value_heads",
    )
    facts: dict[str, Any] = {name: text.get(name, content.get(name)) for name in names}
    weights = [name for name in source.names() if name.endswith(".safetensors")]
    facts["weights"] = weights
    words = {name: str(value) for name, value in facts.items() if value is not None and name != "weights"}
    if source.kind in _LOCAL and weights:
        headers = [open_tensors(source.fetch(name)) for name in weights]
        infos = [file.info(name) for file in headers for name in file.names]
        dtypes = Counter()
        for info in infos:
            dtypes[info.dtype.name] += info.nbytes // info.dtype.itemsize
        facts["parameters"] = dict(dtypes)
        words["tensors"] = f"{len(infos):,} in {len(weights)} files, {sum(i.nbytes for i in infos) / 1e9:,.2f} GB"
        words["parameters"] = ", ".join(f"{count:,} {dtype}" for dtype, count in dtypes.items())
    else:
        words["weights"] = f"{len(weights)} files"
    fitting = [row for row in RELEASED if row.backbone == source.name]
    words["released SAEs"] = ", ".join(row.repo for row in fitting) or "none for a model of this name"
    print("\n".join(_lines(words)))
    return facts


def _bytes(opened: OpenSae) -> int:
    return sum(stored.array.nbytes for stored in opened.stored[:4])


def _lines(words: dict[str, Any], indent: int = 0) -> list[str]:
    width = max(len(key) for key in words)
    return [f"{' ' * indent}{key:<{width}}  {value}" for key, value in words.items()]


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]], *, left: int) -> str:
    """Columns padded to their widest cell; the first `left` ones to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    cells = [
        "  ".join(c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in (head, *rows)
    ]
    return "\n".join(line.rstrip() for line in cells)
