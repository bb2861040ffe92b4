"""The dialects of the mixtures of experts and of Qwen3.5: each is read, or refused by name; nothing is guessed."""

import copy
import json
import re

import pytest

from qscope_jax.backbone.config import LinearConfig, ModelConfig, MoeConfig
from qscope_jax.backbone.config_reader import ConfigError
from tests.backbone.families import FAMILIES, HYBRIDS, raw_config

MIXTURES = ("qwen3_moe", "qwen3_5_moe")
SIZES = [
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "rms_norm_eps", "rope_theta",
]  # fmt: skip
LINEAR = [
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
]  # fmt: skip
EXPERTS = ["num_experts", "num_experts_per_tok", "moe_intermediate_size"]
CONSTANTS = {
    "qwen3": [*SIZES, "intermediate_size"],
    "qwen3_moe": [*SIZES, *EXPERTS],
    "qwen3_5": [*SIZES, *LINEAR, "intermediate_size"],
    "qwen3_5_moe": [*SIZES, *LINEAR, *EXPERTS, "shared_expert_intermediate_size"],
}


def changed(raw, **changes):
    return {key: value for key, value in (raw | changes).items() if value is not ...}


def nested(family, outer=(), **changes):
    """The config.json of a multimodal release."""
    text = changed(raw_config(family), **{"model_type": f"{family}_text", "tie_word_embeddings": ...} | changes)
    return {"model_type": family, "text_config": text, "tie_word_embeddings": False, "vision_config": {}} | dict(outer)


def read(raw):
    before = copy.deepcopy(raw)
    config = ModelConfig.from_hf(raw)
    assert raw == before
    return config


@pytest.mark.parametrize("family", HYBRIDS)
def test_nested_and_flat_give_the_same_config(family):
    config = read(nested(family))
    assert config.model_type == family
    assert config.linear == LinearConfig(2, 6, 6, 10, 4)
    assert config.layer_types == ("linear", "linear", "linear", "full") * 2
    for name in (family, f"{family}_text"):
        assert read(raw_config(family, model_type=name)) == config
    unnamed = nested(family)
    del unnamed["text_config"]["model_type"]
    assert read(unnamed) == config


def test_every_number_finds_its_field():
    config = read(raw_config("qwen3_5_moe"))
    assert config.moe == MoeConfig(8, 3, 12, shared_intermediate_size=20, normalise=True)
    assert (config.intermediate_size, config.rotary_dim, config.eos_token_ids) == (None, 4, (49,))
    assert read(raw_config("qwen3_moe")).moe == MoeConfig(8, 3, 12, shared_intermediate_size=None, normalise=True)
    assert read(raw_config("qwen3_5")).moe is None
    assert read(raw_config("qwen3_5")).intermediate_size == 24


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_and_reading_gives_the_same_config(family):
    changes = [{}, {"eos_token_id": [7, 8]}, {"eos_token_id": ...}, {"tie_word_embeddings": True}, {"rope_theta": 1e7}]
    if family == "qwen3_moe":
        changes += [{"norm_topk_prob": False}, {"norm_topk_prob": ...}]
    if family in HYBRIDS:
        other = ["full_attention", "linear_attention", *["full_attention"] * 6]
        changes += [{"layer_types": other}, {"partial_rotary_factor": 1.0}]
        # Shares that are no short fractions; 44 * (30 / 44) rounds to less than 30.
        changes += [{"head_dim": c, "partial_rotary_factor": (r + 0.5) / c} for c, r in ((14, 6), (44, 30), (98, 2))]
    for change in changes:
        config = ModelConfig.from_hf(changed(raw_config(family), **change))
        assert ModelConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_are_counted_under_either_name(family):
    config = read(raw_config(family))
    assert read(changed(raw_config(family), num_experts=..., num_local_experts=8)) == config
    assert read(changed(raw_config(family), num_experts=None, num_local_experts=8)) == config
    assert read(raw_config(family, num_local_experts=8)) == config
    with pytest.raises(ConfigError, match="num_experts = 8 and num_local_experts = 16 contradict each other"):
        read(raw_config(family, num_local_experts=16))


