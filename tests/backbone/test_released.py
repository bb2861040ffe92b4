"""The seven released backbones: their configs are read, and they have exactly their tensors and parameters.

`tests/goldens/released.json` holds the facts: tensors by name and stored shape, once per kind of layer.
"""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.backbone.tables import Dialect, checkpoint_tensors

RELEASED = json.loads((Path(__file__).parents[1] / "goldens" / "released.json").read_text())


def layer_kinds(text):
    """Every fourth layer of Qwen3.5 is full attention, all of Qwen3's are."""
    interval = text.get("full_attention_interval", 1)
    return ["linear_attention" if (i + 1) % interval else "full_attention" for i in range(text["num_hidden_layers"])]


@pytest.fixture(params=RELEASED)
def facts(request):
    return RELEASED[request.param]


def test_the_config_is_read_in_each_form(facts):
    raw = facts["config"]
    text = raw.get("text_config", raw)
    config = ModelConfig.from_hf(raw)
    assert (config.hidden_size, config.num_layers, config.head_dim) == tuple(
        text[key] for key in ("hidden_size", "num_hidden_layers", "head_dim")
    )
    assert [f"{kind}_attention" for kind in config.layer_types] == layer_kinds(text)
    assert (config.linear is None, config.moe is None) == ("linear_key_head_dim" not in text, "num_experts" not in text)
    # With the layers' kinds written out, without the outer part, and as we write it.
    explicit = text | {"layer_types": layer_kinds(text), "tie_word_embeddings": config.tie_word_embeddings}
    assert ModelConfig.from_hf(raw | {"text_config": explicit} if text is not raw else explicit) == config
    assert ModelConfig.from_hf(explicit) == config
    assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


def test_tensors_and_parameters_are_exactly_the_released_ones(facts):
    config = ModelConfig.from_hf(facts["config"])
    expected = dict(facts["model"])
    prefix = next(name for name in expected if name.endswith("embed_tokens.weight")).removesuffix("embed_tokens.weight")
    for layer, kind in enumerate(config.layer_types):
        for row, shape in (facts["every_layer"] | facts[f"{kind}_attention"]).items():
            for expert in range(facts["config"]["num_experts"] if "{e}" in row else 1):
                expected[f"{prefix}layers.{layer}.{row.replace('{e}', str(expert))}"] = shape
    released = checkpoint_tensors(config, Dialect(prefix, fused=config.hybrid))
    assert {tensor.name: list(tensor.stored_shape) for tensor in released} == expected
    assert len(released) == len(expected) == facts["tensors"]
    assert sum(math.prod(shape) for shape in expected.values()) == facts["parameters"]
    # Saved by us, a multimodal model is the text model alone: without the infix.
    plain = [tensor.name.replace("language_model.", "") for tensor in released]
    assert [tensor.name for tensor in checkpoint_tensors(config)] == plain
    shapes = parameter_shapes(config)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == facts["parameters"]
    assert shapes["embed"].dtype == jnp.bfloat16
