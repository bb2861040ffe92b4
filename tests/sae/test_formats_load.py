"""load_sae: from any layout the same SAE, of one layer only, and nothing that does not fit together."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.files.recognise import FormatError
from qscope_jax.files.source import SourceNotFoundError, resolve
from qscope_jax.sae.formats import layers_of, load_sae, load_saes, open_sae, sae_sha256, save_sae
from qscope_jax.sae.formats.qwen_scope import release_arrays
from qscope_jax.sae.formats.torch_write import write_torch
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, init_sae

D, F, K = 16, 64, 4
FORMATS = ("safetensors", "qwen-scope", "saelens")
NAME = "SAE-Res-Qwen3-1.7B-Base-W64-L0_4"  # plain width: named like the release, not in its table


def make(layer: int | None = 3, **config) -> Sae:
    settings = {"k": K, "layer": layer, "backbone": "Qwen/X", "source": "here", **config}
    sae = init_sae(jax.random.key(layer or 0), SaeConfig(D, F, **settings))
    params = sae.params._replace(b_enc=jnp.linspace(-1, 1, F), b_dec=jnp.linspace(-1, 1, D))
    return Sae(params, sae.config)


def same(one: Sae, two: Sae) -> bool:
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(one.params, two.params, strict=True))


def release_file(folder, layer=0, sae=None, **changes):
    """A file as the release has it: weights only, no config."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {**release_arrays((sae or make(layer)).params), **changes}
    path = folder / f"layer{layer}.sae.pt"
    write_torch(path, {name: array for name, array in arrays.items() if array is not None})
    return path


@pytest.mark.parametrize("format", FORMATS)
class TestEveryFormat:
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_what_was_saved_is_loaded(self, tmp_path, format, dtype):
        sae = make(sink_threshold=812.5)
        sae = Sae(SaeParams(*(p.astype(dtype) for p in sae.params)), sae.config)
        save_sae(sae, tmp_path / "set", format=format)
        loaded = load_sae(tmp_path / "set", 3, dtype=dtype)
        assert same(loaded, sae)
        assert loaded.config == sae.config
        assert sae_sha256(loaded) == sae_sha256(sae)

    def test_the_layer_may_be_left_out_where_there_is_one(self, tmp_path, format):
        path = save_sae(make(), tmp_path / "set", format=format)
        assert same(load_sae(tmp_path / "set"), make())
        assert same(load_sae(path), make())

    def test_the_dtype_is_cast_on_the_way(self, tmp_path, format):
        save_sae(make(), tmp_path / "set", format=format)
        loaded = load_sae(tmp_path / "set", dtype="bfloat16")
        assert np.array_equal(loaded.params.w_enc, make().params.w_enc.astype("bfloat16"))
        assert load_sae(tmp_path / "set", dtype=None).params.w_enc.dtype == jnp.float32

    def test_an_explicit_k_wins_and_is_reported(self, tmp_path, format):
        save_sae(make(), tmp_path / "set", format=format)
        with pytest.warns(UserWarning, match="using k = 7 as given; it is 4 according to"):
            assert load_sae(tmp_path / "set", k=7).config.k == 7
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load_sae(tmp_path / "set", k=K).config.k == K

    def test_another_layer_than_asked_is_refused(self, tmp_path, format):
        path = save_sae(make(), tmp_path / "set", format=format)
        with pytest.raises(FormatError, match="no SAE for layer 5 in it; it has the layers 3"):
            load_sae(tmp_path / "set", 5)
        with pytest.raises(FormatError, match=r"layer is 3 according to .*, but 5 according to the layer asked for"):
            load_sae(path, 5)

    def test_several_layers(self, tmp_path, format):
        for layer in (0, 1, 2, 7):
            save_sae(make(layer), tmp_path / f"layer{layer}" if format == "saelens" else tmp_path, format=format)
        assert layers_of(tmp_path) == (0, 1, 2, 7)
        saes = load_saes(tmp_path, [7, 0])
        assert list(saes) == [7, 0]
        assert same(saes[7], make(7))
        assert list(load_saes(tmp_path)) == [0, 1, 2, 7]
        with pytest.raises(FormatError, match=r"holds several SAEs; name one: layer= 0..2, 7"):
            load_sae(tmp_path)

    def test_loading_a_layer_opens_no_other(self, tmp_path, format):
        for layer in (19, 20):
            save_sae(make(layer), tmp_path / f"layer{layer}" if format == "saelens" else tmp_path, format=format)
        other = next(path for path in tmp_path.rglob("*") if "layer19" in str(path) and path.is_file())
        other.write_bytes(b"not an SAE at all")
        assert load_sae(tmp_path, 20).config.layer == 20

    @pytest.mark.parametrize(("value", "count"), [(np.nan, 2), (np.inf, 1), (-np.inf, 3)])
    def test_weights_that_are_not_finite_are_refused_with_their_count(self, tmp_path, format, value, count):
        sae = make()
        broken = sae.params._replace(w_dec=sae.params.w_dec.at[0, :count].set(value))
        save_sae(Sae(broken, sae.config), tmp_path / "set", format=format)
        with pytest.raises(FormatError, match=f"w_dec: {count} of 1,024 values are NaN or infinite"):
            load_sae(tmp_path / "set")
        loaded = load_sae(tmp_path / "set", allow_nonfinite=True)
        assert np.array_equal(loaded.params.w_dec, broken.w_dec, equal_nan=True)

    def test_values_too_large_for_the_dtype_are_refused(self, tmp_path, format):
        sae = make()
        save_sae(Sae(sae.params._replace(b_dec=sae.params.b_dec * 1e6), sae.config), tmp_path / "set", format=format)
        with pytest.raises(FormatError, match="values do not fit into float16"):
            load_sae(tmp_path / "set", dtype="float16")


