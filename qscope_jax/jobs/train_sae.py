"""`qscope train-sae`: TopK SAEs for any layers of a backbone, all from one forward pass per batch.

Every --checkpoint-every steps all that decides the rest of the run is saved: stopped in whatever way, the same command
goes on and ends as if it had never stopped, to the bit where the machine computes the same bits again.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.batches import Filled
from qscope_jax.data.corpora import open_sources
from qscope_jax.data.feed import DocumentSource, Feed, open_feed
from qscope_jax.data.tokenizer import load_tokenizer
from qscope_jax.data.vectors import VectorFeed, open_vectors
from qscope_jax.evaluate import DEFINITIONS, evaluate_saes, evaluate_vectors
from qscope_jax.explorer.figures import draw_quality
from qscope_jax.files.atomic import write_json, write_text
from qscope_jax.files.differences import differences
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.places import join_processes, meet, model_name
from qscope_jax.jobs.run import Run, devices, hash_files, plain, say
from qscope_jax.jobs.train_config import Config, check_options, checkpoint_folder, mesh_for, plan_for, shares_out
from qscope_jax.mesh import finish_together
from qscope_jax.sae.card import Card, render_card
from qscope_jax.sae.formats import load_saes
from qscope_jax.sae.model import Sae, SaeConfig
from qscope_jax.training.activations import Stored, own_part, place_rows
from qscope_jax.training.agreement import everywhere, from_all
from qscope_jax.training.checkpoint_folder import open_folder
from qscope_jax.training.checkpoints import Checkpoints
from qscope_jax.training.export import export_group
from qscope_jax.training.loop import Carried, Plan, Rows, Trainer
from qscope_jax.training.metrics import TrainLog
from qscope_jax.training.state import Group

__all__ = ["Config", "run"]

_MEASURED = 65_536  # tokens at the beginning of the data that means, scales and sinks are measured on


class Opened(NamedTuple):
    """What a run reads, opened; `settings` are all that decide what comes out, besides the data."""

    model: Source
    constants: ModelConfig
    sources: list[DocumentSource]
    plan: Plan
    steps: int
    mesh: Mesh | None
    settings: dict[str, Any]


class Begun(NamedTuple):
    """What a run goes on from: the state behind `step`, and the reports that metrics.jsonl does not tell of yet."""

    carried: Carried
    step: int
    pending: list[Any]


class Trained(NamedTuple):
    source: Backbone | Stored
    carried: Carried


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named; or a folder that holds another run.
      FloatingPointError: too many steps in a row were not finite; the last good state is saved.
      Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    process, processes = join_processes(config.coordinator, config.processes, config.process)
    manifest = "manifest.json" if process == 0 else f"manifest-{process}-of-{processes}.json"
    check_options(config)
    kept = checkpoint_folder(config)
    with Run("train-sae", config, config.out, manifest=manifest, resumes=("metrics.jsonl",)) as job:
        if shares_out(config):
            open_folder(job.out).check_shared()
        opened = _open(config)
        with Checkpoints(kept, keep=config.keep, warn=say) as checkpoints:
            source, carried = _train(config, job, opened, checkpoints)
        folders = _export(config, job, opened, carried)
        del carried  # it needs several times the room of the SAEs
        _finish(config, opened, source, folders)
        meet()


def _open(config: Config) -> Opened:
    """Opens everything and refuses what does not fit, before any weights are read."""
    model = resolve(config.model, what="model")
    constants = read_config(model.fetch("config.json"))
    mesh = mesh_for(config)
    if mesh is not None:
        parameter_shapes(constants, mesh=mesh, fsdp=config.fsdp)
    plan, steps = plan_for(config, constants, mesh)
    sources, weights = list[DocumentSource](), list[str]()
    if not config.activations:
        tokenizer = None if config.data == ("synthetic",) or config.token_field else load_tokenizer(model)
        sources = open_sources(
            config.data, vocab_size=constants.vocab_size, tokenizer=tokenizer, weights=config.weights or None, say=say,
            text_field=config.text_field, token_field=config.token_field, whole_files=config.document == "file",
        )  # fmt: skip
        weights = [name for name in model.names() if name.endswith(".safetensors") and "/" not in name]
    settings = {
        "plan": plain(plan),
        "precision": config.precision,
        "model": hash_files(map(model.fetch, ("config.json", *weights))),
    }
    return Opened(model, constants, sources, plan, steps, mesh, json.loads(json.dumps(settings, default=_dtype_name)))


def _dtype_name(dtype: Any) -> str:
    return jnp.dtype(dtype).name


def _feed(config: Config, opened: Opened, own: range, *, held_out: bool = False) -> Feed | VectorFeed:
    """The rows of some virtual shards; held-out documents are too few to be shared out."""
    plan = opened.plan
    options: Any = {
        "row_length": plan.row_length, "rows": plan.rows, "shards": 1 if held_out else plan.shards, "own": own,
        "seed": config.seed, "held_out": config.held_out, "split": "held-out" if held_out else "train",
    }  # fmt: skip
    if config.activations:
        return open_vectors(config.activations, d=opened.constants.hidden_size, **options)
    vocabulary = {"vocab_size": opened.constants.vocab_size, "end_token": config.end_token}
    return open_feed(opened.sources, weights=config.weights or None, **vocabulary, **options)


def _held_out(config: Config, opened: Opened, tokens: int) -> Iterator[Rows]:
    """Batches of held-out data, `tokens` of them at most and no document twice but in the last batch."""
    feed = _feed(config, opened, range(1), held_out=True)
    for _ in range(-(-tokens // opened.plan.batch_tokens)):
        yield next(feed)
        if feed.counts["documents"] >= sum(feed.documents):
            break
    feed.close()


def _train(config: Config, job: Run, opened: Opened, checkpoints: Checkpoints) -> Trained:
    """Trains from the newest checkpoint, or from the beginning, to the last step."""
    own = own_part(opened.mesh, opened.plan.shards)
    feed = _feed(config, opened, own)
    facts = {"settings": opened.settings, "feed": feed.fingerprint}
    before = checkpoints.facts()
    if before is not None and (changed := differences({key: before[key] for key in facts}, facts)):
        raise ValueError(
            f"{checkpoint_folder(config)} is of a run with other settings: {'; '.join(changed[:8])}. Give it those "
            "again, or choose another --out"
        )
    if isinstance(feed, VectorFeed):
        source = Stored(feed.d, feed.dtype)
    else:
        dtype = "float32" if config.precision == "parity" else "bfloat16"
        source = load_backbone(opened.model, dtype=dtype, mesh=opened.mesh, fsdp=config.fsdp)
    trainer = Trainer(source, opened.plan, opened.mesh)
    carried, begun, pending = _begin(config, opened, trainer, checkpoints, feed, own)
    judged = list(_held_out(config, opened, 1)) if config.held_out else []
    job.total = opened.steps * opened.plan.batch_tokens
    job.progress(tokens=0, already=begun * opened.plan.batch_tokens)
    log = TrainLog(job.out, opened.plan, config.log, first=begun, pending=pending, profile=config.profile)

    def save(step: int) -> None:
        if step != checkpoints.newest:
            checkpoints.save(step, carried, facts | {"states": from_all(feed.state()), "pending": log.pending()})

    for step in range(begun + 1, opened.steps + 1):
        carried, reports = trainer.step(carried, next(feed))
        log.add(reports)
        last = step == opened.steps
        told = last or step % config.log_every == 0
        if told:
            looks = judged and (last or step % config.judge_every == 0)
            failing, job.note = log.write(step, trainer.judge(carried, judged[0]) if looks else None)
            _check(failing, config.max_failing, lambda step=step: save(step))
        job.progress(tokens=opened.plan.batch_tokens)
        if last or step % config.checkpoint_every == 0:
            save(step)
            job.publish()
        # Over processes the question is a collective that all must ask at the same step, and waits for the devices.
        if (jax.process_count() == 1 or told) and not last and not everywhere(not job.stopping):
            save(step)
            checkpoints.wait()
            raise job.interrupted(f"step {step:,} of {opened.steps:,} is saved")
    checkpoints.wait()
    log.close()
    feed.close()
    job.record(device=devices(), counts={"steps": opened.steps, "tokens": job.total, **feed.counts}, **facts)
    return Trained(source, carried)


def _begin(config: Config, opened: Opened, trainer: Trainer, checkpoints: Checkpoints, feed: Any, own: range) -> Begun:
    """The state to go on from, and the number of steps behind it."""
    if checkpoints.facts() is not None:
        shapes = trainer.abstract()
        found = checkpoints.restore(shapes)
        assert found is not None
        feed.restore(found.facts["states"])
        say(f"train-sae: goes on from step {found.step:,} of {opened.steps:,}")
        return Begun(found.arrays, found.step, found.facts["pending"])
    first, plan = _feed(config, opened, own), opened.plan
    say(
        f"train-sae: {', '.join(group.name for group in plan.groups)} for layers {', '.join(map(str, plan.layers))}; "
        f"{opened.steps:,} steps of {plan.batch_tokens:,} tokens, the first ones to measure norms"
        + (f" and to fill a buffer of {plan.buffer} steps" if plan.buffer else "")
    )
    count = min(-(-_MEASURED // plan.batch_tokens), opened.steps)
    seen = [next(first) for _ in range(count)]
    first.close()
    carried = trainer.fit(trainer.init(trainer.measure(seen)), seen[0])
    for number in range(plan.buffer):
        carried = trainer.fill(carried, next(feed), number)
    return Begun(carried, 0, [])


def _check(failing: dict[str, int], limit: int, save: Callable[[], None]) -> None:
    """Gives up where an SAE has failed too often in a row; its weights are those of its last good step."""
    if wrong := [name for name, count in failing.items() if count >= limit]:
        save()
        raise FloatingPointError(
            f"{', '.join(wrong)}: the last {limit} steps or more gave no finite loss or gradient, and none was taken. "
            "The state is saved; look at the data and the model, or try a smaller --lr or --precision parity"
        )


def _export(config: Config, job: Run, opened: Opened, carried: Carried) -> list[Path]:
    """Writes the SAEs; returns the folder of every group."""
    groups, name = opened.plan.groups, model_name(opened.model)
    # Processes that share no folder each write the files that they evaluate; hidden ones are not copied to --out.
    first, shared = jax.process_index() == 0, shares_out(config)
    base = job.out / ("sae" if first or shared else ".sae")
    folders = [base / group.name if len(groups) > 1 else base for group in groups]
    for group, saes, folder in zip(groups, carried.train.groups, folders, strict=True):
        export_group(
            group, saes, folder, backbone=name, format=config.format, dtype=config.dtype, write=first or not shared
        )
    finish_together("the SAEs are written")
    return folders


def _finish(config: Config, opened: Opened, source: Backbone | Stored, folders: list[Path]) -> None:
    """Evaluates the files on held-out data, and says in a card what they are."""
    for group, folder in zip(opened.plan.groups, folders, strict=True):
        saes = load_saes(folder, group.layers, mesh=opened.mesh)
        quality: dict[int, dict[str, Any]] = {layer: {} for layer in group.layers}
        if config.held_out and config.eval_tokens:
            say(f"train-sae: evaluating {group.name} on held-out data")
            quality = _evaluate(config, opened, source, saes)
        if jax.process_index() == 0:
            _describe(config, opened, group, folder, quality, saes[group.layers[0]].config)


def _evaluate(config: Config, opened: Opened, source: Backbone | Stored, saes: dict[int, Sae]) -> dict[int, Any]:
    """Quality on held-out data per layer; without a model nothing is predicted."""
    own, batches = own_part(opened.mesh, opened.plan.rows), _held_out(config, opened, config.eval_tokens)
    if isinstance(source, Stored):
        ((layer, sae),) = saes.items()
        return {layer: evaluate_vectors(sae, (place_rows(rows, opened.mesh, whole=True) for rows in batches))}
    rows = (Filled(*(array[own.start : own.stop] for array in batch)) for batch in batches)
    return evaluate_saes(source, saes, rows, predict_tokens=config.eval_tokens // 4)


def _describe(config: Config, opened: Opened, group: Group, folder: Path, quality, about: SaeConfig) -> None:
    """quality.json, quality.png and the model card of one folder."""
    name, data = model_name(opened.model), config.activations or config.data
    on = f"documents held out from training, {config.held_out:.3g} of {', '.join(data)}"
    if any(quality.values()):
        write_json(folder / "quality.json", {"measured_on": on, "definitions": DEFINITIONS, "layers": plain(quality)})
        draw_quality(folder / "quality.png", quality, title=f"{group.name} on {name}", note=f"measured on {on}")
    objective, schedule = group.objective, group.schedule
    recipe = {
        "tokens": opened.steps * opened.plan.batch_tokens,
        "tokens of a step": opened.plan.batch_tokens,
        "tokens of a row": opened.plan.row_length,
        "steps' worth of tokens in the mixing buffer": opened.plan.buffer,
        "selection": "TopK" if objective.selection == "token" else "BatchTopK, exported as TopK",
        "Matryoshka prefixes": ", ".join(map(str, objective.prefixes)) or "none",
        "optimiser": f"Adam, rate {schedule.peak:.3g}, rising over {schedule.warmup} steps, falling to 0 over the last "
        f"{schedule.decay:.0%}, gradients clipped to {group.clip:g}",
        "auxiliary loss": f"AuxK, {objective.aux_k} of the latents silent for {objective.dead_after:,} tokens, weight "
        f"{objective.aux_weight:.4g}",
        "precision": config.precision,
        "seed": config.seed,
    }
    thresholds = {
        layer: metrics["sink_threshold"] for layer, metrics in quality.items() if metrics.get("sink_threshold")
    }
    card = Card(
        f"SAE-Res-{name.rsplit('/', 1)[-1]}-{group.name}", about, quality, on, recipe, data,
        thresholds, config.license, config.format,
    )  # fmt: skip
    write_text(folder / "README.md", render_card(card))
