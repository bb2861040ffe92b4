"""qscope convert: layouts in and out, stopped and rerun, and what fewer bits cost."""

import json
import os
import signal

import fsspec
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.cli import main
from qscope_jax.files.recognise import FormatError
from qscope_jax.jobs import convert
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Interrupted
from qscope_jax.sae.formats import load_sae, load_saes, sae_sha256, save_sae
from qscope_jax.sae.model import Sae, SaeConfig, SparseCode, init_sae
from qscope_jax.sae.rounding import cast_sae, index_agreement, make_rounding_cost, synthetic_vectors

LAYERS = (0, 1, 5)


def make(layer: int) -> Sae:
    config = SaeConfig(16, 64, 4, layer=layer, backbone="Qwen/X", source="there", sink_threshold=layer + 0.5)
    sae = init_sae(jax.random.key(layer), config)
    return Sae(sae.params._replace(b_dec=jnp.linspace(-1, 1, 16)), config)


@pytest.fixture
def source(tmp_path):
    for layer in LAYERS:
        save_sae(make(layer), tmp_path / "source", format="qwen-scope")
    return tmp_path / "source"


def contents(folder):
    """Every file but the manifest, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("middle", ["safetensors", "qwen-scope", "saelens"])
def test_there_and_back_gives_the_same_bytes(tmp_path, source, middle):
    assert main(["convert", str(source), "--to", middle, "--out", str(tmp_path / "middle")]) == 0
    assert main(["convert", str(tmp_path / "middle"), "--to", "qwen-scope", "--out", str(tmp_path / "back")]) == 0
    assert contents(tmp_path / "back") == contents(source)
    for layer, sae in load_saes(tmp_path / "middle").items():
        assert sae.config == make(layer).config
        assert sae_sha256(sae) == sae_sha256(make(layer))


def test_sparsify_folders_come_back_but_for_the_roundings_of_one_bias(tmp_path, source):
    assert main(["convert", str(source), "--to", "sparsify", "--out", str(tmp_path / "middle")]) == 0
    assert sorted(contents(tmp_path / "middle"))[:2] == ["layers.0/cfg.json", "layers.0/sae.safetensors"]
    assert main(["convert", str(tmp_path / "middle"), "--to", "qwen-scope", "--out", str(tmp_path / "back")]) == 0
    for layer, sae in load_saes(tmp_path / "back").items():
        assert sae.config == make(layer).config
        assert sae_sha256(sae) == manifest(tmp_path / "middle")["layers"][f"layers.{layer}/sae.safetensors"]["sha256"]
        np.testing.assert_array_equal(sae.params.w_enc, make(layer).params.w_enc)
        np.testing.assert_allclose(sae.params.b_enc, make(layer).params.b_enc, atol=5e-7)  # half ulp of b_dec @ w_enc


def test_some_layers(tmp_path, source):
    main(["convert", str(source), "--to", "safetensors", "--out", str(tmp_path / "out"), "--layers", "5", "0"])
    assert sorted(contents(tmp_path / "out")) == ["config.json", "layer0.sae.safetensors", "layer5.sae.safetensors"]


def test_a_single_file(tmp_path, source):
    main(["convert", str(source / "layer5.sae.pt"), "--to", "saelens", "--out", str(tmp_path / "out")])
    assert sorted(contents(tmp_path / "out")) == ["layer5/cfg.json", "layer5/sae_weights.safetensors"]


def test_fewer_bits_are_judged_and_written(tmp_path, source, capsys):
    main(["convert", str(source), "--to", "safetensors", "--dtype", "bfloat16", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "synthetic vectors (seed 0)" in printed
    assert printed.count("of the active indices agree, FVU") == 3
    for facts in manifest(tmp_path / "out")["layers"].values():
        assert 0.9 < facts["cost"]["index_agreement"] <= 1
        assert facts["cost"]["fvu_rounded"] == pytest.approx(facts["cost"]["fvu"], abs=0.02)
    loaded = load_sae(tmp_path / "out", 5, dtype=None)
    assert np.array_equal(loaded.params.w_enc, make(5).params.w_enc.astype("bfloat16"))


@pytest.mark.slow
def test_a_model_judges_on_text(tmp_path, tiny_release, capsys):
    command = ["convert", str(tiny_release / "sae"), "--to", "safetensors", "--dtype", "bfloat16"]
    main([*command, "--out", str(tmp_path / "out"), "--model", str(tiny_release / "model"), "--vectors", "100"])
    assert "residual vectors of the shipped texts through" in capsys.readouterr().out
    for facts in manifest(tmp_path / "out")["layers"].values():
        assert facts["cost"]["vectors"] == 100
        assert 0.8 < facts["cost"]["index_agreement"] <= 1
        assert facts["cost"]["fvu"] > 0


def test_the_manifest_names_what_was_made(tmp_path, source):
    main(["convert", str(source), "--to", "safetensors", "--out", str(tmp_path / "out")])
    made = manifest(tmp_path / "out")
    assert made["state"] == "complete"
    assert made["layers"]["layer5.sae.safetensors"] == {
        "dtype": "float32",
        "bytes": (tmp_path / "out/layer5.sae.safetensors").stat().st_size,
        "sha256": sae_sha256(make(5)),
    }


class TestRerun:
    @pytest.mark.parametrize("to", ["safetensors", "qwen-scope", "saelens", "sparsify"])
    def test_what_is_complete_is_kept_and_the_rest_made(self, tmp_path, source, to, capsys):
        command = ["convert", str(source), "--to", to, "--dtype", "bfloat16", "--out", str(tmp_path / "out")]
        main(command)
        first, whole = contents(tmp_path / "out"), manifest(tmp_path / "out")["layers"]
        gone = next(name for name in first if "layer1" in name.replace("s.", ""))
        (tmp_path / "out" / gone).unlink()
        times = {
            name: (tmp_path / "out" / name).stat().st_mtime_ns for name in first if "layer5" in name.replace("s.", "")
        }
        capsys.readouterr()
        assert main(command) == 0
        assert capsys.readouterr().out.count("kept from an earlier run") == 2
        assert contents(tmp_path / "out") == first
        assert manifest(tmp_path / "out")["layers"] == whole
        assert times == {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in times}

    def test_a_signal_stops_between_layers_and_a_rerun_ends_the_same(self, tmp_path, source, monkeypatch):
        config = convert.Config(str(source), "safetensors", tmp_path / "out")
        save = convert.save_sae

        def save_then_signal(*args, **kwargs):
            save(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(convert, "save_sae", save_then_signal)
        with pytest.raises(Interrupted) as stopped:
            convert.run(config)
        assert stopped.value.code == EXIT_INTERRUPTED
        assert manifest(tmp_path / "out")["state"] == "interrupted"
        assert "layer0.sae.safetensors" in contents(tmp_path / "out")
        assert "layer1.sae.safetensors" not in contents(tmp_path / "out")
        monkeypatch.undo()
        convert.run(config)
        convert.run(convert.Config(str(source), "safetensors", tmp_path / "whole"))
        assert contents(tmp_path / "out") == contents(tmp_path / "whole")
        assert manifest(tmp_path / "out")["layers"] == manifest(tmp_path / "whole")["layers"]

    def test_a_remote_folder_is_gone_on_with(self, tmp_path, source, monkeypatch, capsys):
        monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path / "cache"))
        memory, folder = fsspec.filesystem("memory"), f"/{tmp_path.name}/out"
        command = ["convert", str(source), "--to", "safetensors", "--out", f"memory:/{folder}"]
        assert main([*command, "--layers", "0", "5"]) == 0
        whole = memory.cat_file(f"{folder}/layer5.sae.safetensors")
        capsys.readouterr()
        assert main(command) == 0
        assert capsys.readouterr().out.count("kept from an earlier run") == 2
        assert sorted(name.rsplit("/", 1)[-1] for name in memory.find(folder)) == [
            "config.json", *(f"layer{n}.sae.safetensors" for n in LAYERS), "manifest.json",
        ]  # fmt: skip
        assert memory.cat_file(f"{folder}/layer5.sae.safetensors") == whole
        assert sae_sha256(load_sae(f"memory:/{folder}", 1)) == sae_sha256(make(1))
        memory.rm(f"/{tmp_path.name}", recursive=True)

    def test_files_of_other_settings_are_not_mixed_in(self, tmp_path, source):
        convert.run(convert.Config(str(source), "safetensors", tmp_path / "out"))
        with pytest.raises(
            FormatError, match=r"is there and has dtype 'float32', not 'bfloat16'; choose another --out"
        ):
            convert.run(convert.Config(str(source), "safetensors", tmp_path / "out", dtype="bfloat16"))
        assert manifest(tmp_path / "out")["state"] == "complete", "what is there stays described"

    def test_files_of_another_set_of_the_same_name_are_not_kept(self, tmp_path):
        for folder, seed in (("A", 1), ("B", 2)):
            sae = init_sae(jax.random.key(seed), SaeConfig(16, 64, 4, layer=0))
            save_sae(sae, tmp_path / folder / "saes", format="qwen-scope")
        convert.run(convert.Config(str(tmp_path / "A/saes"), "safetensors", tmp_path / "out"))
        before = contents(tmp_path / "out")
        with pytest.raises(FormatError, match="holds other weights; choose another --out"):
            convert.run(convert.Config(str(tmp_path / "B/saes"), "safetensors", tmp_path / "out"))
        assert contents(tmp_path / "out") == before

    def test_files_of_another_source_are_not_mixed_in(self, tmp_path, source):
        other = make(5)
        save_sae(Sae(other.params, SaeConfig(16, 64, 4, layer=5, source="elsewhere")), tmp_path / "out")
        with pytest.raises(FormatError, match="has backbone None, not 'Qwen/X', source 'elsewhere', not 'there'"):
            convert.run(convert.Config(str(source), "safetensors", tmp_path / "out", layers=(5,)))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--layers", "7"], "no SAE for layer 7 in it; it has the layers 0..1, 5"),
        (["--out", "nonsense://bucket/x"], "is not an address that fsspec knows"),
        (["--k", "65"], "k = 65 must lie in 1..64"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, source, capsys, arguments, says, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", str(source), "--to", "safetensors", "--out", "out", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_a_damaged_layer_leaves_the_others_whole(tmp_path, source):
    (source / "layer1.sae.pt").write_bytes((source / "layer1.sae.pt").read_bytes()[:-50])
    with pytest.raises(FormatError, match="truncated download"):
        convert.run(convert.Config(str(source), "safetensors", tmp_path / "out"))
    assert sorted(contents(tmp_path / "out")) == ["config.json", "layer0.sae.safetensors"]
    assert np.array_equal(load_sae(tmp_path / "out").params.w_enc, make(0).params.w_enc)


class TestRounding:
    def test_the_same_sae_agrees_with_itself(self):
        cost = make_rounding_cost()(make(0), make(0), synthetic_vectors(make(0), 32, seed=0))
        assert cost["index_agreement"] == 1
        assert cost["fvu"] == cost["fvu_rounded"]

    def test_agreement_counts_active_indices_as_sets(self):
        one = SparseCode(jnp.array([[3.0, 2.0, 0.0], [1.0, 1.0, 1.0]]), jnp.array([[5, 7, 0], [1, 2, 3]]))
        two = SparseCode(jnp.array([[3.0, 2.0, 1.0], [1.0, 1.0, 0.0]]), jnp.array([[7, 0, 8], [3, 1, 2]]))
        assert index_agreement(one, two) == pytest.approx(3 / 5)
        assert index_agreement(SparseCode(one.values * 0, one.indices), two) == 1

    def test_vectors_are_seeded_and_lie_around_b_dec(self):
        sae = make(0)
        x = synthetic_vectors(sae, 500, seed=3)
        assert x.shape == (500, 16)
        assert x.dtype == np.float32
        assert np.array_equal(x, synthetic_vectors(sae, 500, seed=3))
        b_dec = np.asarray(sae.params.b_dec)
        length = np.linalg.norm(b_dec)
        assert np.linalg.norm(x - b_dec, axis=-1).mean() == pytest.approx(1.04 * length, rel=0.1)

    def test_a_cast_rounds_every_parameter(self):
        assert {p.dtype.name for p in cast_sae(make(0), "bfloat16").params} == {"bfloat16"}
