"""The one safetensors reader and the one writer: what goes in comes out bit for bit, and hostile files are named."""

import json
import struct
import subprocess
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qscope_jax.files.recognise import FormatError, describe_bytes
from qscope_jax.files.tensors import DTYPES, open_tensors, write_tensors

A = np.arange(12, dtype=np.float32).reshape(3, 4)
LAYOUTS = {
    "transposed": A.T,
    "slice": A[:, 1:3],
    "reversed": A[::-1, ::-1],
    "fortran": np.asfortranarray(A),
    "big_endian": A.astype(">f4"),
    "big_endian_transposed": A.astype(">i2").T,
    "broadcast": np.broadcast_to(np.float32(2), (3, 3)),
    "scalar": np.array(3.0),
    "numpy_scalar": np.int64(7),
    "empty": np.zeros((0, 3), np.float16),
    "bool_slice": (A > 3)[:, ::2],
    "three_axes": np.arange(24, dtype=np.int32).reshape(2, 3, 4).transpose(2, 0, 1),
    "jax_bfloat16": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3).T,
    "bfloat16_slice": A.astype(ml_dtypes.bfloat16)[1:, 1:],
    "float8": A.astype(ml_dtypes.float8_e4m3fn).T,
}


class TestWriting:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_every_memory_layout_comes_back_bit_for_bit(self, tmp_path, layout):
        given_array = np.asarray(LAYOUTS[layout])
        write_tensors(tmp_path / "x.safetensors", {"x": LAYOUTS[layout]})
        found = open_tensors(tmp_path / "x.safetensors").array("x")
        assert found.shape == given_array.shape
        assert found.dtype == given_array.dtype.newbyteorder("<")
        assert np.array_equal(found, given_array)

    @pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "float8"])
    def test_the_safetensors_library_reads_the_same(self, tmp_path, layout):
        write_tensors(tmp_path / "x.safetensors", {"x": LAYOUTS[layout]})
        with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
            assert np.array_equal(file.get_tensor("x"), np.asarray(LAYOUTS[layout]))

    @pytest.mark.parametrize("code", DTYPES)
    def test_every_dtype_of_the_format_comes_back(self, tmp_path, code):
        bits = np.arange(64, dtype=np.uint8)
        array = (bits % 2).astype(bool) if code == "BOOL" else bits.view(DTYPES[code])
        write_tensors(tmp_path / "x.safetensors", {"x": array.reshape(4, -1).T})
        found = open_tensors(tmp_path / "x.safetensors")
        assert found.info("x").dtype == DTYPES[code]
        assert np.ascontiguousarray(found.array("x").T).tobytes() == array.tobytes()

    def test_an_array_of_many_chunks_comes_back(self, tmp_path):
        wide = np.random.default_rng(0).standard_normal((3000, 4000), np.float32)
        write_tensors(tmp_path / "x.safetensors", {"t": wide.T, "s": wide[:, 1:]})
        file = open_tensors(tmp_path / "x.safetensors")
        assert np.array_equal(file.array("t"), wide.T)
        assert np.array_equal(file.array("s"), wide[:, 1:])

    def test_equal_input_gives_equal_bytes_in_every_process(self, tmp_path):
        code = (
            "import sys, numpy as np; from qscope_jax.files.tensors import write_tensors;"
            "write_tensors(sys.argv[1], {'b': np.ones(2), 'a': np.ones(3, 'f4')}, {c: c for c in 'hgfedcba'})"
        )
        for name in ("one", "two"):
            subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=True)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()

    def test_metadata_come_back(self, tmp_path):
        write_tensors(tmp_path / "x.safetensors", {"x": A}, {"k": "50", "é": "ü\n"})
        assert open_tensors(tmp_path / "x.safetensors").metadata == {"k": "50", "é": "ü\n"}

    @pytest.mark.parametrize(
        ("arrays", "metadata", "says"),
        [
            ({"x": A}, {"k": 50}, "metadata must be strings"),
            ({"__metadata__": A}, None, "cannot be the name"),
            ({"x": np.array(["text"])}, None, "safetensors holds"),
            ({"x": np.zeros(2, np.longdouble)}, None, "safetensors holds"),
        ],
    )
    def test_what_the_format_cannot_hold_is_refused_and_nothing_written(self, tmp_path, arrays, metadata, says):
        with pytest.raises(FormatError, match=says):
            write_tensors(tmp_path / "x.safetensors", arrays, metadata)
        assert list(tmp_path.iterdir()) == []

    def test_a_failed_write_leaves_the_old_file_and_no_partial_one(self, tmp_path):
        class Failing(dict):
            asked = 0

            def __getitem__(self, name):
                raise OSError(28, "No space left on device")

        write_tensors(tmp_path / "x.safetensors", {"x": A})
        before = (tmp_path / "x.safetensors").read_bytes()
        with pytest.raises(OSError, match="No space"):
            write_tensors(tmp_path / "x.safetensors", Failing(x=A))
        assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]
        assert (tmp_path / "x.safetensors").read_bytes() == before

    def test_bytes_that_read_back_otherwise_are_an_error(self, tmp_path, monkeypatch):
        def read_back(path):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1  # a bit that the disk turned
            path.write_bytes(data)
            return open_tensors(path)

        monkeypatch.setattr("qscope_jax.files.tensors.open_tensors", read_back)
        with pytest.raises(OSError, match="read back differ"):
            write_tensors(tmp_path / "x.safetensors", {"x": A})
        assert list(tmp_path.iterdir()) == []

    def test_a_lazy_array_is_made_once(self, tmp_path):
        class Lazy:
            shape, dtype, made = A.shape, A.dtype, 0

            def __array__(self, dtype=None, copy=None):
                self.made += 1
                return A

        lazy = Lazy()
        write_tensors(tmp_path / "x.safetensors", {"x": lazy})
        assert lazy.made == 1
        assert np.array_equal(open_tensors(tmp_path / "x.safetensors").array("x"), A)

    def test_a_map_of_the_old_file_survives_its_replacement(self, tmp_path):
        write_tensors(tmp_path / "x.safetensors", {"x": A})
        old = open_tensors(tmp_path / "x.safetensors").array("x")
        write_tensors(tmp_path / "x.safetensors", {"x": A + 1})
        assert np.array_equal(old, A)

    @settings(max_examples=50, deadline=None)
    @given(
        shape=st.lists(st.integers(0, 5), min_size=0, max_size=4),
        dtype=st.sampled_from(["<f4", ">f4", "<f2", "<i8", "|b1", "bfloat16"]),
        data=st.data(),
    )
    def test_any_view_of_any_shape_comes_back(self, tmp_path_factory, shape, dtype, data):
        array = (
            np.arange(np.prod(shape, dtype=int))
            .reshape(shape)
            .astype(ml_dtypes.bfloat16 if "b" in dtype[:2] else dtype)
        )
        array = array.transpose(data.draw(st.permutations(range(array.ndim))))
        steps = tuple(slice(None, None, data.draw(st.sampled_from([1, 2, -1]))) for _ in shape)
        path = tmp_path_factory.mktemp("any") / "x.safetensors"
        write_tensors(path, {"x": array[steps]})
        assert np.array_equal(open_tensors(path).array("x"), array[steps])


