"""Two processes of four devices each do what one does alone, and neither outlives the other."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import Backbone, save_backbone
from qscope_jax.generation import generate
from qscope_jax.sae.formats import load_sae, sae_sha256, save_sae
from qscope_jax.sae.model import SaeConfig, decode, encode, init_sae
from tests.backbone.families import make_config, make_params, relative_l2, tokens_of
from tests.distributed.scenarios import loss


@pytest.fixture
def folder(tmp_path):
    """`sae/`, `x.npy`, `damaged/` with a NaN among the last latents, and `others/`, SAEs of another shape."""
    sae = init_sae(jax.random.key(0), SaeConfig(d_model=16, d_sae=64, k=10, layer=0))
    save_sae(sae, tmp_path / "sae")
    np.save(tmp_path / "x.npy", np.random.default_rng(1).normal(size=(24, 16)).astype(np.float32))
    w_enc = sae.params.w_enc.at[3, 60].set(jnp.nan)
    save_sae(sae._replace(params=sae.params._replace(w_enc=w_enc)), tmp_path / "damaged")
    save_sae(init_sae(jax.random.key(0), SaeConfig(d_model=8, d_sae=32, k=2, layer=1)), tmp_path / "others")
    return tmp_path, sae


@pytest.mark.slow
def test_an_sae_over_two_processes(folder, together):
    folder, sae = folder
    ended = together("sae", folder)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]

    x = np.load(folder / "x.npy")
    code = encode(sae, x)
    gradient = jax.grad(lambda sae: jnp.sum((decode(sae, encode(sae, x)) - x) ** 2))(sae)
    alone = save_sae(load_sae(folder / "sae"), folder / "alone").parent
    expected = {"values": code.values, "x_hat": decode(sae, code), **gradient.params._asdict()}
    for process in range(2):
        found = np.load(folder / f"results{process}.npz")
        for mesh in ("within", "across"):
            np.testing.assert_array_equal(found[f"{mesh}.indices"], code.indices)
            for name, array in expected.items():
                np.testing.assert_allclose(found[f"{mesh}.{name}"], array, rtol=1e-4, atol=1e-5)
            assert found[f"{mesh}.sha256"] == sae_sha256(sae)
            for path in alone.iterdir():
                assert (folder / mesh / path.name).read_bytes() == path.read_bytes()

    outcomes = [(folder / f"outcome{process}.txt").read_text().splitlines() for process in range(2)]
    assert outcomes[0][0] == "done"
    assert "w_enc: 1 of 1,024 values are NaN" in outcomes[1][0]
    assert outcomes[0][1].startswith("FormatError")
    assert outcomes[1][1].startswith("RuntimeError: process 0 failed")
    assert json.loads((folder / "others" / "config.json").read_text())["d_sae"] == 32


@pytest.mark.slow
def test_a_backbone_over_two_processes(tmp_path, together):
    config = make_config(
        "qwen3_5_moe", num_hidden_layers=3, vocab_size=56, num_attention_heads=8, num_key_value_heads=4,
        linear_num_key_heads=4, linear_num_value_heads=8, shared_expert_intermediate_size=24,
    )  # fmt: skip
    model = Backbone(config, make_params(config))
    save_backbone(model, tmp_path / "model")
    tokens = tokens_of(4, 21)
    np.save(tmp_path / "tokens.npy", tokens)
    ended = together("backbone", tmp_path)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]

    gradient = jax.jit(jax.grad(loss))(model.params, config, tokens)
    expected = [jax.jit(forward)(model.params, config, tokens).logits, *jax.tree.leaves(gradient)]
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params))
    for process in range(2):
        found = np.load(tmp_path / f"results{process}.npz")
        for mesh in ("within", "across"):
            arrays = [found[f"{mesh}.logits"], *(found[f"{mesh}.{i}"] for i in range(len(expected) - 1))]
            assert relative_l2(arrays[0], expected[0]) < 1e-5
            assert max(map(relative_l2, arrays[1:], expected[1:])) < 1e-4
            for path in (tmp_path / "model").iterdir():
                assert (tmp_path / mesh / path.name).read_bytes() == path.read_bytes()
        # Split over both, each reads its half, and whole what is too small or too few to be split.
        assert found["across.taken"] < 0.65 * whole < whole <= found["within.taken"]


@pytest.mark.slow
def test_text_written_over_two_processes(tmp_path, together):
    config = make_config("qwen3", num_hidden_layers=2, vocab_size=56, num_attention_heads=8, num_key_value_heads=4)
    model, tokens = Backbone(config, make_params(config)), tokens_of(4, 21)
    save_backbone(model, tmp_path / "model")
    np.save(tmp_path / "tokens.npy", tokens)
    ended = together("write", tmp_path)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]
    options = {"max_new_tokens": 6, "eos": (3,), "temperature": 1.0, "seeds": [1, 2, 3, 4]}
    expected = generate(model.params, config, tokens, **options)
    for process in range(2):
        found = np.load(tmp_path / f"results{process}.npz")
        for mesh in ("within", "across"):
            np.testing.assert_array_equal(found[f"{mesh}.tokens"], expected.tokens)
            np.testing.assert_array_equal(found[f"{mesh}.streamed"], expected.tokens)
            np.testing.assert_allclose(found[f"{mesh}.logprobs"], expected.logprobs, atol=3e-5)


@pytest.mark.slow
def test_slurm_tasks_find_each_other(tmp_path, together):
    ended = together("hello", tmp_path, slurm=True)
    assert [one.code for one in ended] == [0, 0], [one.output for one in ended]
    for number, one in enumerate(ended):
        assert f"process {number} of 2, 8 devices" in one.output


@pytest.mark.slow
@pytest.mark.parametrize(("victim", "how"), [(0, "killed"), (1, "killed"), (1, "failed")])
def test_where_one_is_lost_the_other_ends_with_an_error(tmp_path, together, victim, how):
    (tmp_path / "victim").write_text(str(victim))
    (tmp_path / "how").write_text(how)
    silence = 6
    ended = together("lose_process", tmp_path, silence=silence)
    lost, other = ended[victim], ended[1 - victim]
    if how == "killed":
        assert lost.code == -9, lost.output
        assert other.seconds - lost.seconds < 2 * silence
    else:
        assert "ValueError: this one failed" in lost.output
        assert max(lost.seconds, other.seconds) < 60
    assert lost.code != 0
    assert other.code != 0
