"""One training step of all SAEs: a scan over them, so that one layer's gradients exist at a time.

(state, x [L, n, d], mask [n]) -> (state, reports),    x the residual streams of L layers, raw
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from qscope_jax.mesh import AnyMesh
from qscope_jax.sae.loss import Axes, Report, encoder_scale, judge, sae_gradients
from qscope_jax.training.optimizer import apply_gradients
from qscope_jax.training.state import Group, ModelAxis, SaeState, TrainState, axes_of, specs

NEVER = 1 << 30  # idle counters stop here, before they overflow


class StepReport(NamedTuple):
    """Per SAE [l]: the batch's report, the norm of the gradient before clipping, the learning rate, the share of real
    tokens that were sinks, and how many steps were skipped, in all and in a row."""

    batch: Report
    gradient_norm: Float[Array, "l"]
    rate: Float[Array, "l"]
    sinks: Float[Array, "l"]
    skipped: Int[Array, "l"]
    failing: Int[Array, "l"]


TrainStep = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, tuple[StepReport, ...]]]


def make_train_step(
    groups: Sequence[Group], layers: Sequence[int], *, mesh: AnyMesh | None = None, model_axis: ModelAxis = "latents"
) -> TrainStep:
    """The jitted step; its first argument is donated.

    A step of an SAE whose loss or gradient is not finite is skipped: its weights, moments and counters stay as they
    are, `skipped` and `failing` go up, and the other SAEs and the data go on.

    Args:
      groups: the SAEs, as the state has them.
      layers: which layer each row of x is.
      mesh: tokens lie on "data"; on "model" the latents of every SAE, or the SAEs of every group.
      model_axis: which of the two.

    Raises:
      ValueError: a group trains a layer that is not among `layers`.
    """
    axes = axes_of(mesh, model_axis)

    def train(group: Group, saes: SaeState, i, step, x, mask):
        return _train_one(group, saes, i, step, x, mask, axes)

    return jax.jit(_over_groups(train, groups, layers, mesh, model_axis), donate_argnums=0)


def make_judge(
    groups: Sequence[Group], layers: Sequence[int], *, mesh: AnyMesh | None = None, model_axis: ModelAxis = "latents"
) -> Callable[[TrainState, jax.Array, jax.Array], tuple[Report, ...]]:
    """Jitted: (state, x [L, n, d], mask [n]) -> the report of every group on a batch that nothing is learned from.

    Raises:
      ValueError: as `make_train_step`.
    """
    axes = axes_of(mesh, model_axis)

    def look(group: Group, saes: SaeState, i, step, x, mask):
        sae = jax.tree.map(lambda a: a[i], saes)
        x, keep = prepared(sae, x, mask)
        return saes, judge(sae.weights, sae.idle, x, keep, group.objective, axes)

    over_groups = _over_groups(look, groups, layers, mesh, model_axis)
    return jax.jit(lambda state, x, mask: over_groups(state, x, mask)[1])


def make_fit(
    groups: Sequence[Group], layers: Sequence[int], *, mesh: AnyMesh | None = None, model_axis: ModelAxis = "latents"
) -> Callable[[TrainState, jax.Array, jax.Array], TrainState]:
    """Jitted: (untrained state, x [L, n, d], mask [n]) -> the state with encoders scaled by `encoder_scale`; donated.

    Raises:
      ValueError: as `make_train_step`.
    """
    axes = axes_of(mesh, model_axis)

    def fit(group: Group, saes: SaeState, i, step, x, mask):
        sae = jax.tree.map(lambda a: a[i], saes)
        x, keep = prepared(sae, x, mask)
        scale = encoder_scale(sae.weights, x, keep, group.objective, axes)
        return saes._replace(weights=saes.weights._replace(w_enc=saes.weights.w_enc.at[i].multiply(scale))), scale

    over_groups = _over_groups(fit, groups, layers, mesh, model_axis)
    return jax.jit(lambda state, x, mask: over_groups(state, x, mask)[0]._replace(step=state.step), donate_argnums=0)


def _over_groups(one: Callable[..., Any], groups, layers, mesh: AnyMesh | None, model_axis: ModelAxis):
    """(state, x, mask) -> (state, reports): `one`(group, saes, i, step, x, mask) -> (saes, report) for
    every SAE in turn."""
    rows = []
    for group in groups:
        if missing := sorted(set(group.layers) - set(layers)):
            raise ValueError(f"layers {missing} are to be trained but not among {tuple(layers)}, those given")
        rows.append(tuple(layers.index(layer) for layer in group.layers))
    shared = mesh is not None and model_axis == "layers"

    def update(state: TrainState, x: Float[Array, "L n d"], mask: Bool[Array, "n"]):
        results = []
        for group, saes, which in zip(groups, state.groups, rows, strict=True):
            own = lambda saes, i, x, group=group: one(group, saes, i, state.step, x, mask)  # noqa: E731
            results.append(_each(own, saes, x, jnp.array(which), shared))
        saes, reports = zip(*results, strict=True)
        return TrainState(state.step + 1, tuple(saes)), tuple(reports)

    if mesh is None:
        return update

    def on_mesh(state: TrainState, x, mask):
        of_state = TrainState(PartitionSpec(), tuple(specs(saes, model_axis) for saes in state.groups))  # type: ignore[arg-type]
        of_report = PartitionSpec("model") if shared else PartitionSpec()
        return jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(of_state, PartitionSpec(None, "data", None), PartitionSpec("data")),
            out_specs=(of_state, of_report),
        )(state, x, mask)

    return on_mesh


def _each(function, saes: SaeState, x, rows, shared: bool):
    """function(saes, i, x of its layer) -> (saes, report), for every SAE of a group in turn and in place.

    With `shared`, those of this device.
    """
    count = saes.idle.shape[0]
    first = jax.lax.axis_index("model") * count if shared else 0
    return jax.lax.scan(lambda saes, i: function(saes, i, x[rows[first + i]]), saes, jnp.arange(count))


def _train_one(group: Group, saes: SaeState, i, step, x, mask, axes: Axes) -> tuple[SaeState, StepReport]:
    sae = jax.tree.map(lambda a: a[i], saes)
    x, keep = prepared(sae, x, mask)
    learned = sae_gradients(sae.weights, sae.idle, x, keep, group.objective, axes)
    rate, report = group.schedule(step), learned.report
    weights, adam, norm, taken = apply_gradients(
        saes.weights, saes.adam, i, learned.gradients, rate, clip=group.clip, sound=jnp.isfinite(report.loss), axes=axes
    )
    idle = jnp.where(learned.fired, 0, jnp.minimum(sae.idle + report.tokens.astype(jnp.int32), NEVER))
    counts = {
        "idle": jnp.where(taken, idle, sae.idle),
        "skipped": sae.skipped + ~taken,
        "failing": jnp.where(taken, 0, sae.failing + 1),
    }
    real = jnp.sum(mask, dtype=jnp.float32)
    real = real if axes.data is None else jax.lax.psum(real, axes.data)
    sinks = (real - report.tokens) / jnp.maximum(real, 1)
    saes = saes._replace(
        weights=weights, adam=adam, **{name: getattr(saes, name).at[i].set(count) for name, count in counts.items()}
    )
    return saes, StepReport(report, norm, rate, sinks, counts["skipped"], counts["failing"])


def prepared(sae: SaeState, x, mask) -> tuple[jax.Array, jax.Array]:
    """x centred and scaled, float32, and which tokens count: real ones but sinks."""
    x = x.astype(jnp.float32)
    # What is not finite is no sink: it is to be noticed, not left out. A norm may overflow: that is one.
    sink = (jnp.linalg.norm(x, axis=-1) > sae.norms.sink) & jnp.all(jnp.isfinite(x), axis=-1)
    keep = mask & ~sink
    return (x - sae.norms.mean) / sae.norms.scale, keep
