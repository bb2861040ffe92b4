"""The model card (README.md) of a folder of trained SAEs: what they are, how to use them, how good they measured.

Everything in it is told by the caller or read off the arguments; a figure that was not measured has no column.
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from qscope_jax.sae.formats.find import layer_file_name, layer_ranges
from qscope_jax.sae.model import SaeConfig
from qscope_jax.sae.quality import SINK_FACTOR

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")
_TAGS = ("sparse-autoencoder", "topk", "interpretability", "qscope-jax")
_IN_TRAINING = "dead_in_training"  # the one metric that is not of held-out data
# metric of `quality` -> heading and format; in the order of the table
_COLUMNS: dict[str, tuple[str, str]] = {
    "fvu": ("FVU", "{:.4f}"),
    "explained_variance": ("explained variance", "{:.4f}"),
    "l0": ("L0", "{:.1f}"),
    "dead_fraction": ("dead", "{:.2%}"),
    _IN_TRAINING: ("silent for {tokens:,} tokens in training", "{:.2%}"),
    "cosine": ("cosine", "{:.4f}"),
    "ce_recovered": ("CE recovered", "{:.4f}"),
    "kl": ("KL, nats", "{:.4f}"),
    "sink_fraction": ("masked sinks", "{:.3%}"),
}
_EXPLAINED = {
    "fvu": "FVU is the squared error over the variance about the mean, both summed over all tokens and dimensions.",
    "dead_fraction": "A latent is dead if it fired on none of these tokens; on more tokens fewer are.",
    _IN_TRAINING: "Those silent in training fired on none of its last tokens, so many or more.",
    "ce_recovered": (
        "CE recovered is (CE with the layer zeroed - CE with the SAE spliced in) / (CE with it zeroed - CE as it is)."
    ),
    "kl": "KL is that of the model with the SAE spliced in from the model as it is, per token.",
    "sink_fraction": "Masked sinks are real tokens that count nowhere in a row because of their norm.",
}


@dataclasses.dataclass(frozen=True)
class Card:
    """What a model card tells of one folder of SAEs.

    Attributes:
      title: its heading; a repository's name does well.
      config: the shape, k and backbone that all SAEs of the folder share; its layer and threshold are not used.
      quality: layer -> metrics by their names in quality.json, for every SAE in the folder; {} where nothing was
        measured. Nested values and what is None or missing are left out.
      measured_on: what they were measured on, in words.
      recipe: option or fact -> value, as it is to stand in the table of the training.
      data: what the SAEs were trained on, in words, one line per source.
      sink_thresholds: layer -> residual norm above which tokens counted neither in training nor in these figures.
      license: an identifier of the hub; "other" where nothing was decided.
      format: of the files in the folder.
      dead_after: the tokens that `dead_in_training` in `quality` means.
    """

    title: str
    config: SaeConfig
    quality: Mapping[int, Mapping[str, Any]]
    measured_on: str
    recipe: Mapping[str, Any]
    data: Sequence[str]
    sink_thresholds: Mapping[int, float] = dataclasses.field(default_factory=dict)
    license: str = "other"
    format: Literal["safetensors", "qwen-scope"] = "safetensors"
    dead_after: int = 0


def render_card(card: Card) -> str:
    """The card as Markdown, after YAML that the hub reads.

    Raises:
      ValueError: no layer, or the licence is not an identifier.
    """
    if not card.quality:
        raise ValueError("a model card needs at least one layer; give {layer: {}} where nothing was measured")
    check_license(card.license)
    parts = [
        _front_matter(card),
        f"# {_plain(card.title)}",
        _introduction(card),
        _usage(card),
        _quality(card),
        _training(card),
        _sinks(card),
        _notice(card),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def check_license(license: str) -> None:
    """Refuses what is no identifier of a licence on the hub.

    Raises:
      ValueError: it is not.
    """
    if not _LICENSE.fullmatch(license):
        raise ValueError(
            f"license {license!r}: expected an identifier of the hub, such as 'apache-2.0', 'cc-by-4.0' or 'other'"
        )


def _front_matter(card: Card) -> str:
    """JSON's strings and lists are YAML's too."""
    entries: dict[str, Any] = {"license": card.license, "tags": list(_TAGS)}
    if _on_hub(card.config.backbone):
        entries["base_model"] = card.config.backbone
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
    return "\n".join(["---", *lines, "---"])


def _introduction(card: Card) -> str:
    config, layers = card.config, sorted(card.quality)
    backbone = f"[{config.backbone}](https://huggingface.co/{config.backbone})" if _on_hub(config.backbone) else None
    of = backbone or (f"`{_plain(config.backbone)}`" if config.backbone else "a model that is not named")
    return (
        f"TopK sparse autoencoders (SAEs) for the residual stream of {of}: one for each of {len(layers)} layers "
        f"({layer_ranges(layers)}), each with {config.d_sae:,} latents over {config.d_model:,} dimensions "
        f"({config.d_sae / config.d_model:.3g}x), of which at most {config.k} are active per token. "
        "Layer n is the output of decoder layer n, counted from 0, before the final norm; an SAE takes it raw, "
        "without centring or scaling. Trained with `qscope train-sae`; file layout and formula are those of the "
        "Qwen-Scope releases."
    )


def _usage(card: Card) -> str:
    layer = sorted(card.quality)[len(card.quality) // 2]
    name, d, k = layer_file_name(card.format, layer), card.config.d_model, card.config.k
    if card.format == "safetensors":
        load = f'from safetensors.torch import load_file\n\nsae = load_file("{name}")'
    else:
        load = f'sae = torch.load("{name}", map_location="cpu", weights_only=True)'
    return f"""## Use

