"""A variant that is wrong is found out, whatever it is wrong by; what is measured needs a GPU."""

import importlib.util
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from qscope_kernels.cases import Case

from qscope_jax.benchmarks.rows import Setting

PATH = Path(__file__).parents[2] / "scripts" / "hopper_variants.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("hopper_variants", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("off", "agrees"), [(0.0, True), (1.0, False), (np.nan, False)])
def test_a_variant_that_differs_or_gives_nan_ends_the_script_with_an_error(script, monkeypatch, off, agrees):
    setting = Setting((Case(8, 64, 2),), tokens=4, dtype=jnp.dtype("float32"), rounds=3)
    right = jnp.ones(3), jnp.full(3, 2.0)

    def part(setting):  # the first of two results is wrong: the second must not cover it
        yield from script.compared(setting, "case", "variant", lambda: (right[0] + off, right[1]), lambda: right, right)

    monkeypatch.setattr("sys.argv", ["hopper_variants.py"])
    monkeypatch.setattr(script, "not_hopper", lambda device: None)
    monkeypatch.setattr(script, "setting_of", lambda **options: setting)
    for name in ("pieces", "tilings", "decodes", "outers"):
        monkeypatch.setattr(script, name, part)
    if agrees:
        script.main()
    else:
        with pytest.raises(SystemExit, match=r"differ from XLA's form: variant"):
            script.main()
