"""Kernels for devices that are not there run simulated, with a search for races in what their threads do."""

import contextlib

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


@pytest.fixture
def compilations():
    """A context manager that yields a list, into which every compilation puts an entry meanwhile."""

    @contextlib.contextmanager
    def watch():
        seen = []

        def listen(event, *_, **__):
            seen.extend([event] if "backend_compile" in event else [])

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            yield seen
        finally:
            jax.monitoring.unregister_event_duration_listener(listen)

    return watch
