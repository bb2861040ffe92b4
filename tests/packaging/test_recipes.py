"""Recipes for the released sets: one per set and command, each naming its set's model, shape and files."""

import json
import tomllib
from pathlib import Path

import jax
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.mesh import make_mesh, partition
from qscope_jax.sae.model import AXES
from qscope_jax.sae.release import RELEASED

ROOT = Path(__file__).parents[2]
BACKBONES = json.loads((ROOT / "tests" / "goldens" / "released.json").read_text())


def recipe(command: str, name: str) -> tuple[str, dict]:
    text = (ROOT / "configs" / command / f"{name}.toml").read_text(encoding="utf-8")
    return text, tomllib.loads(text)


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: row.name)
class TestEveryReleasedSet:
    def test_extraction_reads_it(self, row):
        _, told = recipe("extract", row.name)
        assert (told["model"], told["sae"]) == (f"Qwen/{row.backbone}", row.repo)
        assert all(0 <= layer < row.layers for layer in told["layers"])

    def test_training_makes_one_of_its_shape_for_all_layers(self, row):
        text, told = recipe("train-sae", row.name)
        assert told["model"] == f"Qwen/{row.backbone}"
        assert (told["width"], told["k"]) == ([row.d_sae], [row.k])
        assert "layers" not in told
        # The comment's sum: float32 weights and two moments of two matrices.
        assert f"{row.layers} x {24 * row.d_model * row.d_sae / 1e9:.2f} = " in text
        assert f" = {24 * row.layers * row.d_model * row.d_sae / 1e9:.0f};" in text

    def test_the_mesh_of_the_training_divides_model_and_latents(self, row):
        _, told = recipe("train-sae", row.name)
        data, model = map(int, told.get("mesh", "1x1").split("x"))
        assert told["batch_tokens"] % (told["row_length"] * 8 * data) == 0, "eight shards, whole rows on every device"
        mesh = make_mesh(1, model, devices=jax.devices()[:model])
        parameter_shapes(ModelConfig.from_hf(BACKBONES[row.backbone]["config"]), mesh=mesh)
        partition(AXES["b_enc"], (row.d_sae,), mesh)
