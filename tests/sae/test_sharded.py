"""An SAE on a mesh loads, encodes, decodes, learns and is saved as on one device; its weights stay where they lie."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from qscope_jax.mesh import MeshError, make_mesh
from qscope_jax.sae.formats import FormatError, load_sae, load_saes, sae_sha256, save_sae
from qscope_jax.sae.formats.stored import StoredTensor, _read
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, decode, encode, init_sae

D, F, K, N = 16, 64, 10, 24
MESHES = [(8, 1), (2, 4)]
FORMATS = ("safetensors", "qwen-scope", "saelens")


@pytest.fixture(scope="module", params=MESHES, ids=str)
def mesh(request):
    return make_mesh(*request.param)


@pytest.fixture(scope="module")
def sae():
    """No bias is zero, nothing is tied."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    return Sae(SaeParams(draw(D, F), draw(F), draw(F, D), draw(D)), SaeConfig(D, F, K, layer=3))


@pytest.fixture(scope="module")
def folder(sae, tmp_path_factory):
    """One subfolder per format."""
    folder = tmp_path_factory.mktemp("saes")
    for format in FORMATS:
        save_sae(sae, folder / format, format=format)
    return folder


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(N, D)).astype(np.float32)


def loss(params, config, x):
    sae = Sae(params, config)
    return jnp.sum((decode(sae, encode(sae, x)) - x) ** 2)


def test_every_device_holds_its_latents(folder, sae, mesh):
    model = mesh.shape["model"]
    expected = {"w_enc": (D, F // model), "b_enc": (F // model,), "w_dec": (F // model, D), "b_dec": (D,)}
    for format in FORMATS:
        loaded = load_sae(folder / format, mesh=mesh)
        for name, shape in expected.items():
            array = getattr(loaded.params, name)
            np.testing.assert_array_equal(array, getattr(sae.params, name))
            assert {shard.data.shape for shard in array.addressable_shards} == {shape}
            assert array.sharding.device_set == set(mesh.devices.flat)


def test_other_dtypes_and_several_layers(folder, sae):
    mesh = make_mesh(2, 4)
    loaded = load_saes(folder / "qwen-scope", dtype="bfloat16", mesh=mesh)[3]
    np.testing.assert_array_equal(loaded.params.w_enc, sae.params.w_enc.astype(jnp.bfloat16))
    assert loaded.params.w_dec.sharding.spec == PartitionSpec("model", None)


def test_only_the_slices_asked_for_are_read():
    array = np.full((6, 8), np.nan, np.float32)
    array[:3, 4:] = np.arange(12).reshape(3, 4)
    for stored in (array, np.asfortranarray(array)):
        part = np.empty((3, 4), np.float32)
        assert _read(StoredTensor(stored), {((0, 3), (4, 8)): part}) == (None, 0, 0)
        np.testing.assert_array_equal(part, array[:3, 4:])


def test_damage_is_found_on_a_mesh_too(folder, tmp_path):
    path = next((folder / "safetensors").glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    (tmp_path / path.name).write_bytes(content)
    with pytest.raises(FormatError, match="the data are damaged: expected sha256"):
        load_sae(tmp_path / path.name, mesh=make_mesh(2, 4))


def test_codes_and_reconstructions_equal_one_device(folder, sae, mesh, x):
    sharded = load_sae(folder / "safetensors", mesh=mesh)
    expected, found = jax.jit(encode)(sae, x), jax.jit(encode)(sharded, x)
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(found.indices, expected.indices)
    np.testing.assert_allclose(jax.jit(decode)(sharded, found), decode(sae, expected), rtol=1e-5, atol=1e-5)


def test_gradients_equal_one_device_and_stay_sharded(folder, sae, mesh, x):
    sharded = load_sae(folder / "safetensors", mesh=mesh)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 2)), static_argnums=1)
    expected, found = gradient(sae.params, sae.config, x), gradient(sharded.params, sae.config, x)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.any(other)
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    for one, weight in zip(found[0], sharded.params, strict=True):
        assert one.sharding.is_equivalent_to(weight.sharding, one.ndim)


