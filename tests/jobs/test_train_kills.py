"""`qscope train-sae` as a process that is stopped and killed at any moment ends as if nothing had happened."""

import random
import signal
import time

import pytest

from qscope_jax.jobs.run import EXIT_INTERRUPTED
from tests.jobs.training import finish, lines_of, manifest, metrics, results, start, until

OFTEN = ("--checkpoint-every", "25", "--log-every", "10", "--judge-every", "100")


@pytest.fixture(scope="module")
def whole(tiny_release, compiled_once, tmp_path_factory):
    """A function of steps: what an undisturbed process leaves, and the seconds from its first line to its end."""
    known = {}

    def run(steps):
        if steps not in known:
            out = tmp_path_factory.mktemp("whole")
            process = start(tiny_release, out, compiled_once, *OFTEN, "--steps", str(steps))
            until(process, lambda: lines_of(out))
            begun = time.monotonic()
            finish(process)
            known[steps] = results(out), time.monotonic() - begun
        return known[steps]

    return run


def wait(process, seconds):
    end = time.monotonic() + seconds
    until(process, lambda: time.monotonic() > end)


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=pytest.mark.all)])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tiny_release, compiled_once, whole, tmp_path, kills):
    steps, rng = 200 * kills, random.Random(kills)
    expected, seconds = whole(steps)
    command = tiny_release, tmp_path, compiled_once, *OFTEN, "--steps", str(steps)
    for kill in range(kills):
        process, before = start(*command), lines_of(tmp_path)
        if kill % 3 == 1:
            wait(process, rng.uniform(0, 3))  # while it starts
        else:
            until(process, lambda before=before: (now := lines_of(tmp_path)) and (not before or now[0] != before[0]))
            wait(process, rng.uniform(0.2, 1) * seconds / kills)
        process.kill()
        _, told = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, told
    assert metrics(tmp_path)[-1]["step"] < steps
    told = finish(start(*command))
    assert "goes on from step" in told
    assert results(tmp_path) == expected
    assert manifest(tmp_path)["state"] == "complete"


@pytest.mark.slow
def test_a_second_signal_stops_at_once_and_the_run_still_goes_on(tiny_release, compiled_once, whole, tmp_path):
    command = tiny_release, tmp_path, compiled_once, *OFTEN, "--steps", "600"
    process = start(*command)
    until(process, lambda: lines_of(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert process.stderr
    while "a second signal stops at once" not in (line := process.stderr.readline()):
        assert line, "it ended without a word"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGTERM, EXIT_INTERRUPTED)  # the second may come when all is saved
    finish(start(*command))
    assert results(tmp_path) == whole(600)[0]
