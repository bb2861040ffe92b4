"""Which implementation runs: decided from the device and the shapes, before anything is traced or compiled."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from qscope_kernels.dispatch import Device, Kernel, device_of, pick
from qscope_kernels.sparse_decode import gather_dot, sparse_decode
from qscope_kernels.sparse_outer import sparse_outer
from qscope_kernels.topk_encode import topk_encode

CODE = np.ones((2, 3), np.float32), np.zeros((2, 3), np.int32)
CALLS = {
    "topk_encode": lambda impl: topk_encode(jnp.ones((2, 4)), jnp.ones((4, 5)), jnp.ones(5), k=3, impl=impl),
    "sparse_decode": lambda impl: sparse_decode(*CODE, jnp.ones((5, 4)), impl=impl),
    "gather_dot": lambda impl: gather_dot(jnp.ones((2, 4)), CODE[1], jnp.ones((5, 4)), impl=impl),
    "sparse_outer": lambda impl: sparse_outer(*CODE, jnp.ones((2, 4)), latents=5, impl=impl),
}
TABLES = {"gather_dot": ("sparse_decode", "_DOT_KERNELS")}


def never(*arrays, **options):
    pytest.fail("a kernel was asked, or traced, that cannot be meant")


def suits(device, *arrays, **options):
    return None


def nothing(*arrays):
    return "nothing suits it"


def added(monkeypatch, operation, **kernel):
    """A kernel named "mine" in the table of an operation."""
    module, table = TABLES.get(operation, (operation, "_KERNELS"))
    kernels = getattr(importlib.import_module(f"qscope_kernels.{module}"), table)
    monkeypatch.setitem(kernels, "mine", Kernel(**kernel))


@pytest.mark.parametrize("operation", CALLS)
def test_a_kernel_forced_on_another_platform_is_refused_before_it_is_asked(operation, monkeypatch):
    added(monkeypatch, operation, platform="tpu", run=never, unsuited=never)
    with pytest.raises(ValueError, match=rf"{operation}: impl = 'mine' runs on a TPU, .*cpu.*\['ref', 'xla'\]"):
        CALLS[operation]("mine")
    with pytest.raises(ValueError, match="runs on a TPU"):
        jax.jit(lambda: CALLS[operation]("mine")).trace()


@pytest.mark.parametrize("operation", CALLS)
def test_a_kernel_forced_on_what_it_cannot_serve_says_why(operation, monkeypatch):
    added(monkeypatch, operation, platform="cpu", run=never, unsuited=lambda *a, **o: "too few latents")
    with pytest.raises(ValueError, match=f"{operation}: impl = 'mine' cannot serve this: too few latents; leave impl"):
        CALLS[operation]("mine")


@pytest.mark.parametrize("operation", CALLS)
def test_an_unknown_name_is_refused_with_the_known_ones(operation, monkeypatch):
    added(monkeypatch, operation, platform="tpu", run=never, unsuited=never)
    known = r"\[.*'mine', .*'ref', .*'xla'\]"
    with pytest.raises(ValueError, match=f"{operation} has no implementation 'fast'; there are {known}"):
        CALLS[operation]("fast")


@pytest.mark.parametrize("operation", CALLS)
def test_left_out_the_kernel_of_the_device_runs_where_it_suits(operation, monkeypatch):
    expected = CALLS[operation]("xla")
    asked = []
    mine = lambda *arrays, **options: jax.tree.map(lambda x: x + 1, expected)  # noqa: E731
    why = lambda device, *arrays, **options: asked.append(device) or (None if len(asked) == 1 else "no more")  # noqa: E731
    added(monkeypatch, operation, platform="cpu", run=mine, unsuited=why)
    for shift in (1, 0):
        for one, other in zip(jax.tree.leaves(CALLS[operation](None)), jax.tree.leaves(expected), strict=True):
            np.testing.assert_array_equal(one, other + shift)
    assert [device.platform for device in asked] == ["cpu"] * 2


def test_the_environment_can_do_without_kernels(monkeypatch):
    added(monkeypatch, "topk_encode", platform="cpu", run=never, unsuited=never)
    monkeypatch.setenv("QSCOPE_IMPL", "xla")
    assert CALLS["topk_encode"](None)[0].shape == (2, 3)
    monkeypatch.setenv("QSCOPE_IMPL", "none")
    with pytest.raises(ValueError, match="topk_encode has no implementation 'none'"):
        CALLS["topk_encode"](None)


def test_what_suits_is_told_all_that_the_kernel_would_be_given(monkeypatch):
    told = {}

    def unsuited(device, *arrays, **options):
        told.update(shapes=[a.shape for a in arrays], options=options)
        return "never"

    added(monkeypatch, "topk_encode", platform="cpu", run=never, unsuited=unsuited)
    topk_encode(jnp.ones((2, 3, 4)), jnp.ones((4, 5)), jnp.ones(5), k=3, contract="fast")
    assert told == {"shapes": [(6, 4), (4, 5), (5,)], "options": {"k": 3, "contract": "fast"}}


def test_gradients_run_in_the_implementation_asked_for_where_their_operations_have_it(monkeypatch):
    """A forced encoder, whose gradient's operations lack its name, leaves them to choose."""
    calls = []

    def mine(x, w, b, **options):
        return topk_encode(x, w, b, impl="xla", **options)

    def outer(values, indices, rows, *, latents):
        calls.append(latents)
        return sparse_outer(values, indices, rows, latents=latents, impl="xla")

    added(monkeypatch, "topk_encode", platform="cpu", run=mine, unsuited=suits)
    loss = lambda w, impl: jnp.sum(topk_encode(jnp.ones((2, 4)), w, jnp.ones(5), k=3, impl=impl)[0])  # noqa: E731
    w = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32)
    expected = jax.grad(loss)(w, "ref")
    np.testing.assert_allclose(jax.grad(loss)(w, "mine"), expected, rtol=1e-6)
    assert not calls
    added(monkeypatch, "sparse_outer", platform="cpu", run=outer, unsuited=suits)
    for impl in ("mine", None):
        np.testing.assert_allclose(jax.grad(loss)(w, impl), expected, rtol=1e-6)
    assert calls == [5, 5]
    np.testing.assert_allclose(jax.grad(loss)(w, "xla"), expected, rtol=1e-6)
    assert calls == [5, 5]


