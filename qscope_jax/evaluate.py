"""How good SAEs are for a model: what they explain of its residual stream, and what it still predicts through them.

    CE recovered = (CE_zero - CE_spliced) / (CE_zero - CE_clean)

`spliced`: the layer's output is replaced by the SAE's reconstruction, `zero`: by zeros. Pads and sinks keep their own
residual in both. The clean forward runs once per batch for all layers; the two replaced ones of a layer begin behind
it, in one compiled program whatever the layer.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params
from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Filled
from qscope_jax.extract import check_sae
from qscope_jax.mesh import RULES
from qscope_jax.sae.cofiring import CoFiring, init_cofiring, most_frequent, summarize_cofiring, update_cofiring
from qscope_jax.sae.geometry import decoder_statistics
from qscope_jax.sae.model import Sae, SaeConfig
from qscope_jax.sae.quality import Quality, density, init_quality, measure, summarize
from qscope_jax.splice import Clean, run_clean, run_spliced, splice
from qscope_jax.totals import Total, add_totals, as_total, total_value

COFIRING_LATENTS = 256

State = TypeVar("State")

# What the numbers of `summarize_evaluation` mean, to be stored beside them.
DEFINITIONS = {
    "fvu": "sum |x - x_hat|^2 / sum |x - mean(x)|^2 over the tokens that count; explained_variance = 1 - fvu",
    "tokens": "those that count: real tokens but sinks; l0, cosine, dead_fraction and density are over them too",
    "sink_fraction": "of the real tokens, those whose norm is above sink_threshold; never encoded",
    "pad_fraction": "of all positions, those that hold no token",
    "dead_fraction": "latents that fired on none of the tokens",
    "density": "latents by log10 of the share of tokens they fire on (edges of the bins; never = on none)",
    "cofiring": f"among the {COFIRING_LATENTS} latents most frequent on the first batch: jaccard n_ij / (n_i + n_j - "
    "n_ij), given_first n_ij / n_i; the ten largest",
    "decoder": "norms of decoder rows; max_cosine of a row to any other, for compared_rows of the d_sae rows (with a "
    "seed: a sample)",
    "ce_clean": "cross-entropy of the model itself, nats per token, over the predicted_tokens: positions whose next "
    "token is real and of the same document",
    "ce_spliced": "the same with the layer's output replaced by the reconstruction; pads and sinks keep their own",
    "ce_zero": "the same with zeros in place of the reconstruction (ln of the vocabulary where no token is a sink)",
    "ce_recovered": "(ce_zero - ce_spliced) / (ce_zero - ce_clean)",
    "kl": "KL(clean || spliced), nats per token, over the same positions; kl_zero likewise",
}


class Predicted(NamedTuple):
    """Sums over the scored positions: cross-entropy, and KL from the clean model."""

    cross_entropy: Total
    kl: Total


class LayerState(NamedTuple):
    """What was seen of one layer's SAE."""

    quality: Quality
    cofiring: CoFiring
    spliced: Predicted
    zeroed: Predicted


class Evaluation(NamedTuple):
    """What was seen so far: a pytree of arrays, so it can be put aside and gone on with.

    `clean` is the sum of the model's own cross-entropy, `scored` the number of positions in it and in every
    `Predicted`; `positions` counts all, padding too.
    """

    layers: dict[int, LayerState]
    clean: Total
    scored: Total
    positions: Total


