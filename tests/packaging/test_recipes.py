"""Recipes for the released sets: one per set and command, each naming its set's model, shape and files."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import jax
import pytest

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.jobs.train_config import Config, plan_for
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

    def test_the_training_comment_adds_up_what_a_device_holds(self, row):
        text, told = recipe("train-sae", row.name)
        text = text.replace("\n# ", " ")
        data, model = map(int, told.get("mesh", "1x1").split("x"))
        options: Any = {name: tuple(value) if isinstance(value, list) else value for name, value in told.items()}
        mesh: Any = jax.sharding.AbstractMesh((data, model), ("data", "model"))
        constants = ModelConfig.from_hf(BACKBONES[row.backbone]["config"])
        plan, _ = plan_for(Config(**options), constants, mesh)
        batch = 2 * row.layers * told["batch_tokens"] * row.d_model
        # Layers x (weights, moments) and one layer's gradients and copies; the model; fresh, drawn and waiting tokens.
        saes, weights = (24 * row.layers + 8 + 4) * row.d_model * row.d_sae, 2 * BACKBONES[row.backbone]["parameters"]
        held = (saes + weights) / model + (2 + plan.buffer) * batch / data
        assert plan.buffer > 0
        assert f"2 l T d = {batch / 1e9:.2f}, held fresh, drawn and {plan.buffer} time" in text
        assert f"in the mixing buffer, {(2 + plan.buffer) * batch / 1e9:.1f}. " in text
        assert f"DATA: {held / 1e9:.0f} a device. Not counted is what the forward pass works in." in text
        (memory,) = re.findall(r"devices? of (\d+) GB", text)
        assert held / 1e9 < 0.9 * int(memory), "room to work in"

    def test_the_mesh_of_the_training_divides_model_and_latents(self, row):
        _, told = recipe("train-sae", row.name)
        data, model = map(int, told.get("mesh", "1x1").split("x"))
        assert told["batch_tokens"] % (told["row_length"] * 8 * data) == 0, "eight shards, whole rows on every device"
        mesh = make_mesh(1, model, devices=jax.devices()[:model])
        parameter_shapes(ModelConfig.from_hf(BACKBONES[row.backbone]["config"]), mesh=mesh)
        partition(AXES["b_enc"], (row.d_sae,), mesh)