class TestWhereKComesFrom:
    def test_the_name_of_the_set(self, tmp_path):
        release_file(tmp_path / NAME)
        assert load_sae(tmp_path / NAME).config == SaeConfig(D, F, K, 0, "Qwen3-1.7B-Base", NAME)

    def test_the_name_around_a_single_file(self, tmp_path):
        assert load_sae(release_file(tmp_path / NAME)).config.k == K

    @pytest.mark.parametrize(
        "folder",
        [f"models--Qwen--{NAME}/snapshots/{'0' * 40}", f"hub/models/Qwen/{NAME.replace('.', '___')}"],
        ids=["hub_cache", "modelscope_cache"],
    )
    def test_the_name_in_a_cache(self, tmp_path, folder):
        release_file(tmp_path / folder)
        loaded = load_sae(tmp_path / folder).config
        assert (loaded.k, loaded.backbone) == (K, "Qwen3-1.7B-Base")

    def test_our_config_json(self, tmp_path):
        release_file(tmp_path)
        write_config(tmp_path, sink_thresholds={"0": 5.5, "1": 7})
        assert load_sae(tmp_path).config.sink_threshold == 5.5
        assert load_sae(tmp_path / "layer0.sae.pt").config.k == K

    def test_the_releases_config_json(self, tmp_path):
        release_file(tmp_path)
        content = {"model_type": "topk_sae", "base_model": "Qwen/Y", "d_model": D, "d_sae": F, "k": K, "num_layers": 2}
        content |= {"hook_point": "resid_post", "dtype": "float32"}
        (tmp_path / "config.json").write_text(json.dumps(content))
        assert load_sae(tmp_path).config.backbone == "Qwen/Y"

    def test_nowhere_is_an_error_that_says_how_to_give_it(self, tmp_path):
        release_file(tmp_path / "plain")
        with pytest.raises(FormatError, match=r"k is unknown: .* give it as k=50"):
            load_sae(tmp_path / "plain")
        assert load_sae(tmp_path / "plain", k=9).config.k == 9

    def test_two_places_that_disagree_are_both_named(self, tmp_path):
        release_file(tmp_path / NAME)
        write_config(tmp_path / NAME, k=5)
        with pytest.raises(FormatError, match=f"k is 5 according to config.json, but 4 according to the name {NAME}"):
            load_sae(tmp_path / NAME)
        with pytest.warns(UserWarning, match="using k = 5 as given"):
            assert load_sae(tmp_path / NAME, k=5).config.k == 5

    def test_a_strangers_config_beside_a_single_file_is_not_asked(self, tmp_path):
        release_file(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
        assert load_sae(tmp_path / "layer0.sae.pt", k=3).config.k == 3
        with pytest.raises(FormatError, match="found the configuration of a 'qwen3' model"):
            load_sae(tmp_path, k=3)

    @pytest.mark.parametrize("k", [0, -1, F + 1])
    def test_k_must_lie_within_the_latents(self, tmp_path, k):
        release_file(tmp_path)
        with pytest.raises(FormatError, match=f"k = {k} must lie in 1..{F}"):
            load_sae(tmp_path, k=k)


def write_config(folder, **changes):
    content = {"format": "qscope-sae", "d_model": D, "d_sae": F, "k": K, **changes}
    (folder / "config.json").write_text(json.dumps({key: v for key, v in content.items() if v is not None}))


class TestConfigJson:
    """G1: a configuration with a mistake in it is refused, with a suggestion."""

    @pytest.mark.parametrize(
        ("content", "says"),
        [
            (
                '{"format": "qscope-sae", "d_model": 16, "d_sea": 64, "k": 4}',
                "unknown key 'd_sea'; did you mean 'd_sae'",
            ),
            ('{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": "4"}', "'k' must be int, found '4'"),
            ('{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": true}', "'k' must be int, found True"),
            ('{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": 0}', "'k' must be positive"),
            ('{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": 4, "k": 5}', "the key 'k' comes twice"),
            ('{"format": "qscope-sae", "d_model": 16, "k": 4}', "d_sae is missing"),
            ('{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": NaN}', "NaN is not JSON"),
            (
                '{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": 4, "hook": "mlp_out"}',
                "the hook is 'mlp_out'",
            ),
            (
                '{"format": "qscope-sae", "d_model": 16, "d_sae": 64, "k": 4, "sink_thresholds": {"x": 1}}',
                "sink_thresholds must map layers to positive numbers",
            ),
            ('{"model_type": "topk_sae", "d_model": 16, "d_sae": 64, "k": 4.5}', "'k' must be int, found 4.5"),
            (
                '{"model_type": "topk_sae", "d_model": 16, "d_sae": 64, "k": 4, "hook_point": "mlp"}',
                "the hook is 'mlp'",
            ),
            ('{"k": 4', "not valid JSON"),
            ("[1]", "expected a JSON object"),
            ('{"k": ' + "[" * 100_000, "not valid JSON"),
            ('{"architectures": ["X"]}', "found a JSON file with architectures"),
        ],
    )
    def test_mistakes_are_named(self, tmp_path, content, says):
        release_file(tmp_path)
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(FormatError, match=says.replace("(", r"\(")) as error:
            load_sae(tmp_path)
        assert "config.json" in str(error.value)


class TestTensorsThatDoNotFit:
    """P10."""

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"W_dec": None}, "missing W_dec"),
            ({"extra": np.ones(3, np.float32)}, "unknown extra"),
            ({"W_enc": np.ones((D, F), np.float32), "W_dec": np.ones((F, D), np.float32)}, "swapped or transposed"),
            ({"W_enc": np.ones((F, D + 1), np.float32)}, r"expected W_enc \(64, 16\) .* found W_enc \(64, 17\)"),
            ({"b_enc": np.ones(F + 1, np.float32)}, r"expected W_enc \(65, 16\)"),
            ({"b_dec": np.ones((1, D), np.float32)}, "expected two matrices and two vectors"),
        ],
    )
    def test_names_and_shapes(self, tmp_path, changes, says):
        release_file(tmp_path, **changes)
        with pytest.raises(FormatError, match=says):
            load_sae(tmp_path, k=3)

    def test_files_of_other_tools_are_recognised(self, tmp_path):
        write_torch(tmp_path / "ae.pt", {"encoder.weight": np.ones((F, D), np.float32)})
        with pytest.raises(
            FormatError, match=r"looks like sparsify without its cfg\.json, dictionary_learning or OpenAI"
        ):
            load_sae(tmp_path / "ae.pt", k=3)

    def test_a_name_that_promises_another_width(self, tmp_path):
        folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W64K-L0_50"
        release_file(folder)
        with pytest.raises(
            FormatError, match=r"d_sae is 64 according to the tensors .* but 65536 according to the name"
        ):
            load_sae(folder)

    def test_a_released_name_with_another_d_model(self, tmp_path):
        folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        release_file(folder, W_enc=np.ones((32768, 1), np.float32), W_dec=np.ones((1, 32768), np.float32),
                     b_enc=np.ones(32768, np.float32), b_dec=np.ones(1, np.float32))  # fmt: skip
        with pytest.raises(
            FormatError, match=r"d_model is 1 according to the tensors .* but 2048 according to the name"
        ):
            load_sae(folder)

    def test_a_layer_that_the_backbone_does_not_have(self, tmp_path):
        release_file(tmp_path, layer=28)
        content = {"model_type": "topk_sae", "d_model": D, "d_sae": F, "k": K, "num_layers": 28}
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(FormatError, match=r"layer 28 is out of range: the backbone has the layers 0..27"):
            load_sae(tmp_path, 28)

    def test_a_config_of_another_width(self, tmp_path):
        release_file(tmp_path)
        write_config(tmp_path, d_sae=128)
        with pytest.raises(
            FormatError, match=r"d_sae is 128 according to config.json, but 64 according to the tensors"
        ):
            load_sae(tmp_path)

    @pytest.mark.parametrize("layer", [-1, True])
    def test_a_layer_that_is_none(self, tmp_path, layer):
        release_file(tmp_path)
        with pytest.raises(FormatError, match="expected a layer number"):
            load_sae(tmp_path, layer)


