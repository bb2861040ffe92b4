"""What was applied, in every unit, and to how many tokens; and the table of another tool, both ways."""

import numpy as np
import pytest

from qscope_jax.files.recognise import FormatError
from qscope_jax.steering import Applied, Steer, count_applied, describe, read_lm_eval, steer, write_lm_eval
from tests.steering.conftest import LATENTS, LENGTHS, NEW, WIDTH, FakeStats

STATS = {layer: FakeStats(np.linspace(1, 9, LATENTS), 4.0 + layer) for layer in range(4)}


def test_every_entry_is_described_in_all_units(model):
    norm = np.linalg.norm(model.saes[1].params.w_dec[3])
    vector = np.linspace(-1, 1, WIDTH)
    length = np.linalg.norm(vector)
    clamp, project, scale, ablate, plain = describe(
        [
            Steer(1, 3, 0.5, "clamp", "xnorm"),
            Steer(1, 3, 2.0, "project", "xmax", "last", True),
            Steer(1, 3, 2.0, "scale"),
            Steer(1, 3, mode="ablate"),
            Steer(2, direction=vector, strength=3.0),
        ],
        model.saes,
        stats=STATS,
    )
    raw, largest = 0.5 * 5.0 / norm, STATS[1].max[3]
    assert clamp == {
        "layer": 1, "hook": "model.layers.1", "at": "output", "feature": 3, "mode": "clamp", "strength": 0.5,
        "units": "xnorm", "positions": "all", "preserve_norm": False, "norm": pytest.approx(norm),
        "raw": pytest.approx(raw), "xmax": pytest.approx(raw / largest), "xnorm": pytest.approx(0.5),
    }  # fmt: skip
    assert (project["raw"], project["xmax"]) == pytest.approx((2 * largest * norm, 2.0), rel=1e-6)
    assert project["xnorm"] == pytest.approx(2 * largest * norm / 5.0)
    assert [scale[units] for units in ("raw", "xmax", "xnorm")] == [2.0, None, None]
    assert [ablate[units] for units in ("strength", "raw", "xmax", "xnorm")] == [None] * 4
    assert "feature" not in plain
    assert len(plain["direction"]) == 64
    assert (plain["raw"], plain["xmax"], plain["xnorm"]) == (3.0, None, pytest.approx(3.0 * length / 6.0))
    (bare,) = describe([Steer(1, 3, 1.0)], model.saes)
    assert (bare["raw"], bare["xmax"], bare["xnorm"]) == (1.0, None, None)
    silent = {1: FakeStats(np.zeros(LATENTS), 5.0)}
    assert describe([Steer(1, 3, 1.0)], model.saes, stats=silent)[0]["xmax"] is None


def test_facts_tell_how_many_tokens_were_steered(model, observe):
    shared = [Steer(2, 18, 1.0, positions="generated"), Steer(1, 11, 1e-3, "min-clamp")]
    applied = count_applied(observe(steer(shared, model.saes)).taps)
    facts = describe(shared, model.saes, applied=applied)
    assert facts[0]["selected"] == facts[0]["changed"] == [NEW] * model.rows
    assert facts[1]["selected"] == model.mask.sum(axis=1).tolist()
    assert 0 < sum(facts[1]["changed"]) < sum(facts[1]["selected"])
    rows = [[Steer(2, 18, 1.0)], *([] for _ in LENGTHS[1:])]
    applied = count_applied(observe(steer(rows, model.saes)).taps)
    facts = describe(rows, model.saes, applied=applied)
    assert facts[0][0]["selected"] == LENGTHS[0] + NEW
    assert facts[1:] == [[]] * (model.rows - 1)
    assert describe([], model.saes) == []
    with pytest.raises(ValueError, match=r"counts of shape \(7, 1\); these recipes give \(7, 2\)"):
        describe(shared, model.saes, applied=applied)


def test_counts_of_prompt_and_generated_steps_add_up():
    prompt = Applied(np.ones((4, 2, 3), int), np.zeros((4, 2, 3), int))
    generated = Applied(np.ones((5, 4, 2, 3), int), np.ones((5, 4, 2, 3), int))
    total = count_applied(prompt, generated)
    np.testing.assert_array_equal(total.selected, np.full((2, 3), 24))
    np.testing.assert_array_equal(total.changed, np.full((2, 3), 20))


def harness(rows, acts, layer, saes):
    """What lm-evaluation-harness's formulas do to activations, all rows of the layer one after the other."""
    for action, at, feature, value in rows:
        if at != layer:
            continue
        vector, bias = (np.asarray(a, np.float64) for a in (saes[at].params.w_dec[feature], saes[at].params.b_dec))
        if action == "add":
            acts = acts + value * vector
        else:
            u = vector / np.linalg.norm(vector)
            moved = acts - bias
            acts = moved - (moved @ u)[..., None] * u + value * u + bias
    return acts


HEAD = "loader,action,sparse_model,hookpoint,feature_index,steering_coefficient,head_index,sae_id,description\n"


