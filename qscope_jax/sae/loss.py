"""Losses of TopK SAEs and their gradients, for residual vectors x that were centred and scaled per layer.

    L = sum |x - x_hat|^2 / sum |x|^2 + aux_weight * sum |e - e_hat|^2 / sum |e|^2,    e = x - x_hat held fixed

e_hat decodes, without a bias, the aux_k largest pre-activations of dead latents (AuxK: Gao et al. 2024, arXiv
2406.04093, A.2). Sums run over the tokens that count, on all devices of the mesh.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from qscope_kernels.manual_axes import own_latents
from qscope_kernels.sparse_decode import sparse_decode
from qscope_kernels.sparse_decode.sharded import sparse_decode_shard
from qscope_kernels.topk_encode import topk_encode
from qscope_kernels.topk_encode.sharded import topk_encode_shard

from qscope_jax.sae.model import Contract

_WIDE = 4  # BatchTopK gives a token at most this many times k latents
_AUX_POOL = 4  # AuxK looks at this many times aux_k dead latents, those that have been silent for longest


_Tree = TypeVar("_Tree")


class Weights(NamedTuple):
    """As `SaeParams`, but the encoder by rows [f, d]: the form in which its gradient comes."""

    w_enc: Float[Array, "f d"]
    b_enc: Float[Array, "f"]
    w_dec: Float[Array, "f d"]
    b_dec: Float[Array, "d"]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Objective:
    """What an SAE is trained for; static under `jit`."""

    d_sae: int
    k: int
    """Latents per token; on average, where `selection` is "batch"."""
    selection: Literal["token", "batch"] = "token"
    """TopK of each token, or BatchTopK: the k * tokens largest of the whole batch (Bussmann et al. 2024, arXiv
    2412.06410), at most 4k of a token."""
    prefixes: tuple[int, ...] = ()
    """Matryoshka: numbers of leading latents that must reconstruct by themselves too (Bussmann et al. 2025, arXiv
    2503.17547); the loss is the mean over them and all latents."""
    aux_k: int = 0
    """Dead latents per token in AuxK; 0 leaves it out."""
    aux_weight: float = 1 / 32
    dead_after: int = 10_000_000
    """Tokens after which a latent that never fired counts as dead."""
    dtype: Any = jnp.float32
    """Of the copies of matrices and inputs that products are made of; all sums are float32. What a device adds to the
    gradient of a matrix takes this type once, before it is summed over devices."""
    contract: Contract = "exact"

    def __post_init__(self):
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k = {self.k} does not lie in 1..d_sae = {self.d_sae}")
        if list(self.prefixes) != sorted(set(self.prefixes)) or not all(0 < p < self.d_sae for p in self.prefixes):
            raise ValueError(f"prefixes = {self.prefixes}: expected ascending widths among 1..{self.d_sae - 1}")
        if not 0 <= self.aux_k <= self.d_sae or self.dead_after < 1 or not 0 <= self.aux_weight < float("inf"):
            raise ValueError(
                f"aux_k = {self.aux_k} (0..{self.d_sae}), dead_after = {self.dead_after} (at least 1) and aux_weight = "
                f"{self.aux_weight} (at least 0) do not describe an auxiliary loss"
            )


class Axes(NamedTuple):
    """The mesh axes that tokens and latents are split over where this runs inside `shard_map`; None: not split."""

    data: str | None = None
    latents: str | None = None


ALONE = Axes()


class Report(NamedTuple):
    """Scalars of one batch: the loss, its parts, `l0` latents per token, the `dead` share of latents, `tokens`."""

    loss: Float[Array, ""]
    fvu: Float[Array, ""]
    aux: Float[Array, ""]
    l0: Float[Array, ""]
    dead: Float[Array, ""]
    tokens: Float[Array, ""]


class Learned(NamedTuple):
    """What one batch teaches: gradients of the weights, which latents fired [f], and the report."""

    gradients: Weights
    fired: Bool[Array, "f"]
    report: Report


class _Seen(NamedTuple):
    fvu: jax.Array
    error: jax.Array  # [n, d], 0 where a token does not count
    values: jax.Array
    indices: jax.Array


def sae_gradients(
    weights: Weights,
    idle: Int[Array, "f"],
    x: Float[Array, "n d"],
    keep: Bool[Array, "n"],
    objective: Objective,
    axes: Axes = ALONE,
) -> Learned:
    """The gradients of the loss (module docstring) by the weights, for one batch.

    Inside `shard_map`, `x` and `keep` are this device's tokens, weights and `idle` its latents; gradients are summed
    over all tokens.

    Args:
      weights: float32.
      idle: tokens since each latent last fired.
      x: centred, scaled residual vectors.
      keep: False at tokens that do not count, whatever they hold.
      objective: what to train for.
      axes: the mesh axes, if any.
    """
    x = jnp.where(keep[:, None], x.astype(jnp.float32), 0)
    (loss, seen), gradients = jax.value_and_grad(reconstruction_loss, has_aux=True)(weights, x, keep, objective, axes)
    report = _report(loss, seen, idle, keep, objective, axes)
    if objective.aux_k and objective.aux_weight:
        gradients, aux = _add_auxiliary(gradients, loss, weights, idle, x, seen.error, keep, objective, axes)
        report = report._replace(aux=aux, loss=loss + objective.aux_weight * aux)
    return Learned(gradients, _fired(seen, len(idle), axes), report)


def judge(
    weights: Weights, idle: Int[Array, "f"], x: Float[Array, "n d"], keep: Bool[Array, "n"], objective: Objective,
    axes: Axes = ALONE,
) -> Report:  # fmt: skip
    """The report of a batch that nothing is learned from, AuxK left out; arguments as for `sae_gradients`."""
    x = jnp.where(keep[:, None], x.astype(jnp.float32), 0)
    loss, seen = reconstruction_loss(weights, x, keep, objective, axes)
    return _report(loss, seen, idle, keep, objective, axes)


def _report(loss, seen: "_Seen", idle, keep, objective: Objective, axes: Axes) -> Report:
    dead = _sum(jnp.sum(idle > objective.dead_after, dtype=jnp.float32), axes.latents) / objective.d_sae
    tokens = _sum(jnp.sum(keep, dtype=jnp.float32), axes.data)
    l0 = _sum(jnp.sum(seen.values > 0, dtype=jnp.float32), axes.data) / jnp.maximum(tokens, 1)
    return Report(loss, seen.fvu, jnp.zeros_like(loss), l0, dead, tokens)


def encoder_scale(
    weights: Weights, x: Float[Array, "n d"], keep: Bool[Array, "n"], objective: Objective, axes: Axes = ALONE
) -> Float[Array, ""]:
    """What to multiply an untrained encoder by so that reconstructions have the best length: <x, x_hat> / |x_hat|^2.

    Tied to unit rows it reconstructs too long vectors, the more so the larger k / d (Gao et al. 2024, A.1, divide the
    encoder for it). Biases must be 0; which latents fire does not change. Arguments as for `sae_gradients`.
    """
    x = jnp.where(keep[:, None], x.astype(jnp.float32), 0)
    _, seen = reconstruction_loss(weights, x, keep, objective, axes)
    x_hat = jnp.where(keep[:, None], x - seen.error, 0)
    along, length = (_sum(jnp.sum(a * x_hat), axes.data) for a in (x, x_hat))
    return jnp.where(length > 0, along / length, 1)


def reconstruction_loss(
    weights: Weights, x: Float[Array, "n d"], keep: Bool[Array, "n"], objective: Objective, axes: Axes = ALONE
) -> tuple[jax.Array, _Seen]:
    """The first part of the loss: the share of |x|^2 that is left, the mean over Matryoshka's prefixes if there are."""
    weights = _spread(weights, axes)
    copies = weights._replace(w_enc=weights.w_enc.astype(objective.dtype), w_dec=weights.w_dec.astype(objective.dtype))
    values, indices = _encode(copies, x.astype(objective.dtype), keep, objective, axes)
    energy = jnp.maximum(_sum(jnp.sum(x * x), axes.data), jnp.finfo(jnp.float32).tiny)
    x_hat, parts, error = weights.b_dec, [], x
    begins = (0, *objective.prefixes)
    for begin, end in zip(begins, (*objective.prefixes, objective.d_sae), strict=True):
        own = values if len(begins) == 1 else jnp.where((indices >= begin) & (indices < end), values, 0)
        x_hat = x_hat + _decode(own, indices, copies.w_dec, axes)
        error = jnp.where(keep[:, None], x - x_hat, 0)
        parts.append(_sum(jnp.sum(error * error), axes.data) / energy)
    loss = sum(parts, jnp.zeros(())) / len(parts)
    return loss, jax.lax.stop_gradient(_Seen(parts[-1], error, values, indices))


