"""One row per tensor: our path, the checkpoint's name, the axes, and how the file stores it.

Loading, saving, checking (and later sharding) all read this table; nothing else knows a tensor's name.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from qscope_jax.backbone.config import LayerKind, ModelConfig


class Row(NamedTuple):
    """A tensor of one layer, or of the whole model.

    `inputs` = 0: stored as we hold it. `inputs` = n: a linear map stored [out, in], which we hold with its n input
    axes first and the output axes split ([h*c, d] -> [d, h, c]).
    """

    path: tuple[str, ...]
    name: str
    axes: tuple[str, ...]
    inputs: int = 0


class Tensor(NamedTuple):
    """One tensor of a checkpoint and its place: `leaf` in the parameter tree, at `period` if that leaf is stacked."""

    name: str
    leaf: tuple[str | int, ...]
    period: int | None
    shape: tuple[int, ...]
    row: Row

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape in the file."""
        n = self.row.inputs
        return (math.prod(self.shape[n:]), math.prod(self.shape[:n])) if n else self.shape


_MLP = (
    Row(("mlp", "gate"), "mlp.gate_proj.weight", ("embed", "mlp"), 1),
    Row(("mlp", "up"), "mlp.up_proj.weight", ("embed", "mlp"), 1),
    Row(("mlp", "down"), "mlp.down_proj.weight", ("mlp", "embed"), 1),
)
_NORMS = (
    Row(("mixer_norm", "scale"), "input_layernorm.weight", ("embed",)),
    Row(("mlp_norm", "scale"), "post_attention_layernorm.weight", ("embed",)),
)
_FULL = (
    Row(("mixer", "q"), "self_attn.q_proj.weight", ("embed", "heads", "head_dim"), 1),
    Row(("mixer", "k"), "self_attn.k_proj.weight", ("embed", "kv_heads", "head_dim"), 1),
    Row(("mixer", "v"), "self_attn.v_proj.weight", ("embed", "kv_heads", "head_dim"), 1),
    Row(("mixer", "o"), "self_attn.o_proj.weight", ("heads", "head_dim", "embed"), 2),
    Row(("mixer", "q_norm", "scale"), "self_attn.q_norm.weight", ("head_dim",)),
    Row(("mixer", "k_norm", "scale"), "self_attn.k_norm.weight", ("head_dim",)),
)
_LAYER: dict[LayerKind, tuple[Row, ...]] = {"full": (*_NORMS, *_FULL, *_MLP)}
_EMBED = Row(("embed",), "model.embed_tokens.weight", ("vocab", "embed"))
_FINAL_NORM = Row(("final_norm", "scale"), "model.norm.weight", ("embed",))
HEAD = Row(("head",), "lm_head.weight", ("vocab", "embed"))


def checkpoint_tensors(config: ModelConfig) -> list[Tensor]:
    """Every tensor of the checkpoint that `config` describes, in the order of the forward pass."""
    sizes = {
        "embed": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
    }

    def tensor(row: Row, prefix: str = "", leaf: tuple[str | int, ...] = (), period: int | None = None) -> Tensor:
        return Tensor(prefix + row.name, (*leaf, *row.path), period, tuple(sizes[a] for a in row.axes), row)

    found = [tensor(_EMBED)]
    p = len(config.period)
    for layer, kind in enumerate(config.layer_types):
        where = ("period", layer % p)
        found += [tensor(row, f"model.layers.{layer}.", where, layer // p) for row in _LAYER[kind]]
    found.append(tensor(_FINAL_NORM))
    if not config.tie_word_embeddings:
        found.append(tensor(HEAD))
    return found


def from_stored(array, inputs: int, shape: tuple[int, ...]):
    """The tensor as we hold it, of the given shape, from the file's array (NumPy or JAX); `inputs` as in `Row`."""
    return array.T.reshape(shape) if inputs else array


def to_stored(array: np.ndarray, inputs: int) -> np.ndarray:
    """The inverse of `from_stored`, a view where NumPy can make one."""
    return array.reshape(math.prod(array.shape[:inputs]), -1).T if inputs else array


def leaf_of(params: Any, tensor: Tensor):
    """The part of the parameter tree that holds this tensor."""
    for key in tensor.leaf:
        params = params[key]
    return params if tensor.period is None else params[tensor.period]
