"""The outer shell of a torch file: a zip archive of uncompressed members, seen as slices of one mapped file.

The directory is read by the standard library; what it would tolerate (compression, overlaps, duplicate or escaping
names, sizes beyond the file, 10^5 members) is refused, because a released SAE has about ten stored members.
"""

import mmap
import os
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from qscope_jax.files.recognise import FormatError, describe_file

_MAX_MEMBERS = 64
_MAX_DIRECTORY = 1 << 20
_LOCAL = 30  # bytes of a local header before the name


class Member(NamedTuple):
    """One stored file inside the archive: its place in the outer file, and its CRC-32 (0 = its writer left it out)."""

    start: int
    size: int
    crc: int


class TorchZip(NamedTuple):
    """The members of a torch archive by their name below its root, and a map of the whole file."""

    path: Path
    members: dict[str, Member]
    data: mmap.mmap

    def read(self, name: str, limit: int) -> bytes:
        """The bytes of a small member.

        Raises:
          FormatError: there is no such member, or it is larger than `limit`, or its CRC-32 does not match.
        """
        member = self.members.get(name)
        if member is None:
            raise FormatError(f"{self.path}: a zip archive without {name!r}: not written by torch.save")
        if member.size > limit:
            raise FormatError(f"{self.path}: {name} takes {member.size:,} bytes, expected at most {limit:,}")
        content = self.data[member.start : member.start + member.size]
        if member.crc and zlib.crc32(content) != member.crc:
            raise FormatError(f"{self.path}: {name} is damaged (its CRC-32 does not match); download the file again")
        return content

    def array(self, member: Member, dtype: np.dtype) -> np.ndarray:
        """A member's bytes as a flat read-only view."""
        return np.ndarray((member.size // dtype.itemsize,), dtype, buffer=self.data, offset=member.start)


class _Bounded:
    """A file that refuses the one huge read by which a forged directory would fill the memory."""

    def __init__(self, file):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > _MAX_DIRECTORY:
            size = _MAX_DIRECTORY
        return self._file.read(size)


def open_zip(path: str | os.PathLike[str]) -> TorchZip:
    """Opens a torch archive and checks its directory; no member is read.

    Raises:
      FormatError: not an archive, a truncated or a hostile one.
    """
    path = Path(path)
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":
            raise FormatError(f"{path}: expected a file written by torch.save, found {describe_file(path)}")
        infos = _directory(path, file)
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    _check_names(path, infos)
    members = {info.filename.split("/", 1)[1]: _member(path, info, data) for info in infos}
    _check_places(path, infos, members.values(), len(data))
    return TorchZip(path, members, data)


def _directory(path: Path, file) -> list[zipfile.ZipInfo]:
    try:
        infos = zipfile.ZipFile(_Bounded(file)).infolist()  # type: ignore[arg-type]  # duck-typed
    except Exception as error:  # the module raises six kinds of error for damaged input, OverflowError among them
        raise FormatError(
            f"{path}: a zip archive whose directory is missing or damaged ({error}): most likely a truncated download; "
            "download it again"
        ) from None
    if len(infos) > _MAX_MEMBERS:
        raise FormatError(f"{path}: {len(infos):,} members, expected at most {_MAX_MEMBERS}: not a file of weights")
    return infos


def _check_names(path: Path, infos: list[zipfile.ZipInfo]) -> None:
    names = [info.filename for info in infos]
    for name in names:
        parts = name.split("/")
        if len(parts) < 2 or ".." in parts or "" in parts or "\\" in name:
            raise FormatError(
                f"{path}: the member name {name[:80]!r} is not of the form root/name; do not trust this file"
            )
    if len(set(names)) < len(names):
        raise FormatError(f"{path}: two members share a name; do not trust this file")
    roots = {name.split("/")[0] for name in names}
    if len(roots) != 1:
        raise FormatError(f"{path}: expected one root folder in the archive, found {len(roots)}")
    if any(name.split("/")[1] in ("code", "constants.pkl") for name in names):
        raise FormatError(f"{path}: a TorchScript archive (it holds code); expected a dict of tensors from torch.save")


def _member(path: Path, info: zipfile.ZipInfo, data: mmap.mmap) -> Member:
    name = info.filename[:80]
    if info.flag_bits & 0x2041:
        raise FormatError(f"{path}: member {name!r} is encrypted")
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
        raise FormatError(
            f"{path}: member {name!r} is compressed; torch.save stores tensors uncompressed. Save it again"
        )
    head = data[info.header_offset : info.header_offset + _LOCAL] if info.header_offset >= 0 else b""
    if len(head) < _LOCAL or head[:4] != b"PK\x03\x04" or head[8:10] != b"\0\0":
        raise FormatError(f"{path}: member {name!r} has a damaged header; download the file again")
    name_length, extra_length = int.from_bytes(head[26:28], "little"), int.from_bytes(head[28:30], "little")
    start = info.header_offset + _LOCAL
    if data[start : start + name_length] != info.orig_filename.encode():
        raise FormatError(f"{path}: member {name!r} has another name in its own header; do not trust this file")
    return Member(start + name_length + extra_length, info.file_size, info.CRC)


def _check_places(path: Path, infos: list[zipfile.ZipInfo], members, size: int) -> None:
    end = 0
    for begin, member in sorted(zip((info.header_offset for info in infos), members, strict=True)):
        if begin < end:
            raise FormatError(f"{path}: members of the archive overlap; do not trust this file")
        end = member.start + member.size
        if end > size:
            raise FormatError(
                f"{path}: truncated: a member ends at byte {end:,}, the file at {size:,}; download it again"
            )
