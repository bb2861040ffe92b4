"""Which implementation of an operation runs: the one asked for, else the portable one."""

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")


def pick(operation: str, implementations: Mapping[str, T], impl: str | None) -> T:
    """The implementation named `impl`; None picks "xla".

    Raises:
      ValueError: `impl` names none of the implementations of this operation.
    """
    name = "xla" if impl is None else impl
    if name not in implementations:
        raise ValueError(f"{operation} has no implementation {name!r}; there are {sorted(implementations)}")
    return implementations[name]
