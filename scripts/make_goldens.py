"""Writes tests/goldens/*_tiny: a tiny random checkpoint of each Qwen family and what transformers computes from it.

Needs torch. Weights and tokens are drawn with NumPy from one seed and every weight is re-drawn, so that no norm is
trivial; each checkpoint has the layout of the release. `python scripts/make_goldens.py [FOLDER]`
The parity tests use the functions below on other models.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from qscope_jax.files.tensors import write_tensors

FOLDER = Path(__file__).parents[1] / "tests" / "goldens"
# Between the probabilities of the last expert chosen and the first one left out: rounding must not swap them.
CLEAR_MARGIN = 1e-4
BFLOAT16 = ml_dtypes.bfloat16

_SIZES = {
    "attention_bias": False,
    "eos_token_id": 60,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "max_position_embeddings": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "vocab_size": 64,
}
_DENSE = {"intermediate_size": 40}
_MOE = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 3}
_QWEN3 = {
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
}
_HYBRID = {
    "dtype": "bfloat16",
    "full_attention_interval": 4,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_value_head_dim": 12,
    "mamba_ssm_dtype": "float32",
    "num_hidden_layers": 4,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.5,
        "rope_theta": 10000,
        "rope_type": "default",
    },
}


def _multimodal(model_type: str, architecture: str, **text: Any) -> dict[str, Any]:
    text = {"model_type": f"{model_type}_text", **_SIZES, **_HYBRID, **text}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 32}
    outer = {"architectures": [architecture], "model_type": model_type, "tie_word_embeddings": False}
    return outer | {"text_config": text, "vision_config": vision | {"model_type": model_type}}


# The config.json of each golden, in the dialect of the release.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "num_hidden_layers": 3}
    | _SIZES | _DENSE | _QWEN3,
    "qwen3_moe": {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_hidden_layers": 3}
    | _SIZES | _DENSE | _MOE | _QWEN3
    | {"decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True},
    "qwen3_5": _multimodal("qwen3_5", "Qwen3_5ForConditionalGeneration", **_DENSE),
    "qwen3_5_moe": _multimodal(
        "qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration", **_MOE, shared_expert_intermediate_size=24
    ),
}  # fmt: skip
# The hybrids' rows are longer than a chunk of the delta rule (64).
LENGTHS = {"qwen3": (17, 12, 3), "qwen3_moe": (17, 12, 3), "qwen3_5": (72, 65, 5), "qwen3_5_moe": (72, 65, 5)}


def build(config: dict[str, Any], seed: int) -> tuple[Any, dict[str, np.ndarray]]:
    """A float32 text model in inference mode and its weights by torch's names, in the dtypes of a checkpoint."""
    text = dict(config.get("text_config", config))
    hf = AutoConfig.for_model(text.pop("model_type"), **text)
    model = AutoModelForCausalLM.from_config(hf, attn_implementation="eager").float().eval()
    return model, draw_weights(model, seed)


def draw_weights(model: Any, seed: int) -> dict[str, np.ndarray]:
    """Re-draws every weight in place and returns them in the dtypes of the checkpoint; equal seeds, equal weights."""
    rng = np.random.default_rng(seed)
    hybrid = model.config.model_type.startswith("qwen3_5")
    stored = {}
    for name, weight in sorted(model.named_parameters()):
        # A tied head is as large as the embedding: only a small norm before it gives logits of order one.
        size = weight.numel() ** -0.5 if name == "model.norm.weight" and model.config.tie_word_embeddings else 1.0
        drawn = _draw(rng, name, tuple(weight.shape), hybrid, size).astype(_stored_dtype(name, weight.ndim, hybrid))
        stored[name] = drawn
        weight.data = torch.from_numpy(drawn.astype(np.float32))
    return stored


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], hybrid: bool, size: float) -> np.ndarray:
    # A token's state decays by e^-0.001 in one head and by e^-1 in another: some reach over chunks, some forget. Much
    # faster decay would measure only how the sum of log-decays within a chunk is rounded, in transformers as here.
    if name.endswith("A_log"):
        return np.log(rng.uniform(0.5, 8, shape))
    if name.endswith("dt_bias"):
        return rng.uniform(-6, -2, shape)
    if len(shape) == 1:  # a norm; Qwen3.5 stores its weight less one, but for the gated norm
        centred = hybrid and "linear_attn" not in name
        return size * rng.uniform(0.4, 1.6, shape) - centred
    return (1.0 if "embed" in name else _gain(name, hybrid) / np.sqrt(shape[-1])) * rng.standard_normal(shape)


