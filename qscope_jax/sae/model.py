"""TopK sparse autoencoders in the release's form.

    a = relu(topk_k(x @ w_enc + b_enc)),    x_hat = a @ w_dec + b_dec

No decoder bias is subtracted from the input and nothing is normalised (Qwen-Scope model cards; report §2.2).
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from qscope_kernels.sparse_decode import sparse_decode
from qscope_kernels.sparse_decode.sharded import sparse_decode_sharded
from qscope_kernels.topk_encode import topk_encode
from qscope_kernels.topk_encode.select import select
from qscope_kernels.topk_encode.sharded import topk_encode_sharded

from qscope_jax.mesh import RULES, AnyMesh, mesh_of, partition

Contract = Literal["exact", "fast"]


class SaeParams(NamedTuple):
    """Weights of one SAE; rows of `w_dec` are feature directions. The release stores both matrices transposed."""

    w_enc: Float[Array, "d f"]
    b_enc: Float[Array, "f"]
    w_dec: Float[Array, "f d"]
    b_dec: Float[Array, "d"]


# Logical axes of the parameters, for `qscope_jax.mesh`.
AXES = {"w_enc": ("embed", "latents"), "b_enc": ("latents",), "w_dec": ("latents", "embed"), "b_dec": ("embed",)}
_MESH_AXES = {"data": RULES["batch"], "model": RULES["latents"]}


@jax.tree_util.register_static
@dataclass(frozen=True)
class SaeConfig:
    """What is known of one SAE besides its weights. It is static under `jit`.

    `layer` is the 0-based decoder layer whose output the SAE reads, before the final norm. `sink_threshold` is the
    residual norm above which a token counts as a sink (10x the layer's median norm), where it is known.
    """

    d_model: int
    d_sae: int
    k: int
    layer: int | None = None
    backbone: str | None = None
    source: str | None = None
    sink_threshold: float | None = None

    def __post_init__(self):
        if not 0 < self.k <= self.d_sae:
            raise ValueError(f"k = {self.k} does not lie in 1..d_sae = {self.d_sae}")
        if self.sink_threshold is not None and not 0 < self.sink_threshold < math.inf:
            raise ValueError(f"sink_threshold = {self.sink_threshold} is not a positive, finite norm")


class Sae(NamedTuple):
    """One SAE: a pytree whose `config` is static."""

    params: SaeParams
    config: SaeConfig


class SparseCode(NamedTuple):
    """The native form of features: `values` and `indices`, both [..., k], sorted by value, descending.

    A slot whose value is 0 is unused, whatever its index.
    """

    values: Float[Array, "*n k"]
    indices: Int[Array, "*n k"]


def init_sae(key: jax.Array, config: SaeConfig, *, dtype=jnp.float32) -> Sae:
    """Draws unit-norm decoder rows and ties the encoder to them, which keeps latents alive (Gao et al. 2024, §A.1)."""
    w_dec = jax.random.normal(key, (config.d_sae, config.d_model), jnp.float32)
    w_dec = (w_dec / jnp.linalg.norm(w_dec, axis=-1, keepdims=True)).astype(dtype)
    b_enc, b_dec = jnp.zeros(config.d_sae, dtype), jnp.zeros(config.d_model, dtype)
    return Sae(SaeParams(w_dec.T, b_enc, w_dec, b_dec), config)


def encode(sae: Sae, x: Float[Array, "*n d"], *, contract: Contract = "exact", impl: str | None = None) -> SparseCode:
    """The k largest positive pre-activations of every vector, as a `SparseCode` of float32 values and int32 indices.

    With weights on a mesh, vectors are split over "data" and latents over "model"; the code equals that of one device.

    Args:
      sae: weights and k.
      x: residual vectors [..., d], in the raw units of the residual stream.
      contract: "exact" orders by float32-accumulated pre-activations; "fast" may order by rounded ones.
      impl: a name of `qscope_kernels`; None picks by platform and shape.

    Raises:
      ValueError: the last axis of `x` is not the SAE's d_model.
      MeshError: the mesh axis "data" does not divide the number of vectors.
    """
    _check_width("x", x, sae.config.d_model, "d_model")
    p, k, mesh = sae.params, sae.config.k, mesh_of(sae.params.w_enc)
    if mesh is None:
        return SparseCode(*topk_encode(x, p.w_enc, p.b_enc, k=k, contract=contract, impl=impl))
    _check_count(x, mesh)
    options = {"mesh": mesh, **_MESH_AXES, "contract": contract, "impl": impl}
    return SparseCode(*topk_encode_sharded(x, p.w_enc, p.b_enc, k=k, **options))


def decode(sae: Sae, code: SparseCode, *, impl: str | None = None) -> Float[Array, "*n d"]:
    """The reconstruction a @ w_dec + b_dec of a code, float32 [..., d].

    With weights on a mesh, codes are split over "data" and decoder rows over "model".

    Raises:
      MeshError: the mesh axis "data" does not divide the number of codes.
    """
    p, (values, indices), mesh = sae.params, code, mesh_of(sae.params.w_dec)
    if mesh is None:
        x_hat = sparse_decode(values, indices, p.w_dec, impl=impl)
    else:
        _check_count(values, mesh)
        x_hat = sparse_decode_sharded(values, indices, p.w_dec, mesh=mesh, **_MESH_AXES, impl=impl)
    return x_hat + p.b_dec.astype(jnp.float32)


def activations_of(sae: Sae, x: Float[Array, "*n d"], features: Int[Array, "*n e"]) -> Float[Array, "*n e"]:
    """Activations of a few features, as `encode` gives them: 0 where the k largest do not hold a feature.

    `features` are indices that broadcast against `x` without its last axis.
    """
    values, indices = encode(sae, x)
    found = indices[..., None, :] == features[..., None]
    return jnp.sum(jnp.where(found, values[..., None, :], 0), axis=-1)


def without_provenance(sae: Sae) -> Sae:
    """The SAE with a config of what shapes a program alone, so that SAEs of other layers share one."""
    return sae._replace(config=SaeConfig(sae.config.d_model, sae.config.d_sae, sae.config.k))


def without_decoder(sae: Sae) -> Sae:
    """The SAE for `encode` alone: `w_dec` has no rows, which is half of the memory."""
    return sae._replace(params=sae.params._replace(w_dec=sae.params.w_dec[:0]))


def row_norms_of(sae: Sae) -> np.ndarray:
    """|decoder row| of every feature, float32 [f].

    Raises:
      ValueError: the SAE is without its decoder.
    """
    if sae.params.w_dec.shape[0] != sae.config.d_sae:
        raise ValueError(f"layer {sae.config.layer}: an SAE without its decoder; give the norms of its rows beside it")
    return np.asarray(jnp.linalg.norm(sae.params.w_dec.astype(jnp.float32), axis=-1))


def to_dense(code: SparseCode, d_sae: int) -> Float[Array, "*n f"]:
    """Scatters a code into [..., d_sae]; for looking at a few tokens, never for keeping many."""
    values, indices = code
    flat_values, flat_indices = values.reshape(-1, values.shape[-1]), indices.reshape(-1, indices.shape[-1])
    rows = jnp.arange(flat_values.shape[0])[:, None]
    dense = jnp.zeros((flat_values.shape[0], d_sae), values.dtype).at[rows, flat_indices].add(flat_values, mode="drop")
    return dense.reshape(*values.shape[:-1], d_sae)


def from_dense(z: Float[Array, "*n f"], k: int) -> SparseCode:
    """The k largest positive entries of dense activations [..., f], as a code.

    Raises:
      ValueError: k does not lie in 1..f.
    """
    if not 0 < k <= z.shape[-1]:
        raise ValueError(f"k = {k} does not lie in 1..{z.shape[-1]}, the width of z")
    values, indices = select(z.reshape(-1, z.shape[-1]), k)
    shape = (*z.shape[:-1], k)
    return SparseCode(jax.nn.relu(values).reshape(shape), indices.reshape(shape))


def _check_width(name: str, x: jax.Array, expected: int, what: str) -> None:
    if x.ndim == 0 or x.shape[-1] != expected:
        raise ValueError(f"{name} has shape {tuple(x.shape)}; its last axis must be {what} = {expected} of the SAE")


def _check_count(x: jax.Array, mesh: AnyMesh) -> None:
    partition(("batch",), (math.prod(x.shape[:-1]),), mesh)
