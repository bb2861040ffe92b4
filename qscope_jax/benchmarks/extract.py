"""Extraction, text in and parquet out, against its own jitted step fed from memory: what reading, tokenising, pooling
and writing cost on top of the arithmetic."""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from qscope_kernels.cases import RELEASED
from qscope_kernels.dispatch import device_of

from qscope_jax.backbone.weights import load_backbone
from qscope_jax.benchmarks.end_to_end import depth, released_model
from qscope_jax.benchmarks.paired import paired
from qscope_jax.data.batches import Filled, cut_documents, fill_batch, plan_batches
from qscope_jax.data.documents import Parts, read_ahead
from qscope_jax.data.text import Corpus, open_corpus
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract import make_extract_step, stream
from qscope_jax.extract_folder import Loaded, Target, make_parts
from qscope_jax.sae.formats import load_saes


def bench_extract(*, rounds: int) -> dict[str, Any]:
    """Ratio of tokens/s, extraction over step, above 0.85 where the goal is met.

    On a CPU for the embedded model with all its SAEs, and for two layers of Qwen3-1.7B's shape with one SAE of 32,768
    latents in float32; on an accelerator for 21 layers of that shape in bfloat16, in documents of about 500 tokens of
    which the 64 strongest features are kept, with the fewest shapes of batches (each is compiled). Random
    weights, the embedded model's tokenizer.
    """
    encoder, few = make_encoder(load_tokenizer("demo")), max(3, rounds // 4)
    if device_of().platform != "cpu":
        options = {"documents": 1200, "parts": 4, "words": 5.0, "batch_tokens": 16_384, "top": 64, "per_octave": 1}
        return {"1.7b to layer 20": compare(_random(jnp.bfloat16), encoder, rounds=few, **options)}
    return {
        "embedded": compare(embedded(), encoder, documents=250, rounds=rounds),
        "1.7b-shaped": compare(_random(jnp.float32), encoder, documents=10, rounds=few, batch_tokens=512),
    }


def compare(
    loaded: Loaded, encoder: Any, *, documents: int, rounds: int, batch_tokens: int = 2048, top: int | None = None,
    words: float = 4.0, parts: int = 2, per_octave: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Times both sides in turns on the same batches; every shape is compiled before.

    Documents have exp(words) words in the median; `top` and `per_octave` are those of `qscope extract`.
    """
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.jsonl"
        data.write_text("".join(random_documents(documents, words)), encoding="utf-8")
        corpus = open_corpus([str(data)])
        info = {"batch_tokens": batch_tokens, "top": top, "per_octave": per_octave}
        target = target_of(Path(folder), loaded, corpus, info)
        batches, tokens = _batches(target, _parts(corpus, encoder, loaded, parts))
        outs = iter(range(1 << 30))

        def extraction() -> np.ndarray:
            fresh = open_corpus([str(data)])
            place = target._replace(out=Path(folder) / f"out{next(outs)}")
            make_parts(place, _parts(fresh, encoder, loaded, parts), loaded, progress=silent, stopping=lambda: False)
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


def embedded() -> Loaded:
    backbone = load_backbone("demo", dtype="float32")
    saes = load_saes("demo", dtype="float32")
    return Loaded(backbone.params, tuple(saes.values()), make_extract_step(backbone.config, tuple(saes)))


def _random(dtype: Any) -> Loaded:
    """Qwen3-1.7B's shape as deep as this device shall go, and W32K; "fast" arithmetic where it is bfloat16."""
    config, params, sae = released_model(RELEASED[0], dtype, layers=depth())
    contract = "exact" if dtype == jnp.float32 else "fast"
    return Loaded(params, (sae,), make_extract_step(config, (config.num_layers - 1,), contract=contract))


def random_documents(documents: int, words: float) -> Iterator[str]:
    """Lines of JSON with documents of the shipped texts' words, exp(words) of them in the median, one word in ten a new
    one: a tokenizer remembers those that it has seen."""
    rng, corpus = np.random.default_rng(0), open_corpus(["demo"])
    known = np.array(" ".join(document.text for document in corpus.read(0, len(corpus))[0]).split())
    for _ in range(documents):
        chosen = rng.choice(known, int(rng.lognormal(words, 0.7)) + 1)
        new = rng.random(len(chosen)) < 0.1
        letters = "".join(map(chr, rng.integers(97, 123, 6 * int(new.sum()))))
        chosen[new] = [letters[i : i + 6] for i in range(0, len(letters), 6)]
        yield json.dumps({"text": " ".join(chosen)}) + "\n"


def target_of(out: Path, loaded: Loaded, corpus: Corpus, chosen: dict[str, Any]) -> Target:
    shapes = {
        str(n): {"d_sae": s.config.d_sae, "k": s.config.k} for n, s in zip(loaded.step.layers, loaded.saes, strict=True)
    }
    info = {
        "layers": list(loaded.step.layers),
        "shapes": shapes,
        "per": "document",
        "pool": "max",
        "min_value": 0.0,
        "features": None,
        "values": "float32",
        "max_length": 1024,
        "long": "truncate",
        "overlap": 0,
        **chosen,
    }
    return Target(out, info, corpus.schema)


def _parts(corpus: Corpus, encoder: Any, loaded: Loaded, parts: int) -> Parts:
    ranges = corpus.parts(rows=max(1, len(corpus) // parts), size=1 << 30)
    return Parts(corpus, ranges, encoder, loaded.step.config.vocab_size)


def _batches(target: Target, parts: Parts) -> tuple[list[tuple[None, Filled]], int]:
    batches, tokens = [], 0
    for part in read_ahead(parts):
        segments = cut_documents(part.tokens, target.info["max_length"])
        tokens += int(segments.lengths.sum())
        batches += [(None, fill_batch(b, segments)) for b in plan_batches(segments.lengths, target.buckets)]
    return batches, tokens


def silent(**_: int) -> None:
    """Progress that nobody watches."""
