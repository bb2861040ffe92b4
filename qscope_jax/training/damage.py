"""Telling a damaged checkpoint from a machine in trouble, in one line and without the noise of what failed."""

import contextlib
import gc
import logging
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

# Errors that say nothing about the checkpoint itself; the words are how TensorStore's begin.
_ENVIRONMENT = (MemoryError, PermissionError, ConnectionError, TimeoutError, jax.errors.JaxRuntimeError)
_WORDS = ("PERMISSION_DENIED", "UNAUTHENTICATED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "ABORTED")


def tried(read: Callable[[], Any], *, passing: type[Exception]) -> tuple[Any, str]:
    """What `read` returns and "", or None and what is damaged.

    Raises:
      Exception: one of `passing`, and what is no damage: no memory, no permission, no connection.
    """
    with _one_error_each():
        try:
            return read(), ""
        except Exception as error:  # whatever a reader of damaged bytes can stumble over
            cause = first_cause(error)
            if isinstance(error, passing) or isinstance(cause, _ENVIRONMENT) or str(cause).startswith(_WORDS):
                raise
            damage = said(cause)
            del cause
        # Reads from a disk that are under way take no longer; then what they leave behind is dropped in here.
        time.sleep(0.1)
        gc.collect()
        return None, damage


def first_cause(error: BaseException) -> BaseException:
    """The error that all others came from."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def said(error: BaseException) -> str:
    """An error in one line; those of storage libraries hold whole specifications."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:300] + '…'}"


@contextlib.contextmanager
def _one_error_each() -> Iterator[None]:
    """Inside, a failed load is just its exception.

    Orbax ends with the first error while other reads are under way; each of those would print a traceback of its own.
    """
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook

    def heard(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Task exception was never retrieved")

    def unraisable(found: Any) -> None:
        code = getattr(found.object, "cr_code", None)
        if str(found.exc_value) != "Event loop is closed" and not (code and "orbax" in Path(code.co_filename).parts):
            hook(found)

    logger.addFilter(heard)
    sys.unraisablehook = unraisable
    try:
        yield
    finally:
        sys.unraisablehook = hook
        logger.removeFilter(heard)
