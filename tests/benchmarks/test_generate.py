"""Both sides write the same text, and ours reads weights where they lie."""

from dataclasses import replace

import numpy as np
import pytest

from qscope_jax.backbone.parameters import split_layers
from qscope_jax.benchmarks.generate import compare_generation
from qscope_jax.benchmarks.shapes import qwen3_1p7b, qwen3_5_2b, random_params
from qscope_jax.generation import make_steps, start
from tests.benchmarks.test_families import narrow


@pytest.mark.parity
@pytest.mark.slow
def test_both_sides_write_the_same():
    pytest.importorskip("torch")
    found = compare_generation(narrow(qwen3_1p7b(4)), (1, 3), rounds=5)
    assert list(found) == ["batch 1", "batch 3"]
    assert all(case["ratio"] > 0 and case["tokens_per_second"] > 0 for case in found.values())


WIDE = {"vocab_size": 512, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "rotary_dim": 32}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [qwen3_1p7b, qwen3_5_2b])
def test_decoding_copies_no_weights(shape):
    """Of the temporary memory of the compiled loop; the same loop over stacked layers needs room for a layer's copy."""
    config = shape(4)
    linear = config.linear and replace(config.linear, num_key_heads=4, num_value_heads=4, key_dim=32, value_dim=32)
    config = replace(config, **WIDE, intermediate_size=1024, eos_token_ids=(1,), linear=linear)
    params = random_params(config)
    begun = start(params, config, np.ones((1, 4), int), max_new_tokens=4)

    def temporary(weights):
        arguments = (weights, None, begun.given, begun.state, np.int32(4), np.zeros(1, bool))
        analysis = begun.steps.decode.lower(*arguments).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    smallest, layer = 4 * 256 * 128, 4 * (3 * 256 * 1024 + 2 * 256 * 256)
    assert temporary(split_layers(params, config)) < smallest
    if shape is qwen3_1p7b:
        assert temporary(params) > layer
    make_steps.cache_clear()
