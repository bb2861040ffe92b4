"""What each place says about an SAE, and the one configuration they must agree on.

A set's name, its config.json, a file's name, its metadata and its tensors each state some facts. None is believed over
another: where two differ, loading stops and both are named. Only an explicit k overrules, and says so.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from qscope_jax.files.recognise import FormatError
from qscope_jax.sae.model import SaeConfig
from qscope_jax.sae.release import SetName

_LAYER_FOLDER = re.compile(r"(?:layers?|blocks)[._-]?(\d{1,4})(?:\.hook_resid_post)?")


class Facts(NamedTuple):
    """What one place (`origin`, in words for messages) says; None where it is silent."""

    origin: str
    d_model: int | None = None
    d_sae: int | None = None
    k: int | None = None
    layer: int | None = None
    layers: int | None = None
    """How many layers the backbone has."""
    backbone: str | None = None
    sink_threshold: float | None = None
    source: str | None = None


def facts_of_name(name: SetName) -> Facts:
    """What a set's name says; a released set's name also tells d_model and the number of layers."""
    row = name.released
    origin = f"the name {name.name}"
    if row is None:
        return Facts(origin, d_sae=name.d_sae, k=name.k, backbone=name.backbone)
    return Facts(origin, row.d_model, row.d_sae, row.k, layers=row.layers, backbone=f"Qwen/{row.backbone}")


def layer_of_folder(name: str) -> int | None:
    """The layer that a folder's name tells: `layers.10`, `layer10`, `blocks.10.hook_resid_post`."""
    found = _LAYER_FOLDER.fullmatch(name)
    return int(found[1]) if found else None


def settle(where: str, facts: Sequence[Facts], *, k: int | None = None) -> SaeConfig:
    """The configuration that all facts agree on; an explicit `k` wins over theirs (see `overruled`).

    Raises:
      FormatError: two places disagree, k is unknown or larger than d_sae, or the layer is out of range.
    """
    said = _agreed(where, facts, "k") if k is None else k
    d_model, d_sae = _agreed(where, facts, "d_model"), _agreed(where, facts, "d_sae")
    layer, layers = _agreed(where, facts, "layer"), _agreed(where, facts, "layers")
    if d_model is None or d_sae is None:
        raise FormatError(f"{where}: the widths are unknown")
    if said is None:
        raise FormatError(
            f"{where}: k is unknown: no config.json, no metadata and no set name (like ...-L0_50) states it; "
            "give it as k=50"
        )
    if not 0 < said <= d_sae:
        raise FormatError(f"{where}: k = {said} must lie in 1..{d_sae}, the number of latents")
    if layer is not None and not 0 <= layer < (layers or layer + 1):
        raise FormatError(f"{where}: layer {layer} is out of range: the backbone has the layers 0..{(layers or 1) - 1}")
    return SaeConfig(
        d_model=d_model,
        d_sae=d_sae,
        k=said,
        layer=layer,
        backbone=_first(facts, "backbone"),
        source=_first(facts, "source"),
        sink_threshold=_agreed(where, facts, "sink_threshold"),
    )


def overruled(facts: Sequence[Facts], k: int | None) -> str:
    """What an explicit k overrules, in words; empty where nothing is."""
    others = origins_of(facts, "k")
    others.pop(k, None)
    return "; ".join(f"it is {value} according to {' and '.join(origins)}" for value, origins in others.items())


def origins_of(facts: Sequence[Facts], field: str) -> dict:
    """value -> the places that state it, in words."""
    found: dict = {}
    for fact in facts:
        value = getattr(fact, field)
        if value is not None:
            found.setdefault(value, []).append(fact.origin)
    return found


def _agreed(where: str, facts: Sequence[Facts], field: str) -> Any:
    found = origins_of(facts, field)
    if len(found) > 1:
        sides = ", but ".join(f"{value} according to {' and '.join(origins)}" for value, origins in found.items())
        remedy = (
            "give k= to decide" if field == "k" else "one of them belongs to another SAE: check what was downloaded"
        )
        raise FormatError(f"{where}: {field} is {sides}; {remedy}")
    return next(iter(found), None)


def _first(facts: Sequence[Facts], field: str):
    return next((getattr(fact, field) for fact in facts if getattr(fact, field) is not None), None)
