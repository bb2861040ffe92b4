"""Programs that run for milliseconds and compile for seconds; test modules import the fixture."""

import functools

import jax
import pytest

from qscope_jax.generation import make_steps, steps
from tests.backbone.families import QUICK


@pytest.fixture(scope="module", autouse=True)
def quick_programs():
    """Those that write text are compiled without optimisation."""
    patch = pytest.MonkeyPatch()
    patch.setattr(steps.jax, "jit", functools.partial(jax.jit, compiler_options=QUICK))
    make_steps.cache_clear()
    yield
    patch.undo()
    make_steps.cache_clear()
