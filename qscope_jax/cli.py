"""`qscope COMMAND ...`: one command per module of `qscope_jax.jobs`, imported only when it is called.

A recipe (`--config FILE.toml`) is turned into arguments that stand before the user's own: one parser checks the names
and types of both, and what is typed wins.
"""

import dataclasses
import difflib
import importlib
import os
import sys
import tomllib
import traceback
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import qscope_jax

COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("qscope_jax.jobs.demo", "see the embedded model's features in two minutes; nothing is downloaded"),
    "extract": ("qscope_jax.jobs.extract", "text in, sparse features out, per document or per token"),
    "info": ("qscope_jax.jobs.info", "what is known of a model or SAE; without one, the released sets"),
    "convert": ("qscope_jax.jobs.convert", "SAE files between native, Qwen-Scope, SAELens and sparsify layouts"),
    "eval-sae": ("qscope_jax.jobs.eval_sae", "what SAEs explain of a model, and what it predicts through them"),
    "train-sae": ("qscope_jax.jobs.train_sae", "train TopK SAEs for any layers of a model, all in one pass; resumable"),
    "features find": (
        "qscope_jax.jobs.features_find",
        "the features of a concept: two sets of texts, all layers at once",
    ),
    "features diff": ("qscope_jax.jobs.features_diff", "a text's features, or what tells two texts apart, as heatmaps"),
    "features diagnose": ("qscope_jax.jobs.features_diagnose", "which features stand behind a bad answer"),
    "features build": ("qscope_jax.jobs.features_build", "what every feature does on a text: rates, maxima, contexts"),
    "steer": ("qscope_jax.jobs.steer", "try recipes that change a model, beside controls or over strengths"),
    "generate": ("qscope_jax.jobs.generate", "continue prompts, greedily or by sampling, steered or not; resumable"),
    "bench": ("qscope_jax.jobs.bench", "speed and memory as ratios within one run on this machine"),
}
EXIT_ERROR = 2
EXIT_KEYBOARD = 130
EXIT_PIPE = 141
_SOURCES = {"source": "what is embedded", "model": "the embedded model", "sae": "the embedded SAEs"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (0 done, 2 wrong input, others are a command's own)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments or bool(os.environ.get("QSCOPE_TRACEBACK"))
    arguments = [a for a in arguments if a != "--traceback"]
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python flushes once more at exit, so that flush must have somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_PIPE
    except KeyboardInterrupt:
        print("\nqscope: stopped by the keyboard", file=sys.stderr)
        return EXIT_KEYBOARD
    except (ValueError, OSError, FloatingPointError) as error:
        if show_traceback:
            traceback.print_exc()
        else:
            name = f"qscope {_split_command(arguments)[0] or ''}".strip()
            print(f"{name}: {str(error) or type(error).__name__}", file=sys.stderr)
        return EXIT_ERROR


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else EXIT_ERROR
    if arguments[0] == "--version":
        print(f"qscope {qscope_jax.__version__}")
        return 0
    command, rest = _split_command(arguments)
    if command is None:
        grouped = any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
        wrong = " ".join(arguments[: 2 if grouped else 1])
        near = difflib.get_close_matches(wrong, COMMANDS, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no command {wrong!r}{meant} Commands: {', '.join(COMMANDS)} (qscope --help)")
    job = importlib.import_module(COMMANDS[command][0])
    config = parse(job, command, rest)
    _announce(config)
    return job.run(config) or 0


def _split_command(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The command, of one word or two, and what follows it; None where there is no such command."""
    for words in (2, 1):
        if (name := " ".join(arguments[:words])) in COMMANDS:
            return name, arguments[words:]
    return None, arguments


def usage() -> str:
    """The list of commands, made without importing any of them."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: qscope COMMAND [--config RECIPE.toml] [options]",
            "",
            *lines,
            "",
            "qscope COMMAND --help lists its options. --traceback shows where an error arose (or QSCOPE_TRACEBACK=1).",
            "A model or SAE is 'demo' (embedded), a folder, a file, owner/name[@revision] on the hub, gs://... or s3://...",
        ]
    )


def parse(job: ModuleType, command: str, arguments: Sequence[str]) -> Any:
    """The job's `Config` from recipes and arguments. Exits with code 2 after naming what is wrong, as argparse does."""
    import tyro

    recipes, typed = _split_recipes(arguments)
    if not recipes:
        return tyro.cli(job.Config, args=typed, prog=f"qscope {command}", description=job.__doc__)
    fields = dict(_fields(job.Config))
    ordered = [name for name, (_, positional) in fields.items() if positional]
    flags, given = list[str](), dict[str, list[str]]()
    for recipe in recipes:
        for name, value in read_recipe(recipe):
            kind = fields[name][0] if name in fields else None
            if isinstance(value, bool) != (kind is bool) and kind is not None:  # the parser would take it for a switch
                raise ValueError(f"{recipe}: {name} = {value!r}: expected {getattr(kind, '__name__', kind)}")
            if name in ordered:
                given[name] = [str(v) for v in value] if isinstance(value, list) else [str(value)]
            else:
                flags += _as_arguments(name, value)
    # Leading positionals go first: after a recipe's array they would be read as more of its values.
    count = next((i for i, a in enumerate(typed) if a.startswith("-")), len(typed))
    front = typed[:count] or _in_order(ordered, given)
    try:
        return tyro.cli(
            job.Config, args=[*front, *flags, *typed[count:]], prog=f"qscope {command}", description=job.__doc__
        )
    except SystemExit as error:
        if error.code:
            print(f"Options that you did not type come from {', '.join(map(str, recipes))}.", file=sys.stderr)
        raise


def read_recipe(path: Path) -> Iterator[tuple[str, Any]]:
    """A TOML file's keys, tables as dotted names, with their values: booleans, numbers, strings and arrays of them.

    Raises:
        ValueError: not TOML (a key given twice is not), or a value that no argument can express.
        OSError: the file cannot be read.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = " (is a key given twice?)" if "overwrite" in str(error) else ""
        raise ValueError(f"{path} is not a TOML recipe: {error}{hint}") from error
    yield from _flattened(path, content, "")


def _flattened(path: Path, table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = prefix + key.replace("-", "_")
        values = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            yield from _flattened(path, value, f"{name}.")
        elif not all(isinstance(v, str | int | float) for v in values):
            raise ValueError(f"{path}: {name} must be a string, a number, true or false, or an array of such")
        else:
            yield name, value


def _as_arguments(name: str, value: Any) -> list[str]:
    head, _, last = name.replace("_", "-").rpartition(".")
    head = f"--{head}." if head else "--"
    if isinstance(value, bool):
        return [head + last if value else f"{head}no-{last}"]
    if isinstance(value, list):
        return [head + last, *map(str, value)]
    return [f"{head}{last}={value}"]


def _split_recipes(arguments: Sequence[str]) -> tuple[list[Path], list[str]]:
    recipes: list[Path] = []
    typed: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--config":
            name = next(rest, None)
            if name is None:
                raise ValueError("--config needs the name of a TOML file")
            recipes.append(Path(name))
        elif argument.startswith("--config="):
            recipes.append(Path(argument.removeprefix("--config=")))
        else:
            typed.append(argument)
    return recipes, typed


def _fields(config: type, prefix: str = "") -> Iterator[tuple[str, tuple[Any, bool]]]:
    """Dotted names of the fields with their types, and whether the command takes them without a flag; in order."""
    import tyro

    marker = typing.get_args(tyro.conf.Positional[int])[1]
    for name, hint in typing.get_type_hints(config, include_extras=True).items():
        positional = marker in getattr(hint, "__metadata__", ())
        plain = typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
        if dataclasses.is_dataclass(plain) and isinstance(plain, type):
            yield from _fields(plain, f"{prefix}{name}.")
        else:
            yield prefix + name, (plain, positional)


def _in_order(ordered: list[str], given: dict[str, list[str]]) -> list[str]:
    missing = [name for name in ordered[: len(given)] if name not in given]
    if missing:
        raise ValueError(f"the recipe gives {', '.join(given)} but not {missing[0]}, which comes first")
    return [value for name in ordered for value in given.get(name, ())]


def _announce(config: Any) -> None:
    """The first line of every command that runs on what is embedded says so; on stderr, since stdout may be data."""
    used = [words for name, words in _SOURCES.items() if getattr(config, name, None) == "demo"]
    if used:
        print(
            f"Using {' and '.join(used)}: small, made by this project, to try things out.", file=sys.stderr, flush=True
        )


if __name__ == "__main__":
    sys.exit(main())
