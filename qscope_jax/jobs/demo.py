"""`qscope demo`: the whole way on the embedded model, with no network and no download.

Shipped texts in eight languages -> features of every layer -> the feature that tells each language apart, chosen on
half of the passages and judged on the other -> a table here, and a page with the token x feature heatmap.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from qscope_jax.analysis.features import auroc, firing_rates, pool_max
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.inputs import SHIPPED_TEXTS
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.explorer.page import write_page
from qscope_jax.explorer.tokens import token_labels
from qscope_jax.extract import DocumentCodes, extract_documents
from qscope_jax.files.atomic import write_json
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import resolve
from qscope_jax.jobs.run import Run
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae

LANGUAGES = {
    "en": "English",
    "zh": "Chinese",
    "ru": "Russian",
    "ko": "Korean",
    "ja": "Japanese",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
}
CONTEXTS, CONTEXT_TOKENS, HEATMAP_ROWS = 3, 8, 24


@dataclass(frozen=True)
class Config:
    """Extract and show features of the shipped texts with the embedded model; takes well under two minutes."""

    text: str | None = None
    """A text of yours, shown first in the heatmap."""
    out: Path = Path("qscope-out/demo")
    """Folder for index.html, languages.json and manifest.json."""


class Passages(NamedTuple):
    """The shipped texts and their codes. `half` is 0 where a passage helps to choose, 1 where it is judged."""

    languages: list[str]
    group: np.ndarray
    half: np.ndarray
    codes: list[DocumentCodes]
    labels: list[list[str]]


def run(config: Config) -> None:
    """Prints the table of languages and writes the page."""
    with Run("demo", config, config.out) as job:
        backbone, saes = load_backbone("demo", dtype="float32"), load_saes("demo")
        rows = _shipped_texts()
        texts = [row["text"] for row in rows] + ([config.text] if config.text else [])
        passages, extra = _extract(backbone, saes, rows, texts)
        job.progress(texts=len(texts), tokens=sum(len(c.tokens) for c in passages.codes))
        table = [_language_row(passages, saes, language) for language in passages.languages]
        _print_table(backbone, saes, table)
        write_json(job.out / "languages.json", table)
        page = _page(backbone, saes, passages, rows, table, extra)
        write_page(job.out / "index.html", "Qwen-Scope for JAX: what the features see", page)
        job.record(counts={"texts": len(texts), "layers": len(saes)}, hashes={w: _hashes(w) for w in ("model", "sae")})
    print(f"\nThe page with the heatmap: {job.address}/index.html\n\nTry next:")
    for command in next_commands():
        print(f"  {command}")


def next_commands() -> tuple[str, ...]:
    """The three commands that the demo ends with."""
    return (
        "qscope info demo",
        "qscope extract demo --layers 3 --top 10 --out qscope-out/features",
        "qscope convert demo --to saelens --layers 3 --out qscope-out/saelens",
    )


def _hashes(what: Literal["model", "sae"]) -> dict[str, str]:
    source = resolve("demo", what=what)
    return hash_files(source.fetch(name) for name in source.names())


def _shipped_texts() -> list[dict[str, str]]:
    return [json.loads(line) for line in SHIPPED_TEXTS.read_text(encoding="utf-8").splitlines()]


def _extract(
    backbone: Backbone, saes: dict[int, Sae], rows: list[dict[str, str]], texts: list[str]
) -> tuple[Passages, tuple[list[str], DocumentCodes] | None]:
    tokenizer = load_tokenizer("demo")
    limit = backbone.config.max_position_embeddings
    codes = extract_documents(backbone, saes, make_encoder(tokenizer)(texts), max_length=limit, batch_tokens=2048)
    labels = [token_labels(tokenizer, code.tokens.tolist()) for code in codes]
    languages = [language for language in LANGUAGES if any(row["lang"] == language for row in rows)]
    group = np.array([languages.index(row["lang"]) for row in rows])
    seen = [int((group[:i] == g).sum()) for i, g in enumerate(group)]
    shipped = Passages(languages, group, np.array(seen) % 2, codes[: len(rows)], labels[: len(rows)])
    return shipped, (labels[-1], codes[-1]) if len(codes) > len(rows) else None


def _language_row(passages: Passages, saes: dict[int, Sae], language: str) -> dict[str, Any]:
    """Chooses the feature that fires most on this language against the others, and judges it on the other half."""
    target = passages.languages.index(language)
    found = []
    for layer, sae in saes.items():
        rates = _rates(passages, layer, sae, half=0)
        contrast = rates[target] - np.delete(rates, target, axis=0).max(axis=0)
        feature = int(contrast.argmax())
        found.append((float(contrast[feature]), layer, feature))
    _, layer, feature = max(found)
    held_out = _rates(passages, layer, saes[layer], half=1)[:, feature]
    others = np.where(np.arange(len(held_out)) == target, -1, held_out)
    judged = np.flatnonzero(passages.half == 1)
    scores = _pooled(passages, layer, saes[layer], judged)[:, [feature]]
    return {
        "language": LANGUAGES[language],
        "layer": layer,
        "feature": feature,
        "auroc": float(auroc(scores, passages.group[judged] == target)[0]),
        "rate": float(held_out[target]),
        "other_rate": float(others.max()),
        "other": LANGUAGES[passages.languages[int(others.argmax())]],
        "contexts": _contexts(passages, layer, feature),
    }


def _rates(passages: Passages, layer: int, sae: Sae, *, half: int) -> np.ndarray:
    chosen = np.flatnonzero(passages.half == half)
    values, indices, passage = _tokens(passages, layer, chosen)
    return firing_rates(values, indices, passages.group[chosen][passage], sae.config.d_sae)


def _pooled(passages: Passages, layer: int, sae: Sae, chosen: np.ndarray) -> np.ndarray:
    return pool_max(*_tokens(passages, layer, chosen), sae.config.d_sae)


def _tokens(passages: Passages, layer: int, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes of the tokens of some passages, and which of those passages each token stands in."""
    codes = [passages.codes[i].codes[layer] for i in chosen]
    passage = np.repeat(np.arange(len(chosen)), [len(code.values) for code in codes])
    return np.concatenate([c.values for c in codes]), np.concatenate([c.indices for c in codes]), passage


