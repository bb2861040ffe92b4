"""Runs the PTX of a kernel without a GPU: the 128 threads of a block in lockstep, each register a vector of numbers.

For what a simulation of Pallas cannot see: which addresses the compiled code reads and writes, in which pieces, and
what it makes of them. Knows what kernels of one warpgroup without asynchronous copies are made of.
Lockstep hides races; the simulation of Pallas looks for those.
"""

import re
from collections import Counter

import numpy as np

THREADS = 128
_SHARED_BYTES = 48 << 10
_TYPES = {"s16": np.int16, "s32": np.int32, "s64": np.int64, "f32": np.float32, "u8": np.uint8}
_TYPES |= {f"{kind}{bits}": np.dtype(f"u{bits // 8}").type for kind in "bu" for bits in (16, 32, 64)}
_BINARY = {"add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum}
_BINARY |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
_COMPARE = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_COMPARE |= {"eq": np.equal, "ne": np.not_equal}


def modules(dump: str) -> list[str]:
    """The kernels in what MOSAIC_GPU_DUMP_PTX=1 makes the compiler print, in the order in which it made them."""
    return re.findall(r"^\.version .*?^\}$", dump, flags=re.M | re.S)


class Kernel:
    """A kernel and its arrays, in the order in which its body first uses them; results are written in place."""

    def __init__(self, text: str, *arrays: np.ndarray):
        self._memory = [array.reshape(-1).view(np.uint8) for array in arrays]
        assert all(np.shares_memory(*pair) for pair in zip(self._memory, arrays, strict=True))
        self._code, self._labels = [], {}
        for line in re.sub(r"//.*", "", text[text.index("{") :]).splitlines():
            line = line.strip()
            if label := re.fullmatch(r"(\$\w+):", line):
                self._labels[label[1]] = len(self._code)
            elif line.endswith(";") and not line.startswith("."):
                parts = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*);", line)
                assert parts, line
                operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", parts[4])
                self._code.append((parts[2], bool(parts[1]), parts[3], operands))
        self.instructions = Counter(name for _, _, name, _ in self._code)

    def run(self, blocks: int) -> None:
        """Runs the blocks one after another; raises where an access is misaligned or out of an array's bounds."""
        for block in range(blocks):
            self._registers = {"%ctaid.x": np.full(THREADS, block, np.uint32)}
            self._registers["%tid.x"] = np.arange(THREADS, dtype=np.uint32)
            self._shared = np.full(_SHARED_BYTES, 0xFF, np.uint8)
            at: int | None = 0
            while at is not None:
                at = self._step(at)

    def _step(self, at: int) -> int | None:
        predicate, negated, name, operands = self._code[at]
        everywhere = np.ones(THREADS, bool)
        active = everywhere if predicate is None else self._registers[predicate] ^ negated
        if name.startswith("bra"):
            assert active.all() or not active.any(), "threads of a warpgroup part"
            return self._labels[operands[0]] if active.all() else at + 1
        if name == "ret":
            return None
        if name.startswith("st."):
            self._store(name, *operands, active)
        elif not name.startswith(("bar.", "fence.")):
            assert active.all(), f"{name} is predicated"
            self._compute(name, operands)
        return at + 1

    def _read(self, operand: str, kind: str) -> np.ndarray:
        if kind == "pred":
            return self._registers[operand] if operand[0] == "%" else np.full(THREADS, operand != "0")
        dtype = np.dtype(_TYPES[kind])
        if operand[0] == "%":
            assert self._registers[operand].itemsize == dtype.itemsize
            return self._registers[operand].view(dtype)
        if operand.startswith("0f"):
            return np.full(THREADS, int(operand[2:], 16), np.uint32).view(dtype)
        bits = 8 * dtype.itemsize
        number = int(operand) if re.match(r"-?\d", operand) else 0  # a name is where shared memory begins
        return np.full(THREADS, number % (1 << bits), f"u{bits // 8}").view(dtype)

    def _write(self, operand: str, value: np.ndarray) -> None:
        self._registers[operand] = value if value.dtype == bool else value.view(f"u{value.itemsize}")

    def _place(self, name: str, operand: str, size: int, active: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The memory that an address lies in, and [active threads, size] positions of its bytes."""
        found = re.fullmatch(r"\[(.+?)(?:\+(-?\d+))?\]", operand)
        assert found
        # Shared memory begins at 0, and array i at (i + 1) << 40.
        base = self._registers[found[1]].astype(np.int64) if found[1][0] == "%" else np.zeros(THREADS, np.int64)
        address = (base + int(found[2] or 0))[active]
        assert not np.any(address % size), f"{name} {operand}: not aligned to {size} bytes"
        if ".shared" in name:
            memory = self._shared
        else:
            which = np.unique(address >> 40)
            assert which.tolist() in [[i + 1] for i in range(len(self._memory))], f"{name} {operand}: in no array"
            memory, address = self._memory[which[0] - 1], address & ((1 << 40) - 1)
        assert np.all((address >= 0) & (address + size <= memory.size)), f"{name} {operand}: out of bounds"
        return memory, address[:, None] + np.arange(size)

    def _pieces(self, name: str, operand: str) -> tuple[list[str], str, int]:
        """The registers of a load or store, their type, and how many bytes all are."""
        names, kind = re.findall(r"[^{},\s]+", operand), name.split(".")[-1]
        return names, kind, len(names) * np.dtype(_TYPES[kind]).itemsize

    def _store(self, name: str, where: str, what: str, active: np.ndarray) -> None:
        names, kind, size = self._pieces(name, what)
        if active.any():
            memory, places = self._place(name, where, size, active)
            values = np.stack([self._read(register, kind) for register in names], axis=1)[active]
            memory[places] = np.ascontiguousarray(values).view(np.uint8)

    def _load(self, name: str, what: str, where: str) -> None:
        if ".param" in name:
            number = re.search(r"_param_(\d+)", where)
            assert number
            self._write(what, np.full(THREADS, (int(number[1]) + 1) << 40, np.uint64))
            return
        names, kind, size = self._pieces(name, what)
        memory, places = self._place(name, where, size, np.ones(THREADS, bool))
        for register, value in zip(names, memory[places].view(_TYPES[kind]).T, strict=True):
            self._write(register, np.ascontiguousarray(value))

    def _compute(self, name: str, operands: list[str]) -> None:
        operation, *rest = name.split(".")
        kind, target, sources = rest[-1], operands[0], operands[1:]
        special = getattr(self, f"_{operation}", None)
        with np.errstate(over="ignore"):
            if special is not None:
                special(name, *operands)
            elif operation in _BINARY:
                one, other = (self._read(source, kind) for source in sources)
                self._write(target, _BINARY[operation](one, other))
            elif operation in ("shl", "shr"):
                value = self._read(sources[0], kind)
                shift = np.left_shift if operation == "shl" else np.right_shift
                self._write(target, shift(value, value.dtype.type(int(sources[1]))))
            elif operation == "setp":
                one, other = (self._read(source, kind) for source in sources[:2])
                found = _COMPARE[rest[0]](one, other)
                # `setp.lt.and.s32` joins the outcome with another predicate.
                self._write(target, _BINARY[rest[1]](found, self._read(sources[2], "pred")) if sources[2:] else found)
            elif operation == "selp":
                one, other = (self._read(source, kind) for source in sources[:2])
                self._write(target, np.where(self._registers[sources[2]], one, other))
            else:
                raise NotImplementedError(name)

    _ld = _load

    def _cvta(self, name: str, target: str, source: str) -> None:
        self._write(target, self._read(source, "u64"))

    def _elect(self, name: str, targets: str, mask: str) -> None:
        lane, elected = targets.split("|")
        self._write(lane, np.zeros(THREADS, np.uint32))
        self._write(elected, np.arange(THREADS) % 32 == 0)

    def _shfl(self, name: str, target: str, source: str, how: str, bounds: str, mask: str) -> None:
        thread = np.arange(THREADS)
        source_lane = np.full(THREADS, int(how)) if ".idx" in name else thread % 32 ^ int(how)
        assert ".idx" in name or ".bfly" in name, name
        self._write(target.split("|")[0], self._read(source, "b32")[thread // 32 * 32 + source_lane])

    def _mov(self, name: str, target: str, source: str) -> None:
        kind = name.split(".")[-1]
        targets, sources = (re.findall(r"[^{},\s]+", operand) for operand in (target, source))
        if len(targets) > 1:
            halves = self._read(source, kind).reshape(-1, 1).view(f"u{np.dtype(_TYPES[kind]).itemsize // len(targets)}")
            for register, value in zip(targets, halves.T, strict=True):
                self._write(register, np.ascontiguousarray(value))
        elif len(sources) > 1:
            parts = np.stack([self._registers[register] for register in sources], axis=1)
            self._write(target, parts.view(_TYPES[kind])[:, 0].copy())
        else:
            self._write(target, self._read(source, kind).copy())

    def _cvt(self, name: str, target: str, source: str) -> None:
        to, kind = name.split(".")[-2:]
        if (to, kind) == ("f32", "bf16"):
            self._write(target, self._read(source, "u16").astype(np.uint32) << np.uint32(16))
        elif (to, kind) == ("f32", "f16"):
            self._write(target, self._read(source, "u16").view(np.float16).astype(np.float32))
        else:
            assert "f" not in to + kind, name
            self._write(target, self._read(source, kind).astype(_TYPES[to]))

    def _fma(self, name: str, target: str, *sources: str) -> None:
        one, other, third = (self._read(source, "f32").astype(np.float64) for source in sources)
        self._write(target, (one * other + third).astype(np.float32))

    def _mul(self, name: str, target: str, *sources: str) -> None:
        kind = name.split(".")[-1]
        one, other = (self._read(source, kind) for source in sources)
        if ".wide." in name or ".hi." in name:
            wide = np.dtype(f"{one.dtype.kind}{2 * one.itemsize}")
            product = one.astype(wide) * other.astype(wide)
            high = (product >> wide.type(8 * one.itemsize)).astype(one.dtype)
            self._write(target, product if ".wide." in name else high)
        else:
            self._write(target, one * other)

    def _mad(self, name: str, target: str, one: str, other: str, third: str) -> None:
        assert ".lo." in name, name
        kind = name.split(".")[-1]
        self._write(target, self._read(one, kind) * self._read(other, kind) + self._read(third, kind))
