"""The residual streams of the embedded model, for measuring its SAEs."""

import jax
import numpy as np

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import Backbone

ROW = 256


def residuals(backbone: Backbone, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The output of every layer [layers, n * t, d], bfloat16, for rows of packed tokens [n, t]."""
    config = backbone.config
    layers = tuple(range(config.num_layers))
    run = jax.jit(lambda p, t, s: forward(p, config, t, segment_ids=s, capture=layers, logits="none").captured)
    parts = [run(backbone.params, tokens[i : i + 16], segments[i : i + 16]) for i in range(0, len(tokens), 16)]
    return np.concatenate([np.asarray(p).reshape(len(layers), -1, config.hidden_size) for p in parts], axis=1)
