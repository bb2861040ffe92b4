"""The ids that end a text are those which transformers finds in the same folder."""

import json

import pytest

from qscope_jax.backbone.config_reader import ConfigError
from qscope_jax.backbone.weights import Backbone, load_backbone, save_backbone


@pytest.fixture
def folder(config, params, tmp_path):
    save_backbone(Backbone(config, params), tmp_path / "model")
    return tmp_path / "model"


def say(folder, config, generation):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"eos_token_id": config}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return load_backbone(folder, dtype="float32").config.eos_token_ids


CASES = [
    (7, None, (7,)),
    ([7, 8], None, (7, 8)),
    (7, {"eos_token_id": 9}, (9,)),
    (7, {"eos_token_id": [9, 7], "temperature": 0.6, "do_sample": True}, (9, 7)),
    (None, {"eos_token_id": 9}, (9,)),
    (7, {"bos_token_id": 3}, ()),  # the file decides, even by saying nothing
    (7, {"eos_token_id": None}, ()),
]


@pytest.mark.parametrize(("config_says", "generation_says", "expected"), CASES)
def test_generation_config_decides_where_it_stands(folder, config_says, generation_says, expected):
    assert say(folder, config_says, generation_says) == expected


@pytest.mark.parity
@pytest.mark.parametrize(("config_says", "generation_says", "expected"), CASES)
def test_it_is_what_transformers_does(folder, config_says, generation_says, expected):
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    say(folder, config_says, generation_says)
    theirs = AutoModelForCausalLM.from_pretrained(folder).generation_config.eos_token_id
    assert tuple(theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]) == expected


@pytest.mark.parametrize("wrong", ["</s>", [1, True], 1.5])
def test_what_is_no_id_is_refused_by_the_files_name(folder, wrong):
    with pytest.raises(ConfigError, match=r"generation_config.json: eos_token_id = .* is not an id"):
        say(folder, 7, {"eos_token_id": wrong})


def test_a_damaged_file_is_refused(folder):
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config.json: not a readable"):
        load_backbone(folder)
