"""The training step of an SAE (`training.step`), all of it, over the same recipe with dense operations and autodiff.

Both centre and scale, multiply copies in the setting's dtype, take out the decoder's parallel gradient, clip, move
every weight by Adam, bring rows back to norm 1 and count what fired. Both leave out AuxK, which waits for dead latents.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from qscope_kernels.cases import Case

from qscope_jax.benchmarks.ceilings import copy_bandwidth, matmul_rate, precision
from qscope_jax.benchmarks.rows import Row, Setting, Work, measure
from qscope_jax.benchmarks.sparse import matmul, to_dense
from qscope_jax.benchmarks.sparse_torch import sparsify_step
from qscope_jax.sae.loss import Objective, Weights
from qscope_jax.training.optimizer import Schedule, apply_gradients
from qscope_jax.training.state import Group, Norms, TrainState, init_group
from qscope_jax.training.step import make_train_step, prepared

Step = Callable[[TrainState, jax.Array, jax.Array], tuple[TrainState, Any]]


def bench_step(setting: Setting) -> Iterator[Row]:
    """The step over its encoder's matmul alone, with tokens/s and their share of the roofline; dense over sparse; and
    where sparsify is installed its step over ours. Implementations are those that training takes by itself.
    """
    for case in setting.cases:
        row = partial(measure, setting, f"{case.name}, {setting.tokens} tokens")
        group = group_of(case, setting)
        x = jax.random.normal(jax.random.key(0), (1, setting.tokens, case.d), setting.dtype)
        w_enc = jax.random.normal(jax.random.key(1), (case.d, case.f), setting.dtype)
        work = Work(setting.tokens, "tokens/s", setting.tokens / roofline_seconds(case, setting))
        sparse = stepping(make_train_step((group,), group.layers), group, x)
        dense = stepping(make_dense_step(group), group, x)
        yield from row("training step / encoder's matmul", sparse, partial(matmul(jnp.float32), x[0], w_enc), work)
        del w_enc
        yield from row("training step, dense / sparse", dense, sparse, work)
        yield from row("training step, sparsify with Adam / sparse", sparsify_step(x[0], case), sparse, work)


def group_of(case: Case, setting: Setting) -> Group:
    """One SAE of this shape, trained as `qscope train-sae` does by default, without AuxK."""
    contract = "exact" if setting.dtype == jnp.float32 else "fast"
    objective = Objective(case.f, case.k, dtype=setting.dtype, contract=contract)
    return Group((0,), objective, Schedule(1e-4, steps=1_000_000, decay=0))


def stepping(step: Step, group: Group, x: jax.Array) -> Callable[[], Any]:
    """A function without arguments that trains by one step on x [1, n, d] and returns what the step reports."""
    held: list[TrainState] = []

    def call() -> Any:
        if not held:  # here, so that a state that does not fit into memory is a row that says so
            d = x.shape[2]
            norms = Norms(jnp.zeros((1, d)), jnp.ones(1), jnp.full(1, jnp.inf))
            saes = init_group(group, norms, 0, mesh=None, model_axis="latents")
            held.append(TrainState(jnp.zeros((), jnp.int32), (saes,)))
        held[0], reports = step(held[0], x, jnp.ones(x.shape[1], bool))
        return reports

    return call


def make_dense_step(group: Group) -> Step:
    """As `make_train_step` of one SAE, with `lax.top_k`, a dense code [n, f] and its matmuls; reports the loss."""

    def update(state: TrainState, x: jax.Array, mask: jax.Array) -> tuple[TrainState, jax.Array]:
        (saes,) = state.groups
        sae = jax.tree.map(lambda a: a[0], saes)
        x, keep = prepared(sae, x[0], mask)
        derive = jax.value_and_grad(dense_loss, has_aux=True)
        (loss, fired), gradients = derive(sae.weights, jnp.where(keep[:, None], x, 0), keep, group.objective)
        weights, adam, _, taken = apply_gradients(
            saes.weights, saes.adam, 0, gradients, group.schedule(state.step),
            clip=group.clip, sound=jnp.isfinite(loss),
        )  # fmt: skip
        idle = jnp.where(taken, jnp.where(fired, 0, saes.idle + jnp.sum(keep, dtype=jnp.int32)), saes.idle)
        return TrainState(state.step + 1, (saes._replace(weights=weights, adam=adam, idle=idle),)), loss

    return jax.jit(update, donate_argnums=0)


def dense_loss(weights: Weights, x: jax.Array, keep: jax.Array, objective: Objective) -> tuple[jax.Array, jax.Array]:
    """The loss of `sae.loss` without AuxK, and which latents fired [f]."""
    copies = jax.tree.map(lambda a: a.astype(objective.dtype), weights)
    options: Any = {"precision": precision(objective.dtype), "preferred_element_type": jnp.float32}
    pre = jnp.matmul(x.astype(objective.dtype), copies.w_enc.T, **options) + copies.b_enc
    values, indices = jax.lax.top_k(pre, objective.k)
    values = jnp.where(keep[:, None], jax.nn.relu(values), 0)
    code = to_dense(values, indices, objective.d_sae, objective.dtype)
    error = jnp.where(keep[:, None], x - jnp.matmul(code, copies.w_dec, **options) - weights.b_dec, 0)
    return jnp.sum(error * error) / jnp.sum(x * x), jnp.any(code > 0, axis=0)


def roofline_seconds(case: Case, setting: Setting) -> float:
    """What one step takes at least where nothing overlaps, by the measured ceilings of this device.

    The encoder's product; the k rows of each token gone through four times (decode, gradient by the values, gradients
    of both matrices); and of every weight the optimiser's traffic: weight and two moments read and written in float32,
    the gradient written and read, and the narrow copy written where there is one. The form of the bound is common to
    roofline models (Williams et al. 2009); that caches hold nothing is assumed, so that a share above 1 is possible.
    """
    size = setting.dtype.itemsize
    product = 2.0 * setting.tokens * case.d * case.f / matmul_rate(setting.dtype, setting.sample)
    gathered = 4.0 * size * setting.tokens * case.k * case.d
    moved = (6 * 4 + 2 * 4 + (size if size < 4 else 0)) * 2.0 * case.d * case.f
    return product + (gathered + moved) / copy_bandwidth(setting.sample)
