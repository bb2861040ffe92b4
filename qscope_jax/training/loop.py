"""A training run in pieces: what it trains, what it carries from step to step, and how one step is made.

rows of tokens -> forward -> mixing -> one step of every SAE
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Filled
from qscope_jax.data.vectors import VectorRows
from qscope_jax.sae.loss import Report
from qscope_jax.training.activations import (
    Activations,
    Collect,
    Mixer,
    Stored,
    abstract_mixer,
    collect_stored,
    init_mixer,
    make_collect,
    make_exchange,
    make_fill,
    measure_norms,
    place_rows,
)
from qscope_jax.training.state import Group, ModelAxis, Norms, TrainState, abstract_group, init_group
from qscope_jax.training.step import StepReport, make_fit, make_judge, make_train_step


@dataclass(frozen=True)
class Plan:
    """What is trained, and on what shape of batches.

    Attributes:
      groups: the SAEs.
      seed: decides what SAEs start from, and how tokens are mixed.
      rows, row_length: of a global batch.
      shards: virtual shards of the data.
      buffer: how many batches the mixing buffer holds; 0: none.
      model_axis: what lies on the mesh's axis "model".
    """

    groups: tuple[Group, ...]
    seed: int
    rows: int
    row_length: int
    shards: int
    buffer: int = 0
    model_axis: ModelAxis = "latents"

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose outputs are needed, ascending."""
        return tuple(sorted({layer for group in self.groups for layer in group.layers}))

    @property
    def batch_tokens(self) -> int:
        return self.rows * self.row_length


Rows = Filled | VectorRows


class Carried(NamedTuple):
    """What a step hands to the next one, all of it arrays: the content of a checkpoint."""

    train: TrainState
    mixer: Mixer | None


class Trainer:
    """The jitted pieces of a run and what they read: a backbone that turns rows of tokens into residual vectors, or
    nothing, if rows are those vectors already. Holds nothing that a step changes."""

    def __init__(self, source: Backbone | Stored, plan: Plan, mesh: Mesh | None = None):
        self.plan, self.mesh = plan, mesh
        if isinstance(source, Stored):
            self._collect: Collect = jax.jit(collect_stored)
            self._params, self._d, self._dtype = (), *source
        else:
            self._collect = make_collect(source.config, plan.layers)
            self._params, self._d = source.params, source.config.hidden_size
            self._dtype = source.params["embed"].dtype
        self._fill, self._exchange = make_fill(mesh), make_exchange(plan.seed, mesh)
        self._step = make_train_step(plan.groups, plan.layers, mesh=mesh, model_axis=plan.model_axis)
        self._fit = make_fit(plan.groups, plan.layers, mesh=mesh, model_axis=plan.model_axis)
        self._judge = make_judge(plan.groups, plan.layers, mesh=mesh, model_axis=plan.model_axis)

    def collect(self, rows: Rows) -> Activations:
        """The residual streams of this process's rows of a global batch."""
        return self._collect(self._params, *place_rows(rows, self.mesh))

    def measure(self, batches: Iterable[Rows]) -> Norms:
        """What inputs are centred, scaled and cut by, per layer of the plan; see `measure_norms`."""
        placed = (place_rows(rows, self.mesh) for rows in batches)
        return measure_norms(self._collect, self._params, placed)

    def init(self, norms: Norms) -> Carried:
        """Untrained SAEs and an empty buffer."""
        plan, groups = self.plan, []
        for group in plan.groups:
            which = [plan.layers.index(layer) for layer in group.layers]
            own = jax.tree.map(lambda array, which=which: array[which], norms)
            groups.append(init_group(group, own, plan.seed, mesh=self.mesh, model_axis=plan.model_axis))
        place = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        step = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=place)()
        return Carried(TrainState(step, tuple(groups)), self._mixer(init_mixer))

    def fit(self, carried: Carried, rows: Rows) -> Carried:
        """Untrained SAEs with encoders of the scale that suits a batch of this process's rows; see `encoder_scale`."""
        return carried._replace(train=self._fit(carried.train, *self.collect(rows)))

    def abstract(self) -> Carried:
        """Shapes, dtypes and places of what `init` gives, to restore a checkpoint into; nothing is made."""
        mesh, axis = self.mesh, self.plan.model_axis
        groups = tuple(abstract_group(group, self._d, mesh=mesh, model_axis=axis) for group in self.plan.groups)
        place = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec())
        step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=place)
        mixer: Any = self._mixer(abstract_mixer)
        return Carried(TrainState(step, groups), mixer)

    def judge(self, carried: Carried, rows: Rows) -> tuple[Report, ...]:
        """How well the SAEs do on a whole global batch that every process gives; per group, on the devices."""
        batch = self._collect(self._params, *place_rows(rows, self.mesh, whole=True))
        return self._judge(carried.train, *batch)

    def fill(self, carried: Carried, rows: Rows, number: int) -> Carried:
        """Puts batch `number`, of the `plan.buffer` first ones, into the buffer; trains on nothing."""
        assert carried.mixer is not None
        return carried._replace(mixer=self._fill(carried.mixer, self.collect(rows), number))

    def step(self, carried: Carried, rows: Rows) -> tuple[Carried, tuple[StepReport, ...]]:
        """Trains every SAE by one batch; the state is donated. A report per group, still on the devices."""
        train, mixer = carried
        batch = self.collect(rows)
        if mixer is not None:
            mixer, batch = self._exchange(mixer, batch, train.step)
        train, reports = self._step(train, *batch)
        return Carried(train, mixer), reports

    def _mixer(self, make: Callable[..., Mixer]) -> Mixer | None:
        plan = self.plan
        shape = len(plan.layers), plan.shards, plan.buffer * plan.batch_tokens // plan.shards, self._d
        return make(shape, self._dtype, self.mesh) if plan.buffer else None


def buffer_batches(size: int | None, batch_bytes: int, rows: int, devices: int) -> int:
    """How many batches, of `batch_bytes` each, a buffer of `size` bytes over all devices holds.

    By default as many as make a step's tokens come from 256 rows, fresh ones among them; at most 8, and at most 8 GiB
    on each of the `devices` that it is split over.

    Raises:
      ValueError: the size is negative.
    """
    if size is None:
        return max(0, min(math.ceil(256 / rows) - 1, 8, devices * (8 << 30) // batch_bytes))
    if size < 0:
        raise ValueError(f"a buffer of {size} bytes: expected at least 0")
    return size // batch_bytes
