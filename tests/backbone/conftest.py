"""A tiny random model for the backbone's tests, and what fidelity means."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward, init_params
from qscope_jax.backbone.weights import Backbone, save_backbone
from qscope_jax.files.tensors import open_tensors
from tests.backbone.families import QUICK, relative_l2

# For programs that run for milliseconds and compile for seconds.

RAW = {
    "model_type": "qwen3",
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}


@pytest.fixture
def raw():
    """A config.json in the released dialect, to be changed by the test."""
    return dict(RAW)


@pytest.fixture(scope="session")
def config():
    return ModelConfig.from_hf(RAW)


@pytest.fixture(scope="session")
def make_params():
    """Makes parameters of a config with every leaf random: no norm is one, attention is far from uniform."""

    def make(config, seed=0):
        rng = np.random.default_rng(seed)

        def draw(path, leaf):
            if path[-1].key == "scale":
                return jnp.asarray(rng.uniform(0.4, 1.6, leaf.shape), leaf.dtype)
            scale = 1.0 if path[-1].key == "embed" else 1.5 * config.hidden_size**-0.5
            return jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype)

        shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))
        return jax.tree_util.tree_map_with_path(draw, shapes)

    return make


@pytest.fixture(scope="session")
def params(config, make_params):
    return make_params(config)


@pytest.fixture(scope="session")
def run_forward():
    """`forward` as one program, compiled once for all tests that ask the same of it."""
    return jax.jit(forward, static_argnames=("capture", "stop_after"), compiler_options=QUICK)


@pytest.fixture(scope="session")
def check_fidelity(run_forward):
    """Asserts that a float32 backbone computes what transformers did at the n real tokens; `oracle` as of the maker."""

    def check(backbone, tokens, mask, oracle):
        config, layers = backbone.config, tuple(range(backbone.config.num_layers))
        out = run_forward(backbone.params, config, tokens, mask=mask, capture=layers)
        for layer in layers:
            error = relative_l2(out.captured[layer][mask], oracle["residuals"][layer])
            assert error < 1e-5, f"layer {layer}: relative L2 {error:.1e}"
        assert relative_l2(out.hidden[mask], oracle["hidden"]) < 1e-5
        assert np.abs(np.asarray(out.logits)[mask] - oracle["logits"]).max() < 3e-5
        return out

    return check


@pytest.fixture(scope="session")
def next_token_loss():
    """The mean cross-entropy of the next token over pairs of real tokens."""

    def loss(params, config, tokens, mask, **options):
        logits = forward(params, config, tokens, mask=mask, **options).logits[:, :-1]
        log_p = jax.nn.log_softmax(logits, axis=-1)
        picked = jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
        pairs = mask[:, 1:] & mask[:, :-1]
        return -jnp.sum(jnp.where(pairs, picked, 0)) / pairs.sum()

    return loss


@pytest.fixture
def stored_gradients(next_token_loss, tmp_path):
    """Gradients of that loss by tensor name and in the layout of a checkpoint: saved as if they were weights."""

    def compute(backbone, tokens, mask):
        grad = jax.jit(jax.grad(next_token_loss), compiler_options=QUICK)
        grads = grad(backbone.params, backbone.config, tokens, mask)
        save_backbone(Backbone(backbone.config, grads), tmp_path / "gradients")
        file = open_tensors(tmp_path / "gradients" / "model.safetensors")
        return {name: file.array(name) for name in file.names}

    return compute


@pytest.fixture(scope="session")
def maker():
    """The module `scripts/make_goldens.py`; skips without torch."""
    pytest.importorskip("torch").set_num_threads(1)  # tiny matmuls: more threads only wait for one another
    path = Path(__file__).parents[2] / "scripts" / "make_goldens.py"
    spec = importlib.util.spec_from_file_location("make_goldens", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
