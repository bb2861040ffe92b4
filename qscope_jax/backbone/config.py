"""What a backbone is: the constants of a checkpoint's config.json, read in its dialects.

No number has a default here: a missing one is an error, because a guessed one gives a wrong result. Switches of which
one value is supported (attention_bias, hidden_act, use_sliding_window) may be absent.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

from qscope_jax.backbone.config_reader import ConfigError, Reader, read_object

Precision = Literal["highest", "default"]
LayerKind = Literal["linear", "full"]

# Keys that do not change the forward pass of a text model in inference or training.
_INERT_KEYS = frozenset(
    {
        "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
        "id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_window_layers", "model_type",
        "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
        "torch_dtype", "transformers_version", "use_cache", "_name_or_path", "attn_implementation", "sliding_window",
        "unk_token_id", "router_aux_loss_coef", "output_router_logits", "mamba_ssm_dtype", "mtp_num_hidden_layers",
        "mtp_use_dedicated_embeddings"
    }
)  # fmt: skip
# Switches of which we run one value.
_EXPECTED = {
    "attention_bias": (False,), "hidden_act": ("silu",), "use_sliding_window": (False,), "attn_output_gate": (True,),
    "mlp_only_layers": ([], None), "decoder_sparse_step": (1,), "output_gate_type": (),
}  # fmt: skip
# config.json key -> field
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "max_position_embeddings",
}
_LINEAR = {
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_dim",
    "linear_value_head_dim": "value_dim",
    "linear_conv_kernel_dim": "conv_width",
}
_MOE = {"num_experts": "num_experts", "num_experts_per_tok": "num_active", "moe_intermediate_size": "intermediate_size"}
_READ_KEYS = frozenset(
    {
        *_SIZES, *_LINEAR, *_MOE, *_EXPECTED, "num_local_experts", "shared_expert_intermediate_size", "norm_topk_prob",
        "intermediate_size", "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor",
        "layer_types", "full_attention_interval", "quantization_config", "tie_word_embeddings", "eos_token_id"
    }
)  # fmt: skip
# model_type of a file -> family; Qwen3.5 files nest the text model in text_config or hold it alone.
_FAMILIES = {
    "qwen3": "qwen3", "qwen3_moe": "qwen3_moe", "qwen3_5": "qwen3_5", "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe": "qwen3_5_moe", "qwen3_5_moe_text": "qwen3_5_moe",
}  # fmt: skip


@dataclass(frozen=True)
class LinearConfig:
    """Gated DeltaNet layers: key heads i, value heads j (each key head serves j / i), and their widths."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in every layer: `num_active` of `num_experts` per token, and a shared expert in Qwen3.5."""

    num_experts: int
    num_active: int
    intermediate_size: int
    shared_intermediate_size: int | None
    normalise: bool


