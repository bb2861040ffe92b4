"""Writing text with a model of Qwen3-1.7B's width (4 layers, float32, greedy) against `transformers.generate`.

One call reads 32 tokens per row and writes 32: the default cache of transformers, inference_mode, as many threads, both
warm.
"""

from typing import Any

import numpy as np

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.benchmarks.forward import give_weights, torch_for
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_1p7b, random_params
from qscope_jax.generation import generate, make_steps

_PROMPT = _NEW = 32
_BATCHES = (1, 8)


def bench_generate(*, rounds: int) -> dict[str, Any]:
    """`compare_generation` for each batch size; a call takes seconds, so that there are a quarter of the rounds.

    Raises:
      ValueError: torch is not installed.
    """
    threads = torch_for("generate").get_num_threads()
    config = qwen3_1p7b(4)
    compared = compare_generation(config, _BATCHES, rounds=max(5, rounds // 4))
    return {"what": "tokens/s of ours / of transformers", "threads": threads, **compared}


def compare_generation(config: ModelConfig, batches: tuple[int, ...], *, rounds: int) -> dict[str, dict[str, float]]:
    """Ratio of tokens per second per batch size, above 1 where ours is faster; the weights and the texts are equal.

    Raises:
      AssertionError: the two wrote something else, or ours was compiled again while it was timed.
    """
    import torch  # pyright: ignore[reportMissingImports]
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    params, found = random_params(config), {}
    written = config.to_hf()
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(written.pop("model_type"), **written))
    model = model.float().eval()
    give_weights(model.model, params, config)
    model.generation_config = GenerationConfig(max_new_tokens=_NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    for batch in batches:
        tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, _PROMPT))
        their_tokens = torch.from_numpy(tokens)

        def ours(tokens=tokens):
            return generate(params, config, tokens, max_new_tokens=_NEW, eos=()).tokens

        def theirs(their_tokens=their_tokens):
            with torch.inference_mode():
                out = model.generate(their_tokens, attention_mask=torch.ones_like(their_tokens))
            return out[:, _PROMPT:].numpy()

        np.testing.assert_array_equal(ours(), theirs())
        before = make_steps(config).compilations
        result = paired(ours, theirs, rounds=rounds)
        if make_steps(config).compilations != before:
            raise AssertionError("our programs were compiled again while they were timed")
        per_second = batch * _NEW / result["a_seconds"]
        found[f"batch {batch}"] = {"tokens_per_second": per_second, **result}
    return found
