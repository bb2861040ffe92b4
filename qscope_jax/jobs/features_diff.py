"""`qscope features diff`: what features do in a text, or what two texts do differently, layer by layer.

Two texts: the features of every layer whose firing rates differ most, as the release's demo compares them. One text:
its strongest features per layer, and the strongest per token. A heatmap here; index.html and diff.json have it all.
"""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tyro

from qscope_jax.analysis.compare import (
    activations,
    compare_rates,
    kept_tokens,
    strongest,
)
from qscope_jax.data.tokenizer import make_encoder
from qscope_jax.explorer.page import write_page
from qscope_jax.explorer.terminal import has_colour, heat, spans, tinted
from qscope_jax.explorer.tokens import token_labels
from qscope_jax.extract import DocumentCodes, extract_documents
from qscope_jax.files.atomic import write_json
from qscope_jax.jobs.opened import Precision, Sources, load, open_sources
from qscope_jax.jobs.run import Run, plain

_SHOWN = 40  # tokens of the table that is printed; the files have all


@dataclasses.dataclass(frozen=True)
class Config:
    """Look at the features of a text, or at what tells two texts apart."""

    texts: tyro.conf.Positional[tuple[str, ...]]
    """One text or two; @FILE reads one from a file."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs, likewise; made for another model is fine (a base model's on its chat model). Only encoders stay in memory:
    of Qwen3-8B with 65,536 features 1 GiB a layer in float32, half of it in bfloat16."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all that the SAE source holds by default."""
    top: int = 5
    """Features to show per layer."""
    skip_first: bool = False
    """Do not count the first token."""
    drop_prefix: bool = False
    """Do not count the tokens with which both texts begin."""
    drop_common: bool = False
    """Do not count tokens that occur in both texts."""
    special_tokens: bool = False
    """Read strings such as <|im_end|> in a text as the tokens they name."""
    precision: Precision = "parity"
    """float32, as in the release's demo, or bfloat16."""
    mesh: str = "1x1"
    """DATAxMODEL: split rows over DATA and weights over MODEL of this process's devices."""
    out: Path = Path("qscope-out/features-diff")
    """Folder of index.html, diff.json and manifest.json."""


