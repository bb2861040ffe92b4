"""Files of torch.save are read without torch, bit for bit; files we write are torch's own to torch."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qscope_jax.files.recognise import FormatError
from qscope_jax.sae.formats import load_sae, save_sae, torch_write
from qscope_jax.sae.formats.torch_pickle import open_torch
from qscope_jax.sae.formats.torch_write import write_torch
from qscope_jax.sae.model import SaeConfig, encode, init_sae

GOLDENS = Path(__file__).parents[1] / "goldens" / "sae"
SHAPES = {"W_enc": (10, 6), "W_dec": (6, 10), "b_enc": (10,), "b_dec": (6,)}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def golden_values(shape, start):
    """As scripts/make_sae_goldens.py makes them."""
    count = int(np.prod(shape))
    return (((np.arange(start, start + count) * 37) % 101 - 50) / 64).astype(np.float32).reshape(shape)


class TestGoldens:
    """Written by torch 2.13: float32; float16 with a transposed W_enc; bfloat16, both transposed; shared storage."""

    @pytest.mark.parametrize(("layer", "dtype"), [(0, "float32"), (1, "float16"), (2, "bfloat16"), (3, "float32")])
    def test_every_tensor_is_exact(self, layer, dtype):
        tensors = open_torch(GOLDENS / f"layer{layer}.sae.pt")
        assert list(tensors) == list(SHAPES)
        for i, (name, shape) in enumerate(SHAPES.items()):
            array = tensors[name].array
            assert array.dtype == DTYPES[dtype]
            assert np.array_equal(array, golden_values(shape, 1000 * i).astype(DTYPES[dtype]))

    @pytest.mark.parametrize("layer", range(4))
    def test_they_load_in_our_orientation(self, layer):
        sae = load_sae(GOLDENS / f"layer{layer}.sae.pt", k=3)
        assert sae.config == SaeConfig(6, 10, 3, layer=layer, source=f"sae/layer{layer}.sae.pt")
        for got, (i, name) in zip(sae.params, enumerate_ours(), strict=True):
            assert got.dtype == jnp.float32
            assert np.array_equal(got, golden_values(SHAPES[name], 1000 * i).T)

    def test_torch_takes_no_part(self):
        code = (
            "import sys; from qscope_jax import load_sae; load_sae(sys.argv[1], k=3); sys.exit('torch' in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", code, str(GOLDENS / "layer0.sae.pt")], check=True)

    def test_nothing_is_read_before_it_is_placed(self):
        for stored in open_torch(GOLDENS / "layer0.sae.pt").values():
            assert not stored.array.flags.owndata
            assert not stored.array.flags.writeable


def enumerate_ours():
    """Position and name in the release of w_enc, b_enc, w_dec, b_dec."""
    order = list(SHAPES)
    return [(order.index(name), name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")]


def _views(dtype):
    base = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32).astype(DTYPES[dtype])
    return {"plain": base, "transposed": base.T, "slice": base[1::2, 2:], "vector": base[:, 1], "one": base[:1, :1]}


@pytest.mark.parametrize("dtype", DTYPES)
class TestWriting:
    def test_what_is_written_is_read_bit_for_bit(self, tmp_path, dtype):
        write_torch(tmp_path / "x.pt", _views(dtype))
        tensors = open_torch(tmp_path / "x.pt")
        for name, array in _views(dtype).items():
            assert tensors[name].array.dtype == array.dtype
            assert np.array_equal(tensors[name].array, array)

    @pytest.mark.parity
    @pytest.mark.parametrize("mmap", [False, True])
    def test_torch_loads_it_with_weights_only(self, tmp_path, dtype, mmap):
        torch = pytest.importorskip("torch")
        write_torch(tmp_path / "x.pt", _views(dtype))
        loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
        for name, array in _views(dtype).items():
            assert str(loaded[name].dtype) == f"torch.{dtype}"
            assert loaded[name].is_contiguous()
            assert np.array_equal(loaded[name].float().numpy(), array.astype(np.float32))

    @pytest.mark.parity
    def test_the_long_zip_header_of_large_members_is_torch_s_too(self, tmp_path, dtype, monkeypatch):
        torch = pytest.importorskip("torch")
        monkeypatch.setattr(torch_write, "_ZIP64_FROM", 1)
        write_torch(tmp_path / "x.pt", _views(dtype))
        for mmap in (False, True):
            loaded = torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)
            assert torch.equal(loaded["plain"].T, loaded["transposed"])
        assert np.array_equal(open_torch(tmp_path / "x.pt")["plain"].array, _views(dtype)["plain"])

    @pytest.mark.parity
    def test_torch_writes_it_and_we_read_it_whatever_the_layout(self, tmp_path, dtype):
        torch = pytest.importorskip("torch")
        base = torch.randn(8, 6).to(getattr(torch, dtype))
        tensors = {
            "plain": base,
            "transposed": base.T,
            "permuted": base.reshape(2, 4, 6).permute(2, 0, 1),
            "offset": base[3:],
            "row_of_one": base[:1, :].T,
            "scalar": base[0, 0].clone(),
            "gradient": base.clone().requires_grad_(),
        }
        torch.save(tensors, tmp_path / "x.pt")
        found = open_torch(tmp_path / "x.pt")
        for name, tensor in tensors.items():
            assert np.array_equal(found[name].array.astype(np.float32), tensor.detach().float().numpy())


@pytest.mark.parity
class TestTheReleasesOwnExample:
    def test_it_runs_unchanged_on_files_of_ours(self, tmp_path):
        torch = pytest.importorskip("torch")
        sae = init_sae(jax.random.key(0), SaeConfig(16, 64, 4, layer=2))
        save_sae(sae, tmp_path, format="qwen-scope")
        loaded = torch.load(tmp_path / "layer2.sae.pt", map_location="cpu", weights_only=True)
        residual = torch.randn(5, 16)
        pre = residual @ loaded["W_enc"].T + loaded["b_enc"]
        values, indices = pre.topk(4, dim=-1)
        code = encode(sae, residual.numpy())
        assert np.array_equal(code.indices, indices.numpy())
        np.testing.assert_allclose(code.values, values.relu().numpy(), rtol=1e-5, atol=1e-6)
        assert loaded["W_dec"].shape == (16, 64)

    @pytest.mark.parametrize("crc", [True, False])
    def test_files_without_checksums_are_read(self, tmp_path, crc):
        torch = pytest.importorskip("torch")
        torch.serialization.set_crc32_options(crc)
        try:
            torch.save({"x": torch.arange(6.0)}, tmp_path / "x.pt")
        finally:
            torch.serialization.set_crc32_options(True)
        stored = open_torch(tmp_path / "x.pt")["x"]
        assert (stored.checksum is not None) == crc
        assert np.array_equal(stored.array, np.arange(6))

    @pytest.mark.parametrize("legacy", ["bare_pickle", "double", "module", "nested"])
    def test_what_torch_saves_but_is_no_dict_of_float_tensors_is_named(self, tmp_path, legacy):
        torch = pytest.importorskip("torch")
        path = tmp_path / "x.pt"
        if legacy == "bare_pickle":
            torch.save({"x": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
        elif legacy == "double":
            torch.save({"x": torch.ones(3, dtype=torch.float64)}, path)
        elif legacy == "module":
            torch.save(torch.nn.Linear(2, 2).state_dict(), path)
        else:
            torch.save({"sae": {"x": torch.ones(3)}}, path)
        says = {
            "bare_pickle": "a bare pickle, the form of torch.save before 1.6",
            "double": "torch.DoubleStorage",
            "module": "opcode BUILD",
            "nested": "expected a tensor under 'sae', found a nested dict",
        }
        with pytest.raises(FormatError, match=says[legacy]):
            open_torch(path)


def test_writing_refuses_what_the_reader_would(tmp_path):
    for array in (np.zeros(3, np.float64), np.zeros((0, 3), np.float32)):
        with pytest.raises(FormatError, match="expected float32, float16, bfloat16"):
            write_torch(tmp_path / "x.pt", {"x": array})
    assert list(tmp_path.iterdir()) == []
