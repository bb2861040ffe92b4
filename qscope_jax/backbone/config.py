"""What a backbone is: the constants of a checkpoint's config.json, read in its dialects.

No number has a default here: a missing one is an error, because a guessed one gives a wrong result. Switches of which
one value is supported (attention_bias, hidden_act, use_sliding_window) may be absent.
"""

import difflib
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax

Precision = Literal["highest", "default"]
LayerKind = Literal["full"]

# Keys that do not change the forward pass of a text model in inference or training.
_INERT_KEYS = frozenset(
    {
        "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id",
        "id2label", "initializer_range", "is_encoder_decoder", "label2id", "max_window_layers", "model_type",
        "output_attentions", "output_hidden_states", "pad_token_id", "problem_type", "return_dict",
        "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache", "_name_or_path",
        "attn_implementation", "sliding_window", "unk_token_id"
    }
)  # fmt: skip
_READ_KEYS = frozenset(
    {
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "intermediate_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters",
        "layer_types", "attention_bias", "hidden_act", "use_sliding_window", "quantization_config"
    }
)  # fmt: skip


class ConfigError(ValueError):
    """A model config that cannot be run exactly; the message names each reason."""


@jax.tree_util.register_static
@dataclass(frozen=True)
class ModelConfig:
    """Constants of one backbone; static under `jit`. Letters as in the README: d, l, h, k, c, m, v.

    `layer_types` names the mixer of every layer; `precision` is read by every matmul ("highest" = float32 parity).
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    layer_types: tuple[LayerKind, ...]
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

    @classmethod
    def from_hf(cls, raw: dict[str, Any], *, precision: Precision = "highest", where: str = "config") -> "ModelConfig":
        """Reads the dictionary of a Hugging Face config.json.

        Raises:
          ConfigError: lists every unknown model or rope type, missing or malformed constant and unsupported setting.
        """
        return _Reader(raw, where).read(precision)

    def to_hf(self) -> dict[str, Any]:
        """The config.json, in the released Qwen3 dialect, that `transformers` builds the same model from."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "attention_bias": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "eos_token_id": list(self.eos_token_ids) if len(self.eos_token_ids) != 1 else self.eos_token_ids[0],
        }


