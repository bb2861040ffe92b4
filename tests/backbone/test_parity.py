"""Live against transformers on tiny random checkpoints that it wrote itself; `test_golden.py` needs no torch."""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.layers import rope_tables
from qscope_jax.backbone.tables import checkpoint_tensors, to_stored
from qscope_jax.backbone.weights import load_backbone, save_backbone

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

CONFIG = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 80,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


@pytest.fixture(scope="module")
def maker():
    path = Path(__file__).parents[2] / "scripts" / "make_goldens.py"
    spec = importlib.util.spec_from_file_location("make_goldens", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def pair(request, maker, tmp_path_factory):
    """The torch model and our backbone, read from the folder that transformers saved (its own config dialect)."""
    model, _ = maker.build(CONFIG | {"tie_word_embeddings": request.param}, seed=7)
    if request.param:  # an embedding of scale one would make the tied logits far larger than order one
        model.lm_head.weight.data *= CONFIG["hidden_size"] ** -0.5
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    backbone = load_backbone(folder, dtype="float32")
    assert backbone.config.tie_word_embeddings is request.param
    return model, backbone


@pytest.mark.parametrize("side", ["left", "right"])
def test_residuals_hidden_and_logits_equal_transformers(pair, maker, check_fidelity, side):
    model, backbone = pair
    tokens, mask = maker.padded_rows(CONFIG["vocab_size"], (45, 31, 4), side, seed=3)
    oracle = maker.observe(model, tokens, mask)
    assert 0.5 < oracle["logits"][mask].std() < 5
    out = check_fidelity(backbone, tokens, mask, oracle)
    # The last layer's capture is the raw residual; transformers' last hidden state is normed.
    assert not np.allclose(out.captured[-1][mask], oracle["hidden"][mask], rtol=0.1)


@pytest.mark.slow
def test_gradients_of_every_tensor_equal_torch(pair, maker, next_token_loss):
    model, backbone = pair
    tokens, mask = maker.padded_rows(CONFIG["vocab_size"], (45, 31, 4), "right", seed=4)
    expected = maker.gradients(model, tokens, mask)
    grads = jax.jit(jax.grad(next_token_loss))(backbone.params, backbone.config, tokens, mask)
    tensors = checkpoint_tensors(backbone.config)
    assert {tensor.name for tensor in tensors} == expected.keys()
    for tensor in tensors:
        leaf = grads
        for key in tensor.leaf:
            leaf = leaf[key]
        found = to_stored(np.asarray(leaf if tensor.period is None else leaf[tensor.period]), tensor.row.inputs)
        error = np.linalg.norm(found - expected[tensor.name]) / np.linalg.norm(expected[tensor.name])
        assert error < 1e-4, f"{tensor.name}: {error:.1e}"


def test_rotary_angles_equal_torch_at_far_positions():
    """One float32 ulp in a frequency would be 2.5e-4 in the cosine at position 32,767."""
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

    raw = CONFIG | {"head_dim": 128, "max_position_embeddings": 32768, "tie_word_embeddings": False}
    positions = np.array([[0, 1, 17, 4095, 16384, 32767]])
    expected = Qwen3RotaryEmbedding(Qwen3Config(**raw))(torch.zeros(1), torch.from_numpy(positions))
    found = rope_tables(positions, ModelConfig.from_hf(raw | {"model_type": "qwen3"}), np.float32)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)


def test_transformers_reads_what_we_save(pair, maker, tmp_path):
    from transformers import AutoModelForCausalLM

    model, backbone = pair
    save_backbone(backbone, tmp_path / "saved", shard_bytes=60_000)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    reloaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens, mask = maker.padded_rows(CONFIG["vocab_size"], (45, 31, 4), "left", seed=5)
    theirs, ours = maker.observe(model, tokens, mask), maker.observe(reloaded, tokens, mask)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    # and so does this library: bit for bit.
    again = load_backbone(tmp_path / "saved", dtype="float32")
    assert again.config == backbone.config
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)


def test_bfloat16_stays_close_to_our_own_float32(pair, maker):
    """bf16 is judged against float32 with the same rounded weights; 2e-2 is what transformers' own bf16 strays."""
    _, backbone = pair
    tokens, mask = maker.padded_rows(CONFIG["vocab_size"], (45, 31, 4), "left", seed=6)
    rounded = jax.tree.map(lambda a: a.astype("bfloat16"), backbone.params)
    layers = tuple(range(backbone.config.num_layers))
    run = jax.jit(forward, static_argnames=("capture", "logits"))
    low = run(rounded, backbone.config, tokens, mask=mask, capture=layers, logits="none").captured
    exact = jax.tree.map(lambda a: a.astype("float32"), rounded)
    high = run(exact, backbone.config, tokens, mask=mask, capture=layers, logits="none").captured
    for layer in layers:
        found, expected = np.asarray(low[layer], np.float32)[mask], np.asarray(high[layer])[mask]
        assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)