TPU = AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")


def tpu_arrays(shape, *, data):
    """Of float32 on a mesh of TPUs that are not there, the first axis split over `data` of them."""
    kinds = (AxisType.Auto,) * 2
    mesh = AbstractMesh((data, 1), ("data", "model"), kinds, abstract_device=TPU)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))


def test_the_device_is_that_of_the_mesh_else_the_default():
    assert device_of() == device_of(jnp.ones(2)) == Device("cpu", "cpu")
    assert jax.devices()[0].platform == "cpu"
    for data, split in ((1, False), (8, True)):
        seen = []
        jax.eval_shape(lambda x, seen=seen: seen.append(device_of(jnp.ones(2), x + 1)), tpu_arrays((8,), data=data))
        assert seen == [Device("tpu", "TPU v5 lite", 1, split=split)]


def test_inside_shard_map_nothing_is_split_any_more():
    seen, x = [], tpu_arrays((8,), data=8)
    mesh = x.sharding.mesh
    for axes in ({"data", "model"}, {"data"}, {"model"}):
        look = jax.shard_map(
            lambda x: seen.append(device_of(x).split) or x, mesh=mesh, in_specs=PartitionSpec(*axes & {"data"}),
            out_specs=PartitionSpec(*axes & {"data"}), axis_names=axes,
        )  # fmt: skip
        jax.eval_shape(look, x)
    assert seen == [False, False, True]


def test_a_kernel_is_left_alone_where_the_compiler_splits_arrays_over_devices():
    """It cannot split a kernel; on one device the same shapes are served."""

    def encode(impl, data):
        arrays = tpu_arrays((8, 128), data=data), jnp.ones((128, 1024)), jnp.ones(1024)
        return str(jax.make_jaxpr(lambda *arrays: topk_encode(*arrays, k=2, impl=impl))(*arrays))

    assert "pallas_call" in encode(None, 1)
    assert "pallas_call" not in encode(None, 8)
    with pytest.raises(ValueError, match=r"impl = 'tpu' cannot serve this: it cannot be split .* inside shard_map"):
        encode("tpu", 8)


def test_gradients_of_gradients_pass_through_kernels_as_well():
    """Nothing differentiates a kernel itself: what stands for it at the first order does at the second."""
    arrays = tpu_arrays((1024, 128), data=1), tpu_arrays((8, 128), data=1)

    def loss(w, x):
        values, indices = topk_encode(x, w.T, jnp.ones(1024), k=2)
        return jnp.sum((sparse_decode(values, indices, w) - x) ** 2)

    second = jax.make_jaxpr(jax.grad(lambda w, x: jnp.sum(jax.grad(loss)(w, x) ** 2)))(*arrays)
    names = {name for name in ("sparse_decode", "gather_dot", "sparse_outer") if f"name={name}" in str(second)}
    assert names == {"sparse_decode", "gather_dot", "sparse_outer"}


def test_an_array_that_was_put_somewhere_is_there_whatever_the_default(monkeypatch):
    put = jax.device_put(jnp.ones(2), jax.devices()[3])
    monkeypatch.setattr(jax, "devices", never)
    assert device_of(put).platform == "cpu"


def test_a_portable_name_is_found_without_asking_kernels():
    kernels = {"mine": Kernel("cpu", never, never)}
    assert pick("operation", {"xla": nothing, "ref": suits}, kernels, "ref", jnp.ones(2)) is suits
