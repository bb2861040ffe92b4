"""Measure the embedded model and its SAEs on the held-out text; writes report.json and prints its tables.

    python scripts/assets/evaluate.py --cache DIR --model FOLDER --saes FOLDER --out report.json

Bits per byte count the end tokens' cost but not their (empty) bytes; the first token of a document and of a window's
context is not predicted. Passages for the language features are 64 tokens of one document.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from packing import EOT, Documents, load_documents, pack
from residuals import ROW, residuals
from samples import judge_samples
from sources import LANGS
from tokenizers import Tokenizer
from train_backbone import BATCH_TOKENS, token_losses

from qscope_jax.analysis.features import auroc
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae, encode
from qscope_jax.sae.quality import init_quality, summarize, update_quality

PASSAGE, PASSAGES_PER_LANG = 64, 300
SAE_TOKENS = 200_704  # of held-out text and of train text, on which the SAEs are judged


def language_model(backbone: Backbone, tokenizer: Tokenizer, train: Documents, held_out: Documents) -> dict[str, Any]:
    """Nats per token, unigram entropy and bits per byte of every language, and bits per byte of every source."""
    sizes = np.array([len(tokenizer.id_to_token(i)) for i in range(tokenizer.get_vocab_size())])
    sizes[tokenizer.token_to_id(EOT) :] = 0
    run = jax.jit(lambda p, r, s: token_losses(p, backbone.config, r, s))
    nats, tokens, size = (np.zeros((len(LANGS), len(set(held_out.sources)))) for _ in range(3))
    names = sorted(set(held_out.sources))
    for column, name in enumerate(names):
        for lang in range(len(LANGS)):
            chosen = [i for i, s in enumerate(held_out.sources) if s == name and held_out.langs[i] == lang]
            rows = pack(_subset(held_out, chosen), ROW, None) if chosen else None
            for start in range(0, len(rows.tokens) if rows else 0, 16):
                part = [a[start : start + 16] for a in rows[:2]]
                short = 16 - len(part[0])
                part = [np.pad(a, ((0, short), (0, 0))) for a in part]
                losses, counted = (np.asarray(a)[: 16 - short] for a in run(backbone.params, *part))
                nats[lang, column] += (losses * counted).sum(dtype=np.float64)
                tokens[lang, column] += counted.sum()
                size[lang, column] += (sizes[part[0][: 16 - short, 1:]] * counted).sum()
    per_lang = nats.sum(1) / tokens.sum(1)
    bits = nats.sum(1) / size.sum(1) / np.log(2)
    unigram = np.array([_unigram(train, lang) for lang in range(len(LANGS))])
    by_source = {name: _round(nats[:, c].sum() / size[:, c].sum() / np.log(2)) for c, name in enumerate(names)}
    return {
        "nats_per_token": _by_lang(per_lang),
        "unigram_nats": _by_lang(unigram),
        "below_unigram": _by_lang(unigram - per_lang),
        "bits_per_byte": _by_lang(bits),
        "mean_nats_per_token": _round(per_lang.mean()),
        "mean_bits_per_byte": _round(bits.mean()),
        "bits_per_byte_of_source": by_source,
        "held_out_tokens": int(tokens.sum()),
    }


def _unigram(documents: Documents, lang: int) -> float:
    """Entropy in nats of the language's own train tokens."""
    counts = np.bincount(
        np.concatenate([t for t, own in zip(documents.tokens, documents.langs, strict=True) if own == lang])
    )
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum())


def _subset(documents: Documents, chosen: list[int]) -> Documents:
    return Documents(
        [documents.tokens[i] for i in chosen], documents.langs[chosen], [documents.sources[i] for i in chosen]
    )


def sae_quality(backbone: Backbone, saes: list[Sae], train: Documents, held_out: Documents) -> list[dict[str, float]]:
    """FVU on held-out tokens, against the global mean and the languages' means, and latents dead on train tokens."""
    held, seen = pack(held_out, ROW, seed=1), pack(train, ROW, seed=2)
    count = SAE_TOKENS // ROW
    acts = residuals(backbone, held.tokens[:count, :-1], held.segments[:count, :-1])
    acts_train = residuals(backbone, seen.tokens[:count, :-1], seen.segments[:count, :-1])
    groups = held.langs[:count, :-1].reshape(-1)
    update = jax.jit(lambda q, sae, x, g: update_quality(q, sae, x, groups=g))

    def fold(sae: Sae, x: np.ndarray, groups: np.ndarray, num_groups: int) -> dict[str, float]:
        quality = init_quality(sae.config, num_groups=num_groups)
        for start in range(0, len(x), 4096):
            quality = update(quality, sae, x[start : start + 4096], groups[start : start + 4096])
        return summarize(quality)

    def judge(layer: int) -> dict[str, float]:
        unseen = fold(saes[layer], acts[layer], groups, len(LANGS))
        trained_on = fold(saes[layer], acts_train[layer], np.zeros_like(groups), 1)
        row = {name: _round(unseen[name], 4) for name in ("fvu", "fvu_within_groups", "l0", "cosine")}
        row |= {name + "_train": _round(trained_on[name], 4) for name in ("fvu", "dead_fraction")}
        return {"layer": layer, **row}

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(judge, range(len(saes))))


