"""sparsify folders: its centred encoder and ours give the same pre-activations, and nothing else is read as ours."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.files.recognise import FormatError
from qscope_jax.files.tensors import open_tensors, write_tensors
from qscope_jax.mesh import make_mesh
from qscope_jax.sae.formats import layers_of, load_sae, load_saes, open_sae, read_back, sae_sha256, save_sae
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, encode

D, F, K = 16, 64, 4


def make(layer: int | None = 3, *, dtype="float32", scale=1.0, **config) -> Sae:
    """Nothing is tied, no bias is zero."""
    rng = np.random.default_rng(0 if layer is None else layer)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)  # noqa: E731
    params = SaeParams(draw(D, F), draw(F), draw(F, D), draw(D) * jnp.asarray(scale, dtype))
    return Sae(params, SaeConfig(D, F, K, layer=layer, backbone="Qwen/X", source="here", **config))


def saved(sae, folder):
    return save_sae(sae, folder / f"layers.{sae.config.layer}", format="sparsify")


def theirs(path, **changes):
    """A folder as sparsify writes it: no key of ours, and the settings as given."""
    content = {"activation": "topk", "expansion_factor": F // D, "num_latents": 0, "k": K, "d_in": D, **changes}
    content = {key: value for key, value in content.items() if value is not None}
    (path.parent / "cfg.json").write_text(json.dumps(content))
    return path


def exact(array):
    return np.asarray(array, np.float64)


@pytest.mark.parametrize(("dtype", "bits"), [("float32", 24), ("float16", 11), ("bfloat16", 8)])
@pytest.mark.parametrize("scale", [1.0, 300.0])
class TestBothFormulas:
    def test_what_is_written_has_our_pre_activations(self, tmp_path, dtype, bits, scale):
        sae = make(dtype=dtype, scale=scale)
        file = open_tensors(saved(sae, tmp_path))
        weight, bias, b_dec = (exact(file.array(name)) for name in ("encoder.weight", "encoder.bias", "b_dec"))
        x = np.random.default_rng(1).normal(size=(8, D))
        ours = x @ exact(sae.params.w_enc) + exact(sae.params.b_enc)
        assert (np.abs((x - b_dec) @ weight.T + bias - ours) <= half_ulp(bias, bits) + 1e-10).all()

    def test_what_is_read_has_their_pre_activations(self, tmp_path, dtype, bits, scale):
        file = open_tensors(saved(make(dtype=dtype, scale=scale), tmp_path))
        weight, bias, b_dec = (exact(file.array(name)) for name in ("encoder.weight", "encoder.bias", "b_dec"))
        x = np.random.default_rng(1).normal(size=(8, D))
        params = load_sae(tmp_path, 3, dtype=None).params
        ours = x @ exact(params.w_enc) + exact(params.b_enc)
        error = np.abs((x - b_dec) @ weight.T + bias - ours)
        assert (error <= half_ulp(exact(params.b_enc), bits) + 1e-10).all()

    def test_there_and_back_the_bias_alone_moves_and_as_told(self, tmp_path, dtype, bits, scale):
        sae = make(dtype=dtype, scale=scale)
        loaded, told = load_sae(saved(sae, tmp_path), dtype=None), read_back(sae, format="sparsify")
        assert sae_sha256(loaded) == sae_sha256(told)
        for name in ("w_enc", "w_dec", "b_dec"):
            np.testing.assert_array_equal(getattr(loaded.params, name), getattr(sae.params, name))
        shift = exact(sae.params.b_dec) @ exact(sae.params.w_enc)
        allowed = half_ulp(exact(sae.params.b_enc) + shift, bits) + half_ulp(exact(loaded.params.b_enc), bits)
        assert (np.abs(exact(loaded.params.b_enc) - exact(sae.params.b_enc)) <= allowed + 1e-12).all()


def half_ulp(values, bits):
    """Half a unit in the last place of each value at the given precision."""
    return np.exp2(np.floor(np.log2(np.maximum(np.abs(values), 1e-30))) - bits)


def test_a_bias_is_folded_at_the_precision_that_is_loaded_not_that_of_the_file(tmp_path):
    saved(make(dtype="bfloat16"), tmp_path)
    fine, coarse = load_sae(tmp_path, 3).params.b_enc, load_sae(tmp_path, 3, dtype=None).params.b_enc
    assert coarse.dtype == jnp.bfloat16
    np.testing.assert_array_equal(fine.astype(jnp.bfloat16), coarse)
    assert not np.array_equal(fine, coarse.astype(jnp.float32))


def test_without_a_decoder_bias_the_round_trip_is_exact(tmp_path):
    sae = make(scale=0.0)
    assert (
        sae_sha256(load_sae(saved(sae, tmp_path))) == sae_sha256(sae) == sae_sha256(read_back(sae, format="sparsify"))
    )


def test_on_a_mesh_the_fold_is_the_same(tmp_path):
    saved(make(), tmp_path)
    loaded = load_sae(tmp_path, 3, mesh=make_mesh(2, 4))
    assert {shard.data.shape for shard in loaded.params.b_enc.addressable_shards} == {(F // 4,)}
    assert sae_sha256(loaded) == sae_sha256(load_sae(tmp_path, 3))


def test_features_are_those_of_their_formula(tmp_path):
    file = open_tensors(saved(make(), tmp_path))
    weight, bias, b_dec = (exact(file.array(name)) for name in ("encoder.weight", "encoder.bias", "b_dec"))
    x = np.random.default_rng(2).normal(size=(32, D)) + b_dec
    positive = np.maximum((x - b_dec) @ weight.T + bias, 0)
    code = encode(load_sae(tmp_path, 3), jnp.asarray(x, jnp.float32))
    np.testing.assert_array_equal(code.indices, np.argsort(-positive, axis=-1)[:, :K])
    np.testing.assert_allclose(code.values, -np.sort(-positive, axis=-1)[:, :K], rtol=1e-5)


class TestFolders:
    def test_everything_known_comes_back(self, tmp_path):
        for layer in (0, 11, 2):
            saved(make(layer, sink_threshold=layer + 0.5), tmp_path)
        assert layers_of(tmp_path) == (0, 2, 11)
        assert {n: sae.config for n, sae in load_saes(tmp_path).items()} == {
            n: make(n, sink_threshold=n + 0.5).config for n in (0, 2, 11)
        }
        assert load_sae(tmp_path / "layers.11").config == load_sae(tmp_path, 11).config

    def test_a_foreign_folder_tells_its_layer_by_its_name(self, tmp_path):
        theirs(saved(make(), tmp_path))
        assert load_sae(tmp_path, 3).config == SaeConfig(D, F, K, layer=3, source=tmp_path.name)
        assert load_sae(tmp_path / "layers.3" / "sae.safetensors").config.layer == 3

    def test_the_settings_are_those_their_loader_asks_for(self, tmp_path):
        content = json.loads((saved(make(), tmp_path).parent / "cfg.json").read_text())
        assert {key: content[key] for key in ("d_in", "k", "num_latents", "expansion_factor", "activation")} == {
            "d_in": D, "k": K, "num_latents": F, "expansion_factor": F // D, "activation": "topk",
        }  # fmt: skip
        assert not any(content[key] for key in ("multi_topk", "skip_connection", "transcode"))

    @pytest.mark.parametrize("hook", ["layers.3.mlp", "h.3.attn", "embed_tokens"])
    def test_other_hooks_are_refused_and_do_not_hide_their_neighbours(self, tmp_path, hook):
        theirs(save_sae(make(), tmp_path / hook, format="sparsify"))
        with pytest.raises(FormatError, match=f"the hook is '{hook}'"):
            load_sae(tmp_path / hook)
        saved(make(5), tmp_path)
        assert layers_of(tmp_path) == (5,)
        assert load_sae(tmp_path, 5).config.layer == 5

    def test_a_renamed_folder_is_refused(self, tmp_path):
        saved(make(), tmp_path)
        (tmp_path / "layers.3").rename(tmp_path / "layers.4")
        with pytest.raises(FormatError, match=r"it says layer 3, but its folder is called 'layers.4'"):
            load_sae(tmp_path, 4)
        with pytest.raises(FormatError, match="the folder of layer 4 cannot hold the SAE of layer 3"):
            save_sae(make(3), tmp_path / "layers.4", format="sparsify")

    def test_a_native_file_of_that_name_is_still_native(self, tmp_path):
        save_sae(make(), tmp_path / "sae.safetensors")
        assert open_sae(tmp_path / "sae.safetensors").file.format == "safetensors"
        assert sae_sha256(load_sae(tmp_path / "sae.safetensors")) == sae_sha256(make())


class TestRefused:
    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"activation": "groupmax"}, "activation must be 'topk', found 'groupmax'"),
            ({"multi_topk": True}, "multi_topk must be False, found True"),
            (
                {"transcode": True, "skip_connection": True},
                "transcode must be False, .*; skip_connection must be False",
            ),
            ({"signed": True}, "signed must be False, found True"),
            ({"k": "4"}, "'k' must be an integer, found '4'"),
            ({"d_in": None}, "'d_in' must be an integer, found None"),
            ({"num_latents": 65}, "d_sae is 64, cfg.json beside it says 65"),
            ({"qscope": 1}, "'qscope' must be an object"),
            ({"k": F + 1}, f"k = {F + 1} must lie in 1..{F}"),
        ],
    )
    def test_other_computations_by_name(self, tmp_path, changes, says):
        theirs(saved(make(), tmp_path), **changes)
        with pytest.raises(FormatError, match=says):
            load_sae(tmp_path, 3)

    def test_a_skip_matrix(self, tmp_path):
        path = saved(make(), tmp_path)
        file = open_tensors(path)
        arrays = {name: np.array(file.array(name)) for name in file.names}
        write_tensors(path, {**arrays, "W_skip": np.zeros((D, D), np.float32)})
        with pytest.raises(FormatError, match="unknown W_skip; this looks like a transcoder"):
            load_sae(tmp_path, 3)

    def test_weights_that_are_not_finite_are_counted_where_they_are(self, tmp_path):
        sae = make()
        saved(Sae(sae.params._replace(b_dec=sae.params.b_dec.at[2].set(jnp.nan)), sae.config), tmp_path)
        with pytest.raises(FormatError, match="b_dec: 1 of 16 values are NaN or infinite"):
            load_sae(tmp_path, 3)

    def test_a_bias_that_its_type_cannot_hold(self, tmp_path):
        sae = make(dtype="float16", scale=20000.0)
        with pytest.raises(FormatError, match="does not fit into float16; write it as bfloat16"):
            saved(sae, tmp_path)

    def test_an_overwritten_folder_is_never_half_of_each(self, tmp_path, monkeypatch):
        from qscope_jax.sae.formats import sparsify

        path = saved(make(), tmp_path)
        monkeypatch.setattr(sparsify, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        with pytest.raises(OSError, match="No space"):
            saved(make(), tmp_path)
        assert not path.with_name("cfg.json").exists()


def test_equal_saes_give_equal_hashes_whatever_the_layout_in_memory():
    """The fold sums in one order: a rerun of a conversion compares what it reads with what it would write."""
    sae = make()
    w_enc = np.asfortranarray(np.asarray(sae.params.w_enc))
    other = Sae(sae.params._replace(w_enc=w_enc), sae.config)
    assert sae_sha256(read_back(other, format="sparsify")) == sae_sha256(read_back(sae, format="sparsify"))
    assert jax.tree.structure(other) == jax.tree.structure(sae)
