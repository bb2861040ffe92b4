"""Checkpoints come back to the bit, on any mesh; what is damaged, half written or not written is never trained on."""

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import v1 as ocp

from qscope_jax.mesh import make_mesh
from qscope_jax.training import checkpoints as module
from qscope_jax.training.checkpoint_folder import CheckpointError, CheckpointFolder, open_folder
from qscope_jax.training.checkpoints import Checkpoints

FACTS = {"feed": [{"document": 3}, {"document": 5}], "config": {"k": 8, "lr": 1e-4, "layers": (0, 2)}}


class State(NamedTuple):
    weights: dict[str, Any]
    moments: Any
    key: Any


def state_of(mesh, seed=0):
    """Every type a state may hold, over both mesh axes, one, or none."""
    rng = np.random.default_rng(seed)

    def put(value, *axes):
        return jax.device_put(value, NamedSharding(mesh, PartitionSpec(*axes)))

    return State(
        {
            "w_enc": put(rng.normal(size=(2, 256, 32)).astype(np.float32), None, "model", "data"),
            "b.enc": put(jnp.asarray(rng.normal(size=(2, 32)), jnp.bfloat16), None, "model"),
        },
        (None, put(rng.integers(0, 9, (8, 5)).astype(np.int32), "data"), [put(rng.random((6,)) > 0.5)], ()),
        put(jax.random.key(seed)),
    )


def bits(tree):
    def one(leaf):
        return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf

    return [np.asarray(one(leaf)).tobytes() for leaf in jax.tree.leaves(tree)]


def scaled(state, by):
    """The state with other weights."""
    return state._replace(weights=jax.tree.map(lambda w: w * by, state.weights))


def abstract(state, mesh):
    def one(leaf):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, leaf.sharding.spec))

    return jax.tree.map(one, state)


@pytest.fixture
def mesh():
    return make_mesh(2, 4)


@pytest.fixture
def state(mesh):
    return state_of(mesh)


@pytest.fixture
def saved(tmp_path, state):
    """A folder with whole checkpoints of steps 10 and 20, the weights times the step."""
    with Checkpoints(tmp_path / "saved") as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, scaled(state, step), FACTS | {"step": step})
    return tmp_path / "saved"


@pytest.fixture
def heard():
    return []


@pytest.fixture
def in_place(monkeypatch):
    """A disk on which renaming is not atomic, as under gs://."""
    monkeypatch.setattr(module, "open_folder", lambda path: CheckpointFolder(ocp.path.Path(path), renames=False))


@pytest.fixture
def big(state):
    return jax.device_put(np.random.default_rng(0).normal(size=(512, 1024)).astype(np.float32), state.key.sharding)


