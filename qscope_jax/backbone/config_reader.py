"""Reads the values of a config.json one by one and collects every fault, so that all are reported together.

It knows the types, ranges and spellings of values; which of them a family needs is said in config.py.
"""

import difflib
import json
import sys
import warnings
from pathlib import Path
from typing import Any


class ConfigError(ValueError):
    """A model config that cannot be run exactly; the message names each reason."""


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      ConfigError: the file is no JSON object, or repeats a key.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not a readable config.json ({error})") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, found {type(raw).__name__}")
    return raw


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object hook that refuses what `json` would settle silently by taking the last value."""
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"key given twice: {sorted({n for n in names if names.count(n) > 1})}")
    return result


class Reader:
    """Values of one (text) config; a fault gives None or an empty value and a line in `faults`."""

    def __init__(self, raw: dict[str, Any], outer: dict[str, Any], family: str, where: str):
        self.raw, self.outer, self.family, self.where = raw, outer, family, where
        self.faults: list[str] = []

    def raise_faults(self) -> None:
        if self.faults:
            raise ConfigError(f"{self.where}: " + "; ".join(self.faults))

    def refuse(self, expected: dict[str, tuple[Any, ...]]) -> None:
        """Switches of which only these values are supported; each may be absent."""
        for key, allowed in expected.items():
            if key in self.raw and self.raw[key] not in allowed:
                hint = f"expected {allowed[0]!r}" if allowed else "expected it to be absent"
                self.faults.append(f"{key} = {self.raw[key]!r} is not supported ({hint})")
        if any(part.get("quantization_config") is not None for part in (self.raw, self.outer)):
            self.faults.append("quantised checkpoints are not supported (quantization_config is set)")

    def warn_unknown(self, known: frozenset[str]) -> None:
        for key in sorted(set(self.raw) - known):
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            warnings.warn(f"{self.where}: key {key!r} is unknown and ignored{hint}", stacklevel=5)

    def number(self, key: str, kind: type = int, *, alias: str | None = None) -> Any:
        value = self.raw.get(key)
        if alias is not None and self.raw.get(alias) is not None:
            if value is not None and value != self.raw[alias]:
                self.faults.append(f"{key} = {value!r} and {alias} = {self.raw[alias]!r} contradict each other")
            value = self.raw[alias]
        if value is None:
            self.faults.append(f"{key} is missing")
            return None
        if not _is_positive(value, kind):
            self.faults.append(f"{key} = {value!r} is not a positive {kind.__name__}")
            return None
        return kind(value)

    def flag(self, key: str, *, default: bool | None = None) -> bool:
        """A switch of the text config, else of the outer one; without a default it must be there."""
        value = self.raw.get(key, self.outer.get(key, default))
        if not isinstance(value, bool):
            self.faults.append(f"{key} is {value!r}, expected true or false")
        return bool(value)

    def rope_theta(self) -> Any:
        ropes = self._ropes()
        for rope in ropes:
            kind = rope.get("rope_type", rope.get("type", "default"))
            if kind != "default":
                self.faults.append(f"rope_type {kind!r} is not supported (expected 'default')")
        given = [t for t in (self.raw.get("rope_theta"), *(r.get("rope_theta") for r in ropes)) if t is not None]
        if not given:
            self.faults.append("rope_theta is missing")
        elif wrong := [theta for theta in given if not _is_positive(theta, float)]:
            self.faults.append(f"rope_theta = {wrong[0]!r} is not a positive float")
        elif len(set(given)) > 1:
            self.faults.append(f"rope_theta is given as {' and as '.join(map(repr, given))}")
        else:
            return float(given[0])

    def rotary_dim(self, head_dim: int | None, *, default: float, fixed: bool) -> int:
        """How many of a head's dimensions turn; a family with a `fixed` share allows no other."""
        places = [self.raw, *(rope for key, rope in self._rope_objects() if isinstance(rope, dict))]
        shares = {p["partial_rotary_factor"] for p in places if p.get("partial_rotary_factor") is not None} or {default}
        share = shares.pop()
        if shares or not _is_positive(share, float) or share > 1 or (fixed and share != default):
            want = f"expected {default}" if fixed else "expected one number in (0, 1]"
            self.faults.append(f"partial_rotary_factor = {share!r} is not supported for {self.family} ({want})")
            return 0
        if head_dim is None:
            return 0
        turned = int(head_dim * share)
        if turned < 2 or turned % 2:
            named = f"head_dim = {head_dim}" + (f" x partial_rotary_factor = {share}" if share != 1 else "")
            self.faults.append(f"{named} turns {turned} dimensions; rotary embeddings turn pairs, so it must be even")
        return turned

    def layer_types(self, layers: int | None, kinds: dict[str, str]) -> tuple[Any, ...]:
        """The mixer of every layer; `kinds` are the supported names and ours, the last one stands in full layers."""
        given = self.raw.get("layer_types")
        if given is None:
            interval = self.number("full_attention_interval") if len(kinds) > 1 else 1
            given = [list(kinds)[-1 if (i + 1) % (interval or 1) == 0 else 0] for i in range(layers or 0)]
        if not isinstance(given, list):
            self.faults.append(f"layer_types = {given!r} is not a list")
            return ()
        if unknown := sorted({str(kind) for kind in given} - kinds.keys()):
            expected = " or ".join(map(repr, kinds))
            self.faults.append(f"layer_types {unknown} are not supported for {self.family} (expected {expected})")
        if layers is not None and len(given) != layers:
            self.faults.append(f"layer_types names {len(given)} layers, num_hidden_layers says {layers}")
        return tuple(kinds.get(str(kind), "") for kind in given)

    def eos(self) -> tuple[int, ...]:
        eos = self.raw.get("eos_token_id", self.outer.get("eos_token_id"))
        ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            self.faults.append(f"eos_token_id = {eos!r} is not an id or a list of ids")
            return ()
        return tuple(ids)

    def _rope_objects(self) -> list[tuple[str, Any]]:
        return [(key, self.raw[key]) for key in ("rope_parameters", "rope_scaling") if self.raw.get(key) is not None]

    def _ropes(self) -> list[dict[str, Any]]:
        for key, rope in self._rope_objects():
            if not isinstance(rope, dict):
                self.faults.append(f"{key} is {type(rope).__name__}, expected an object")
        return [rope for _, rope in self._rope_objects() if isinstance(rope, dict)]


def _is_positive(value: Any, kind: type) -> bool:
    """True for a finite positive number of this kind; JSON's readers accept NaN and Infinity."""
    good = isinstance(value, int | float) if kind is float else isinstance(value, int)
    return good and not isinstance(value, bool) and 0 < value <= sys.float_info.max
