"""Compiles for devices that are not there: libtpu (the extra `aot-tpu`) and JAX's CUDA plugin (`aot-cuda`) do that on
any machine; nothing is run."""

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="session")
def tpu_mesh():
    """A function (topology, data, model) -> mesh of the devices of e.g. "v5e:2x4"."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("compiling ahead of time needs libtpu: pip install libtpu, or QSCOPE_AOT=1 ./scripts/test")
    # Read when libtpu is loaded: it must not look for a TPU or for other hosts, nor mind other tests that load it.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")  # silences a warning; the topology's name decides
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    def make(topology, data, model):
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
        return Mesh(np.array(devices).reshape(data, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    return make


@pytest.fixture(scope="session")
def h200s():
    """A function (data, model) -> mesh of so many H200s."""
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda13") is None:
        pytest.skip("compiling ahead of time for GPUs needs JAX's CUDA plugin: QSCOPE_AOT=1 ./scripts/test")
    from jax.experimental import topologies
    from jax.sharding import AxisType, Mesh

    target = Path(__file__).with_name("h200.textproto").read_text()

    def make(data, model=1):
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name="", target_config=target, topology=f"1x{data * model}x1"
        )
        devices = np.array(topology.devices).reshape(data, model)
        return Mesh(devices, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    return make


@pytest.fixture(scope="session")
def compiled():
    """A function (mesh, function, *arrays) -> the compiled program; an array is (shape, dtype, *axes of the mesh)."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    def compile(mesh, function, *arrays):
        shapes = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))
            for shape, dtype, *axes in arrays
        ]
        return jax.jit(function).lower(*shapes).compile()

    return compile
