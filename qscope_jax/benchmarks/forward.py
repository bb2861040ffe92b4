"""Forward of a Qwen3-1.7B-shaped model (4 layers, batch 2 x 256, float32, no logits) against transformers'."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qscope_jax.backbone.forward import forward, init_params
from qscope_jax.benchmarks.paired import paired
from qscope_jax.benchmarks.shapes import qwen3_1p7b


def bench_forward(*, rounds: int) -> dict[str, Any]:
    """Ratio of the time of `transformers` (inference_mode, as many threads) to ours; above 1 where ours is faster.

    The weights are equal in both, and so must the results be: relative L2 of the last hidden state is in the table.

    Raises:
      ValueError: torch is not installed.
    """
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "the benchmark `forward` compares with transformers on torch, which is not installed: install the extra "
            "`parity`, or leave it out with --what extract load"
        ) from None
    from transformers import Qwen3Config, Qwen3Model

    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    config = qwen3_1p7b(4, "highest")
    params = init_params(jax.random.key(0), config)
    hf = {key: value for key, value in config.to_hf().items() if key not in ("architectures", "model_type")}
    model = Qwen3Model(Qwen3Config(**hf)).float().eval()
    _copy_weights(params, model)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 256))
    ours = jax.jit(lambda p, t: forward(p, config, t, logits="none").hidden)
    ours_tokens, their_tokens = jnp.asarray(tokens), torch.from_numpy(tokens)

    def theirs():
        with torch.inference_mode():
            return model(input_ids=their_tokens, use_cache=False).last_hidden_state.numpy()

    want = theirs()
    difference = float(np.linalg.norm(np.asarray(ours(params, ours_tokens)) - want) / np.linalg.norm(want))
    result = paired(lambda: ours(params, ours_tokens), theirs, rounds=rounds)
    return {"what": "time of transformers / ours", "threads": threads, "relative_l2": difference, **result}


def _copy_weights(params: Any, model: Any) -> None:
    import torch  # pyright: ignore[reportMissingImports]

    from qscope_jax.backbone.tables import checkpoint_tensors, to_stored

    state = {}
    for tensor in checkpoint_tensors(qwen3_1p7b(len(model.layers), "highest")):
        held = [np.asarray(piece.leaf_of(params)[piece.place]) for piece in tensor.pieces]
        state[tensor.name.removeprefix("model.")] = torch.from_numpy(np.array(to_stored(tensor, held)))
    model.load_state_dict(state)