def test_a_harness_table_does_what_the_harness_does(model, observe, plain, tmp_path):
    path = tmp_path / "steer.csv"
    path.write_text(HEAD + 'sparsify,clamp,o/saes,layers.1,3,10.5,,,"a, b"\nsparsify,add,o/saes,layers.2,4,-2.0,,,\n')
    entries = read_lm_eval(path, model.saes)
    assert entries[1] == Steer(2, 4, -2.0)
    out = observe(steer(entries, model.saes))
    rows = [("clamp", 1, 3, 10.5), ("add", 2, 4, -2.0)]
    real = model.mask
    expected = harness(rows, np.asarray(plain.captured[1], np.float64), 1, model.saes)
    np.testing.assert_allclose(out.captured[1][real], expected[real], rtol=1e-5, atol=1e-4)
    first = observe(steer(entries[:1], model.saes))
    expected = harness(rows, np.asarray(first.captured[2], np.float64), 2, model.saes)
    np.testing.assert_allclose(out.captured[2][real], expected[real], rtol=1e-5, atol=1e-4)


def test_both_rows_of_one_layer_are_read(model, tmp_path):
    path = tmp_path / "steer.csv"
    path.write_text(HEAD + "sparsify,add,o/s,layers.2,3,1.0,,,\nsparsify,,o/s,model.layers.2,4,2.0,,,\n")
    assert read_lm_eval(path, model.saes) == [Steer(2, 3, 1.0), Steer(2, 4, 2.0)]


@pytest.mark.parametrize("loader", ["sparsify", "sae_lens"])
def test_what_is_written_is_read(model, tmp_path, loader):
    path, entries = tmp_path / "steer.csv", [Steer(1, 3, 0.7, "project"), Steer(3, 4, 0.5, "add", "xmax")]
    write_lm_eval(path, entries, model.saes, "owner/saes", loader=loader, stats=STATS)
    first, second = read_lm_eval(path, model.saes)
    assert (first.layer, first.feature, first.mode, first.units) == (1, 3, "project", "raw")
    assert first.strength == pytest.approx(0.7, rel=1e-9)
    assert second == Steer(3, 4, 0.5 * STATS[3].max[4])
    lines = path.read_text().splitlines()
    assert lines[0] + "\n" == HEAD
    assert lines[2].startswith(f"{loader},add,owner/saes,layers.3,4,")
    assert (",layer3," in lines[2]) == (loader == "sae_lens")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("sparsify,add,o/s,layers.2.mlp,3,1.0,,,", "line 2: hookpoint = 'layers.2.mlp'; expected layers.N"),
        ("sae_lens,add,o/s,,3,1.0,,layer_2,", "line 2: hookpoint = ''"),
        ("sparsify,add,o/s,layers.2,3,1.0,5,,", "line 2: head_index = '5'"),
        ("sparsify,set,o/s,layers.2,3,1.0,,,", "line 2: action = 'set'; expected add or clamp"),
        ("sparsify,add,o/s,layers.2,3.5,1.0,,,", "line 2: feature_index = '3.5'"),
        ("sparsify,add,o/s,layers.2,3,nan,,,", "line 2: strength = nan"),
        ("sparsify,add,o/s,layers.2,3,much,,,", "line 2: could not convert"),
        ("sparsify,add,o/s,layers.2,3,1.0", "line 2: more or fewer cells than columns"),
        ("sparsify,add,o/s,layers.2,3,1.0,,,,extra", "line 2: more or fewer cells than columns"),
        ("sparsify,add,o/s,layers.9,3,1.0,,,", "feature 3 of layer 9: saes has the layers"),
        ('sparsify,add,o/s,layers.2,3,1.0,,,"open', "not a readable CSV"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(model, tmp_path, row, says):
    path = tmp_path / "steer.csv"
    path.write_text(HEAD + row + "\n")
    with pytest.raises(ValueError, match=says):
        read_lm_eval(path, model.saes)


def test_another_table_is_refused(model, tmp_path):
    path = tmp_path / "steer.csv"
    path.write_text("layer,feature\n1,2\n")
    with pytest.raises(FormatError, match="the columns hookpoint, feature_index, steering_coefficient are missing"):
        read_lm_eval(path, model.saes)


def test_what_the_harness_would_do_wrongly_is_not_written(model, tmp_path):
    path, vector = tmp_path / "steer.csv", np.ones(WIDTH)
    for entries, says in [
        ([Steer(1, 2, 1.0, "project"), Steer(1, 3, 1.0, "project")], "only the last entry of a layer"),
        ([Steer(1, 2, 1.0), Steer(2, 3, 1.0)], "only the last add of all"),
        ([Steer(1, 2, 1.0, "clamp")], "the harness knows mode add and project"),
        ([Steer(1, direction=vector, strength=1.0)], "of features alone"),
        ([Steer(1, 2, 1.0, positions="last")], "steers all positions"),
        ([Steer(1, 2, 1.0, preserve_norm=True)], "preserves no norm"),
        ([Steer(1, 2, 1.0, units="xmax")], "units 'xmax' are multiples"),
    ]:
        with pytest.raises(ValueError, match=says):
            write_lm_eval(path, entries, model.saes, "owner/saes")
    with pytest.raises(ValueError, match="loader = 'torch'"):
        write_lm_eval(path, [], model.saes, "owner/saes", loader="torch")
    assert not path.exists()
