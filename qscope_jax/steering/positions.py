"""Which tokens of a text a rule means: "all", "prompt", "generated", "last", "5", "3-7", or several: "0,2,5-8"."""

import re

FORMS = "'all', 'prompt', 'generated', 'last' (of the prompt), '5', '3-7' (both ends), or several: '0,2,5-8'"
EVER = 2**31 - 1  # positions are int32

# (low, high, whether they count from the prompt's end): half-open.
Range = tuple[int, int, int]
_NAMED: dict[str, Range] = {
    "all": (0, EVER, 0),
    "prompt": (-EVER, 0, 1),
    "generated": (0, EVER, 1),
    "last": (-1, 0, 1),
}
_NUMBERS = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")


def parse_positions(rule: str) -> tuple[Range, ...]:
    """The ranges whose union a rule means: named ones first, then numbers, ascending and merged where they touch.

    Positions count the real tokens of a text from 0.

    Raises:
      ValueError: not of these forms, or a range that ends before it begins.
    """
    named, spans = [], []
    for term in rule.split(",") if isinstance(rule, str) else [""]:
        term = term.strip()
        if term in _NAMED:
            named.append(_NAMED[term])
            continue
        match = _NUMBERS.fullmatch(term)
        if match is None:
            raise ValueError(f"positions = {rule!r}; expected {FORMS}")
        low, high = int(match[1]), int(match[2] or match[1])
        if not low <= high < EVER:
            raise ValueError(f"positions = {rule!r}: {term} ends before it begins, or beyond any text")
        spans.append((low, high + 1))
    return (*sorted(set(named)), *((low, high, 0) for low, high in _merged(spans)))


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for low, high in sorted(spans):
        if merged and low <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return merged
