"""The fidelity of transformers, without torch: committed tiny checkpoints and what transformers computed from them.

`scripts/make_goldens.py` makes the files, each in the layout of its family's release; `test_parity.py` asserts the
same live.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.files.tensors import open_tensors

GOLDENS = Path(__file__).parents[1] / "goldens"
FAMILIES = ["qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe"]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request):
    return GOLDENS / f"{request.param}_tiny"


@pytest.fixture(scope="module")
def backbone(folder):
    return load_backbone(folder, dtype="float32")


@pytest.fixture(scope="module")
def oracle(folder):
    file = open_tensors(folder / "oracle.safetensors")
    return {name: file.array(name) for name in file.names}


@pytest.mark.parametrize("side", ["left", "right"])
def test_residuals_hidden_and_logits_equal_transformers(backbone, oracle, check_fidelity, side):
    part = {name: oracle[f"{side}/{name}"] for name in ("residuals", "hidden", "logits")}
    check_fidelity(backbone, oracle[f"{side}/tokens"], oracle[f"{side}/mask"], part)


def test_a_depth_cut_inside_a_period_gives_the_same_bits(backbone, oracle, run_forward):
    config, (tokens, mask) = backbone.config, (oracle["left/tokens"], oracle["left/mask"])
    whole = run_forward(backbone.params, config, tokens, mask=mask, capture=tuple(range(config.num_layers)))
    cut = run_forward(backbone.params, config, tokens, mask=mask, capture=(1,), stop_after=1)
    np.testing.assert_array_equal(cut.captured[0], whole.captured[1])


@pytest.mark.parametrize("folder", ["qwen3"], indirect=True)  # the head is the same in all families
def test_a_tied_model_uses_its_embedding_as_head(backbone, oracle, check_fidelity):
    # The golden weights without their head: residuals stay, logits become those of the tied model.
    params = {name: leaf for name, leaf in backbone.params.items() if name != "head"}
    tied = Backbone(dataclasses.replace(backbone.config, tie_word_embeddings=True), params)
    part = {"residuals": oracle["right/residuals"], "hidden": oracle["right/hidden"], "logits": oracle["tied/logits"]}
    check_fidelity(tied, oracle["right/tokens"], oracle["right/mask"], part)


@pytest.mark.slow
def test_gradients_equal_torch(backbone, oracle, stored_gradients):
    grads = stored_gradients(backbone, oracle["right/tokens"], oracle["right/mask"])
    norms = {name.partition("/")[2]: norm[0] for name, norm in oracle.items() if name.startswith("gradient_norm/")}
    assert grads.keys() == norms.keys()
    for name, found in grads.items():
        assert np.linalg.norm(found) == pytest.approx(norms[name], rel=1e-4), name
        if (full := oracle.get(f"gradient/{name}")) is not None:
            assert np.linalg.norm(found - full) <= 1e-4 * norms[name], name
