"""The shape of a dictionary: norms of its decoder rows, and how close each comes to another.

    c_i = max over j != i of <w_i, w_j> / (|w_i| |w_j|)

Near 1 two latents share a direction. Of a large dictionary a sample of rows is compared, each with all others; the
cosines exist for a block of rows at a time, never as [f, f].
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.mesh import to_host
from qscope_jax.sae.model import Sae

COMPARED_ROWS = 4096
_BLOCK = 256


def decoder_statistics(sae: Sae, *, rows: int = COMPARED_ROWS, seed: int = 0) -> dict[str, Any]:
    """Norms and largest cosines of the decoder's rows, as plain numbers.

    Args:
      sae: on one device or a mesh.
      rows: dictionaries of more rows are sampled: this many, drawn without replacement, are compared with all.
      seed: of that draw.

    Returns:
      `norm` and `max_cosine`, each {mean, std, min, median, p99, max} (None where no row has a direction);
      `zero_rows`, which have no direction and are not compared; `compared_rows` of `d_sae`; `above_0.9`, the share of
      compared rows whose largest cosine is above 0.9.
    """
    w = sae.params.w_dec
    norms = to_host(_norms(w))
    nonzero = np.flatnonzero(norms > 0)
    chosen = nonzero
    if len(nonzero) > rows:
        chosen = np.sort(np.random.default_rng(seed).choice(nonzero, rows, replace=False))
    block = min(_BLOCK, max(len(chosen), 1))
    cosines = np.zeros(0, np.float32)
    if len(nonzero) > 1:
        padded = np.resize(chosen, -(-len(chosen) // block) * block)
        cosines = to_host(_largest_cosines(w, padded, block))[: len(chosen)]
    return {
        "norm": _spread(norms),
        "zero_rows": int((norms == 0).sum()),
        "max_cosine": _spread(cosines),
        "above_0.9": float((cosines > 0.9).mean()) if cosines.size else None,
        "compared_rows": len(chosen),
        "d_sae": len(norms),
        "seed": seed if len(chosen) < len(nonzero) else None,
    }


@jax.jit
def _norms(w: Float[Array, "f d"]) -> Float[Array, "f"]:
    return jnp.linalg.norm(w.astype(jnp.float32), axis=-1)


@partial(jax.jit, static_argnums=2)
def _largest_cosines(w: Float[Array, "f d"], rows: Int[Array, "n"], block: int) -> Float[Array, "n"]:
    """For each of these rows, the largest cosine to any other row that is not zero."""
    norms = _norms(w)

    def compare(chosen):
        products = jnp.einsum("nd,fd->nf", w[chosen], w, precision="highest", preferred_element_type=jnp.float32)
        cosines = products / jnp.maximum(norms[chosen, None] * norms, jnp.finfo(jnp.float32).tiny)
        own = jnp.arange(w.shape[0]) == chosen[:, None]
        return jnp.max(jnp.where(own | (norms == 0), -jnp.inf, cosines), axis=-1)

    return jax.lax.map(compare, rows.reshape(-1, block)).reshape(-1)


def _spread(values: np.ndarray) -> dict[str, float] | None:
    if not values.size:
        return None
    values = values.astype(np.float64)
    names = {"mean": values.mean(), "std": values.std(), "min": values.min(), "median": np.median(values)}
    return {name: float(v) for name, v in {**names, "p99": np.quantile(values, 0.99), "max": values.max()}.items()}
