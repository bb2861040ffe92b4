"""Writes tests/goldens/qwen3_tiny: a tiny random Qwen3 checkpoint and what transformers computes from it.

Needs torch. Weights and tokens are drawn with NumPy from one seed and every weight is re-drawn, so that no norm is
trivial; the checkpoint mixes bfloat16, float16 and float32. `python scripts/make_goldens.py [FOLDER]`
The parity tests use the functions below on other models.
"""

import json
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from qscope_jax.files.tensors import write_tensors

FOLDER = Path(__file__).parents[1] / "tests" / "goldens" / "qwen3_tiny"
LENGTHS = (17, 12, 3)
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 60,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 256,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 64,
}


def draw_weights(model: torch.nn.Module, seed: int) -> dict[str, np.ndarray]:
    """Re-draws every weight in place and returns them in the dtypes of the checkpoint; equal seeds, equal weights."""
    rng = np.random.default_rng(seed)
    stored = {}
    for name, weight in sorted(model.named_parameters()):
        if weight.ndim == 1:  # a norm
            drawn = rng.uniform(0.4, 1.6, weight.shape).astype(np.float32)
        else:
            # Attention well away from uniform, a residual stream that every layer changes, logits of order one.
            scale = 1.0 if "embed" in name else 1.5 / np.sqrt(weight.shape[1])
            dtype = np.float16 if "mlp" in name else ml_dtypes.bfloat16
            drawn = (scale * rng.standard_normal(weight.shape)).astype(dtype)
        stored[name] = drawn
        weight.data = torch.from_numpy(drawn.astype(np.float32))
    return stored


def build(config: dict, seed: int) -> tuple[Qwen3ForCausalLM, dict[str, np.ndarray]]:
    """A float32 model in inference mode, and its weights as a checkpoint stores them."""
    model = Qwen3ForCausalLM(Qwen3Config(**config, attn_implementation="eager")).float().eval()
    return model, draw_weights(model, seed)


def padded_rows(vocab: int, lengths: tuple[int, ...], side: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Random token ids [b, t] int32 and their mask, padded left or right."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, vocab, (len(lengths), max(lengths)))  # pads hold ids too: they must not matter
    mask = np.zeros(tokens.shape, bool)
    for row, length in enumerate(lengths):
        mask[row, slice(-length, None) if side == "left" else slice(length)] = True
        tokens[row, mask[row]] = np.random.default_rng((seed, row)).integers(0, vocab, length)
    return tokens.astype(np.int32), mask


def observe(model: Qwen3ForCausalLM, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """`residuals` [l, b, t, d], raw outputs of the decoder layers; `hidden` [b, t, d]; `logits` [b, t, v]."""
    residuals: list[np.ndarray] = []

    def hook(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        residuals.append(output.detach().numpy().copy())

    handles = [layer.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask).long(),
            position_ids=torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0)),
            output_hidden_states=True,
        )
    for handle in handles:
        handle.remove()
    # The last of transformers' hidden states is normed: never the residual stream that an SAE reads.
    return {
        "residuals": np.stack(residuals),
        "hidden": out.hidden_states[-1].numpy(),
        "logits": out.logits.numpy(),
    }


def gradients(model: Qwen3ForCausalLM, tokens: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    """Gradients of the mean next-token cross-entropy over pairs of real tokens, by tensor name."""
    model.zero_grad()
    out = model(
        input_ids=torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        position_ids=torch.from_numpy(np.maximum(mask.cumsum(axis=1) - 1, 0)),
    )
    pairs = torch.from_numpy(mask[:, 1:] & mask[:, :-1])
    targets = torch.from_numpy(tokens[:, 1:]).long()
    torch.nn.functional.cross_entropy(out.logits[:, :-1][pairs], targets[pairs]).backward()
    return {name: weight.grad.numpy() for name, weight in model.named_parameters()}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model, stored = build(CONFIG, seed=0)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    write_tensors(folder / "model.safetensors", stored, {"format": "pt"})
    arrays = {}
    for side in ("left", "right"):
        tokens, mask = padded_rows(CONFIG["vocab_size"], LENGTHS, side, seed=1)
        arrays |= {f"{side}/tokens": tokens, f"{side}/mask": mask}
        arrays |= {f"{side}/{name}": array for name, array in observe(model, tokens, mask).items()}
    grads = gradients(model, tokens, mask)
    # In full where the whole backward pass has gone through, elsewhere the norm.
    arrays |= {f"gradient/{name}": grad for name, grad in grads.items() if ".layers.0." in name or grad.ndim == 1}
    arrays |= {f"gradient_norm/{name}": np.linalg.norm(grad).reshape(1) for name, grad in grads.items()}
    model.lm_head.weight = model.model.embed_tokens.weight
    arrays["tied/logits"] = observe(model, tokens, mask)["logits"]
    write_tensors(folder / "oracle.safetensors", arrays)
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}: {len(stored)} weights, {len(arrays)} arrays, {size:,} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
