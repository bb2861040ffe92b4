"""One row per tensor: our path, the checkpoint's name, the axes, and how the file stores it.

Loading, saving, checking and sharding all read this table; nothing else knows a tensor's name.
A file keeps a linear map as [out, in] and several of them behind one another where it fuses them; we keep each alone,
its input axes first and its output axes split: [h*c, d] -> [d, h, c].
"""

import math
from typing import Any, NamedTuple

import numpy as np

from qscope_jax.backbone.config import LayerKind, ModelConfig


class Row(NamedTuple):
    """A leaf of one layer, or of the whole model, and the tensor of a file that holds it.

    Attributes:
      path: our names, below the layer.
      name: the file's name; rows of one name follow one another along the stored output axis. "{e}" in it: one tensor
        per expert.
      axes: logical axes of the leaf, the experts' included.
      inputs: 0: stored as we hold it; n: a linear map with n input axes, stored [out, in].
      stacked: leading axes that the file stacks too (experts).
      unit: the file has an axis of length one before the last.
      float32: stays float32 whatever the model's dtype.
    """

    path: tuple[str, ...]
    name: str
    axes: tuple[str, ...]
    inputs: int = 0
    stacked: int = 0
    unit: bool = False
    float32: bool = False


class Dialect(NamedTuple):
    """How a file names things: the prefix of the text model, and whether the experts of a layer are one tensor."""

    prefix: str
    fused: bool


class Piece(NamedTuple):
    """The part of a stored tensor that is one leaf (or one expert's part of it).

    `leaf` is the place in the parameter tree, `period` the row of it if it is stacked, `expert` the row below that;
    `shape` is that of the part as we hold it; `start` counts along the stored output axis.
    """

    row: Row
    leaf: tuple[str | int, ...]
    period: int | None
    expert: int | None
    shape: tuple[int, ...]
    start: int

    @property
    def axes(self) -> tuple[str, ...]:
        """The logical axes of `shape`."""
        return self.row.axes if self.expert is None else self.row.axes[1:]

    @property
    def permutation(self) -> tuple[int, ...]:
        """Turns a view in the file's order [stacked, out, in] into the order of `shape`."""
        lead = self.row.stacked if self.expert is None else 0
        outs = len(self.shape) - lead - self.row.inputs
        return (*range(lead), *(lead + outs + i for i in range(self.row.inputs)), *(lead + i for i in range(outs)))

    def view(self, stored: np.ndarray) -> np.ndarray:
        """This part of the file's array, its axes split but in the file's order; never a copy."""
        order = [self.shape[i] for i in np.argsort(self.permutation)]
        if not self.row.inputs:
            return stored.reshape(order)
        lead = self.row.stacked if self.expert is None else 0
        rows = math.prod(self.shape[lead + self.row.inputs :])
        flat = stored.reshape(*stored.shape[:lead], -1, math.prod(self.shape[lead : lead + self.row.inputs]))
        return flat[..., self.start : self.start + rows, :].reshape(order)

    @property
    def place(self) -> tuple[int, ...]:
        """Where in its leaf the piece stands: the leading indices."""
        return tuple(i for i in (self.period, self.expert) if i is not None)

    def leaf_of(self, params: Any):
        """The whole leaf that holds the piece."""
        for key in self.leaf:
            params = params[key]
        return params


class Tensor(NamedTuple):
    """One tensor of a checkpoint and the pieces it consists of, in the order in which it stores them."""

    name: str
    stored_shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