class TestReading:
    def test_names_shapes_and_dtypes_come_from_the_header_alone(self, tmp_path):
        write_tensors(tmp_path / "x.safetensors", {"b": A, "a": A.astype(ml_dtypes.bfloat16)})
        file = open_tensors(tmp_path / "x.safetensors")
        assert set(file.names) == {"a", "b"}
        assert file.info("a")[:2] == (ml_dtypes.bfloat16, (3, 4))
        assert file.info("b").nbytes == 48
        assert "a" in file
        assert "c" not in file

    def test_an_array_is_a_read_only_view_of_the_file(self, tmp_path):
        write_tensors(tmp_path / "x.safetensors", {"x": A})
        array = open_tensors(tmp_path / "x.safetensors").array("x")
        assert not array.flags.owndata
        assert not array.flags.writeable

    def test_files_of_the_safetensors_library_are_read(self, tmp_path):
        from safetensors.numpy import save_file

        save_file({"x": A, "y": A.astype(ml_dtypes.bfloat16)}, tmp_path / "x.safetensors", metadata={"format": "np"})
        file = open_tensors(tmp_path / "x.safetensors")
        assert np.array_equal(file.array("x"), A)
        assert np.array_equal(file.array("y"), A)
        assert file.metadata == {"format": "np"}

    def test_nan_is_a_value_like_any_other_here(self, tmp_path):
        write_tensors(tmp_path / "x.safetensors", {"x": np.array([np.nan, np.inf])})
        assert np.isnan(open_tensors(tmp_path / "x.safetensors").array("x")[0])

    def test_a_missing_file_and_a_missing_tensor_are_told_apart(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            open_tensors(tmp_path / "none.safetensors")
        write_tensors(tmp_path / "x.safetensors", {"x": A})
        with pytest.raises(FormatError, match="expected a tensor 'y', found x"):
            open_tensors(tmp_path / "x.safetensors").array("y")


def _entry(shape=(2,), start=0, end=8, dtype="F32", **more):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def _file(header, data=b"\0" * 8, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


HOSTILE = {
    "empty": (b"", "an empty file"),
    "seven_bytes": (b"\1\0\0\0\0\0\0", "found a file of 7 bytes"),
    "length_2_to_62": (_file({}, length=2**62), "claims 4,611,686,018,427,387,904 bytes"),
    "length_101_megabytes": (_file({}, length=101_000_000), "claims 101,000,000 bytes"),
    "bad_utf8": (_file(b'{"\xff\xfe":1}'), "UTF-8"),
    "not_an_object": (_file(b"[1]"), "expected a safetensors file"),
    "hole": (_file({"a": _entry(start=8, end=16)}, b"\0" * 16), "offset"),
    "overlap": (_file({"a": _entry(), "b": _entry(start=4, end=12)}, b"\0" * 12), "offset"),
    "trailing": (_file({"a": _entry()}, b"\0" * 9), "followed by bytes that belong to no tensor"),
    "truncated": (_file({"a": _entry()}, b"\0" * 4), r"truncated: expected \d+ bytes, found \d+"),
    "truncated_header": (_file({"a": _entry()})[:20], "truncated: the header ends at"),
    "shape_overflow": (_file({"a": _entry(shape=[2**40, 2**40])}), "overflow"),
    "wrong_extent": (_file({"a": _entry(shape=[3])}), "damaged safetensors header"),
    "negative_size": (_file({"a": _entry(shape=[-2])}), "-2"),
    "unknown_dtype": (_file({"a": _entry(dtype="F99")}), "F99"),
    "unreadable_dtype": (_file({"a": _entry(shape=[16], dtype="F4")}), "F4, which is not supported"),
    "number_in_metadata": (_file({"__metadata__": {"k": 1}, "a": _entry()}), "expected a string"),
    "tensor_twice": (_file(b'{"a":%b,"a":%b}' % ((json.dumps(_entry()).encode(),) * 2)), "names a twice"),
    "metadata_twice": (
        _file(b'{"__metadata__":{"k":"1","k":"2"},"a":%b}' % json.dumps(_entry()).encode()),
        "names k twice",
    ),
    "unknown_entry": (_file({"a": _entry(stride=[1])}), "unknown entry stride"),
    "nested_without_end": (_file(b'{"a":' + b"[" * 100_000), "damaged"),
    "nan_in_header": (_file(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}'), "damaged"),
    "git_lfs_pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 537010176\n",
        "a git-lfs pointer for a file of 537,010,176 bytes",
    ),
    "html_page": (b"\n<!DOCTYPE html><html>503</html>", "an HTML or XML page"),
    "torch_zip": (b"PK\3\4" + b"\0" * 60, "a zip archive"),
    "bare_pickle": (b"\x80\x02}q\0." + b" " * 20, "a bare pickle"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_with_file_and_cause(tmp_path, name):
    content, says = HOSTILE[name]
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=says) as error:
        open_tensors(path)
    assert str(path) in str(error.value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=512), st.integers(0, 2**20))
def test_describing_bytes_never_fails(head, size):
    assert isinstance(describe_bytes(head, size), str)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_files_are_refused_or_read_within_their_bounds(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "x.safetensors"
    write_tensors(path, {"x": A, "y": A.astype(np.float16)}, {"k": "1"})
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content)))]
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        file = open_tensors(path)
        for name in file.names:
            assert file.array(name).nbytes == file.info(name).nbytes <= len(content)
    except FormatError:
        pass  # the other good outcome
