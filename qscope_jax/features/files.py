"""Statistics as files: what `qscope features build` writes, and what steering and discovery read.

layer{n}.statistics.safetensors  max, mean, density [f]; quantiles [levels, f]; histogram [f, bins] where it was kept;
                                 the single numbers and the SAE's hash are metadata
contexts/layer{n}.parquet        the best places of every feature
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qscope_jax.analysis.contexts import BEFORE, TopContexts
from qscope_jax.analysis.statistics import LEVELS, QUANTILE_ERROR, HostTally, LayerStatistics, Tally
from qscope_jax.features.count import Counted
from qscope_jax.files.atomic import atomic_path
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.recognise import FormatError
from qscope_jax.files.source import Source, resolve
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.mesh import to_host
from qscope_jax.sae.formats import open_sae
from qscope_jax.totals import Total

FORMAT = "qscope-statistics-1"
_NAME = re.compile(r"(?:.*/)?layer(\d+)\.statistics\.safetensors")
_ROWS = 16_384  # of a context file, decoded at a time


def statistics_path(folder: Path, layer: int) -> Path:
    return folder / f"layer{layer}.statistics.safetensors"


def contexts_path(folder: Path, layer: int) -> Path:
    return folder / "contexts" / f"layer{layer}.parquet"


def save_statistics(folder: Path, statistics: Mapping[int, LayerStatistics], *, histograms: bool = True) -> list[Path]:
    """Writes a file per layer; `histograms` are what the quantiles beside the stored levels are found from."""
    paths = []
    for layer, found in statistics.items():
        arrays = {"max": found.max, "mean": found.mean, "density": found.density, "quantiles": found.quantiles}
        if histograms and found.histogram is not None:
            fits = found.histogram.max(initial=0) < 1 << 32
            arrays["histogram"] = found.histogram.astype(np.uint32 if fits else np.int64)
        numbers = {"tokens": found.tokens, "sinks": found.sinks, "first_bin": found.first_bin}
        metadata = {
            "kind": FORMAT,
            "layer": str(layer),
            "sae": found.sae,
            "sink_threshold": repr(found.sink_threshold),
            "median_norm": repr(found.median_norm),
            "levels": json.dumps(found.levels),
            "quantile_error": repr(QUANTILE_ERROR),
            **{name: str(number) for name, number in numbers.items()},
        }
        paths.append(statistics_path(folder, layer))
        write_tensors(paths[-1], arrays, metadata)
    return paths


def load_statistics(
    source: str | os.PathLike[str] | Source, layers: Iterable[int] | None = None
) -> dict[int, LayerStatistics]:
    """Statistics of some layers' features, by layer; of all that the source holds by default.

    Args:
      source: a folder that `qscope features build` wrote, one of its files, a hub name or a remote folder, or "demo":
        those of the embedded SAEs, which keep no histograms.
      layers: 0-based decoder layers.

    Raises:
      SourceError: the source or a file of it cannot be had.
      ValueError: it holds no statistics, or not of a layer; or a file is damaged.
    """
    source = source if isinstance(source, Source) else resolve(source, what="statistics")
    held = {int(match[1]): name for name in source.names() if (match := _NAME.fullmatch(name))}
    if not held:
        raise ValueError(f"{source}: no layer<n>.statistics.safetensors in it; make them with qscope features build")
    wanted = sorted(held) if layers is None else list(layers)
    if missing := [layer for layer in wanted if layer not in held]:
        raise ValueError(f"{source}: no statistics of layer {missing[0]}; it holds the layers {sorted(held)}")
    return {layer: _read(source.fetch(held[layer]), layer) for layer in wanted}


def statistics_of(sae: Source, given: str | os.PathLike[str] | None = None) -> dict[int, LayerStatistics] | None:
    """The statistics that were named, else those that stand beside a set of SAEs; None where there are none.

    Raises:
      SourceError, ValueError: see `load_statistics`.
    """
    if given is not None or sae.kind == "demo":
        return load_statistics("demo" if given is None else given)
    return load_statistics(sae) if any(_NAME.fullmatch(name) for name in sae.names()) else None


def check_statistics(stats: Mapping[int, Any] | None, sae: Source, layers: Iterable[int]) -> None:
    """Refuses statistics of other SAEs than those at hand, by the SHA-256 of their files.

    Raises:
      ValueError: the layer and both hashes.
      SourceError, FormatError: see `open_sae`.
    """
    for layer in layers:
        if stats is None or layer not in stats:
            continue
        (found,) = hash_files([open_sae(sae, layer).path]).values()
        if stats[layer].sae != found:
            raise ValueError(
                f"the statistics of layer {layer} are of an SAE with sha256 {stats[layer].sae}, that of {sae} has "
                f"{found}: build them anew with qscope features build"
            )


def _read(path: Path, layer: int) -> LayerStatistics:
    file = open_tensors(path)
    said = file.metadata
    if said.get("kind") != FORMAT or said.get("layer") != str(layer):
        raise FormatError(
            f"{path}: expected {FORMAT} of layer {layer}, found {said.get('kind')} of {said.get('layer')}"
        )
    try:
        found = LayerStatistics(
            tokens=int(said["tokens"]),
            sinks=int(said["sinks"]),
            sink_threshold=float(said["sink_threshold"]),
            median_norm=float(said["median_norm"]),
            density=file.array("density"),
            mean=file.array("mean"),
            max=file.array("max"),
            levels=tuple(map(float, json.loads(said["levels"]))),
            quantiles=file.array("quantiles"),
            histogram=file.array("histogram") if "histogram" in file else None,
            first_bin=int(said["first_bin"]),
            sae=said["sae"],
        )
    except (KeyError, ValueError, TypeError) as error:
        raise FormatError(f"{path}: damaged metadata ({error!r}); make the statistics again") from None
    width = len(found.max)
    shapes = {"max": (width,), "mean": (width,), "density": (width,), "quantiles": (len(found.levels), width)}
    for name, shape in shapes.items():
        array = getattr(found, name)
        if array.shape != shape or not np.isfinite(array).all():
            raise FormatError(f"{path}: {name} is {array.shape}, expected {shape} finite numbers; make it again")
    return found


def write_contexts(
    path: Path,
    contexts: TopContexts,
    *,
    name: Callable[[int], str],
    decode: Callable[[Sequence[Sequence[int]]], Sequence[str]],
) -> int:
    """Writes the best places of a layer's features, best first; returns how many there are.

    Columns: `feature`, `rank`, `value`, `document` (from `name`), `number` of the row, `position` of the token in its
    document, `tokens` (ids of the window), `at` (which of them it is) and `text`.
    """
    feature, rank = np.nonzero(contexts.value)
    value, number, position = (array[feature, rank] for array in contexts[:3])
    window, count = contexts.window[feature, rank], len(feature)
    names = {int(n): name(int(n)) for n in np.unique(number)}
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer:
        for start in range(0, count, _ROWS):
            own = slice(start, start + _ROWS)
            ids = [row[row >= 0].tolist() for row in window[own]]
            columns = {
                "feature": feature[own].astype(np.int32),
                "rank": rank[own].astype(np.int32),
                "value": value[own],
                "document": [names[int(n)] for n in number[own]],
                "number": number[own],
                "position": position[own],
                "tokens": ids,
                "at": (window[own, :BEFORE] >= 0).sum(axis=1).astype(np.int32),
                "text": list(decode(ids)),
            }
            writer.write_table(pa.table({field.name: pa.array(columns[field.name], field.type) for field in _SCHEMA}))
    return count


_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()),
        ("rank", pa.int32()),
        ("value", pa.float32()),
        ("document", pa.string()),
        ("number", pa.int64()),
        ("position", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("at", pa.int32()),
        ("text", pa.string()),
    ]
)


def put_aside(path: Path, state: Counted, run: Any) -> None:
    """Saves what was counted so far; `run` is what must be equal for it to be gone on with."""
    arrays: dict[str, np.ndarray] = {}
    for i, (total, tally, contexts) in enumerate(zip(state.totals, state.tallies, state.contexts, strict=True)):
        arrays |= {f"{i}.total.{name}": array for name, array in total._asdict().items()}
        arrays |= {f"{i}.contexts.{name}": array for name, array in contexts._asdict().items()}
        flat = {**tally._asdict(), "sums": tally.sums.high, "lost": tally.sums.low}
        arrays |= {f"{i}.tally.{name}": to_host(array) for name, array in flat.items()}
    numbers = {name: str(getattr(state, name)) for name in _NUMBERS}
    write_tensors(path, {name: np.asarray(a) for name, a in arrays.items()}, {"run": _canonical(run), **numbers})


_NUMBERS = ("part", "batches", "documents", "tokens", "bad")


def take_up(path: Path, run: Any) -> Counted:
    """What was put aside.

    Raises:
      ValueError: it belongs to another run.
    """
    file = open_tensors(path)
    if file.metadata.get("run") != _canonical(run):
        raise ValueError(f"{path} belongs to a run with other input or options: remove it, or choose another --out")
    layers = sum(name.endswith(".total.max") for name in file.names)
    read = lambda i, kind, names: {name: np.array(file.array(f"{i}.{kind}.{name}")) for name in names}  # noqa: E731
    totals = tuple(HostTally(**read(i, "total", HostTally._fields)) for i in range(layers))
    contexts = tuple(TopContexts(**read(i, "contexts", TopContexts._fields)) for i in range(layers))
    tallies = []
    for i in range(layers):
        found = {name: jnp.asarray(a) for name, a in read(i, "tally", (*Tally._fields, "lost")).items()}
        sums = Total(found.pop("sums"), found.pop("lost"))
        tallies.append(Tally(sums=sums, **found))
    return Counted(
        **{name: int(file.metadata[name]) for name in _NUMBERS},
        totals=totals,
        tallies=tuple(tallies),
        contexts=contexts,
    )


def table(statistics: Mapping[int, LayerStatistics]) -> dict[str, Any]:
    """What a person looks at first, per layer, as JSON holds it."""
    rows = {}
    for layer, found in statistics.items():
        fired = found.density > 0
        rows[str(layer)] = {
            "tokens": found.tokens,
            "sinks": found.sinks,
            "sink_threshold": found.sink_threshold if math.isfinite(found.sink_threshold) else None,
            "median_norm": found.median_norm,
            "features": len(fired),
            "never_active": int((~fired).sum()),
            "active_per_token": float(found.density.sum()),
            "median_density": float(np.median(found.density[fired])) if fired.any() else None,
            "median_max": float(np.median(found.max[fired])) if fired.any() else None,
            **{
                f"median_p{100 * q:g}": float(np.median(found.quantiles[i][fired])) if fired.any() else None
                for i, q in enumerate(LEVELS)
            },
        }
    return rows


def _canonical(run: Any) -> str:
    return json.dumps(run, sort_keys=True)
