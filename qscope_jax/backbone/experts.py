"""Routing tokens to experts and running the experts, each on its own tokens only.

y = sum_a w_a * down_a(silu(gate_a(x)) * up_a(x)),    w = the largest of softmax(logits), over their sum if normalised

(Token, expert) pairs are sorted by expert, multiplied group by group, and put back. Over a mesh, experts lie on "model"
and tokens on "data"; every device computes the pairs that name its own experts, and no expert's weights travel.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from qscope_kernels.grouped_matmul import grouped_matmul

from qscope_jax.mesh import RULES, mesh_of


def route(
    logits: Float[Array, "n e"], num_active: int, *, normalise: bool
) -> tuple[Float[Array, "n a"], Int[Array, "n a"]]:
    """The `num_active` most probable experts of every token, as float32 weights and int32 indices, descending.

    The softmax runs over all experts in float32; `normalise` divides the kept weights by their sum (the checkpoint's
    norm_topk_prob). Ties go to the lowest index.
    """
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), num_active)
    if normalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


def expert_mlp(
    x: Float[Array, "n d"],
    weights: Float[Array, "n a"],
    experts: Int[Array, "n a"],
    gate: Float[Array, "e d m"],
    up: Float[Array, "e d m"],
    down: Float[Array, "e m d"],
    *,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "n d"]:
    """The weighted sum of each token's experts; the weight, in x's dtype, multiplies an expert's output.

    Tokens that "data" does not divide are computed whole on every one of its devices.
    """
    mesh = mesh_of(gate)
    compute = partial(_experts_here, precision=precision)
    if mesh is None:
        return compute(x, weights, experts, gate, up, down, first=0)

    def shard(x, weights, experts, gate, up, down):
        x = jax.lax.pcast(x, RULES["experts"], to="varying")  # so that its gradient is summed over the experts' devices
        first = jax.lax.axis_index(RULES["experts"]) * gate.shape[0]
        return jax.lax.psum(compute(x, weights, experts, gate, up, down, first=first), RULES["experts"])

    tokens = PartitionSpec(RULES["batch"] if x.shape[0] % mesh.shape[RULES["batch"]] == 0 else None)
    stack = PartitionSpec(RULES["experts"])
    in_specs = (tokens, tokens, tokens, stack, stack, stack)
    return jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=tokens)(x, weights, experts, gate, up, down)


def _experts_here(x, weights, experts, gate, up, down, *, first, precision) -> jax.Array:
    """The part of the sum that experts first..first + e contribute."""
    e = gate.shape[0]
    expert = experts.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < e), expert, e)  # pairs of other devices' experts go last
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    multiply = partial(grouped_matmul, group_sizes=jnp.bincount(expert, length=e), precision=precision)
    rows = _reorder(x, order, inverse)
    out = multiply(jax.nn.silu(multiply(rows, gate)) * multiply(rows, up), down)
    out = _reorder(out, inverse, order).reshape(*experts.shape, x.shape[1])
    return jnp.sum(out * weights.astype(x.dtype)[:, :, None], axis=1)


@jax.custom_vjp
def _reorder(x, order, inverse):
    """Rows of x, each repeated len(order) / len(x) times, in a new order; the gradient gathers back, never scatters."""
    return x[order // (len(order) // len(x))]


def _reorder_forward(x, order, inverse):
    return _reorder(x, order, inverse), (inverse, len(x))


def _reorder_backward(saved, g):
    inverse, n = saved
    return jnp.sum(g[inverse].reshape(n, -1, g.shape[1]), axis=1), None, None


_reorder.defvjp(_reorder_forward, _reorder_backward)
