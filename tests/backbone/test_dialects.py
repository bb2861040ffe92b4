"""Checkpoint dialects: every layout that the releases and transformers use gives the same bits; mixtures are refused.

A layout is a prefix (`model.` or `model.language_model.`), experts fused or one by one, and a config nested or flat.
"""

import json
import re
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from qscope_jax.backbone.config import ConfigError
from qscope_jax.backbone.weights import CheckpointError, load_backbone
from qscope_jax.files.tensors import open_tensors, write_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"
NESTED, PLAIN = "model.language_model.", "model."


def golden(family):
    return GOLDENS / f"{family}_tiny"


@pytest.fixture(scope="module")
def reference():
    """The goldens as this library reads them: the released layouts, which `test_golden.py` holds against torch."""
    return {
        family: load_backbone(golden(family), dtype="float32") for family in ("qwen3_moe", "qwen3_5", "qwen3_5_moe")
    }


def read(family):
    """config.json and the text tensors of a golden, under plain names and with one tensor per expert."""
    file, tensors = open_tensors(golden(family) / "model.safetensors"), {}
    for name in file.names:
        if not name.startswith(("mtp.", "model.visual.")):
            tensors |= split(name.replace(NESTED, PLAIN), file.array(name))
    return json.loads((golden(family) / "config.json").read_text()), tensors


def split(name, array):
    base, _, kind = name.rpartition("experts.")
    if kind == "gate_up_proj":  # [expert, gate rows then up rows, in]
        half = array.shape[1] // 2
        parts = {"gate_proj": array[:, :half], "up_proj": array[:, half:]}
    elif kind == "down_proj":
        parts = {"down_proj": array}
    else:
        return {name: array}
    return {f"{base}experts.{e}.{part}.weight": one for part, all in parts.items() for e, one in enumerate(all)}


def fuse(tensors, layers=(0, 1, 2, 3)):
    """The experts of these layers as two tensors; what is left of the others stays."""
    tensors = dict(tensors)
    for layer in layers:
        base = f"model.layers.{layer}.mlp.experts."
        if any(name.startswith(base) for name in tensors):
            take = lambda part: np.stack([tensors.pop(f"{base}{e}.{part}_proj.weight") for e in range(8)])  # noqa: E731, B023
            tensors[f"{base}gate_up_proj"] = np.concatenate([take("gate"), take("up")], axis=1)
            tensors[f"{base}down_proj"] = take("down")
    return tensors


def nest(tensors):
    return {name.replace(PLAIN, NESTED, 1): array for name, array in tensors.items()}


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
    return folder


def assert_same(folder, expected):
    found = load_backbone(folder, dtype="float32")
    assert found.config == expected.config
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize("fused", [False, True], ids=["per expert", "fused"])
@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_every_layout_of_qwen3_moe_gives_the_same_bits(key, fused, reference, tmp_path):
    config, tensors = read("qwen3_moe")
    config[key] = config.pop("num_experts")
    assert_same(write(tmp_path / "checkpoint", config, fuse(tensors) if fused else tensors), reference["qwen3_moe"])


@pytest.mark.parametrize("prefix", [PLAIN, NESTED])
@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize(("family", "fused"), [("qwen3_5", False), ("qwen3_5_moe", False), ("qwen3_5_moe", True)])
def test_every_layout_of_qwen3_5_gives_the_same_bits(family, fused, flat, prefix, reference, tmp_path):
    config, tensors = read(family)
    if flat:
        config = config["text_config"] | {"tie_word_embeddings": False}
    tensors = fuse(tensors) if fused else tensors
    tensors = nest(tensors) if prefix == NESTED else tensors
    assert_same(write(tmp_path / "checkpoint", config, tensors), reference[family])


@pytest.mark.parity
@pytest.mark.parametrize(
    ("family", "origin"),
    [("qwen3_moe", "text")]
    + [(family, origin) for family in ("qwen3_5", "qwen3_5_moe") for origin in ("text", "released", "multimodal")],
)
def test_every_layout_that_transformers_writes_gives_the_same_bits(family, origin, maker, reference, tmp_path):
    if origin == "released":  # a text model that remembers the file it came from
        model = maker.read_back(golden(family))
    else:
        model, _ = maker.build(maker.CONFIGS[family], seed=0)
    if origin == "multimodal":
        model = with_vision(model, maker.CONFIGS[family])
    model.save_pretrained(tmp_path / "saved")
    names = open_tensors(tmp_path / "saved" / "model.safetensors").names
    assert any(name.startswith(NESTED) for name in names) == (origin != "text")
    assert any(name.startswith("model.visual.") for name in names) == (origin == "multimodal")
    assert any(".experts.0." in name for name in names) == ("moe" in family)
    assert_same(tmp_path / "saved", reference[family])


