"""The demo shows what it says, on the embedded model, and every command it ends with works."""

import json
import shlex

import pytest

from qscope_jax import cli
from qscope_jax.explorer.tokens import PART
from qscope_jax.jobs.demo import LANGUAGES, next_commands

TEXT = "Ein Satz von mir. 我的句子。"


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder of one run with a text of the user's."""
    out = tmp_path_factory.mktemp("demo")
    assert cli.main(["demo", "--text", TEXT, "--out", str(out)]) == 0
    return out


def test_every_language_has_a_feature_that_tells_it_apart_on_passages_it_was_not_chosen_on(shown):
    table = json.loads((shown / "languages.json").read_text(encoding="utf-8"))
    assert [row["language"] for row in table] == list(LANGUAGES.values())
    for row in table:
        assert row["auroc"] >= 0.9, row
        assert row["rate"] > 2 * row["other_rate"], row


def test_the_strongest_contexts_of_a_feature_hold_its_strongest_tokens(shown):
    table = json.loads((shown / "languages.json").read_text(encoding="utf-8"))
    for row in table:
        peaks = [max(context["values"]) for context in row["contexts"]]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[0] > 0
        assert all(len(c["tokens"]) == len(c["values"]) for c in row["contexts"])


def test_the_page_starts_with_the_users_text(shown):
    page = (shown / "index.html").read_text(encoding="utf-8")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["texts"][0]["label"] == "your text"
    assert "".join(data["texts"][0]["tokens"]).replace(PART, "") == TEXT
    assert len(data["texts"]) == 1 + len(LANGUAGES)
    for layer in data["texts"][0]["layers"]:
        assert all(value > 0 for row in layer["rows"] for _, value in row["cells"])


def test_the_manifest_says_what_ran(shown):
    manifest = json.loads((shown / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["state"] == "complete"
    assert manifest["command"] == "demo"


@pytest.mark.parametrize("command", next_commands())
def test_the_commands_to_try_next_work_as_printed(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)
    assert program == "qscope"
    assert cli.main(arguments) == 0
