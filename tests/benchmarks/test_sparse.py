"""Both sides of every ratio compute the same thing; at shapes for tests, and nothing here is about time."""

import jax.numpy as jnp
import numpy as np
import pytest
from qscope_kernels.cases import RELEASED, Case
from qscope_kernels.dispatch import Device, Kernel
from qscope_kernels.sparse_decode import gather_dot, sparse_decode
from qscope_kernels.sparse_outer import sparse_outer

from qscope_jax.benchmarks import sparse, sparse_torch
from qscope_jax.benchmarks.codes import random_code, shares
from qscope_jax.benchmarks.rows import Setting, Work, implementations, markdown, measure, picked, setting_of
from qscope_jax.jobs import bench

CASE = Case(d=32, f=256, k=8)
SETTING = Setting((CASE,), tokens=64, dtype=jnp.dtype("float32"), rounds=3)


@pytest.fixture(scope="module")
def data() -> sparse.Data:
    return sparse.random_data(CASE, SETTING)


@pytest.mark.parametrize("usage", sparse.USAGES)
def test_a_random_code_has_k_different_latents_per_token_at_the_stated_shares(usage):
    values, indices = (np.asarray(part) for part in random_code(20_000, CASE.f, CASE.k, usage=usage))
    assert indices.min() >= 0
    assert indices.max() < CASE.f
    assert all(len(set(row)) == CASE.k for row in indices[:500].tolist())
    assert (values > 0).all()
    assert (np.diff(values, axis=1) <= 0).all()
    used = np.sort(np.bincount(indices.ravel(), minlength=CASE.f))[::-1] / len(indices)
    want = shares(CASE.f, CASE.k, usage)
    assert want.sum() == pytest.approx(CASE.k)
    np.testing.assert_allclose(used, want, atol=0.012)


def test_a_heavy_code_uses_few_latents_often():
    want = shares(32_768, 50, "heavy")
    assert want[0] == 1
    assert want[1000] < 0.01
    assert shares(32_768, 50, "uniform").max() < 0.002


def test_the_dense_encoder_and_the_matmul_agree_with_encode(data, monkeypatch):
    values, indices = sparse.encoder(CASE.k, "exact", None)(*data[:3])
    want_values, want_indices = sparse.dense_encoder(CASE.k)(*data[:3])
    np.testing.assert_array_equal(indices, want_indices)
    np.testing.assert_allclose(values, want_values, rtol=1e-6)
    product = sparse.matmul(jnp.float32)(*data[:2]) + data.b_enc
    np.testing.assert_allclose(np.take_along_axis(np.asarray(product), np.asarray(indices), 1), values, rtol=1e-5)
    for platform in ("cpu", "gpu"):
        monkeypatch.setattr(sparse, "device_of", lambda platform=platform: Device(platform, "any"))
        found = sparse.selector.__wrapped__(CASE.k)(product)
        np.testing.assert_array_equal(found[0], sparse.top_k(CASE.k)(product)[0])
    assert sparse.matmul(jnp.bfloat16)(*data[:2]).dtype == jnp.bfloat16