def with_vision(model, config):
    from transformers import AutoConfig, AutoModelForImageTextToText

    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config)).float()
    whole.model.language_model.load_state_dict(model.model.state_dict())
    whole.lm_head.load_state_dict(model.lm_head.state_dict())
    return whole


def test_float32_parts_of_a_release_are_kept(reference):
    """A_log and the gated norm are float32 in the files; rounding them to bfloat16 would change the decay."""
    file = open_tensors(golden("qwen3_5") / "model.safetensors")
    low = load_backbone(golden("qwen3_5"), dtype="bfloat16").params
    for leaf, exact in zip(jax.tree.leaves(low), jax.tree.leaves(reference["qwen3_5"].params), strict=True):
        np.testing.assert_array_equal(leaf.astype("float32"), exact)
    assert {info.dtype.name for name in file.names if (info := file.info(name))} == {"float32", "bfloat16"}


EXPERT = "model.layers.1.mlp.experts.3."


def drop(name):
    return lambda tensors: {key: array for key, array in tensors.items() if key != name}


def add(name, like):
    return lambda tensors: tensors | {name: tensors[like]}


TWO_STORES, TWO_PREFIXES = "stored both fused", "two checkpoints are mixed"
FAULTS = {
    "an expert's projection is missing": (drop(f"{EXPERT}up_proj.weight"), f"{EXPERT}up_proj.weight is missing"),
    "an expert too many": (
        add("model.layers.1.mlp.experts.8.up_proj.weight", f"{EXPERT}up_proj.weight"),
        "model.layers.1.mlp.experts.8.up_proj.weight is unknown",
    ),
    "experts given twice": (lambda tensors: tensors | fuse(tensors), TWO_STORES),
    "one layer's experts fused": (lambda tensors: fuse(tensors, (2,)), TWO_STORES),
    "one layer under the other prefix": (
        lambda tensors: {(k.replace(PLAIN, NESTED) if ".layers.1." in k else k): v for k, v in tensors.items()},
        TWO_PREFIXES,
    ),
    "a tensor under both prefixes": (add("model.language_model.norm.weight", "model.norm.weight"), TWO_PREFIXES),
    "an unknown tensor": (add("model.layers.0.mlp.bias", "model.norm.weight"), "model.layers.0.mlp.bias is unknown"),
    "a stack of too few experts": (
        lambda tensors: {k: v[:7] if "experts" in k else v for k, v in fuse(tensors).items()},
        "has shape (7, 32, 32), config.json implies (8, 32, 32)",
    ),
    "an expert of integers": (
        lambda tensors: tensors | {f"{EXPERT}up_proj.weight": np.zeros((16, 32), np.int8)},
        f"{EXPERT}up_proj.weight holds int8",
    ),
}


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_5_moe"])
@pytest.mark.parametrize("fault", FAULTS)
def test_experts_missing_or_doubled_and_mixed_dialects_are_refused_by_name(family, fault, tmp_path):
    config, tensors = read(family)
    damage, message = FAULTS[fault]
    folder = write(tmp_path / "checkpoint", config, damage(tensors))
    if family == "qwen3_moe" and message is TWO_PREFIXES:  # which has one prefix only
        message = "model.language_model."
    with pytest.raises(CheckpointError, match=re.escape(message)) as caught:
        load_backbone(folder)
    assert str(folder) in str(caught.value)


def test_only_what_the_multimodal_release_adds_is_skipped(tmp_path):
    config, tensors = read("qwen3_5")
    extra = np.zeros(3, ml_dtypes.bfloat16)
    folder = write(tmp_path / "a", config, nest(tensors) | {"mtp.layers.0.norm.weight": extra, "model.visual.x": extra})
    load_backbone(folder)
    folder = write(tmp_path / "b", config, nest(tensors) | {"model.audio.x": extra, "mtpx": extra})
    with pytest.raises(CheckpointError, match=r"(?s)model\.audio\.x is unknown.*mtpx is unknown"):
        load_backbone(folder)


@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_vl_moe", "llama", None])
def test_a_checkpoint_of_an_unknown_family_is_refused(name, tmp_path):
    config, tensors = read("qwen3_moe")
    folder = write(tmp_path / "checkpoint", config | {"model_type": name}, tensors)
    with pytest.raises(ConfigError, match=f"model_type {name!r} is not supported; supported: 'qwen3'"):
        load_backbone(folder)
