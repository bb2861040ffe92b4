"""Routing tokens to experts and running the experts, each on its own tokens only.

y = sum_a w_a * down_a(silu(gate_a(x)) * up_a(x)),    w = the largest of softmax(logits), over their sum if normalised

(Token, expert) pairs are sorted by expert, multiplied group by group, and put back. Over a mesh, experts lie on "model"
and tokens on "data"; every device computes the pairs that name its own experts, and no expert's weights travel.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int
from qscope_kernels.grouped_matmul import grouped_matmul

from qscope_jax.mesh import RULES, AnyMesh, mesh_of


def route(
    logits: Float[Array, "n e"], num_active: int, *, normalise: bool
) -> tuple[Float[Array, "n a"], Int[Array, "n a"]]:
    """The `num_active` most probable experts of every token, as float32 weights and int32 indices, descending.

    The softmax runs over all experts in float32; `normalise` divides the kept weights by their sum (the checkpoint's
    norm_topk_prob). Ties go to the lowest index.
    """

    def pick(logits):
        weights, experts = jax.lax.top_k(jax.nn.softmax(logits.astype(jnp.float32), axis=-1), num_active)
        if normalise:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, experts

    mesh = mesh_of(logits)
    if mesh is None:
        return pick(logits)
    # Left to itself XLA gathers all tokens around top_k.
    tokens = _tokens(logits, mesh)
    return jax.shard_map(pick, mesh=mesh, in_specs=tokens, out_specs=tokens)(logits)


def expert_mlp(
    x: Float[Array, "n d"],
    weights: Float[Array, "n a"],
    experts: Int[Array, "n a"],
    gate: Float[Array, "e d m"],
    up: Float[Array, "e d m"],
    down: Float[Array, "e m d"],
    *,
    within: tuple[Sequence[Float[Array, "l e ..."]], Int[Array, ""]] | None = None,
    precision: jax.lax.PrecisionLike,
) -> Float[Array, "n d"]:
    """The weighted sum of each token's experts; the weight, in x's dtype, multiplies an expert's output.

    In a loop over layers, `within` = (gates, ups, downs) of all layers and the number of this one: weights are then
    read where they lie, only those of the experts in use, and `gate`, `up`, `down` are only where gradients go.
    Tokens that "data" does not divide are computed whole on every one of its devices.
    """
    mesh = mesh_of(gate)
    compute = partial(_experts_here, precision=precision)
    if mesh is None:
        return compute(x, weights, experts, (gate, up, down), within, first=0)

    def shard(x, weights, experts, own, within):
        x = jax.lax.pcast(x, RULES["experts"], to="varying")  # so that its gradient is summed over the experts' devices
        first = jax.lax.axis_index(RULES["experts"]) * own[0].shape[0]
        out = compute(x, weights, experts, own, within, first=first)
        return jax.lax.psum(out, RULES["experts"])

    tokens = _tokens(x, mesh)
    own = PartitionSpec(RULES["experts"])
    all_layers = None if within is None else (PartitionSpec(None, RULES["experts"]), PartitionSpec())
    in_specs = (tokens, tokens, tokens, own, all_layers)
    split = jax.shard_map(shard, mesh=mesh, in_specs=in_specs, out_specs=tokens)
    return split(x, weights, experts, (gate, up, down), within)


def _tokens(x: jax.Array, mesh: AnyMesh) -> PartitionSpec:
    return PartitionSpec(RULES["batch"] if x.shape[0] % mesh.shape[RULES["batch"]] == 0 else None)


def _experts_here(x, weights, experts, own, within, *, first, precision) -> jax.Array:
    """The part of the sum that experts first..first + e contribute."""
    e = own[0].shape[0]
    expert = experts.reshape(-1) - first
    expert = jnp.where((expert >= 0) & (expert < e), expert, e)  # pairs of other devices' experts go last
    order = jnp.argsort(expert, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(expert, length=e)

    def multiply(rows, which):
        place = None if within is None else (within[0][which], within[1])
        return grouped_matmul(rows, own[which], sizes, within=place, precision=precision)

    rows = _reorder(x, order, inverse)
    out = multiply(jax.nn.silu(multiply(rows, 0)) * multiply(rows, 1), 2)
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