def test_qwen3_normalises_only_where_it_says_so_and_qwen3_5_always():
    for said, meant in ((True, True), (False, False), (..., False)):
        moe = read(changed(raw_config("qwen3_moe"), norm_topk_prob=said)).moe
        assert moe is not None
        assert moe.normalise is meant
    with pytest.raises(ConfigError, match="norm_topk_prob is 1, expected true or false"):
        read(raw_config("qwen3_moe", norm_topk_prob=1))
    moe = read(raw_config("qwen3_5_moe")).moe
    assert moe is not None
    assert moe.normalise is True


def rope(**inside):
    return {"rope_theta": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 10000, **inside}}


@pytest.mark.parametrize(
    ("change", "turned"),
    [
        ({"partial_rotary_factor": ...}, 2),
        ({"partial_rotary_factor": ..., **rope()}, 2),
        ({"partial_rotary_factor": ..., **rope(mrope_section=[1, 1], mrope_interleaved=True)}, 2),
        ({"partial_rotary_factor": ..., **rope(partial_rotary_factor=0.75)}, 6),
        ({"partial_rotary_factor": 0.75}, 6),
        ({"partial_rotary_factor": 0.75, **rope(partial_rotary_factor=0.75)}, 6),
        ({"partial_rotary_factor": 0.75, **rope()}, 6),
        ({"partial_rotary_factor": 1, **rope()}, 8),
    ],
    ids=["nowhere", "not in rope", "mrope", "in rope", "flat", "both", "beside rope", "integer"],
)
def test_the_share_of_rotating_dimensions_is_found_in_every_place(change, turned):
    for raw in (changed(raw_config("qwen3_5"), **change), nested("qwen3_5", **change)):
        assert read(raw).rotary_dim == turned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"partial_rotary_factor": 0.75, **rope(partial_rotary_factor=0.5)}, "expected one number in"),
        (
            {"partial_rotary_factor": 1.5},
            "partial_rotary_factor = 1.5 is not supported for qwen3_5",
        ),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor = 0 is not supported"),
        ({"partial_rotary_factor": "half"}, "partial_rotary_factor = 'half' is not supported"),
        ({"partial_rotary_factor": True}, "partial_rotary_factor = True is not supported"),
        ({"partial_rotary_factor": 0.375}, "head_dim = 8 x partial_rotary_factor = 0.375 turns 3 dimensions"),
        ({"partial_rotary_factor": 0.125}, "turns 1 dimensions; rotary embeddings turn pairs"),
    ],
)
def test_a_share_that_cannot_be_run_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        read(changed(raw_config("qwen3_5"), **change))


def test_layers_follow_their_list_or_else_the_interval():
    kinds = ["full_attention", "linear_attention", "linear_attention", "linear_attention"] * 2
    config = read(changed(raw_config("qwen3_5"), layer_types=kinds, full_attention_interval=...))
    assert config.layer_types == ("full", "linear", "linear", "linear") * 2
    assert read(raw_config("qwen3_5", layer_types=kinds)) == config  # the list wins, as in transformers
    assert read(raw_config("qwen3_5", full_attention_interval=2)).layer_types == ("linear", "full") * 4
    three = ("linear", "linear", "full", "linear", "linear", "full", "linear", "linear")
    assert read(raw_config("qwen3_5", full_attention_interval=3)).layer_types == three
    with pytest.raises(ConfigError, match="full_attention_interval is missing"):
        read(changed(raw_config("qwen3_5"), full_attention_interval=...))
    with pytest.raises(ConfigError, match=r"\['linear_attention'\] are not supported for qwen3_moe"):
        read(raw_config("qwen3_moe", layer_types=kinds))
    with pytest.raises(ConfigError, match=r"\['sliding_attention'\] are not supported for qwen3_5 \(expected 'linear"):
        read(raw_config("qwen3_5", layer_types=[*kinds[:7], "sliding_attention"]))


@pytest.mark.parametrize(("inner", "outer", "tied"), [(True, False, True), (False, True, False), (..., True, True)])
def test_the_text_config_says_whether_the_head_is_tied_or_else_the_outer_one(inner, outer, tied):
    raw = nested("qwen3_5", outer={"tie_word_embeddings": outer})
    raw["text_config"] = changed(raw["text_config"], tie_word_embeddings=inner)
    assert read(raw).tie_word_embeddings is tied


