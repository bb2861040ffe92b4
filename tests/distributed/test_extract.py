"""Two processes that extract together write what one writes, each row once, and neither outlives the other."""

import signal
import socket

import numpy as np
import pytest

from qscope_jax.jobs.run import EXIT_INTERRUPTED
from tests.jobs.extracting import (
    WORDS,
    check_exactly_once,
    damaged_rows,
    extract,
    manifest,
    results,
    start,
    stop_when,
    write_rows,
)

OPTIONS = ("--id-field", "id", "--keep", "n", "--part-rows", "100", "--mesh", "4x2")
SILENCE = 60  # seconds after which a process that says nothing counts as dead


@pytest.fixture(scope="module")
def corpus(tiny_release, tmp_path_factory, compiled_once):
    """Rows, which of them are bad, their file, and what one process makes of it; every second part is of long texts."""
    rows, bad = damaged_rows(1500, 50)
    rng = np.random.default_rng(1)
    for i, row in enumerate(rows):
        if i // 100 % 2 and i not in bad:
            row["text"] = " ".join(rng.choice(WORDS, 40))
    folder = tmp_path_factory.mktemp("corpus")
    data = write_rows(folder / "a.jsonl", rows)
    extract(tiny_release, data, folder / "whole", *OPTIONS)
    return rows, bad, data, folder / "whole"


@pytest.fixture
def both(tiny_release, compiled_once):
    """A function (data, out) that starts two processes of one job; what still runs at the end of the test is killed."""
    started = []

    def run(data, out):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = ("--coordinator", f"127.0.0.1:{probe.getsockname()[1]}", "--processes", "2")
        two = [start(tiny_release, data, out, compiled_once, *OPTIONS, *place, "--process", str(i)) for i in range(2)]
        started.extend(two)
        return two

    yield run
    for process in started:
        process.kill()
        process.wait()


def finish(processes):
    told = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    return told


@pytest.mark.slow
def test_two_processes_write_what_one_writes(corpus, both, tmp_path):
    rows, bad, data, whole = corpus
    out = tmp_path / "out"
    first, second = finish(both(data, out))
    assert results(out) == results(whole)
    check_exactly_once(out, rows, bad)
    assert "15 of 15 parts: 1,470 documents" in first
    assert "15 of 15" not in second
    told = manifest(out)
    assert told["counts"] == manifest(whole)["counts"]
    assert told["store"]["mesh"] == {"data": 4, "model": 2}
    assert (told["device"]["count"], told["device"]["processes"]) == (16, 2)
    assert {manifest(out, f"manifest-{i}-of-2.json")["state"] for i in range(2)} == {"complete"}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.all)])
def test_where_one_is_killed_the_other_ends_with_an_error_and_a_rerun_completes(corpus, both, tmp_path, victim):
    rows, bad, data, whole = corpus
    out = tmp_path / "out"
    processes = both(data, out)
    part = out / f"documents/part-{victim:05d}.parquet"
    assert stop_when(processes[victim], signal.SIGKILL, part.exists)[0] == -signal.SIGKILL
    other = processes[1 - victim]
    _, told = other.communicate(timeout=2 * SILENCE)
    assert other.returncode != 0, told
    assert "what is finished stays" in told
    kept = parts_of(out)
    assert 0 < len(kept) < 15
    finish(both(data, out))
    assert kept.items() <= parts_of(out).items()
    assert results(out) == results(whole)
    check_exactly_once(out, rows, bad)
    assert not list(out.glob("*/.*.tmp"))


@pytest.mark.slow
def test_where_one_is_stopped_the_other_makes_its_parts(corpus, both, tmp_path):
    _, _, data, whole = corpus
    out = tmp_path / "out"
    first, second = both(data, out)
    code, told = stop_when(second, signal.SIGTERM, (out / "documents/part-00001.parquet").exists)
    assert code == EXIT_INTERRUPTED, told
    assert "The same command goes on from here" in told
    _, told = first.communicate(timeout=240)
    assert first.returncode == 0, told
    assert {f"part-{part:05d}.parquet" for part in range(0, 15, 2)} < set(parts_of(out))
    assert "of 15 parts" in told
    assert not (out / "manifest.json").exists()
    finish(both(data, out))
    assert results(out) == results(whole)


def parts_of(out):
    """The files of finished parts, and which they are."""
    return {path.name: path.stat().st_ino for path in (out / "documents").glob("*.parquet")}