With qscope-jax; the source is this folder or, once it is there, its name on the hub:

```python
import jax.numpy as jnp
import qscope_jax as qs

sae = qs.load_sae(".", layer={layer})
x = jnp.zeros((1, {d}))  # in its place the output of decoder layer {layer}, [..., {d}]
code = qs.encode(sae, x)  # values and indices, [..., {k}], strongest first
x_hat = qs.decode(sae, code)
```

With torch alone:

```python
import torch
{load}
x = torch.zeros(1, {d})
values, indices = (x @ sae["W_enc"].T + sae["b_enc"]).topk({k})
values = values.relu()
latents = torch.zeros(1, {card.config.d_sae}).scatter(-1, indices, values)
x_hat = latents @ sae["W_dec"].T + sae["b_dec"]  # columns of W_dec are the features' directions
```"""


def _quality(card: Card) -> str:
    rows = [card.quality[layer] for layer in sorted(card.quality)]
    shown = [key for key in _COLUMNS if any(_is_number(row.get(key)) for row in rows)]
    words = [_measured(card, rows, shown), *(_EXPLAINED[key] for key in shown if key in _EXPLAINED)]
    parts = ["## Quality", " ".join(words)]
    if shown:
        head = ["layer", *(_COLUMNS[key][0].format(tokens=card.dead_after) for key in shown)]
        cells = [
            [str(layer), *(_COLUMNS[key][1].format(row[key]) if _is_number(row.get(key)) else "" for key in shown)]
            for layer, row in zip(sorted(card.quality), rows, strict=True)
        ]
        parts.insert(1, _table(head, cells))
    return "\n\n".join(parts)


def _measured(card: Card, rows: Sequence[Mapping[str, Any]], shown: Sequence[str]) -> str:
    """On what, and on how many tokens each figure is."""
    if not set(shown) - {_IN_TRAINING}:
        return "Nothing was measured. `qscope eval-sae` does."
    text = f"Measured on {card.measured_on}"
    if (tokens := _span(row.get("tokens") for row in rows)) is not None:
        text += f": in a layer, {tokens} tokens that count"
    if (predicted := _span(row.get("predicted_tokens") for row in rows)) is not None and {"ce_recovered", "kl"} & set(
        shown
    ):
        text += f"; CE and KL on {predicted} predicted tokens, the first of them"
    return text + "."


def _span(values: Iterable[Any]) -> str | None:
    """The least and the greatest number; None if there is none."""
    if not (known := [round(value) for value in values if _is_number(value)]):
        return None
    least, greatest = min(known), max(known)
    return f"{least:,}" if least == greatest else f"{least:,} to {greatest:,}"


def _training(card: Card) -> str:
    rows = [[_plain(key), _plain(_value(value))] for key, value in card.recipe.items()]
    parts = ["## Training", "\n".join(f"- {_plain(line)}" for line in card.data)]
    return "\n\n".join([part for part in parts if part] + ([_table(["option", "value"], rows)] if rows else []))


def _sinks(card: Card) -> str:
    known = {layer: value for layer, value in sorted(card.sink_thresholds.items()) if layer in card.quality}
    if not known:
        return ""
    rows = [[str(layer), f"{value:.6g}"] for layer, value in known.items()]
    return (
        "## Sinks\n\nRare tokens of Qwen models have residuals of 100 to 1000 times the usual norm. Tokens above the "
        f"norms below, {SINK_FACTOR:g} times the layer's median, were left out of training and of the figures above; "
        "what the SAEs make of such tokens is undefined. `config.json` holds the thresholds.\n\n"
        f"{_table(['layer', 'norm'], rows)}"
    )


def _notice(card: Card) -> str:
    license = (
        "Whoever trained these SAEs has not stated a licence."
        if card.license == "other"
        else f"The SAEs are offered under `{card.license}`."
    )
    return f"""## Notice

These SAEs are not the work of the Qwen team and no part of its release. {license} The model that they were trained on
has a licence of its own, and terms of the data may apply too: read them before you use or pass on what is here.

SAEs are instruments of research. The makers of Qwen-Scope prohibit using their SAEs outside science to interfere with
the capabilities of models; keep to that here as well. A latent is not a concept: names given to latents, and effects of
steering with them, are hypotheses to test. On another checkpoint than the one above, an instruct model for example,
measure first (`qscope eval-sae`).

The architecture follows *Qwen-Scope* ([arXiv:2605.11887](https://arxiv.org/abs/2605.11887)) and *Scaling and
evaluating sparse autoencoders* ([arXiv:2406.04093](https://arxiv.org/abs/2406.04093))."""


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return ", ".join(map(_value, value)) if isinstance(value, list | tuple) else str(value)


def _plain(text: str) -> str:
    """One line of text that cannot break a table, a list or a heading."""
    return " ".join(text.split()).replace("|", "\\|")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _on_hub(backbone: str | None) -> bool:
    return backbone is not None and _HUB_ID.fullmatch(backbone) is not None
