"""A process that renders chat templates and does nothing else; started by its path, so it imports nothing of ours.

One line of JSON per request on stdin, one per answer on stdout: {"template": ..., "values": {...}} gives {"text": ...}
or {"error": ...}. The first line says why memory is not limited, or {}. Arguments: bytes of memory; seconds of work and
characters of a text.
"""

import json
import os
import sys
import time
from datetime import datetime
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace


def main(memory: int, seconds: int, longest: int) -> None:
    """Answers until stdin ends. What a template may take of the machine is the process's, not the sandbox's, affair."""
    answers, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
    answer(answers, limit_memory(memory))
    compiled: dict[str, Any] = {}
    for line in sys.stdin:
        limit_seconds(seconds)
        try:
            request = json.loads(line)
            if request["template"] not in compiled:
                compiled = {request["template"]: make_environment().from_string(request["template"])}
            text = compiled[request["template"]].render(request["values"])
            answer(answers, {"error": f"wrote {len(text):,} characters"} if len(text) > longest else {"text": text})
        except Exception as error:
            answer(answers, {"error": f"failed: {type(error).__name__}: {error}"[:1000]})


def answer(answers: Any, content: dict[str, str]) -> None:
    answers.write(json.dumps(content) + "\n")
    answers.flush()


def limit_memory(size: int) -> dict[str, str]:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _lower(resource, resource.RLIMIT_AS, size)
    except (ImportError, ValueError, OSError) as error:
        return {"unlimited": f"{sys.platform} cannot limit a process's memory ({error})"}
    return {}


def limit_seconds(seconds: int) -> None:
    """From now on; ends a process that nobody is left to end. Without such a limit only the caller's clock counts."""
    try:
        import resource
    except ImportError:
        return
    _lower(resource, resource.RLIMIT_CPU, int(time.process_time()) + seconds + 1)


def _lower(resource: Any, kind: int, to: int) -> None:
    """Sets a limit, within that of the machine's owner."""
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (to if hard == resource.RLIM_INFINITY else min(to, hard), hard))


def make_environment() -> ImmutableSandboxedEnvironment:
    """What templates of checkpoints are written for: the sandbox, options and functions of transformers."""
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Spoken, loopcontrols])
    found.filters["tojson"] = to_json
    found.globals |= {
        "raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form), "namespace": Names,
        "dict": lambda *pairs, **named: dict(*pairs, **named),
    }  # fmt: skip
    return found


class Spoken(Extension):
    """`{% generation %}` marks what an assistant said, for training; here its content is text like any other."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Names(Namespace):
    """jinja's namespace without names that reach into Python."""

    def __init__(self, /, *pairs: Any, **named: Any):
        for name in dict(*pairs, **named):
            _check(name)
        super().__init__(*pairs, **named)

    def __setitem__(self, name: str, value: Any) -> None:
        _check(name)
        super().__setitem__(name, value)


def _check(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace holds no {name!r}")


def refuse(message: str) -> None:
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Unlike jinja's own it writes <, > and & as they are."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
