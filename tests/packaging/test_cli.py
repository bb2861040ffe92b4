"""The command line: help without jax, recipes as arguments, errors in one line, exit codes."""

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro

from qscope_jax import cli

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Text:
    field: str = "text"
    """The field of a row that holds the text."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A job for these tests."""

    target: tyro.conf.Positional[str] = "nothing"
    """What to work on."""
    model: str = "demo"
    """The model."""
    layers: tuple[int, ...] = (1,)
    """Some layers."""
    strength: float = 1.0
    """A number."""
    top_k: int | None = None
    """Another."""
    fast: bool = True
    """A switch."""
    text: Text = Text()


@pytest.fixture
def job(monkeypatch):
    """A command `trial` whose module is made here; `seen` collects its configs, `act` is what it does."""
    module = types.ModuleType("trial_job", "A job for these tests.")
    seen: list[Config] = []
    vars(module).update(Config=Config, seen=seen, act=lambda config: None)
    module.run = lambda config: (seen.append(config), module.act(config))[1]  # pyright: ignore
    monkeypatch.setitem(sys.modules, "trial_job", module)
    monkeypatch.setitem(cli.COMMANDS, "trial", ("trial_job", "a trial"))
    monkeypatch.delenv("QSCOPE_TRACEBACK", raising=False)
    return module


