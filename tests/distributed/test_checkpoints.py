"""Two processes save and restore together; what goes wrong in one is known to both, and a restart continues."""

import numpy as np
import pytest

from qscope_jax.mesh import make_mesh
from qscope_jax.training.checkpoints import Checkpoints
from tests.training import loop


@pytest.mark.slow
def test_checkpoints_over_two_processes(tmp_path, together):
    ended = together("checkpoints", tmp_path)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]

    expected = loop.bits(loop.run(tmp_path / "alone", make_mesh(2, 4), 12))
    for process in range(2):
        found = np.load(tmp_path / f"results{process}.npz")
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), name
        facts, steps, local, unshared, warned = (tmp_path / f"outcome{process}.txt").read_text().splitlines()
        assert facts.startswith("CheckpointError: processes save different checkpoints")
        assert f"process {process} saves step {9 + process} " in steps
        assert local.startswith(f"ValueError: n lies on devices of process {process} alone")
        assert "is not the same folder on all 2 processes" in unshared
        assert "6 is damaged" in warned
        assert ("another process cannot read it" in warned) == (process == 0)
        assert warned.endswith("6.damaged, and that of step 3 is used instead']")
    # One process reads what two have written, on another mesh.
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        restored = checkpoints.restore(loop.first_state(make_mesh(4, 2)))
    assert restored.step == 12
    for name, array in loop.bits(restored.arrays).items():
        assert expected[name].tobytes() == array.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.all)])
def test_one_killed_while_saving_ends_the_other_and_a_restart_continues(tmp_path, together, victim):
    (tmp_path / "victim").write_text(str(victim))
    silence = 6
    ended = together("lose_process_saving", tmp_path, silence=silence)
    lost, other = ended[victim], ended[1 - victim]
    assert lost.code == -9, lost.output
    assert other.code != 0
    assert other.seconds - lost.seconds < 2 * silence
    assert Checkpoints(tmp_path / "checkpoints").steps() == [3]

    (tmp_path / "victim").unlink()
    ended = together("lose_process_saving", tmp_path)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]
    expected = loop.bits(loop.run(tmp_path / "alone", make_mesh(2, 4), 12, rows=4096))
    for process in range(2):
        found = np.load(tmp_path / f"results{process}.npz")
        for name, array in expected.items():
            assert found[name].tobytes() == array.tobytes(), name