@jax.tree_util.register_static
@dataclass(frozen=True)
class ModelConfig:
    """Constants of one backbone; static under `jit`. Letters as in the README: d, l, h, k, c, m, v.

    `model_type` is the family: qwen3, qwen3_moe, qwen3_5 or qwen3_5_moe. `layer_types` names the mixer of every layer;
    `intermediate_size` is None where `moe` takes the place of the MLP; the first `rotary_dim` dimensions of a head
    turn; `precision` is read by every matmul ("highest" = float32 parity).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    intermediate_size: int | None
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layer_types: tuple[LayerKind, ...]
    linear: LinearConfig | None
    moe: MoeConfig | None
    eos_token_ids: tuple[int, ...]
    precision: Precision

    @property
    def period(self) -> tuple[LayerKind, ...]:
        """The shortest pattern of layer kinds whose repetition is the whole depth."""
        kinds = self.layer_types
        for p in range(1, len(kinds) + 1):
            if len(kinds) % p == 0 and kinds == kinds[:p] * (len(kinds) // p):
                return kinds[:p]
        raise AssertionError("a sequence always repeats itself once")

    @property
    def num_periods(self) -> int:
        return self.num_layers // len(self.period)

    @property
    def hybrid(self) -> bool:
        """Qwen3.5: besides linear layers it has zero-centred norms and gated attention outputs."""
        return self.linear is not None

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, precision: Precision = "highest", where: str = "config") -> "ModelConfig":
        """Reads the dictionary of a Hugging Face config.json, nested in text_config or flat.

        Raises:
          ConfigError: lists every unknown model or rope type, missing or malformed constant and unsupported setting.
        """
        text = raw.get("text_config", raw)
        if not isinstance(text, dict):
            raise ConfigError(f"{where}: text_config is {type(text).__name__}, expected an object")
        family = _family(raw.get("model_type"), where)
        inner = text.get("model_type", raw.get("model_type"))
        if _family(inner, where) != family:
            raise ConfigError(
                f"{where}: model_type {raw['model_type']!r} with a text_config of {inner!r}; expected one family"
            )
        reader = Reader(text, raw, family, where)
        fields = _fields(reader, family)
        reader.raise_faults()
        return cls(model_type=family, precision=precision, **fields)

    def to_hf(self) -> dict[str, Any]:
        """The config.json that `transformers` builds the same text model from.

        Qwen3 in the released dialect; Qwen3.5 as the text model alone, which has no released file.
        """
        common = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type + ("_text" if self.hybrid else ""),
            **{key: getattr(self, field) for key, field in _SIZES.items()},
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "hidden_act": "silu",
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) != 1 else self.eos_token_ids[0],
        }
        if self.intermediate_size is not None:
            common["intermediate_size"] = self.intermediate_size
        if self.moe is not None:
            common |= {key: getattr(self.moe, field) for key, field in _MOE.items()}
        if self.linear is None:
            norm = {"norm_topk_prob": self.moe.normalise, "decoder_sparse_step": 1} if self.moe else {}
            return common | {"rope_theta": self.rope_theta, "rope_scaling": None, "use_sliding_window": False} | norm
        common |= {key: getattr(self.linear, field) for key, field in _LINEAR.items()}
        if self.moe is not None and self.moe.shared_intermediate_size is not None:
            common["shared_expert_intermediate_size"] = self.moe.shared_intermediate_size
        share = self.rotary_dim / self.head_dim
        if int(self.head_dim * share) < self.rotary_dim:
            share = math.nextafter(share, 1)  # readers cut the product, which rounding has put below
        rope = {"rope_type": "default", "rope_theta": self.rope_theta, "partial_rotary_factor": share}
        return common | {"layer_types": [f"{kind}_attention" for kind in self.layer_types], "rope_parameters": rope}


_ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen3_5": "Qwen3_5ForCausalLM",
    "qwen3_5_moe": "Qwen3_5MoeForCausalLM",
}


def read_config(path: Path, *, precision: Precision = "highest") -> ModelConfig:
    """Reads a config.json file.

    Raises:
      ConfigError: the file is no JSON object, repeats a key, or `ModelConfig.from_hf` refuses it.
    """
    return ModelConfig.from_hf(read_object(path), precision=precision, where=str(path))


def _family(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in _FAMILIES:
        known = ", ".join(map(repr, _FAMILIES))
        raise ConfigError(f"{where}: model_type {name!r} is not supported; supported: {known}")
    return _FAMILIES[name]


def _fields(reader: Reader, family: str) -> dict[str, Any]:
    """Every field of `ModelConfig` but the family and the precision."""
    hybrid, moe = family.startswith("qwen3_5"), family.endswith("moe")
    reader.refuse(_EXPECTED)
    reader.warn_unknown(_READ_KEYS | _INERT_KEYS)
    fields: dict[str, Any] = {field: reader.number(key) for key, field in _SIZES.items()}
    fields["intermediate_size"] = None if moe else reader.number("intermediate_size")
    fields["rope_theta"] = reader.rope_theta()
    fields["rms_norm_eps"] = reader.number("rms_norm_eps", float)
    fields["tie_word_embeddings"] = reader.flag("tie_word_embeddings")
    kinds = {"linear_attention": "linear"} if hybrid else {}
    fields["layer_types"] = reader.layer_types(fields["num_layers"], kinds | {"full_attention": "full"})
    fields["eos_token_ids"] = reader.eos()
    share = 0.25 if hybrid else 1.0
    fields["rotary_dim"] = reader.rotary_dim(fields["head_dim"], default=share, fixed=not hybrid)
    fields["linear"] = _linear(reader) if hybrid else None
    fields["moe"] = _moe(reader, shared=hybrid) if moe else None
    if not reader.faults and fields["num_heads"] % fields["num_kv_heads"]:
        reader.faults.append("num_attention_heads is not a multiple of num_key_value_heads")
    return fields


def _linear(reader: Reader) -> LinearConfig:
    linear = LinearConfig(**{field: reader.number(key) for key, field in _LINEAR.items()})
    if not reader.faults and linear.num_value_heads % linear.num_key_heads:
        reader.faults.append("linear_num_value_heads is not a multiple of linear_num_key_heads")
    return linear


def _moe(reader: Reader, *, shared: bool) -> MoeConfig:
    aliases = {"num_experts": "num_local_experts"}  # what transformers 5 writes for Qwen3 MoE
    sizes = {field: reader.number(key, alias=aliases.get(key)) for key, field in _MOE.items()}
    width = reader.number("shared_expert_intermediate_size") if shared else None
    # Qwen3.5 always normalises; for Qwen3 an absent key means false, as in transformers.
    normalise = True if shared else reader.flag("norm_topk_prob", default=False)
    if not reader.faults and sizes["num_active"] > sizes["num_experts"]:
        reader.faults.append("num_experts_per_tok is greater than num_experts")
    return MoeConfig(**sizes, shared_intermediate_size=width, normalise=normalise)