@contextlib.contextmanager
def full_disk():
    """No file can grow beyond 1 MB, half of what `big` takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# What comes back.


@pytest.mark.parametrize("shape", [(2, 4), (4, 2), (1, 8), (1, 1)])
def test_a_state_comes_back_to_the_bit_on_any_mesh(tmp_path, state, shape):
    other = make_mesh(*shape, devices=jax.devices()[: shape[0] * shape[1]])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, state, FACTS)
        found = checkpoints.restore(abstract(state, other))
    assert found.step == 7
    assert bits(found.arrays) == bits(state)
    assert jax.tree.structure(found.arrays) == jax.tree.structure(state)
    assert all(leaf.sharding.mesh.shape == other.shape for leaf in jax.tree.leaves(found.arrays))
    assert found.facts == FACTS | {"config": FACTS["config"] | {"layers": [0, 2]}}


def test_facts_are_read_without_the_arrays(saved, monkeypatch):
    shutil.rmtree(saved / "20" / "arrays")
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.facts()["step"] == 20
        assert checkpoints.facts(10)["step"] == 10


def test_an_older_step_can_be_asked_for(saved, state):
    with Checkpoints(saved) as checkpoints:
        assert bits(checkpoints.restore(state, step=10).arrays) == bits(scaled(state, 10))
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 15; it has \[10, 20\]"):
            checkpoints.restore(state, step=15)


@pytest.mark.parametrize("there", [True, False])
def test_where_nothing_was_saved_nothing_is_found_and_nothing_written(tmp_path, state, there):
    folder = tmp_path / "new"
    if there:
        folder.mkdir()
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.restore(state) is None
        assert checkpoints.facts() is None
        assert checkpoints.steps() == []
    assert list(tmp_path.rglob("*")) == ([folder] if there else [])


def test_a_step_taken_at_once_after_a_save_does_not_change_what_was_saved(tmp_path, mesh):
    place = NamedSharding(mesh, PartitionSpec("data", "model"))
    x = jax.device_put(np.random.default_rng(0).normal(size=(2048, 1024)).astype(np.float32), place)
    step = jax.jit(lambda x: x * 2, donate_argnums=0)
    before, x = x, step(x)
    assert before.is_deleted()  # so that a step does write into what is being saved
    with Checkpoints(tmp_path) as checkpoints:
        for n in range(3):
            expected = bits(x)
            checkpoints.save(n, x, {})
            for _ in range(3):
                x = step(x)
            assert bits(checkpoints.restore(x).arrays) == expected != bits(x)


def test_checksums_are_compiled_once_for_equal_states(tmp_path, state):
    from qscope_jax.training.checksums import _checksums

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
        compiled = _checksums._cache_size()
        checkpoints.save(2, scaled(state, 2), {})
        checkpoints.restore(state)
    assert _checksums._cache_size() == compiled


def test_the_newest_step_is_known_while_it_is_being_written_and_only_then_counted(saved, state, big):
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.newest is None
        checkpoints.restore(state)
        assert checkpoints.newest == 20
        checkpoints.save(30, big, {})
        assert checkpoints.newest == 30
        checkpoints.wait()
        with full_disk():
            checkpoints.save(40, big, {})
            with pytest.raises(CheckpointError):
                checkpoints.wait()
        assert checkpoints.newest is None
        assert checkpoints.steps() == [10, 20, 30]


# What stays.


def test_the_newest_stay_and_every_permanent_one(tmp_path, state):
    with Checkpoints(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in range(10, 70, 10):
            checkpoints.save(step, state.key, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["20", "40", "50", "60"]
    assert Checkpoints(tmp_path).steps() == [20, 40, 50, 60]


@pytest.mark.parametrize("options", [{"keep": 0}, {"keep_every": 0}])
def test_at_least_one_must_stay(tmp_path, options):
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpoints(tmp_path, **options)


def test_a_folder_copied_elsewhere_and_back_is_read_and_kept(saved, state, tmp_path):
    shutil.copytree(saved, tmp_path / "elsewhere")
    shutil.rmtree(saved)
    shutil.copytree(tmp_path / "elsewhere", saved, copy_function=shutil.copyfile)  # new times
    with Checkpoints(saved) as checkpoints:
        found = checkpoints.restore(state)
        assert (found.step, bits(found.arrays)) == (20, bits(scaled(state, 20)))
        checkpoints.save(30, state, {})
    assert Checkpoints(saved).steps() == [10, 20, 30]


# Damage.


def flipped(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 4
    path.write_bytes(raw)


def halved(path):
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.slow
def test_no_damage_to_any_file_is_trained_on(saved, state, tmp_path):
    """Whatever happens to a file, what is restored is exactly what was saved: then, or at the step before."""
    outcomes = {}
    for path in sorted(path for path in (saved / "20").rglob("*") if path.is_file()):
        for damage in (flipped, halved, Path.unlink):
            if damage is not Path.unlink and not path.stat().st_size:
                continue
            shutil.copytree(saved, tmp_path / "copy")
            damage(tmp_path / "copy" / path.relative_to(saved))
            warned = []
            with Checkpoints(tmp_path / "copy", warn=warned.append) as checkpoints:
                found = checkpoints.restore(state)
            assert bits(found.arrays) == bits(scaled(state, found.step))
            assert found.facts["step"] == found.step
            assert bool(warned) == (found.step == 10) == (tmp_path / "copy" / "20.damaged").exists()
            kind = "data" if path.parent.name == "d" and path.stat().st_size > 500 else path.name
            outcomes[kind, damage.__name__] = found.step
            shutil.rmtree(tmp_path / "copy")
    # The arrays' content, the record, and the marks of a whole checkpoint.
    for kind, damage in [("data", "flipped"), ("data", "halved"), ("data", "unlink"), ("data.json", "flipped")]:
        assert outcomes[kind, damage] == 10, (kind, damage)
    assert outcomes["commit_success.txt", "unlink"] == 10


def largest(folder):
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def test_a_damaged_newest_is_set_aside_loudly_and_its_step_saved_again(saved, state):
    flipped(largest(saved / "20" / "arrays"))
    with Checkpoints(saved) as checkpoints:
        with pytest.warns(UserWarning, match=r"20 is damaged .*; it was set aside as 20.damaged, and that of step 10"):
            assert checkpoints.restore(state).step == 10
        checkpoints.save(20, state, {})
        checkpoints.wait()
        flipped(largest(saved / "20" / "arrays"))
        with pytest.warns(UserWarning, match="20.damaged1"):
            assert checkpoints.restore(state).step == 10
    assert sorted(path.name for path in saved.iterdir()) == ["10", "20.damaged", "20.damaged1"]


def test_where_none_is_whole_training_does_not_start_afresh(saved, state, heard):
    for step in ("10", "20"):
        flipped(largest(saved / step / "arrays"))
    with Checkpoints(saved, warn=heard.append) as checkpoints:
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole \(step 20: .*; step 10: .*\)\. Bring"):
            checkpoints.restore(state)
        assert sorted(path.name for path in saved.iterdir()) == ["10", "20"]
        for step in ("10", "20"):
            (saved / step).rename(saved / f"{step}.damaged")
        for ask in (checkpoints.facts, lambda: checkpoints.restore(state)):
            with pytest.raises(CheckpointError, match="all were set aside before"):
                ask()
    assert heard == []


def test_a_damaged_one_that_is_asked_for_is_an_error(saved, state):
    flipped(largest(saved / "20" / "arrays"))
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match=r"step 20: .* not what was saved"):
        checkpoints.restore(state, step=20)
    assert Checkpoints(saved).steps() == [10, 20]


@pytest.mark.parametrize("error", [PermissionError("no"), MemoryError(), ValueError("UNAVAILABLE: Error reading")])
def test_what_is_wrong_with_the_machine_is_no_damage(saved, state, monkeypatch, error):
    def fail(*_):
        raise KeyError("no handler") from error

    with Checkpoints(saved) as checkpoints:
        monkeypatch.setattr(module, "load_arrays", fail)
        with pytest.raises(KeyError, match="no handler"):
            checkpoints.restore(state)
    assert Checkpoints(saved).steps() == [10, 20]


def test_arrays_of_another_run_are_refused_and_not_set_aside(saved, state):
    wider = state._replace(weights=state.weights | {"w_enc": jax.ShapeDtypeStruct((2, 64, 32), jnp.float32)})
    other = state._replace(weights=state.weights | {"b.enc": jax.ShapeDtypeStruct((2, 32), jnp.float32)})
    more = state._replace(weights=state.weights | {"b_dec": state.key})
    with Checkpoints(saved) as checkpoints:
        for target, message in [
            (wider, r'weights/w_enc: was "float32\[2, 256, 32\]", is "float32\[2, 64, 32\]"'),
            (other, r'weights/b.enc: was "bfloat16\[2, 32\]", is "float32\[2, 32\]"'),
            (more, "weights/b_dec: was not there"),
        ]:
            with pytest.raises(CheckpointError, match=message):
                checkpoints.restore(target)
        assert checkpoints.steps() == [10, 20]


# What cannot be saved.


@pytest.mark.parametrize("name", ["30.orbax-checkpoint-tmp", "20.orbax-checkpoint-tmp", "5.deleted"])
def test_what_a_killed_save_left_behind_is_no_checkpoint_and_in_nobodys_way(saved, state, name):
    shutil.copytree(saved / "20", saved / name)
    (saved / name / "commit_success.txt").unlink()
    with Checkpoints(saved) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert checkpoints.restore(state).step == 20
        checkpoints.save(30, state, {})
    assert sorted(path.name for path in saved.iterdir()) == ["10", "20", "30"]
    assert bits(Checkpoints(saved).restore(state).arrays) == bits(state)


def test_a_full_disk_is_an_error_at_the_next_call_and_the_step_can_be_saved_later(saved, big):
    with Checkpoints(saved) as checkpoints:
        for call in (checkpoints.wait, lambda: checkpoints.save(40, big, {}), lambda: checkpoints.restore(big)):
            with full_disk():
                checkpoints.save(30, big, {})
                with pytest.raises(CheckpointError, match=r"step 30 could not .* \(whole ones: \[10, 20\]\)") as caught:
                    call()
            assert os.strerror(errno.EFBIG) in str(caught.value)
            assert checkpoints.steps() == [10, 20]
        checkpoints.save(30, big, {})
        assert bits(checkpoints.restore(big).arrays) == bits(big)


def test_a_failed_save_is_an_error_when_the_block_ends(tmp_path, big):
    with full_disk(), pytest.raises(CheckpointError, match="whole ones: none"), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, big, {})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(big) is None


@pytest.mark.parametrize("step", [10, 20, -1, 2**31])
def test_steps_must_grow(saved, state, step):
    with Checkpoints(saved) as checkpoints, pytest.raises(CheckpointError, match=f"step {step} "):
        checkpoints.save(step, state, {})


@pytest.mark.parametrize(
    ("arrays", "facts", "error"),
    [
        ({"a": np.zeros(2)}, {}, (TypeError, "a is a ndarray")),
        ({"a": 1.0}, {}, (TypeError, "a is a float")),
        ({"a": {"b": jnp.ones(1)}, "a/b": jnp.ones(1)}, {}, (ValueError, "same path")),
        ({}, {"loss": float("nan")}, (ValueError, "not JSON compliant")),
        ({}, {"path": Path("x")}, (TypeError, "not JSON serializable")),
    ],
)
def test_what_a_checkpoint_cannot_hold_is_refused_at_once(tmp_path, arrays, facts, error):
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(error[0], match=error[1]):
        checkpoints.save(1, {"x": jnp.ones(3)} | arrays, facts)
    assert list(tmp_path.iterdir()) == []


# Other places.


@pytest.mark.parametrize("address", ["memory://run/checkpoints", "s3://bucket/checkpoints"])
def test_places_that_cannot_hold_checkpoints_are_named(address):
    with pytest.raises(CheckpointError, match=r"under gs://, not (memory|s3)://"):
        Checkpoints(address)


def test_a_bucket_is_opened_without_a_look_at_it():
    folder = open_folder("gs://bucket/run/checkpoints")
    assert (str(folder.at(3)), folder.renames) == ("gs://bucket/run/checkpoints/3", False)
    assert open_folder("run").path.is_absolute()


def test_where_renaming_is_not_atomic_the_last_file_decides(tmp_path, state, in_place):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, scaled(state, step), {})
        checkpoints.wait()
        shutil.copytree(tmp_path / "30", tmp_path / "40")
        (tmp_path / "40" / "commit_success.txt").unlink()  # as a killed save leaves it
        assert checkpoints.steps() == [20, 30]
        assert checkpoints.restore(state).step == 30
        checkpoints.save(40, scaled(state, 40), {})
        assert bits(checkpoints.restore(state).arrays) == bits(scaled(state, 40))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["30", "40"]


# Kills.


def run_loop(folder, steps, *, kill_at=None, rng=None):
    """Runs loop.py; kills it a moment after it has printed a step. Returns the exit code."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-P", str(Path(__file__).with_name("loop.py")), str(folder), str(steps)]
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    with open(folder / "log", "w") as log:
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        with child:
            for line in child.stdout:
                if kill_at is not None and int(line) >= kill_at:
                    try:
                        child.wait(rng.uniform(0, 0.1))
                    except subprocess.TimeoutExpired:
                        child.send_signal(signal.SIGKILL)
                    break
    return child.returncode


@pytest.mark.parametrize(
    "kills", [pytest.param(3, marks=pytest.mark.slow), pytest.param(20, marks=[pytest.mark.slow, pytest.mark.all])]
)
def test_killed_runs_continue_to_the_bit(tmp_path, kills):
    steps, rng = 24 * kills, random.Random(kills)
    for kill in range(kills):
        code = run_loop(tmp_path / "killed", steps, kill_at=24 * kill + rng.randrange(1, 21), rng=rng)
        assert code == -signal.SIGKILL, (tmp_path / "killed" / "log").read_text()
    assert run_loop(tmp_path / "killed", steps) == 0, (tmp_path / "killed" / "log").read_text()
    assert run_loop(tmp_path / "whole", steps) == 0, (tmp_path / "whole" / "log").read_text()
    expected, found = np.load(tmp_path / "whole" / "result.npz"), np.load(tmp_path / "killed" / "result.npz")
    assert expected["n"] == steps
    for name in expected.files:
        assert found[name].tobytes() == expected[name].tobytes(), name