def test_dense_matmuls_give_what_decode_and_the_gradients_give(data):
    values, indices = random_code(SETTING.tokens, CASE.f, CASE.k, usage="heavy")
    code = sparse.to_dense(values, indices, CASE.f, jnp.float32)
    decoded = sparse_decode(values, indices, data.w_dec)
    np.testing.assert_allclose(decoded, sparse.matmul(jnp.float32)(code, data.w_dec), rtol=1e-5, atol=1e-5)
    gradient, total = sparse_outer(values, indices, data.x, latents=CASE.f)
    np.testing.assert_allclose(gradient, sparse.dense_outer()(code, data.x), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(total, code.sum(0), rtol=1e-5)
    products = gather_dot(data.x, indices, data.w_dec)
    dense = np.take_along_axis(np.asarray(sparse.dense_dot()(data.x, data.w_dec)), np.asarray(indices), 1)
    np.testing.assert_allclose(products, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parity
def test_torch_computes_the_same_in_the_same_memory(data):
    pytest.importorskip("torch")
    values, indices = sparse.dense_encoder(CASE.k)(*data[:3])
    encode = sparse_torch.encoder(*data[:3], k=CASE.k)
    decode = sparse_torch.decoder(values, indices, data.w_dec)
    assert encode is not None
    assert decode is not None
    their_values, their_indices = encode().results
    np.testing.assert_array_equal(their_indices.numpy(), indices)
    np.testing.assert_allclose(their_values.numpy(), values, rtol=1e-5)
    decoded = sparse_decode(values, indices, data.w_dec)
    np.testing.assert_allclose(decode().results.numpy(), decoded, rtol=1e-4, atol=1e-5)


def test_every_row_of_the_sparse_benchmarks_is_measured(data, monkeypatch):
    monkeypatch.setattr(sparse, "matmul_rate", lambda *_: 1e12)
    monkeypatch.setattr(sparse, "copy_bandwidth", lambda *_: 1e10)
    rows = [
        *sparse.encode_rows(CASE, SETTING, data),
        *sparse.decode_rows(CASE, SETTING, data, "heavy"),
        *sparse.gradient_rows(CASE, SETTING, data, "heavy"),
        *sparse.gradient_rows(CASE, SETTING, data, "uniform"),
    ]
    assert [row for row in rows if "failed" in row] == []
    said = " ".join(row["what"] for row in rows)
    for words in ("encode, xla / matmul", "lax.top_k", "decode, xla", "encoder, xla", "gather_dot"):
        assert words in said
    assert all(row["ratio"] > 0 for row in rows)


def test_a_side_that_fails_is_a_row_that_says_why_and_one_that_is_not_there_is_none():
    def failing():
        raise ValueError("impl = 'x' cannot serve this\nmore")

    rows = list(measure(SETTING, "case", "a / b", failing, lambda: 0))
    assert rows == [{"case": "case", "what": "a / b", "failed": "ValueError: impl = 'x' cannot serve this"}]
    assert "cannot serve" in markdown(rows)[-1]
    assert list(measure(SETTING, "case", "a / b", None, lambda: 0)) == []


def test_rates_are_those_of_the_numerator_and_shares_those_of_the_ceiling():
    (row,) = measure(SETTING, "case", "a / b", lambda: 0, lambda: 0, Work(3e12, "B/s", ceiling=6e12))
    assert row["rate"] == pytest.approx(3e12 / row["b_seconds"])
    assert row["share"] == pytest.approx(row["rate"] / 6e12)
    shown = {"case": "c", "what": "w", "ratio": 1.5, "spread": 0.01, "rounds": 20.0}
    line = markdown([shown | {"rate": 3.2e12, "unit": "B/s", "share": 0.75}])[-1]
    assert line == "| c | w | 1.5 | ±0.01 | 20 | 3.2 TB/s | 75% |"


def test_the_setting_follows_the_device_and_knows_the_released_cases():
    setting = setting_of()
    assert (setting.tokens, setting.dtype, setting.sample) == (512, jnp.float32, 0.0)
    assert setting_of(cases=[case.name for case in RELEASED], tokens=7).cases == RELEASED
    with pytest.raises(ValueError, match="d1-f1-k1: expected some of d2048-f32768-k50"):
        setting_of(cases=["d1-f1-k1"])
    assert implementations(setting, {}) == ("xla",)
    assert implementations(setting_of(impl=["ref"]), {}) == ("ref",)
    kernel = Kernel("cpu", lambda x: x, lambda device, x: None if x.shape[0] > 1 else "too small")
    foreign, new = kernel._replace(platform="tpu"), kernel._replace(automatic=False)
    kernels = {"foreign": foreign, "new": new, "own": kernel}
    assert implementations(setting, kernels) == ("new", "own", "xla")
    assert implementations(setting_of(impl=["foreign", "own"]), kernels) == ("own",)
    assert picked(setting, kernels, jnp.ones(2)) == "own"
    assert picked(setting, kernels, jnp.ones(1)) == "xla"


def test_an_implementation_that_this_device_lacks_is_refused():
    sparse.check_impl(["ref", "xla"])
    for name in ("gpu", "xal"):
        with pytest.raises(ValueError, match=f"--impl {name}: expected some of ref, xla on this cpu"):
            bench.run(bench.Config(what=("encode",), impl=("xla", name)))
