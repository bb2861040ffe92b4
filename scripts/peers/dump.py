"""Residual vectors of the embedded model for every trainer: the same tokens, shuffled once.

    python scripts/peers/dump.py --corpus corpus.jsonl --out FOLDER [--tokens 1000000]

The corpus is what scripts/assets/build makes. Documents are packed as they are for the embedded SAEs.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from tokenizers import Tokenizer

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import load_backbone

sys.path.append(str(Path(__file__).resolve().parents[1] / "assets"))
from packing import load_documents, pack

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "qscope_jax" / "assets" / "model"
ROW, ROWS = 256, 16  # tokens per row; rows per forward
SEED = 77


def dump(arguments: argparse.Namespace) -> None:
    backbone = load_backbone(str(MODEL))
    config = backbone.config
    layers = tuple(range(config.num_layers))
    run = jax.jit(lambda p, t, s: forward(p, config, t, segment_ids=s, capture=layers, logits="none").captured)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {
        "corpus_sha256": hashlib.sha256(arguments.corpus.read_bytes()).hexdigest(),
        "model_sha256": hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest(),
        "layers": config.num_layers,
        "d_model": config.hidden_size,
        "row": ROW,
        "seed": SEED,
    }
    for split, wanted in (("train", arguments.tokens), ("heldout", arguments.heldout)):
        rows = pack(load_documents(arguments.corpus, tokenizer, split), ROW, seed=[SEED, split == "train"])
        count = min(wanted // ROW, len(rows.tokens)) // ROWS * ROWS
        order = np.random.default_rng([SEED, 2]).permutation(count * ROW) if split == "train" else None
        tokens, segments = rows.tokens[:count, :-1], rows.segments[:count, :-1]
        _write(
            lambda t, s: run(backbone.params, t, s), tokens, segments, order, arguments.out, split, config.num_layers
        )
        facts[f"{split}_tokens"] = count * ROW
    (arguments.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


def _write(
    run: Callable[[np.ndarray, np.ndarray], jax.Array],
    tokens: np.ndarray,
    segments: np.ndarray,
    order: np.ndarray | None,
    folder: Path,
    split: str,
    num_layers: int,
) -> None:
    """One file per layer; token i of the packed rows goes to row order[i]."""
    files = None
    for start in range(0, len(tokens), ROWS):
        acts = np.asarray(run(tokens[start : start + ROWS], segments[start : start + ROWS]))
        acts = acts.reshape(num_layers, -1, acts.shape[-1]).view(np.uint16)
        shape = (tokens.size, acts.shape[-1])
        files = files or [
            np.lib.format.open_memmap(folder / f"layer{n}.{split}.npy", "w+", np.uint16, shape)
            for n in range(num_layers)
        ]
        place = slice(start * ROW, (start + ROWS) * ROW)
        for file, layer in zip(files, acts, strict=True):
            file[place if order is None else order[place]] = layer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--heldout", type=int, default=200_000)
    dump(parser.parse_args())
