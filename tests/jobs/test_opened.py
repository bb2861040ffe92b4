"""What commands open alike."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.jobs.opened import batch_positions, load, open_sources
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import row_norms_of

pytestmark = pytest.mark.usefixtures("compiled_once")


@dataclasses.dataclass(frozen=True)
class Asked:
    model: str
    sae: str
    layers: tuple[int, ...] = ()
    k: int | None = None
    mesh: str = "1x1"


@pytest.fixture
def asked(tiny_release):
    return Asked(str(tiny_release / "model"), str(tiny_release / "sae"))


@pytest.mark.parametrize("mesh", ["1x1", "2x2"])
def test_decoders_are_let_go_and_the_norms_of_their_rows_kept(asked, mesh):
    """Of 36 layers of 65,536 features of 4096 numbers decoders would be half of 72 GiB."""
    _, encoders, _ = load(open_sources(dataclasses.replace(asked, mesh=mesh)), "parity")
    for layer, sae in load_saes(asked.sae).items():
        own = encoders.saes[layer]
        assert own.params.w_dec.shape == (0, 16)
        np.testing.assert_array_equal(own.params.w_enc, sae.params.w_enc)
        np.testing.assert_allclose(encoders.row_norms[layer], np.linalg.norm(sae.params.w_dec, axis=1), rtol=1e-6)
        np.testing.assert_array_equal(row_norms_of(sae).shape, (64,))


@pytest.mark.parametrize(("precision", "dtype"), [("fast", jnp.bfloat16), ("parity", jnp.float32)])
def test_precision_is_that_of_model_and_encoders(asked, precision, dtype):
    backbone, encoders, step = load(open_sources(dataclasses.replace(asked, layers=(1,))), precision)
    assert backbone.params["embed"].dtype == encoders.saes[1].params.w_enc.dtype == dtype
    assert (step.layers, [*encoders.saes]) == ((1,), [1])


def test_hashes_name_every_file(asked):
    hashes = open_sources(asked).hashes()
    assert set(hashes) == {"model", "sae", "tokenizer"}
    assert len(hashes["sae"]) == 2
    assert "config.json" in hashes["model"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (1, 1)}, "--layers 1 1: a layer is named twice"),
        ({"layers": (7,)}, "7"),
        ({"mesh": "1x3"}, "3"),
        ({"k": 65}, "65"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(asked, change, message):
    with pytest.raises(ValueError, match=message):
        open_sources(dataclasses.replace(asked, **change))


def test_batches_grow_with_the_mesh():
    assert batch_positions(None, 3) == 3 * batch_positions(None)
    assert batch_positions(100, 3) == 100
