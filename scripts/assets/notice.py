"""Write qscope_jax/assets/NOTICE.md: sources, licences, how the assets were made, and the figures of report.json.

python scripts/assets/notice.py --cache DIR
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sources import LANGS, SOURCES

ASSETS = Path(__file__).resolve().parents[2] / "qscope_jax" / "assets"
HEAD = """# The embedded model, its SAEs and texts

What stands in this folder, made by `scripts/assets/build` from the sources below. It exists so that every command
works without a download. It is a toy: it writes sentences that are locally fluent and mean nothing.

| part | what it is |
|---|---|
| `model/` | a base model of Qwen3 architecture with {parameters:,} parameters ({num_hidden_layers} layers, width \
{hidden_size}, {num_attention_heads} + {num_key_value_heads} heads, feed-forward {intermediate_size}, vocabulary \
{vocab_size:,}, context {max_position_embeddings}), bfloat16 |
| `sae/` | a TopK SAE for the output of each layer, {d_sae:,} features ({expansion}x), k = {k}, bfloat16, in the file \
layout of the Qwen-Scope releases |
| `statistics/` | how often and how strongly each feature fires on about 400,000 tokens of the train text: arrays only |
| `texts/` | 64 short passages in 8 languages and 3 registers, written for this project; Apache-2.0 like the rest |
| `report.json` | every figure below, and more |
"""
SOURCES_HEAD = """## What it was trained on

Text of Debian 12 packages. None of it is contained here: what ships are weights and a vocabulary computed from it. The
packages, their versions and licences:

| source | kind of text | packages | version | licence |
|---|---|---|---|---|
"""
METHOD = """
Code, tables, menus, titles, licence texts, paragraphs left in English in other languages, and repeated paragraphs
(equal but for digits, case and punctuation) were removed. Sections are held out in all languages at once, since
translations say the same; a held-out paragraph never occurs in the train text. The languages get the same amount of
content as far as the translations reach; stories are 15 to 24 % of it.

## How it was made

- Tokenizer: byte-level BPE in the form of Qwen2's, on the train text with balanced languages; 4,096 tokens.
- Model: {tokens} tokens ({epochs:.1f} passes over the {corpus:,} tokens of the train text), documents packed with
  attention and positions kept inside each document, each ending with `<|endoftext|>`; Muon (AdamW for embeddings and
  norms), rate 4e-3, constant, then falling to zero over the last 30 % of the steps; 4,096 tokens a step; rows of 128,
  then 256, then 512 tokens. Trained on a CPU with this library.
- SAEs: `qscope train-sae` with `configs/train-sae/demo.toml`, all layers at once: {sae_tokens:.1f} M tokens of train
  text, Adam, rate {sae_rate}, falling to zero over the last {sae_fall:.0%}, AuxK 1/32; mean and scale folded into the
  biases; rounded to bfloat16 before anything was measured.

## Figures on held-out text
"""
LIMITS = """
Limits: the low FVU flatters (128 dimensions, 4,096 tokens, and the languages' means count as explained variance, hence
the second column). One feature tells a language apart already at layer 0, where it reads token identity; AUROC alone
proves little. No residual norm is massive in so small a model: sinks do not occur. Positions above 512 were never seen.
The manuals repeat their phrases, which makes held-out text easier than its source's name suggests.
"""


def sources_table(versions: dict[str, str]) -> str:
    rows = []
    for source in SOURCES:
        first = source.packages[0]
        names = ", ".join(f"`{name}`" for name in source.packages)
        rows.append(f"| {source.name} | {source.kind} | {names} | {versions[first]} | {source.licence} |")
    return "\n".join(rows)


def figures(report: dict[str, Any]) -> str:
    """The tables of README and NOTICE."""
    model, features = report["language_model"], report["language_features"]
    lines = ["| held-out text | " + " | ".join(LANGS) + " | mean |", "|---|" + "---|" * (len(LANGS) + 1)]
    for key, label in (
        ("bits_per_byte", "bits/byte"),
        ("nats_per_token", "nats/token"),
        ("unigram_nats", "unigram entropy, nats/token"),
        ("below_unigram", "below it by"),
    ):
        values = [model[key][lang] for lang in LANGS]
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| {label} | {cells} | {sum(values) / len(values):.2f} |")
    best = [features[lang] for lang in LANGS]
    lines.append("| best feature (layer:index) | " + " | ".join(f"{f['layer']}:{f['feature']}" for f in best) + " | |")
    held = [f["held_out"] for f in best]
    lines.append("| its AUROC | " + " | ".join(f"{h:.3f}" for h in held) + f" | {sum(held) / len(held):.3f} |")
    lines += ["", "| layer | FVU | FVU against each language's mean | dead | L0 |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['layer']} | {row['fvu']:.3f} | {row['fvu_within_groups']:.3f} | {row['dead_fraction_train']:.2%} "
        f"| {row['l0']:.1f} |"
        for row in report["saes"]
    ]
    samples = report["samples"]
    lines += [
        "",
        f"Of {samples['samples']} samples (96 tokens, temperature 0.7, the end token may stop them) "
        f"{samples['with_newline']} contain a new line; {samples['jump_at_newline']} change language there, "
        f"{samples['jump']} change language at all, {samples['alien_letters']} contain a letter of an alien script. "
        "AUROC: the feature was chosen by its mean activation on train passages of 64 tokens and judged on others.",
    ]
    return "\n".join(lines)


def write(cache: Path) -> None:
    report = json.loads((ASSETS / "report.json").read_text(encoding="utf-8"))
    versions = json.loads((cache / "versions.json").read_text())
    corpus, tokens = report["train_tokens_in_corpus"], report["train_tokens"]
    trained = json.loads((cache / "build" / "saes" / "manifest.json").read_text(encoding="utf-8"))
    recipe = trained["config"]
    made = {"sae_tokens": recipe["tokens"] / 1e6, "sae_rate": recipe["lr"], "sae_fall": recipe["decay_share"]}
    method = METHOD.format(tokens=f"{tokens / 1e6:.1f} M", epochs=tokens / corpus, corpus=corpus, **made)
    model, sae = (json.loads((ASSETS / name / "config.json").read_text()) for name in ("model", "sae"))
    head = HEAD.format(parameters=report["parameters"], expansion=sae["d_sae"] // sae["d_model"], **model, **sae)
    text = f"{head}\n{SOURCES_HEAD}{sources_table(versions)}\n{method}\n{figures(report)}\n{LIMITS}"
    (ASSETS / "NOTICE.md").write_text(text, encoding="utf-8")
    print(figures(report))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    write(parser.parse_args().cache)
