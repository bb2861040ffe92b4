"""Files of a remote folder (`gs://`, `s3://`, any fsspec protocol), each copied into a local cache when asked for.

A cached copy is used again as long as the remote file's own identity (size, etag or time) is unchanged.
"""

import dataclasses
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qscope_jax.files.atomic import atomic_path, write_text
from qscope_jax.files.errors import AccessError, OfflineError, SourceError, SourceNotFoundError

_MAX_FILES = 20_000


@dataclasses.dataclass(frozen=True)
class RemoteFolder:
    """A folder, or with `only` one file of it, behind an fsspec filesystem."""

    url: str
    system: Any
    root: str
    listing: tuple[str, ...]

    def names(self) -> tuple[str, ...]:
        return self.listing

    def has(self, name: str) -> bool:
        return name in self.listing

    def fetch(self, name: str) -> Path:
        if not self.has(name):
            raise SourceNotFoundError(f"{self.url} has no file {name!r}; it holds {', '.join(self.listing[:6])}")
        remote = f"{self.root}/{name}"
        folder = cache_folder() / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        local, mark = folder / name, folder / ".identity" / name
        identity = explained(self.url, lambda: str(self.system.ukey(remote)))
        if not (local.is_file() and mark.is_file() and mark.read_text(encoding="utf-8") == identity):
            mark.unlink(missing_ok=True)
            with atomic_path(local) as temporary:
                explained(self.url, lambda: self.system.get_file(remote, str(temporary)))
            write_text(mark, identity)
        return local


def open_remote(url: str) -> tuple[RemoteFolder, str | None]:
    """Lists a remote folder; for the address of one file, its folder narrowed to that file, and the file's name."""
    url = url.rstrip("/")
    system, root = filesystem(url)
    if explained(url, lambda: system.isfile(root)):
        root, _, only = root.rpartition("/")
        return RemoteFolder(url.rpartition("/")[0], system, root, (only,)), only
    found = explained(url, lambda: system.find(root))
    names = tuple(sorted(path.removeprefix(root).lstrip("/") for path in found))
    if not names:
        raise SourceNotFoundError(f"{url} does not exist or is empty")
    if len(names) > _MAX_FILES:
        raise SourceError(f"{url} holds more than {_MAX_FILES} files: name the model's or SAE's own folder.")
    return RemoteFolder(url, system, root, names), None


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem behind an address, and the address in that filesystem's own words.

    Raises:
        SourceError: the scheme is unknown, or its package is not installed.
    """
    import fsspec

    protocol = url.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise SourceError(f"{url}: {protocol}:// needs one more package: pip install 'qscope-jax[remote]'") from error
    except ValueError as error:
        raise SourceError(f"{url}: {protocol}:// is not an address that fsspec knows ({error})") from error


def cache_folder() -> Path:
    """Where copies of remote files live: `$QSCOPE_CACHE`, else `qscope` in the user's cache folder."""
    if chosen := os.environ.get("QSCOPE_CACHE"):
        return Path(chosen).expanduser() / "remote"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "qscope" / "remote"


def explained(url: str, ask: Callable[[], Any], *, doing: str = "read") -> Any:
    """What `ask()` returns; its errors, of whatever package, become ours, which say what could not be done.

    Raises:
        SourceNotFoundError, AccessError, OfflineError, SourceError: by cause.
    """
    try:
        return ask()
    except FileNotFoundError as error:
        raise SourceNotFoundError(f"{url}: no such file or folder ({error})") from error
    except PermissionError as error:
        raise AccessError(f"{url}: these credentials may not {doing} it ({error})") from error
    except (ConnectionError, TimeoutError) as error:
        raise OfflineError(f"{url} does not answer ({error})") from error
    except SourceError:
        raise
    except Exception as error:  # each filesystem package has errors of its own; none may end as a traceback
        raise SourceError(f"{url}: could not {doing} it: {type(error).__name__}: {error}") from error
