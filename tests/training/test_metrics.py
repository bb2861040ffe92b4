"""What a training run tells: a line every few steps with the means since the last one, the same where it goes on."""

import json
import sys

import jax
import numpy as np
import pytest

from qscope_jax.sae.loss import Objective, Report
from qscope_jax.training import metrics
from qscope_jax.training.loop import Plan
from qscope_jax.training.metrics import TrainLog
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group
from qscope_jax.training.step import StepReport

PLAN = Plan((Group((2, 5), Objective(64, 4), Schedule(1e-3, 10)),), seed=0, rows=4, row_length=8, shards=2)


def report(fvu, *, failing=0):
    """Of a step; `fvu` of both layers."""
    ones, fvu = np.ones(2, np.float32), np.array(fvu, np.float32)
    batch = Report(loss=fvu, fvu=fvu, aux=0 * ones, l0=4 * ones, dead=ones / 64, tokens=32 * ones)
    counts = np.array([0, failing], np.int32)
    return (StepReport(batch, 2 * ones, ones / 1000, 0 * ones, counts, counts),)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_has_the_means_since_the_last_one(tmp_path):
    log = TrainLog(tmp_path, PLAN, (), first=0)
    for fvu in ([0.5, 0.9], [0.3, 0.7]):
        log.add(report(fvu))
    failing, told = log.write(2, judged=(report([0.45, 0.85])[0].batch,))
    log.add(report([0.2, np.nan], failing=1))
    assert log.write(3)[0] == {"W64-L0_4 layer 2": 0, "W64-L0_4 layer 5": 1}
    assert failing == {"W64-L0_4 layer 2": 0, "W64-L0_4 layer 5": 0}
    assert told == "FVU 0.400 to 0.800, dead 1.6%"

    first, second = lines(tmp_path)
    assert (first["step"], first["tokens"]) == (2, 64)
    own = first["W64-L0_4"]["2"]
    assert own["fvu"] == pytest.approx(0.4)
    assert own["held_out_fvu"] == pytest.approx(0.45)
    assert own["gradient_norm"] == 2
    assert second["W64-L0_4"]["5"]["fvu"] is None
    assert second["W64-L0_4"]["5"]["skipped"] == 1


def test_a_run_that_goes_on_writes_the_lines_of_one_that_never_stopped(tmp_path):
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    steps = [report([x, 2 * x]) for x in (0.31, 0.23, 0.17, 0.11)]
    whole, parts = TrainLog(tmp_path / "whole", PLAN, (), first=0), TrainLog(tmp_path / "parts", PLAN, (), first=0)
    for step, one in enumerate(steps, 1):
        whole.add(one)
        if step % 2 == 0:
            whole.write(step)
    for one in steps[:2]:
        parts.add(one)
    parts.write(2)
    parts.add(steps[2])
    saved = json.loads(json.dumps(parts.pending()))  # the checkpoint of step 3
    parts.add(steps[3])
    parts.write(4)  # told, but never saved
    again = TrainLog(tmp_path / "parts", PLAN, (), first=3, pending=saved)
    assert [line["step"] for line in lines(tmp_path / "parts")] == [2]
    again.add(steps[3])
    again.write(4)
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")


def test_an_sae_fails_for_as_long_as_it_ever_did_since_the_last_line(tmp_path):
    log = TrainLog(tmp_path, PLAN, (), first=0)
    for failing in (1, 2, 3, 0, 0, 0, 0):
        log.add(report([0.5, 0.9], failing=failing))
    assert log.write(7)[0] == {"W64-L0_4 layer 2": 0, "W64-L0_4 layer 5": 3}


def test_an_sae_that_skips_most_steps_fails_for_all_of_them(tmp_path):
    log, found = TrainLog(tmp_path, PLAN, (), first=0), []
    for step, failing in enumerate((1, 0, 1, 1, 2, 0, 0, 1, 0), 1):  # two, two and one of three
        log.add(report([0.5, 0.9], failing=failing))
        if step % 3 == 0:
            found.append(log.write(step)[0]["W64-L0_4 layer 5"])
    assert found == [3, 6, 1]


def test_tensorboard_gets_every_number_and_hides_what_is_made_again(tmp_path):
    pytest.importorskip("tensorboardX")
    for first in (0, 3):
        folder = tmp_path / str(first)
        folder.mkdir()
        with TrainLog(folder, PLAN, ("tensorboard",), first=first) as log:
            log.add(report([0.5, 0.9]))
            log.write(first + 1)
        (events,) = (folder / "tensorboard").iterdir()
        assert b"W64-L0_4/layer5/fvu" in events.read_bytes()
        assert starts_of(events) == [first + 1]


def starts_of(path):
    """The steps from which on TensorBoard is told to hide what other files hold."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found, data = [], path.read_bytes()
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]
        if event.session_log.status == SessionLog.START:
            found.append(event.step)
    return found


def test_leaving_it_ends_a_trace_and_closes_writers_whatever_happened(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder, profiler_options: told.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: told.append("stop"))
    monkeypatch.setitem(
        metrics._WRITERS, "wandb", lambda folder, first: (lambda *_: None, lambda: told.append("closed"))
    )
    log = TrainLog(tmp_path, PLAN, ("wandb",), first=0, profile=5)
    for _ in range(12):
        log.add(report([0.5, 0.9]))
    with pytest.raises(KeyboardInterrupt), log:
        raise KeyboardInterrupt
    log.close()
    assert told == ["start", "stop", "closed"]


@pytest.mark.parametrize(("writer", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_writer_that_is_not_installed_is_named(monkeypatch, writer, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"--log {writer} needs one more package: pip install 'qscope-jax\[logging\]'"
    ):
        metrics.check_writers((writer,))
