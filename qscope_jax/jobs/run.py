"""What every command shares: its folder, its progress, its stop signal and its manifest.

with Run("extract", config, config.out) as run:
    for batch in batches:
        if run.stopping: raise run.interrupted("3 of 8 parts are done")
        run.progress(rows=len(batch), tokens=batch.size)
    run.record(counts={...}, hashes={...})
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from tqdm import tqdm

from qscope_jax.files.atomic import write_json, write_text

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is broken, the same command goes on from here.
PACKAGES = (
    "qscope-jax",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "pyarrow",
    "grain",
)
_LINE_EVERY = 5.0  # seconds between plain progress lines


class Interrupted(SystemExit):
    """A command stopped on a signal after saving what it had; the process ends with `EXIT_INTERRUPTED`."""

    def __init__(self, message: str):
        super().__init__(EXIT_INTERRUPTED)
        self.message = message


class Run:
    """One run of a command: a context manager around `--out DIR`.

    On entry the folder is made, a manifest with `"state": "running"` is written, and SIGTERM and SIGINT only set
    `stopping`; a second signal stops at once. On exit the manifest says `complete`, `interrupted` or `failed`.

    Args:
      command: the name of the subcommand.
      config: its frozen dataclass; written into the manifest in full.
      out: the folder of the results; None leaves no manifest.
      total: how much `progress` will add up to in its first unit, where that is known.
      manifest: the manifest's file name, for commands of which several processes share a folder.
    """

    def __init__(
        self,
        command: str,
        config: Any,
        out: str | os.PathLike[str] | None,
        *,
        total: int | None = None,
        manifest: str = "manifest.json",
    ):
        if out is not None and re.match(r"[a-z0-9+]+:/", os.fspath(out)):
            raise ValueError(f"--out {os.fspath(out)}: results are written to a local folder; copy it from there")
        self.command, self.out, self.total = command, None if out is None else Path(out), total
        self.manifests = [manifest]  # file names; a job may add one before it ends
        self._facts: dict[str, Any] = {"command": command, "config": plain(config), "versions": versions()}
        self._started, self._stop, self._old_handlers = time.time(), threading.Event(), {}
        self._began = time.monotonic()
        self._meter: _Meter | None = None
        self._before: tuple[Path, str] | None = None  # the manifest that was there, with its text

    def __enter__(self) -> "Run":
        self._before = self._read_before()
        self._write("running")
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if self._meter:
            self._meter.close()
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        if isinstance(error, Interrupted):
            self._write("interrupted", reason=error.message)
            say(f"{self.command}: stopped. {error.message}. The same command goes on from here.")
        elif error is not None and self._before is not None and self._meter is None:
            write_text(self._before[0], self._before[1])  # refused before any work: what is there stays described
        elif error is not None:
            self._write("failed", reason=f"{kind.__name__}: {error}")
        else:
            self._write("complete")

    @property
    def earlier(self) -> dict[str, Any]:
        """The manifest that an earlier run left in the folder, or nothing."""
        return json.loads(self._before[1]) if self._before else {}

    @property
    def stopping(self) -> bool:
        """True once SIGTERM or SIGINT came: finish the step at hand, save, and raise `interrupted(...)`."""
        return self._stop.is_set()

    def interrupted(self, message: str) -> Interrupted:
        """The exception to raise when `stopping`; `message` says what is saved."""
        return Interrupted(message)

    def record(self, **facts: Any) -> None:
        """Adds facts to the manifest; a mapping is merged into what its name already holds."""
        for name, value in facts.items():
            value = plain(value)
            if isinstance(value, dict) and isinstance(self._facts.get(name), dict):
                self._facts[name] = {**self._facts[name], **value}
            else:
                self._facts[name] = value

    def progress(self, *, already: int = 0, **amounts: int) -> None:
        """Adds to the progress display, for example `progress(rows=64, tokens=4096)`.

        The first amount counts towards `total` and gives the estimate of the time left; every amount gets a rate.
        `already` is work of earlier runs: it counts towards the total and never into a rate.
        """
        if self._meter is None:
            # A first call with zeros says "from here on"; without one the work began with the run.
            begin = self._began if any(amounts.values()) else time.monotonic()
            self._meter = _Meter(self.command, self.total, next(iter(amounts)), begin)
        self._meter.add(amounts, already)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._stop.set()
        for other in self._old_handlers:
            signal.signal(other, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"\n{self.command}: {name}: saving what is done; a second signal stops at once\n".encode())

    def _read_before(self) -> tuple[Path, str] | None:
        path = self.out / self.manifests[0] if self.out is not None else None
        return (path, path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None

    def _write(self, state: str, **more: Any) -> None:
        if self.out is None:
            return
        seconds = round(time.time() - self._started, 3)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started))
        timings = {**self._facts.get("timings", {}), "started": when, "seconds": seconds}
        for name in self.manifests:
            write_json(self.out / name, {"state": state, **more, **self._facts, "timings": timings})


class _Meter:
    """Progress on stderr: a bar on a terminal, else a plain line every few seconds."""

    def __init__(self, name: str, total: int | None, unit: str, begin: float):
        self.name, self.total, self.unit, self.begin = name, total, unit, begin
        self.last = time.monotonic()
        self.done, self.amounts = 0, {}
        self.bar = tqdm(total=total, desc=name, unit=unit, smoothing=0.1) if sys.stderr.isatty() else None

    def add(self, amounts: Mapping[str, int], already: int) -> None:
        self.done += amounts[self.unit] + already
        for unit, amount in amounts.items():
            self.amounts[unit] = self.amounts.get(unit, 0) + amount
        if self.bar is not None:
            self.bar.initial += already
            self.bar.update(amounts[self.unit] + already)
            self.bar.set_postfix_str(", ".join(self._rates()[1:]), refresh=False)
        elif time.monotonic() - self.last > _LINE_EVERY:
            self._line()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        else:
            self._line()

    def _rates(self) -> list[str]:
        seconds = max(time.monotonic() - self.begin, 1e-9)
        return [f"{amount / seconds:,.0f} {unit}/s" for unit, amount in self.amounts.items()]

    def _line(self) -> None:
        self.last = time.monotonic()
        parts = [f"{self.name}: {self.done:,} {self.unit}"]
        if self.total:
            parts = [f"{self.name}: {self.done:,} of {self.total:,} {self.unit} ({self.done / self.total:.0%})"]
        parts += self._rates()
        fresh = self.amounts[self.unit]
        if self.total and fresh and self.done < self.total:
            parts.append(f"{duration((self.last - self.begin) / fresh * (self.total - self.done))} left")
        say(" | ".join(parts))


def say(text: str) -> None:
    """A line for people, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Seconds as `h:mm:ss` or `m:ss`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def versions(*others: str) -> dict[str, str]:
    """Versions of Python, of packages whose version can change a result and of `others`; absent ones are left out."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *others):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def devices() -> dict[str, Any]:
    """The accelerators of all processes; starts the jax backend, so only commands that compute call it."""
    import jax

    found = jax.devices()
    kinds = ", ".join(sorted({device.device_kind for device in found}))
    return {"platform": found[0].platform, "kind": kinds, "count": len(found), "processes": jax.process_count()}


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


def plain(value: Any) -> Any:
    """`value` as what JSON holds: dataclasses become dicts, paths strings, tuples lists, NumPy scalars numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value.item() if isinstance(value, np.generic) else value
