"""One checkpoint as files: what Orbax writes and reads, and how."""

from typing import Any

import jax
from orbax.checkpoint import v1 as ocp


def start_saving(path: ocp.path.Path, arrays: Any, record: dict[str, Any], *, rename: bool) -> ocp.AsyncResponse[None]:
    """Copies the arrays to the host, and returns what waits until all is written and committed.

    Args:
      path: a folder that is not there yet.
      arrays: written to `arrays/`, each process its own parts.
      record: written to `record/data.json` by process 0.
      rename: whether a folder is written under another name first; else its last file decides.
    """
    context = _context()
    modes = ocp.options.AtomicityMode
    context.atomicity.mode = modes.ATOMIC_RENAME if rename else modes.COMMIT_FILE
    with context:
        return ocp.save_checkpointables_async(path, {"arrays": arrays, "record": record})


def load_record(path: ocp.path.Path) -> Any:
    return _load(path, "record", None)


def load_arrays(path: ocp.path.Path, targets: dict[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    return _load(path, "arrays", targets)


def _load(path: ocp.path.Path, name: str, target: Any) -> Any:
    # Alone: a process that meets damage would keep the others waiting for minutes.
    context = _context()
    context.multiprocessing.primary_host = jax.process_index()
    context.multiprocessing.active_processes = {jax.process_index()}
    with context:
        return ocp.load_checkpointables(path, {name: target})[name]


def _context() -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
    context.checkpointables.registry = registry
    return context
