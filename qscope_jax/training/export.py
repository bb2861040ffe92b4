"""Trained SAEs as files in the release's form: means, scales and biases folded into the weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from qscope_jax.mesh import to_host
from qscope_jax.sae.formats import Format, save_sae
from qscope_jax.sae.model import Sae, SaeConfig
from qscope_jax.training.state import Group, SaeState, folded


def export_group(
    group: Group, saes: SaeState, folder: Path, *, backbone: str, format: Format, dtype: str, write: bool = True
) -> Sequence[SaeConfig]:
    """Writes every SAE of a group into `folder`, one after the other; returns what their configs say.

    A process that shares the SAEs with others must call this when they do; without `write` it leaves no files.
    """
    written = []
    norms = jax.tree.map(to_host, saes.norms)
    for i, layer in enumerate(group.layers):
        weights = jax.tree.map(lambda a, i=i: to_host(a[i]), saes.weights)
        params = folded(weights, norms.mean[i].astype(float), float(norms.scale[i]))
        objective = group.objective
        config = SaeConfig(
            params.b_dec.shape[0], objective.d_sae, objective.k, layer,
            backbone=backbone, sink_threshold=float(f"{norms.sink[i]:.6g}"),
        )  # fmt: skip
        arrays: Any = jax.tree.map(lambda a: jnp.asarray(a, dtype), params)
        if write:
            save_sae(Sae(arrays, config), folder, format=format)
        written.append(config)
    return written
