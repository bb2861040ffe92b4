"""Tiny random models of the four families; two periods deep, with every leaf random and every width different."""

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.parameters import parameter_shapes

VOCAB = 50
_SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 256, "eos_token_id": 49,
    "tie_word_embeddings": False,
}  # fmt: skip
_DENSE = {"intermediate_size": 24}
_MOE = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 12}
_HYBRID = {
    "full_attention_interval": 4, "partial_rotary_factor": 0.5, "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 6, "linear_value_head_dim": 10, "linear_conv_kernel_dim": 4,
}  # fmt: skip
_PARTS = {
    "qwen3": _DENSE,
    "qwen3_moe": _MOE | {"norm_topk_prob": True},
    "qwen3_5": _DENSE | _HYBRID,
    "qwen3_5_moe": _MOE | _HYBRID | {"shared_expert_intermediate_size": 20},
}
FAMILIES = tuple(_PARTS)
HYBRIDS = ("qwen3_5", "qwen3_5_moe")
# For `jax.jit` where a test asks what is computed, not how fast: it spends its time on compiling.
QUICK = {"xla_backend_optimization_level": 0}


def raw_config(family, **changes):
    """A flat config.json of the family."""
    return {"model_type": family} | _SIZES | _PARTS[family] | changes


def make_config(family, **changes):
    return ModelConfig.from_hf(raw_config(family, **changes))


def make_params(config, seed=0):
    """Attention and routing well away from uniform; heads that forget at once beside heads that remember chunks."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        names = [key.key for key in path if hasattr(key, "key")]
        return jnp.asarray(_draw(rng, names, leaf.shape, config), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, parameter_shapes(config, jnp.float32))


def _draw(rng, names, shape, config):
    name = names[-1]
    if name == "scale":  # Qwen3.5 holds the weight less one, but for the norm of the delta rule
        centred = config.hybrid and names[-2] != "norm"
        return rng.uniform(0.4, 1.6, shape) - centred
    if name == "a_log":
        return np.log(rng.uniform(0.5, 8, shape))
    if name == "dt_bias":
        return rng.uniform(-6, -2, shape)
    if name.startswith(("embed", "conv")):
        return (1.0 if name == "embed" else 0.5) * rng.standard_normal(shape)
    # Hybrids amplify rounding: 1.5 everywhere would drown the limits in what one float32 ulp of the weights does.
    gain = {"a": 0.3, "o": 0.5, "down": 0.5}.get(name, 1.0) if config.hybrid else 1.5
    return gain * config.hidden_size**-0.5 * rng.standard_normal(shape)


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def relative_l2(found, expected):
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
