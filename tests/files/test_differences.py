"""What changed from one configuration to another is said key by key."""

import pytest

from qscope_jax.files.differences import differences

OLD = {"seed": 1, "data": {"rows": 8, "sources": [{"sha256": "a"}, {"sha256": "b"}]}, "layers": (0, 2), "out": None}


def test_equal_values_do_not_differ_whatever_their_containers():
    assert differences(OLD, OLD) == []
    assert differences(OLD, OLD | {"layers": [0, 2]}) == []
    assert differences({}, {}) == []


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ({"seed": 2}, "seed: was 1, is 2"),
        ({"seed": True}, "seed: was 1, is true"),
        ({"out": "x"}, 'out: was null, is "x"'),
        ({"lr": 0.5}, "lr: was not there, is 0.5"),
        ({"layers": [0, 3]}, "layers.1: was 2, is 3"),
        ({"layers": [0]}, "layers: was [0, 2], is [0]"),
        ({"data": OLD["data"] | {"rows": 9}}, "data.rows: was 8, is 9"),
        ({"data": {"rows": 8}}, 'data.sources: was [{"sha256": "a"}, {"sha256": "b"}], is not there'),
        ({"data": OLD["data"] | {"sources": [{"sha256": "a"}, {"sha256": "c"}]}},
         'data.sources.1.sha256: was "b", is "c"'),
        ({"data": 3}, 'data: was {"rows": 8, "sources": [{"sha256": "a"}, {"sha256": "b"}]}, is 3'),
    ],
)  # fmt: skip
def test_each_difference_names_its_key_and_both_values(new, expected):
    assert differences(OLD, OLD | new) == [expected]


def test_several_differences_are_listed_and_long_values_cut():
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"c": 3}, "d": "x" * 99}) == [
        "a: was 1, is not there",
        "b.c: was 2, is 3",
        'd: was not there, is "' + "x" * 78 + "…",
    ]


def test_what_json_cannot_hold_is_an_error():
    with pytest.raises(TypeError):
        differences({"a": object()}, {})
