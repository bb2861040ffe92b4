"""Kernels for devices that are not there run simulated, with a search for races in what their threads do."""

import jax
import pytest


@pytest.fixture
def simulated_gpu():
    """Pallas kernels for NVIDIA GPUs run on the CPU while this is in use; races in memory fail the test."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, params

    # JAX 0.10 cannot make a NaN of every type.
    unwritten = "nan" if jax.__version_info__ >= (0, 11) else "zero"
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True, uninitialized_memory=unwritten)):
        yield
    assert not gpu_callbacks.get_races().races_found
