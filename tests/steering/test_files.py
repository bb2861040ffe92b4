"""A recipe file says what is applied and to what it belongs; for another model, SAE or layer it is refused."""

import hashlib
import json
import subprocess
import tomllib
from functools import partial

import numpy as np
import pytest

from qscope_jax.files.recognise import FormatError
from qscope_jax.files.source import resolve
from qscope_jax.files.tensors import write_tensors
from qscope_jax.jobs.places import bind, model_files
from qscope_jax.sae.formats import load_saes
from qscope_jax.steering import Bound, Steer, load_recipe, save_recipe, steer
from qscope_jax.steering.files import combine_hashes
from tests.steering.conftest import LATENTS, WIDTH, FakeStats, K

BOUND = Bound("a" * 64, {n: str(n) * 64 for n in range(4)}, dict.fromkeys(range(4), K), "the/model", "the SAEs")
ENTRIES = [
    Steer(1, 3, 0.8, "clamp", "xmax", "generated", True),
    Steer(2, 5, -1.25e-7),
    Steer(1, 4, mode="ablate", positions="0,2,5-8"),
    Steer(3, 4, 2.0, "scale"),
    Steer(0, direction=np.linspace(-1, 1, WIDTH), strength=0.5, mode="project", units="xnorm"),
]


STATS = {layer: FakeStats(np.linspace(1, 9, LATENTS), 4.0 + layer) for layer in range(4)}


def found(layers, bound=BOUND):
    return bound._replace(saes={layer: bound.saes[layer] for layer in layers})


@pytest.fixture(params=["toml", "json"])
def written(request, model, tmp_path):
    return save_recipe(tmp_path / f"recipe.{request.param}", ENTRIES, model.saes, BOUND, stats=STATS)


def parsed(path):
    text = path.read_text(encoding="utf-8")
    return tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)


def test_what_is_written_is_read(written):
    assert load_recipe(written, found) == ENTRIES


def test_it_says_hooks_and_strengths_in_all_units(model, written):
    content = parsed(written)
    clamp, add, ablate, scale, direction = content["steer"]
    assert (clamp["hook"], clamp["at"], clamp["layer"]) == ("model.layers.1", "output", 1)
    norm = np.linalg.norm(model.saes[1].params.w_dec[3])
    raw = 0.8 * STATS[1].max[3]
    expected = {"raw": raw, "xmax": 0.8, "xnorm": raw * norm / 5.0, "norm": norm}
    assert clamp["measured"] == pytest.approx(expected, rel=1e-6)
    assert add["measured"]["raw"] == -1.25e-7
    assert ablate["measured"].keys() == {"norm"}
    assert scale["measured"].keys() == {"raw", "norm"}
    assert direction["measured"]["raw"] == 2.0
    assert [table["layer"] for table in content["sae"]] == [1, 2, 3]


def test_without_statistics_only_what_is_known_is_said(model, tmp_path):
    path = save_recipe(tmp_path / "r.toml", [Steer(1, 2, 3.0)], model.saes, BOUND)
    assert parsed(path)["steer"][0]["measured"].keys() == {"raw", "norm"}
    assert "directions" not in parsed(path)
    assert [file.name for file in tmp_path.iterdir()] == ["r.toml"]


def test_another_model_sae_or_layer_is_refused_by_both_hashes(written):
    other = "f" * 64
    for bound, says in [
        (BOUND._replace(model=other), f"another model .the/model., with sha256 {'a' * 64}; the one .*{other}"),
        (BOUND._replace(saes={**BOUND.saes, 2: other}), f"SAE of layer 2 .the SAEs., .* {'2' * 64}; .*{other}"),
        (BOUND._replace(saes={**BOUND.saes, 1: "2" * 64}), f"SAE of layer 1 .* {'1' * 64}; .*{'2' * 64}"),
    ]:
        with pytest.raises(FormatError, match=says):
            load_recipe(written, partial(found, bound=bound))


