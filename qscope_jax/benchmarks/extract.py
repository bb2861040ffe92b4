"""Extraction, text in and parquet out, against its own jitted step fed from memory: what reading, tokenising, pooling
and writing cost on top of the arithmetic."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.backbone.weights import load_backbone
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_1p7b, random_params
from qscope_jax.data.batches import Filled, cut_documents, fill_batch, plan_batches
from qscope_jax.data.documents import Parts, read_ahead
from qscope_jax.data.text import Corpus, open_corpus
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract import make_extract_step, stream
from qscope_jax.extract_folder import Loaded, Target, make_parts
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams

_TEXT = "the residual stream of a model, 模型 的 残差 流, поток остатков, der Strom der Reste; 1 2 3"


def bench_extract(*, rounds: int) -> dict[str, Any]:
    """Ratio of tokens/s, extraction over step, above 0.85 where the goal is met: for the embedded model with all its
    SAEs, and for two layers of Qwen3-1.7B's shape with one SAE of 32,768 latents (random weights, float32)."""
    encoder = make_encoder(load_tokenizer("demo"))
    return {
        "embedded": compare(_embedded(), encoder, documents=250, rounds=rounds),
        "1.7b-shaped": compare(_wide(), encoder, documents=10, rounds=max(3, rounds // 4), batch_tokens=512),
    }


def compare(loaded: Loaded, encoder: Any, *, documents: int, rounds: int, batch_tokens: int = 2048) -> dict[str, Any]:
    """Times both sides in turns on the same batches; every shape is compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.jsonl"
        data.write_text("".join(_lines(documents)), encoding="utf-8")
        corpus = open_corpus([str(data)])
        target = _target(Path(folder), loaded, corpus, batch_tokens)
        batches, tokens = _batches(target, _parts(corpus, encoder, loaded))
        outs = iter(range(1 << 30))

        def extraction() -> np.ndarray:
            fresh = open_corpus([str(data)])
            place = target._replace(out=Path(folder) / f"out{next(outs)}")
            make_parts(place, _parts(fresh, encoder, loaded), loaded, progress=_silent, stopping=lambda: False)
            return np.zeros(0)

        def step() -> None:
            for _ in stream(loaded.step, loaded.params, loaded.saes, batches):
                pass

        result = paired(extraction, lambda: step() or np.zeros(0), rounds=rounds)
    positions = sum(content.mask.size for _, content in batches)
    return {
        "what": "tokens/s of extraction / of the step",
        "tokens": tokens,
        "tokens_per_second": tokens / result["a_seconds"],
        "wasted_positions": 1 - tokens / positions,
        "compilations": loaded.step.compilations,
        **result,
    }


def _embedded() -> Loaded:
    backbone = load_backbone("demo", dtype="float32")
    saes = load_saes("demo", dtype="float32")
    return Loaded(backbone.params, tuple(saes.values()), make_extract_step(backbone.config, tuple(saes)))


def _wide() -> Loaded:
    config, d_sae = qwen3_1p7b(2), 32_768
    w_enc = 0.02 * jax.random.normal(jax.random.key(1), (config.hidden_size, d_sae))
    unused = jnp.zeros((0, config.hidden_size))
    params = SaeParams(w_enc, jnp.zeros(d_sae), unused, jnp.zeros(config.hidden_size))
    sae = Sae(params, SaeConfig(config.hidden_size, d_sae, k=50, layer=1))
    return Loaded(random_params(config), (sae,), make_extract_step(config, (1,)))


def _lines(documents: int) -> Iterator[str]:
    rng = np.random.default_rng(0)
    for _ in range(documents):
        yield json.dumps({"text": " ".join(rng.choice(_TEXT.split(), int(rng.lognormal(4, 0.7)) + 1))}) + "\n"


def _target(out: Path, loaded: Loaded, corpus: Corpus, batch_tokens: int) -> Target:
    shapes = {
        str(n): {"d_sae": s.config.d_sae, "k": s.config.k} for n, s in zip(loaded.step.layers, loaded.saes, strict=True)
    }
    info = {
        "layers": list(loaded.step.layers),
        "shapes": shapes,
        "per": "document",
        "pool": "max",
        "top": None,
        "min_value": 0.0,
        "features": None,
        "values": "float32",
        "batch_tokens": batch_tokens,
        "max_length": 1024,
        "per_octave": 2,
        "long": "truncate",
        "overlap": 0,
    }
    return Target(out, info, corpus.schema)


def _parts(corpus: Corpus, encoder: Any, loaded: Loaded) -> Parts:
    ranges = corpus.parts(rows=max(1, len(corpus) // 2), size=1 << 30)
    return Parts(corpus, ranges, encoder, loaded.step.config.vocab_size)


def _batches(target: Target, parts: Parts) -> tuple[list[tuple[None, Filled]], int]:
    batches, tokens = [], 0
    for part in read_ahead(parts):
        segments = cut_documents(part.tokens, target.info["max_length"])
        tokens += int(segments.lengths.sum())
        batches += [(None, fill_batch(b, segments)) for b in plan_batches(segments.lengths, target.buckets)]
    return batches, tokens


def _silent(**_: int) -> None:
    """Progress that nobody watches."""