_NORMS = (
    Row(("mixer_norm", "scale"), "input_layernorm.weight", ("norm",)),
    Row(("mlp_norm", "scale"), "post_attention_layernorm.weight", ("norm",)),
)
_FULL = (
    Row(("mixer", "q"), "self_attn.q_proj.weight", ("embed", "heads", "query"), 1),
    Row(("mixer", "k"), "self_attn.k_proj.weight", ("embed", "kv_heads", "head_dim"), 1),
    Row(("mixer", "v"), "self_attn.v_proj.weight", ("embed", "kv_heads", "head_dim"), 1),
    Row(("mixer", "o"), "self_attn.o_proj.weight", ("heads", "head_dim", "embed"), 2),
    Row(("mixer", "q_norm", "scale"), "self_attn.q_norm.weight", ("head_dim",)),
    Row(("mixer", "k_norm", "scale"), "self_attn.k_norm.weight", ("head_dim",)),
)
_LINEAR = (
    Row(("mixer", "q"), "linear_attn.in_proj_qkv.weight", ("embed", "key_heads", "key_dim"), 1),
    Row(("mixer", "k"), "linear_attn.in_proj_qkv.weight", ("embed", "key_heads", "key_dim"), 1),
    Row(("mixer", "v"), "linear_attn.in_proj_qkv.weight", ("embed", "value_heads", "value_dim"), 1),
    Row(("mixer", "conv_q"), "linear_attn.conv1d.weight", ("conv", "key_heads", "key_dim"), 1, unit=True),
    Row(("mixer", "conv_k"), "linear_attn.conv1d.weight", ("conv", "key_heads", "key_dim"), 1, unit=True),
    Row(("mixer", "conv_v"), "linear_attn.conv1d.weight", ("conv", "value_heads", "value_dim"), 1, unit=True),
    Row(("mixer", "z"), "linear_attn.in_proj_z.weight", ("embed", "value_heads", "value_dim"), 1),
    Row(("mixer", "a"), "linear_attn.in_proj_a.weight", ("embed", "value_heads"), 1),
    Row(("mixer", "b"), "linear_attn.in_proj_b.weight", ("embed", "value_heads"), 1),
    Row(("mixer", "a_log"), "linear_attn.A_log", ("value_heads",), float32=True),
    Row(("mixer", "dt_bias"), "linear_attn.dt_bias", ("value_heads",)),
    Row(("mixer", "norm", "scale"), "linear_attn.norm.weight", ("value_dim",), float32=True),
    Row(("mixer", "o"), "linear_attn.out_proj.weight", ("value_heads", "value_dim", "embed"), 2),
)
_MIXER: dict[LayerKind, tuple[Row, ...]] = {"full": _FULL, "linear": _LINEAR}
_MLP = (
    Row(("mlp", "gate"), "mlp.gate_proj.weight", ("embed", "mlp"), 1),
    Row(("mlp", "up"), "mlp.up_proj.weight", ("embed", "mlp"), 1),
    Row(("mlp", "down"), "mlp.down_proj.weight", ("mlp", "embed"), 1),
)
_ROUTER = (Row(("moe", "router"), "mlp.gate.weight", ("embed", "router"), 1),)
_EXPERTS_FUSED = (
    Row(("moe", "gate"), "mlp.experts.gate_up_proj", ("experts", "embed", "expert_mlp"), 1, stacked=1),
    Row(("moe", "up"), "mlp.experts.gate_up_proj", ("experts", "embed", "expert_mlp"), 1, stacked=1),
    Row(("moe", "down"), "mlp.experts.down_proj", ("experts", "expert_mlp", "embed"), 1, stacked=1),
)
_EXPERTS_SINGLE = (
    Row(("moe", "gate"), "mlp.experts.{e}.gate_proj.weight", ("experts", "embed", "expert_mlp"), 1, stacked=1),
    Row(("moe", "up"), "mlp.experts.{e}.up_proj.weight", ("experts", "embed", "expert_mlp"), 1, stacked=1),
    Row(("moe", "down"), "mlp.experts.{e}.down_proj.weight", ("experts", "expert_mlp", "embed"), 1, stacked=1),
)
_SHARED = (
    Row(("moe", "shared", "gate"), "mlp.shared_expert.gate_proj.weight", ("embed", "shared_mlp"), 1),
    Row(("moe", "shared", "up"), "mlp.shared_expert.up_proj.weight", ("embed", "shared_mlp"), 1),
    Row(("moe", "shared", "down"), "mlp.shared_expert.down_proj.weight", ("shared_mlp", "embed"), 1),
    Row(("moe", "shared_gate"), "mlp.shared_expert_gate.weight", ("embed", "one"), 1),
)
_EMBED = Row(("embed",), "embed_tokens.weight", ("vocab", "embed"))
_FINAL_NORM = Row(("final_norm", "scale"), "norm.weight", ("norm",))
_HEAD = Row(("head",), "lm_head.weight", ("vocab", "embed"))
HEAD_NAME = _HEAD.name  # never prefixed