def read_config(path: Path, *, precision: Precision = "highest") -> ModelConfig:
    """Reads a config.json file.

    Raises:
      ConfigError: the file is no JSON object, repeats a key, or `ModelConfig.from_hf` refuses it.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return ModelConfig.from_hf(raw, precision=precision, where=str(path))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object hook that refuses what `json` would settle silently by taking the last value."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key given twice: {sorted({n for n in names if names.count(n) > 1})}")
    return result


class _Reader:
    """Reads keys one by one and collects every fault, so that all are reported together."""

    def __init__(self, raw: dict[str, Any], where: str):
        self.raw = raw
        self.where = where
        self.faults: list[str] = []

    def read(self, precision: Precision) -> ModelConfig:
        model_type = self.raw.get("model_type")
        if model_type != "qwen3":
            raise ConfigError(f"{self.where}: model_type {model_type!r} is not supported; supported: 'qwen3'")
        self._refuse_unsupported()
        sizes = {key: self._number(key, int) for key in _SIZES}
        layers, theta = sizes["num_hidden_layers"], self._rope_theta()
        eps, tied = self._number("rms_norm_eps", float), self._tied()
        kinds, eos = self._layer_types(layers), self._eos()
        if not self.faults and sizes["num_attention_heads"] % sizes["num_key_value_heads"]:
            self.faults.append("num_attention_heads is not a multiple of num_key_value_heads")
        if not self.faults and sizes["head_dim"] % 2:
            self.faults.append(f"head_dim = {sizes['head_dim']} is odd; rotary embeddings turn pairs")
        if self.faults:
            raise ConfigError(f"{self.where}: " + "; ".join(self.faults))
        return ModelConfig(
            model_type, **{_SIZES[key]: value for key, value in sizes.items()}, rms_norm_eps=eps, rope_theta=theta,
            tie_word_embeddings=tied, layer_types=kinds, eos_token_ids=eos, precision=precision,
        )  # fmt: skip

    def _refuse_unsupported(self) -> None:
        expected = {"attention_bias": (False,), "hidden_act": ("silu",), "use_sliding_window": (False,)}
        for key, allowed in expected.items():
            if self.raw.get(key, allowed[0]) not in allowed:
                self.faults.append(f"{key} = {self.raw[key]!r} is not supported (expected {allowed[0]!r})")
        if self.raw.get("quantization_config") is not None:
            self.faults.append("quantised checkpoints are not supported (quantization_config is set)")
        for key in sorted(set(self.raw) - _INERT_KEYS - _READ_KEYS):
            close = difflib.get_close_matches(key, _READ_KEYS, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            warnings.warn(f"{self.where}: key {key!r} is unknown and ignored{hint}", stacklevel=5)

    def _number(self, key: str, kind: type) -> Any:
        value = self.raw.get(key)
        if value is None:
            self.faults.append(f"{key} is missing")
            return None
        if not _is_positive(value, kind):
            self.faults.append(f"{key} = {value!r} is not a positive {kind.__name__}")
            return None
        return kind(value)

    def _rope_theta(self) -> Any:
        thetas = [self.raw.get("rope_theta")]
        for key in ("rope_parameters", "rope_scaling"):
            rope = self.raw.get(key)
            if rope is None:
                continue
            if not isinstance(rope, dict):
                self.faults.append(f"{key} is {type(rope).__name__}, expected an object")
                continue
            kind, partial = rope.get("rope_type", rope.get("type", "default")), rope.get("partial_rotary_factor", 1.0)
            if kind != "default":
                self.faults.append(f"rope_type {kind!r} is not supported (expected 'default')")
            if partial != 1.0:
                self.faults.append(f"partial_rotary_factor = {partial!r} is not supported for qwen3 (expected 1.0)")
            thetas.append(rope.get("rope_theta"))
        given = [theta for theta in thetas if theta is not None]
        if not given:
            self.faults.append("rope_theta is missing")
        elif wrong := [theta for theta in given if not _is_positive(theta, float)]:
            self.faults.append(f"rope_theta = {wrong[0]!r} is not a positive float")
        elif len(set(given)) > 1:
            self.faults.append(f"rope_theta is given as {' and as '.join(map(repr, given))}")
        else:
            return float(given[0])

    def _tied(self) -> bool:
        tied = self.raw.get("tie_word_embeddings")
        if not isinstance(tied, bool):
            self.faults.append(f"tie_word_embeddings is {tied!r}, expected true or false")
        return bool(tied)

    def _layer_types(self, layers: int | None) -> tuple[LayerKind, ...]:
        given = self.raw.get("layer_types")
        if given is None:
            return ("full",) * (layers or 0)
        if not isinstance(given, list):
            self.faults.append(f"layer_types = {given!r} is not a list")
            return ()
        unknown = sorted({str(kind) for kind in given} - {"full_attention"})
        if unknown:
            self.faults.append(f"layer_types {unknown} are not supported for qwen3 (expected 'full_attention')")
        if layers is not None and len(given) != layers:
            self.faults.append(f"layer_types names {len(given)} layers, num_hidden_layers says {layers}")
        return ("full",) * len(given)

    def _eos(self) -> tuple[int, ...]:
        eos = self.raw.get("eos_token_id")
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            self.faults.append(f"eos_token_id = {eos!r} is not an id or a list of ids")
            return ()
        return tuple(ids)


def _is_positive(value: Any, kind: type) -> bool:
    """True for a finite positive number of this kind; JSON's readers accept NaN and Infinity."""
    good = isinstance(value, int | float) if kind is float else isinstance(value, int)
    return good and not isinstance(value, bool) and 0 < value <= sys.float_info.max


# config.json key -> field
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings",
}
