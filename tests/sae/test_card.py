"""The model card: what the hub reads of it, tables of what was measured alone, and snippets that run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from huggingface_hub import ModelCard

from qscope_jax.sae.card import Card, render_card
from qscope_jax.sae.formats import save_sae
from qscope_jax.sae.model import Sae, SaeConfig, init_sae, to_dense

CONFIG = SaeConfig(16, 64, 4, backbone="Qwen/X")
QUALITY = {
    3: {"fvu": 0.25, "explained_variance": 0.75, "l0": 4.0, "dead_fraction": 0.015625, "density": {"never": 1}},
    1: {"fvu": 0.5, "explained_variance": 0.5, "l0": 3.5, "dead_fraction": 0.0, "ce_recovered": None, "kl": 0.125},
}


def card(**changes) -> str:
    told = {
        "title": "SAE-Res-X-W64-L0_4", "config": CONFIG, "quality": QUALITY, "measured_on": "10,000 held-out tokens",
        "recipe": {"tokens": 5_000_000, "lr": 2e-4, "mesh": "2x4", "layers": (1, 3)}, "data": ["a.jsonl, weight 1"],
    }  # fmt: skip
    return render_card(Card(**{**told, **changes}))


def rows(text: str, head: str) -> list[list[str]]:
    """The cells of the table that starts with a heading."""
    found = re.search(rf"^\| {head} \|.*\n(?:\|.*\n?)*", text, re.MULTILINE)
    assert found, f"no table {head}"
    lines = found[0].strip().splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in (lines[0], *lines[2:])]


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


class TestFrontMatter:
    def test_the_hub_reads_it(self):
        data = ModelCard(card(license="cc-by-4.0")).data
        assert (data.license, data.base_model) == ("cc-by-4.0", "Qwen/X")
        assert "sparse-autoencoder" in data.tags

    def test_without_a_licence_it_is_other_and_said(self):
        assert ModelCard(card()).data.license == "other"
        assert "has not stated a licence" in card()
        assert "has not stated a licence" not in card(license="mit")

    @pytest.mark.parametrize("backbone", [None, "demo", "/srv/model", "./x/y", "a b/c"])
    def test_a_backbone_that_is_not_on_the_hub_is_no_base_model(self, backbone):
        told = card(config=SaeConfig(16, 64, 4, backbone=backbone))
        assert ModelCard(told).data.base_model is None
        assert backbone is None or f"`{backbone}`" in told

    @pytest.mark.parametrize("license", ["Apache 2.0", "", "mit\ntags: x"])
    def test_what_is_no_identifier_is_refused(self, license):
        with pytest.raises(ValueError, match="expected an identifier of the hub"):
            card(license=license)


class TestTables:
    def test_a_row_per_layer_and_no_column_that_nobody_measured(self):
        assert rows(card(), "layer") == [
            ["layer", "FVU", "explained variance", "L0", "dead", "KL, nats"],
            ["1", "0.5000", "0.5000", "3.5", "0.00%", "0.1250"],
            ["3", "0.2500", "0.7500", "4.0", "1.56%", ""],
        ]
        assert "Measured on 10,000 held-out tokens." in card()
        assert "CE recovered" not in card()

    def test_it_is_said_on_how_many_tokens_each_figure_is(self):
        row = {"fvu": 0.5, "kl": 0.1, "tokens": 9000.0, "predicted_tokens": 2048.0, "dead_in_training": 0.25}
        told = card(quality={0: row, 1: {**row, "tokens": 8000.0}}, dead_after=100_000)
        assert (
            "10,000 held-out tokens: in a layer, 8,000 to 9,000 tokens that count; CE and KL on 2,048 predicted" in told
        )
        table = rows(told, "layer")
        assert table[0] == ["layer", "FVU", "silent for 100,000 tokens in training", "KL, nats"]
        assert table[1] == ["0", "0.5000", "25.00%", "0.1000"]

    def test_what_training_counted_stands_there_where_nothing_was_measured(self):
        told = card(quality={0: {"dead_in_training": 0.125}}, dead_after=256)
        assert rows(told, "layer") == [["layer", "silent for 256 tokens in training"], ["0", "12.50%"]]
        assert "Nothing was measured" in told
        assert "held-out tokens" not in told

    def test_numbers_that_are_none_are_not_shown(self):
        table = rows(card(quality={0: {"fvu": float("nan"), "l0": True, "cosine": 0.5}}), "layer")
        assert table == [["layer", "cosine"], ["0", "0.5000"]]

    def test_nothing_measured_is_said(self):
        assert "Nothing was measured" in card(quality={0: {}, 1: {}})
        with pytest.raises(ValueError, match="at least one layer"):
            card(quality={})

    def test_the_recipe_and_the_data(self):
        told = rows(card(), "option")
        assert told[1:] == [["tokens", "5,000,000"], ["lr", "0.0002"], ["mesh", "2x4"], ["layers", "1, 3"]]
        assert "- a.jsonl, weight 1" in card()

    def test_values_cannot_break_a_table(self):
        assert "| data | a\\|b c |" in card(recipe={"data": "a|b\nc"})

    def test_sinks_of_the_layers_at_hand(self):
        assert rows(card(quality={3: {}}, sink_thresholds={3: 812.5, 9: 1.0}), "layer")[1:] == [["3", "812.5"]]
        assert "## Sinks" not in card()

    def test_layers_in_words(self):
        assert "one for each of 4 layers (0..2, 7)" in card(quality={7: {}, 0: {}, 1: {}, 2: {}})


@pytest.fixture(params=["safetensors", "qwen-scope"])
def folder(request, tmp_path, monkeypatch):
    """A folder of one SAE with its card, entered; gives the card's snippets for it."""
    sae = init_sae(jax.random.key(0), SaeConfig(16, 64, 4, layer=3))
    sae = Sae(sae.params._replace(b_enc=jnp.linspace(-1, 1, 64), b_dec=jnp.linspace(-1, 1, 16)), sae.config)
    save_sae(sae, tmp_path, format=request.param)
    monkeypatch.chdir(tmp_path)
    return snippets(card(quality={3: {}}, format=request.param))


def test_the_first_snippet_runs_beside_the_files(folder):
    names: dict = {}
    exec(folder[0], names)
    assert names["x_hat"].shape == (1, 16)
    assert names["code"].indices.shape == (1, 4)


@pytest.mark.parity
def test_the_second_snippet_computes_in_torch_what_the_first_does(folder):
    pytest.importorskip("torch")
    x = np.random.default_rng(0).normal(size=(1, 16)).astype(np.float32)
    ours, theirs = {"drawn": x}, {"drawn": x}
    exec(folder[0].replace("jnp.zeros((1, 16))", "jnp.asarray(drawn)"), ours)
    exec(folder[1].replace("torch.zeros(1, 16)", "torch.from_numpy(drawn)", 1), theirs)
    np.testing.assert_allclose(to_dense(ours["code"], 64), theirs["latents"].numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours["x_hat"], theirs["x_hat"].numpy(), rtol=1e-5, atol=1e-6)
