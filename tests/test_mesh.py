"""Logical axes become mesh axes by one table; arrays tell their mesh; processes start together or not at all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qscope_jax.mesh import (
    RULES,
    MeshError,
    constrain,
    make_mesh,
    mesh_of,
    on_first_process,
    partition,
    sharding,
    spans_processes,
    start_distributed,
    to_host,
)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


@pytest.fixture(scope="module")
def array(mesh):
    return jax.device_put(
        np.arange(64.0, dtype=np.float32).reshape(8, 8), NamedSharding(mesh, PartitionSpec("data", "model"))
    )


class TestMakeMesh:
    def test_by_default_all_devices_share_the_data(self):
        mesh = make_mesh()
        assert dict(mesh.shape) == {"data": 8, "model": 1}
        assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)

    def test_data_takes_what_model_leaves(self):
        assert dict(make_mesh(model=4).shape) == {"data": 2, "model": 4}

    def test_devices_can_be_chosen(self):
        chosen = jax.devices()[2:6]
        assert set(make_mesh(2, 2, devices=chosen).devices.flat) == set(chosen)

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [
            ({"model": 3}, "model = 3 does not divide the 8 devices"),
            ({"model": 0}, "model = 0 does not divide the 8 devices"),
            ({"data": 2, "model": 2}, "data = 2 x model = 2 needs 4 devices, not 8"),
            ({"data": 16}, "data = 16 x model = 1 needs 16 devices, not 8"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, sizes, message):
        with pytest.raises(MeshError, match=message):
            make_mesh(**sizes)


class TestPartition:
    def test_every_rule_names_an_axis_of_the_mesh(self, mesh):
        assert set(RULES.values()) <= set(mesh.axis_names)
        for axis, place in RULES.items():
            assert partition((axis,), (8,), mesh) == PartitionSpec(place)

    @pytest.mark.parametrize(
        ("axes", "shape", "expected"),
        [
            (("embed", "latents"), (6, 8), (None, "model")),
            (("batch", None, "embed"), (4, 3, 6), ("data", None, None)),
            ((), (), ()),
            (("unheard of",), (7,), (None,)),
        ],
    )
    def test_axes_become_places(self, mesh, axes, shape, expected):
        assert partition(axes, shape, mesh) == PartitionSpec(*expected)

    def test_with_fsdp_the_residual_axis_lies_on_data(self, mesh):
        assert partition(("embed", "mlp"), (6, 8), mesh, fsdp=True) == PartitionSpec("data", "model")
        with pytest.raises(MeshError, match="embed = 7 cannot be split over the mesh axis 'data' of 2"):
            partition(("embed",), (7,), mesh, fsdp=True)

    @pytest.mark.parametrize("axis", ["kv_heads", "key_heads"])
    def test_shared_heads_are_split_or_lie_whole_on_every_shard(self, mesh, axis):
        assert partition((axis,), (8,), mesh) == PartitionSpec("model")
        assert partition((axis,), (4,), mesh) == PartitionSpec("model")
        assert partition((axis,), (2,), mesh) == PartitionSpec(None)
        assert partition((axis,), (1,), mesh) == PartitionSpec(None)
        for size in (3, 6):
            with pytest.raises(MeshError, match=f"{axis} = {size} cannot be split over the mesh axis 'model' of 4"):
                partition((axis,), (size,), mesh)

    @pytest.mark.parametrize("axis", ["heads", "value_heads", "experts", "latents", "vocab", "mlp"])
    def test_other_axes_must_be_divided(self, mesh, axis):
        with pytest.raises(MeshError, match=f"{axis} = 2 cannot be split .* choose a size of 'model' that divides 2"):
            partition((axis,), (2,), mesh)

    def test_a_mesh_of_other_axes_is_refused(self):
        strange = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
        with pytest.raises(MeshError, match=r"the mesh has the axes \('data', 'tensor'\), not \['model'\]"):
            partition(("batch",), (4,), strange)

    def test_axes_and_shape_have_one_length(self, mesh):
        with pytest.raises(ValueError, match="longer"):
            partition(("batch",), (4, 4), mesh)


class TestMeshOf:
    def test_outside_jit(self, mesh, array):
        assert mesh_of(array) == mesh.abstract_mesh
        assert mesh_of(jnp.ones(3)) is None
        assert mesh_of(np.ones(3)) is None

    def test_a_mesh_of_one_device_is_none(self):
        one = make_mesh(devices=jax.devices()[:1])
        assert mesh_of(jax.device_put(np.ones(3), NamedSharding(one, PartitionSpec()))) is None

    def test_under_every_transformation(self, mesh, array):
        """Where a function is traced, it sees the mesh of what it was given, and of what it made from it."""
        seen = []

        def look(x):
            seen.extend([mesh_of(x), mesh_of(x * 2), mesh_of(x.T[:1]), mesh_of(jnp.sum(x))])
            return jnp.sum(x**2)

        jax.jit(look)(array)
        jax.jit(jax.grad(look))(array)
        jax.jit(jax.checkpoint(look))(array)
        jax.jit(jax.vmap(look))(array)
        jax.jit(lambda x: jax.lax.scan(lambda c, row: (c + look(row), None), 0.0, x)[0])(array)
        jax.jit(lambda x: jax.lax.cond(x[0, 0] > 0, look, jnp.sum, x))(array)
        jax.jit(look).lower(jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=array.sharding))
        assert len(seen) >= 28
        assert set(seen) == {mesh.abstract_mesh}

    def test_nothing_is_seen_without_a_mesh(self):
        seen = []
        jax.jit(lambda x: seen.append(mesh_of(x)) or x)(jnp.ones(3))
        assert seen == [None]

    def test_inside_shard_map_every_device_is_alone(self, mesh, array):
        seen, spec = [], PartitionSpec("data", "model")
        alone = jax.shard_map(lambda x: seen.append(mesh_of(x)) or x, mesh=mesh, in_specs=spec, out_specs=spec)
        jax.jit(alone)(array)
        assert seen == [None]


def test_constrain_lays_out_and_is_nothing_without_a_mesh(mesh, array):
    moved = jax.jit(lambda x: constrain(x, None, "latents", mesh=mesh_of(x)))(array)
    assert moved.sharding == sharding((None, "latents"), (8, 8), mesh)
    plain = jnp.ones((3, 5))
    assert constrain(plain, "batch", "latents", mesh=None) is plain
    with pytest.raises(MeshError, match="batch = 3"):
        constrain(plain, "batch", None, mesh=mesh)


@pytest.mark.parametrize(
    "spec", [("data", "model"), ("model", None), (None, "data"), (), (("data", "model"),)], ids=str
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_array_comes_back_whole(mesh, spec, dtype):
    whole = np.random.default_rng(0).normal(size=(8, 8)).astype(jnp.dtype(dtype))
    placed = jax.device_put(whole, NamedSharding(mesh, PartitionSpec(*spec)))
    found = to_host(placed)
    assert isinstance(found, np.ndarray)
    assert found.dtype == whole.dtype
    np.testing.assert_array_equal(found, whole)
    assert not spans_processes(placed)


def test_arrays_of_the_host_are_not_copied():
    array = np.ones(3)
    assert to_host(array) is array


def test_alone_the_first_process_acts_and_its_error_is_the_error():
    done = []
    on_first_process(lambda: done.append(1))
    assert done == [1]
    with pytest.raises(OSError, match="full"):
        on_first_process(lambda: (_ for _ in ()).throw(OSError("full")))


class TestStartDistributed:
    @pytest.fixture
    def started(self, monkeypatch):
        """What JAX was asked for."""
        calls = []
        monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append((args, options)))
        for name in (
            "SLURM_JOB_ID",
            "SLURM_NTASKS",
            "TPU_PROCESS_ADDRESSES",
            "TPU_WORKER_HOSTNAMES",
            "MEGASCALE_NUM_SLICES",
        ):
            monkeypatch.delenv(name, raising=False)
        return calls

    def test_alone_nothing_is_started(self, started):
        start_distributed()
        start_distributed(processes=1)
        start_distributed("host:1", 1, 0)
        assert started == []

    def test_flags_are_handed_on_and_nothing_is_guessed(self, started):
        start_distributed("host:1234", 4, 3, start_timeout=7, silence_timeout=9)
        ((args, options),) = started
        assert args == ("host:1234", 4, 3)
        assert options["cluster_detection_method"] == "deactivate"
        timeouts = [options[f"{name}_timeout_seconds"] for name in ("heartbeat", "shutdown")]
        assert (options["initialization_timeout"], timeouts) == (7, [9, 9])

    def test_once_is_enough(self, started, monkeypatch):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        start_distributed("host:1234", 4, 3)
        assert started == []

    @pytest.mark.parametrize(
        ("flags", "missing"),
        [
            ({"coordinator": "host:1"}, "--processes, --process missing"),
            ({"processes": 2, "process": 0}, "--coordinator missing"),
            ({"coordinator": "host:1", "processes": 2}, "--process missing"),
        ],
    )
    def test_what_is_missing_is_named(self, started, flags, missing):
        with pytest.raises(ValueError, match=missing):
            start_distributed(**flags)

    @pytest.mark.parametrize(("processes", "process"), [(2, 2), (2, -1), (0, 0)])
    def test_a_number_out_of_range_is_refused(self, started, processes, process):
        with pytest.raises(ValueError, match=f"--process {process} does not lie in 0..{processes} - 1"):
            start_distributed("host:1", processes, process)

    @pytest.mark.parametrize(
        ("environment", "platforms", "joins"),
        [
            ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "2"}, "cpu", True),
            ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a", "SLURM_NTASKS": "1"}, "cpu", False),
            # A batch script that was not started by srun: its variables speak of a job, not of a step.
            ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"}, "cpu", False),
            ({}, "tpu,cpu", True),
            ({"TPU_WORKER_HOSTNAMES": "a,b"}, "tpu,cpu", True),
            ({"TPU_WORKER_HOSTNAMES": "localhost"}, "tpu,cpu", False),
            ({"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"}, "tpu", True),
            ({"TPU_WORKER_HOSTNAMES": "a,b"}, "cpu", False),
            ({}, None, False),
        ],
    )
    def test_clusters_are_recognised(self, started, monkeypatch, environment, platforms, joins):
        for name in ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID"):
            monkeypatch.delenv(name, raising=False)
        if "SLURM_STEP_NODELIST" in environment:
            environment = environment | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        before = jax.config.jax_platforms
        jax.config.update("jax_platforms", platforms)
        try:
            start_distributed()
        finally:
            jax.config.update("jax_platforms", before)
        assert [(args, options["cluster_detection_method"]) for args, options in started] == (
            [((None, None, None), None)] if joins else []
        )

    def test_a_device_that_was_touched_is_said(self):
        jax.devices()
        with pytest.raises(RuntimeError, match="must be called before"):
            start_distributed("127.0.0.1:1", 2, 0)
