"""Logits to the next token: pure, per row, the same for a row alone and in any batch.

    scores = penalise(logits) / temperature;  keep top k, then the smallest set with mass p;  argmax(scores + Gumbel)

Argmax with Gumbel noise samples from softmax(scores). The noise of a row depends on its seed and the number of the
token alone. Order and meaning of the rules are those of `transformers`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Rows = float | Sequence[float] | np.ndarray  # one value for all rows, or one per row


class Sampling(NamedTuple):
    """How each row chooses, [b] each; made by `check_sampling`. Data under `jit`: no other value recompiles."""

    temperature: Float[Array, "b"]
    top_p: Float[Array, "b"]
    top_k: Int[Array, "b"]
    penalty: Float[Array, "b"]
    seeds: Int[Array, "b"]


def check_sampling(
    batch: int,
    *,
    temperature: Rows = 0.0,
    top_p: Rows = 1.0,
    top_k: int | Sequence[int] | np.ndarray = 0,
    repetition_penalty: Rows = 1.0,
    seeds: Sequence[int] | np.ndarray | None = None,
) -> Sampling:
    """The settings of `batch` rows; see `generate` for what they mean.

    Raises:
      ValueError: a setting that is out of range, no number, or of another shape than [] or [b]; no seeds to sample by.
    """
    temperature = _rows("temperature", temperature, batch, lambda a: a >= 0, "at least 0 (0 is greedy)")
    if seeds is None:
        if temperature.any():
            raise ValueError(f"temperature above 0 samples: give seeds, one integer for each of the {batch} row(s)")
        seeds = [0] * batch
    found = np.asarray(seeds)
    if found.shape != (batch,) or not np.issubdtype(found.dtype, np.integer):
        raise ValueError(f"seeds are {found.dtype} of shape {found.shape}; expected one integer per row, ({batch},)")
    if not ((found >= 0) & (found < 1 << 32)).all():
        raise ValueError(f"seeds = {found.tolist()}; expected integers in 0..2**32 - 1")
    settings = (
        temperature,
        _rows("top_p", top_p, batch, lambda a: (a > 0) & (a <= 1), "above 0 and at most 1 (1 keeps all)"),
        _rows("top_k", top_k, batch, lambda a: (a >= 0) & (a == a // 1), "a whole number, 0 keeps all").astype(
            np.int32
        ),
        _rows("repetition_penalty", repetition_penalty, batch, lambda a: a > 0, "above 0 (1 is none)"),
        found.astype(np.uint32),
    )
    return Sampling(*cast(Any, settings))  # NumPy's, which every process of a mesh may give to `jit`


def next_token(
    logits: Float[Array, "b v"], seen: Bool[Array, "b v"], number: Int[Array, ""], sampling: Sampling
) -> Int[Array, "b"]:
    """The token each row takes next; work that no row asks for is skipped.

    Args:
      logits: of the model, float32.
      seen: which ids stand in the row's prompt or were generated; the penalty is theirs.
      number: how many tokens were chosen before; with the seed it decides the noise.
      sampling: per row.
    """
    penalised = jnp.any(sampling.penalty != 1)
    scores = jax.lax.cond(penalised, lambda: penalise(logits, seen, sampling.penalty), lambda: logits)
    greedy = _largest(scores)

    def sample():
        warm = sampling.temperature > 0
        scaled = scores / jnp.where(warm, sampling.temperature, 1)[:, None]
        cuts = jnp.any((sampling.top_k > 0) | (sampling.top_p < 1))
        kept = jax.lax.cond(cuts, lambda: keep_likely(scaled, sampling.top_k, sampling.top_p), lambda: scaled)
        return jnp.where(warm, _largest(kept + _noise(sampling.seeds, number, logits.shape[1])), greedy)

    return jax.lax.cond(jnp.any(sampling.temperature > 0), sample, lambda: greedy).astype(jnp.int32)


def penalise(logits: Float[Array, "b v"], seen: Bool[Array, "b v"], penalty: Float[Array, "b"]) -> Float[Array, "b v"]:
    """Divides positive logits of seen ids by the penalty and multiplies negative ones (Keskar et al. 2019, CTRL)."""
    by = penalty[:, None]
    return jnp.where(seen, jnp.where(logits < 0, logits * by, logits / by), logits)


def keep_likely(scores: Float[Array, "b v"], top_k: Int[Array, "b"], top_p: Float[Array, "b"]) -> Float[Array, "b v"]:
    """Scores with -inf for all but the k largest, and of these but the smallest set of mass p (Holtzman et al. 2020).

    k = 0 and p = 1 keep all; ids that tie with the last one kept stay too.
    """
    keys = _sortable(scores)
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, scores.shape[1]), scores.shape[1])
    kept = jnp.where(keys >= _threshold(keys, jnp.ones_like(scores), wanted), scores, -jnp.inf)
    # Rounding may leave the sum of all a little below or above 1: p = 1 must not depend on it.
    mass = jnp.where(top_p < 1, top_p, jnp.inf)
    return jnp.where(keys >= _threshold(keys, jax.nn.softmax(kept, axis=-1), mass), kept, -jnp.inf)


def top_of(log_probs: Float[Array, "b v"], number: int) -> tuple[Int[Array, "b n"], Float[Array, "b n"]]:
    """Ids and log-probs of the `number` likeliest tokens, descending."""
    values, ids = jax.lax.top_k(log_probs, number)
    return ids.astype(jnp.int32), values


def _largest(scores):
    """Argmax in two passes: XLA's own takes seven times as long on a CPU. Rows of NaN give the last id."""
    last = scores.shape[1] - 1
    found = jnp.where(scores == jnp.max(scores, axis=-1, keepdims=True), jnp.arange(last + 1), last)
    return jnp.min(found, axis=-1)


def _rows(name: str, value: Any, batch: int, good: Any, expected: str, kind: Any = np.float32) -> np.ndarray:
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} = {value!r}; expected a number, or one per row") from None
    if found.shape not in ((), (batch,)):
        raise ValueError(f"{name} has shape {found.shape}; expected one number, or one for each of the {batch} row(s)")
    if not (np.isfinite(found) & good(found)).all():
        raise ValueError(f"{name} = {value}; expected {expected}")
    return np.broadcast_to(found, (batch,)).astype(kind)


def _noise(seeds, number, vocab: int):
    """Standard Gumbel noise [b, v]; a row's own depends on nothing but its seed and the number of the token."""

    def draw(seed):
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), number), (vocab,))

    return jax.vmap(draw)(seeds)


def _sortable(x):
    """Unsigned integers in the order of the floats."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _threshold(keys, weights, need):
    """[b, 1] the largest key so that the weights of all keys not below it sum to `need`; 0 where all do not.

    Found bit by bit in 32 sums: no sort of the vocabulary.
    """

    def step(i, found):
        trial = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        total = jnp.sum(jnp.where(keys >= trial, weights, 0), axis=-1, keepdims=True)
        return jnp.where(total >= need[:, None], trial, found)

    return jax.lax.fori_loop(0, 32, step, jnp.zeros((keys.shape[0], 1), jnp.uint32))
