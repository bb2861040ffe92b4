"""The fidelity of transformers, without torch: a committed tiny checkpoint and what transformers computed from it.

`scripts/make_goldens.py` makes the files; `test_parity.py` asserts the same live.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from qscope_jax.backbone.tables import checkpoint_tensors, to_stored
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.files.tensors import open_tensors

GOLDEN = Path(__file__).parents[1] / "goldens" / "qwen3_tiny"


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(GOLDEN, dtype="float32")


@pytest.fixture(scope="module")
def oracle():
    file = open_tensors(GOLDEN / "oracle.safetensors")
    return {name: file.array(name) for name in file.names}


@pytest.mark.parametrize("side", ["left", "right"])
def test_residuals_hidden_and_logits_equal_transformers(backbone, oracle, check_fidelity, side):
    part = {name: oracle[f"{side}/{name}"] for name in ("residuals", "hidden", "logits")}
    check_fidelity(backbone, oracle[f"{side}/tokens"], oracle[f"{side}/mask"], part)


def test_a_tied_model_uses_its_embedding_as_head(backbone, oracle, check_fidelity):
    # The golden weights without their head: residuals stay, logits become those of the tied model.
    params = {name: leaf for name, leaf in backbone.params.items() if name != "head"}
    tied = Backbone(dataclasses.replace(backbone.config, tie_word_embeddings=True), params)
    part = {"residuals": oracle["right/residuals"], "hidden": oracle["right/hidden"], "logits": oracle["tied/logits"]}
    check_fidelity(tied, oracle["right/tokens"], oracle["right/mask"], part)


def test_gradients_equal_torch(backbone, oracle, next_token_loss):
    tokens, mask = oracle["right/tokens"], oracle["right/mask"]
    grads = jax.jit(jax.grad(next_token_loss))(backbone.params, backbone.config, tokens, mask)
    for tensor in checkpoint_tensors(backbone.config):
        leaf = grads
        for key in tensor.leaf:
            leaf = leaf[key]
        found = to_stored(np.asarray(leaf if tensor.period is None else leaf[tensor.period]), tensor.row.inputs)
        norm = oracle[f"gradient_norm/{tensor.name}"][0]
        assert np.linalg.norm(found) == pytest.approx(norm, rel=1e-4), tensor.name
        if (full := oracle.get(f"gradient/{tensor.name}")) is not None:
            assert np.linalg.norm(found - full) < 1e-4 * norm, tensor.name
