"""A backbone on a mesh of eight devices computes, loads and saves what one device does, and no weight travels."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.cache import init_cache
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.backbone.weights import Backbone, load_backbone, save_backbone
from qscope_jax.mesh import MeshError, make_mesh, sharding
from tests.backbone.families import FAMILIES, QUICK, make_config, make_params, relative_l2, tokens_of

pytestmark = pytest.mark.slow  # compiles for eight devices, forward and gradient, in every family

SIZES = {
    "vocab_size": 56, "num_attention_heads": 8, "num_key_value_heads": 4, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}  # fmt: skip
ROWS, T = 4, 33
LIMITS = {"forward": 1e-5, "gradient": 1e-4}  # those against transformers


def config_of(family, **changes):
    hybrid = family.startswith("qwen3_5")
    sizes = {key: size for key, size in SIZES.items() if hybrid or not key.startswith("linear")}
    return make_config(family, **{"num_hidden_layers": 3 if hybrid else 2} | sizes | changes)


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(2, 4)


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request):
    return make_backbone(config_of(request.param))


def make_backbone(config):
    """Layers that change the stream little: else one float32 ulp of the weights moves gradients by 1e-3."""
    calm = lambda path, leaf: 0.3 * leaf if path[-1].key in ("o", "down") else leaf  # noqa: E731
    return Backbone(config, jax.tree_util.tree_map_with_path(calm, make_params(config)))


def place(backbone, mesh, fsdp=False):
    shapes = parameter_shapes(backbone.config, jnp.float32, mesh=mesh, fsdp=fsdp)
    return jax.tree.map(lambda array, shape: jax.device_put(array, shape.sharding), backbone.params, shapes)


def batch(mesh=None):
    """Tokens, mask and segment ids: a padded row, packed rows."""
    mask = np.ones((ROWS, T), bool)
    mask[0, 25:] = mask[2, :3] = False
    segments = np.repeat([[0] * T, [0] * 10 + [1] * (T - 10)], 2, axis=0)
    arrays = (tokens_of(ROWS, T), mask, segments)
    return arrays if mesh is None else [jax.device_put(a, sharding(("batch", None), a.shape, mesh)) for a in arrays]


def run(params, config, tokens, mask, segments):
    return forward(params, config, tokens, mask=mask, segment_ids=segments, capture=(0, config.num_layers - 1))


def loss(params, config, tokens, mask, segments):
    out = forward(params, config, tokens, mask=mask, segment_ids=segments)
    return jnp.sum(jnp.where(mask[..., None], jax.nn.log_softmax(out.logits), 0)[..., 7])


STEPS = {"forward": run, "gradient": jax.grad(loss)}


@functools.cache
def compiled(family, step, fsdp):
    """The program of a step, compiled from shapes and shardings alone; gradients lie as their weights do."""
    config, mesh = config_of(family), make_mesh(2, 4)
    shapes = parameter_shapes(config, jnp.float32, mesh=mesh, fsdp=fsdp)
    data = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for a in batch(mesh)]
    places = jax.tree.map(lambda leaf: leaf.sharding, shapes) if step == "gradient" else None
    return jax.jit(STEPS[step], out_shardings=places).lower(shapes, config, *data).compile(QUICK)


@pytest.mark.parametrize(("step", "fsdp"), [("forward", False), ("gradient", False), ("gradient", True)], ids=str)
def test_a_mesh_computes_what_one_device_does(backbone, mesh, step, fsdp):
    config = backbone.config
    alone = jax.jit(STEPS[step], compiler_options=QUICK)(backbone.params, config, *batch())
    spread = compiled(config.model_type, step, fsdp)(place(backbone, mesh, fsdp), config, *batch(mesh))
    flat, _ = jax.tree_util.tree_flatten_with_path(alone)
    for (path, expected), found in zip(flat, jax.tree.leaves(spread), strict=True):
        # Outputs at pads are meaningless; the forward pass is compared where tokens are real.
        real = batch()[1] if step == "forward" else ...
        expected, found = np.asarray(expected), np.asarray(found)
        if step == "forward" and expected.ndim == 4:
            real = (slice(None), real)
        assert relative_l2(found[real], expected[real]) < LIMITS[step], jax.tree_util.keystr(path)


def test_more_devices_than_shared_heads(mesh):
    config = config_of("qwen3_5", num_key_value_heads=2, linear_num_key_heads=2)
    backbone = make_backbone(config)
    expected = jax.jit(run)(backbone.params, config, *batch())
    found = jax.jit(run)(place(backbone, mesh), config, *batch(mesh))
    assert relative_l2(found.logits[batch()[1]], expected.logits[batch()[1]]) < 1e-5


@pytest.mark.parametrize("step", STEPS)
def test_experts_read_in_place_on_a_mesh_of_experts(step):
    config, mesh = config_of("qwen3_moe"), make_mesh(1, 8)
    backbone = make_backbone(config)
    expected = jax.jit(STEPS[step], compiler_options=QUICK)(backbone.params, config, *batch())
    found = jax.jit(STEPS[step], compiler_options=QUICK)(place(backbone, mesh), config, *batch(mesh))
    if step == "forward":
        expected, found = expected.logits[batch()[1]], found.logits[batch()[1]]
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert relative_l2(a, b) < LIMITS[step]


def test_a_mesh_needs_no_jit(mesh):
    backbone = make_backbone(config_of("qwen3_moe"))
    expected = jax.jit(run)(backbone.params, backbone.config, *batch())
    found = run(place(backbone, mesh), backbone.config, *batch(mesh))
    assert relative_l2(found.logits[batch()[1]], expected.logits[batch()[1]]) < 1e-5


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_weight_travels(collectives, family, step):
    config = config_of(family)
    held = [leaf for leaf in jax.tree.leaves(parameter_shapes(config)) if leaf.ndim > 2]
    sizes = {math.prod(leaf.shape[1:]) for leaf in held} | {math.prod(leaf.shape) for leaf in held}
    gathered = gathered_by(collectives, compiled(family, step, False))
    assert not gathered & sizes
    assert max(gathered, default=0) <= ROWS * T * 16, "nothing larger than a residual stream"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_fsdp_gathers_one_layer_at_a_time(collectives, family):
    shapes = parameter_shapes(config_of(family), mesh=make_mesh(2, 4), fsdp=True)
    held = jax.tree.leaves(shapes["period"])
    layers = {math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) * 2 for leaf in held if leaf.ndim > 2}
    stacks = {2 * count for count in layers} - layers
    gathered = gathered_by(collectives, compiled(family, "gradient", True))
    assert gathered & layers
    assert not gathered & stacks


def gathered_by(collectives, program):
    return {count for name, counts in collectives(program) if name == "all-gather" for count in counts}


@pytest.mark.parametrize(("step", "fsdp"), [("forward", False), ("gradient", True)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_device_holds_its_share_alone(family, step, fsdp):
    shapes = parameter_shapes(config_of(family), jnp.float32, mesh=make_mesh(2, 4), fsdp=fsdp)
    rows = sum(a.nbytes for a in batch(make_mesh(2, 4))) // 2
    shares = [math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(shapes)]
    assert compiled(family, step, fsdp).memory_analysis().argument_size_in_bytes == sum(shares) + rows
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes))
    split = sum(leaf.size * 4 for leaf in jax.tree.leaves(shapes) if "model" in leaf.sharding.spec)
    assert split > 0.7 * whole  # the rest: norms, routers, and heads that several query heads share
    assert sum(shares) <= (whole - split + split / 4) / (1.5 if fsdp else 1)


@pytest.mark.parametrize("fsdp", [False, True], ids=["tensor", "fsdp"])
def test_loading_and_saving_on_a_mesh(backbone, mesh, tmp_path, fsdp):
    save_backbone(backbone, tmp_path / "alone")
    spread = load_backbone(tmp_path / "alone", dtype="float32", mesh=mesh, fsdp=fsdp)
    shapes = parameter_shapes(backbone.config, jnp.float32, mesh=mesh, fsdp=fsdp)
    for found, expected, shape in zip(*map(jax.tree.leaves, (spread.params, backbone.params, shapes)), strict=True):
        assert found.sharding == shape.sharding
        np.testing.assert_array_equal(found, expected)
    save_backbone(spread, tmp_path / "spread")
    for file in (tmp_path / "alone").iterdir():
        assert (tmp_path / "spread" / file.name).read_bytes() == file.read_bytes()


def test_a_cache_lies_on_the_mesh(backbone, mesh):
    config, tokens = backbone.config, batch()[0]

    @functools.partial(jax.jit, donate_argnums=2)
    def step(params, tokens, cache):
        out = forward(params, config, tokens, cache=cache)
        return out.logits, out.cache

    def pieces(params, cache):
        for piece in np.split(tokens, [16, 32], axis=1):
            logits, cache = step(params, piece, cache)
        return logits, cache

    expected, _ = pieces(backbone.params, init_cache(config, ROWS, T, dtype=jnp.float32))
    empty = init_cache(config, ROWS, T, dtype=jnp.float32, mesh=mesh)
    places = jax.tree.map(lambda array: array.sharding, empty)
    logits, cache = pieces(place(backbone, mesh), empty)
    assert relative_l2(logits, expected) < 1e-5
    for array, place_before in zip(jax.tree.leaves(cache.slots), jax.tree.leaves(places.slots), strict=True):
        assert array.sharding.is_equivalent_to(place_before, array.ndim)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 50}, "vocab = 50 cannot be split over the mesh axis 'model' of 4"),
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, "^heads = 6 cannot be split"),
        ({"num_experts": 6}, "experts = 6 cannot be split"),
        ({"linear_num_key_heads": 2, "linear_num_value_heads": 6}, "value_heads = 6 cannot be split"),
        ({"hidden_size": 17}, "embed = 17 cannot be split over the mesh axis 'data' of 2"),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(mesh, change, message):
    with pytest.raises(MeshError, match=message):
        parameter_shapes(make_config("qwen3_5_moe", **SIZES | change), mesh=mesh, fsdp="hidden_size" in change)


def test_rows_that_the_mesh_does_not_divide_are_refused(mesh):
    config = config_of("qwen3")
    params = place(make_backbone(config), mesh)
    with pytest.raises(MeshError, match="batch = 3 cannot be split over the mesh axis 'data' of 2"):
        forward(params, config, tokens_of(3, 5))


def test_fsdp_needs_a_mesh(tmp_path):
    with pytest.raises(ValueError, match="fsdp=True splits weights over a mesh"):
        load_backbone(tmp_path, fsdp=True)
