"""topk_encode and sparse_decode over a mesh equal themselves on one device, and nothing large travels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from qscope_kernels.sparse_decode import gather_dot, sparse_decode
from qscope_kernels.sparse_decode.sharded import gather_dot_sharded, sparse_decode_sharded
from qscope_kernels.sparse_outer import sparse_outer
from qscope_kernels.sparse_outer.sharded import sparse_outer_sharded
from qscope_kernels.topk_encode import topk_encode, xla
from qscope_kernels.topk_encode.sharded import topk_encode_sharded

from qscope_jax.mesh import make_mesh

N, D, F, K = 16, 6, 48, 10
MESHES = [(8, 1), (2, 4), (1, 8)]
PLACES = ("data", None), (None, "model"), ("model",), ("model", None)


def small_integers(*shape, seed=0):
    """Every product and sum is exact, and ties abound."""
    return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def mesh(request):
    return make_mesh(*request.param)


@pytest.fixture(scope="module")
def arrays():
    """x, w_enc, b_enc, w_dec."""
    return small_integers(N, D), small_integers(D, F, seed=1), small_integers(F, seed=2), small_integers(F, D, seed=3)


def placed(mesh, arrays):
    return [jax.device_put(a, NamedSharding(mesh, PartitionSpec(*p))) for a, p in zip(arrays, PLACES, strict=False)]


def shapes(mesh, dtype=jnp.float32):
    sizes = (N, D), (D, F), (F,), (F, D)
    return [
        jax.ShapeDtypeStruct(size, dtype, sharding=NamedSharding(mesh, PartitionSpec(*place)))
        for size, place in zip(sizes, PLACES, strict=True)
    ]


def encoder(mesh, **options):
    return jax.jit(functools.partial(topk_encode_sharded, mesh=mesh, data="data", model="model", **options))


def decoder(mesh, **options):
    return jax.jit(functools.partial(sparse_decode_sharded, mesh=mesh, data="data", model="model", **options))


def one_device(x, w_enc, b_enc, w_dec):
    values, indices = topk_encode(x, w_enc, b_enc, k=K)
    return values, sparse_decode(values, indices, w_dec)


def over(mesh):
    def many_devices(x, w_enc, b_enc, w_dec):
        values, indices = topk_encode_sharded(x, w_enc, b_enc, k=K, mesh=mesh, data="data", model="model")
        return values, sparse_decode_sharded(values, indices, w_dec, mesh=mesh, data="data", model="model")

    return many_devices


def gradient(function):
    """Of a loss that reads the input, the values and the reconstruction."""

    def loss(x, *weights):
        values, x_hat = function(x, *weights)
        return jnp.sum((x_hat - x) ** 2) + jnp.sum(jnp.arange(K) * values)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


def check_code(found, expected):
    """Values, and the indices of the slots in use."""
    np.testing.assert_array_equal(found[0], expected[0])
    used = np.asarray(expected[0]) > 0
    np.testing.assert_array_equal(np.asarray(found[1])[used], np.asarray(expected[1])[used])


@pytest.mark.parametrize("k", [1, K, F], ids=["k=1", "k>a shard's latents", "k=f"])
def test_codes_equal_those_of_one_device_with_ties_to_the_lowest_index(mesh, arrays, k):
    found = encoder(mesh, k=k)(*placed(mesh, arrays[:3]))
    check_code(found, topk_encode(*arrays[:3], k=k))
    assert [(part.shape, part.dtype, part.sharding.spec[0]) for part in found] == [
        ((N, k), np.float32, "data"),
        ((N, k), np.int32, "data"),
    ]


def test_narrow_types_and_every_implementation(arrays):
    mesh = make_mesh(2, 4)
    narrow = [jnp.asarray(array, jnp.bfloat16) for array in arrays]
    for impl in ("ref", "xla"):
        values, indices = encoder(mesh, k=K, impl=impl)(*placed(mesh, narrow[:3]))
        check_code((values, indices), topk_encode(*narrow[:3], k=K))
        x_hat = decoder(mesh, impl=impl)(values, indices, placed(mesh, narrow)[3])
        np.testing.assert_array_equal(x_hat, sparse_decode(values, indices, narrow[3]))
        assert x_hat.dtype == jnp.float32


def test_where_fewer_than_k_are_positive_the_rest_is_zero(mesh):
    bias = np.full(F, -1, np.float32)
    bias[[3, 4, 47]] = 2, 5, 2
    found = encoder(mesh, k=5)(*placed(mesh, (np.zeros((N, D), np.float32), np.zeros((D, F), np.float32), bias)))
    np.testing.assert_array_equal(found[0], [[5, 2, 2, 0, 0]] * N)
    np.testing.assert_array_equal(found[1][:, :3], [[4, 3, 47]] * N)


def test_a_nan_is_never_hidden_on_whichever_shard_it_lies(mesh):
    for latent, nan in ((0, np.nan), (F - 1, -np.nan), (F // 2, -np.nan)):
        bias = np.arange(F, dtype=np.float32)
        bias[latent] = nan
        weights = np.zeros((N, D), np.float32), np.zeros((D, F), np.float32), bias
        values, indices = encoder(mesh, k=2)(*placed(mesh, weights))
        assert np.isnan(values[:, 0]).all()
        assert (np.asarray(indices[:, 0]) == latent).all()
        assert (np.asarray(values[:, 1]) == (F - 2 if latent == F - 1 else F - 1)).all()


def test_chunks_of_rows_change_nothing(mesh, arrays, monkeypatch):
    monkeypatch.setattr(xla, "_CHUNK_ELEMENTS", 3 * F // mesh.shape["model"])
    check_code(encoder(mesh, k=K)(*placed(mesh, arrays[:3])), topk_encode(*arrays[:3], k=K, impl="ref"))


def test_decoding_equals_one_device_whatever_the_unused_indices(mesh, arrays):
    values, indices = small_integers(N, K, seed=4), np.random.default_rng(5).integers(0, F, (N, K)).astype(np.int32)
    indices[values == 0] = np.random.default_rng(6).choice([-1, F, 2**31 - 1, -(2**31)], (values == 0).sum())
    found = decoder(mesh)(values, indices, placed(mesh, arrays)[3])
    np.testing.assert_array_equal(found, sparse_decode(values, indices, arrays[3]))


def test_products_and_outer_sums_equal_one_device_and_only_sums_travel(mesh, arrays, collectives):
    values, indices = small_integers(N, K, seed=4), np.random.default_rng(5).integers(0, F, (N, K)).astype(np.int32)
    x, w_dec, over = arrays[0], arrays[3], {"mesh": mesh, "data": "data", "model": "model"}
    dot = jax.jit(functools.partial(gather_dot_sharded, **over))
    np.testing.assert_array_equal(dot(x, indices, w_dec), gather_dot(x, indices, w_dec))
    outer = jax.jit(functools.partial(sparse_outer_sharded, latents=F, **over))
    found = outer(values, indices, x)
    for one, other, spec in zip(found, sparse_outer(values, indices, x, latents=F), PLACES[:1:-1], strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*spec)), one.ndim)
    shard, rows = F // mesh.shape["model"], N // mesh.shape["data"]
    sums = {size for name, sizes in collectives(outer.lower(values, indices, x).compile()) for size in sizes}
    assert sums <= {shard * D, shard}
    sums = {size for name, sizes in collectives(dot.lower(x, indices, w_dec).compile()) for size in sizes}
    assert sums <= {rows * K}


def test_leading_axes_are_kept(mesh, arrays):
    _, w_enc, b_enc, w_dec = placed(mesh, arrays)
    for shape in ((8, 2), (0, 2), (2, 4, 2)):
        part = jnp.resize(arrays[0], (*shape, D))
        values, indices = encoder(mesh, k=K)(part, w_enc, b_enc)
        check_code((values, indices), topk_encode(part, *arrays[1:3], k=K))
        assert decoder(mesh)(values, indices, w_dec).shape == part.shape


def test_gradients_equal_those_of_one_device(mesh, arrays):
    found, expected = gradient(over(mesh))(*placed(mesh, arrays)), gradient(one_device)(*arrays)
    for one, other, place in zip(found, expected, PLACES, strict=True):
        assert np.any(other)
        np.testing.assert_array_equal(one, other)  # integers: exact in any order
        assert one.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(*place)), one.ndim)


def test_only_candidates_and_sums_travel(mesh, collectives):
    data, model = mesh.shape["data"], mesh.shape["model"]
    rows, shard = N // data, F // model
    candidates = ("all-gather", (rows * model * min(K, shard),))
    found = collectives(jax.jit(over(mesh)).lower(*shapes(mesh)).compile())
    assert sorted(found) == sorted([candidates, candidates, ("all-reduce", (rows * D,))])
    found = collectives(gradient(over(mesh)).lower(*shapes(mesh)).compile())
    assert [entry for entry in found if entry[0] != "all-reduce"] == [candidates, candidates]
    # What is summed is a token's vector or its values over `model`, or one shard's gradient over `data`.
    sums = {size for name, sizes in found if name == "all-reduce" for size in sizes}
    assert sums <= {rows * D, rows * K, D * shard, shard}


def test_what_does_not_fit_is_refused(arrays):
    mesh = make_mesh(2, 4)
    with pytest.raises(ValueError, match=rf"x \({N}, {D}\), w_enc \({F},\) and b_enc \({F},\) do not fit"):
        encoder(mesh, k=4)(arrays[0], arrays[1][0], arrays[2])
    with pytest.raises(ValueError, match=r"k = 49 does not lie in 1\.\.48"):
        encoder(mesh, k=49)(*arrays[:3])
    with pytest.raises(ValueError, match="contract = 'loose'"):
        encoder(mesh, k=2, contract="loose")(*arrays[:3])
    with pytest.raises(ValueError, match="must have one shape"):
        decoder(mesh)(jnp.zeros((2, 3)), jnp.zeros((2, 4), int), arrays[3])
    with pytest.raises(ValueError, match="latents = 50 are not divisible by the 4 devices of the mesh axis 'model'"):
        sparse_outer_sharded(
            *(jnp.zeros((N, K)), jnp.zeros((N, K), int), arrays[0]), latents=50, mesh=mesh, data="data", model="model"
        )
    with pytest.raises(ValueError, match="divisible"):
        encoder(mesh, k=2)(arrays[0][:3], *arrays[1:3])
