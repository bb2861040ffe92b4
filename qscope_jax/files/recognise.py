"""Says what a file really is by its first bytes, so that a wrong download is named instead of called "damaged"."""

import os
import re
from pathlib import Path

_HEAD = 512


class FormatError(ValueError):
    """A file is not what its place or name promises. The message names file, expected, found and remedy."""


def describe_file(path: str | os.PathLike[str]) -> str:
    """What the first bytes of `path` look like, with the remedy where one is known; never raises for odd content."""
    with open(path, "rb") as file:
        head = file.read(_HEAD)
    return describe_bytes(head, Path(path).stat().st_size)


def describe_bytes(head: bytes, size: int) -> str:
    """Like `describe_file`, from the first 512 bytes and the size of a file."""
    if size == 0:
        return "an empty file; download it again"
    if head.startswith(b"version https://git-lfs"):
        found = re.search(rb"\nsize (\d{1,20})\n", head)
        real = f" for a file of {int(found[1]):,} bytes" if found else ""
        return f"a git-lfs pointer{real}; fetch the real file with `git lfs pull` or download it from the hub"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML or XML page, most likely an error page saved under this name; download the file again"
    if head.startswith(b"PK\x03\x04"):
        return "a zip archive (torch.save since 1.6 writes these)"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
        return "a compressed file; unpack it first"
    if head[257:262] == b"ustar" or head.startswith(b"././@PaxHeader"):
        return "a tar archive, the form of torch.save before 0.1.10; load it in torch and save it again"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a bare pickle, the form of torch.save before 1.6; load it in torch and save it again"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
        return "a safetensors file"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    return f"a file of {size:,} bytes that starts with {head[:8]!r}"
