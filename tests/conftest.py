"""Every test runs on the CPU with eight simulated devices and no network; set before anything imports jax."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import json
import math
import re
from pathlib import Path

import pytest

# The pre-tokeniser of Qwen2 and Qwen3.
QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs end with their module: kept, those of the whole suite need more memory maps than Linux gives a
    process (65,530), and the compiler crashes."""
    yield
    import jax

    jax.clear_caches()


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory):
    """A folder with a byte-level BPE tokenizer in Qwen2's form: 300 ids of text, then three special tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"), levels])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, then the dog sleeps"] * 9, trainer)
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": names[0], "pad_token": names[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def tiny_release(tmp_path_factory, tiny_tokenizer):
    """A folder with `model/` (two random Qwen3 layers, context 64) and `sae/` (layers 0 and 1, 64 latents, k = 4)."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from qscope_jax.backbone.config import ModelConfig
    from qscope_jax.backbone.forward import init_params
    from qscope_jax.backbone.weights import Backbone, save_backbone
    from qscope_jax.sae.formats import save_sae
    from qscope_jax.sae.model import SaeConfig, init_sae

    raw = dict(
        model_type="qwen3", vocab_size=320, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, intermediate_size=24, rms_norm_eps=1e-6, rope_theta=10000,
        rope_scaling=None, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    config, folder = ModelConfig.from_hf(raw), tmp_path_factory.mktemp("release")
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(jax.random.key(0), config))  # drawn in NumPy: nothing to compile

    def draw(path, leaf):
        if path[-1].key == "scale":
            return jnp.asarray(rng.uniform(0.4, 1.6, leaf.shape), leaf.dtype)
        return jnp.asarray(rng.normal(0, 1 if path[-1].key == "embed" else 0.4, leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, shapes)
    save_backbone(Backbone(config, params), folder / "model")
    for file in Path(tiny_tokenizer).iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    for layer in range(2):
        save_sae(init_sae(jax.random.key(layer + 1), SaeConfig(d_model=16, d_sae=64, k=4, layer=layer)), folder / "sae")
    return folder


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory):
    """Compiled programs are kept for the session, so that runs of a command need not compile again; returns where."""
    import jax

    folder = str(tmp_path_factory.mktemp("compiled"))
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])


@pytest.fixture(scope="session")
def collectives():
    """A function that lists what devices exchange in a compiled program, as (operation, element counts of its results).

    Operations are named as in XLA's text: "all-gather", "all-reduce", "reduce-scatter", "all-to-all", ...
    """
    operation = r"(all-gather|all-reduce|reduce-scatter|(?:ragged-)?all-to-all|collective-\w+)(?:-start)?"
    line = re.compile(rf"^\s*(?:ROOT )?\S+ = (.*?) {operation}\(", re.MULTILINE)

    def listed(compiled):
        found = line.findall(compiled.as_text())
        return [
            (
                name,
                tuple(
                    math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"\w\[([\d,]*)\]", out)
                ),
            )
            for out, name in found
        ]

    return listed