def to_stored(tensor: Tensor, held: list[np.ndarray]) -> np.ndarray:
    """The tensor as a file stores it, of its pieces as we hold them; a view where there is one piece."""
    parts, axis = [], 0
    for piece, array in zip(tensor.pieces, held, strict=True):
        axis = piece.row.stacked if piece.expert is None else 0
        turned = array.transpose(np.argsort(piece.permutation))
        shape = tensor.stored_shape
        parts.append(turned.reshape(*shape[:axis], -1, *shape[axis + 1 :]) if piece.row.inputs else turned)
    return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=axis)


def written_dialect(config: ModelConfig) -> Dialect:
    """How we write: as released, but Qwen3.5 as the text model alone."""
    return Dialect("model.", fused=config.hybrid)


def checkpoint_tensors(config: ModelConfig, dialect: Dialect | None = None) -> list[Tensor]:
    """Every tensor of the checkpoint that `config` describes, in the order of the forward pass."""
    dialect = written_dialect(config) if dialect is None else dialect
    sizes = _sizes(config)
    found = _tensors((_EMBED,), sizes, dialect.prefix)
    p = len(config.period)
    for layer, kind in enumerate(config.layer_types):
        prefix = f"{dialect.prefix}layers.{layer}."
        found += _tensors(_layer_rows(config, kind, dialect), sizes, prefix, ("period", layer % p), layer // p)
    found += _tensors((_FINAL_NORM,), sizes, dialect.prefix)
    if not config.tie_word_embeddings:
        found += _tensors((_HEAD,), sizes, "")
    return found


def _layer_rows(config: ModelConfig, kind: LayerKind, dialect: Dialect) -> tuple[Row, ...]:
    rows = (*_NORMS, *_MIXER[kind])
    if config.moe is None:
        return (*rows, *_MLP)
    experts = _EXPERTS_FUSED if dialect.fused else _EXPERTS_SINGLE
    shared = _SHARED if config.moe.shared_intermediate_size is not None else ()
    return (*rows, *_ROUTER, *experts, *shared)


def _tensors(rows, sizes, prefix: str, leaf: tuple[str | int, ...] = (), period: int | None = None) -> list[Tensor]:
    """The tensors of some rows; rows of one name become pieces of one tensor."""
    found: list[Tensor] = []
    names = list(dict.fromkeys(row.name for row in rows))
    for name in names:
        same = [row for row in rows if row.name == name]
        for expert in range(sizes["experts"]) if "{e}" in name else (None,):
            found.append(_tensor(prefix + name.format(e=expert), same, sizes, leaf, period, expert))
    return found


def _tensor(name: str, rows: list[Row], sizes, leaf, period: int | None, expert: int | None) -> Tensor:
    pieces, start, shape = [], 0, ()
    for row in rows:
        lead = 0 if expert is None else 1
        held = tuple(sizes[axis] for axis in row.axes)[lead:]
        pieces.append(Piece(row, (*leaf, *row.path), period, expert, held, start))
        if not row.inputs:
            shape = held
            continue
        stacked = row.stacked - lead
        start += math.prod(held[stacked + row.inputs :])
        inner = math.prod(held[stacked : stacked + row.inputs])
        shape = (*held[:stacked], start, *((1,) if row.unit else ()), inner)
    return Tensor(name, shape, tuple(pieces))


def _sizes(config: ModelConfig) -> dict[str, Any]:
    linear, moe = config.linear, config.moe
    sizes = {
        "embed": config.hidden_size,
        "norm": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "query": config.head_dim * (2 if config.hybrid else 1),  # a head's query, then its gate
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
        "one": 1,
    }
    if linear is not None:
        sizes |= {"key_heads": linear.num_key_heads, "value_heads": linear.num_value_heads}
        sizes |= {"key_dim": linear.key_dim, "value_dim": linear.value_dim, "conv": linear.conv_width}
    if moe is not None:
        sizes |= {"experts": moe.num_experts, "router": moe.num_experts, "expert_mlp": moe.intermediate_size}
        sizes |= {"shared_mlp": moe.shared_intermediate_size}
    return sizes
