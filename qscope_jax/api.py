"""The names of the articles over the functions below: a model with its SAEs, a search for features, an intervention.

    model = SAEModel.from_pretrained("demo")
    best = FeatureExplorer(model, layer=3).discover_top_features("chinese")
    print(model.generate("The old king", intervention=Intervention().activate(best[0], strength=1.0)))

Nothing is computed here: `load_backbone`, `discover`, `steer` and `generate` do it, and take more options.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import jax.numpy as jnp

from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder
from qscope_jax.extract import check_sae
from qscope_jax.features.concepts import text_sets
from qscope_jax.features.discovery import FoundFeature, discover
from qscope_jax.features.files import check_statistics, statistics_of
from qscope_jax.files.source import Source, resolve
from qscope_jax.generation import generate, pad_left
from qscope_jax.sae.formats import layers_of, load_sae
from qscope_jax.sae.model import Sae
from qscope_jax.sae.release import parse_name
from qscope_jax.steering import Steer, steer
from qscope_jax.steering.units import Stats


class Layers(Mapping[int, Sae]):
    """The SAEs of a source by layer; each is read when it is first asked for, and kept."""

    def __init__(self, source: Source, options: Mapping[str, Any]):
        self._source, self._options, self._read = source, dict(options), dict[int, Sae]()
        self._layers = layers_of(source)

    def __getitem__(self, layer: int) -> Sae:
        if layer not in self._layers:
            raise KeyError(layer)
        if layer not in self._read:
            self._read[layer] = load_sae(self._source, layer, **self._options)
        return self._read[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self._layers)

    def check(self, statistics: Stats | None, layers: Sequence[int]) -> None:
        """Refuses statistics of other SAEs; see `check_statistics`."""
        check_statistics(statistics, self._source, layers)

    def __len__(self) -> int:
        return len(self._layers)


@dataclass(frozen=True)
class Intervention:
    """Features to raise or lower while a model writes; every method returns another one, with an entry more.

    Strengths are in `xmax`: 1 adds a feature at the height of its largest activation on text.
    """

    entries: tuple[Steer, ...] = ()

    def activate(
        self,
        feature: FoundFeature | int,
        strength: float = 1.0,
        *,
        layer: int | None = None,
        mode: Literal["add", "min-clamp"] = "add",
        **options: Any,
    ) -> "Intervention":
        """Adds a feature's direction at `strength`.

        Args:
          feature: what `discover_top_features` found, or an index with its `layer`.
          strength: in multiples of the feature's largest activation, above 0.
          layer: of a feature given by its index.
          mode: "add", or "min-clamp", which adds what the feature lacks to that height and nothing where it is active.
          options: others of `Steer`: `units`, `positions`, `preserve_norm`.

        Raises:
          ValueError: no layer, a strength that is not above 0, or what `Steer` refuses.
        """
        return self._with(feature, strength, 1.0, layer, {"mode": mode, **options})

    def suppress(
        self, feature: FoundFeature | int, strength: float = 1.0, *, layer: int | None = None, **options: Any
    ) -> "Intervention":
        """Subtracts a feature's direction at `strength`; arguments and errors are those of `activate`."""
        return self._with(feature, strength, -1.0, layer, options)

    def ablate(
        self, feature: FoundFeature | int, *, layer: int | None = None, positions: str = "all"
    ) -> "Intervention":
        """Takes a feature away wherever it is active; arguments and errors are those of `activate`."""
        place = _place(feature, layer)
        return Intervention((*self.entries, Steer(*place, mode="ablate", positions=positions)))

    def _with(self, feature, strength: float, sign: float, layer: int | None, options) -> "Intervention":
        place = _place(feature, layer)
        if not strength > 0:
            raise ValueError(f"strength = {strength}; expected above 0: activate() raises and suppress() lowers")
        return Intervention((*self.entries, Steer(*place, sign * strength, **{"units": "xmax", **options})))


