"""Train a TopK SAE on the output of every layer of the embedded model, and store the set as a release does.

    python scripts/assets/train_saes.py --cache DIR --model FOLDER --out FOLDER

Trained on x' = (x - mean) / rms with unit-norm decoder rows and an auxiliary loss for dead latents (Gao et al. 2024,
§2.4, A.2); the mean and the scale are folded into the biases afterwards: a = relu(topk(x W_enc + b_enc)).
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from packing import load_documents, pack
from tokenizers import Tokenizer

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.sae.formats import save_sae
from qscope_jax.sae.model import Sae, SaeConfig, SaeParams, init_sae
from qscope_jax.sae.quality import sink_threshold

NAME = "qscope-demo"
WIDTH, K, BATCH, ROW, RATE = 1536, 32, 2048, 256, 1.2e-2
SAMPLE, TOKENS = 1_000_000, 4_000_000  # residual vectors kept in memory; tokens trained on, per layer
AUX_K, AUX_WEIGHT, DEAD_AFTER = 96, 1 / 32, 100_000


class State(NamedTuple):
    params: SaeParams
    opt: Any
    idle: jax.Array  # [f] tokens since each latent fired


def residuals(backbone: Backbone, tokens: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """The output of every layer [layers, n * t, d], bfloat16, for rows of packed tokens [n, t]."""
    config = backbone.config
    layers = tuple(range(config.num_layers))
    run = jax.jit(lambda p, t, s: forward(p, config, t, segment_ids=s, capture=layers, logits="none").captured)
    parts = [run(backbone.params, tokens[i : i + 16], segments[i : i + 16]) for i in range(0, len(tokens), 16)]
    return np.concatenate([np.asarray(p).reshape(len(layers), -1, config.hidden_size) for p in parts], axis=1)


def largest(x: jax.Array, k: int) -> jax.Array:
    """True at the k largest positive entries of every row of x [n, f], with those equal to the k-th to 2^-15.

    Positive floats order as their bits do: the k-th is found bit by bit. On a CPU `lax.top_k` takes ten times as long.
    """
    bits = jax.lax.bitcast_convert_type(jax.nn.relu(jax.lax.stop_gradient(x)).astype(jnp.float32), jnp.int32)

    def refine(step: int, kth: jax.Array) -> jax.Array:
        higher = kth | (1 << (30 - step))
        return jnp.where(jnp.sum(bits >= higher, axis=1, keepdims=True) >= k, higher, kth)

    kth = jax.lax.fori_loop(0, 23, refine, jnp.zeros((len(x), 1), jnp.int32))
    return (bits >= kth) & (bits > 0)


def loss_fn(params: SaeParams, x: jax.Array, dead: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Normalised squared error plus AuxK; returns (loss, which latents fired)."""
    pre = x @ params.w_enc + params.b_enc
    acts = jnp.where(largest(pre, K), pre, 0)
    error = x - (acts @ params.w_dec + params.b_dec)
    loss = jnp.sum(error**2) / jnp.sum(x**2)

    def auxiliary() -> jax.Array:
        dead_acts = jnp.where(largest(jnp.where(dead, pre, 0), AUX_K), pre, 0)
        target = jax.lax.stop_gradient(error)
        return jnp.sum((target - dead_acts @ params.w_dec) ** 2) / jnp.maximum(jnp.sum(target**2), 1e-9)

    aux = jax.lax.cond(jnp.any(dead), auxiliary, lambda: jnp.zeros(()))
    return loss + AUX_WEIGHT * aux, jnp.any(acts > 0, axis=0)


def make_step(tx: optax.GradientTransformation) -> Callable[..., tuple[State, jax.Array]]:
    @partial(jax.jit, donate_argnums=0)
    def step(state: State, x: jax.Array, mean: jax.Array, rms: jax.Array) -> tuple[State, jax.Array]:
        x = (x.astype(jnp.float32) - mean) / rms
        dead = state.idle > DEAD_AFTER
        (loss, fired), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, x, dead)
        updates, opt = tx.update(grads, state.opt, state.params)
        params = optax.apply_updates(state.params, updates)
        w_dec = params.w_dec / jnp.linalg.norm(params.w_dec, axis=1, keepdims=True)
        idle = jnp.where(fired, 0, state.idle + len(x))
        return State(params._replace(w_dec=w_dec), opt, idle), loss

    return step


