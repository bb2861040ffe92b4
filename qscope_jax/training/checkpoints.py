"""Checkpoints of a training run: arrays and the facts beside them, committed together or not at all.

`folder/<step>/` holds `arrays/` (written by Orbax, each process its shards) and `record/`: the facts as JSON, and of
every array its shape, type and checksum. Orbax checks its own structure but not the arrays' content, so that a flipped
byte would be trained on; the checksums are compared after every restore.
"""

import concurrent.futures
import hashlib
import json
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from qscope_jax.files.differences import differences
from qscope_jax.mesh import on_first_process
from qscope_jax.training.agreement import agreed, everywhere, from_first_process
from qscope_jax.training.checkpoint_folder import COMMITTED, CheckpointError, open_folder
from qscope_jax.training.checksums import checksums
from qscope_jax.training.damage import first_cause, said, tried
from qscope_jax.training.orbax_files import load_arrays, load_record, start_saving


class Restored(NamedTuple):
    """What `Checkpoints.restore` found: the step, the arrays on their target shardings, and the facts."""

    step: int
    arrays: Any
    facts: dict[str, Any]


class Checkpoints:
    """The checkpoints of one folder. Leaving its `with` block waits for the last save.

    Every method must be called by all processes alike; `save` checks that they agree on the step and the facts.

    Args:
      folder: on a disk that all processes share, or under gs://; nothing is written before the first save.
      keep: how many of the newest stay; older ones are deleted once a newer one is whole.
      keep_every: steps that this divides stay for good.
      warn: is told what a person must know: that a damaged checkpoint was set aside.

    Attributes:
      newest: the step that this object saved, is saving or restored last; None before, and after a failed save.

    Raises:
      CheckpointError: checkpoints cannot lie in such a folder.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        warn: Callable[[str], object] = warnings.warn,
    ):
        if keep < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(f"keep = {keep} and keep_every = {keep_every} must be at least 1")
        self._folder, self._keep, self._keep_every, self._warn = open_folder(folder), keep, keep_every, warn
        self.newest: int | None = None
        self._writer = concurrent.futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: tuple[int, concurrent.futures.Future[None]] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *raised: object) -> None:
        try:
            self.wait()
        finally:
            self._writer.shutdown()

    def steps(self) -> list[int]:
        """The steps whose save was completed, ascending; one that is still being written is not among them.

        This is what one process sees now: what all must decide alike is decided by `newest`.
        """
        return [step for step in self._folder.steps() if self._folder.committed(step)]

    def save(self, step: int, arrays: Any, facts: dict[str, Any]) -> None:
        """Saves in the background; returns once the arrays may be donated or changed.

        At most one save is under way: this waits for the one before, and raises what went wrong there.

        Args:
          step: greater than that of every checkpoint in the folder.
          arrays: any pytree of jax.Array; over several processes, of arrays that lie on devices of all.
          facts: what JSON can hold, the same on all processes.

        Raises:
          CheckpointError: the save before failed; the step is not greater; processes disagree or share no folder.
          TypeError, ValueError: a leaf is no jax.Array, or JSON cannot hold the facts (NaN among them).
        """
        self.wait()
        named = _named(arrays)
        _check_leaves(named)
        if not agreed(f"{step} {_digest(facts)} {self._folder.path}"):
            raise CheckpointError(
                f"processes save different checkpoints: process {jax.process_index()} saves step {step} into "
                f"{self._folder.path}; step, folder and facts must be the same on all: gather the facts of each before"
            )
        on_first_process(lambda: self._prepare(step))
        self._folder.check_shared()
        about = {
            name: {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "checksum": checksum}
            for (name, leaf), checksum in zip(named.items(), checksums(list(named.values())), strict=True)
        }
        record = {"step": step, "facts": facts, "arrays": about}
        record["sha256"] = _digest(record)
        response = start_saving(self._folder.at(step), named, record, rename=self._folder.renames)
        self._pending = step, self._writer.submit(self._complete, response)
        self.newest = step

    def wait(self) -> None:
        """Returns when the last save is on disk.

        Raises:
          CheckpointError: it is not, and will not be.
        """
        if self._pending is None:
            return
        step, future = self._pending
        concurrent.futures.wait([future])
        self._pending = None
        if error := future.exception():
            if isinstance(error, CheckpointError):
                raise error
            self.newest = None
            raise CheckpointError(
                f"the checkpoint of step {step} could not be written to {self._folder.path} and does not count as "
                f"saved (whole ones: {self.steps() or 'none'}): {said(first_cause(error))}"
            ) from error

    def facts(self, step: int | None = None) -> dict[str, Any] | None:
        """The facts of a step, by default the newest whose facts are whole; None where nothing was ever saved.

        Cheap: no array is read. Compare them with `differences` before `restore`.

        Raises:
          CheckpointError: as `restore`.
        """
        found = self._newest(step, self._record)
        return None if found is None else found[1]["facts"]

    def restore(self, abstract: Any, *, step: int | None = None) -> Restored | None:
        """Reads the newest whole checkpoint, or that of `step`; None where nothing was ever saved.

        A damaged one is reported and renamed to `<step>.damaged` once an older one proves whole, and never deleted.

        Args:
          abstract: a pytree of jax.ShapeDtypeStruct with shardings, or of arrays; any mesh will do.

        Raises:
          CheckpointError: there are checkpoints and none is whole; `step` is missing or damaged; the arrays have other
            names, shapes or types.
        """
        targets = {name: _target(leaf) for name, leaf in _named(abstract).items()}

        def read(step: int) -> tuple[dict[str, Any], dict[str, jax.Array]]:
            record = self._record(step)
            self._check_arrays(step, record["arrays"], targets)
            return record, load_arrays(self._folder.at(step), targets)

        found = self._newest(step, read, _changed)
        if found is None:
            return None
        step, (record, loaded) = found
        self.newest = step
        leaves = [loaded[name] for name in targets]
        return Restored(step, jax.tree.unflatten(jax.tree.structure(abstract), leaves), record["facts"])

    def _newest(
        self, step: int | None, read: Callable[[int], Any], changed: Callable[[Any], str] = lambda found: ""
    ) -> tuple[int, Any] | None:
        """The newest step that all processes can `read` and in which nothing has `changed`, and what was read."""
        self.wait()
        damaged: dict[int, str] = {}
        for candidate in reversed(self._candidates(step)):
            found, damage = tried(lambda step=candidate: read(step), passing=CheckpointError)
            if not everywhere(not damage):
                damaged[candidate] = damage or "another process cannot read it; its own message says why"
            elif damage := changed(found):
                damaged[candidate] = damage
            else:
                self._set_aside(damaged, candidate)
                return candidate, found
        if damaged or from_first_process([int(self._folder.has_damaged())])[0]:
            reasons = "; ".join(f"step {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"no checkpoint in {self._folder.path} is whole ({reasons or 'all were set aside before'}). Bring a "
                "whole one back from a copy, or move the folder away to start afresh"
            )
        return None

    def _candidates(self, step: int | None) -> list[int]:
        """The steps to try, ascending, as process 0 sees them."""
        steps = from_first_process(self._folder.steps())
        if step is None or step in steps:
            return steps if step is None else [step]
        raise CheckpointError(f"{self._folder.path} has no checkpoint of step {step}; it has {steps or 'none'}")

    def _set_aside(self, damaged: dict[int, str], used: int) -> None:
        for step, reason in damaged.items():
            number = from_first_process([self._folder.free_aside(step)])[0]  # another may look after it was renamed
            path, aside = self._folder.at(step), self._folder.aside(step, number)
            on_first_process(lambda path=path, aside=aside: path.rename(aside))
            self._warn(
                f"the checkpoint {path} is damaged ({reason}); it was set aside as {aside.name}, and that of step "
                f"{used} is used instead"
            )

    def _record(self, step: int) -> dict[str, Any]:
        if not self._folder.committed(step):
            raise ValueError(f"{COMMITTED} is missing: the save, or a copy, was not completed")
        record = load_record(self._folder.at(step))
        if record.pop("sha256") != _digest(record):
            raise ValueError("the facts are not what was saved")
        return record

    def _check_arrays(self, step: int, about: dict[str, Any], targets: dict[str, jax.ShapeDtypeStruct]) -> None:
        saved = {name: f"{one['dtype']}{one['shape']}" for name, one in about.items()}
        wanted = {name: f"{target.dtype}{list(target.shape)}" for name, target in targets.items()}
        if found := differences(saved, wanted):
            raise CheckpointError(
                f"the checkpoint {self._folder.at(step)} holds other arrays than this run: {'; '.join(found[:8])}. "
                "Continue with the configuration it was saved with, or choose another folder"
            )

    def _prepare(self, step: int) -> None:
        if not 0 <= step < 2**31:
            raise CheckpointError(f"step {step} does not lie in 0..2^31 - 1")
        if (steps := self._folder.steps()) and step <= steps[-1]:
            raise CheckpointError(
                f"{self._folder.path} holds a checkpoint of step {steps[-1]}, so that step {step} cannot be saved "
                "there; continue from the newest one, or move the newer ones away"
            )
        self._folder.clear()

    def _complete(self, response: Any) -> None:
        response.result()
        if jax.process_index() > 0:
            return
        try:
            for step in self.steps()[: -self._keep]:
                if self._keep_every is None or step % self._keep_every:
                    self._folder.delete(step)
        except Exception as error:
            raise CheckpointError(
                f"the newest checkpoint in {self._folder.path} is saved, but an older one cannot be deleted: "
                f"{said(error)}"
            ) from error


def _named(tree: Any) -> dict[str, Any]:
    """Leaves by their path, so that what is saved does not depend on the containers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(named) < len(leaves):
        raise ValueError("two leaves have the same path; give their keys other names")
    return named


def _check_leaves(named: dict[str, Any]) -> None:
    for name, leaf in named.items():
        if not isinstance(leaf, jax.Array):
            raise TypeError(f"{name} is a {type(leaf).__name__}: a checkpoint holds jax arrays, and facts as JSON")
        if leaf.is_fully_addressable and jax.process_count() > 1:
            raise ValueError(f"{name} lies on devices of process {jax.process_index()} alone: place it on the mesh")


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    place = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _changed(found: tuple[dict[str, Any], dict[str, jax.Array]]) -> str:
    """Names the arrays whose content is not what was saved; the same on all processes."""
    record, loaded = found
    sums = dict(zip(loaded, checksums(list(loaded.values())), strict=True))
    wrong = [name for name, value in sums.items() if value != record["arrays"][name]["checksum"]]
    return f"the content of {', '.join(wrong)} is not what was saved" if wrong else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()
