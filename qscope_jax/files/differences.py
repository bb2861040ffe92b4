"""What differs between two JSON-like values, as lines that a person reads."""

import json
from typing import Any

_SHOWN = 80  # characters of a value


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines such as "data.seed: was 1, is 2", by dotted key, in the order of the keys; none if both are equal.

    Values are compared as JSON holds them: a tuple equals the list of the same items.

    Raises:
      TypeError: a value that JSON cannot hold.
    """
    return _lines("", _as_json(old), _as_json(new))


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _lines(where: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        absent = object()
        pairs = [(_joined(where, key), old.get(key, absent), new.get(key, absent)) for key in keys]
        found = []
        for name, was, now in pairs:
            if was is absent:
                found.append(f"{name}: was not there, is {_shown(now)}")
            elif now is absent:
                found.append(f"{name}: was {_shown(was)}, is not there")
            else:
                found += _lines(name, was, now)
        return found
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new, strict=True)) for line in _lines(_joined(where, i), *pair)]
    # 1 == True in Python, not in JSON.
    same = old == new and isinstance(old, bool) == isinstance(new, bool)
    return [] if same else [f"{where}: was {_shown(old)}, is {_shown(new)}"]


def _joined(where: str, key: str | int) -> str:
    return f"{where}.{key}" if where else str(key)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"
