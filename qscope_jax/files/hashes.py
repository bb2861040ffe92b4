"""SHA-256 of files, which says what a result came from."""

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path


def hash_files(paths: Iterable[str | os.PathLike[str]]) -> dict[str, str]:
    """SHA-256 of every file, by its path below the folder that all of them share, sorted.

    A file of the hub's cache is a link to a blob that is named by its own SHA-256; that name is taken as it stands.
    """
    hashes: dict[str, str] = {}
    found = sorted({Path(path).absolute() for path in paths})
    root = os.path.commonpath([path.parent for path in found]) if found else ""
    for path in found:
        name = path.relative_to(root).as_posix()
        blob = path.resolve()
        if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name):
            hashes[name] = blob.name
        else:
            with open(path, "rb") as file:
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes
