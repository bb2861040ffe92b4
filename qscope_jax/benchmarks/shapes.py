"""Backbones of released width, cut in depth and experts, with random weights.

All tie their embeddings: no benchmark computes logits, and a head would only take memory.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from qscope_jax.backbone.config import LinearConfig, ModelConfig, MoeConfig
from qscope_jax.backbone.forward import Params, init_params

_PERIOD = ("linear", "linear", "linear", "full")


def qwen3_1p7b(num_layers: int) -> ModelConfig:
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
        precision="highest",
    )


def qwen3_30b_a3b(num_layers: int, num_experts: int) -> ModelConfig:
    """Qwen3-30B-A3B-Base with fewer layers and experts."""
    return replace(
        qwen3_1p7b(num_layers),
        model_type="qwen3_moe",
        num_heads=32,
        num_kv_heads=4,
        intermediate_size=None,
        moe=MoeConfig(num_experts, num_active=8, intermediate_size=768, shared_intermediate_size=None, normalise=True),
    )


def qwen3_5_2b(num_layers: int) -> ModelConfig:
    """Qwen3.5-2B-Base with another depth, a multiple of its period of four layers."""
    return replace(
        qwen3_1p7b(num_layers),
        model_type="qwen3_5",
        vocab_size=248_320,
        num_heads=8,
        num_kv_heads=2,
        head_dim=256,
        rotary_dim=64,
        rope_theta=1e7,
        max_position_embeddings=262_144,
        layer_types=_PERIOD * (num_layers // len(_PERIOD)),
        linear=LinearConfig(num_key_heads=16, num_value_heads=16, key_dim=128, value_dim=128, conv_width=4),
        eos_token_ids=(248_044,),
    )


def qwen3_5_35b_a3b(num_layers: int, num_experts: int) -> ModelConfig:
    """Qwen3.5-35B-A3B-Base with fewer layers, a multiple of four, and experts."""
    return replace(
        qwen3_5_2b(num_layers),
        model_type="qwen3_5_moe",
        num_heads=16,
        intermediate_size=None,
        linear=LinearConfig(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, conv_width=4),
        moe=MoeConfig(num_experts, num_active=8, intermediate_size=512, shared_intermediate_size=512, normalise=True),
    )


def random_params(config: ModelConfig, *, dtype=jnp.float32) -> Params:
    """`init_params` in one compiled program, which at these widths takes half the time."""
    return jax.jit(init_params, static_argnames="dtype")(jax.random.key(0), config, dtype=dtype)
