"""What is measured is what was released, cut, and what transformers computes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qscope_jax.backbone.config import LinearConfig, ModelConfig, MoeConfig
from qscope_jax.benchmarks import compile as compiling
from qscope_jax.benchmarks.forward import compare_with_transformers
from qscope_jax.benchmarks.moe import compare_experts
from qscope_jax.benchmarks.shapes import qwen3_1p7b, qwen3_5_2b, qwen3_5_35b_a3b, qwen3_30b_a3b

RELEASED = json.loads((Path(__file__).parents[1] / "goldens" / "released.json").read_text())
SHAPES = {
    "Qwen3-1.7B-Base": qwen3_1p7b(4),
    "Qwen3-30B-A3B-Base": qwen3_30b_a3b(4, 16),
    "Qwen3.5-2B-Base": qwen3_5_2b(4),
    "Qwen3.5-35B-A3B-Base": qwen3_5_35b_a3b(4, 16),
}
NARROW = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "rotary_dim": 8}


def narrow(config: ModelConfig) -> ModelConfig:
    """The same family and depth in a size for tests."""
    return replace(
        config,
        **NARROW,
        eos_token_ids=(1,),
        intermediate_size=config.intermediate_size and 24,
        linear=config.linear and LinearConfig(2, 4, 8, 8, 4),
        moe=config.moe and MoeConfig(4, 2, 16, config.moe.shared_intermediate_size and 16, config.moe.normalise),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_shapes_are_the_released_ones_but_for_depth_experts_and_tied_embeddings(name):
    shape, released = SHAPES[name], ModelConfig.from_hf(RELEASED[name]["config"])
    assert shape.period == released.period
    cut = {"num_layers": 4, "layer_types": released.layer_types[:4], "tie_word_embeddings": True}
    moe = released.moe and replace(released.moe, num_experts=16)
    assert shape == replace(released, moe=moe, **cut)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_both_sides_compute_the_same(name):
    pytest.importorskip("torch")
    assert compare_with_transformers(narrow(SHAPES[name]), (2, 70), rounds=3)["relative_l2"] < 1e-5


@pytest.mark.slow
def test_experts_that_are_not_chosen_take_no_temporary_memory():
    few = narrow(qwen3_30b_a3b(1, 4))
    assert few.moe is not None
    many = replace(few, moe=replace(few.moe, num_experts=32))
    result = compare_experts(few, many, 512, rounds=3)
    assert set(result) == {"forward", "gradient", "decode"}
    for case in result.values():
        assert 0 < case["temporary_many"] < 1.1 * case["temporary_few"]


def test_a_cache_on_disk_is_refused_where_compiling_is_timed(monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    with pytest.raises(ValueError, match="unset JAX_COMPILATION_CACHE_DIR"):
        compiling.bench_compile(rounds=3)
