"""Which SAE files a source holds, by name alone: nothing is downloaded or opened to answer that.

The one exception are folders of SAELens and sparsify whose name tells no layer: their small cfg.json is read.
"""

import re
from collections.abc import Iterable
from pathlib import PurePosixPath
from types import ModuleType
from typing import Literal, NamedTuple

from qscope_jax.files.recognise import FormatError
from qscope_jax.files.source import Source
from qscope_jax.sae.formats import native, qwen_scope, saelens, sparsify
from qscope_jax.sae.formats.facts import layer_of_folder

Format = Literal["safetensors", "qwen-scope", "saelens", "sparsify"]

_LAYER_FILE = re.compile(r"layer(\d{1,4})\.sae\.(pt|safetensors)")
_BY_ENDING: dict[str, Format] = {
    ".safetensors": "safetensors",
    ".pt": "qwen-scope",
    ".pth": "qwen-scope",
    ".bin": "qwen-scope",
}
_PREFERENCE: tuple[Format, ...] = ("safetensors", "qwen-scope", "saelens", "sparsify")
_FOLDERS: dict[str, tuple[Format, ModuleType]] = {
    saelens.WEIGHTS: ("saelens", saelens),
    sparsify.WEIGHTS: ("sparsify", sparsify),
}


class SaeFile(NamedTuple):
    """One SAE of a source: its format, the name of the file with its weights, and its layer where the name says it."""

    format: Format
    name: str
    layer: int | None


def layer_file_name(format: Format, layer: int) -> str:
    """What the weights of one layer are called in a folder of many."""
    if format == "saelens":
        return f"layer{layer}/{saelens.WEIGHTS}"
    if format == "sparsify":
        return f"layers.{layer}/{sparsify.WEIGHTS}"
    return f"layer{layer}{native.ENDING if format == 'safetensors' else qwen_scope.ENDING}"


def layer_ranges(layers: Iterable[int]) -> str:
    """Layers in words: "0..3, 7"."""
    held = sorted(set(layers))
    starts, ends = ([n for n in held if n + step not in held] for step in (-1, 1))
    return ", ".join(f"{a}..{b}" if a < b else str(a) for a, b in zip(starts, ends, strict=True))


def sae_files(source: Source) -> list[SaeFile]:
    """All SAEs of a source, by layer; where a layer is there in two formats, safetensors comes first.

    Raises:
      FormatError: a single file whose name tells no format.
    """
    if source.file:
        return [_single(source, source.file)]
    names = source.names()
    found = [file for name in names if (file := _in_folder(source, names, name))]
    return sorted(found, key=lambda file: (file.layer is None, file.layer, _PREFERENCE.index(file.format), file.name))


def choose(source: Source, layer: int | None) -> SaeFile:
    """The file of one layer; `layer` may be left out where there is only one.

    Raises:
      FormatError: no SAE in the source, no such layer, or several where none was asked for.
    """
    files = sae_files(source)
    if source.file:
        return files[0]
    if not files:
        raise FormatError(
            f"{source}: no SAE in it: expected {layer_file_name('qwen-scope', 0)} or the like{_hint(source)}"
        )
    if layer is None:
        if len({file.layer for file in files}) > 1:
            raise FormatError(f"{source}: holds several SAEs; name one: layer= {_ranges(files)}")
        return files[0]
    for file in files:
        if file.layer == layer:
            return file
    raise FormatError(f"{source}: no SAE for layer {layer} in it; it has the layers {_ranges(files)}")


def _single(source: Source, name: str) -> SaeFile:
    path = PurePosixPath(name)
    if path.name == saelens.WEIGHTS:
        return SaeFile("saelens", name, None)
    if path.name == sparsify.WEIGHTS and source.fetch(name).with_name(sparsify.CONFIG).is_file():
        return SaeFile("sparsify", name, None)
    if path.suffix not in _BY_ENDING:
        raise FormatError(
            f"{name}: expected a file that ends in {', '.join(_BY_ENDING)}; name a file or folder of SAEs"
        )
    found = _LAYER_FILE.fullmatch(path.name)
    return SaeFile(_BY_ENDING[path.suffix], name, int(found[1]) if found else None)


def _in_folder(source: Source, names: tuple[str, ...], name: str) -> SaeFile | None:
    if found := _LAYER_FILE.fullmatch(name):
        return SaeFile(_BY_ENDING[f".{found[2]}"], name, int(found[1]))
    path = PurePosixPath(name)
    if path.name not in _FOLDERS:
        return None
    format, module = _FOLDERS[path.name]
    config = str(path.with_name(module.CONFIG))
    if config not in names:
        return None
    folder = path.parent.name or source.name
    if format == "sparsify" and sparsify.is_other_hook(folder):
        return SaeFile(format, name, None)  # refused when it is opened, not when its neighbours are
    layer = layer_of_folder(folder)
    return SaeFile(format, name, module.read_facts(source.fetch(config)).layer if layer is None else layer)


def _ranges(files: list[SaeFile]) -> str:
    return layer_ranges(file.layer for file in files if file.layer is not None) or "(none that their names tell)"


def _hint(source: Source) -> str:
    names = source.names()
    if any(name.startswith("model") and name.endswith((".safetensors", ".safetensors.index.json")) for name in names):
        return "; this is a language model: give it as the model, and an SAE folder as the SAE"
    return f"; found {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" if names else "; it is empty"
