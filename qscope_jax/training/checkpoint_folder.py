"""What lies in a folder of checkpoints, by name: `<step>/`, `<step>.damaged/`, and what killed saves left behind.

On a disk a checkpoint appears under its step by renaming. Elsewhere renaming copies, so a folder counts there once
Orbax has written its last file.
"""

import dataclasses
import os
import secrets

import jax
from orbax.checkpoint import v1 as ocp

from qscope_jax.mesh import on_first_process
from qscope_jax.training.agreement import everywhere, from_first_process

COMMITTED = "commit_success.txt"  # Orbax's last file, in every kind of place
_LEFT_BEHIND = (".orbax-checkpoint-tmp", ".deleted")


class CheckpointError(OSError):
    """A checkpoint that could not be written, read or trusted; the message says which, why and what to do."""


@dataclasses.dataclass(frozen=True)
class CheckpointFolder:
    """A folder, and whether renaming is atomic there."""

    path: ocp.path.Path
    renames: bool

    def at(self, step: int) -> ocp.path.Path:
        return self.path / str(step)

    def steps(self) -> list[int]:
        """The steps that were saved, whole or damaged, ascending; what was never completed is not among them."""
        if not self.path.exists():
            return []
        paths = [path for path in self.path.iterdir() if path.name.isdecimal()]
        return sorted(int(path.name) for path in paths if not self._abandoned(path))

    def committed(self, step: int) -> bool:
        return (self.at(step) / COMMITTED).exists()

    def clear(self) -> None:
        """Makes the folder and removes what killed saves and deletions left there."""
        self.path.mkdir(parents=True, exist_ok=True)
        for path in self.path.iterdir():
            if path.name.endswith(_LEFT_BEHIND) or self._abandoned(path):
                path.rmtree()

    def delete(self, step: int) -> None:
        """Deletes a checkpoint so that no half of it ever looks like one."""
        path = self.at(step)
        if self.renames:
            path = path.rename(self.path / f"{step}.deleted")
        else:
            (path / COMMITTED).unlink()
        path.rmtree()

    def aside(self, step: int, number: int) -> ocp.path.Path:
        """The place of a step's damaged checkpoint with that number; there may have been others before."""
        return self.path / f"{step}.damaged{number or ''}"

    def free_aside(self, step: int) -> int:
        """The first number whose place is free."""
        return next(number for number in range(1000) if not self.aside(step, number).exists())

    def has_damaged(self) -> bool:
        return self.path.exists() and any(".damaged" in path.name for path in self.path.iterdir())

    def check_shared(self) -> None:
        """Refuses a folder on a disk of process 0 alone, before others wait for files there; all processes call it.

        Raises:
          CheckpointError: not all processes see what process 0 writes.
        """
        if jax.process_count() == 1:
            return
        token = self.path / f".seen-by-all-{from_first_process([secrets.randbits(31)])[0]}"
        on_first_process(token.touch)
        seen = everywhere(token.exists())
        on_first_process(token.unlink)
        if not seen:
            raise CheckpointError(
                f"{self.path} is not the same folder on all {jax.process_count()} processes; choose one on a disk that "
                "all share, or under gs://"
            )

    def _abandoned(self, path: ocp.path.Path) -> bool:
        return not self.renames and path.name.isdecimal() and not (path / COMMITTED).exists()


def open_folder(folder: str | os.PathLike[str]) -> CheckpointFolder:
    """A folder on a disk or under gs://; writes nothing.

    Raises:
      CheckpointError: an address elsewhere.
    """
    scheme, remote, _ = os.fspath(folder).partition("://")
    if remote and scheme != "gs":
        raise CheckpointError(
            f"{folder}: checkpoints lie on a disk that all processes share or under gs://, not {scheme}://; choose "
            "another folder for them, results may go elsewhere"
        )
    return CheckpointFolder(ocp.path.Path(folder if remote else os.path.abspath(folder)), renames=not remote)