def test_another_k_is_refused_and_files_of_before_it_was_written_are_read(model, written):
    assert [table["k"] for table in parsed(written)["sae"]] == [K] * 3
    with pytest.raises(FormatError, match=rf"made with k = {K} of the SAE of layer 2, .* used with k = {K - 1}"):
        load_recipe(written, partial(found, bound=BOUND._replace(k={**BOUND.k, 2: K - 1})))
    text = written.read_text(encoding="utf-8")
    line = "k = 6\n" if written.suffix == ".toml" else ',\n      "k": 6'
    assert text.count(line) == 3
    written.write_text(text.replace(line, ""), encoding="utf-8")
    assert load_recipe(written, found) == ENTRIES
    with pytest.raises(ValueError, match=rf"the SAE of layer 1 has k = {K}, `bound` says 3"):
        save_recipe(written, ENTRIES, model.saes, BOUND._replace(k={**BOUND.k, 1: 3}), stats=STATS)


def test_a_recipe_without_entries_is_said_to_be_empty(model, tmp_path):
    with pytest.raises(ValueError, match="there are no entries under `steer`"):
        save_recipe(tmp_path / "r.toml", [], model.saes, BOUND)
    head = 'format = "qscope-recipe-1"\n[model]\nsha256 = "' + "a" * 64 + '"\n'
    for nothing in ("", "steer = []\n"):
        (tmp_path / "r.toml").write_text(nothing + head)
        with pytest.raises(FormatError, match=r"r\.toml: there are no entries under `steer`"):
            load_recipe(tmp_path / "r.toml", found)


def edit(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('hook = "model.layers.2"', 'hook = "model.layers.1"', r"steer\[1\]: the hook is the output of model.layers.1"),
        (
            'at = "output"',
            'at = "input"',
            r"steer\[0\]: the hook is the input of model.layers.1; layer 1 means the out",
        ),
        ("layer = 2\nfeature", "layer = 0\nfeature", r"steer\[1\]: the hook is the output of model.layers.2"),
        ('units = "xmax"', 'units = "max"', r"steer\[0\]: units = 'max'; expected one of"),
        ("strength = 0.8", "strength = nan", r"steer\[0\]: strength = nan"),
        ("strength = 0.8", 'strength = "0.8x"', r"steer\[0\]: strength = '0.8x'"),
        ("strength = 0.8", "strenght = 0.8", r"steer\[0\]: unknown strenght; expected at, direction, feature"),
        ("preserve_norm = true", "preserve_norm = 1", r"steer\[0\]: preserve_norm = 1"),
        ("feature = 5", "feature = 5\nfeature = 6", "not a readable recipe .*[Oo]verwrite"),
        ("feature = 5", "feature = 5.0", r"steer\[1\]: feature = 5.0; expected a whole number"),
        ("layer = 2\nfeature = 5", "", r"steer\[1\]: .*missing 1 required .*'layer'"),
        ('direction = "direction4"', 'direction = "d"', r"steer\[4\]: direction = 'd'; the directions are \['dir"),
        ('format = "qscope-recipe-1"', 'format = "2"', "format = '2', expected 'qscope-recipe-1'"),
        ("[model]", "[modl]", "unknown modl; expected directions, format"),
        ('file = "recipe.directions', 'file = "../recipe.directions', "expected the name of a file beside the recipe"),
        (f'sha256 = "{"2" * 64}"', "", "bound to no SAE of layer 2, as every recipe must be; the one .*" + "2" * 64),
        (f'sha256 = "{"2" * 64}"\nk = 6', f'sha256 = "{"2" * 64}"\nk = "6"', "made with k = '6' of the SAE of layer 2"),
        (f'sha256 = "{"a" * 64}"', "", "bound to no model, as every recipe must be; the one .*" + "a" * 64),
        ("layer = 3\nname", "layer = 1\nname", r"sae\[2\]: layer = 1; expected a number that no other has"),
    ],
)
def test_what_no_recipe_says_is_refused(model, tmp_path, old, new, says):
    path = save_recipe(tmp_path / "recipe.toml", ENTRIES, model.saes, BOUND, stats=STATS)
    with pytest.raises(FormatError, match=says):
        load_recipe(edit(path, old, new), found)


