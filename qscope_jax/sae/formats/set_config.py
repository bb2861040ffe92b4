"""The config.json of a folder of SAEs: what the files themselves cannot say.

    {"format": "qscope-sae", "d_model": 2048, "d_sae": 32768, "k": 50, "backbone": "Qwen/Qwen3-1.7B-Base",
     "hook": "resid_post", "source": "...", "sink_thresholds": {"0": 812.5}}

The release's own dialect ({"model_type": "topk_sae", ...}) is read too and never written over.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, Literal, overload

from qscope_jax.files.atomic import write_json
from qscope_jax.files.recognise import FormatError
from qscope_jax.sae.formats.facts import Facts
from qscope_jax.sae.formats.json_file import read_json, suggest
from qscope_jax.sae.model import SaeConfig

FORMAT = "qscope-sae"
HOOK = "resid_post"  # the output of a decoder layer, before the final norm


@dataclasses.dataclass(frozen=True)
class SetConfig:
    """One folder of SAEs, one SAE per layer, all of one shape."""

    d_model: int
    d_sae: int
    k: int
    backbone: str | None = None
    hook: str = HOOK
    source: str | None = None
    sink_thresholds: dict[int, float] = dataclasses.field(default_factory=dict)
    layers: int | None = None
    """Number of layers of the backbone, where it is stated."""

    def facts(self, layer: int | None) -> Facts:
        """What the file says about the SAE of one layer."""
        return Facts(
            origin="config.json",
            d_model=self.d_model,
            d_sae=self.d_sae,
            k=self.k,
            layers=self.layers,
            backbone=self.backbone,
            source=self.source,
            sink_threshold=None if layer is None else self.sink_thresholds.get(layer),
        )


_TYPES: dict[str, tuple[type, ...]] = {
    "format": (str,),
    "d_model": (int,),
    "d_sae": (int,),
    "k": (int,),
    "backbone": (str, type(None)),
    "hook": (str,),
    "source": (str, type(None)),
    "sink_thresholds": (dict,),
    "layers": (int, type(None)),
}
_RELEASE = {"d_model": "d_model", "d_sae": "d_sae", "k": "k", "base_model": "backbone", "num_layers": "layers"}


@overload
def read_set_config(path: str | os.PathLike[str], *, foreign_ok: Literal[False] = False) -> SetConfig: ...


@overload
def read_set_config(path: str | os.PathLike[str], *, foreign_ok: bool) -> SetConfig | None: ...


def read_set_config(path: str | os.PathLike[str], *, foreign_ok: bool = False) -> SetConfig | None:
    """Reads a config.json in our form or the release's; with `foreign_ok`, None for anything else's.

    Raises:
      FileNotFoundError: there is no such file.
      FormatError: not JSON, a key twice, unknown or of a wrong type, or the configuration of something else.
    """
    path = Path(path)
    content = read_json(path)
    if content.get("model_type") == "topk_sae":
        return _from_release(path, content)
    if content.get("format") != FORMAT:
        if foreign_ok:
            return None
        found = content.get("model_type") or content.get("format")
        what = (
            f"the configuration of a {found!r} model" if found else f"a JSON file with {', '.join(list(content)[:4])}"
        )
        raise FormatError(f'{path}: expected "format": "{FORMAT}", found {what}; name the folder that holds SAEs')
    for key, value in content.items():
        if key not in _TYPES:
            raise FormatError(f"{path}: unknown key {key!r}{suggest(key, _TYPES)}")
        _check_type(path, key, value, _TYPES[key])
    missing = [key for key in ("d_model", "d_sae", "k") if key not in content]
    if missing:
        raise FormatError(f"{path}: {', '.join(missing)} is missing")
    _check_hook(path, content.get("hook", HOOK))
    thresholds = _thresholds(path, content.get("sink_thresholds", {}))
    rest = {key: value for key, value in content.items() if key not in ("format", "sink_thresholds")}
    return SetConfig(**rest, sink_thresholds=thresholds)


def update_set_config(folder: Path, config: SaeConfig) -> None:
    """Writes or completes the config.json of a folder into which one more SAE is about to be written.

    Raises:
      FormatError: the folder's config.json is of another kind of SAE, or of something else.
    """
    path = folder / "config.json"
    thresholds: dict[int, float] = {}
    if path.exists():
        old = read_set_config(path)
        for field in ("d_model", "d_sae", "k"):
            if getattr(old, field) != getattr(config, field):
                raise FormatError(
                    f"{path}: {field} is {getattr(old, field)}, the SAE to be written has {getattr(config, field)}; "
                    "write it to another folder"
                )
        if read_json(path).get("format") != FORMAT:
            return
        thresholds = {layer: value for layer, value in old.sink_thresholds.items() if layer != config.layer}
    if config.layer is not None and config.sink_threshold is not None:
        thresholds = {**thresholds, config.layer: config.sink_threshold}
    content = {
        "format": FORMAT,
        "d_model": config.d_model,
        "d_sae": config.d_sae,
        "k": config.k,
        "backbone": config.backbone,
        "hook": HOOK,
        "source": config.source,
        "sink_thresholds": {str(layer): thresholds[layer] for layer in sorted(thresholds)},
    }
    write_json(path, content)


def _from_release(path: Path, content: dict[str, Any]) -> SetConfig:
    _check_hook(path, content.get("hook_point", HOOK))
    values = {ours: content.get(theirs) for theirs, ours in _RELEASE.items()}
    for theirs, ours in _RELEASE.items():
        _check_type(path, theirs, values[ours], _TYPES[ours])
    return SetConfig(**values)  # type: ignore[arg-type]  # the types were checked above


def _check_type(path: Path, key: str, value: Any, types: tuple[type, ...]) -> None:
    if not isinstance(value, types) or isinstance(value, bool):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise FormatError(f"{path}: {key!r} must be {names}, found {value!r}")
    if isinstance(value, int) and value <= 0:
        raise FormatError(f"{path}: {key!r} must be positive, found {value}")


def _check_hook(path: Path, hook: Any) -> None:
    if hook != HOOK:
        raise FormatError(f"{path}: the hook is {hook!r}; only {HOOK!r} (the output of a decoder layer) is supported")


def _thresholds(path: Path, table: dict[str, Any]) -> dict[int, float]:
    for layer, value in table.items():
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not layer.isdecimal() or not number or not math.isfinite(value) or value <= 0:
            raise FormatError(
                f"{path}: sink_thresholds must map layers to positive numbers, found {layer!r}: {value!r}"
            )
    return {int(layer): float(value) for layer, value in table.items()}
