"""Checkpoints in and out: what fits loads exactly, what does not is listed, all of it, before anything loads."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest

from qscope_jax.backbone import tables, weights
from qscope_jax.backbone.config_reader import ConfigError
from qscope_jax.backbone.weights import Backbone, CheckpointError, load_backbone, save_backbone
from qscope_jax.files.errors import SourceError
from qscope_jax.files.tensors import open_tensors, write_tensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(config, params, tmp_path_factory):
    """A sound checkpoint in one file, saved once."""
    folder = tmp_path_factory.mktemp("saved") / "single"
    save_backbone(Backbone(config, params), folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of it to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def sharded(config, params, tmp_path):
    """The same in three files with an index, to damage."""
    folder = tmp_path / "sharded"
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    save_backbone(Backbone(config, params), folder, shard_bytes=total // 2 - 1000)
    assert len(list(folder.glob("model-0000?-of-00003.safetensors"))) == 3
    return folder


def tensors_of(path):
    file = open_tensors(path)
    return {name: np.array(file.array(name)) for name in file.names}


def rewrite(path, change):
    tensors = tensors_of(path)
    change(tensors)
    write_tensors(path, tensors, {"format": "pt"})


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


@pytest.mark.parametrize(
    ("axes", "options", "stored"),
    [
        (("norm",), {}, (16,)),
        (("vocab", "embed"), {}, (50, 16)),
        (("embed", "mlp"), {"inputs": 1}, (24, 16)),
        (("embed", "heads", "head_dim"), {"inputs": 1}, (32, 16)),
        (("heads", "head_dim", "embed"), {"inputs": 2}, (16, 32)),
        (("conv", "heads", "head_dim"), {"inputs": 1, "unit": True}, (32, 1, 3)),
        (("experts", "embed", "mlp"), {"inputs": 1, "stacked": 1}, (5, 24, 16)),
    ],
    ids=["vector", "table", "matrix", "to heads", "from heads", "convolution", "experts"],
)
def test_the_files_layout_and_ours_are_inverse(axes, options, stored):
    sizes = {"norm": 16, "embed": 16, "vocab": 50, "mlp": 24, "heads": 4, "head_dim": 8, "conv": 3, "experts": 5}
    lead = options.get("stacked", 0)
    for rows in (1, 3) if options else (1,):  # linear maps may be fused, one behind the other
        table = [tables.Row((f"part{i}",), "x", axes, **options) for i in range(rows)]
        (tensor,) = tables._tensors(table, sizes, "")
        assert tensor.stored_shape == (*stored[:lead], stored[lead] * rows, *stored[lead + 1 :])
        file = np.random.default_rng(0).normal(size=tensor.stored_shape)
        held = [piece.view(file).transpose(piece.permutation) for piece in tensor.pieces]
        assert [array.shape for array in held] == [tuple(sizes[axis] for axis in axes)] * rows
        assert all(np.shares_memory(array, file) for array in held)
        np.testing.assert_array_equal(tables.to_stored(tensor, held), file)
        if options and not lead:  # a linear map is stored [out, in]: x @ ours == stored @ x
            x = np.random.default_rng(1).normal(size=held[0].shape[: options["inputs"]])
            ours = np.concatenate([np.tensordot(x, array, x.ndim).ravel() for array in held])
            np.testing.assert_allclose(ours, file.reshape(len(file), -1) @ x.ravel())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saving_and_loading_gives_the_same_bits(config, make_params, tmp_path, dtype, tied):
    config = dataclasses.replace(
        config, tie_word_embeddings=tied, precision="highest" if dtype == "float32" else "default"
    )
    params = jax.tree.map(lambda a: a.astype(dtype), make_params(config))
    save_backbone(Backbone(config, params), tmp_path / "new")
    assert ("lm_head.weight" in open_tensors(tmp_path / "new" / SINGLE)) is not tied
    assert json.loads((tmp_path / "new" / "config.json").read_text())["dtype"] == dtype
    loaded = load_backbone(tmp_path / "new", dtype=dtype)
    assert loaded.config == config
    assert_equal(loaded.params, params)


def test_shards_load_to_the_same_bits_as_one_file(saved, sharded):
    assert_equal(load_backbone(sharded, dtype="float32").params, load_backbone(saved, dtype="float32").params)
    index = json.loads((sharded / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in tensors_of(saved / SINGLE).values())


def test_mixed_dtypes_are_converted_exactly_once(folder):
    kinds = (ml_dtypes.bfloat16, np.float16, np.float32)

    def mix(tensors):
        for number, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].astype(kinds[number % 3])

    rewrite(folder / SINGLE, mix)
    stored = tensors_of(folder / SINGLE)
    assert len({array.dtype for array in stored.values()}) == 3
    for dtype in ("float32", "bfloat16"):
        loaded = load_backbone(folder, dtype=dtype)
        for tensor in tables.checkpoint_tensors(loaded.config):
            (piece,) = tensor.pieces
            expected = piece.view(stored[tensor.name]).transpose(piece.permutation).astype(dtype)
            found = np.asarray(piece.leaf_of(loaded.params)[piece.place])
            np.testing.assert_array_equal(found, expected, err_msg=tensor.name)


def test_the_mode_follows_the_dtype(folder):
    assert load_backbone(folder, dtype="float32").config.precision == "highest"
    assert load_backbone(folder).config.precision == "default"
    with pytest.raises(ValueError, match="dtype = 'float16'; expected 'float32' \\(parity\\) or 'bfloat16' \\(fast\\)"):
        load_backbone(folder, dtype="float16")


def test_a_tied_checkpoint_may_hold_its_head_twice_if_both_are_equal(folder, params):
    edit_json(folder / "config.json", lambda raw: raw.update(tie_word_embeddings=True))
    embed = "model.embed_tokens.weight"
    with pytest.raises(CheckpointError, match=f"lm_head.weight differs from {embed}, although config.json says tie"):
        load_backbone(folder, dtype="float32")
    rewrite(folder / SINGLE, lambda tensors: tensors.update({"lm_head.weight": tensors[embed]}))
    loaded = load_backbone(folder, dtype="float32")
    assert_equal(loaded.params, {name: leaf for name, leaf in params.items() if name != "head"})


def test_one_compilation_serves_a_kind_of_tensor(folder):
    weights._write.clear_cache()
    tensors = tables.checkpoint_tensors(load_backbone(folder, dtype="float32").config)
    pieces = [piece for tensor in tensors for piece in tensor.pieces if piece.period is not None]
    assert weights._write._cache_size() == len({(piece.permutation, piece.shape) for piece in pieces}) < 10


def test_every_fault_is_reported_together(folder):
    def damage(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.weight"] = np.zeros((16, 32), np.float32)
        tensors["model.norm.weight"] = np.zeros(16, np.int32)
        tensors["model.layers.4.mlp.up_proj.weight"] = np.zeros((24, 16), np.float32)
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(32, np.float32)

    rewrite(folder / SINGLE, damage)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(folder)
    assert str(caught.value).splitlines() == [
        f"{folder}: the checkpoint does not fit its config.json:",
        "  model.layers.0.self_attn.q_proj.bias is unknown to a qwen3 model",
        "  model.layers.4.mlp.up_proj.weight is unknown to a qwen3 model",
        "  model.layers.2.mlp.up_proj.weight is missing",
        "  model.layers.0.self_attn.q_proj.weight has shape (16, 32), config.json implies (32, 16)",
        "  model.norm.weight holds int32, expected one of bfloat16, float16, float32",
    ]


def test_a_very_long_list_of_faults_is_cut(folder):
    rewrite(folder / SINGLE, lambda tensors: [tensors.update({f"x.{i}": np.zeros(1)}) for i in range(60)])
    with pytest.raises(CheckpointError, match="… and 20 more"):
        load_backbone(folder)


def test_nothing_is_allocated_for_a_checkpoint_that_does_not_fit(folder, monkeypatch):
    rewrite(folder / SINGLE, lambda tensors: tensors.pop("model.norm.weight"))
    monkeypatch.setattr(weights, "_put", lambda *_: pytest.fail("allocated before the check"))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is missing"):
        load_backbone(folder)


def test_an_untied_checkpoint_needs_its_head(folder):
    rewrite(folder / SINGLE, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is missing"):
        load_backbone(folder)


def test_a_missing_shard_is_named(sharded):
    gone = sharded / "model-00002-of-00003.safetensors"
    gone.unlink()
    with pytest.raises(CheckpointError, match=f"names the shard {gone.name}, which is missing"):
        load_backbone(sharded)


def test_a_tensor_in_two_shards_is_refused(sharded):
    first, last = sharded / "model-00001-of-00003.safetensors", sharded / "model-00003-of-00003.safetensors"
    head = tensors_of(last)["lm_head.weight"]
    rewrite(first, lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.raises(CheckpointError, match=rf"lm_head\.weight stands in both {first.name} and {last.name}"):
        load_backbone(sharded)


def test_an_index_and_its_shards_must_agree(sharded):
    moved, dropped = "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"

    def move(index):
        index["weight_map"][moved] = "model-00003-of-00003.safetensors"
        del index["weight_map"][dropped]

    edit_json(sharded / INDEX, move)
    with pytest.raises(CheckpointError) as caught:
        load_backbone(sharded)
    assert f"{moved} should be in model-00003-of-00003.safetensors by the index, but is not" in str(caught.value)
    assert f"{dropped} is in model-00001-of-00003.safetensors but not in the index" in str(caught.value)


@pytest.mark.parametrize("shard", ["../stolen.safetensors", "/etc/stolen.safetensors", "a\\..\\stolen.safetensors"])
def test_an_index_that_leaves_its_folder_is_refused(sharded, shard):
    shutil.copy(sharded / "model-00001-of-00003.safetensors", sharded.parent / "stolen.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.norm.weight": shard}))
    with pytest.raises(SourceError, match="not a file name inside a source"):
        load_backbone(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "pytorch_model.bin"}}',
        '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', '{"weight_map": ', '{"weight_map": {}}',
    ],
)  # fmt: skip
def test_a_damaged_index_is_refused_with_its_name(sharded, text):
    (sharded / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json|is missing"):
        load_backbone(sharded)


def test_other_weight_formats_are_named(folder):
    (folder / SINGLE).rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"expected model\.safetensors or .*: pytorch_model\.bin"):
        load_backbone(folder)


def test_a_folder_without_config_is_refused(folder):
    (folder / "config.json").unlink()
    with pytest.raises(SourceError, match=r"has no file 'config\.json'"):
        load_backbone(folder)


def test_a_config_that_cannot_be_run_stops_the_load(folder):
    edit_json(folder / "config.json", lambda raw: raw.pop("rope_theta"))
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        load_backbone(folder)


def test_saving_never_touches_an_old_checkpoint(folder, config, params):
    before = (folder / SINGLE).read_bytes()
    with pytest.raises(FileExistsError, match=r"already holds model\.safetensors"):
        save_backbone(Backbone(config, params), folder)
    assert (folder / SINGLE).read_bytes() == before


def test_config_comes_last_so_that_half_a_save_is_no_checkpoint(config, params, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError("disk full")

    monkeypatch.setattr(weights, "write_tensors", full)
    with pytest.raises(OSError, match="disk full"):
        save_backbone(Backbone(config, params), tmp_path / "half")
    assert not (tmp_path / "half" / "config.json").exists()
