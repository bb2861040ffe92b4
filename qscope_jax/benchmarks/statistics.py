"""Statistics of features against extraction of the same texts: what counting and contexts cost beside pooling and
writing."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.benchmarks.extract import embedded, random_documents, silent, target_of
from qscope_jax.benchmarks.paired import paired
from qscope_jax.data.documents import Parts
from qscope_jax.data.text import open_corpus
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.extract_folder import make_parts
from qscope_jax.features.count import Watch, count_text, init_counted, make_fold_step

_CONTEXTS = 8
_CHOSEN = {"batch_tokens": 2048, "top": None, "per_octave": 2}


def bench_statistics(*, rounds: int, documents: int = 250) -> dict[str, Any]:
    """Ratio of tokens/s, statistics with contexts over extraction per document, above 0.7 where the goal is met.

    The embedded model with all its SAEs; the same texts, from the file on, and the same shapes of batches.
    """
    loaded, encoder, fold = embedded(), make_encoder(load_tokenizer("demo")), make_fold_step()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.jsonl"
        data.write_text("".join(random_documents(documents, 4.0)), encoding="utf-8")
        outs = iter(range(1 << 30))

        def parts() -> Parts:
            corpus = open_corpus([str(data)])
            return Parts(
                corpus, corpus.parts(rows=max(1, documents // 2), size=1 << 30), encoder, loaded.step.config.vocab_size
            )

        def statistics() -> np.ndarray:
            state = init_counted([sae.config.d_sae for sae in loaded.saes], contexts=_CONTEXTS)
            state, _ = count_text(
                state, parts(), target.buckets, loaded.step, loaded.params, loaded.saes, thresholds, watch=watch,
                fold=fold,
            )  # fmt: skip
            return np.array(state.tokens)

        def extraction() -> np.ndarray:
            place = target._replace(out=Path(folder) / f"out{next(outs)}")
            make_parts(place, parts(), loaded, progress=silent, stopping=lambda: False)
            return np.zeros(0)

        target = target_of(Path(folder), loaded, open_corpus([str(data)]), _CHOSEN)
        thresholds = [np.inf] * len(loaded.saes)
        watch = Watch(silent, lambda: False, lambda part, state: None)
        tokens = int(statistics())
        result = paired(statistics, extraction, rounds=rounds)
    return {"what": "tokens/s of statistics / of extraction", "tokens": tokens, "contexts": _CONTEXTS, **result}
