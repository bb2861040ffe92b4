"""Compares this library with the release's torch code on a person's own checkpoint and SAEs, layer by layer.

Torch: transformers in float32 with forward hooks, then topk(x @ W_enc.T + b_enc) and relu, as the model cards do.
Ours: parity mode (float32) against torch, and fast mode (bfloat16) against our parity mode. Each side reads the files
with its own code; where torch is not installed, its columns are left out.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from qscope_jax import Sae, encode, forward, load_backbone, load_saes, load_tokenizer
from qscope_jax.backbone.forward import check_tokens
from qscope_jax.data.tokenizer import make_encoder
from qscope_jax.files.source import resolve
from qscope_jax.sae.formats import layers_of
from qscope_jax.sae.quality import init_quality, sink_threshold, summarize, update_quality

PROMPTS = ("The capital of Japan is", "The capital of France is")
TEXT = (
    "A residual stream carries what every layer has written so far. Some of its directions stand for a language, some "
    "for a register, and many for nothing that a person would name.\n"
    "Вечером город становится тише, и только поезда напоминают о дороге.\n"
    "清晨的市场里,卖菜的人把青菜一把一把地摆好。\n"
    "Am Rand des Waldes steht ein altes Haus, dessen Fenster im Winter leuchten.\n"
    "def mean(values):\n    return sum(values) / len(values)\n"
)

# Published by third parties for the real files (5-token prompts without BOS; FVU on some 2,700 mixed tokens).
PUBLISHED = {
    "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50": {
        "fvu": {14: 0.6855},
        "cosine": {20: 0.94},
        "top": {20: {PROMPTS[0]: ((18023, 134.9), (8105, 178.5)), PROMPTS[1]: ((24406, 157.7), (29239, 172.4))}},
    },
    "SAE-Res-Qwen3.5-2B-Base-W32K-L0_50": {"fvu": {12: 0.2849}},
    "SAE-Res-Qwen3.5-9B-Base-W64K-L0_50": {"fvu": {16: 0.35}},
}


@dataclass(frozen=True)
class Config:
    """Compare this library with the release's torch formula on the same text."""

    model: Annotated[str, tyro.conf.Positional]
    """A Qwen checkpoint: folder, or owner/name[@revision] on the hub."""
    sae: Annotated[str, tyro.conf.Positional]
    """Its Qwen-Scope SAEs: folder, or owner/name[@revision] on the hub."""
    layers: tuple[int, ...] = ()
    """Layers to compare; by default all for which there is an SAE."""
    text: Path | None = None
    """A UTF-8 text file; by default a short text in five languages and two prompts."""
    max_tokens: int = 2048
    """The text is cut after so many tokens."""


class Reading(NamedTuple):
    """Of one document: residuals [l, t, d], and codes [l, t, k]."""

    residual: np.ndarray
    values: np.ndarray
    indices: np.ndarray


def main(config: Config) -> None:
    """Prints one line per layer, then the published values that concern these files."""
    layers = config.layers or layers_of(config.sae)
    text = config.text.read_text(encoding="utf-8") if config.text else TEXT
    tokenizer = load_tokenizer(config.model)
    documents = [ids[: config.max_tokens].astype(np.int32) for ids in make_encoder(tokenizer)([text, *PROMPTS])]
    ours, backbone_config, saes = read_ours(config, layers, documents, "float32")
    fast, _, _ = read_ours(config, layers, documents, "bfloat16")
    torch_side = read_torch(config, layers, documents, saes)
    print(f"{len(documents[0])} tokens, {backbone_config.num_layers} layers, k = {saes[layers[0]].config.k}\n")
    print("layer  rel. L2 torch  indices torch   indices fast      FVU   cosine  FVU without sinks")
    for i, layer in enumerate(layers):
        quality, kept = (measure(saes[layer], ours[0].residual[i], without_sinks=flag) for flag in (False, True))
        against = "            -              -"
        if torch_side:
            against = f"{relative_l2(ours[0], torch_side[0], i):>15.2e} {agreement(ours[0], torch_side[0], i):>14.4%}"
        figures = f"{quality['fvu']:>8.4f} {quality['cosine']:>8.4f} {kept['fvu']:>18.4f}"
        print(f"{layer:>5}{against} {agreement(ours[0], fast[0], i):>14.2%} {figures}")
    print_published(config, tokenizer, layers, documents, ours)


