"""What all trials share: the embedded model, texts of the corpus, prompts, references, tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from qscope_jax.analysis.features import monolinguality
from qscope_jax.analysis.text import distinct_ngrams, script_share
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.batches import Buckets
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.features.files import load_statistics
from qscope_jax.features.pooled import pool_texts
from qscope_jax.generation import generate, pad_left
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae
from qscope_jax.trials import Outcome, Writing, judge

LANGUAGES = ("en", "zh", "ru", "ko", "ja", "de", "fr", "es")
SCRIPTS = {"zh": ("Han",), "ru": ("Cyrillic",), "ko": ("Hangul",), "ja": ("Hiragana", "Katakana")}
PROMPT, NEW = 12, 48  # tokens
TEMPERATURE = 0.3
DISTINCT = 0.8  # distinct-3-gram ratio to real text, at least


class Texts(NamedTuple):
    """Documents of one split: token ids, language and source of each."""

    tokens: list[np.ndarray]
    langs: np.ndarray
    sources: np.ndarray


class Setting(NamedTuple):
    backbone: Backbone
    tokenizer: Any
    saes: dict[int, Sae]
    stats: Any
    train: Texts
    held_out: Texts


def load(corpus: Path, seed: int = 0) -> Setting:
    """The model with its SAEs and statistics, and the corpus's documents in a seeded order."""
    tokenizer = load_tokenizer("demo")
    encode = make_encoder(tokenizer)
    with corpus.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    order = np.random.default_rng(seed).permutation(len(rows))
    texts = {}
    for split in ("train", "heldout"):
        own = [rows[i] for i in order if rows[i]["split"] == split]
        tokens = [ids.astype(np.int32) for ids in encode([row["text"] for row in own])]
        kept = [i for i, ids in enumerate(tokens) if len(ids) >= PROMPT + NEW]
        column = lambda name, own=own, kept=kept: np.array([own[i][name] for i in kept])  # noqa: E731
        texts[split] = Texts([tokens[i] for i in kept], column("lang"), column("source"))
    backbone = load_backbone("demo", dtype="float32")
    return Setting(backbone, tokenizer, load_saes("demo"), load_statistics("demo"), texts["train"], texts["heldout"])


def choose(texts: Texts, lang: str, count: int, *, source: str | None = None) -> list[np.ndarray]:
    """The first `count` documents of a language (and source)."""
    wanted = (texts.langs == lang) & (True if source is None else texts.sources == source)
    found = [texts.tokens[i] for i in np.flatnonzero(wanted)[:count]]
    if len(found) < count:
        raise SystemExit(f"the corpus has {len(found)} long documents in {lang} {source or ''}; {count} are needed")
    return found


def prompts(documents: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [document[:PROMPT] for document in documents]


def writing(lang: str, seed: int = 0) -> Writing:
    """Sampled at a low temperature; no end, so that every row has as many tokens."""
    return Writing(NEW, TEMPERATURE, seed=seed, eos=(), scripts=SCRIPTS[lang], languages=LANGUAGES, batch_rows=96)


class Reference(NamedTuple):
    """Of text in a language: share of the script in letters, NLL in nats per token, distinct 3-grams."""

    share: float
    nll: float
    distinct: float


def real_text(setting: Setting, lang: str, count: int = 96) -> Reference:
    """Held-out text of the language, judged on the same positions as what is written: after a prompt of its own."""
    documents = choose(setting.held_out, lang, count)
    return _reference(setting, lang, prompts(documents), [document[PROMPT : PROMPT + NEW] for document in documents])


def own_samples(setting: Setting, lang: str, count: int = 64) -> Reference:
    """What the model writes by itself after prompts in the language, at the same temperature."""
    given = prompts(choose(setting.held_out, lang, count))
    tokens, mask = map(jnp.asarray, pad_left(given))
    backbone = setting.backbone
    out = generate(
        backbone.params, backbone.config, tokens, mask=mask, max_new_tokens=NEW, temperature=TEMPERATURE,
        seeds=range(count), eos=(),
    )  # fmt: skip
    return _reference(setting, lang, given, list(out.tokens))


def _reference(setting, lang, given, written) -> Reference:
    nll = [
        float(judge(setting.backbone, given[i : i + 32], written[i : i + 32]).nll.mean())
        for i in range(0, len(given), 32)
    ]
    shares = [script_share(setting.tokenizer.decode(row), *SCRIPTS[lang]) for row in written]
    distinct = [distinct_ngrams(row.tolist()) for row in written]
    return Reference(float(np.mean(shares)), float(np.mean(nll)), float(np.mean(distinct)))


def contrast(setting: Setting, documents: int = 60, length: int = 200) -> dict[int, np.ndarray]:
    """Monolinguality nu [language, feature] per layer, on train text."""
    chosen = [ids[:length] for lang in LANGUAGES for ids in choose(setting.train, lang, documents)]
    group = np.repeat(np.arange(len(LANGUAGES)), documents)
    seen = pool_texts(setting.backbone, setting.saes, chosen, Buckets(4096, length, 2))
    found = {}
    for layer, pooled in seen.pooled.items():
        sums = np.zeros((len(LANGUAGES), setting.saes[layer].config.d_sae))
        np.add.at(sums, (group[pooled.document], pooled.feature), pooled.total)
        tokens = np.bincount(group, weights=pooled.tokens)
        found[layer] = monolinguality(sums / tokens[:, None])
    return found


def language_features(nu: dict[int, np.ndarray], share: float = 0.05) -> dict[int, set[int]]:
    """Per layer the features that are no random control: the `share` whose |nu| is largest for any language."""
    return {
        layer: set(np.argsort(-np.abs(values).max(axis=0))[: int(share * values.shape[1])].tolist())
        for layer, values in nu.items()
    }


def cells(outcome: Outcome, real: Reference) -> list[str]:
    """Share, NLL above real text, distinct-3-gram ratio, share of rows told to be Japanese."""
    return [
        f"{outcome.share:.3f}", f"{outcome.nll - real.nll:+.2f}", f"{outcome.distinct / real.distinct:.2f}",
        f"{outcome.languages['ja']:.2f}",
    ]  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"