def _gain(name: str, hybrid: bool) -> float:
    """Attention and routing well away from uniform, a residual stream that every layer changes, logits of order one.

    Hybrids amplify rounding more, transformers' included: 1.5 would drown the limit on logits in it.
    """
    if not hybrid:
        return 1.5
    if "in_proj_a" in name:
        return 0.3
    return 0.7 if name.removesuffix(".weight").endswith(("o_proj", "out_proj", "down_proj")) else 1.0


def _stored_dtype(name: str, ndim: int, hybrid: bool) -> Any:
    if hybrid:
        return np.float32 if name.endswith(("A_log", "linear_attn.norm.weight")) else BFLOAT16
    # A mixture that no release has, but that a reader must take.
    return np.float32 if ndim == 1 else np.float16 if "mlp" in name else BFLOAT16


def released(tensors: dict[str, np.ndarray], model_type: str) -> dict[str, np.ndarray]:
    """Torch's tensors under the names of the release: Qwen3 MoE per expert, Qwen3.5 inside a multimodal file."""
    if model_type == "qwen3_moe":
        return split_experts(tensors)
    if model_type == "qwen3":
        return tensors
    inner = {name.replace("model.", "model.language_model.", 1): array for name, array in tensors.items()}
    mlp = "mtp.layers.0.mlp." + ("experts.0." if model_type.endswith("moe") else "")
    others = [
        *("mtp.fc.weight", "mtp.norm.weight", "mtp.layers.0.self_attn.q_proj.weight"),
        *(f"{mlp}{part}_proj.weight" for part in ("gate", "up", "down")),
        *("model.visual.patch_embed.proj.bias", "model.visual.merger.norm.weight"),
    ]
    return inner | {name: np.full(3, np.nan, BFLOAT16) for name in others}  # never to be read


def split_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Fused expert tensors [e, ...] as one tensor per expert and projection; the others as they are."""
    split = {}
    for name, array in tensors.items():
        base, fused, kind = name.partition(".experts.")
        if kind == "down_proj":
            split |= {f"{base}{fused}{e}.down_proj.weight": down for e, down in enumerate(array)}
        elif kind == "gate_up_proj":
            for e, both in enumerate(array):
                gate, up = np.split(both, 2)
                split |= {f"{base}{fused}{e}.gate_proj.weight": gate, f"{base}{fused}{e}.up_proj.weight": up}
        else:
            split[name] = array
    return split


def padded_rows(vocab: int, lengths: tuple[int, ...], side: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids [b, t] int32 and their mask, padded left or right."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (len(lengths), max(lengths)))  # pads hold ids too: they must not matter
    mask = np.zeros(tokens.shape, bool)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = True
        tokens[row, mask[row]] = np.random.default_rng((seed, row)).integers(0, vocab, length)
    return tokens.astype(np.int32), mask


def clear_rows(model: Any, lengths: tuple[int, ...], side: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`padded_rows` of the first seed, from `seed` on, that leaves no doubt about which experts serve a real token."""
    for attempt in itertools.count(seed):
        tokens, mask = padded_rows(model.config.vocab_size, lengths, side, attempt)
        if router_margin(model, tokens, mask) > CLEAR_MARGIN:
            return tokens, mask
    raise AssertionError("the seeds do not end")