def read_ours(config: Config, layers: tuple[int, ...], documents: list[np.ndarray], dtype: str):
    """Residuals and codes of this library, with the config and SAEs used."""
    backbone, saes = load_backbone(config.model, dtype=dtype), load_saes(config.sae, layers, dtype=dtype)

    @jax.jit
    def step(params, saes, tokens):
        residual = forward(
            params, backbone.config, tokens, capture=layers, stop_after=max(layers), logits="none"
        ).captured[:, 0]
        codes = [encode(sae, x) for sae, x in zip(saes, residual, strict=True)]
        return residual, jnp.stack([c.values for c in codes]), jnp.stack([c.indices for c in codes])

    readings = []
    for tokens in documents:
        check_tokens(tokens, backbone.config)
        readings.append(Reading(*map(np.asarray, step(backbone.params, tuple(saes.values()), tokens[None]))))
    return readings, backbone.config, saes


def read_torch(config: Config, layers: tuple[int, ...], documents: list[np.ndarray], saes: dict[int, Sae]):
    """The same by the model cards' code, or None where torch is not installed."""
    try:
        import torch
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("torch is not installed: only the two modes of this library are compared\n")
        return None
    place = resolve(config.model, what="model")
    for name in place.names():
        if name.endswith((".json", ".safetensors")):
            place.fetch(name)
    folder = place.fetch("config.json").parent
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    caught: dict[int, Any] = {}
    for layer in layers:
        model.model.layers[layer].register_forward_hook(
            lambda _, __, out, layer=layer: caught.update({layer: out[0] if isinstance(out, tuple) else out})
        )
    weights = {layer: _torch_weights(config.sae, layer) for layer in layers}
    readings = []
    with torch.inference_mode():
        for tokens in documents:
            model(torch.from_numpy(tokens[None].astype(np.int64)))
            parts = []
            for layer in layers:
                w_enc, b_enc = weights[layer]
                x = caught[layer].reshape(-1, w_enc.shape[1])
                values, indices = torch.topk(x @ w_enc.T + b_enc, saes[layer].config.k, dim=-1)
                parts.append((x.numpy(), torch.relu(values).numpy(), indices.numpy()))
            readings.append(Reading(*(np.stack(part) for part in zip(*parts, strict=True))))
    return readings


def _torch_weights(source: str, layer: int):
    """W_enc and b_enc of a released file, read by torch itself."""
    import torch

    state = torch.load(resolve(source, what="sae").fetch(f"layer{layer}.sae.pt"), weights_only=True)
    return state["W_enc"].float(), state["b_enc"].float()


def relative_l2(a: Reading, b: Reading, i: int) -> float:
    return float(np.linalg.norm(a.residual[i] - b.residual[i]) / np.linalg.norm(b.residual[i]))


def agreement(a: Reading, b: Reading, i: int) -> float:
    """Share of b's active features that a has active too, over all tokens."""
    both = (a.indices[i][:, :, None] == b.indices[i][:, None, :]) & (a.values[i][:, :, None] > 0)
    active = b.values[i] > 0
    return float((both.any(axis=1) & active).sum() / max(active.sum(), 1))


def measure(sae: Sae, residual: np.ndarray, *, without_sinks: bool) -> dict[str, float]:
    x = jnp.asarray(residual, jnp.float32)
    limit = sink_threshold(np.linalg.norm(residual, axis=-1)) if without_sinks else float("inf")
    return summarize(jax.jit(update_quality)(init_quality(sae.config), sae, x, sink_threshold=limit))


def print_published(config: Config, tokenizer: Any, layers: tuple[int, ...], documents, ours: list[Reading]) -> None:
    """The few published figures for these files, beside what is seen here."""
    known = PUBLISHED.get(resolve(config.sae, what="sae").name)
    if known is None:
        print("\nNo published values are known for these SAEs.")
        return
    print("\nPublished by others (their text differs for FVU):")
    for what in ("fvu", "cosine"):
        for layer, value in known.get(what, {}).items():
            print(f"  layer {layer}: {what} about {value}")
    for layer, prompts in known.get("top", {}).items():
        if layer not in layers:
            continue
        for prompt, features in prompts.items():
            reading, tokens = ours[1 + PROMPTS.index(prompt)], documents[1 + PROMPTS.index(prompt)]
            for position, (feature, value) in zip((-2, -1), features, strict=True):
                here = (
                    reading.indices[layers.index(layer)][position][0],
                    reading.values[layers.index(layer)][position][0],
                )
                token = tokenizer.decode([int(tokens[position])])
                print(f"  layer {layer}, {token!r}: published {feature} at {value}; here {here[0]} at {here[1]:.1f}")


if __name__ == "__main__":
    main(tyro.cli(Config))
