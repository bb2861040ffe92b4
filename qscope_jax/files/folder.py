"""Local places: a plain folder, a hub cache (`models--OWNER--NAME/snapshots/COMMIT`), a ModelScope cache, one file."""

import dataclasses
import difflib
import os
from pathlib import Path

from qscope_jax.files.errors import SourceError, SourceNotFoundError

_MAX_DEPTH = 4
_MAX_FILES = 20_000
_CACHE_PREFIX = "models--"


@dataclasses.dataclass(frozen=True)
class Folder:
    """Files below `root`; with `only`, that single file of it."""

    root: Path
    only: str | None = None

    def names(self) -> tuple[str, ...]:
        return (self.only,) if self.only else list_files(self.root)

    def has(self, name: str) -> bool:
        return name == self.only if self.only else (self.root / name).is_file()

    def fetch(self, name: str) -> Path:
        path = self.root / name
        if self.has(name) and path.is_file():
            return path
        if path.is_symlink():
            raise SourceNotFoundError(
                f"{path} is a broken link: the cache was cut or is incomplete. Download it again."
            )
        raise SourceNotFoundError(f"{self.root} has no file {name!r}{_similar(name, self.names())}")


def list_files(root: Path) -> tuple[str, ...]:
    """Relative names of the visible files below `root`, sorted; a model or SAE folder is neither deep nor endless."""
    found: list[str] = []
    for folder, folders, files in os.walk(root, followlinks=True):
        here = Path(folder).relative_to(root)
        deep = len(here.parts) >= _MAX_DEPTH
        folders[:] = [] if deep else sorted(f for f in folders if not f.startswith((".", "__")))
        found += [(here / f).as_posix() for f in files if not f.startswith(".")]
        if len(found) > _MAX_FILES:
            raise SourceError(f"{root} holds more than {_MAX_FILES} files: name the model's or SAE's own folder.")
    return tuple(sorted(found))


def enter(path: Path) -> tuple[Path, str, str | None]:
    """Looks through the caches' own layouts: (folder that holds the files, name of the model or SAE, commit)."""
    path = Path(os.path.abspath(path))  # not resolve(): a snapshot's files are links into a folder of bare hashes
    if path.name.startswith(_CACHE_PREFIX):
        path = _chosen_snapshot(path)
    elif any(path.glob(_CACHE_PREFIX + "*")):
        held = sorted(p.name for p in path.glob(_CACHE_PREFIX + "*"))
        raise SourceError(f"{path} is a whole hub cache: name one folder in it, for example {path / held[0]}")
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith(_CACHE_PREFIX):
        return path, path.parent.parent.name.split("--")[-1], path.name
    # ModelScope writes a dot as three underscores.
    return path, path.name.replace("___", "."), None


def _chosen_snapshot(cache: Path) -> Path:
    snapshots = cache / "snapshots"
    held = sorted(p.name for p in snapshots.iterdir() if p.is_dir()) if snapshots.is_dir() else []
    main = cache / "refs" / "main"
    wanted = main.read_text(encoding="utf-8").strip() if main.is_file() else None
    if wanted in held:
        return snapshots / str(wanted)
    if len(held) == 1:
        return snapshots / held[0]
    if not held:
        raise SourceNotFoundError(f"{cache} is a hub cache folder without a snapshot: the download never finished.")
    raise SourceError(f"{cache} holds {len(held)} snapshots and none is 'main': name one, e.g. {snapshots / held[0]}")


def _similar(name: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"; did you mean {', '.join(near)}?"
    return f"; it holds {', '.join(names[:6])}{', ...' if len(names) > 6 else ''}" if names else "; it is empty"
