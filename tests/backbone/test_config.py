"""A config.json is read in every dialect that exists, or refused by name; never guessed."""

import json
import re

import pytest

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.config_reader import ConfigError

# The released files (Qwen/Qwen3-1.7B-Base, Qwen/Qwen3-8B-Base), as far as they differ.
RELEASED = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151643, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 6144, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip


def changed(raw, **changes):
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def test_the_released_dialect_is_read_without_a_warning():
    config = ModelConfig.from_hf(RELEASED)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads) == (2048, 28, 16, 8)
    assert (config.head_dim, config.intermediate_size, config.vocab_size) == (128, 6144, 151936)
    assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (1e6, 1e-6, 32768)
    assert config.tie_word_embeddings is True
    assert config.layer_types == ("full",) * 28
    assert config.eos_token_ids == (151643,)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
        {"rope_theta": 5e5, "rope_scaling": ...},
        {"rope_theta": ..., "rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_theta": ..., "rope_parameters": {"rope_theta": 500000, "partial_rotary_factor": 1.0}},
    ],
    ids=["released", "scaling default", "scaling type", "flat", "transformers 5", "transformers 5, partial"],
)
def test_every_dialect_of_rope_gives_the_same_config(rope, raw):
    config = ModelConfig.from_hf(changed(raw, **rope))
    assert config == ModelConfig.from_hf(changed(raw, rope_theta=5e5))


def test_what_transformers_5_adds_is_read_too(raw):
    added = {"layer_types": ["full_attention"] * 4, "dtype": "float32", "pad_token_id": None, "eos_token_id": [3, 4]}
    config = ModelConfig.from_hf(raw | added)
    assert config.layer_types == ("full",) * 4
    assert config.eos_token_ids == (3, 4)


def test_writing_and_reading_gives_the_same_config(raw):
    for change in ({}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]}, {"tie_word_embeddings": True}):
        config = ModelConfig.from_hf(raw | change)
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", [None, "llama", "qwen2_moe", "qwen3_next", "qwen3_6", "qwen3_vl", ["qwen3"]])
def test_other_model_types_are_refused_by_name(raw, name):
    with pytest.raises(ConfigError, match=f"model_type {re.escape(repr(name))} is not supported"):
        ModelConfig.from_hf(raw | {"model_type": name})


CONSTANTS = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta",
]  # fmt: skip


@pytest.mark.parametrize("key", CONSTANTS)
def test_no_constant_has_a_default(raw, key):
    for absent in (..., None):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            ModelConfig.from_hf(changed(raw, **{key: absent}))


@pytest.mark.parametrize("key", CONSTANTS)
@pytest.mark.parametrize("value", ["64", True, 0, -1, [64], {}, float("nan"), float("inf"), 10**400])
def test_a_constant_of_a_wrong_type_or_value_is_refused(raw, key, value):
    with pytest.raises(ConfigError, match=key):
        ModelConfig.from_hf(raw | {key: value})


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers"])
def test_a_size_is_an_integer(raw, key):
    with pytest.raises(ConfigError, match=f"{key} = 16.0 is not a positive int"):
        ModelConfig.from_hf(raw | {key: 16.0})


def test_two_thetas_that_differ_are_refused(raw):
    for key in ("rope_parameters", "rope_scaling"):
        same = {key: {"rope_type": "default", "rope_theta": 10000.0}}
        assert ModelConfig.from_hf(raw | same) == ModelConfig.from_hf(raw)
        with pytest.raises(ConfigError, match="rope_theta is given as 10000 and as 50000"):
            ModelConfig.from_hf(raw | {key: {"rope_type": "default", "rope_theta": 50000}})


def test_a_rope_type_in_either_place_is_seen(raw):
    # A config that two tools have edited: transformers would obey rope_scaling.
    both = {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(ConfigError, match="rope_type 'yarn' is not supported"):
        ModelConfig.from_hf(raw | both)


@pytest.mark.parametrize("where", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["yarn", "linear", "dynamic", "llama3", "longrope", "mrope", None])
def test_other_rope_types_are_refused_by_name(raw, where, kind):
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 10000}
    with pytest.raises(ConfigError, match=f"rope_type {re.escape(repr(kind))} is not supported"):
        ModelConfig.from_hf(raw | {where: rope})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window = True is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised checkpoints are not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, r"\['sliding_attention'\] are not supported"),
        ({"layer_types": ["full_attention"] * 3}, "layer_types names 3 layers, num_hidden_layers says 4"),
        ({"rope_scaling": "yarn"}, "rope_scaling is str, expected an object"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, "partial_rotary_factor = 0.25"),
        ({"num_attention_heads": 3}, "num_attention_heads is not a multiple of num_key_value_heads"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None, expected true or false"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', expected true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, expected true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id = '</s>' is not an id or a list of ids"),
        ({"eos_token_id": [1, True]}, r"eos_token_id = \[1, True\] is not an id"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(raw, change, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(raw | change)


@pytest.mark.parametrize("value", [5, "full_attention", {"0": "full_attention"}, [None] * 4, [["full_attention"]] * 4])
def test_layer_types_of_a_wrong_type_are_refused(raw, value):
    with pytest.raises(ConfigError, match="layer_types"):
        ModelConfig.from_hf(raw | {"layer_types": value})


def test_head_dim_must_be_even_for_rotary_halves(raw):
    with pytest.raises(ConfigError, match="head_dim = 7"):
        ModelConfig.from_hf(raw | {"head_dim": 7})


def test_all_faults_are_reported_together(raw):
    broken = changed(raw, hidden_size=..., head_dim="8", attention_bias=True, rope_scaling={"rope_type": "yarn"})
    with pytest.raises(ConfigError) as caught:
        ModelConfig.from_hf(broken, where="some/config.json")
    message = str(caught.value)
    assert message.startswith("some/config.json: ")
    for part in ("hidden_size is missing", "head_dim = '8'", "attention_bias = True", "rope_type 'yarn'"):
        assert part in message


def test_an_unknown_key_warns_and_suggests_the_known_one(raw):
    with pytest.warns(UserWarning, match="'num_hiden_layers' is unknown and ignored; did you mean 'num_hidden_layers'"):
        ModelConfig.from_hf(raw | {"num_hiden_layers": 3})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"model_type": "qwen3", "head_dim": 8, "head_dim": 16}', "key given twice: \\['head_dim'\\]"),
        ("[]", "expected a JSON object, found list"),
        ('{"model_type": ', "not a readable config.json"),
        ("[" * 100_000, "not a readable config.json"),
        ("version https://git-lfs.github.com/spec/v1", "not a readable config.json"),
    ],
    ids=["twice", "list", "truncated", "deep", "pointer"],
)
def test_a_damaged_file_is_refused_with_its_name(tmp_path, text, message):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))) as caught:
        read_config(path)
    assert re.search(message, str(caught.value))


def test_a_file_in_another_encoding_is_refused_with_its_name(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe{\x00}\x00")
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        read_config(path)