def _encode(copies: Weights, x, keep, objective: Objective, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """Values and indices of the latents that fire; values are 0 at tokens that do not count."""
    batch = objective.selection == "batch"
    k = min(_WIDE * objective.k, objective.d_sae) if batch else objective.k
    options: Any = {"k": k, "contract": objective.contract}
    if axes.latents is None:
        values, indices = topk_encode(x, copies.w_enc.T, copies.b_enc, **options)
    else:
        values, indices = topk_encode_shard(x, copies.w_enc.T, copies.b_enc, axis=axes.latents, **options)
    values = jnp.where(keep[:, None], values, 0)
    if batch:
        wanted = objective.k * _sum(jnp.sum(keep, dtype=jnp.int32), axes.data)
        values = jnp.where(values >= _threshold(jax.lax.stop_gradient(values), wanted, axes), values, 0)
    return values, indices


def _threshold(values, wanted, axes: Axes) -> jax.Array:
    """The largest number that at least `wanted` of the values, all >= 0, reach. Such floats order as their bits do:
    it is found bit by bit, so that devices need to agree on counts alone."""
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)

    def refine(step, found):
        higher = found | (1 << (30 - step))
        return jnp.where(_sum(jnp.sum(bits >= higher, dtype=jnp.int32), axes.data) >= wanted, higher, found)

    found = jax.lax.fori_loop(0, 31, refine, jnp.zeros_like(wanted))  # like it also in where it varies on a mesh
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _decode(values, indices, w_dec, axes: Axes) -> jax.Array:
    if axes.latents is None:
        return sparse_decode(values, indices, w_dec)
    return sparse_decode_shard(values, indices, w_dec, axis=axes.latents)


