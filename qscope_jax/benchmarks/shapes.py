"""Backbones of released width, cut in depth, with random weights."""

from qscope_jax.backbone.config import ModelConfig, Precision


def qwen3_1p7b(num_layers: int, precision: Precision) -> ModelConfig:
    """Qwen3-1.7B-Base with fewer layers."""
    return ModelConfig(
        model_type="qwen3",
        vocab_size=151_936,
        hidden_size=2048,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rotary_dim=128,
        intermediate_size=6144,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        max_position_embeddings=32_768,
        tie_word_embeddings=True,
        layer_types=("full",) * num_layers,
        linear=None,
        moe=None,
        eos_token_ids=(151_643,),
        precision=precision,
    )
