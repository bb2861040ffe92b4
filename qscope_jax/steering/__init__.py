"""Recipes that change the residual stream: what they say, the tap that they become, and what it did.

    h' = h + sum_i c_i d_i        after decoder layer l; every c_i is computed from the same h, so order never matters

| mode      | c_i                    | with                                                              |
| add       | s                      | s the strength, d_i the feature's decoder row as stored           |
| clamp     | s - a_i                | a_i the feature's activation, 0 outside the SAE's k largest       |
| min-clamp | max(s - a_i, 0)        |                                                                   |
| ablate    | -a_i                   |                                                                   |
| scale     | (s - 1) a_i            |                                                                   |
| project   | s - h.u_i, along u_i   | u_i = d_i / |d_i|                                                 |

`add` is Qwen-Scope's h' = h + alpha d (report §3, eq. 1); the others stand in AxBench (2501.17148) and its kin.
"""

from qscope_jax.steering.facts import describe
from qscope_jax.steering.files import Bound, load_recipe, save_recipe
from qscope_jax.steering.lm_eval import read_lm_eval, write_lm_eval
from qscope_jax.steering.recipe import MODES, UNITS, Steer
from qscope_jax.steering.tap import Applied, count_applied, steer

__all__ = [
    "MODES",
    "UNITS",
    "Applied",
    "Bound",
    "Steer",
    "count_applied",
    "describe",
    "load_recipe",
    "read_lm_eval",
    "save_recipe",
    "steer",
    "write_lm_eval",
]
