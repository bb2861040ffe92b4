"""Activations in a terminal: one character per token, coloured on a terminal and plain in a file."""

import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TextIO

_BLOCKS = "▁▂▃▄▅▆▇█"
_WARM = (180, 179, 215, 214, 208, 202, 196, 160)  # of the 256 colours, pale to strong
_PLAIN = "123456789"


def has_colour(stream: TextIO | None = None) -> bool:
    """Whether what is written there is seen by a person in colour."""
    return (stream or sys.stdout).isatty()


def heat(values: Sequence[float], most: float, *, colour: bool) -> str:
    """A character per value: blocks of rising height and warmth, or digits 1 to 9; a dot for 0.

    `most` is the value of the highest block.
    """
    steps = len(_BLOCKS if colour else _PLAIN)
    cells = []
    for value in values:
        level = min(max(round(steps * value / most), 1), steps) - 1 if value > 0 and most > 0 else None
        if level is None:
            cells.append("·" if colour else ".")
        else:
            cells.append(f"\x1b[38;5;{_WARM[level]}m{_BLOCKS[level]}\x1b[0m" if colour else _PLAIN[level])
    return "".join(cells)


def tinted(labels: Sequence[str], values: Sequence[float], *, colour: bool) -> str:
    """A text whose active tokens are tinted; in plain text, those above half of the largest value stand in brackets."""
    most, parts = max(values, default=0.0), []
    for label, value in zip(labels, values, strict=True):
        if colour and value > 0:
            level = min(max(round(len(_WARM) * value / most), 1), len(_WARM)) - 1
            parts.append(f"\x1b[48;5;{_WARM[level]};30m{label}\x1b[0m")
        else:
            parts.append(f"[{label}]" if value > most / 2 else label)
    return "".join(parts)


def spans(length: int, taken: int) -> Iterator[slice]:
    """Pieces of `length` cells that fit into the lines of the terminal beside `taken` characters."""
    room = max(shutil.get_terminal_size((120, 24)).columns - taken, 20)
    for start in range(0, length, room):
        yield slice(start, min(start + room, length))
