"""What every command shares: manifests, signals, progress."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass, field
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from qscope_jax.files.hashes import hash_files
from qscope_jax.jobs.progress import duration
from qscope_jax.jobs.run import EXIT_INTERRUPTED, Run, plain


@dataclass(frozen=True)
class Settings:
    out: Path = Path("somewhere")
    layers: tuple[int, ...] = (0, 5)
    nested: dict = field(default_factory=lambda: {"rate": np.float32(0.5)})


def manifest(folder):
    return json.loads((folder / "manifest.json").read_text())


def test_manifest_says_what_ran_with_what_and_how_it_ended(tmp_path):
    with Run("extract", Settings(), tmp_path) as run:
        assert manifest(tmp_path)["state"] == "running"
        run.record(counts={"rows": np.int64(3)})
        run.record(counts={"tokens": 40})
    found = manifest(tmp_path)
    assert found["state"] == "complete"
    assert found["config"] == {"out": "somewhere", "layers": [0, 5], "nested": {"rate": 0.5}}
    assert found["counts"] == {"rows": 3, "tokens": 40}
    assert found["versions"]["jax"]
    assert found["timings"]["seconds"] >= 0


def test_a_failed_run_says_why(tmp_path):
    with pytest.raises(ValueError, match="broken"), Run("extract", Settings(), tmp_path):
        raise ValueError("broken input")
    assert manifest(tmp_path)["state"] == "failed"
    assert "broken input" in manifest(tmp_path)["reason"]


def test_a_command_refused_before_any_work_leaves_the_manifest_of_what_is_there(tmp_path):
    with Run("extract", Settings(), tmp_path) as run:
        run.progress(rows=1)
    before = (tmp_path / "manifest.json").read_text()
    with pytest.raises(ValueError, match="'complete'"), Run("extract", Settings(layers=(1,)), tmp_path) as run:
        raise ValueError(f"refused; the manifest there says {run.earlier['state']!r}")
    assert (tmp_path / "manifest.json").read_text() == before
    with pytest.raises(TypeError), Run("extract", Settings(), tmp_path) as run:
        run.progress(rows=1, tokens="damaged")
    assert manifest(tmp_path)["state"] == "failed"


def test_a_signal_asks_once_and_the_old_handlers_come_back(tmp_path):
    def work():
        with Run("extract", Settings(), tmp_path) as run:
            assert not run.stopping
            os.kill(os.getpid(), signal.SIGTERM)
            assert run.stopping
            raise run.interrupted("2 of 3 parts are saved")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        work()
    assert stop.value.code == EXIT_INTERRUPTED
    assert manifest(tmp_path)["state"] == "interrupted"
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_stops_at_once(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        from qscope_jax.jobs.run import Run
        with Run("extract", {}, sys.argv[1]):
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            print("still here")
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGTERM
    assert "still here" not in done.stdout


def test_progress_lines_give_share_rates_and_count_earlier_work(tmp_path, capsys):
    with Run("extract", Settings(), tmp_path, total=100) as run:
        run.progress(rows=0, tokens=0, already=60)
        run.progress(rows=20, tokens=400)
    line = capsys.readouterr().err
    assert "80 of 100 rows (80%)" in line
    assert "rows/s" in line
    assert "tokens/s" in line
    assert "left" in line


def test_work_that_is_reported_once_at_its_end_began_with_the_run(tmp_path, capsys):
    with Run("bench", Settings(), tmp_path, total=1) as run:
        time.sleep(0.05)
        run.progress(benchmarks=1)
    rate = capsys.readouterr().err.split("| ")[1].split(" ")[0]
    assert float(rate) <= 20


def test_hashes_tell_files_of_one_name_apart(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    hashes = hash_files(tmp_path.glob("*/weights"))
    assert list(hashes) == ["a/weights", "b/weights"]
    assert hashes["a/weights"] != hashes["b/weights"]


def test_hashes_know_the_blobs_of_the_hub_cache(tmp_path):
    (tmp_path / "plain.bin").write_bytes(b"abc")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / ("0" * 64)).write_bytes(b"named by its hash")
    (tmp_path / "linked.bin").symlink_to(tmp_path / "blobs" / ("0" * 64))
    assert hash_files([tmp_path / "plain.bin", tmp_path / "linked.bin"]) == {
        "linked.bin": "0" * 64,
        "plain.bin": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
    }


def test_durations_and_plain_values_read_well():
    assert duration(75) == "1:15"
    assert duration(3675) == "1:01:15"
    assert plain({"a": (1, np.float64(2.5), Path("x"))}) == {"a": [1, 2.5, "x"]}


class TestRemoteOut:
    @pytest.fixture
    def address(self, tmp_path, monkeypatch):
        monkeypatch.setenv("QSCOPE_CACHE", str(tmp_path / "cache"))
        yield f"memory://{tmp_path.name}/out"
        memory = fsspec.filesystem("memory")
        if memory.exists(f"/{tmp_path.name}"):
            memory.rm(f"/{tmp_path.name}", recursive=True)

    def read(self, address, name):
        return fsspec.filesystem("memory").cat_file(f"{address}/{name}").decode()

    def left(self, tmp_path):
        """The local folders that were kept."""
        return list((tmp_path / "cache" / "results").iterdir())

    def test_results_are_made_locally_and_arrive(self, tmp_path, address, capsys):
        with Run("train", Settings(), Path(address)) as run:
            assert json.loads(self.read(address, "manifest.json"))["state"] == "running"
            assert run.address == address
            (run.out / "sae").mkdir()
            (run.out / "sae" / "layer0.pt").write_text("weights")
            run.publish()
            assert self.read(address, "sae/layer0.pt") == "weights"
            (run.out / "metrics.jsonl").write_text("{}\n")
        assert json.loads(self.read(address, "manifest.json"))["state"] == "complete"
        assert self.read(address, "metrics.jsonl") == "{}\n"
        assert self.left(tmp_path) == []
        assert f"3 files are in {address}" in capsys.readouterr().err

    def test_an_interrupted_run_arrives_too(self, tmp_path, address):
        def work():
            with Run("train", Settings(), address) as run:
                (run.out / "part.txt").write_text("done")
                raise run.interrupted("1 of 2 parts is saved")

        with pytest.raises(SystemExit) as stop:
            work()
        assert stop.value.code == EXIT_INTERRUPTED
        assert json.loads(self.read(address, "manifest.json"))["state"] == "interrupted"
        assert self.read(address, "part.txt") == "done"
        with Run("train", Settings(), address, resumes=True) as run:
            assert run.earlier["state"] == "interrupted"
            assert (run.out / "part.txt").read_text() == "done"

    @pytest.mark.parametrize("stopped", [False, True])
    def test_results_that_do_not_arrive_fail_the_run_and_stay_here(self, tmp_path, address, monkeypatch, stopped):
        def work():
            with Run("train", Settings(), address) as run:
                (run.out / "layer0.pt").write_text("weights")
                monkeypatch.setattr(
                    MemoryFileSystem, "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("full"))
                )
                if stopped:
                    raise run.interrupted("all is saved")

        with pytest.raises(OSError, match=r"layer0\.pt did not arrive: .*full.*Nothing is lost"):
            work()
        (folder,) = self.left(tmp_path)
        assert (folder / "layer0.pt").read_text() == "weights"
        assert manifest(folder)["state"] == ("interrupted" if stopped else "complete")
        assert json.loads(self.read(address, "manifest.json"))["state"] == "running"

    def test_the_reason_of_a_failed_run_is_not_hidden_by_that_of_the_copying(self, address, monkeypatch, capsys):
        def work():
            with Run("train", Settings(), address):
                monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("x")))
                raise ValueError("broken input")

        with pytest.raises(ValueError, match="broken input"):
            work()
        assert "did not arrive" in capsys.readouterr().err

    def test_a_failure_on_the_way_is_said_and_made_good_at_the_end(self, address, monkeypatch, capsys):
        with Run("train", Settings(), address) as run:
            (run.out / "a.txt").write_text("a")
            with monkeypatch.context() as broken:
                broken.setattr(MemoryFileSystem, "put_file", lambda *_, **__: (_ for _ in ()).throw(OSError("busy")))
                run.publish()
            assert "a.txt did not arrive" in capsys.readouterr().err
        assert self.read(address, "a.txt") == "a"

    def test_an_address_that_cannot_be_written_is_known_before_any_work(self, tmp_path, address, monkeypatch):
        monkeypatch.setattr(MemoryFileSystem, "put_file", lambda *_, **__: (_ for _ in ()).throw(PermissionError("no")))
        with pytest.raises(OSError, match="these credentials may not write it"), Run("train", Settings(), address):
            pytest.fail("the work began")
        assert self.left(tmp_path) == []

    def test_a_command_refused_before_any_work_leaves_what_is_there(self, address):
        with Run("train", Settings(), address) as run:
            run.progress(rows=1)
        before = self.read(address, "manifest.json")
        with pytest.raises(ValueError, match="refused"), Run("train", Settings(layers=(1,)), address):
            raise ValueError("refused")
        assert self.read(address, "manifest.json") == before


def test_a_run_without_a_folder_has_none_to_write_to():
    with Run("info", Settings(), None) as run, pytest.raises(ValueError, match="no folder for results"):
        _ = run.out
