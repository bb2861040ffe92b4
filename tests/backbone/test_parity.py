"""Live against transformers on tiny random checkpoints that it wrote itself; `test_golden.py` needs no torch."""

import jax
import numpy as np
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.context import rope_tables
from qscope_jax.backbone.weights import load_backbone, save_backbone

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

LENGTHS = (70, 65, 4)  # longer than a chunk of the delta rule (64)
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
_ROPE = {"rope_type": "default", "rope_theta": 1e6}
_MOE = {"num_experts": 10, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_HYBRID = {
    "num_hidden_layers": 8,
    "rope_parameters": _ROPE | {"partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0], "mrope_interleaved": True},
    "linear_num_key_heads": 3,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
CONFIGS = {
    "qwen3": {"intermediate_size": 80, "rope_parameters": _ROPE},
    "qwen3_moe": {**_MOE, "intermediate_size": 80, "norm_topk_prob": True, "rope_parameters": _ROPE},
    "qwen3_5_text": {**_HYBRID, "intermediate_size": 80},
    "qwen3_5_moe_text": {
        **(_HYBRID | _MOE | {"num_hidden_layers": 4, "full_attention_interval": 2}),
        "shared_expert_intermediate_size": 40,
    },
}


@pytest.fixture(scope="module", params=[(family, tied) for family in CONFIGS for tied in (False, True)], ids=str)
def pair(request, maker, tmp_path_factory):
    """The torch model, the folder that transformers saved (its own config dialect), and our backbone read from it."""
    family, tied = request.param
    config = {"model_type": family, **_SIZES, **CONFIGS[family], "tie_word_embeddings": tied}
    model, _ = maker.build(config, seed=7)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    backbone = load_backbone(folder, dtype="float32")
    assert backbone.config.tie_word_embeddings is tied
    return model, folder, backbone


@pytest.mark.parametrize("side", ["left", "right"])
def test_residuals_hidden_and_logits_equal_transformers(pair, maker, check_fidelity, side):
    model, _, backbone = pair
    tokens, mask = maker.clear_rows(model, LENGTHS, side, seed=3)
    oracle = maker.observe(model, tokens, mask)
    assert 0.5 < oracle["logits"].std() < 5
    out = check_fidelity(backbone, tokens, mask, oracle)
    # The last layer's capture is the raw residual; transformers' last hidden state is normed.
    assert not np.allclose(out.captured[-1][mask], oracle["hidden"], rtol=0.1)


@pytest.mark.slow
def test_gradients_of_every_tensor_equal_torch(pair, maker, stored_gradients):
    model, _, backbone = pair
    tokens, mask = maker.clear_rows(model, LENGTHS, "right", seed=4)
    expected = maker.gradients(model, tokens, mask)
    if backbone.config.model_type == "qwen3_moe":  # saved per expert
        expected = maker.split_experts(expected)
    grads = stored_gradients(backbone, tokens, mask)
    assert grads.keys() == expected.keys()
    for name, found in grads.items():
        error, norm = np.linalg.norm(found - expected[name]), np.linalg.norm(expected[name])
        assert error <= 1e-4 * norm, f"{name}: {error:.1e} of {norm:.1e}"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_5_text"])
def test_rotary_angles_equal_torch_at_far_positions(family):
    """One float32 ulp in a frequency would be 2.5e-4 in the cosine at position 32,767."""
    from transformers import AutoConfig
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5TextRotaryEmbedding

    rotary = Qwen3RotaryEmbedding if family == "qwen3" else Qwen3_5TextRotaryEmbedding
    raw = _SIZES | CONFIGS[family] | {"head_dim": 128, "tie_word_embeddings": False}
    positions = np.array([[0, 1, 17, 4095, 16384, 32767]])
    expected = rotary(AutoConfig.for_model(family, **raw))(torch.zeros(1), torch.from_numpy(positions))
    kinds = ["full_attention"] * raw["num_hidden_layers"]
    config = ModelConfig.from_hf(raw | {"model_type": family, "layer_types": kinds})
    found = rope_tables(positions, config, np.float32)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)


def test_transformers_reads_what_we_save(pair, maker, tmp_path):
    model, _, backbone = pair
    save_backbone(backbone, tmp_path / "saved", shard_bytes=60_000)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    reloaded = maker.read_back(tmp_path / "saved")
    tokens, mask = maker.padded_rows(_SIZES["vocab_size"], LENGTHS, "left", seed=5)
    theirs, ours = maker.observe(model, tokens, mask), maker.observe(reloaded, tokens, mask)
    for name in theirs:
        np.testing.assert_array_equal(ours[name], theirs[name])
    # and so does this library: bit for bit.
    again = load_backbone(tmp_path / "saved", dtype="float32")
    assert again.config == backbone.config
    jax.tree.map(np.testing.assert_array_equal, again.params, backbone.params)


@pytest.mark.parametrize("pair", [(family, False) for family in CONFIGS], indirect=True, ids=str)
def test_bfloat16_stays_close_to_our_own_float32(pair, maker, run_forward):
    """bf16 is judged against float32 with the same rounded weights; the limits are what transformers' own bf16 strays.

    The median over tokens, because bf16 sends a few tokens to other experts.
    """
    _, folder, backbone = pair
    limit = 2e-2 if backbone.config.model_type == "qwen3" else 3e-2
    tokens, mask = maker.padded_rows(_SIZES["vocab_size"], LENGTHS, "left", seed=6)
    fast = load_backbone(folder, dtype="bfloat16")
    layers = tuple(range(backbone.config.num_layers))
    low = run_forward(fast.params, fast.config, tokens, mask=mask, capture=layers).captured
    exact = jax.tree.map(lambda a: a.astype("float32"), fast.params)
    high = run_forward(exact, backbone.config, tokens, mask=mask, capture=layers).captured
    found, expected = np.asarray(low, np.float32)[:, mask], np.asarray(high)[:, mask]
    errors = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.median(errors, axis=1).max() < limit
