"""`qscope train-sae` as its user meets it: results, stopping and going on, what it refuses, what it survives."""

import errno
import itertools
import json
import os
import shutil
import signal
import sys

import fsspec
import jax
import numpy as np
import pytest

from qscope_jax import cli
from qscope_jax.backbone.config import read_config
from qscope_jax.backbone.weights import Backbone, load_backbone, save_backbone
from qscope_jax.evaluate import DEFINITIONS
from qscope_jax.jobs import train_results
from qscope_jax.jobs import train_sae as job
from qscope_jax.jobs.run import EXIT_INTERRUPTED, versions
from qscope_jax.jobs.train_config import Config, checkpoint_folder, fewer_shards, plan_for
from qscope_jax.jobs.train_inputs import open_inputs
from qscope_jax.mesh import make_mesh
from qscope_jax.sae.formats import load_saes
from qscope_jax.training import checkpoints as checkpoints_module
from qscope_jax.training.checkpoint_folder import open_folder
from qscope_jax.training.checkpoints import Checkpoints
from qscope_jax.training.loop import Trainer
from qscope_jax.training.metrics import TrainLog
from qscope_jax.training.orbax_files import load_record
from tests.jobs.extracting import texts, write_rows
from tests.jobs.training import SMALL, finish, manifest, metrics, results, start, train

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def whole(tiny_release, compiled_once, tmp_path_factory):
    """What a run leaves that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole")
    assert train(tiny_release, out) == 0
    return out


def test_a_run_leaves_saes_with_their_quality_and_a_card(whole):
    saes = load_saes(whole / "sae")
    assert {layer: (sae.config.d_sae, sae.config.k) for layer, sae in saes.items()} == {0: (32, 4), 1: (32, 4)}
    assert all(sae.config.backbone == "model" and (sae.config.sink_threshold or 0) > 0 for sae in saes.values())
    assert all(np.isfinite(leaf).all() for sae in saes.values() for leaf in sae.params)
    told = json.loads((whole / "sae" / "quality.json").read_text(encoding="utf-8"))
    assert told["definitions"].items() >= DEFINITIONS.items()
    assert told["documents"] >= 1
    assert told["real_tokens"] == 128
    assert told["measured_on"] == (
        f"{told['documents']:,} documents of {told['real_tokens']:,} tokens, held out from training (0.01 of synthetic)"
    )
    assert 0 < told["layers"]["1"]["tokens"] <= 128
    assert 0 <= told["layers"]["1"]["dead_in_training"] <= 1
    assert (whole / "sae" / "quality.png").read_bytes().startswith(b"\x89PNG")
    card = (whole / "sae" / "README.md").read_text(encoding="utf-8")
    assert f"| {told['layers']['0']['fvu']:.4f} |" in card
    assert "silent for 256 tokens in training" in card
    assert f"| {told['layers']['0']['dead_in_training']:.2%} |" in card
    assert told["measured_on"] in card
    assert f"CE and KL on {told['layers']['0']['predicted_tokens']:.0f} predicted tokens" in card


def test_the_manifest_and_the_metrics_tell_of_the_run(whole):
    told = manifest(whole)
    assert (told["state"], told["counts"]["steps"], told["counts"]["tokens"]) == ("complete", 12, 1536)
    lines = metrics(whole)
    assert [line["step"] for line in lines] == [3, 6, 9, 12]
    assert ["held_out_fvu" in line["W32-L0_4"]["0"] for line in lines] == [False, True, False, True]
    assert lines[-1]["W32-L0_4"]["1"]["fvu"] < lines[0]["W32-L0_4"]["1"]["fvu"]


def test_a_rerun_of_a_finished_run_changes_nothing(tiny_release, whole):
    before = results(whole)
    assert train(tiny_release, whole) == 0
    assert results(whole) == before


# Between lines and checkpoints; at a checkpoint.
@pytest.mark.parametrize("step", [5, pytest.param(8, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_release, whole, tmp_path, monkeypatch, capsys, step):
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stop:
            train(tiny_release, tmp_path)
    assert stop.value.code == EXIT_INTERRUPTED
    told = manifest(tmp_path)
    assert (told["state"], told["reason"]) == ("interrupted", f"step {step} of 12 is saved")
    assert "The same command goes on from here" in capsys.readouterr().err
    assert train(tiny_release, tmp_path) == 0
    assert f"goes on from step {step}" in capsys.readouterr().err
    assert results(tmp_path) == results(whole)
    assert manifest(tmp_path)["counts"] == manifest(whole)["counts"]


@pytest.mark.slow
def test_options_that_do_not_decide_what_comes_out_may_change(tiny_release, whole, tmp_path, monkeypatch):
    stop_at(monkeypatch, tiny_release, tmp_path, 6)
    others = ("--log-every", "2", "--judge-every", "2", "--checkpoint-every", "5", "--keep", "1", "--max-failing", "2")
    assert train(tiny_release, tmp_path, *others) == 0
    assert [line["step"] for line in metrics(tmp_path)] == [3, 6, 8, 10, 12]
    assert saes_of(tmp_path) == saes_of(whole)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["12"]


@pytest.mark.slow
def test_another_layout_and_other_versions_go_on_and_only_versions_are_told_of(
    tiny_release, whole, tmp_path, monkeypatch, capsys
):
    stop_at(monkeypatch, tiny_release, tmp_path, 6, "--mesh", "2x2", "--model-axis", "layers")
    monkeypatch.setattr(job, "versions", lambda: {"jax": "0.0.1", "qscope-jax": versions()["qscope-jax"]})
    assert train(tiny_release, tmp_path, "--mesh", "1x2", "--model-axis", "latents") == 0
    told = capsys.readouterr().err
    assert (
        f'goes on in other versions than those of the last checkpoint (jax: was "{jax.__version__}", is "0.0.1")'
        in told
    )
    ours, theirs = load_saes(tmp_path / "sae"), load_saes(whole / "sae")
    for layer, sae in ours.items():
        np.testing.assert_allclose(sae.params.w_dec, theirs[layer].params.w_dec, atol=1e-4)
    assert manifest(tmp_path)["counts"] == manifest(whole)["counts"]


def test_a_run_with_other_settings_is_refused_and_the_differences_named(tiny_release, tmp_path, monkeypatch, capsys):
    release, data, out = tmp_path / "release", tmp_path / "texts.jsonl", tmp_path / "out"
    shutil.copytree(tiny_release, release)
    write_rows(data, [{"text": text} for text in texts(60)])
    stop_at(monkeypatch, release, out, 1, "--data", str(data))
    monkeypatch.setattr(job, "load_backbone", None)  # refused before that
    before = manifest(out)

    def refused(*options):
        assert train(release, out, "--data", str(data), *options) == 2
        told = capsys.readouterr().err
        assert f"{out / 'checkpoints'} is of a run with other settings" in told
        return told

    assert "settings.plan.seed: was 0, is 1" in refused("--seed", "1")
    assert "feed.seed: was 0, is 1" in refused("--seed", "1")
    assert "objective.d_sae: was 32, is 64" in refused("--width", "64")
    assert "objective.k: was 4, is 3" in refused("--k", "3")
    assert "settings.plan.rows: was 8, is 16" in refused("--batch-tokens", "256")
    assert "schedule.steps: was 12, is 20" in refused("--steps", "20")
    assert "schedule.peak: was 0.01, is 0.02" in refused("--lr", "0.02")
    assert "settings.plan.buffer: was 2, is 0" in refused("--buffer-bytes", "0")
    assert 'settings.precision: was "parity", is "fast"' in refused("--precision", "fast")
    assert "feed.held_out: was 0.01, is 0.5" in refused("--held-out", "0.5")
    assert "feed.end_token: was null, is 300" in refused("--end-token", "300")
    assert "feed.sources.0" in refused("--data", "synthetic")
    tokenizer = json.loads((release / "model" / "tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["model"]["merges"].pop()
    (release / "model" / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    assert "feed.sources.0.tokenizer" in refused()
    write_rows(data, [{"text": text} for text in texts(60, seed=1)])
    assert "feed.sources.0.files" in refused()
    assert manifest(out) == before


@pytest.mark.slow
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(tiny_release, whole, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, tiny_release, tmp_path, 10)
    newest = max((tmp_path / "checkpoints" / "10" / "arrays").rglob("*"), key=lambda path: path.stat().st_size)
    os.truncate(newest, newest.stat().st_size // 2)
    assert train(tiny_release, tmp_path) == 0
    told = capsys.readouterr().err
    assert "is damaged" in told
    assert "goes on from step 8" in told
    assert (tmp_path / "checkpoints" / "10.damaged").exists()
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_is_trained(tiny_release, tmp_path, monkeypatch, capsys):
    stop_at(monkeypatch, tiny_release, tmp_path, 2)
    (tmp_path / "checkpoints" / "2" / "commit_success.txt").unlink()
    assert train(tiny_release, tmp_path) == 2
    told = capsys.readouterr().err
    assert "no checkpoint in" in told
    assert "Traceback" not in told


@pytest.mark.slow
def test_what_is_never_finite_ends_the_run_with_the_last_good_state(tiny_release, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        seen, collect = [], Trainer.collect

        def poisoned(self, rows):
            seen.append(rows)
            found = collect(self, rows)
            return found if len(seen) <= 6 else found._replace(x=found.x * np.nan)

        patch.setattr(Trainer, "collect", poisoned)  # the buffer takes two batches
        assert train(tiny_release, tmp_path, "--max-failing", "3", "--steps", "40") == 2
    told = capsys.readouterr().err
    assert (
        "W32-L0_4 layer 0, W32-L0_4 layer 1: 3 steps or more, in a row or with few good ones between them, gave no"
        in told
    )
    assert manifest(tmp_path)["state"] == "failed"
    last = metrics(tmp_path)[-1]
    assert last["W32-L0_4"]["0"]["loss"] is None
    assert last["W32-L0_4"]["0"]["skipped"] >= 3
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps()[-1] == last["step"]
        record = load_record(open_folder(tmp_path / "checkpoints").at(last["step"]))
        shapes = {
            name: jax.ShapeDtypeStruct(about["shape"], about["dtype"]) for name, about in record["arrays"].items()
        }
        found = checkpoints.restore(shapes)
    assert found
    arrays = found.arrays
    assert all(np.isfinite(array).all() for name, array in arrays.items() if "weights" in name or "adam" in name)


def test_a_model_that_is_not_finite_is_named(tiny_release, tmp_path, capsys):
    shutil.copytree(tiny_release / "model", tmp_path / "model", ignore=lambda *_: ["model.safetensors"])
    backbone = load_backbone(tiny_release / "model", dtype="float32")
    embed = backbone.params["embed"].at[:, 3].set(np.inf)
    save_backbone(Backbone(backbone.config, backbone.params | {"embed": embed}), tmp_path / "model")
    assert train(tmp_path, tmp_path / "out") == 2
    assert "finite" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("what", ["metrics", "checkpoint", "SAEs"])
def test_a_full_disk_is_told_of_and_a_rerun_completes(tiny_release, whole, tmp_path, monkeypatch, capsys, what):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail(*_, **__):
        raise full

    def half_a_line(self, step, judged=None):
        with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write('{"step": 3, "to')
        raise full

    with monkeypatch.context() as patch:
        if what == "metrics":
            patch.setattr(TrainLog, "write", half_a_line)
        else:
            patch.setattr(
                *{"checkpoint": (checkpoints_module, "start_saving"), "SAEs": (train_results, "export_group")}[what],
                fail,
            )
        assert train(tiny_release, tmp_path) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert manifest(tmp_path)["state"] == "failed"
    assert train(tiny_release, tmp_path) == 0
    assert results(tmp_path) == results(whole)


@pytest.mark.slow
def test_data_and_results_may_be_remote_and_checkpoints_stay_on_a_disk(tiny_release, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path / "cache"))
    memory, root = fsspec.filesystem("memory"), f"/{tmp_path.name}"
    rows = [{"text": text} for text in texts(60)]
    memory.pipe_file(f"{root}/texts.jsonl", write_rows(tmp_path / "texts.jsonl", rows).read_bytes())
    out, data = f"memory:/{root}/out", ("--data", f"memory:/{root}/texts.jsonl")
    assert train(tiny_release, out, *data) == 2
    assert f"--out {out}: checkpoints cannot lie there; name a folder for them with --checkpoints" in (
        capsys.readouterr().err
    )
    places = (*data, "--checkpoints", str(tmp_path / "checkpoints"))
    stop_at(monkeypatch, tiny_release, out, 7, *places)
    assert names_in(memory, f"{root}/out") == ["manifest.json", "metrics.jsonl"]
    assert train(tiny_release, out, *places) == 0
    assert "goes on from step 7" in capsys.readouterr().err
    assert train(tiny_release, tmp_path / "local", "--data", str(tmp_path / "texts.jsonl")) == 0
    found = {name: memory.cat_file(f"{root}/out/{name}") for name in names_in(memory, f"{root}/out")}
    expected = results(tmp_path / "local")
    assert found.keys() == expected.keys() | {"manifest.json"}
    assert found["metrics.jsonl"] == expected["metrics.jsonl"]
    assert found["sae/layer1.sae.safetensors"] == expected["sae/layer1.sae.safetensors"]
    assert not any((tmp_path / "cache" / "results").iterdir())
    memory.rm(root, recursive=True)


@pytest.mark.slow
def test_several_widths_are_trained_side_by_side(tiny_release, tmp_path):
    more = ("--width", "32", "48", "--format", "qwen-scope", "--dtype", "bfloat16", "--layers", "1", "--steps", "1")
    assert train(tiny_release, tmp_path, *more, "--selection", "batch", "--prefixes", "0.5") == 0
    for width in (32, 48):
        folder = tmp_path / "sae" / f"W{width}-L0_4"
        assert {path.name for path in folder.iterdir()} == {
            "layer1.sae.pt", "config.json", "README.md", "quality.json", "quality.png",
        }  # fmt: skip
        sae = load_saes(folder, dtype=None)[1]
        assert (sae.config.d_sae, sae.config.k, sae.params.w_dec.dtype) == (width, 4, "bfloat16")
        assert f"with {width} latents" in (folder / "README.md").read_text(encoding="utf-8")


def test_every_width_is_trained_with_every_k(tiny_release):
    constants = read_config(tiny_release / "model" / "config.json")
    plan, steps = plan_for(Config(width=(32, 2048), k=(2, 4), layers=(1, 0), row_length=64), constants, None)
    assert [group.name for group in plan.groups] == ["W32-L0_2", "W32-L0_4", "W2K-L0_2", "W2K-L0_4"]
    assert {group.layers for group in plan.groups} == {(0, 1)}
    assert (steps, plan.batch_tokens, plan.buffer) == (245, 4096, 3)  # 64 rows a step: 256 rows with what waits
    assert plan.shards == 64
    assert {group.objective.dead_after for group in plan.groups} == {245 * 4096 // 40}


def test_virtual_shards_are_rows_or_fewer_where_documents_are_few(tiny_release):
    constants, mesh = read_config(tiny_release / "model" / "config.json"), make_mesh(4, 1, devices=jax.devices()[:4])
    plan, _ = plan_for(Config(row_length=64, batch_tokens=64 * 24), constants, mesh)
    found = {documents: fewer_shards(plan, documents, mesh).shards for documents in (1000, 23, 11, 4)}
    assert found == {1000: 24, 23: 12, 11: 8, 4: 4}
    with pytest.raises(ValueError, match="--row-length 64 times the 4 devices of the mesh axis 'data'"):
        plan_for(Config(row_length=64, batch_tokens=64 * 6), constants, mesh)


def test_a_latent_is_not_dead_within_four_steps(tiny_release):
    constants = read_config(tiny_release / "model" / "config.json")
    plan, _ = plan_for(Config(steps=10, batch_tokens=1024, row_length=64), constants, None)
    assert plan.groups[0].objective.dead_after == 4096


@pytest.mark.slow
def test_nothing_held_out_is_nothing_measured(tiny_release, whole, tmp_path):
    assert train(tiny_release, tmp_path, "--held-out", "0", "--steps", "2", "--log-every", "2") == 0
    assert "Nothing was measured" in (tmp_path / "sae" / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / "sae" / "quality.json").exists()
    assert "held_out_fvu" not in metrics(tmp_path)[-1]["W32-L0_4"]["0"]


@pytest.mark.slow
def test_documents_held_out_are_measured_on_once_and_too_few_are_told_of(tiny_release, tmp_path, capsys):
    data = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in texts(20)])
    more = ("--data", str(data), "--held-out", "0.1", "--steps", "1", "--log-every", "1", "--eval-tokens", "100000")
    assert train(tiny_release, tmp_path / "out", *more, "--judge-every", "1") == 0
    told = json.loads((tmp_path / "out" / "sae" / "quality.json").read_text(encoding="utf-8"))
    assert told["documents"] == 2
    assert 0 < told["real_tokens"] < 100_000
    assert told["layers"]["0"]["tokens"] <= told["real_tokens"]
    assert f"{told['real_tokens']:,} tokens are held out, fewer than --eval-tokens 100,000" in capsys.readouterr().err


class TestVectorsOnDisk:
    def train(self, release, out, path, *options):
        arguments = ["train-sae", "--model", str(release / "model"), "--out", str(out), *SMALL]
        return cli.main([*arguments, "--activations", str(path), "--layers", "1", *options])

    @pytest.fixture
    def vectors(self, tmp_path):
        path = tmp_path / "vectors.npy"
        np.save(path, np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32))
        return path

    @pytest.mark.slow
    def test_they_train_one_sae_with_rows_of_any_length(self, tiny_release, tmp_path, vectors):
        long = ("--row-length", "128", "--batch-tokens", "512", "--shards", "2", "--held-out", "0.1")  # context: 64
        assert self.train(tiny_release, tmp_path / "out", vectors, *long, "--eval-tokens", "512") == 0
        (sae,) = load_saes(tmp_path / "out" / "sae").values()
        assert (sae.config.layer, sae.config.d_sae) == (1, 32)
        told = json.loads((tmp_path / "out" / "sae" / "quality.json").read_text(encoding="utf-8"))
        assert (told["documents"], told["real_tokens"]) == (3, 384)  # of 32 rows
        assert told["measured_on"].startswith("3 rows of vectors of 384 tokens")

    def test_the_buffer_is_of_their_type_and_shards_are_as_many_as_rows(self, tiny_release, vectors):
        few = {"model": str(tiny_release / "model"), "activations": (str(vectors),), "layers": (1,), "mesh": "1x1"}
        config = Config(**few, batch_tokens=8192, row_length=128, buffer_bytes=3 * 8192 * 16 * 4)
        plan = open_inputs(config).plan
        assert (plan.rows, plan.shards, plan.buffer) == (64, 16, 3)  # 31 rows to train on; 64 bytes a vector, not 32

    def test_options_for_text_are_refused(self, tiny_release, tmp_path, vectors, capsys):
        assert self.train(tiny_release, tmp_path / "out", vectors, "--data", "synthetic", "--fsdp") == 2
        assert "--activations: --data, --fsdp would be ignored" in capsys.readouterr().err
        assert self.train(tiny_release, tmp_path / "out", vectors, "--end-token", "3", "--document", "file") == 2
        assert "--activations: --document, --end-token would be ignored" in capsys.readouterr().err


@pytest.mark.slow
def test_without_tokens_for_it_the_saes_are_not_evaluated(tiny_release, whole, tmp_path):
    assert train(tiny_release, tmp_path, "--eval-tokens", "0") == 0
    assert saes_of(tmp_path) == saes_of(whole)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "sae" / "quality.json").exists()


@pytest.mark.slow
def test_a_trace_of_some_steps_is_left_when_asked(tiny_release, whole, tmp_path, compiled_once):
    finish(start(tiny_release, tmp_path, compiled_once, "--profile", "2", "--eval-tokens", "0"))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert saes_of(tmp_path) == saes_of(whole)


@pytest.mark.slow
def test_one_step_is_a_run_and_progress_tells_how_good_it_is(tiny_release, tmp_path, capsys):
    assert train(tiny_release, tmp_path, "--steps", "1", "--layers", "1") == 0
    fvu = metrics(tmp_path)[0]["W32-L0_4"]["1"]["fvu"]
    assert "128 of 128 tokens (100%)" in (told := capsys.readouterr().err)
    assert f"FVU {fvu:.3f}, dead 0.0%" in told
    assert [line["step"] for line in metrics(tmp_path)] == [1]
    assert load_saes(tmp_path / "sae")


@pytest.mark.slow
def test_few_short_documents_are_enough_as_long_as_every_shard_has_one(tiny_release, tmp_path, capsys):
    data = write_rows(tmp_path / "few.jsonl", [{"text": text} for text in ("a", "b", "a long one " * 40, "c", "d")])
    assert train(tiny_release, tmp_path / "out", "--data", str(data), "--held-out", "0.1", "--steps", "3") == 0
    write_rows(data, [{"text": "a"}, {"text": "b"}, {"text": "c"}])
    assert train(tiny_release, tmp_path / "other", "--data", str(data), "--held-out", "0.1") == 2
    assert "shards" in capsys.readouterr().err
    write_rows(data, [{"text": ""}] * 9)
    assert train(tiny_release, tmp_path / "other", "--data", str(data)) == 2


def test_numbers_that_make_no_run_are_named_before_weights_are_read(tiny_release, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "load_backbone", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    for options, reason in (
        (("--steps", "0"), "--steps 0: expected at least 1"),
        (("--tokens", "-5"), "--tokens -5: expected at least 1"),
        (("--warmup-steps", "-1"), "-1 of warmup (at least 0)"),
        (("--decay-share", "1.5"), "1.5 (0 to 1)"),
        (("--lr", "nan"), "--lr nan: expected a finite number"),
        (("--lr", "-1"), "a learning rate of -1.0"),
        (("--lr", "0"), "a learning rate of 0.0"),
        (("--dead-after", "1073741824"), "--dead-after 1073741824: expected less than 1,073,741,824"),
        (("--clip", "0"), "--clip 0.0: expected a positive number"),
        (("--k", "33"), "k = 33"),
        (("--k", "4", "4"), "a pair is named twice"),
        (("--width", "0"), "0"),
        (("--aux-weight", "-1"), "-1"),
        (("--prefixes", "1.5"), "--prefixes (1.5,)"),
        (("--layers", "2"), "--layers (2,): expected different layers among 0..1"),
        (("--row-length", "65"), "--row-length 65: expected 1 to 64, the model's context"),
        (("--batch-tokens", "100"), "--batch-tokens 100 must be a multiple of --row-length 16 times --shards 4"),
        (("--mesh", "8x1"), "--shards 4: the 8 devices of the mesh axis 'data' must divide them"),
        (("--mesh", "1x2", "--model-axis", "layers", "--width", "33"), "--width 33: finished SAEs are evaluated"),
        (("--mesh", "1x2", "--width", "33"), "33 latents cannot be split over the mesh axis 'model' of 2 devices"),
        (("--log", "wandb"), "--log wandb needs one more package"),
        (("--judge-every", "4"), "--judge-every 4 must be a multiple of --log-every 3"),
        (("--held-out", "1"), "held_out = 1.0"),
        (("--end-token", "320"), "end_token = 320"),
        (("--buffer-bytes", "-1"), "-1"),
        (("--mesh", "2"), "--mesh 2: expected DATAxMODEL"),
        (("--weights", "1", "2"), "2 weight(s) for 1 name(s) of data"),
        (("--license", "none of your business"), "license"),
    ):
        assert train(tiny_release, tmp_path / "out", *options) == 2, options
        assert reason in capsys.readouterr().err, options


def test_checkpoints_lie_in_the_results_where_they_can():
    assert checkpoint_folder(Config(out="out")) == "out/checkpoints"
    assert checkpoint_folder(Config(out="gs://bucket/out/")) == "gs://bucket/out/checkpoints"
    assert checkpoint_folder(Config(out="s3://bucket/out", checkpoints="kept")) == "kept"


def at_step(patch, number, action):
    """Does something while a run makes its step of this number, counted from where it begins."""
    step, seen = Trainer.step, itertools.count(1)

    def watched(self, carried, rows):
        if next(seen) == number:
            action()
        return step(self, carried, rows)

    patch.setattr(Trainer, "step", watched)


def stop_at(monkeypatch, release, out, step, *options):
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit):
            train(release, out, *options)


def saes_of(out):
    return {name: content for name, content in results(out).items() if name.endswith(".safetensors")}


def names_in(system, folder):
    return sorted(name.removeprefix(folder).lstrip("/") for name in system.find(folder))
