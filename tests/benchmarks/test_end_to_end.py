"""Forward and encode is encode after forward; extraction is measured against its own step."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from qscope_kernels.cases import Case

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.benchmarks import end_to_end, extract
from qscope_jax.benchmarks.rows import Setting
from qscope_jax.benchmarks.shapes import qwen3_1p7b
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.sae.model import encode

CASE = Case(d=32, f=64, k=4)


def narrow(num_layers: int) -> ModelConfig:
    sizes = {"vocab_size": 64, "hidden_size": CASE.d, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8}
    return replace(qwen3_1p7b(num_layers), **sizes, intermediate_size=24, eos_token_ids=(1,))


@pytest.mark.slow
def test_forward_and_encode_in_one_program_is_encode_after_forward(monkeypatch):
    monkeypatch.setattr(end_to_end, "qwen3_1p7b", narrow)
    model = end_to_end.released_model(CASE, np.dtype("float32"), layers=2)
    tokens = jax.random.randint(jax.random.key(0), (2, 16), 0, 64)
    residual = end_to_end.make_forward(model)(model.params, tokens)
    code = end_to_end.make_forward(model, contract="exact")(model.params, tokens, model.sae)
    want = encode(model.sae, residual)
    np.testing.assert_allclose(code.values, want.values, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(code.indices, want.indices)


def test_the_rows_tell_the_arithmetic_of_both(monkeypatch):
    monkeypatch.setattr(end_to_end, "qwen3_1p7b", narrow)
    monkeypatch.setattr(end_to_end, "RELEASED", (CASE,))
    monkeypatch.setattr(end_to_end, "matmul_rate", lambda *_: 1e12)
    rows = list(end_to_end.bench_end_to_end(Setting((), tokens=32, dtype=np.dtype("float32"), rounds=3)))
    assert len(rows) == 4
    assert all("failed" not in row for row in rows)
    per_weight = 2 * (2 * 32 * (12 * 8 + 3 * 24)) + 4 * 2 * 4 * 8 * 16
    assert rows[1]["rate"] * rows[1]["b_seconds"] == pytest.approx(32 * per_weight)
    assert rows[0]["rate"] * rows[0]["b_seconds"] == pytest.approx(32 * (per_weight + 2 * 32 * 64))


@pytest.mark.slow
def test_extraction_is_measured_over_the_tokens_of_its_texts():
    result = extract.compare(
        extract.embedded(), make_encoder(load_tokenizer("demo")), documents=4, rounds=3, batch_tokens=128, top=8,
        words=2.0,
    )  # fmt: skip
    assert result["tokens"] > 4
    assert result["ratio"] > 0
