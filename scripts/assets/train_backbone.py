"""Train the embedded base model: next-token loss on packed documents, Muon or AdamW.

    python scripts/assets/train_backbone.py --cache DIR --out FOLDER --tokens 16000000

Float32 weights, bfloat16 arithmetic; the saved weights are bfloat16. State goes to DIR/train.npz, from which a rerun
continues. Rows grow longer during the run (attention over short ones is cheap), up to the model's limit.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, muon
from packing import Documents, Rows, batches, load_documents, pack
from sources import LANGS
from tokenizer import SPECIAL, VOCAB
from tokenizers import Tokenizer

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import forward, init_params

HF_CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": None,
    "eos_token_id": VOCAB - len(SPECIAL),
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 512,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10000,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCAB,
}
BATCH_TOKENS = 4096
STAGES = ((0.65, 128), (0.95, 256), (1.0, 512))  # up to this share of the steps, rows of this length
EVAL_ROW = 256
LOSS_CHUNK = 32  # positions whose logits stand at once
DECAY_SHARE = 0.3  # of the steps, at the end; before it the rate is constant, so that a run can be made longer
# Axes of the stacked matrices [layers, ...] that Muon makes orthogonal: (inputs, outputs).
MATRICES = {
    "q": (1, (2, 3)),
    "k": (1, (2, 3)),
    "v": (1, (2, 3)),
    "o": ((1, 2), 3),
    "gate": (1, 2),
    "up": (1, 2),
    "down": (1, 2),
}


class State(NamedTuple):
    params: Any
    opt: Any
    step: jax.Array


def token_losses(params: Any, config: ModelConfig, rows: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Loss in nats of every target [b, t] and whether it counts (its segment is that of its input)."""
    out = forward(params, config, rows[:, :-1], segment_ids=segments[:, :-1], logits="none")

    @jax.checkpoint
    def chunk_loss(args: tuple[jax.Array, jax.Array]) -> jax.Array:
        hidden, target = args
        logits = jnp.einsum("btd,vd->btv", hidden, params["embed"], preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target)

    chunks = lambda a: jnp.moveaxis(a.reshape(len(a), -1, LOSS_CHUNK, *a.shape[2:]), 1, 0)  # noqa: E731
    losses = jax.lax.map(chunk_loss, (chunks(out.hidden), chunks(rows[:, 1:])))
    losses = jnp.moveaxis(losses, 0, 1).reshape(len(rows), -1)
    return losses, segments[:, 1:] == segments[:, :-1]


def mean_loss(params: Any, config: ModelConfig, rows: jax.Array, segments: jax.Array) -> jax.Array:
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    losses, counted = token_losses(params, config, rows, segments)
    return jnp.sum(losses * counted) / jnp.maximum(jnp.sum(counted), 1)


def make_optimizer(name: str, rate: float, steps: int) -> optax.GradientTransformation:
    decay = int(steps * DECAY_SHARE)
    schedule = optax.join_schedules(
        [optax.linear_schedule(0.0, rate, 100), optax.linear_schedule(rate, 0.0, decay)], [steps - decay]
    )  # the first one stays at its end value
    decay_mask = lambda tree: jax.tree.map(lambda a: a.ndim > 2, tree)  # noqa: E731
    if name == "adamw":
        rule = optax.adamw(schedule, b1=0.9, b2=0.95, weight_decay=0.1, mask=decay_mask)
    else:
        rule = muon(
            schedule, weight_decay=0.1, weight_decay_mask=decay_mask, adam_b1=0.9, adam_b2=0.95,
            consistent_rms=0.2, muon_weight_dimension_numbers=_matrix_axes,
        )  # fmt: skip
    return optax.chain(optax.clip_by_global_norm(1.0), rule)


def _matrix_axes(tree: Any) -> Any:
    def axes(path: tuple, _: jax.Array) -> MuonDimensionNumbers | None:
        numbers = MATRICES.get(getattr(path[-1], "key", None))
        return MuonDimensionNumbers(*numbers) if numbers else None

    return jax.tree_util.tree_map_with_path(axes, tree)


def make_step(config: ModelConfig, tx: optax.GradientTransformation) -> Callable[..., tuple[State, jax.Array]]:
    @partial(jax.jit, donate_argnums=0)
    def step(state: State, rows: jax.Array, segments: jax.Array) -> tuple[State, jax.Array]:
        loss, grads = jax.value_and_grad(mean_loss)(state.params, config, rows, segments)
        updates, opt = tx.update(grads, state.opt, state.params)
        return State(optax.apply_updates(state.params, updates), opt, state.step + 1), loss

    return step


