"""Where models and SAEs come from, the same for every command and function.

A source is `"demo"` (ships with the package), a folder (plain, or a cache of the Hugging Face hub or ModelScope), one
file, `owner/name[@revision]` on the hub, or a remote folder (`gs://`, `s3://`). Only files asked for are downloaded.
What was meant as a path never becomes a question to the hub: see `_meant_as_path`; `hf://owner/name` is always the hub.
"""

import dataclasses
import os
import re
from pathlib import Path
from typing import Literal, Protocol

from qscope_jax.files import folder, hub, remote
from qscope_jax.files.errors import (
    AccessError,
    OfflineError,
    RateLimitError,
    RevisionError,
    SourceError,
    SourceNotFoundError,
    UnsafeNameError,
    checked_name,
)

__all__ = [
    "AccessError",
    "OfflineError",
    "RateLimitError",
    "RevisionError",
    "Source",
    "SourceError",
    "SourceNotFoundError",
    "UnsafeNameError",
    "resolve",
]

What = Literal["model", "sae", "statistics"]
_HUB_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>(?!.*\.\.)[A-Za-z0-9][\w./-]*))?"
)
_FILE_ENDINGS = (".pt", ".pth", ".bin", ".safetensors", ".npz", ".json", ".gguf")


class Place(Protocol):
    """What the kinds of source have in common; names are checked before they arrive here."""

    def names(self) -> tuple[str, ...]: ...
    def has(self, name: str) -> bool: ...
    def fetch(self, name: str) -> Path: ...


@dataclasses.dataclass(frozen=True)
class Source:
    """A model or SAE that can be listed, and whose files can be had one by one as local paths."""

    spec: str
    """As the user wrote it."""
    kind: Literal["demo", "folder", "file", "hub", "remote"]
    name: str
    """Name of the repository or folder, never a cache's hash: `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`. For one file, that
    of the folder it lies in."""
    revision: str | None
    """The full commit of a hub repository or of a snapshot in its cache, else None."""
    place: Place
    file: str | None = None
    """Name of the one file, where the source is a single file."""

    def names(self) -> tuple[str, ...]:
        """Relative POSIX names of the files, sorted. For one file just that; offline, what the cache holds."""
        return self.place.names()

    def has(self, name: str) -> bool:
        """True if the source lists the file `name`."""
        return self.place.has(checked_name(name))

    def fetch(self, name: str) -> Path:
        """Local path of the file `name`, downloaded if need be; a hub source's files keep their layout to each other.

        Raises:
            UnsafeNameError: the name leaves the source's folder.
            SourceNotFoundError, AccessError, RevisionError, OfflineError, RateLimitError: it cannot be had, by cause.
        """
        return self.place.fetch(checked_name(name))

    def __str__(self) -> str:
        """For messages: the source, its commit, and that a listing is only what a cache holds."""
        at = f" at {self.revision[:12]}" if self.kind == "hub" and self.revision else ""
        partial = isinstance(self.place, hub.HubRepo) and not self.place.complete
        return self.spec + at + (" (offline: only the files in the local cache)" if partial else "")


def resolve(spec: str | os.PathLike[str], *, what: What) -> Source:
    """Finds out which kind of source `spec` is and that it exists; asks the hub or the remote store once, for names.

    `what` chooses what is embedded for `"demo"`. `"demo"` never means a folder of that name: that is `./demo`.

    Raises:
        SourceError: one of its subclasses, which say what to do.
    """
    text = os.fspath(spec)
    if isinstance(spec, str):
        if text == "demo":
            return _embedded(what)
        if text.startswith("hf://"):
            return _from_hub(text, text.removeprefix("hf://"))
        if "://" in text and not text.startswith("file://"):
            return _from_remote(text)
    path = Path(text.removeprefix("file://")).expanduser()
    if text and path.exists():
        return _from_path(text, path)
    if not isinstance(spec, str) or _meant_as_path(text):
        raise SourceNotFoundError(_no_such_path(text, path, what))
    return _from_hub(text, text)


def _embedded(what: What) -> Source:
    root = Path(__file__).parents[1] / "assets" / what
    if not root.is_dir():
        raise SourceNotFoundError(f"This installation lacks the embedded {what} ({root}): install qscope-jax again.")
    return Source("demo", "demo", "demo", None, folder.Folder(root))


def _from_path(spec: str, path: Path) -> Source:
    if path.is_dir():
        root, name, commit = folder.enter(path)
        return Source(spec, "folder", name, commit, folder.Folder(root))
    root, name, commit = folder.enter(path.parent)
    return Source(spec, "file", name, commit, folder.Folder(root, only=path.name), file=path.name)


def _from_hub(spec: str, name: str) -> Source:
    match = _HUB_ID.fullmatch(name)
    if match is None:
        raise SourceNotFoundError(
            f"{spec!r} is no source: expected 'demo', an existing folder or file, owner/name[@revision] on the hub, "
            "or an address such as gs://bucket/folder."
        )
    repo = hub.open_repo(match["repo"], match["revision"])
    return Source(spec, "hub", repo.repo.split("/")[1], repo.commit, repo)


def _from_remote(spec: str) -> Source:
    place, only = remote.open_remote(spec)
    return Source(spec, "remote", place.url.rsplit("/", 1)[-1], None, place, file=only)


def _meant_as_path(text: str) -> bool:
    """True where a missing `text` can only be a mistyped path, or where asking the hub would be a surprise."""
    first = text.split("/", 1)[0]
    return (
        text.startswith((".", "/", "~", "file://"))
        or "\\" in text
        or text.endswith(("/", *_FILE_ENDINGS))
        or text.split("@", 1)[0].count("/") > 1
        or ("/" in text and Path(first).is_dir())
    )


def _no_such_path(text: str, path: Path, what: What) -> str:
    message = f"{text}: no such folder or file (looked for {os.path.abspath(path)})."
    if _HUB_ID.fullmatch(text):
        message += (
            f" {text.split('/')[0]}/ is a folder here, so this was read as a path; for the hub write hf://{text}."
        )
    kind = {"sae": "An SAE is", "model": "A model is", "statistics": "Statistics are"}[what]
    return f"{message} {kind} a folder, one file, owner/name on the hub, gs://..., s3://... or 'demo'."
