"""Compiles for TPUs that are not there: libtpu (the extra `aot-tpu`) compiles on any machine, nothing is run."""

import importlib.util
import os

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
