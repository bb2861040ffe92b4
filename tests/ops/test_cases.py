"""The shapes that kernels are judged by are those of the release."""

from qscope_kernels.cases import RELEASED

from qscope_jax.sae import release


def test_they_are_the_released_shapes_each_once():
    assert len(set(RELEASED)) == len(RELEASED)
    assert set(RELEASED) == {(row.d_model, row.d_sae, row.k) for row in release.RELEASED}
    assert len({case.name for case in RELEASED}) == len(RELEASED)