class EvalStep:
    """The jitted parts, made by `make_eval_step`; `traces` lists what was compiled, as (part, batch shape).

    A call folds one batch in: (params, saes, sink_thresholds, state, batch, predict=True) -> state. Without `predict`
    the replaced forwards and all logits are left out, and with them all that is said of cross-entropy.
    """

    def __init__(self, config: ModelConfig, layers: tuple[int, ...]):
        self.config, self.layers, self.traces = config, layers, list[tuple[str, tuple[int, ...]]]()
        self._clean, self._swap = jax.jit(self._run_clean), jax.jit(self._run_swap)
        self._fold = jax.jit(self._run_fold, static_argnames="shape")

    @property
    def compilations(self) -> int:
        """How many programs were compiled: three per batch shape, and one more per further shape of SAE."""
        return len(self.traces)

    def start(
        self, params: Params, saes: Mapping[int, Sae], sink_thresholds: Mapping[int, float], batch: Filled
    ) -> Evaluation:
        """Nothing seen yet; co-firing will be counted among the latents that fire most on this batch."""
        device = _place(batch, params)
        none = as_total(jnp.zeros(()))
        totals = replicate((none, none, none), params)
        captured = self._clean(params, device, totals, False)[0].captured
        states = {}
        for i, layer in enumerate(self.layers):
            sae = saes[layer]
            quality = init_quality(sae.config)
            first = replicate((quality, init_cofiring(jnp.arange(min(COFIRING_LATENTS, sae.config.d_sae)))), params)
            (seen, _), _, _ = self._folded(first, sae, captured, i, device[1], sink_thresholds[layer])
            cofiring = init_cofiring(most_frequent(seen, COFIRING_LATENTS))
            states[layer] = LayerState(quality, cofiring, Predicted(none, none), Predicted(none, none))
        return replicate(Evaluation(states, *totals), params)

    def __call__(
        self,
        params: Params,
        saes: Mapping[int, Sae],
        sink_thresholds: Mapping[int, float],
        state: Evaluation,
        batch: Filled,
        *,
        predict: bool = True,
    ) -> Evaluation:
        jax.block_until_ready(state)  # one batch at a time: those waiting would each hold all layers' residuals
        device = _place(batch, params)
        clean, totals = self._clean(params, device, state[1:], predict)
        layers = {}
        for i, layer in enumerate(self.layers):
            quality, cofiring, spliced, zeroed = state.layers[layer]
            (quality, cofiring), x_hat, keep = self._folded(
                (quality, cofiring), saes[layer], clean.captured, i, device[1], sink_thresholds[layer]
            )
            if predict:
                swap = partial(self._swap, params, device, clean, i, layer, keep, x_hat)
                spliced, zeroed = swap(True, spliced), swap(False, zeroed)
            layers[layer] = LayerState(quality, cofiring, spliced, zeroed)
        return Evaluation(layers, *totals)

    def _folded(self, state, sae: Sae, captured, i: int, mask, threshold: float):
        shape = SaeConfig(sae.config.d_model, sae.config.d_sae, sae.config.k)  # what else it knows would recompile
        return self._fold(state, sae.params, captured, i, mask, threshold, shape=shape)

    def _run_clean(self, params, batch, totals, predict):
        self.traces.append(("clean", batch[0].shape))  # Python runs only while jit traces: once per compilation
        clean = run_clean(params, self.config, batch, self.layers, predict)
        sums = (clean.sums[name] for name in ("cross_entropy", "tokens"))
        return clean, tuple(map(add_totals, totals, map(as_total, (*sums, jnp.float32(batch[0].size)))))

    def _run_fold(self, state, params, captured, i, mask, threshold, *, shape: SaeConfig):
        self.traces.append((f"fold {shape.d_sae} {shape.k}", mask.shape))
        quality, cofiring = state
        quality, measured = measure(quality, Sae(params, shape), captured[i], mask, sink_threshold=threshold)
        x_hat = measured.x_hat.reshape(captured.shape[1:])
        return (quality, update_cofiring(cofiring, measured, shape.d_sae)), x_hat, measured.keep.reshape(mask.shape)

    def _run_swap(self, params, batch, clean: Clean, i, layer, keep, x_hat, through, seen: Predicted):
        self.traces.append(("swap", batch[0].shape))
        h = splice(clean.captured[i], jnp.where(through, x_hat, 0), keep)
        sums = run_spliced(params, self.config, batch, h, layer, clean.hidden)
        return Predicted(*(add_totals(total, as_total(sums[name])) for name, total in seen._asdict().items()))


def make_eval_step(config: ModelConfig, saes: Mapping[int, SaeConfig]) -> EvalStep:
    """The step for SAEs of these layers of a model; see `EvalStep`.

    Raises:
      ValueError: no SAEs, one of another width than the model's, or of a layer that it does not have.
    """
    if not saes:
        raise ValueError("there is no SAE to evaluate")
    for layer, sae in saes.items():
        check_sae(config, layer, sae)
    return EvalStep(config, tuple(saes))


def evaluate_saes(
    backbone: Backbone,
    saes: Mapping[int, Sae],
    batches: Iterable[Filled],
    *,
    sink_thresholds: Mapping[int, float] | None = None,
    predict_tokens: int | None = None,
    step: EvalStep | None = None,
) -> dict[int, dict[str, Any]]:
    """Every metric of `summarize_evaluation` for the SAEs of some layers of a model, over all batches.

    Args:
      backbone: the model, on one device or a mesh.
      saes: per layer, on the model's mesh.
      batches: packed or padded, read once; on a mesh "data" divides their rows, and each process gives its own.
      sink_thresholds: the norm above which a token of a layer is a sink; by default what the SAE's config says.
      predict_tokens: cross-entropy and KL are measured on the first batches, until they have so many predicted tokens
        (all by default, 0 leaves them out); that takes two runs of the layers behind each.
      step: a step to use again, made for the same model and layers.

    Raises:
      ValueError: no batch, no token that counts, SAEs of another width, or a sink threshold that is not known.
      FloatingPointError: the residual stream is not finite.
    """
    step = step or make_eval_step(backbone.config, {layer: sae.config for layer, sae in saes.items()})
    known = known_thresholds(saes) | dict(sink_thresholds or {})
    if missing := [layer for layer in step.layers if layer not in known]:
        raise ValueError(f"no sink threshold is known for layers {missing}: measure it and give sink_thresholds")
    state, limit = None, np.inf if predict_tokens is None else predict_tokens
    for batch in batches:
        if state is None:
            state = step.start(backbone.params, saes, known, batch)
        state = step(backbone.params, saes, known, state, batch, predict=scored_tokens(state) < limit)
    if state is None:
        raise ValueError("there is no text to evaluate on: no batch was given")
    return summarize_evaluation(state, saes, known)