@dataclass(frozen=True)
class SAEModel:
    """A backbone, its tokenizer and its SAEs; data without behaviour of its own.

    `statistics` are per layer what units such as `xmax` are measured by; None where there are none.
    """

    backbone: Backbone
    tokenizer: Any
    saes: Mapping[int, Sae]
    statistics: Stats | None = field(default=None, repr=False)

    @classmethod
    def from_pretrained(
        cls,
        source: str | os.PathLike[str] = "demo",
        *,
        model: str | os.PathLike[str] | None = None,
        statistics: str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        mesh: Any = None,
    ) -> "SAEModel":
        """Opens a set of SAEs and the model they were trained on; the SAE of a layer is read when it is needed.

        Args:
          source: of the SAEs, such as "demo" or "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50".
          model: source of the model; by default the one that the set's name tells. SAEs of a base model on its instruct
            sibling are a common choice.
          statistics: what `qscope features build` made; by default those that stand beside the SAEs.
          dtype: "float32" or "bfloat16", see `load_backbone`.
          mesh: see `make_mesh`.

        Raises:
          SourceError: a source cannot be had.
          ValueError: the model is not known, or model, tokenizer and SAEs do not belong together.
        """
        found = resolve(source, what="sae")
        place = _model_of(found) if model is None else os.fspath(model)
        backbone, tokenizer = load_backbone(place, dtype=dtype, mesh=mesh), load_tokenizer(place)
        check_vocabulary(tokenizer, backbone.config.vocab_size)
        saes = Layers(found, {"mesh": mesh})
        for layer in list(saes)[:1]:
            check_sae(backbone.config, layer, saes[layer].config)
        return cls(backbone, tokenizer, saes, statistics_of(found, statistics))

    @overload
    def generate(self, text: str, **options: Any) -> str: ...
    @overload
    def generate(self, text: list[str] | tuple[str, ...], **options: Any) -> list[str]: ...
    def generate(
        self,
        text: str | list[str] | tuple[str, ...],
        *,
        intervention: Intervention | None = None,
        max_new_tokens: int = 64,
        seed: int = 0,
        **options: Any,
    ) -> str | list[str]:
        """What the model writes after `text`, a string or several; only the continuation is returned.

        Args:
          text: prompts, taken as plain text.
          intervention: what to change while it reads and writes.
          max_new_tokens: at most so many tokens.
          seed: of the first text; the i-th has seed + i. It matters with a temperature above 0.
          options: others of `generate`, such as temperature.

        Raises:
          ValueError: what `generate` or `steer` refuses; for `xmax` without statistics it says how to make them.
        """
        texts = [text] if isinstance(text, str) else list(text)
        tokens, mask = map(jnp.asarray, pad_left(make_encoder(self.tokenizer)(texts)))
        seeds = [seed + i for i in range(len(texts))]
        out = generate(
            self.backbone.params, self.backbone.config, tokens, mask=mask, tap=self._tap(intervention),
            max_new_tokens=max_new_tokens, seeds=seeds, **options,
        )  # fmt: skip
        rows = zip(out.tokens, out.lengths, strict=True)
        written = [self.tokenizer.decode(row[:length], skip_special_tokens=True) for row, length in rows]
        return written[0] if isinstance(text, str) else written

    def _tap(self, intervention: Intervention | None):
        if intervention is None:
            return None
        layers = sorted({entry.layer for entry in intervention.entries})
        if unknown := [layer for layer in layers if layer not in self.saes]:
            raise ValueError(f"layer {unknown[0]}: the SAEs are of layers {sorted(self.saes)}")
        saes = {layer: self.saes[layer] for layer in layers}
        if isinstance(self.saes, Layers):
            self.saes.check(self.statistics, layers)
        depth = self.backbone.config.num_layers
        return steer(list(intervention.entries), saes, stats=self.statistics, num_layers=depth)


@dataclass(frozen=True)
class FeatureExplorer:
    """Looks for features in one layer of a model, or in all."""

    model: SAEModel
    layer: int | None = None

    def discover_top_features(
        self,
        concept: str | None = None,
        *,
        positive: Sequence[str] | None = None,
        negative: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
        top: int = 10,
        **options: Any,
    ) -> tuple[FoundFeature, ...]:
        """Features that fire on a concept and not elsewhere, best first; half of the texts choose, the rest judge.

        Args:
          concept: the name of texts that ship along, such as "chinese" or "story"; or of whatever `positive` shows.
          positive: texts that show it, at least two.
          negative: texts that do not, or several groups of such by name.
          top: how many features.
          options: others of `discover`.

        Raises:
          ValueError: an unknown concept without texts (the message says how to give them), or too few texts.
        """
        sets = text_sets(concept, positive=positive, negative=negative)
        layers = tuple(self.model.saes) if self.layer is None else (self.layer,)
        if unknown := set(layers) - set(self.model.saes):
            raise ValueError(f"layer {unknown.pop()}: the SAEs are of layers {sorted(self.model.saes)}")
        saes = {layer: self.model.saes[layer] for layer in layers}
        encoder = make_encoder(self.model.tokenizer)
        return discover(self.model.backbone, saes, encoder, sets.positive, sets.negative, top=top, **options).features


def _place(feature: FoundFeature | int, layer: int | None) -> tuple[int, int]:
    """Layer and index of a feature that was found, or that was given by both."""
    if isinstance(feature, FoundFeature):
        return feature.layer, feature.feature
    if layer is None:
        raise ValueError(f"feature {feature}: of which layer? Give layer=...")
    return layer, feature


def _model_of(source: Source) -> str:
    """The model that a set of SAEs belongs to, by its name; the embedded one's own."""
    if source.kind == "demo":
        return "demo"
    named = parse_name(str(source))
    if named is None:
        raise ValueError(f"{source}: which model are these SAEs for? Its name does not tell; give model=...")
    return f"Qwen/{named.backbone}"