def _activations(code: DocumentCodes, layer: int, feature: int) -> np.ndarray:
    values, indices = code.codes[layer]
    return np.where(np.asarray(indices) == feature, values, 0).sum(axis=-1)


def _contexts(passages: Passages, layer: int, feature: int) -> list[dict[str, Any]]:
    """The passages where the feature is strongest, each cut around its strongest token."""
    per_passage = [_activations(code, layer, feature) for code in passages.codes]
    order = sorted(range(len(per_passage)), key=lambda i: -per_passage[i].max())[:CONTEXTS]
    contexts = []
    for i in order:
        peak = int(per_passage[i].argmax())
        window = slice(max(0, peak - CONTEXT_TOKENS), peak + CONTEXT_TOKENS + 1)
        values = [round(float(v), 4) for v in per_passage[i][window]]
        contexts.append({"tokens": passages.labels[i][window], "values": values})
    return contexts


def _print_table(backbone: Backbone, saes: dict[int, Sae], table: list[dict[str, Any]]) -> None:
    first = next(iter(saes.values())).config
    print(f"{backbone.config.num_layers} layers, {first.d_sae} features each, {first.k} active per token\n")
    print(f"{'language':<10} layer feature  AUROC  fires  elsewhere at most   strongest context")
    for row in table:
        context = row["contexts"][0]
        peak = max(range(len(context["values"])), key=context["values"].__getitem__)
        shown = "".join(f"[{t}]" if i == peak else t for i, t in enumerate(context["tokens"]))
        print(
            f"{row['language']:<10} {row['layer']:>5} {row['feature']:>7} {row['auroc']:>6.3f} {row['rate']:>6.1%}"
            f"  {row['other_rate']:>5.1%} {row['other']:<10}   {shown}"
        )


def _page(backbone, saes, passages: Passages, rows, table, extra) -> dict[str, Any]:
    """The data of the page: one passage per language, or the user's text first."""
    config, sae = backbone.config, next(iter(saes.values())).config
    texts = [] if extra is None else [("your text", *extra)]
    for g, language in enumerate(passages.languages):
        i = int(np.flatnonzero((passages.group == g) & (passages.half == 1))[0])
        texts.append((f"{LANGUAGES[language]} ({rows[i]['register']})", passages.labels[i], passages.codes[i]))
    return {
        "facts": [
            ["Model", f"Qwen3 architecture, {config.num_layers} layers of {config.hidden_size} (embedded)"],
            ["SAEs", f"TopK, {sae.d_sae} features per layer, {sae.k} active per token"],
            ["Hook", "output of each decoder layer"],
        ],
        "languages": table,
        "layer": min(3, config.num_layers - 1),
        "texts": [{"label": label, "tokens": tokens, "layers": _heatmap(code)} for label, tokens, code in texts],
    }


def _heatmap(code: DocumentCodes) -> list[dict[str, Any]]:
    """Per layer the features with the largest activation in the text, with their non-zero cells."""
    layers = []
    for layer, (values, indices) in code.codes.items():
        best: dict[int, float] = {}
        for feature, value in zip(np.ravel(indices).tolist(), np.ravel(values).tolist(), strict=True):
            best[feature] = max(best.get(feature, 0.0), value)
        rows = []
        for feature in sorted((f for f in best if best[f] > 0), key=lambda f: (-best[f], f))[:HEATMAP_ROWS]:
            active = _activations(code, layer, feature)
            cells = [[int(t), round(float(active[t]), 4)] for t in np.flatnonzero(active)]
            rows.append({"feature": feature, "cells": cells})
        layers.append({"layer": layer, "rows": rows})
    return layers
