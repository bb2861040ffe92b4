"""`qscope steer`: a recipe beside its controls, and the weakest of a sweep, kept as a recipe that binds."""

import json

import pytest

from qscope_jax.cli import main
from qscope_jax.files.source import resolve
from qscope_jax.jobs.places import bind
from qscope_jax.steering import Steer, load_recipe


@pytest.fixture
def steer(tmp_path, capsys):
    """Runs the command with short texts; gives the exit code, the report and what was printed."""

    def run(*options, out="out"):
        folder = tmp_path / out
        code = main(
            ["steer", "To open a file,", "The old king", "--max-new-tokens", "12", "--out", str(folder), *options]
        )
        report = folder / "report.json"
        return code, json.loads(report.read_text()) if report.is_file() else None, capsys.readouterr(), folder

    return run


@pytest.mark.slow
def test_a_recipe_beside_its_controls(steer):
    code, report, printed, folder = steer(
        *(
            "--feature",
            "3:314",
            "--strength",
            "1.2",
            "--mode",
            "min-clamp",
            "--script",
            "Han",
            "--languages",
            "en",
            "zh",
        ),
        *("--controls", "--random", "2"),
    )
    assert code == 0
    arms = report["arms"]
    assert list(arms) == ["recipe", "unsteered", "identity", "random", "flipped", "prompt"]
    assert arms["identity"]["texts"] == arms["unsteered"]["texts"]
    assert arms["recipe"]["share"] > 0.6 > 0.1 > arms["random"]["share"]
    assert arms["recipe"]["selected"] == arms["identity"]["selected"] > arms["prompt"]["selected"]
    assert report["recipe"][0]["units"] == "xmax"
    assert report["recipe"][0]["hook"] == "model.layers.3"
    assert "| flipped |" in printed.out
    assert "activation of 3:314" in printed.out
    assert len({line.count("|") for line in (folder / "report.md").read_text().splitlines()}) == 1
    assert (folder / "report.md").read_text() in printed.out
    assert load_recipe(
        folder / "recipe.toml", lambda n: bind(resolve("demo", what="model"), resolve("demo", what="sae"), n)
    ) == [Steer(3, 314, 1.2, "min-clamp", "xmax")]
    again, report, *_ = steer("--steer", str(folder / "recipe.toml"), "--script", "Han", out="again")
    assert again == 0
    assert report["arms"]["recipe"]["texts"] == arms["recipe"]["texts"]


@pytest.mark.slow
def test_a_sweep_keeps_the_weakest_that_does_enough(steer):
    options = ("--concept", "chinese", "--layers", "3", "--mode", "min-clamp", "--script", "Han")
    code, report, printed, folder = steer(*options, "--sweep", "0.1", "1.2", "1.5", "--until", "0.5")
    assert code == 0
    assert len(report["arms"]) == 4
    assert report["recipe"][0]["strength"] == 1.2
    assert "The weakest that does enough: min-clamp 3:314 1.2 xmax" in printed.out
    code, report, printed, folder = steer(*options, "--sweep", "0.1", out="none")
    assert (code, report["recipe"]) == (0, None)
    assert "No recipe did enough" in printed.out
    assert not (folder / "recipe.toml").exists()


@pytest.mark.slow
def test_the_weakest_way_of_taking_away_is_the_least_one(steer):
    options = ("--feature", "3:239", "--script", "Latin", "--below", "1")
    assert steer(*options, "--mode", "scale", "--sweep", "0", "0.5", "0.9")[1]["recipe"][0]["strength"] == 0.9
    assert steer(*options, "--mode", "clamp", "--sweep", "0", "0.5", "0.2")[1]["recipe"][0]["strength"] == 0.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "say what to steer"),
        (("--concept", "chinese", "--feature", "3:1"), "say what to steer"),
        (("--feature", "3-1", "--strength", "1"), "--feature 3-1: expected LAYER:INDEX"),
        (("--feature", "3:99999", "--strength", "1"), "its SAE has the features 0..1535"),
        (("--feature", "3:1"), "needs a strength"),
        (("--feature", "3:1", "--strength", "1e30"), "expected a finite number"),
        (("--feature", "3:1", "--sweep", "1", "2"), "say of which script"),
        (("--feature", "3:1", "--sweep", "1", "--script", "Han", "--until", "2"), "--until 2.0: a share lies in 0..1"),
        (("--feature", "3:1", "--strength", "1", "--script", "Klingon"), "expected Unicode's names"),
        (("--feature", "3:1", "--strength", "1", "--languages", "xx"), "expected ISO 639-1 codes"),
        (("--feature", "3:1", "--strength", "1", "--max-new-tokens", "2"), "--max-new-tokens 2: expected at least 3"),
        (("--concept", "gothic", "--strength", "1"), "'gothic' is no set of texts"),
        (("--steer", "nowhere.toml"), "nowhere.toml"),
    ],
)
def test_what_cannot_be_is_refused(steer, options, reason):
    code, report, printed, _ = steer(*options)
    assert (code, report) == (2, None)
    assert reason in printed.err