def make_evaluate(config: ModelConfig) -> Callable[[Any, Rows], dict[str, float]]:
    """Returns the function (params, rows) -> nats per token of each language."""
    losses_of = jax.jit(lambda params, rows, segments: token_losses(params, config, rows, segments))

    split = placements()[1]

    def evaluate(params: Any, rows: Rows, size: int = 16) -> dict[str, float]:
        params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
        total, count = np.zeros(len(LANGS)), np.zeros(len(LANGS))
        for start in range(0, len(rows.tokens) - size + 1, size):
            part = slice(start, start + size)
            losses, counted = losses_of(params, *jax.device_put((rows.tokens[part], rows.segments[part]), split))
            langs = rows.langs[part, 1:]
            total += np.bincount(langs.ravel(), np.asarray(losses * counted, np.float64).ravel(), len(LANGS))
            count += np.bincount(langs.ravel(), np.asarray(counted, np.float64).ravel(), len(LANGS))
        return {lang: float(t / max(c, 1)) for lang, t, c in zip(LANGS, total, count, strict=True)}

    return evaluate


def placements() -> tuple[NamedSharding, NamedSharding]:
    """Weights on every device, rows split over them; on a CPU each core is a device (see `build`)."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))


def save_state(state: State, path: Path) -> None:
    flat, _ = ravel_pytree(state)
    partial_path = path.with_suffix(".part.npz")
    np.savez(partial_path, step=int(state.step), flat=np.asarray(flat))
    partial_path.replace(path)


def restore_state(state: State, path: Path) -> State:
    if not path.exists():
        return state
    _, unravel = ravel_pytree(state)
    restored = unravel(jnp.asarray(np.load(path)["flat"]))
    print(f"continuing at step {int(restored.step)}", flush=True)
    return restored


def save_model(params: Any, config: ModelConfig, folder: Path) -> None:
    from qscope_jax.backbone.weights import Backbone, save_backbone

    for old in folder.glob("model*.safetensors"):
        old.unlink()
    save_backbone(Backbone(config, jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)), folder)
    end = HF_CONFIG["eos_token_id"]
    generation = {"do_sample": True, "temperature": 0.7, "eos_token_id": end, "pad_token_id": end}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def train(arguments: argparse.Namespace) -> None:
    config = ModelConfig.from_hf(HF_CONFIG, precision="default")
    tokenizer = Tokenizer.from_file(str(arguments.out / "tokenizer.json"))
    documents = load_documents(arguments.cache / "corpus.jsonl", tokenizer, "train")
    held_out = pack(load_documents(arguments.cache / "corpus.jsonl", tokenizer, "heldout"), EVAL_ROW, seed=0)
    held_out = Rows(*(array[:160] for array in held_out))
    steps = arguments.tokens // BATCH_TOKENS
    print(f"{sum(map(len, documents.tokens)):,} train tokens; {steps} steps", flush=True)
    tx = make_optimizer(arguments.optimizer, arguments.rate, steps)
    params = init_params(jax.random.key(arguments.seed), config)
    state = State(params, tx.init(params), jnp.zeros((), jnp.int32))
    state = jax.device_put(restore_state(state, arguments.state), placements()[0])
    loop(state, make_step(config, tx), make_evaluate(config), documents, held_out, steps, arguments, config)


def loop(
    state: State, step: Callable, evaluate: Callable, documents: Documents, held_out: Rows, steps: int,
    arguments: argparse.Namespace, config: ModelConfig,
) -> None:  # fmt: skip
    """Runs the steps left, logging, evaluating and saving on the way."""
    done, split = int(state.step), placements()[1]
    data = [batches(documents, row, BATCH_TOKENS // row, [arguments.seed, row]) for _, row in STAGES]
    stage = lambda index: next(i for i, (share, _) in enumerate(STAGES) if index < share * steps)  # noqa: E731
    for index in range(done):
        next(data[stage(index)])
    start, seen, losses = time.time(), 0, []
    for index in range(done, steps):
        rows, segments = next(data[stage(index)])
        state, loss = step(state, *jax.device_put((rows, segments), split))
        losses.append(loss)
        seen += BATCH_TOKENS
        if (index + 1) % 25 == 0:
            mean = float(np.mean(jax.device_get(losses)))
            rate = seen / (time.time() - start)
            left = (steps - index - 1) * BATCH_TOKENS / rate / 60
            print(f"step {index + 1}/{steps} loss {mean:.3f} {rate:,.0f} tok/s {left:.0f} min left", flush=True)
            losses = []
        if (index + 1) % arguments.every == 0 or index + 1 == steps:
            scores = evaluate(state.params, held_out)
            print("held-out nats/token", json.dumps({k: round(v, 3) for k, v in scores.items()}),
                  f"mean {np.mean(list(scores.values())):.3f}", flush=True)  # fmt: skip
            save_state(state, arguments.state)
            if arguments.save:
                save_model(state.params, config, arguments.out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder with tokenizer.json; the model goes there")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--every", type=int, default=200, help="steps between evaluations and saves")
    parser.add_argument("--state", type=Path, help="default: train.npz in the cache")
    parser.add_argument("--save", action=argparse.BooleanOptionalAction, default=True)
    parsed = parser.parse_args()
    parsed.state = parsed.state or parsed.cache / "train.npz"
    train(parsed)