class Seen(NamedTuple):
    """The texts with their tokens as a person reads them, their codes, and which tokens count."""

    labels: list[list[str]]
    codes: list[DocumentCodes]
    kept: list[np.ndarray]
    found: dict[int, list[Any]]


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: no text or more than two, one longer than the context, or other wrong input, named.
      FloatingPointError: the model overflows.
    """
    if len(config.texts) not in (1, 2):
        raise ValueError(f"{len(config.texts)} texts given; expected one, or two to compare")
    if config.top < 1:
        raise ValueError(f"--top {config.top}: expected at least 1")
    with Run("features diff", config, config.out) as job:
        sources = open_sources(config)
        seen = _look(config, sources)
        job.progress(texts=len(seen.codes), tokens=sum(len(code.tokens) for code in seen.codes))
        write_json(job.out / "diff.json", _content(config, seen))
        write_page(job.out / "index.html", "Two texts compared" if len(seen.codes) == 2 else "One text", _page(seen))
        job.record(
            counts={"tokens": [len(c.tokens) for c in seen.codes], "kept": [int(m.sum()) for m in seen.kept]},
            hashes=sources.hashes(),
            sinks="not masked, as in the release's demo",
        )  # fmt: skip
    (_print_two if len(seen.codes) == 2 else _print_one)(seen)
    print(f"\n{job.address}: index.html, diff.json")


def _look(config: Config, sources: Sources) -> Seen:
    tokenizer, longest = sources.tokenizer, sources.constants.max_position_embeddings
    texts = [Path(t[1:]).read_text(encoding="utf-8") if t.startswith("@") else t for t in config.texts]
    documents = make_encoder(tokenizer, special_tokens=config.special_tokens)(texts)
    for i, ids in enumerate(documents):
        if not 0 < len(ids) <= longest:
            raise ValueError(f"text {i + 1} has {len(ids)} tokens; expected 1 to {longest}, the model's context")
    kept = kept_tokens(
        documents, skip_first=config.skip_first, drop_prefix=config.drop_prefix, drop_common=config.drop_common
    )
    longest_text = max(map(len, documents))
    backbone, encoders, step = load(sources, config.precision)
    codes = extract_documents(
        backbone, encoders.saes, documents, batch_tokens=2 * longest_text, max_length=longest_text, step=step
    )
    found: dict[int, list[Any]] = {}
    for layer in sources.saes:
        own = [code.codes[layer] for code in codes]
        found[layer] = (
            compare_rates(own, kept, config.top)
            if len(own) == 2
            else strongest(own[0].values, own[0].indices, kept[0], config.top)
        )
    return Seen([token_labels(tokenizer, ids.tolist()) for ids in documents], codes, kept, found)


def _content(config: Config, seen: Seen) -> dict[str, Any]:
    rows = {layer: [row._asdict() for row in own] for layer, own in seen.found.items()}
    texts = []
    for labels, code, kept in zip(seen.labels, seen.codes, seen.kept, strict=True):
        tokens = []
        for t, label in enumerate(labels):
            best = {}
            for layer, (values, indices) in code.codes.items():
                pairs = zip(indices[t, : config.top].tolist(), values[t, : config.top].tolist(), strict=True)
                best[layer] = [[feature, value] for feature, value in pairs if value > 0]
            tokens.append({"id": int(code.tokens[t]), "text": label, "kept": bool(kept[t]), "features": best})
        texts.append(tokens)
    return plain({"layers": rows, "texts": texts})


def _page(seen: Seen) -> dict[str, Any]:
    two = len(seen.codes) == 2
    names = ("first text", "second text")
    rows: list[list[Any]] = []
    for layer, own in seen.found.items():
        for rank, row in enumerate(own, start=1):
            if two:
                share = {"text": f"{abs(row.difference):.1%}", "share": abs(row.difference)}
                higher = names[0] if row.difference > 0 else names[1]
                rates = [{"text": f"{rate:.1%}"} for rate in (row.first, row.second)]
                rows.append([layer, rank, row.feature, *rates, share, higher])
            else:
                share = {"text": f"{row.rate:.1%}", "share": row.rate}
                numbers = [{"text": f"{value:.3g}"} for value in (row.mean, row.largest)]
                rows.append([layer, rank, row.feature, *numbers, share])
    head = ["Layer", "Rank", "Feature"]
    head += ["Fires in the first", "In the second", "Difference", "Higher in"] if two else ["Mean", "Largest", "Fires"]
    note = "Shares of the tokens that count." if two else "Over the tokens that count, zeros included in the mean."
    facts = [[name.capitalize(), f"{len(c.tokens)} tokens, {int(m.sum())} count"]
             for name, c, m in zip(names, seen.codes, seen.kept, strict=False)]  # fmt: skip
    texts = []
    for name, labels, code in zip(names, seen.labels, seen.codes, strict=False):
        cells = {n: [_cells(code, n, row.feature) for row in own] for n, own in seen.found.items()}
        drawn = [{"layer": n, "rows": own} for n, own in cells.items()]
        texts.append({"label": name, "tokens": labels, "layers": drawn})
    return {
        "facts": facts,
        "summary": {
            "title": "Features whose rates differ most" if two else "Strongest features", "note": note, "head": head,
            "rows": rows,
        },
        "rows": "Rows are the features of the table above, columns the tokens of the text.",
        "layer": len(seen.found) // 2,
        "texts": texts,
    }  # fmt: skip


def _cells(code: DocumentCodes, layer: int, feature: int) -> dict[str, Any]:
    values = activations(*code.codes[layer], feature)
    return {"feature": feature, "cells": [[int(t), round(float(values[t]), 4)] for t in np.flatnonzero(values)]}


def _print_one(seen: Seen) -> None:
    """Features of every layer with a character per token, and the strongest feature of each token and layer."""
    colour, (code,), (labels,) = has_colour(), seen.codes, seen.labels
    for layer, rows in seen.found.items():
        print(f"\nlayer {layer}\nfeature    mean largest  fires")
        for row in rows:
            values = activations(*code.codes[layer], row.feature)
            _print_heat(
                f"{row.feature:>7} {row.mean:>7.3g} {row.largest:>7.3g} {row.rate:>6.1%}  ", values, values.max()
            )
        if rows:
            print(tinted(labels, activations(*code.codes[layer], rows[0].feature).tolist(), colour=colour))
    width = max(len(label) for label in labels[:_SHOWN]) + 2
    print(
        f"\nstrongest feature of each token\n{'token':<{width + 4}}" + "".join(f"{f'layer {n}':>9}" for n in seen.found)
    )
    for t, label in enumerate(labels[:_SHOWN]):
        best = (int(code.codes[n].indices[t, 0]) if code.codes[n].values[t, 0] > 0 else "-" for n in seen.found)
        print(f"{t:>3} {label:<{width}}" + "".join(f"{feature:>9}" for feature in best))
    if len(labels) > _SHOWN:
        print(f"... and {len(labels) - _SHOWN} more in diff.json")


def _print_two(seen: Seen) -> None:
    for layer, rows in seen.found.items():
        print(f"\nlayer {layer}\nfeature   first  second  differ by")
        for row in rows:
            head = f"{row.feature:>7} {row.first:>7.1%} {row.second:>7.1%} {row.difference:>+10.1%}  "
            one, two = (activations(*code.codes[layer], row.feature) for code in seen.codes)
            most = max(one.max(), two.max())  # a colour means the same in both
            _print_heat(head + "1 ", one, most)
            _print_heat(" " * len(head) + "2 ", two, most)


def _print_heat(head: str, values: np.ndarray, most: float) -> None:
    """A feature's line, continued below where the text is long."""
    for i, own in enumerate(spans(len(values), len(head))):
        print((head if i == 0 else " " * len(head)) + heat(values[own].tolist(), most, colour=has_colour()))
