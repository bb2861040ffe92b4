"""Results for a remote folder (`gs://`, `s3://`, any fsspec scheme): made in a local one, then copied file by file.

A file arrives whole or not at all: object stores show one only when it is complete; elsewhere it is copied under a
hidden name and then renamed. A remote file is deleted only after the job deleted its local copy; local files stay.
"""

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from qscope_jax.files.atomic import atomic_path
from qscope_jax.files.errors import SourceError, SourceNotFoundError, checked_name
from qscope_jax.files.remote import cache_folder, explained, filesystem

_ADDRESS = re.compile(r"([a-z][a-z0-9+.:-]+):/+(.*)")
_OBJECT_STORES = {"gs", "gcs", "s3", "s3a", "abfs", "abfss", "az", "oci", "oss", "hf"}


def locate(out: str | os.PathLike[str]) -> Path | str:
    """A local path, or an address as `gs://bucket/folder`, of which a `Path` had made `gs:/bucket/folder`."""
    found = _ADDRESS.match(os.fspath(out))
    if found is None:
        return Path(out)
    return Path("/", found[2]) if found[1] == "file" else f"{found[1]}://{found[2].rstrip('/')}"


@dataclasses.dataclass
class Outbox:
    """A local `folder` whose visible files are to arrive below the address `url`."""

    url: str
    folder: Path
    system: Any
    root: str
    sent: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    """Names of files that arrived, with what the local file was then: size, time, inode."""

    def bring(self, only: Collection[str] | None = None) -> list[str]:
        """Copies what is at the address already into the folder, all visible files or those named; returns names.

        Raises:
            SourceError: they cannot be listed or read; the class says why.
        """
        try:
            found = explained(self.url, lambda: self.system.find(self.root))
        except SourceNotFoundError:
            return []
        names = sorted(path.removeprefix(self.root).lstrip("/") for path in found)
        brought = [name for name in names if not _hidden(name) and (only is None or name in only)]
        for name in brought:
            local, remote = self.folder / checked_name(name), f"{self.root}/{name}"
            with atomic_path(local) as temporary:
                explained(self.url, lambda remote=remote, to=str(temporary): self.system.get_file(remote, to))
            self.sent[name] = _stamp(local)
        return brought

    def publish(self, last: Sequence[str] = ()) -> list[str]:
        """Copies visible files that are new or changed to the address, those named `last` after the others.

        What was here and is deleted by now is then deleted there too. What arrived before an error stays, and the next
        call goes on behind it.

        Raises:
            SourceError: a file did not arrive; the message names it and the local folder, which holds everything.
        """
        files = [path for path in sorted(self.folder.rglob("*")) if path.is_file()]
        names = [name for path in files if not _hidden(name := path.relative_to(self.folder).as_posix())]
        arrived = []
        for name in sorted(names, key=lambda name: last.index(name) + 1 if name in last else 0):
            if self.sent.get(name) == _stamp(self.folder / name):
                continue
            try:
                self.send(name)
            except SourceError as error:
                raise type(error)(
                    f"{name} did not arrive: {error}. Nothing is lost: all results are in {self.folder}; copy them "
                    "from there, or run the command again"
                ) from error
            arrived.append(name)
        for name in self.sent.keys() - set(names):
            explained(self.url, lambda name=name: self._remove(name), doing="delete from")
            del self.sent[name]
        return arrived

    def send(self, name: str) -> None:
        """Copies one file to the address.

        Raises:
            SourceError: it did not arrive; the class says why.
        """
        stamp = _stamp(self.folder / name)
        explained(self.url, lambda: self._put(name), doing="write")
        self.sent[name] = stamp

    def discard(self) -> None:
        """Deletes the local folder; to be called after `publish`."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(f"{self.root}/{name}")

    def _put(self, name: str) -> None:
        local, target = str(self.folder / name), f"{self.root}/{name}"
        protocols = {self.system.protocol} if isinstance(self.system.protocol, str) else set(self.system.protocol)
        if protocols & _OBJECT_STORES:
            self.system.put_file(local, target)
            return
        folder, _, file = target.rpartition("/")
        part = f"{folder}/.{file}.part"
        try:
            self.system.makedirs(folder, exist_ok=True)
            self.system.put_file(local, part)
            self.system.mv(part, target)
        except BaseException:
            with contextlib.suppress(Exception):  # the first error is the one to tell of
                self.system.rm_file(part)
            raise


def open_outbox(url: str) -> Outbox:
    """An empty local folder, below the cache folder, for results that are to arrive at an address.

    Raises:
        SourceError: fsspec does not know the scheme, or a package for it is missing.
    """
    system, root = filesystem(url)
    parent = cache_folder().parent / "results"
    parent.mkdir(parents=True, exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{url.rsplit('/', 1)[-1] or 'out'}-", dir=parent)
    return Outbox(url, Path(folder), system, root.rstrip("/"))


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns, found.st_ino
