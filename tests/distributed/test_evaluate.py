"""SAEs evaluated by two processes, each with rows of its own, have the quality that one process finds."""

import json
import shutil

import numpy as np
import pytest

from qscope_jax.backbone.weights import load_backbone
from qscope_jax.data.batches import Filled
from qscope_jax.evaluate import evaluate_saes
from qscope_jax.sae.formats import load_saes


@pytest.mark.slow
def test_two_processes_find_what_one_does(tiny_release, tmp_path, together):
    for name in ("model", "sae"):
        shutil.copytree(tiny_release / name, tmp_path / name)
    rng, ends = np.random.default_rng(0), np.array([9, 5, 7, 9, 3, 8, 9, 6])
    mask = np.stack([np.arange(9) < ends[:, None]] * 2)
    arrays = Filled(
        np.where(mask, rng.integers(0, 303, mask.shape), 0).astype(np.int32), mask, 0 * mask.astype(np.int32)
    )
    np.savez(tmp_path / "batches.npz", **arrays._asdict())
    ended = together("evaluate", tmp_path)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]

    first, second = (json.loads((tmp_path / f"quality{process}.json").read_text()) for process in range(2))
    backbone, saes = load_backbone(tiny_release / "model", dtype="float32"), load_saes(tiny_release / "sae")
    batches = [Filled(*(array[i] for array in arrays)) for i in range(2)]
    alone = evaluate_saes(backbone, saes, batches, sink_thresholds={0: 20.0, 1: 30.0}, predict_tokens=1)
    assert first == second
    for layer, expected in alone.items():
        found = first[str(layer)]
        assert found["predicted_tokens"] == ends.sum() - 8  # one batch was enough
        assert found["density"] == expected["density"]
        for name, value in expected.items():
            if isinstance(value, float):
                assert found[name] == pytest.approx(value, rel=1e-4), name