@pytest.fixture
def recipe(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "recipe.toml"
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


def fresh(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_help_lists_every_command_and_imports_no_jax():
    done = fresh("-X", "importtime", "-m", "qscope_jax.cli", "--help")
    assert done.returncode == 0
    for name, (_, line) in cli.COMMANDS.items():
        assert name in done.stdout
        assert line in done.stdout
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}
    assert "qscope_jax.cli" in imported or "tomllib" in imported
    assert not imported & {"jax", "numpy", "tyro", "transformers", "flax"}


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_documented_config_and_a_run(name, capsys):
    job = importlib.import_module(cli.COMMANDS[name][0])
    assert dataclasses.is_dataclass(job.Config)
    assert job.Config.__dataclass_params__.frozen
    assert callable(job.run)
    with pytest.raises(SystemExit) as caught:
        cli.main([name, "--help"])
    assert not caught.value.code
    shown = capsys.readouterr().out
    for field, (_, positional) in cli._fields(job.Config):
        assert positional or f"--{field.replace('_', '-')}" in shown


def test_without_a_command_and_with_a_wrong_one(capsys):
    assert cli.main([]) == cli.EXIT_ERROR
    assert "usage: qscope" in capsys.readouterr().err
    assert cli.main(["extrac"]) == cli.EXIT_ERROR
    assert capsys.readouterr().err.startswith("qscope: no command 'extrac'; did you mean extract?")


def test_a_command_may_have_two_words(job, monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "group trial", ("trial_job", "a trial in a group"))
    assert cli.main(["group", "trial", "here", "--strength", "2"]) == 0
    assert (job.seen[-1].target, job.seen[-1].strength) == ("here", 2.0)
    assert cli.main(["group", "trail"]) == 2
    assert "no command 'group trail'; did you mean group trial?" in capsys.readouterr().err
    assert cli.main(["group"]) == 2
    assert "no command 'group'" in capsys.readouterr().err

    def refuse(config):
        raise ValueError("no")

    job.act = refuse
    assert cli.main(["group", "trial"]) == 2
    assert capsys.readouterr().err.endswith("qscope group trial: no\n")


def test_a_recipe_becomes_arguments_and_what_is_typed_wins(job, recipe):
    path = recipe('layers = [3, 4]\ntop_k = 7\nfast = false\nstrength = -2.5\n[text]\nfield = "body"\n')
    assert cli.main(["trial", "--config", path]) == 0
    assert cli.main(["trial", f"--config={path}", "--top-k", "9", "--fast", "--layers", "5"]) == 0
    first, second = job.seen
    assert first == Config(layers=(3, 4), top_k=7, fast=False, strength=-2.5, text=Text("body"))
    assert second == dataclasses.replace(first, top_k=9, fast=True, layers=(5,))


def test_positionals_and_recipes(job, recipe):
    path = recipe('target = "from the recipe"\nlayers = [3, 4]\n')
    cli.main(["trial", "--config", path])
    cli.main(["trial", "typed", "--config", path])
    cli.main(["trial", "--config", path, "typed"])
    assert [config.target for config in job.seen] == ["from the recipe", "typed", "typed"]
    assert {config.layers for config in job.seen} == {(3, 4)}


def test_a_positional_of_several_values(job, recipe):
    job.Config = dataclasses.make_dataclass(
        "Config", [("data", tyro.conf.Positional[tuple[str, ...]]), ("top_k", int, 1)], frozen=True
    )
    path = recipe('data = ["a.jsonl", "b.jsonl"]\ntop_k = 3\n')
    cli.main(["trial", "--config", path])
    cli.main(["trial", "c.jsonl", "--config", path])
    assert [(config.data, config.top_k) for config in job.seen] == [(("a.jsonl", "b.jsonl"), 3), (("c.jsonl",), 3)]
    with pytest.raises(SystemExit):  # never a silent mixture of both
        cli.main(["trial", "--config", path, "--top-k", "5", "c.jsonl"])
    assert len(job.seen) == 2


def test_later_recipes_win(job, recipe, tmp_path):
    first = recipe("top_k = 1\nstrength = 3\n")
    second = tmp_path / "second.toml"
    second.write_text("top_k = 2\n")
    cli.main(["trial", "--config", first, "--config", str(second)])
    assert (job.seen[0].top_k, job.seen[0].strength) == (2, 3.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("topk = 7", "--top-k"),
        ("[text]\nfeild = 'x'", "--text.field"),
        ("top_k = 'many'", "--top-k"),
        ("top_k = 7.5", "--top-k"),
        ("layers = ['a']", "--layers"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_with_a_suggestion(job, recipe, capsys, text, told):
    path = recipe(text)
    with pytest.raises(SystemExit) as caught:
        cli.main(["trial", "--config", path])
    assert caught.value.code == cli.EXIT_ERROR
    shown = capsys.readouterr().err
    assert told in shown
    assert f"come from {path}" in shown
    assert job.seen == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("top_k = 7\ntop_k = 8", "given twice"),
        ("top_k = ", "is not a TOML recipe"),
        ("top_k = 2026-01-01", "must be a string"),
        ("layers = [[1], [2]]", "layers must be a string, a number"),
        ("[[text]]\nfield = 'x'", "text must be a string, a number"),
        ("fast = 'yes'", "fast = 'yes': expected bool"),
        ("top_k = true", "top_k = True: expected int"),
        ("layers = false", "layers = False: expected tuple"),
    ],
)
def test_recipes_that_are_damaged(job, recipe, capsys, text, told):
    assert cli.main(["trial", "--config", recipe(text)]) == cli.EXIT_ERROR
    assert told in capsys.readouterr().err
    assert job.seen == []


def test_recipes_that_are_missing(job, capsys):
    assert cli.main(["trial", "--config", "no/such.toml"]) == cli.EXIT_ERROR
    assert "no/such.toml" in capsys.readouterr().err
    assert cli.main(["trial", "--config"]) == cli.EXIT_ERROR
    assert "--config needs" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_understood_by_the_command_in_its_first_line(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith(f"# qscope {path.parent.name} "), "configs/COMMAND/NAME.toml, with the whole command first"
    command, *arguments = shlex.split(first.removeprefix("# qscope "))
    assert path.relative_to(ROOT).as_posix() in arguments
    config = cli.parse(importlib.import_module(cli.COMMANDS[command][0]), command, arguments)
    values = {name: value for name, value in cli.read_recipe(path) if not isinstance(value, list)}
    assert {name: getattr(config, name) for name in values} == values


@pytest.mark.parametrize(
    "error",
    [
        ValueError("k must be positive, found -1"),
        FileNotFoundError(2, "No such file", "x.pt"),
        FloatingPointError("the residual stream is not finite"),
    ],
)
def test_known_errors_are_one_line_and_unknown_ones_are_not_hidden(job, capsys, error):
    def fail(_):
        raise error

    job.act = fail
    assert cli.main(["trial"]) == cli.EXIT_ERROR
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"qscope trial: {error}"
    assert cli.main(["trial", "--traceback"]) == cli.EXIT_ERROR
    assert "Traceback" in capsys.readouterr().err
    error = ZeroDivisionError("a bug")
    job.act = lambda _: (_ for _ in ()).throw(error)
    with pytest.raises(ZeroDivisionError):
        cli.main(["trial"])


def test_the_environment_asks_for_tracebacks_too(job, capsys, monkeypatch):
    job.act = lambda _: [].index(1)
    monkeypatch.setenv("QSCOPE_TRACEBACK", "1")
    assert cli.main(["trial"]) == cli.EXIT_ERROR
    assert "Traceback" in capsys.readouterr().err


def test_the_embedded_model_is_announced_first_and_not_on_stdout(job, capsys):
    job.act = lambda config: print("result")
    cli.main(["trial"])
    shown = capsys.readouterr()
    assert shown.out == "result\n"
    assert shown.err.splitlines()[0].startswith("Using the embedded model")
    cli.main(["trial", "--model", "./mine"])
    assert "embedded" not in capsys.readouterr().err


def test_exit_codes_of_jobs_and_of_the_keyboard(job):
    def interrupted(_):
        raise SystemExit(75)

    job.act = lambda _: 3
    assert cli.main(["trial"]) == 3
    job.act = interrupted
    with pytest.raises(SystemExit) as caught:
        cli.main(["trial"])
    assert caught.value.code == 75

    def keyboard(_):
        raise KeyboardInterrupt

    job.act = keyboard
    assert cli.main(["trial"]) == cli.EXIT_KEYBOARD


def test_a_reader_that_goes_away_is_quiet():
    script = (
        "import sys, types, dataclasses\n"
        "from qscope_jax import cli\n"
        "job = types.ModuleType('trial_job', 'trial')\n"
        "job.Config = dataclasses.make_dataclass('Config', [('rows', int, 100000)], frozen=True)\n"
        "job.run = lambda config: [print(i) for i in range(config.rows)] and None\n"
        "sys.modules['trial_job'] = job\n"
        "cli.COMMANDS['trial'] = ('trial_job', 'a trial')\n"
        "sys.exit(cli.main(['trial']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == cli.EXIT_PIPE