class TestSources:
    def test_a_folder_without_saes_says_what_it_holds(self, tmp_path):
        (tmp_path / "notes.txt").write_text("x")
        with pytest.raises(FormatError, match=r"no SAE in it: expected layer0.sae.pt or the like; found notes.txt"):
            load_sae(tmp_path)

    def test_a_model_given_as_sae_is_recognised(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"")
        with pytest.raises(FormatError, match="this is a language model"):
            load_sae(tmp_path)

    def test_a_file_of_another_kind(self, tmp_path):
        (tmp_path / "layer0.sae.npz").write_bytes(b"")
        with pytest.raises(FormatError, match="expected a file that ends in"):
            load_sae(tmp_path / "layer0.sae.npz")

    def test_a_missing_source(self, tmp_path):
        with pytest.raises(SourceNotFoundError):
            load_sae(tmp_path / "none")

    def test_only_the_files_of_the_layer_are_fetched(self, tmp_path, monkeypatch):
        for layer in (19, 20):
            save_sae(make(layer), tmp_path, format="qwen-scope")
        fetched = []
        source = resolve(tmp_path, what="sae")
        fetch = type(source.place).fetch
        monkeypatch.setattr(
            type(source.place), "fetch", lambda self, name: (fetched.append(name), fetch(self, name))[1]
        )
        load_sae(source, 20)
        assert sorted(set(fetched)) == ["config.json", "layer20.sae.pt"]

    def test_safetensors_come_before_pickles(self, tmp_path):
        save_sae(make(), tmp_path, format="qwen-scope")
        save_sae(make(), tmp_path, format="safetensors")
        assert open_sae(tmp_path, 3).file.format == "safetensors"

    @pytest.mark.parametrize("dtype", ["float64", "int8"])
    def test_other_dtypes_are_refused(self, tmp_path, dtype):
        with pytest.raises(ValueError, match="expected one of float32, bfloat16, float16"):
            load_sae(release_file(tmp_path), k=3, dtype=dtype)


