"""Which latents fire together: counts of pairs among a bounded number of latents, folded over a corpus.

    J_ij = n_ij / (n_i + n_j - n_ij),    P(j | i) = n_ij / n_i

n_i tokens on which latent i fires, n_ij those on which both do. J is 1 for latents that always fire together (one
feature stored twice), P(j | i) is 1 where i never fires without j (one feature absorbed by another).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from qscope_jax.mesh import to_host
from qscope_jax.sae.quality import Measured, Quality
from qscope_jax.totals import Total, add_totals, as_total, total_value


class CoFiring(NamedTuple):
    """The latents looked at, and on how many tokens each two of them fired together (each one, on the diagonal)."""

    latents: Int[Array, "m"]
    pairs: Total  # [m, m]


def most_frequent(quality: Quality, number: int) -> Int[Array, "m"]:
    """The `number` latents that fired on most tokens (all, if there are fewer), in falling order."""
    return jax.lax.top_k(quality.counts.high, min(number, quality.counts.high.shape[0]))[1]


def init_cofiring(latents: Int[Array, "m"]) -> CoFiring:
    """Nothing seen yet of these latents, which are different."""
    return CoFiring(latents, as_total(jnp.zeros((latents.shape[0],) * 2)))


def update_cofiring(state: CoFiring, measured: Measured, d_sae: int) -> CoFiring:
    """Folds in the codes of a batch, at the tokens that count; pure, to be jitted by the caller."""
    (values, indices), m = measured.code, state.latents.shape[0]
    place = jnp.full(d_sae, m).at[state.latents].set(jnp.arange(m))
    used = (values > 0) & measured.keep[:, None]
    columns = jnp.where(used, place[indices], m)
    fires = jnp.zeros((values.shape[0], m), jnp.bfloat16)  # 0 and 1 are exact, and sums are float32
    fires = fires.at[jnp.arange(values.shape[0])[:, None], columns].set(1, mode="drop")
    together: Float[Array, "m m"] = jnp.einsum("ni,nj->ij", fires, fires, preferred_element_type=jnp.float32)
    return state._replace(pairs=add_totals(state.pairs, as_total(together)))


def summarize_cofiring(state: CoFiring, *, top: int = 10) -> dict[str, Any]:
    """The pairs that fire together most, as plain numbers.

    `latents` looked at; `mean_jaccard` over all their pairs of which one fired; `pairs`: of the `top` largest
    coefficients the two latents, `jaccard`, `given_first` = P(second | first), `given_second`, and `tokens` = n_ij.
    """
    together, names = total_value(state.pairs), to_host(state.latents)
    alone = np.diagonal(together)
    first, second = np.triu_indices(len(names), 1)
    both = together[first, second]
    either = alone[first] + alone[second] - both
    seen = either > 0
    jaccard = np.divide(both, either, out=np.zeros_like(both), where=seen)
    order = np.argsort(-jaccard, kind="stable")[:top]
    pairs = [
        {
            "latents": [int(names[first[i]]), int(names[second[i]])],
            "jaccard": float(jaccard[i]),
            "given_first": float(both[i] / alone[first[i]]),
            "given_second": float(both[i] / alone[second[i]]),
            "tokens": int(both[i]),
        }
        for i in order
        if both[i] > 0
    ]
    return {
        "latents": len(names),
        "mean_jaccard": float(jaccard[seen].mean()) if seen.any() else None,
        "pairs": pairs,
    }
