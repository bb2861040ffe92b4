"""What training changes: SAEs of one shape side by side, with all that decides how they go on.

Leaves lead with the SAE axis `l`, so that one program walks over any number of layers; where they lie on a mesh is
said here alone.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from qscope_jax.mesh import AnyMesh, MeshError
from qscope_jax.sae.loss import ALONE, Axes, Objective, Weights
from qscope_jax.sae.model import SaeParams
from qscope_jax.training.optimizer import Schedule, init_adam

ModelAxis = Literal["latents", "layers"]


class Norms(NamedTuple):
    """How inputs of a layer are prepared: (x - mean) / scale, without the tokens of norm above `sink`."""

    mean: Float[Array, "l d"]
    scale: Float[Array, "l"]
    sink: Float[Array, "l"]


class SaeState(NamedTuple):
    """SAEs of one shape. `idle` counts tokens since each latent fired; `skipped` steps of each SAE that were not taken
    because something was not finite, `failing` those in a row up to now."""

    weights: Weights
    adam: optax.ScaleByAdamState
    idle: Int[Array, "l f"]
    skipped: Int[Array, "l"]
    failing: Int[Array, "l"]
    norms: Norms


class TrainState(NamedTuple):
    """All SAEs, by group, and the number of steps behind them."""

    step: Int[Array, ""]
    groups: tuple[SaeState, ...]


@dataclass(frozen=True)
class Group:
    """SAEs of one shape and recipe, one per layer; static."""

    layers: tuple[int, ...]
    objective: Objective
    schedule: Schedule
    clip: float = 1.0

    @property
    def name(self) -> str:
        """As the releases call width and k, for folders and logs: W32K-L0_50."""
        width = self.objective.d_sae
        return f"W{width // 1024}K-L0_{self.objective.k}" if width % 1024 == 0 else f"W{width}-L0_{self.objective.k}"


def init_group(group: Group, norms: Norms, seed: int, *, mesh: AnyMesh | None, model_axis: ModelAxis) -> SaeState:
    """Fresh SAEs: random unit-norm decoder rows, the encoder tied to them (Gao et al. 2024, A.1); on their devices.

    What an SAE starts from depends on the seed, its layer and its width alone, not on what is trained beside it.

    Raises:
      MeshError: the mesh does not divide the latents, or the layers, of the group.
    """

    norms = jax.tree.map(lambda array: np.asarray(array, np.float32), norms)
    wanted = abstract_group(group, norms.mean.shape[1], mesh=mesh, model_axis=model_axis)
    places = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    return jax.jit(partial(_fresh, group, seed), out_shardings=places)(norms)


def abstract_group(group: Group, d: int, *, mesh: AnyMesh | None, model_axis: ModelAxis) -> SaeState:
    """Shapes, dtypes and places of a group's state.

    Raises:
      MeshError: as `init_group`.
    """
    count = len(group.layers)
    number: Any = jax.ShapeDtypeStruct((count,), jnp.float32)
    mean: Any = jax.ShapeDtypeStruct((count, d), jnp.float32)
    shapes = jax.eval_shape(partial(_fresh, group, 0), Norms(mean, number, number))
    if mesh is None:
        return shapes
    put = lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)  # noqa: E731
    return jax.tree.map(put, shapes, shardings(shapes, mesh, model_axis))


def _fresh(group: Group, seed: int, norms: Norms) -> SaeState:
    count, d = norms.mean.shape
    f = group.objective.d_sae

    def weights_of(layer):
        rows = jax.random.normal(
            jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), layer), (f, d), jnp.float32
        )
        rows = rows / jnp.linalg.norm(rows, axis=-1, keepdims=True)
        return Weights(rows, jnp.zeros(f), rows, jnp.zeros(d))

    weights = jax.vmap(weights_of)(jnp.array(group.layers, jnp.int32))
    none = jnp.zeros(count, jnp.int32)
    return SaeState(weights, jax.vmap(init_adam)(weights), jnp.zeros((count, f), jnp.int32), none, none, norms)


def axes_of(mesh: AnyMesh | None, model_axis: ModelAxis) -> Axes:
    """The mesh axes that tokens and latents are split over."""
    if mesh is None:
        return ALONE
    return Axes("data", "model" if model_axis == "latents" else None)


def specs(state: SaeState, model_axis: ModelAxis) -> SaeState:
    """Where the leaves lie: over "model" either the latents, or the SAEs themselves; whole along "data"."""
    if model_axis == "layers":
        return jax.tree.map(lambda _: PartitionSpec("model"), state)
    whole: Any = PartitionSpec()
    latents: Any = PartitionSpec(None, "model")
    weights = Weights(latents, latents, latents, whole)
    adam = optax.ScaleByAdamState(count=whole, mu=weights, nu=weights)
    return SaeState(weights, adam, latents, whole, whole, Norms(whole, whole, whole))


def shardings(state: SaeState, mesh: AnyMesh, model_axis: ModelAxis) -> SaeState:
    """`specs` on a mesh.

    Raises:
      MeshError: "model" does not divide what it would split.
    """
    size, (count, f, _) = mesh.shape["model"], state.weights.w_enc.shape
    what, number = ("latents", f) if model_axis == "latents" else ("layers", count)
    if number % size:
        raise MeshError(
            f"{number} {what} cannot be split over the mesh axis 'model' of {size} devices; choose a size that divides "
            f"{number}, or split over {'layers' if model_axis == 'latents' else 'latents'}"
        )
    is_spec = lambda leaf: isinstance(leaf, PartitionSpec)  # noqa: E731
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs(state, model_axis), is_leaf=is_spec)


def folded(weights: Weights, mean: np.ndarray, scale: float) -> SaeParams:
    """One SAE in the release's form, for raw residual vectors, float64.

    x' = (x - mean) / scale gives scale * pre' = x @ w_enc + scale * b_enc - mean @ w_enc: the k largest stay the k
    largest, and codes come in the units of the residual stream.
    """
    w_enc, b_enc, w_dec, b_dec = (np.asarray(leaf, np.float64) for leaf in weights)
    arrays: Any = w_enc.T, scale * b_enc - w_enc @ mean, w_dec, scale * b_dec + mean
    return SaeParams(*arrays)