def fold(params: SaeParams, mean: np.ndarray, rms: float) -> SaeParams:
    """Weights for raw x: pre-activations and biases scale with rms, the mean moves into both biases."""
    w_enc, b_enc, w_dec, b_dec = (np.asarray(leaf, np.float64) for leaf in params)
    return SaeParams(w_enc, rms * b_enc - mean @ w_enc, w_dec, rms * b_dec + mean)


def train_layer(x: np.ndarray, layer: int, arguments: argparse.Namespace) -> Sae:
    """The SAE of one layer, in bfloat16, from its residuals x [n, d]; sinks are left out."""
    norms = np.linalg.norm(x.astype(np.float32), axis=-1)
    threshold = sink_threshold(norms[:65_536])
    if (norms > threshold).any():
        x = x[norms <= threshold]
    print(f"layer {layer}: {len(x):,} tokens, {len(norms) - len(x)} above {threshold:.0f} left out", flush=True)
    config = SaeConfig(x.shape[1], WIDTH, K, layer, backbone=NAME, sink_threshold=round(threshold, 3))
    params = optimise(x, config, arguments.tokens // BATCH, arguments.seed + layer)
    return Sae(jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), params), config)


def optimise(x: np.ndarray, config: SaeConfig, steps: int, seed: int) -> SaeParams:
    """Trains on x [n, d]; returns folded weights, float64."""
    sample = x[:: max(1, len(x) // 100_000)].astype(np.float32)
    mean = sample.mean(axis=0, dtype=np.float64)
    rms = float(np.sqrt(np.mean(np.square(sample - mean), dtype=np.float64)))
    tail = steps * 3 // 10
    parts = [optax.linear_schedule(0, RATE, 50), optax.constant_schedule(RATE), optax.linear_schedule(RATE, 0, tail)]
    schedule = optax.join_schedules(parts, [50, steps - tail])
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    step = make_step(tx)
    params = init_sae(jax.random.key(seed), config).params
    params = jax.tree.map(jnp.array, params)  # w_enc and w_dec must not share a buffer that is donated
    state = State(params, tx.init(params), jnp.zeros(config.d_sae, jnp.int32))
    rng, order, start = np.random.default_rng(seed), np.empty(0, int), time.time()
    for index in range(steps):
        if len(order) < BATCH:
            order = rng.permutation(len(x))
        chosen, order = order[:BATCH], order[BATCH:]
        state, loss = step(state, x[chosen], mean.astype(np.float32), np.float32(rms))
        if (index + 1) % 200 == 0:
            dead = int(jnp.sum(state.idle > DEAD_AFTER))
            rate = (index + 1) * BATCH / (time.time() - start)
            print(
                f"  layer {config.layer} step {index + 1}/{steps} loss {float(loss):.4f} dead {dead} {rate:,.0f} tok/s",
                flush=True,
            )
    return fold(state.params, mean, rms)


def train(arguments: argparse.Namespace) -> None:
    backbone = load_backbone(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    rows = pack(load_documents(arguments.cache / "corpus.jsonl", tokenizer, "train"), ROW, seed=[arguments.seed, 77])
    count = arguments.sample // ROW
    acts = residuals(backbone, rows.tokens[:count, :-1], rows.segments[:count, :-1])
    with ThreadPoolExecutor(2) as pool:  # two layers at a time keep two cores busier than one does
        jobs = [pool.submit(train_layer, x, layer, arguments) for layer, x in enumerate(acts)]
        for job in jobs:
            save_sae(job.result(), arguments.out, format="qwen-scope")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=SAMPLE)
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--seed", type=int, default=0)
    train(parser.parse_args())
