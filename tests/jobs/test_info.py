"""qscope info: the released sets, and what is known of a source without loading more than was asked for."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.cli import main
from qscope_jax.files.tensors import write_tensors
from qscope_jax.jobs import info
from qscope_jax.sae.formats import sae_sha256, save_sae
from qscope_jax.sae.formats.qwen_scope import release_arrays
from qscope_jax.sae.formats.torch_write import write_torch
from qscope_jax.sae.model import Sae, SaeConfig, init_sae
from qscope_jax.sae.release import RELEASED

NAME = "SAE-Res-Qwen3-Tiny-W64-L0_4"


def make(layer: int = 0) -> Sae:
    sae = init_sae(jax.random.key(layer), SaeConfig(16, 64, 4, layer=layer, backbone="Qwen/X"))
    return Sae(sae.params._replace(w_dec=sae.params.w_dec * 2), sae.config)


def ask(capsys, *arguments) -> str:
    assert main(["info", *map(str, arguments)]) == 0
    return re.sub(" +", " ", capsys.readouterr().out)


def test_without_a_source_it_prints_the_released_sets(capsys):
    printed = ask(capsys)
    for row in RELEASED:
        assert row.name in printed
    assert "14 sets, 544 SAEs" in printed


@pytest.mark.parametrize("format", ["safetensors", "qwen-scope", "saelens"])
def test_a_folder_of_saes(tmp_path, capsys, format):
    save_sae(make(), tmp_path, format=format)
    printed = ask(capsys, tmp_path)
    assert format in printed
    assert "k 4 (from " in printed
    assert "float32" in printed
    assert "decoder norms" in printed
    assert "min 2, median 2, max 2" in printed
    assert sae_sha256(make()) in printed


def test_where_k_comes_from_is_said(tmp_path, capsys):
    (tmp_path / NAME).mkdir()
    write_torch(tmp_path / NAME / "layer0.sae.pt", release_arrays(make().params))
    assert f"(from the name {NAME})" in ask(capsys, tmp_path / NAME)
    (tmp_path / "plain").mkdir()
    write_torch(tmp_path / "plain" / "layer0.sae.pt", release_arrays(make().params))
    assert "k 4 (from the option --k)" in ask(capsys, tmp_path / "plain", "--k", "4")


def test_an_unknown_k_is_said_and_the_rest_shown(tmp_path, capsys):
    write_torch(tmp_path / "layer0.sae.pt", release_arrays(make().params))
    printed = ask(capsys, tmp_path / "layer0.sae.pt")
    assert "unknown: give it as --k" in printed
    assert sae_sha256(make()) in printed


def test_shapes_are_those_of_the_file(tmp_path, capsys):
    save_sae(make(), tmp_path / "release", format="qwen-scope")
    save_sae(make(), tmp_path / "saelens", format="saelens")
    assert "W_enc (64, 16) float32, W_dec (16, 64)" in ask(capsys, tmp_path / "release")
    assert "W_enc (16, 64) float32, W_dec (64, 16)" in ask(capsys, tmp_path / "saelens")


def test_large_sets_are_read_only_where_asked(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(info, "_SMALL", 100)
    for layer in (0, 1):
        save_sae(make(layer), tmp_path)
    assert "weights were not read; --layers N" in ask(capsys, tmp_path)
    printed = ask(capsys, tmp_path, "--layers", "1")
    assert sae_sha256(make(1)) in printed
    assert sae_sha256(make(0)) not in printed


def test_nan_is_counted_not_refused(tmp_path, capsys):
    sae = make()
    save_sae(Sae(sae.params._replace(b_enc=sae.params.b_enc.at[:3].set(jnp.nan)), sae.config), tmp_path)
    assert "NaN or Inf 3" in ask(capsys, tmp_path)


def test_a_model_folder(tmp_path, capsys):
    folder = tmp_path / "Qwen3-1.7B-Base"
    folder.mkdir()
    content = {"model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 2048, "vocab_size": 9}
    (folder / "config.json").write_text(json.dumps(content))
    write_tensors(folder / "model.safetensors", {"a": np.zeros((3, 4), np.float32), "b": jnp.zeros(5, jnp.bfloat16)})
    printed = ask(capsys, folder)
    assert "num_hidden_layers 28" in printed
    assert "12 float32, 5 bfloat16" in printed
    assert "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50, Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_100" in printed


def test_results_as_json_and_a_manifest(tmp_path, capsys):
    save_sae(make(), tmp_path / "set", format="qwen-scope")
    ask(capsys, tmp_path / "set", "--out", tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "info.json").read_text())["sae"]["layers"]["layer0.sae.pt"]
    assert facts["k"] == 4
    assert facts["tensors"]["W_enc"] == {"dtype": "float32", "shape": [64, 16]}
    assert facts["decoder_norms"]["median"] == pytest.approx(2)
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["state"] == "complete"
    ask(capsys, "--out", tmp_path / "table")
    assert len(json.loads((tmp_path / "table" / "info.json").read_text())["released"]) == 14


@pytest.mark.parametrize(
    ("make_source", "says"),
    [
        (lambda path: path / "none", "no such folder or file"),
        (lambda path: path, "neither SAEs nor a model"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, capsys, make_source, says):
    assert main(["info", str(make_source(tmp_path))]) == 2
    assert says in capsys.readouterr().err


def test_a_layer_that_is_not_there(tmp_path, capsys):
    save_sae(make(), tmp_path)
    assert main(["info", str(tmp_path), "--layers", "3"]) == 2
    assert "no SAE for layer 3 in it; it has [0]" in capsys.readouterr().err
