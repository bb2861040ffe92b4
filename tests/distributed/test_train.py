"""Two processes that train together make what one makes; neither outlives the other, and either number goes on."""

import re
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file

from qscope_jax.jobs.run import EXIT_INTERRUPTED
from tests.distributed.conftest import free_port
from tests.jobs.training import finish, lines_of, manifest, metrics, results, start, until

pytestmark = pytest.mark.slow
SILENCE = 60  # seconds after which a process that says nothing counts as dead
MESH = ("--mesh", "4x2")


@pytest.fixture(scope="module")
def begin(tiny_release, compiled_once):
    """A function (out, processes, devices of each, ...) that starts one run; what still works in the end is killed."""
    started = []

    def run(out, processes, devices, *options):
        flags, port = f"--xla_force_host_platform_device_count={devices}", free_port()
        for i in range(processes):
            place = ("--coordinator", f"127.0.0.1:{port}", "--processes", str(processes), "--process", str(i))
            started.append(start(tiny_release, out, compiled_once, *options, *place, XLA_FLAGS=flags))
        return started[-processes:]

    yield run
    for process in started:
        process.kill()
        process.wait()
        process.stderr.close()  # of one that was killed nobody read it


@pytest.fixture(scope="module")
def whole(begin, tmp_path_factory):
    """What two processes leave that nothing disturbs."""
    out = tmp_path_factory.mktemp("two")
    finish_all(begin(out, 2, 4, *MESH))
    return out


def finish_all(processes):
    told = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), told
    return told


def check_close(out, expected):
    """The same SAEs and metrics but for the order of sums, which differs between processes and threads."""
    for layer in range(2):
        found, wanted = (load_file(place / "sae" / f"layer{layer}.sae.safetensors") for place in (out, expected))
        for name, array in wanted.items():
            np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-6 * np.abs(array).max(), err_msg=name)
    for line, wanted in zip(metrics(out), metrics(expected), strict=True):
        assert line.keys() == wanted.keys()
        for layer, numbers in wanted["W32-L0_4"].items():
            assert line["W32-L0_4"][layer] == pytest.approx(numbers, rel=1e-5)


def test_two_processes_make_what_one_makes(begin, whole, tmp_path):
    finish_all(begin(tmp_path, 1, 8, *MESH))
    check_close(whole, tmp_path)
    two, one = (results(out) for out in (whole, tmp_path))
    assert two.keys() == one.keys()
    assert {manifest(whole, f"manifest{i}.json")["state"] for i in ("", "-1-of-2")} == {"complete"}


def test_two_processes_may_share_the_latents(begin, tmp_path):
    """MODEL goes over both, so that each reads all rows."""
    finish_all(begin(tmp_path / "two", 2, 1, "--mesh", "1x2"))
    finish_all(begin(tmp_path / "one", 1, 2, "--mesh", "1x2"))
    check_close(tmp_path / "two", tmp_path / "one")


def test_where_one_is_killed_the_other_ends_and_a_restart_ends_with_the_same_bytes(begin, whole, tmp_path):
    first, second = begin(tmp_path, 2, 4, *MESH)
    until(second, (tmp_path / "checkpoints" / "4").exists)
    second.kill()
    _, told = first.communicate(timeout=2 * SILENCE)
    assert first.returncode not in (0, EXIT_INTERRUPTED), told
    assert not (tmp_path / "sae").exists()
    told = finish_all(begin(tmp_path, 2, 4, *MESH))
    assert all(re.search("goes on from step [48]", one) for one in told)
    assert results(tmp_path) == results(whole)


def test_where_one_is_stopped_both_save_and_one_process_alone_goes_on(begin, whole, tmp_path):
    both = begin(tmp_path, 2, 4, *MESH)
    until(both[1], lambda: lines_of(tmp_path))
    both[1].send_signal(signal.SIGTERM)
    told = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [EXIT_INTERRUPTED] * 2, told
    assert all("is saved. The same command goes on from here" in one for one in told)
    (alone,) = begin(tmp_path, 1, 8, *MESH)
    assert "goes on from step" in finish(alone)
    check_close(tmp_path, whole)