class TestNative:
    def test_tensors_of_the_release_without_our_metadata_are_read(self, tmp_path):
        from safetensors.numpy import save_file

        arrays = {name: np.ascontiguousarray(a) for name, a in release_arrays(make().params).items()}
        save_file(arrays, tmp_path / "layer3.sae.safetensors")
        assert same(load_sae(tmp_path, k=3), make())

    def test_a_flipped_bit_is_noticed(self, tmp_path):
        path = save_sae(make(), tmp_path)
        content = bytearray(path.read_bytes())
        content[-5] ^= 1
        path.write_bytes(content)
        with pytest.raises(FormatError, match="the data are damaged: expected sha256"):
            load_sae(path)

    @pytest.mark.parametrize(
        ("key", "value", "says"),
        [("version", "2", "version '2', expected '1'"), ("k", "many", "damaged metadata"), ("hook", "mlp", "the hook")],
    )
    def test_metadata_that_cannot_be_right(self, tmp_path, key, value, says):
        from qscope_jax.files.tensors import open_tensors, write_tensors

        path = save_sae(make(), tmp_path)
        file = open_tensors(path)
        write_tensors(path, {name: file.array(name) for name in file.names}, {**file.metadata, key: value})
        with pytest.raises(FormatError, match=says):
            load_sae(path)

    def test_equal_saes_make_equal_files(self, tmp_path):
        one, two = save_sae(make(), tmp_path / "a"), save_sae(make(), tmp_path / "b")
        assert one.read_bytes() == two.read_bytes()

    def test_the_hash_names_content_not_file(self, tmp_path):
        hashes = {
            format: sae_sha256(load_sae(save_sae(make(), tmp_path / format, format=format))) for format in FORMATS
        }
        assert len(set(hashes.values())) == 1
        assert sae_sha256(make(4)) not in hashes.values()