def _fired(seen: _Seen, latents: int, axes: Axes) -> jax.Array:
    """[f] bool: which of this device's latents fired anywhere."""
    indices, used = seen.indices, seen.values > 0
    local, mine = (indices, used) if axes.latents is None else own_latents(indices, latents, axes.latents)
    place = jnp.where(used & mine, local, latents)
    count = jnp.zeros(latents, jnp.int32).at[place].max(1, mode="drop")
    return _sum(count, axes.data) > 0


class _Rows(NamedTuple):
    """The weights of the latents that AuxK looks at."""

    w_enc: jax.Array
    b_enc: jax.Array
    w_dec: jax.Array


def _add_auxiliary(gradients, loss, weights, idle, x, error, keep, objective: Objective, axes: Axes):
    """The gradients with AuxK's, and its loss. The dead latents are gathered into one small dense dictionary."""
    chosen, valid = _longest_idle(idle, objective, axes)
    mine = valid
    if axes.latents is not None:
        chosen, owned = own_latents(chosen, len(idle), axes.latents)
        mine = valid & owned
    take = lambda a: _sum(jnp.where(mine.reshape(-1, *(1,) * (a.ndim - 1)), a[chosen], 0), axes.latents)  # noqa: E731
    rows = _Rows(take(weights.w_enc), take(weights.b_enc), take(weights.w_dec))
    # The gradients of all latents stay out of the branches, which would copy them.
    aux, by_rows = jax.lax.cond(
        jnp.any(valid),
        lambda rows: jax.value_and_grad(auxiliary_loss)(rows, valid, x, error, keep, objective, axes),
        lambda rows: (jnp.zeros_like(loss), jax.tree.map(jnp.zeros_like, rows)),  # on a mesh, alike to the others
        rows,
    )
    place = jnp.where(mine, chosen, len(idle))

    def add(to, rows):
        return to.at[place].add(objective.aux_weight * rows, mode="drop")

    added = {name: add(getattr(gradients, name), getattr(by_rows, name)) for name in _Rows._fields}
    return gradients._replace(**added), aux


def auxiliary_loss(rows: _Rows, valid, x, error, keep, objective: Objective, axes: Axes = ALONE) -> jax.Array:
    """AuxK without its weight: how much of the error [n, d] the dead latents in `rows` leave, as a share of it."""
    rows = _spread(rows, axes)
    dtype, options = objective.dtype, {"preferred_element_type": jnp.float32, "precision": _precision(objective)}
    pre = jnp.matmul(x.astype(dtype), rows.w_enc.astype(dtype).T, **options) + rows.b_enc
    scores = jnp.where(valid, jax.lax.stop_gradient(pre), -jnp.inf)
    if objective.aux_k < scores.shape[1]:  # not top_k(...)[:, -1:], of which XLA would make a sort
        kth = jnp.min(jax.lax.top_k(scores, objective.aux_k)[0], axis=1, keepdims=True)
        valid = valid & (scores >= kth)
    acts = jnp.where(valid & keep[:, None], jax.nn.relu(pre), 0)
    e_hat = jnp.matmul(acts.astype(dtype), rows.w_dec.astype(dtype), **options)
    left = _sum(jnp.sum(jnp.where(keep[:, None], error - e_hat, 0) ** 2), axes.data)
    return left / jnp.maximum(_sum(jnp.sum(error * error), axes.data), jnp.finfo(jnp.float32).tiny)


def _longest_idle(idle, objective: Objective, axes: Axes) -> tuple[jax.Array, jax.Array]:
    """The dead latents (indices into all of them) that AuxK looks at, ties to the lowest index, and which are dead."""
    count = min(_AUX_POOL * objective.aux_k, objective.d_sae)
    times, chosen = jax.lax.top_k(idle, min(count, len(idle)))
    if axes.latents is not None:
        chosen += jax.lax.axis_index(axes.latents) * len(idle)
        times, chosen = (jax.lax.all_gather(part, axes.latents, tiled=True, to="invarying") for part in (times, chosen))
        times, place = jax.lax.top_k(times, count)
        chosen = chosen[place]
    return chosen, times > objective.dead_after


def _spread(tree: _Tree, axes: Axes) -> _Tree:
    """The same, held to differ between devices that have other tokens: here, in float32, gradients are summed over
    them. Behind a cast they would be summed in its type."""
    if axes.data is None:
        return tree
    return jax.tree.map(lambda a: jax.lax.pcast(a, axes.data, to="varying"), tree)


def _precision(objective: Objective) -> str | None:
    return "highest" if objective.dtype == jnp.float32 else None


def _sum(value: jax.Array, axis: str | None) -> jax.Array:
    return value if axis is None else jax.lax.psum(value, axis)
