"""The forward pass of each family (4 layers of released width, 16 experts, 2 x 256 tokens, float32, no logits) against
transformers', and of a long prefill with linear layers against the same with full attention in their place.

torch's threads wait passively (OMP_WAIT_POLICY, where the caller has not set it): by default they spin between torch's
turns, which takes the cores from whatever else runs.
"""

import os
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.tables import Dialect, checkpoint_tensors, to_stored
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_1p7b, qwen3_5_2b, qwen3_5_35b_a3b, qwen3_30b_a3b, random_params


def bench_forward(*, rounds: int) -> dict[str, Any]:
    """`compare_with_transformers` for the four families.

    Raises:
      ValueError: torch is not installed.
    """
    torch = torch_for("forward")
    configs = {
        "qwen3 1.7b": qwen3_1p7b(4),
        "qwen3_moe 30b-a3b": qwen3_30b_a3b(4, 16),
        "qwen3_5 2b": qwen3_5_2b(4),
        "qwen3_5_moe 35b-a3b": qwen3_5_35b_a3b(4, 16),
    }
    compared = {name: compare_with_transformers(config, (2, 256), rounds=rounds) for name, config in configs.items()}
    return {"what": "time of transformers / ours", "threads": torch.get_num_threads(), **compared}


def torch_for(benchmark: str) -> Any:
    """torch, on as many threads as there are cores.

    Raises:
      ValueError: it is not installed.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            f"the benchmark `{benchmark}` compares with transformers on torch, which is not installed: install the "
            "extra `parity`, or leave it out with --what prefill moe compile extract load"
        ) from None
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return torch


def compare_with_transformers(config: ModelConfig, shape: tuple[int, int], *, rounds: int) -> dict[str, float]:
    """Ratio of the time of `transformers` (inference_mode, as many threads) to ours; above 1 where ours is faster.

    The weights are equal in both, and so must the results be: relative L2 of the last hidden state is in the table.
    """
    import torch  # pyright: ignore[reportMissingImports]

    params = random_params(config)
    model = _model_of(params, config)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    ours = partial(_hidden, params, config, jnp.asarray(tokens))
    their_tokens = torch.from_numpy(tokens)

    def theirs():
        with torch.inference_mode():
            return model(input_ids=their_tokens, use_cache=False).last_hidden_state.numpy()

    want = theirs()
    difference = float(np.linalg.norm(np.asarray(ours()) - want) / np.linalg.norm(want))
    return {"relative_l2": difference, **paired(ours, theirs, rounds=rounds)}


def bench_prefill(*, rounds: int) -> dict[str, Any]:
    """Ratio of tokens/s on 1 x 4096 tokens, float32: four layers of Qwen3.5-2B's width in its pattern (three linear,
    one full) over the same width, MLPs and tokens with full attention in all four."""
    hybrid = qwen3_5_2b(4)
    dense = replace(hybrid, layer_types=("full",) * 4)
    tokens = jax.random.randint(jax.random.key(1), (1, 4096), 0, hybrid.vocab_size)
    a, b = (partial(_hidden, random_params(config), config, tokens) for config in (hybrid, dense))
    result = paired(a, b, rounds=max(5, rounds // 4))
    return {"what": "tokens/s of the hybrid / of full attention", **result}


@jax.jit
def _hidden(params: Any, config: ModelConfig, tokens: jax.Array) -> Any:
    return forward(params, config, tokens, logits="none").hidden


def _model_of(params: Any, config: ModelConfig) -> Any:
    """The model of `transformers` with these weights; its modules keep a layer's experts fused."""
    from transformers import AutoConfig, AutoModel

    written = config.to_hf()
    model = AutoModel.from_config(AutoConfig.for_model(written.pop("model_type"), **written)).float().eval()
    give_weights(model, params, config)
    return model


def give_weights(model: Any, params: Any, config: ModelConfig) -> None:
    """Copies weights into the text model of `transformers` (without its head)."""
    import torch  # pyright: ignore[reportMissingImports]

    state = model.state_dict()
    for tensor in checkpoint_tensors(config, Dialect("", fused=True)):
        held = [np.asarray(piece.leaf_of(params)[piece.place]) for piece in tensor.pieces]
        state.pop(tensor.name).copy_(torch.from_numpy(np.array(to_stored(tensor, held))))
    if state:
        raise AssertionError(f"the model of transformers has more tensors than ours: {', '.join(state)}")