class TestSaeLens:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"architecture": "jumprelu"}, "architecture must be 'topk', found 'jumprelu'"),
            ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be False, found True"),
            ({"apply_b_dec_to_input": None}, r"found True \(SAELens's default"),
            ({"normalize_activations": "layer_norm"}, "normalize_activations must be 'none', found 'layer_norm'"),
            ({"reshape_activations": "hook_z"}, "reshape_activations must be 'none'"),
            ({"rescale_acts_by_decoder_norm": True}, "rescale_acts_by_decoder_norm must be False"),
            ({"k": "4"}, "'k' must be an integer"),
            ({"d_sae": 65}, "d_sae is 64, cfg.json beside it says 65"),
            ({"metadata": {"hook_name": "blocks.3.hook_mlp_out"}}, "the hook is 'blocks.3.hook_mlp_out'"),
            (
                {"metadata": {"hook_name": "blocks.3.hook_resid_post", "hf_hook_name": "model.layers.2"}},
                "name different layers",
            ),
        ],
    )
    def test_other_computations_are_refused_by_name(self, tmp_path, changes, says):
        save_sae(make(), tmp_path, format="saelens")
        content = {**json.loads((tmp_path / "cfg.json").read_text()), **changes}
        content = {key: value for key, value in content.items() if value is not None}
        (tmp_path / "cfg.json").write_text(json.dumps(content))
        with pytest.raises(FormatError, match=says):
            load_sae(tmp_path)

    def test_the_layer_comes_from_the_hook_whatever_the_folder_is_called(self, tmp_path):
        save_sae(make(2), tmp_path / "one", format="saelens")
        save_sae(make(9), tmp_path / "two", format="saelens")
        assert layers_of(tmp_path) == (2, 9)
        assert same(load_sae(tmp_path, 9), make(9))

    def test_a_folder_name_that_contradicts_its_hook_is_refused(self, tmp_path):
        save_sae(make(2), tmp_path / "layer5", format="saelens")
        with pytest.raises(FormatError, match=r"layer is 2 according to layer5/cfg.json, but 5"):
            load_sae(tmp_path, 5)

    def test_an_overwritten_folder_is_never_half_of_each(self, tmp_path, monkeypatch):
        from qscope_jax.sae.formats import saelens

        save_sae(make(2), tmp_path, format="saelens")
        monkeypatch.setattr(saelens, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space"):
            save_sae(make(3), tmp_path, format="saelens")
        assert not (tmp_path / "cfg.json").exists()


class TestSaving:
    def test_a_single_file(self, tmp_path):
        assert save_sae(make(), tmp_path / "my.safetensors") == tmp_path / "my.safetensors"
        assert [path.name for path in tmp_path.iterdir()] == ["my.safetensors"]
        assert load_sae(tmp_path / "my.safetensors").config.k == K

    def test_a_single_pickle_keeps_its_k_in_a_config_beside_it(self, tmp_path):
        save_sae(make(None), tmp_path / "my.pt", format="qwen-scope")
        assert load_sae(tmp_path / "my.pt").config.k == K

    def test_a_folder_of_other_saes_is_refused_before_anything_is_written(self, tmp_path):
        save_sae(make(), tmp_path)
        before = {path: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(FormatError, match="k is 4, the SAE to be written has 5; write it to another folder"):
            save_sae(make(4, k=5), tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_thresholds_of_all_layers_are_kept(self, tmp_path):
        for layer in (10, 2):
            save_sae(make(layer, sink_threshold=float(layer + 1)), tmp_path, format="qwen-scope")
        assert json.loads((tmp_path / "config.json").read_text())["sink_thresholds"] == {"2": 3.0, "10": 11.0}

    @pytest.mark.parametrize("format", ["qwen-scope", "safetensors"])
    def test_a_layer_that_is_written_again_has_its_new_threshold_or_none(self, tmp_path, format):
        for layer, threshold in ((2, 3.0), (10, 11.0), (2, 5.0), (10, None)):
            save_sae(make(layer, sink_threshold=threshold), tmp_path, format=format)
        assert load_sae(tmp_path, 2).config.sink_threshold == 5.0
        assert load_sae(tmp_path, 10).config.sink_threshold is None

    def test_an_unknown_format_or_layer_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match="expected one of safetensors, qwen-scope, saelens, sparsify"):
            save_sae(make(), tmp_path, format="npz")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="layer is unknown"):
            save_sae(make(None), tmp_path / "new")

    def test_a_moved_folder_still_loads(self, tmp_path):
        save_sae(make(), tmp_path / "a")
        shutil.move(tmp_path / "a", tmp_path / "b")
        assert same(load_sae(tmp_path / "b"), make())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory that Linux tells of")
@pytest.mark.parametrize("mesh", ["None", "make_mesh(2, 4)"])
def test_loading_takes_the_memory_of_the_arrays_and_no_more(tmp_path, mesh):
    """In a fresh process, so that the peak is its own: at most 1.05x the arrays beyond what jax itself takes."""

    big = init_sae(jax.random.key(0), SaeConfig(512, 16384, 4, layer=0))
    save_sae(big, tmp_path, format="qwen-scope")
    code = """if True:
        import sys, threading, time, jax.numpy as jnp
        from qscope_jax import load_sae
        from qscope_jax.mesh import make_mesh
        def anonymous():
            return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
        jnp.zeros(3).block_until_ready()
        load_sae(sys.argv[2])
        before, peak, done = anonymous(), [0], []
        def watch():
            while not done:
                peak[0] = max(peak[0], anonymous())
                time.sleep(0.0005)
        thread = threading.Thread(target=watch); thread.start()
        sae = load_sae(sys.argv[1], mesh=eval(sys.argv[3]))
        done.append(1); thread.join()
        size = sum(a.nbytes for a in sae.params)
        assert peak[0] - before < 1.05 * size + (8 << 20), (peak[0] - before, size)
    """
    save_sae(make(), tmp_path / "small")
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(tmp_path / "small"), mesh], check=True)