def passages(documents: Documents, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Up to PASSAGES_PER_LANG pieces [n, 64] per language, and their languages."""
    rng = np.random.default_rng(seed)
    rows, langs = [], []
    for lang in range(len(LANGS)):
        own = [t[:-1] for t, is_lang in zip(documents.tokens, documents.langs, strict=True) if is_lang == lang]
        pieces = np.concatenate([t[: len(t) // PASSAGE * PASSAGE].reshape(-1, PASSAGE) for t in own])
        chosen = rng.permutation(len(pieces))[:PASSAGES_PER_LANG]
        rows.append(pieces[chosen])
        langs += [lang] * len(chosen)
    return np.concatenate(rows), np.array(langs)


def pooled(backbone: Backbone, saes: list[Sae], rows: np.ndarray) -> np.ndarray:
    """Mean activation of every latent of every layer over each passage [n, layers * f]."""
    acts = residuals(backbone, rows, np.zeros_like(rows))
    width = saes[0].config.d_sae

    @jax.jit
    def pool(sae: Sae, x: jax.Array) -> jax.Array:
        code = encode(sae, x)
        place = jnp.arange(x.shape[0] // PASSAGE).repeat(PASSAGE)[:, None] * width + code.indices
        return jnp.zeros(x.shape[0] // PASSAGE * width).at[place].add(code.values / PASSAGE).reshape(-1, width)

    with ThreadPoolExecutor(2) as threads:
        return np.concatenate(
            list(threads.map(lambda pair: np.asarray(pool(*pair)), zip(saes, acts, strict=True))), axis=1
        )


def language_features(backbone: Backbone, saes: list[Sae], train: Documents, held_out: Documents) -> dict[str, Any]:
    """For every language the (layer, feature) with the best AUROC on train passages, and its AUROC on held-out ones."""
    (train_rows, train_langs), (rows, langs) = passages(train, 3), passages(held_out, 4)
    chosen_from, tested_on = pooled(backbone, saes, train_rows), pooled(backbone, saes, rows)
    width, result = saes[0].config.d_sae, {}
    for number, lang in enumerate(LANGS):
        scores = auroc(chosen_from, train_langs == number)
        best = int(np.argmax(scores))
        found = {"layer": best // width, "feature": best % width, "train": _round(scores[best], 4)}
        held = auroc(tested_on[:, [best]], langs == number)[0]
        result[lang] = found | {"held_out": _round(held, 4), "held_out_passages": int((langs == number).sum())}
    return result


def _round(value: float, digits: int = 3) -> float:
    return round(float(value), digits)


def _by_lang(values: np.ndarray) -> dict[str, float]:
    return {lang: _round(value) for lang, value in zip(LANGS, values, strict=True)}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    backbone = load_backbone(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    corpus = arguments.cache / "corpus.jsonl"
    train, held_out = load_documents(corpus, tokenizer, "train"), load_documents(corpus, tokenizer, "heldout")
    saes = list(load_saes(arguments.saes).values())
    parts: dict[str, Callable[[], Any]] = {
        "language_model": lambda: language_model(backbone, tokenizer, train, held_out),
        "samples": lambda: judge_samples(backbone, tokenizer),
        "saes": lambda: sae_quality(backbone, saes, train, held_out),
        "language_features": lambda: language_features(backbone, saes, train, held_out),
    }
    parameters = sum(leaf.size for leaf in jax.tree.leaves(backbone.params))
    report: dict[str, Any] = {"parameters": parameters, "train_tokens_in_corpus": sum(map(len, train.tokens))}
    report["corpus_sha256"] = hashlib.sha256(corpus.read_bytes()).hexdigest()
    report["train_tokens"] = int(np.load(arguments.state)["step"]) * BATCH_TOKENS
    for name, part in parts.items():
        report[name] = part()
        print(name, json.dumps(report[name], ensure_ascii=False, indent=1), flush=True)
    return report


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--saes", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, help="of the training; default: train.npz in the cache")
    parsed = parser.parse_args()
    parsed.state = parsed.state or parsed.cache / "train.npz"
    measured = measure(parsed)
    parsed.out.write_text(json.dumps(measured, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
