"""One self-contained HTML page from plain data: template, style and script ship with the package, nothing is fetched.

Text of documents reaches the page only as JSON and the DOM only as text nodes, so that no text can become markup.
"""

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any

from qscope_jax.files.atomic import write_text


def write_page(path: str | Path, title: str, data: dict[str, Any]) -> None:
    """Writes the page atomically.

    Args:
      path: the file to make.
      title: heading and window title.
      data: what explorer.js draws: `facts` [[name, value]], `texts` (heatmaps) and `layer` (the place of the one shown
        first); optional are `summary` (a table of anything), `languages` (that of the demo) and `rows` (what the rows
        of the heatmap are).
    """
    folder = resources.files("qscope_jax.explorer")
    read = lambda name: folder.joinpath(name).read_text(encoding="utf-8")  # noqa: E731
    parts = {"style": read("explorer.css"), "script": read("explorer.js"), "title": _escape(title), "data": _json(data)}
    # One pass: what is filled in is never searched for places to fill in.
    write_text(path, re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], read("explorer.html")))


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _json(data: dict[str, Any]) -> str:
    """JSON that cannot end its script element."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