def router_margin(model: Any, tokens: np.ndarray, mask: np.ndarray) -> float:
    """The least difference, over layers and real tokens, of the last chosen and the first rejected probability."""
    margins = [np.inf]

    def hook(module, args, output):
        chances = output[0].softmax(-1).sort(-1, descending=True).values[mask.ravel()]
        margins.append((chances[:, module.top_k - 1] - chances[:, module.top_k]).min().item())

    handles = [m.register_forward_hook(hook) for m in model.modules() if type(m).__name__.endswith("TopKRouter")]
    with torch.no_grad():
        _run(model, tokens, mask)
    for handle in handles:
        handle.remove()
    return min(margins)


def _run(model: Any, tokens: np.ndarray, mask: np.ndarray, **options: Any) -> Any:
    return model(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        position_ids=torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0)),
        **options,
    )


def observe(model: Any, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """At the n real tokens: `residuals` [l, n, d], raw outputs of the decoder layers; `hidden` [n, d]; `logits`."""
    residuals: list[np.ndarray] = []

    def hook(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        residuals.append(output.detach().numpy()[mask])

    handles = [layer.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        out = _run(model, tokens, mask, output_hidden_states=True)
    for handle in handles:
        handle.remove()
    # The last of transformers' hidden states is normed: never the residual stream that an SAE reads.
    hidden, logits = out.hidden_states[-1].numpy()[mask], out.logits.numpy()[mask]
    return {"residuals": np.stack(residuals), "hidden": hidden, "logits": logits}


def gradients(model: Any, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token cross-entropy over pairs of real tokens, by torch's names."""
    model.zero_grad()
    out = _run(model, tokens, mask)
    pairs = torch.from_numpy(mask[:, 1:] & mask[:, :-1])
    targets = torch.from_numpy(tokens[:, 1:]).long()
    torch.nn.functional.cross_entropy(out.logits[:, :-1][pairs], targets[pairs]).backward()
    return {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def read_back(folder: Path) -> Any:
    """The text model that transformers makes of a folder, in float32; it may miss nothing and know every tensor."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    if any(report.values()):
        raise ValueError(f"{folder}: transformers reports {report}")
    return model


def write_golden(folder: Path, config: dict[str, Any], lengths: tuple[int, ...]) -> None:
    """One folder: config.json, model.safetensors, and oracle.safetensors with what transformers computes from them."""
    folder.mkdir(parents=True, exist_ok=True)
    _, stored = build(config, seed=0)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_tensors(folder / "model.safetensors", released(stored, config["model_type"]), {"format": "pt"})
    model, arrays = read_back(folder), {}
    for side in ("left", "right"):
        tokens, mask = clear_rows(model, lengths, side, seed=1)
        arrays |= {f"{side}/tokens": tokens, f"{side}/mask": mask}
        arrays |= {f"{side}/{name}": array for name, array in observe(model, tokens, mask).items()}
    grads = gradients(model, tokens, mask)
    if config["model_type"] == "qwen3_moe":
        grads = split_experts(grads)
    # In full where the whole backward pass has gone through, elsewhere the norm.
    arrays |= {f"gradient/{name}": grad for name, grad in grads.items() if ".layers.0." in name or grad.ndim == 1}
    arrays |= {f"gradient_norm/{name}": np.linalg.norm(grad).reshape(1) for name, grad in grads.items()}
    if config["model_type"] == "qwen3":  # the head is the same in all families
        model.lm_head.weight = model.model.embed_tokens.weight
        arrays["tied/logits"] = observe(model, tokens, mask)["logits"]
    write_tensors(folder / "oracle.safetensors", arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(stored)} weights, {len(arrays)} arrays, {size:,} bytes")


def main(folder: Path) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for family, config in CONFIGS.items():
        write_golden(folder / f"{family}_tiny", config, LENGTHS[family])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