def test_it_works_inside_a_scan_and_compiles_once(folder, sae, x):
    sharded, traces = load_sae(folder / "safetensors", mesh=make_mesh(2, 4)), []

    @jax.jit
    def scanned(sae, x):
        traces.append(1)
        step = lambda h, _: (decode(sae, encode(sae, h)), None)  # noqa: E731
        return jax.lax.scan(step, x, length=2)[0]

    expected = decode(sae, encode(sae, decode(sae, encode(sae, x))))
    for _ in range(2):
        np.testing.assert_allclose(scanned(sharded, x.reshape(4, 6, D)).reshape(N, D), expected, rtol=1e-4, atol=1e-4)
    assert len(traces) == 1


def test_inside_shard_map_every_device_encodes_its_own(sae, x):
    mesh, tokens = make_mesh(8, 1), PartitionSpec("data")
    local = jax.shard_map(encode, mesh=mesh, in_specs=(PartitionSpec(), tokens), out_specs=tokens)
    placed = jax.device_put(sae, NamedSharding(mesh, PartitionSpec()))
    np.testing.assert_array_equal(jax.jit(local)(placed, x).indices, encode(sae, x).indices)


def test_nothing_large_travels_and_memory_is_divided(mesh, collectives):
    sae = jax.eval_shape(lambda: init_sae(jax.random.key(0), SaeConfig(D, F, K)))
    place = lambda shape, *spec: jax.ShapeDtypeStruct(  # noqa: E731
        shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec))
    )
    params = SaeParams(
        place((D, F), None, "model"), place((F,), "model"), place((F, D), "model", None), place((D,), None)
    )
    x, (data, model) = place((N, D), "data", None), mesh.devices.shape
    compiled = jax.jit(encode).lower(sae._replace(params=params), x).compile()
    expected = 4 * (D * F // model + F // model + N * D // data)  # w_dec and b_dec are not even passed
    assert compiled.memory_analysis().argument_size_in_bytes == expected
    candidates = ("all-gather", (N // data * model * min(K, F // model),))
    assert collectives(compiled) == [candidates, candidates]

    gradient = jax.jit(jax.grad(functools.partial(loss, config=sae.config)))
    compiled = gradient.lower(params, x=x).compile()
    expected = 4 * (2 * D * F // model + F // model + D + N * D // data)
    assert compiled.memory_analysis().argument_size_in_bytes == expected
    assert [found for found in collectives(compiled) if found[0] != "all-reduce"] == [candidates, candidates]


def test_saving_gathers_to_the_very_bytes_of_one_device(folder, sae, tmp_path):
    sharded = load_sae(folder / "safetensors", mesh=make_mesh(2, 4))._replace(config=sae.config)
    assert sae_sha256(sharded) == sae_sha256(sae)
    for format in FORMATS:
        save_sae(sharded, tmp_path / format, format=format)
        names = sorted(path.name for path in (folder / format).iterdir())
        assert names == sorted(path.name for path in (tmp_path / format).iterdir())
        for name in names:
            assert (tmp_path / format / name).read_bytes() == (folder / format / name).read_bytes()


def test_what_the_mesh_does_not_divide_is_named(folder, tmp_path, x):
    mesh = make_mesh(2, 4)
    sharded = load_sae(folder / "safetensors", mesh=mesh)
    with pytest.raises(MeshError, match=r"batch = 7 cannot be split over the mesh axis 'data' of 2 devices"):
        encode(sharded, x[:7])
    with pytest.raises(MeshError, match=r"batch = 1 cannot be split"):
        encode(sharded, x[0])
    with pytest.raises(MeshError, match=r"batch = 3 cannot be split"):
        decode(sharded, encode(sharded, x[:4])._replace(values=jnp.zeros((3, K)), indices=jnp.zeros((3, K), int)))
    save_sae(init_sae(jax.random.key(0), SaeConfig(D, 62, K, layer=0)), tmp_path)
    with pytest.raises(
        MeshError, match=r"layer0.sae.safetensors: latents = 62 cannot be split .* 'model' of 4 devices"
    ):
        load_sae(tmp_path, mesh=mesh)
    strange = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    with pytest.raises(MeshError, match=r"the mesh has the axes \('x',\), not \['data', 'model'\]; make it with"):
        load_sae(folder / "safetensors", mesh=strange)
