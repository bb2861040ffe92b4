"""Tensors out of a torch file without torch, and without executing anything.

The pickle inside is not unpickled: a machine of twenty opcodes with two callables (an ordered dict, a tensor) walks
it, and everything else in the pickle language is refused before it could mean anything. Tensors come out as views of
the mapped file. The rules follow CVE-2025-32434 and CVE-2026-24747, holes in torch's own restricted loader.
"""

import io
import os
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from qscope_jax.files.recognise import FormatError
from qscope_jax.sae.formats.stored import Checksum, StoredTensor
from qscope_jax.sae.formats.torch_zip import TorchZip, open_zip

STORAGES = {
    "torch FloatStorage": np.dtype("<f4"),
    "torch HalfStorage": np.dtype("<f2"),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
REBUILD = "torch._utils _rebuild_tensor_v2"
ORDERED_DICT = "collections OrderedDict"
_GLOBALS = {*STORAGES, REBUILD, ORDERED_DICT}
_CONSTANTS = {"EMPTY_TUPLE": (), "NEWTRUE": True, "NEWFALSE": False}
_PUSHES = {"BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ALLOWED = {*_CONSTANTS, *_PUSHES, *_TUPLES, "PROTO", "STOP", "MARK", "TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS"}
_ALLOWED |= {"BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "GLOBAL", "BINPERSID", "REDUCE"}
_OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
_MAX_PICKLE = 1 << 20
_MAX_OPCODES = 4096
_MAX_DIMS = 8
_MARK = object()


@dataclass(frozen=True)
class _Global:
    """A name from the allow-list. It is only ever compared with others, never looked up or called."""

    name: str


class _Storage(NamedTuple):
    """The flat content of one member, as its promised dtype."""

    flat: np.ndarray
    crc: int


def open_torch(path: str | os.PathLike[str]) -> dict[str, StoredTensor]:
    """The tensors of a file written by `torch.save({name: tensor})`, as views that read nothing yet.

    Accepts float32, float16 and bfloat16, contiguous or transposed, whatever the file is called.

    Raises:
      FileNotFoundError: there is no such file.
      FormatError: the file is something else, damaged, or holds anything but a dict of such tensors.
    """
    path = Path(path)
    archive = open_zip(path)
    if "byteorder" in archive.members and (order := archive.read("byteorder", 16)) != b"little":
        raise FormatError(f"{path}: byte order {order!r}, expected b'little'; save it again on a little-endian machine")
    try:
        result = _Machine(archive).run(archive.read("data.pkl", _MAX_PICKLE))
    except FormatError:
        raise
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise FormatError(f"{path}: damaged pickle ({type(error).__name__}); download the file again") from None
    if type(result) is not dict:
        raise FormatError(f"{path}: expected a dict of tensors, found {_kind(result)}")
    for name, value in result.items():
        if not isinstance(value, StoredTensor):
            raise FormatError(f"{path}: expected a tensor under {name[:80]!r}, found {_kind(value)}")
    return result


class _Machine:
    """The stack, the memo and the twenty opcodes."""

    def __init__(self, archive: TorchZip):
        self.archive = archive
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, why: str) -> FormatError:
        return FormatError(f"{self.archive.path}: {why}. Nothing was executed; do not trust this file")

    def run(self, pickle: bytes) -> Any:
        stream = io.BytesIO(pickle)
        for _ in range(_MAX_OPCODES):
            opcode = _OPCODES[stream.read(1)]
            if opcode.name not in _ALLOWED:
                raise self.refuse(f"the pickle uses the opcode {opcode.name}, which a dict of tensors has no need for")
            if opcode.name == "STOP":
                return self.stack.pop()
            self.step(opcode.name, _argument(opcode, stream))
        raise self.refuse(f"a pickle of more than {_MAX_OPCODES} opcodes, far more than tensors need")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _PUSHES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _TUPLES:
            self.push_tuple(_TUPLES[name])
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "TUPLE":
            stack.append(tuple(self.pop_to_mark()))
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            self.set_items([key, value])
        elif name == "SETITEMS":
            self.set_items(self.pop_to_mark())
        elif name == "GLOBAL":
            stack.append(self.find(argument))
        elif name == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif name == "REDUCE":
            arguments, function = stack.pop(), stack.pop()
            stack.append(self.call(function, arguments))

    def push_tuple(self, size: int) -> None:
        if len(self.stack) < size:
            raise IndexError
        self.stack[-size:] = [tuple(self.stack[-size:])]

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is not dict or len(items) % 2:
            raise self.refuse(f"the pickle sets items of {_kind(target)}, expected a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str or key in target:
                raise self.refuse(f"a dict key is {_kind(key)} or comes twice, expected distinct strings")
            target[key] = value

    def find(self, name: str) -> _Global:
        if name not in _GLOBALS:
            module, _, attribute = name[:120].partition(" ")
            known = ", ".join(sorted(storage.split()[1] for storage in STORAGES))
            hint = f" (tensors must be {known})" if module == "torch" else ""
            raise self.refuse(f"the pickle asks for the Python object {module}.{attribute}{hint}")
        return _Global(name)

    def storage(self, identity: Any) -> _Storage:
        if type(identity) is not tuple or len(identity) != 5 or identity[0] != "storage":
            raise self.refuse("a persistent id is not of the form ('storage', type, key, location, size)")
        _, kind, key, _, count = identity
        dtype = STORAGES.get(kind.name) if isinstance(kind, _Global) else None
        if dtype is None or type(key) is not str or type(count) is not int:
            raise self.refuse("a persistent id is not of the form ('storage', type, key, location, size)")
        member = self.archive.members.get(f"data/{key}")
        if member is None:
            raise FormatError(f"{self.archive.path}: the storage {key[:80]!r} is missing; download the file again")
        if count * dtype.itemsize != member.size:
            raise self.refuse(
                f"storage {key} holds {member.size:,} bytes, the pickle promises {count} x {dtype.itemsize}"
            )
        return _Storage(self.archive.array(member, dtype), member.crc)

    def call(self, function: Any, arguments: Any) -> Any:
        if function == _Global(ORDERED_DICT) and type(arguments) is tuple and not arguments:
            return {}
        if function != _Global(REBUILD) or type(arguments) is not tuple or len(arguments) != 6:
            raise self.refuse(f"the pickle calls {_kind(function)} in a way torch.save never does")
        storage, offset, shape, strides, gradient, hooks = arguments
        if not isinstance(storage, _Storage) or type(gradient) is not bool or type(hooks) is not dict or hooks:
            raise self.refuse("a tensor is rebuilt from something else than a storage, or carries hooks")
        if type(shape) is not tuple or type(strides) is not tuple:
            raise self.refuse("a tensor's shape or strides are not tuples")
        return self.tensor(storage, offset, shape, strides)

    def tensor(self, storage: _Storage, offset: Any, shape: tuple, strides: tuple) -> StoredTensor:
        """A view of a storage; only permutations of a dense block are accepted, so no stride can leave it."""
        if any(type(number) is not int for number in (offset, *shape, *strides)):
            raise self.refuse("a tensor's offset, shape or strides are not integers")
        if len(shape) != len(strides) or len(shape) > _MAX_DIMS or offset < 0 or min(shape, default=1) < 1:
            raise self.refuse(
                f"a tensor has offset {offset}, {len(shape)} sizes and {len(strides)} strides, or no element"
            )
        # Axes of size 1 may have any stride; the others, by falling stride, must be packed without gaps.
        order = sorted(range(len(shape)), key=lambda axis: (shape[axis] > 1, -strides[axis]))
        packed = 1
        for axis in reversed(order):
            if shape[axis] > 1 and strides[axis] != packed:
                raise self.refuse(
                    "a tensor's strides are neither contiguous nor those of a transpose (save a .clone())"
                )
            packed *= shape[axis]
        if offset + packed > len(storage.flat):
            raise self.refuse(f"a tensor ends at item {offset + packed} of a storage of {len(storage.flat)}")
        block = storage.flat[offset : offset + packed].reshape([shape[axis] for axis in order])
        array = block.transpose(np.argsort(order)) if order else block
        # Only a tensor that fills its storage can be judged by the storage's checksum.
        whole = storage.crc and packed == len(storage.flat)
        return StoredTensor(array, Checksum("crc32", f"{storage.crc:08x}") if whole else None)


def _argument(opcode: pickletools.OpcodeInfo, stream: io.BytesIO) -> Any:
    if opcode.name == "GLOBAL":  # two lines; the library's reader would resolve escapes in them
        module, name = stream.readline(), stream.readline()
        return b" ".join((module[:-1], name[:-1])).decode("ascii")
    return opcode.arg.reader(stream) if opcode.arg else None


def _kind(value: Any) -> str:
    """The type of a value; never its content, which may be nested without end."""
    names = {_Global: "a global", StoredTensor: "a tensor", _Storage: "a bare storage", dict: "a nested dict"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