def test_json_that_python_would_take_silently_is_refused(model, tmp_path):
    path = save_recipe(tmp_path / "recipe.json", ENTRIES[:1], model.saes, BOUND, stats=STATS)
    with pytest.raises(FormatError, match="key given twice"):
        load_recipe(edit(path, '"feature": 3,', '"feature": 3, "feature": 4,'), found)
    for text, says in [
        ("[" * 100_000, "not a readable recipe"),
        ("[]", "expected a table"),
        ('{"format": "qscope-recipe-1", "steer": {}}', "steer must be a list of tables"),
        ('{"format": "qscope-recipe-1", "model": []}', "model: expected a table|bound to no model"),
    ]:
        path.write_text(text)
        with pytest.raises(FormatError, match=says):
            load_recipe(path, found)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(FormatError, match="not a readable recipe"):
        load_recipe(path, found)


def test_other_directions_than_those_of_the_recipe_are_refused(written):
    beside = written.with_name("recipe.directions.safetensors")
    write_tensors(beside, {"direction4": np.ones(WIDTH, np.float32)})
    with pytest.raises(FormatError, match=f"sha256 {hashlib.sha256(beside.read_bytes()).hexdigest()}, the recipe was"):
        load_recipe(written, found)
    beside.unlink()
    with pytest.raises(FileNotFoundError):
        load_recipe(written, found)


def test_what_cannot_be_written_is_refused(model, tmp_path):
    for path, entries, bound, says in [
        ("r.yaml", ENTRIES, BOUND, "a recipe's name ends in .toml or .json"),
        ("r.toml", ENTRIES, BOUND._replace(saes={1: "1"}), r"no hash was given for the SAEs of layers \[2, 3\]"),
        ("r.toml", [Steer(1, 2, 1.0), Steer(1, 2, 2.0)], BOUND, "steered twice"),
        ("r.toml", [Steer(1, LATENTS, 1.0)], BOUND, "its SAE has the features"),
    ]:
        with pytest.raises(ValueError, match=says):
            save_recipe(tmp_path / path, entries, model.saes, bound, stats=STATS)
    assert not list(tmp_path.glob("r.*l"))


def test_names_of_all_kinds_are_written(model, tmp_path):
    odd = BOUND._replace(model_name='a "b" \\ \x7f\n\t模型 \U0001f600')
    path = save_recipe(tmp_path / "r.toml", ENTRIES[:1], model.saes, odd, stats=STATS)
    assert parsed(path)["model"]["name"] == odd.model_name
    assert load_recipe(path, found) == ENTRIES[:1]


def test_a_recipe_is_bound_to_the_files_that_decide(tiny_release, tmp_path):
    model, sae = resolve(tiny_release / "model", what="model"), resolve(tiny_release / "sae", what="sae")
    saes, at_hand = load_saes(tiny_release / "sae"), partial(bind, model, sae)
    entries = [Steer(1, 3, 2.0), Steer(0, 2, 1.0, "clamp")]
    path = save_recipe(tmp_path / "r.toml", entries, saes, at_hand((0, 1)))
    assert load_recipe(path, at_hand) == entries
    steer(load_recipe(path, at_hand), saes)
    names = sorted(file.name for file in model_files(model))
    lines = subprocess.run(["sha256sum", *names], cwd=tiny_release / "model", check=True, capture_output=True).stdout
    assert parsed(path)["model"]["sha256"] == hashlib.sha256(lines).hexdigest()
    assert combine_hashes({"b": "1", "a": "2"}) == combine_hashes({"a": "2", "b": "1"})
    demo = resolve("demo", what="model")
    with pytest.raises(FormatError, match="it was made for another model"):
        load_recipe(path, partial(bind, demo, sae))
