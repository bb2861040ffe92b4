"""From the names a user gives to a fixed list of files: folders, globs, remote addresses, compressed files."""

import dataclasses
import fnmatch
import glob
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import pyarrow as pa

from qscope_jax.files.recognise import describe_file
from qscope_jax.files.remote import open_remote

Format = Literal["jsonl", "parquet", "text"]

FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
SHIPPED_TEXTS = Path(__file__).parents[1] / "assets" / "texts" / "examples.jsonl"
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_MAGIC = (b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh")
_CHUNK = 16 << 20


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One input file. `name` is what ids and messages call it: its path below the folder all inputs share."""

    name: str
    path: Path
    format: Format
    compression: str | None


def find_files(specs: Iterable[str | os.PathLike[str]], *, format: Format | None = None) -> list[DataFile]:
    """The files behind names, folders, globs and remote addresses, in the order given, each once, folders sorted.

    Args:
      specs: files, folders (searched to any depth for known endings), globs, or fsspec addresses of a file, a folder
        or a glob in a folder; "demo" is the texts that ship with the package.
      format: what the files are, where their endings do not say it.

    Raises:
      FileNotFoundError: a name matches nothing.
      ValueError: no names at all, or a file whose format is unknown or is not what its ending says.
    """
    paths: dict[Path, None] = {}  # not resolved: in the hub's cache a link's target has no ending
    for spec in (os.fspath(spec) for spec in specs):
        found = _remote(spec, format) if "://" in spec else _local(spec, format)
        if not found:
            raise FileNotFoundError(f"{spec}: no such file, or no file in it ends with {_endings()}")
        paths.update(dict.fromkeys(Path(os.path.normpath(path)) for path in found))
    if not paths:
        raise ValueError(f"no data given: name files ({_endings()}), folders or globs")
    root = Path(os.path.commonpath([path.parent for path in paths]))
    return [_data_file(path, path.relative_to(root).as_posix(), format) for path in paths]


def open_plain(file: DataFile) -> int:
    """A descriptor of the file's content; a compressed file is unpacked into an unnamed temporary file first.

    Raises:
      ValueError: the compressed stream is damaged or cut short.
    """
    if file.compression is None:
        return os.open(file.path, os.O_RDONLY)
    with tempfile.TemporaryFile() as unpacked:
        try:
            with pa.input_stream(str(file.path), compression=file.compression) as stream:
                while chunk := stream.read(_CHUNK):
                    unpacked.write(chunk)
        except OSError as error:
            if error.errno:  # the disk's fault, not the file's
                raise
            raise ValueError(f"{file.path}: damaged or cut short {file.compression} file ({error})") from None
        unpacked.flush()
        return os.dup(unpacked.fileno())


def _local(spec: str, format: Format | None) -> list[Path]:
    path = SHIPPED_TEXTS if spec == "demo" else Path(spec).expanduser()
    if path.is_dir():
        names = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
        return [p.absolute() for p in names if format or _format_of(p)]
    if path.exists():
        return [path.absolute()]
    matches = sorted(glob.glob(str(path), recursive=True))
    return [Path(match).absolute() for match in matches if Path(match).is_file()]


def _remote(spec: str, format: Format | None) -> list[Path]:
    folder, _, last = spec.rpartition("/")
    is_glob = any(letter in last for letter in "*?[")
    place, only = open_remote(folder if is_glob else spec)
    names = [n for n in place.names() if fnmatch.fnmatch(n, last)] if is_glob else place.names()
    return [place.fetch(name) for name in names if only or is_glob or format or _format_of(Path(name))]


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _format_of(path: Path) -> Format | None:
    suffixes = path.suffixes
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes = suffixes[:-1]
    return FORMATS.get(suffixes[-1].lower()) if suffixes else None


def _data_file(path: Path, name: str, format: Format | None) -> DataFile:
    kind = format or _format_of(path)
    if kind is None:
        raise ValueError(f"{path}: unknown kind of data; expected an ending of {_endings()}, or say --format")
    compression = COMPRESSIONS.get(path.suffix) if kind != "parquet" else None
    with open(path, "rb") as file:
        head = file.read(4)
    if compression is None and kind != "parquet" and head.startswith(_MAGIC):
        raise ValueError(f"{path} is compressed; expected plain {kind}: give it the ending .gz, .zst or .bz2")
    if compression is None and head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; expected UTF-8: convert it, for example with iconv -f UTF-16 -t UTF-8")
    if kind == "parquet" and head != b"PAR1":
        raise ValueError(f"{path}: expected a parquet file, found {describe_file(path)}")
    return DataFile(name, path, kind, compression)


def _endings() -> str:
    return ", ".join(FORMATS) + " (" + ", ".join(COMPRESSIONS) + " too)"
