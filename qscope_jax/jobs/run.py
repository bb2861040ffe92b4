"""What every command shares: its folder, its progress, its stop signal and its manifest.

with Run("extract", config, config.out) as run:
    for batch in batches:
        if run.stopping: raise run.interrupted("3 of 8 parts are done")
        run.progress(rows=len(batch), tokens=batch.size)
    run.record(counts={...}, hashes={...})
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np

from qscope_jax.files.atomic import write_json, write_text
from qscope_jax.files.outbox import Outbox, locate, open_outbox
from qscope_jax.jobs.progress import Meter, say

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


class Interrupted(SystemExit):
    """A command stopped on a signal after saving what can be kept; the process ends with `EXIT_INTERRUPTED`."""

    def __init__(self, message: str, *, resumes: bool = True):
        super().__init__(EXIT_INTERRUPTED)
        self.message, self.resumes = message, resumes


class Run:
    """One run of a command: a context manager around `--out DIR`.

    On entry the folder is made, a manifest with `"state": "running"` is written, and SIGTERM and SIGINT only set
    `stopping`; a second signal stops at once. On exit the manifest says `complete`, `interrupted` or `failed`.

    `out` may be remote. The job then works in a local folder, which `self.out` is in either case, and its visible files
    are copied to the address by `publish` and on exit, the manifest last; the running one, at once, proves that the
    address can be written. If that fails on exit so does the run, and the local folder stays; else it is deleted.

    Args:
      command: the name of the subcommand.
      config: its frozen dataclass; written into the manifest in full.
      out: the folder of the results, local or remote; None leaves no manifest.
      total: how much `progress` will add up to in its first unit, where that is known.
      manifest: the manifest's file name, for commands of which several processes share a folder.
      resumes: names of files that the job goes on from, which are copied here first from a remote folder; or True: all.
    """

    def __init__(
        self,
        command: str,
        config: Any,
        out: str | os.PathLike[str] | None,
        *,
        total: int | None = None,
        manifest: str = "manifest.json",
        resumes: Literal[True] | tuple[str, ...] = (),
    ):
        self.command, self.total, self.resumes = command, total, resumes
        self._place = None if out is None else locate(out)
        self._out = self._place if isinstance(self._place, Path) else None
        self._box: Outbox | None = None
        self.manifests = [manifest]  # file names; a job may add one before it ends
        self.note = ""  # a few words that progress shows behind its rates
        self._facts: dict[str, Any] = {"command": command, "config": plain(config), "versions": versions()}
        self._started, self._stop, self._old_handlers = time.time(), threading.Event(), {}
        self._began = time.monotonic()
        self._meter: Meter | None = None
        self._before: tuple[Path, str] | None = None  # the manifest that was there, with its text

    def __enter__(self) -> "Run":
        if isinstance(self._place, str):
            self._box = open_outbox(self._place)
            self._out = self._box.folder
        try:
            if self._box is not None:
                self._box.bring(None if isinstance(self.resumes, bool) else [*self.manifests, *self.resumes])
            self._before = self._read_before()
            self._write("running")
            if self._box is not None:
                self._box.send(self.manifests[0])
        except BaseException:
            if self._box is not None:
                self._box.discard()
            raise
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
        elif error is not None and self._before is not None and self._meter is None:
            write_text(self._before[0], self._before[1])  # refused before any work: what is there stays described
        elif error is not None:
            self._write("failed", reason=f"{kind.__name__}: {error}")
        else:
            self._write("complete")
        self._deliver(error)
        if isinstance(error, Interrupted):
            then = "goes on from here" if error.resumes else "begins anew"
            say(f"{self.command}: stopped. {error.message}. The same command {then}.")

    @property
    def out(self) -> Path:
        """The local folder of the results; for a remote --out, the one from which they are copied."""
        if self._out is None:
            raise ValueError(f"{self.command}: this run has no folder for results")
        return self._out

    @property
    def address(self) -> str:
        """Where the results end up: the local folder, or the address that was given as --out."""
        return str(self._place if self._place is not None else self.out)

    def publish(self) -> None:
        """Copies what is finished to a remote --out; a failure is said, and the next call or the end tries again."""
        if self._box is not None:
            self._write("running")
            try:
                self._box.publish(last=self.manifests)
            except OSError as error:
                say(f"{self.command}: {error}; tried again later")

    @property
    def earlier(self) -> dict[str, Any]:
        """The manifest that an earlier run left in the folder, or nothing."""
        return json.loads(self._before[1]) if self._before else {}

    @property
    def stopping(self) -> bool:
        """True once SIGTERM or SIGINT came: finish the step at hand, save, and raise `interrupted(...)`."""
        return self._stop.is_set()

    def interrupted(self, message: str, *, resumes: bool = True) -> Interrupted:
        """The exception to raise when `stopping`; `message` says what is saved, `resumes` whether there is any."""
        return Interrupted(message, resumes=resumes)

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
            self._meter = Meter(self.command, self.total, next(iter(amounts)), begin)
        self._meter.note = self.note
        self._meter.add(amounts, already)

    def _deliver(self, error: BaseException | None) -> None:
        """Copies everything to a remote --out. That this failed outweighs having been stopped, but no other error."""
        if self._box is None:
            return
        try:
            self._box.publish(last=self.manifests)
        except OSError as failure:
            if error is None or isinstance(error, Interrupted):
                raise
            say(f"{self.command}: {failure}")
        else:
            say(f"{self.command}: {len(self._box.sent)} files are in {self.address}")
            self._box.discard()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self._stop.set()
        for other in self._old_handlers:
            signal.signal(other, signal.SIG_DFL)
        name = signal.Signals(number).name
        os.write(2, f"\n{self.command}: {name}: saving what is done; a second signal stops at once\n".encode())

    def _read_before(self) -> tuple[Path, str] | None:
        path = self._out / self.manifests[0] if self._out is not None else None
        return (path, path.read_text(encoding="utf-8")) if path is not None and path.is_file() else None

    def _write(self, state: str, **more: Any) -> None:
        if self._out is None:
            return
        seconds = round(time.time() - self._started, 3)
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self._started))
        timings = {**self._facts.get("timings", {}), "started": when, "seconds": seconds}
        for name in self.manifests:
            write_json(self._out / name, {"state": state, **more, **self._facts, "timings": timings})


def check_local(out: str | os.PathLike[str], *, why: str) -> None:
    """For commands whose folder cannot be remote.

    Raises:
      ValueError: it is an address.
    """
    if not isinstance(locate(out), Path):
        raise ValueError(f"--out {os.fspath(out)}: this command needs a local folder, since {why}; copy it from there")


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