def test_a_head_of_which_nothing_is_said_is_refused():
    raw = nested("qwen3_5")
    del raw["tie_word_embeddings"]
    with pytest.raises(ConfigError, match="tie_word_embeddings is None, expected true or false"):
        read(raw)


def test_the_text_configs_end_token_wins_over_the_outer_one():
    assert read(nested("qwen3_5", outer={"eos_token_id": 3})).eos_token_ids == (49,)
    assert read(nested("qwen3_5", outer={"eos_token_id": [3, 4]}, eos_token_id=...)).eos_token_ids == (3, 4)


@pytest.mark.parametrize(("family", "key"), [(family, key) for family in FAMILIES for key in CONSTANTS[family]])
def test_no_constant_has_a_default(family, key):
    for absent in (..., None):
        with pytest.raises(ConfigError, match=f"{key} is missing"):
            read(changed(raw_config(family), **{key: absent}))


def test_the_outer_config_does_not_lend_its_constants():
    with pytest.raises(ConfigError, match="hidden_size is missing"):
        read(nested("qwen3_5", outer={"hidden_size": 16}, hidden_size=...))


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("qwen3_5", {"attn_output_gate": False}, r"attn_output_gate = False is not supported \(expected True\)"),
        ("qwen3_5", {"output_gate_type": "swish"}, r"output_gate_type = 'swish' is .* \(expected it to be absent\)"),
        ("qwen3_5", {"linear_num_value_heads": 5}, "linear_num_value_heads is not a multiple of linear_num_key_heads"),
        ("qwen3_5", {"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported"),
        ("qwen3_5_moe", {"mlp_only_layers": [3]}, r"mlp_only_layers = \[3\] is not supported"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\] is not supported"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not supported"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok is greater than num_experts"),
        ("qwen3_moe", {"num_experts": 8.0}, "num_experts = 8.0 is not a positive int"),
        ("qwen3_moe", {"partial_rotary_factor": 0.5}, r"is not supported for qwen3_moe \(expected 1.0\)"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(family, change, message):
    with pytest.raises(ConfigError, match=message):
        read(raw_config(family, **change))
    if family in HYBRIDS:
        with pytest.raises(ConfigError, match=message):
            read(nested(family, **change))


@pytest.mark.parametrize("key", ["attn_output_gate", "mlp_only_layers", "decoder_sparse_step"])
def test_a_switch_in_its_supported_place_changes_nothing(key):
    value = {"attn_output_gate": True, "mlp_only_layers": [], "decoder_sparse_step": 1}[key]
    for family in MIXTURES:
        assert read(raw_config(family, **{key: value})) == read(raw_config(family))


def test_a_quantised_checkpoint_is_refused_wherever_it_says_so():
    for raw in (
        nested("qwen3_5", outer={"quantization_config": {"quant_method": "fp8"}}),
        nested("qwen3_5", quantization_config={"quant_method": "fp8"}),
    ):
        with pytest.raises(ConfigError, match="quantised checkpoints are not supported"):
            read(raw)


@pytest.mark.parametrize("text", [None, [], "qwen3_5_text", 3])
def test_a_text_config_is_an_object(text):
    with pytest.raises(ConfigError, match=f"text_config is {type(text).__name__}, expected an object"):
        read(nested("qwen3_5") | {"text_config": text})


@pytest.mark.parametrize("inner", ["qwen3_5_moe_text", "qwen3"])
def test_a_text_config_of_another_family_is_refused(inner):
    with pytest.raises(ConfigError, match=f"model_type 'qwen3_5' with a text_config of '{inner}'"):
        read(nested("qwen3_5", model_type=inner))


@pytest.mark.parametrize("inner", ["qwen2", "qwen3_vl_text", None, ["qwen3_5_text"]])
def test_a_text_config_of_an_unknown_family_is_refused(inner):
    with pytest.raises(ConfigError, match=re.escape(f"model_type {inner!r} is not supported; supported: 'qwen3'")):
        read(nested("qwen3_5", model_type=inner))
