"""What `qscope train-sae` leaves in the end: the SAEs as files, their figures on held-out data, and a model card."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from qscope_jax.backbone.weights import Backbone
from qscope_jax.data.batches import Filled
from qscope_jax.evaluate import DEFINITIONS, evaluate_saes, evaluate_vectors
from qscope_jax.explorer.figures import draw_quality
from qscope_jax.files.atomic import write_json, write_text
from qscope_jax.jobs.places import model_name
from qscope_jax.jobs.run import Run, plain, say
from qscope_jax.jobs.train_config import Config, evaluates, shares_out
from qscope_jax.jobs.train_inputs import HeldOut, Inputs
from qscope_jax.mesh import finish_together, to_host
from qscope_jax.sae.card import Card, render_card
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae, SaeConfig
from qscope_jax.training.activations import Stored, own_part, place_rows
from qscope_jax.training.export import export_group
from qscope_jax.training.state import Group, TrainState

_DEFINITIONS = {
    **DEFINITIONS,
    "dead_in_training": "latents that fired on none of the last tokens of the training, more than dead_after of them",
    "documents": "held-out documents (rows, of vectors on disk) that the figures are of, each once",
    "real_tokens": "tokens of those documents; they may be fewer than were asked for",
}


class Exported(NamedTuple):
    """A folder of SAEs: what their configs share, and per layer the share of latents that were dead in the end."""

    group: Group
    folder: Path
    config: SaeConfig
    dead: dict[int, float]


def export(config: Config, job: Run, inputs: Inputs, train: TrainState) -> list[Exported]:
    """Writes the SAEs of every group; returns once all processes have."""
    groups, name = inputs.plan.groups, model_name(inputs.model)
    # Processes that share no folder each write the files that they evaluate; hidden ones are not copied to --out.
    first, shared = jax.process_index() == 0, shares_out(config)
    base = job.out / ("sae" if first or shared else ".sae")
    exported = []
    for group, saes in zip(groups, train.groups, strict=True):
        folder = base / group.name if len(groups) > 1 else base
        configs = export_group(
            group, saes, folder, backbone=name, format=config.format, dtype=config.dtype, write=first or not shared
        )
        dead = np.mean(to_host(saes.idle) > group.objective.dead_after, axis=1).tolist()
        exported.append(Exported(group, folder, configs[0], dict(zip(group.layers, dead, strict=True))))
    finish_together("the SAEs are written")
    return exported


def describe(config: Config, inputs: Inputs, source: Backbone | Stored, exported: list[Exported]) -> None:
    """Evaluates the files on held-out data, and says in a card what they are."""
    for one in exported:
        quality: dict[int, dict[str, Any]] = {layer: {} for layer in one.group.layers}
        held_out = HeldOut(config, inputs, config.eval_tokens)
        if evaluates(config):
            say(f"train-sae: evaluating {one.group.name} on held-out data")
            saes = load_saes(one.folder, one.group.layers, mesh=inputs.mesh)
            quality = _evaluate(inputs, source, saes, held_out)
            del saes  # before the next group's come
            if held_out.tokens < held_out.wanted:
                say(
                    f"train-sae: {held_out.tokens:,} tokens are held out, fewer than --eval-tokens "
                    f"{held_out.wanted:,}: the figures are of those; a larger --held-out makes them surer"
                )
        if jax.process_index() == 0:
            _write(config, inputs, one, quality, held_out)


def _evaluate(
    inputs: Inputs, source: Backbone | Stored, saes: dict[int, Sae], held_out: HeldOut
) -> dict[int, dict[str, Any]]:
    """Quality on held-out data per layer; without a model nothing is predicted."""
    if isinstance(source, Stored):
        ((layer, sae),) = saes.items()
        return {layer: evaluate_vectors(sae, (place_rows(rows, inputs.mesh, whole=True) for rows in held_out))}
    own = list(own_part(inputs.mesh, inputs.plan.rows))
    rows = (Filled(*(array[own] for array in batch)) for batch in held_out)
    return evaluate_saes(source, saes, rows, predict_tokens=held_out.wanted // 4)


def _write(
    config: Config, inputs: Inputs, one: Exported, quality: dict[int, dict[str, Any]], held_out: HeldOut
) -> None:
    """quality.json, quality.png and the model card of one folder."""
    name, data = model_name(inputs.model), config.activations or config.data
    what = "rows of vectors" if config.activations else "documents"
    on = (
        f"{held_out.documents:,} {what} of {held_out.tokens:,} tokens, held out from training ({config.held_out:.3g} "
        f"of {', '.join(data)})"
    )
    measured = any(quality.values())
    quality = {layer: {**metrics, "dead_in_training": one.dead[layer]} for layer, metrics in quality.items()}
    if measured:
        facts = {"measured_on": on, "documents": held_out.documents, "real_tokens": held_out.tokens}
        write_json(one.folder / "quality.json", {**facts, "definitions": _DEFINITIONS, "layers": plain(quality)})
        draw_quality(one.folder / "quality.png", quality, title=f"{one.group.name} on {name}", note=f"measured on {on}")
    thresholds = {
        layer: metrics["sink_threshold"] for layer, metrics in quality.items() if metrics.get("sink_threshold")
    }
    title = f"SAE-Res-{name.rsplit('/', 1)[-1]}-{one.group.name}"
    card = Card(
        title, one.config, quality, on, _recipe(config, inputs, one.group), data, thresholds, config.license,
        config.format, one.group.objective.dead_after,
    )  # fmt: skip
    write_text(one.folder / "README.md", render_card(card))


def _recipe(config: Config, inputs: Inputs, group: Group) -> dict[str, Any]:
    objective, schedule = group.objective, group.schedule
    return {
        "tokens": inputs.steps * inputs.plan.batch_tokens,
        "tokens of a step": inputs.plan.batch_tokens,
        "tokens of a row": inputs.plan.row_length,
        "steps' worth of tokens in the mixing buffer": inputs.plan.buffer,
        "selection": "TopK" if objective.selection == "token" else "BatchTopK, exported as TopK",
        "Matryoshka prefixes": ", ".join(map(str, objective.prefixes)) or "none",
        "optimiser": f"Adam, rate {schedule.peak:.3g}, rising over {schedule.warmup} steps, falling to 0 over the last "
        f"{schedule.decay:.0%}, gradients clipped to {group.clip:g}",
        "auxiliary loss": f"AuxK, {objective.aux_k} of the latents silent for {objective.dead_after:,} tokens, weight "
        f"{objective.aux_weight:.4g}",
        "precision": config.precision,
        "seed": config.seed,
    }
