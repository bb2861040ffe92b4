"""`qscope eval-sae` from end to end: right numbers, a figure, other checkpoints, and a run that was stopped."""

import dataclasses
import json
import shutil

import fsspec
import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.batches import Buckets, cut_documents, fill_batch, plan_batches
from qscope_jax.data.tokenizer import load_tokenizer, make_encoder
from qscope_jax.evaluate import DEFINITIONS, evaluate_saes
from qscope_jax.extract import make_extract_step, measure_sinks
from qscope_jax.files.tensors import open_tensors
from qscope_jax.jobs import eval_sae as job
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Run
from qscope_jax.sae.formats import load_saes, save_sae
from qscope_jax.sae.model import Sae
from tests.jobs.extracting import manifest, texts, write_rows

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def release(tiny_release, tmp_path_factory):
    """The tiny release, whose SAEs say which model they were made for, and 40 texts, one longer than the context."""
    folder = tmp_path_factory.mktemp("eval")
    shutil.copytree(tiny_release / "model", folder / "Tiny")
    for sae in load_saes(tiny_release / "sae").values():
        save_sae(Sae(sae.params, dataclasses.replace(sae.config, backbone="Owner/Tiny")), folder / "sae")
    write_rows(folder / "texts.jsonl", [{"text": text} for text in [*texts(39), "the quick brown fox " * 20]])
    return folder


def command(release, out, *options, model="Tiny", data="texts.jsonl"):
    sources = ["--model", str(release / model), "--sae", str(release / "sae"), "--out", str(out)]
    small = ["--batch-tokens", "256", "--max-length", "32", "--precision", "parity"]
    return ["eval-sae", str(release / data), *sources, *small, *options]


def evaluate(release, out, *options, **places):
    assert cli.main(command(release, out, *options, **places)) == 0
    return json.loads((out / "quality.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def whole(release, compiled_once, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, evaluate(release, out)


def test_the_numbers_are_those_of_the_library_on_the_same_text(release, whole):
    _, found = whole
    backbone, saes = load_backbone(release / "Tiny", dtype="float32"), load_saes(release / "sae")
    encoder = make_encoder(load_tokenizer(release / "Tiny"))
    rows = [json.loads(line)["text"] for line in (release / "texts.jsonl").read_text(encoding="utf-8").splitlines()]
    documents = encoder(rows)
    segments, buckets = cut_documents(documents, 32, long="window"), Buckets(256, 32, per_octave=1)
    look = make_extract_step(backbone.config, (0, 1))
    sinks = measure_sinks(look, backbone.params, tuple(saes.values()), documents, buckets)
    batches = [fill_batch(batch, segments) for batch in plan_batches(segments.lengths, buckets)]
    expected = evaluate_saes(backbone, saes, batches, sink_thresholds=sinks)
    assert found["layers"] == json.loads(json.dumps({str(n): row for n, row in expected.items()}))
    assert found["layers"]["0"]["tokens"] + round(
        found["layers"]["0"]["sink_fraction"] * sum(map(len, documents))
    ) == sum(map(len, documents))  # windows leave nothing of the long text out
    assert found["sink_thresholds_measured_here"] == [0, 1]


def test_results_say_what_they_mean_and_where_they_come_from(whole, capsys):
    out, found = whole
    metrics = found["layers"]["1"]
    assert found["definitions"] == DEFINITIONS
    beside = {"explained_variance", "l0", "cosine", "sink_threshold", "predicted_tokens", "kl_zero"}
    assert set(metrics) == set(DEFINITIONS) | beside  # these are explained with their neighbours
    assert (found["model_differs"], found["made_for"]) == (False, ["Owner/Tiny"])
    assert found["model"]["name"] == "Tiny"
    assert {*found["sae"]["files"]} == {"layer0.sae.safetensors", "layer1.sae.safetensors"}
    told = manifest(out)
    assert told["state"] == "complete"
    assert told["hashes"] == {"model": found["model"]["files"], "sae": found["sae"]["files"]}
    assert told["counts"] == {"layers": 2, "rows": 40, "tokens": found["layers"]["0"]["tokens"]}
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_another_checkpoint_of_the_same_width_is_evaluated_and_named(release, whole, tmp_path, capsys):
    shutil.copytree(release / "Tiny", release / "Tiny-Instruct")
    found = evaluate(release, tmp_path, model="Tiny-Instruct")
    assert found["model_differs"] is True
    note = "model differs from the one the SAE was made for: made for Owner/Tiny, evaluated on Tiny-Instruct"
    assert found["note"] == note
    shown = capsys.readouterr()
    assert note in shown.err
    assert found["layers"]["1"]["fvu"] == whole[1]["layers"]["1"]["fvu"]  # the weights are the same here
    assert f"{found['layers']['1']['ce_recovered']:.4g}" in shown.out


def test_a_run_that_was_stopped_goes_on_to_the_same_numbers(release, whole, tmp_path, monkeypatch, capsys):
    polls = iter([False, False, True])
    with monkeypatch.context() as patch:
        patch.setattr(Run, "stopping", property(lambda _: next(polls)))
        with pytest.raises(SystemExit) as stop:
            cli.main(command(release, tmp_path))
    assert stop.value.code == EXIT_INTERRUPTED
    assert manifest(tmp_path)["state"] == "interrupted"
    assert not (tmp_path / "quality.json").exists()
    assert open_tensors(tmp_path / "partial.safetensors").metadata["batches"] == "2"
    assert cli.main(command(release, tmp_path, "--predict-tokens", "7")) == 2
    assert "belongs to a run with other input or options" in capsys.readouterr().err
    assert evaluate(release, tmp_path) == whole[1]
    assert not (tmp_path / "partial.safetensors").exists()


def test_a_remote_folder_gets_the_results_and_what_is_put_aside(release, whole, tmp_path, monkeypatch):
    monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path / "cache"))
    memory, folder = fsspec.filesystem("memory"), f"/{tmp_path.name}/out"
    left = iter([False, False, True])
    with monkeypatch.context() as stopped:
        stopped.setattr(Run, "stopping", property(lambda _: next(left, True)))
        with pytest.raises(SystemExit):
            cli.main(command(release, f"memory:/{folder}"))
    assert sorted(name.rsplit("/", 1)[-1] for name in memory.find(folder)) == ["manifest.json", "partial.safetensors"]
    assert cli.main(command(release, f"memory:/{folder}")) == 0
    assert sorted(name.rsplit("/", 1)[-1] for name in memory.find(folder)) == [
        "manifest.json", "quality.json", "quality.png",
    ]  # fmt: skip
    assert json.loads(memory.cat_file(f"{folder}/quality.json"))["layers"] == whole[1]["layers"]
    memory.rm(f"/{tmp_path.name}", recursive=True)


