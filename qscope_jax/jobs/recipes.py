"""Steering as options of a command: recipe files, and features with one strength."""

import dataclasses
import re
from pathlib import Path
from typing import Literal

from qscope_jax.files.source import Source
from qscope_jax.jobs.places import bind
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae
from qscope_jax.steering import Steer, load_recipe
from qscope_jax.steering.recipe import Mode, Units
from qscope_jax.steering.units import Stats

_FEATURE = re.compile(r"(\d+):(\d+)")


@dataclasses.dataclass(frozen=True)
class SteerOptions:
    """The options; commands inherit them."""

    steer: tuple[Path, ...] = ()
    """Recipe files (TOML or JSON), made for this model and these SAEs; all of them are applied together."""
    feature: tuple[str, ...] = ()
    """Features LAYER:INDEX to steer, such as 3:314, all with the options below."""
    strength: float | None = None
    """How strongly; in --units. Mode `ablate` takes none."""
    mode: Mode = "add"
    """What is done: see README, Steering."""
    units: Literal["auto", "raw", "xmax", "xnorm"] = "auto"
    """Of --strength: xmax (multiples of the feature's largest activation; the default, needs statistics), xnorm (of the
    layer's median residual norm), raw (of the direction as stored)."""
    positions: str = "all"
    """Tokens to steer: all, prompt, generated, last (of the prompt), 5, 3-7, or 0,2,5-8."""
    preserve_norm: bool = False
    """Give every steered token the norm that it had."""
    statistics: str | None = None
    """What `qscope features build` made; by default what stands beside the SAEs."""


def chosen_entries(
    options: SteerOptions, model: Source, sae: Source, stats: Stats | None, *, k: int | None
) -> list[Steer]:
    """The entries that the options name, of all recipe files and then of --feature; `k` overrules that of the SAEs.

    Raises:
      FormatError: a recipe file that is damaged or empty, or made for another model, SAE or k.
      ValueError: an option that does not fit, named.
    """
    entries = [entry for path in options.steer for entry in load_recipe(path, lambda n: bind(model, sae, n, k=k))]
    return entries + [_entry(options, *parse_feature(text), stats) for text in options.feature]


def units_of(options: SteerOptions, stats: Stats | None) -> Units:
    """The units of --strength; for modes that have none, raw.

    Raises:
      ValueError: there are no statistics and no --units: what a number means is never guessed.
    """
    if options.units != "auto":
        return options.units
    if options.mode in ("ablate", "scale"):
        return "raw"
    if stats is None:
        raise ValueError(
            "no statistics stand beside these SAEs, so --strength has no units: give --statistics FOLDER (made by "
            "qscope features build), or say --units raw, or --units xnorm where the SAE's config has sink thresholds"
        )
    return "xmax"


def parse_feature(text: str) -> tuple[int, int]:
    """`LAYER:INDEX` as numbers.

    Raises:
      ValueError: not two numbers.
    """
    match = _FEATURE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"--feature {text}: expected LAYER:INDEX, for example 3:314")
    return int(match[1]), int(match[2])


def load_needed(entries: list[Steer], sae: Source, k: int | None, mesh=None) -> dict[int, Sae]:
    """The SAEs of the layers whose features are steered."""
    layers = sorted({entry.layer for entry in entries if entry.feature is not None})
    return load_saes(sae, layers, k=k, mesh=mesh)


def _entry(options: SteerOptions, layer: int, feature: int, stats: Stats | None) -> Steer:
    return Steer(
        layer, feature, options.strength, options.mode, units_of(options, stats), options.positions,
        options.preserve_norm,
    )  # fmt: skip