def scored_tokens(state: Evaluation) -> float:
    """The positions that cross-entropy and KL are sums over so far; waits for the device."""
    return float(total_value(state.scored))


def replicate(state: State, params: Params) -> State:
    """The state on every device of the model's mesh, as a step returns it, so that the first step is as the others."""
    place = params["embed"].sharding
    if not isinstance(place, NamedSharding):
        return jax.tree.map(jnp.asarray, state)
    return jax.device_put(state, NamedSharding(place.mesh, PartitionSpec()))


def evaluate_vectors(sae: Sae, batches: Iterable[Sequence[jax.Array]]) -> dict[str, Any]:
    """The metrics of `summarize_evaluation` that need no model, on residual vectors: (x [..., d], mask [...]) each.

    Raises:
      ValueError: no token counted.
    """
    threshold, quality, real, positions = sae.config.sink_threshold, init_quality(sae.config), 0.0, 0
    fold = jax.jit(lambda quality, sae, x, mask: measure(quality, sae, x, mask, sink_threshold=threshold)[0])
    for x, mask in batches:
        quality, real, positions = fold(quality, sae, x, mask), real + float(jnp.sum(mask)), positions + mask.size
    return {
        **{name: _defined(value) for name, value in summarize(quality).items()},
        "pad_fraction": 1 - real / positions if positions else None,
        "sink_threshold": threshold,
        **dict.fromkeys(("ce_clean", "ce_spliced", "ce_zero", "ce_recovered", "kl", "kl_zero")),
        "density": density(quality),
        "decoder": decoder_statistics(sae),
    }


def known_thresholds(saes: Mapping[int, Sae]) -> dict[int, float]:
    """The sink thresholds that SAEs bring along, per layer."""
    return {n: sae.config.sink_threshold for n, sae in saes.items() if sae.config.sink_threshold is not None}


def summarize_evaluation(
    state: Evaluation, saes: Mapping[int, Sae], sink_thresholds: Mapping[int, float]
) -> dict[int, dict[str, Any]]:
    """Per layer, as what JSON holds (None where a number is not defined): what `summarize` gives, and

    `pad_fraction` of all positions; `sink_threshold`; `density` (see there); `cofiring` (`summarize_cofiring`);
    `decoder` (`decoder_statistics`); of the `predicted_tokens`, all None if there are none: `ce_clean`, `ce_spliced`,
    `ce_zero` (nats per token), `ce_recovered`, `kl` and `kl_zero` (nats per token, from the clean model).

    Raises:
      ValueError: no token counted.
      FloatingPointError: the residual stream is not finite at some layers.
    """
    sums = [total_value(s.quality.spread).sum() for s in state.layers.values()]
    if wrong := [n for n, total in zip(state.layers, sums, strict=True) if not np.isfinite(total)]:
        raise FloatingPointError(
            f"the residual stream is not finite at layers {wrong}; the weights are damaged or overflow in this "
            "precision: try --precision parity"
        )
    return {layer: _layer_metrics(state, layer, saes[layer], sink_thresholds[layer]) for layer in state.layers}


def _layer_metrics(state: Evaluation, layer: int, sae: Sae, threshold: float) -> dict[str, Any]:
    seen = state.layers[layer]
    metrics = summarize(seen.quality)
    real = metrics["tokens"] + float(total_value(seen.quality.sinks))
    return {
        **{name: _defined(value) for name, value in metrics.items()},
        "pad_fraction": float(1 - real / total_value(state.positions)),
        "sink_threshold": threshold if np.isfinite(threshold) else None,
        **_predicted(state, seen),
        "density": density(seen.quality),
        "cofiring": summarize_cofiring(seen.cofiring),
        "decoder": decoder_statistics(sae),
    }


def _predicted(state: Evaluation, seen: LayerState) -> dict[str, float | None]:
    tokens = scored_tokens(state)
    mean = lambda total: float(total_value(total)) / tokens if tokens else float("nan")  # noqa: E731
    clean, spliced, zero = mean(state.clean), mean(seen.spliced.cross_entropy), mean(seen.zeroed.cross_entropy)
    recovered = (zero - spliced) / (zero - clean) if zero != clean else float("nan")
    values = {
        "ce_clean": clean,
        "ce_spliced": spliced,
        "ce_zero": zero,
        "ce_recovered": recovered,
        "kl": mean(seen.spliced.kl),
        "kl_zero": mean(seen.zeroed.kl),
    }
    return {"predicted_tokens": tokens, **{name: _defined(value) for name, value in values.items()}}


def _defined(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _place(batch: Filled, params: Params) -> Sequence[jax.Array]:
    """Tokens, mask and segment ids on the model's devices, rows over "data"; a process gives the rows of its own."""
    place = params["embed"].sharding
    if not isinstance(place, NamedSharding):
        return [jnp.asarray(array) for array in batch]
    rows = NamedSharding(place.mesh, PartitionSpec(RULES["batch"]))
    return [jax.make_array_from_process_local_data(rows, array) for array in batch]