def test_saes_that_do_not_say_what_they_were_made_for_are_evaluated_all_the_same(
    release, whole, tiny_release, tmp_path
):
    found = evaluate(release, tmp_path, "--sae", str(tiny_release / "sae"))
    assert (found["made_for"], found["model_differs"]) == (None, None)
    assert found["note"] == "which model the SAEs were made for is not known; evaluated on Tiny"
    assert found["layers"] == whole[1]["layers"]


def test_less_can_be_asked_for(release, whole, tmp_path):
    found = evaluate(release, tmp_path / "few", "--tokens", "1", "--predict-tokens", "0", "--layers", "0")
    assert 0 < found["layers"]["0"]["tokens"] < whole[1]["layers"]["0"]["tokens"]
    assert found["layers"]["0"]["ce_recovered"] is None
    assert [*found["layers"]] == ["0"]


@pytest.mark.slow
def test_a_mesh_gives_the_numbers_of_one_device(release, whole, tmp_path):
    found = evaluate(release, tmp_path, "--mesh", "4x2")
    for layer, row in whole[1]["layers"].items():
        for name in ("fvu", "cosine", "ce_clean", "ce_spliced", "ce_zero", "kl"):
            assert found["layers"][layer][name] == pytest.approx(row[name], rel=1e-4)


def test_wrong_input_is_refused_before_weights_are_read(release, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "load_backbone", None)
    monkeypatch.setattr(job, "load_saes", None)
    wide = load_saes(release / "sae", (0,))[0]
    params = wide.params._replace(w_enc=np.ones((8, 64)), w_dec=np.ones((64, 8)), b_dec=np.zeros(8))
    save_sae(Sae(params, dataclasses.replace(wide.config, d_model=8)), tmp_path / "wide")
    (release / "empty.jsonl").touch()
    for options, places, reason in (
        (("--sae", str(tmp_path / "wide")), {}, "reads vectors of 8, the model's residual stream has 16"),
        (("--layers", "5"), {}, "layer 5"),
        (("--layers", "1", "1"), {}, "a layer is named twice"),
        ((), {"data": "empty.jsonl"}, "no rows; every file is empty"),
        ((), {"data": "missing.jsonl"}, "missing.jsonl"),
        (("--text-field", "body"), {}, "'body'"),
        (("--max-length", "65"), {}, "the model's context is 64 tokens"),
        (("--tokens", "0"), {}, "--tokens 0: expected at least 1"),
        (("--predict-tokens", "-1"), {}, "--predict-tokens -1"),
    ):
        assert cli.main(command(release, tmp_path / "out", *options, **places)) == 2
        assert reason in capsys.readouterr().err


def test_rows_without_text_are_no_text(release, tmp_path, capsys):
    write_rows(release / "blank.jsonl", [{"text": ""}, {"text": " "}])
    assert cli.main(command(release, tmp_path, data="blank.jsonl")) == 2
    assert "no document to measure the sink threshold on" in capsys.readouterr().err
