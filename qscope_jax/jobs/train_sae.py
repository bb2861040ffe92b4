"""`qscope train-sae`: TopK SAEs for any layers of a backbone, all from one forward pass per batch.

Every --checkpoint-every steps all that decides the rest of the run is saved: stopped in whatever way, the same command
goes on and ends as if it had never stopped, to the bit where the machine computes the same bits again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.feed import Feed
from qscope_jax.data.vectors import VectorFeed
from qscope_jax.files.differences import differences
from qscope_jax.jobs.places import join_processes, meet
from qscope_jax.jobs.run import Run, devices, say, versions
from qscope_jax.jobs.train_config import Config, check_options, checkpoint_folder, shares_out
from qscope_jax.jobs.train_inputs import HeldOut, Inputs, open_inputs, open_rows
from qscope_jax.jobs.train_results import describe, export
from qscope_jax.training.activations import Stored, own_part
from qscope_jax.training.agreement import everywhere, from_all
from qscope_jax.training.checkpoint_folder import open_folder
from qscope_jax.training.checkpoints import Checkpoints
from qscope_jax.training.loop import Carried, Rows, Trainer
from qscope_jax.training.metrics import TrainLog

__all__ = ["Config", "run"]

_MEASURED = 65_536  # tokens at the beginning of the data that means, scales and sinks are measured on


class Begun(NamedTuple):
    """What a run goes on from: the state behind `step`, and the reports that metrics.jsonl does not tell of yet."""

    carried: Carried
    step: int
    pending: list[Any]


class Trained(NamedTuple):
    source: Backbone | Stored
    carried: Carried


class Parts(NamedTuple):
    """What steps are made with; `facts` go into every checkpoint, `judged` holds a held-out batch, if there is any."""

    trainer: Trainer
    feed: Feed | VectorFeed
    log: TrainLog
    checkpoints: Checkpoints
    facts: dict[str, Any]
    judged: list[Rows]


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named; or a folder that holds another run.
      FloatingPointError: too many steps were not finite; the last good state is saved.
      Interrupted: SIGTERM or SIGINT came; everything is saved.
    """
    process, processes = join_processes(config.coordinator, config.processes, config.process)
    manifest = "manifest.json" if process == 0 else f"manifest-{process}-of-{processes}.json"
    check_options(config)
    kept = checkpoint_folder(config)
    with Run("train-sae", config, config.out, manifest=manifest, resumes=("metrics.jsonl",)) as job:
        if shares_out(config):
            open_folder(job.out).check_shared()
        inputs = open_inputs(config)
        with Checkpoints(kept, keep=config.keep, warn=say) as checkpoints:
            source, carried = _train(config, job, inputs, checkpoints)
        exported = export(config, job, inputs, carried.train)
        del carried  # it needs several times the room of the SAEs
        describe(config, inputs, source, exported)
        meet()


def _train(config: Config, job: Run, inputs: Inputs, checkpoints: Checkpoints) -> Trained:
    """Trains from the newest checkpoint, or from the beginning, to the last step."""
    own, plan = own_part(inputs.mesh, inputs.plan.shards), inputs.plan
    feed = open_rows(config, inputs, own)
    decisive = {"settings": inputs.settings, "feed": feed.fingerprint}
    facts = {**decisive, "versions": {name: versions()[name] for name in ("jax", "qscope-jax")}}
    _compare(config, checkpoints.facts(), decisive, facts)
    if isinstance(feed, VectorFeed):
        source = Stored(feed.d, feed.dtype)
    else:
        dtype = "float32" if config.precision == "parity" else "bfloat16"
        source = load_backbone(inputs.model, dtype=dtype, mesh=inputs.mesh, fsdp=config.fsdp)
    trainer = Trainer(source, plan, inputs.mesh)
    judged = list(HeldOut(config, inputs, 1)) if config.held_out else []
    if config.held_out and not judged:
        raise ValueError(f"--held-out {config.held_out}: no token is held out; hold out a larger share, or 0")
    begun = _begin(config, inputs, trainer, checkpoints, feed, own)
    job.total = inputs.steps * plan.batch_tokens
    job.progress(tokens=0, already=begun.step * plan.batch_tokens)
    with TrainLog(job.out, plan, config.log, first=begun.step, pending=begun.pending, profile=config.profile) as log:
        parts = Parts(trainer, feed, log, checkpoints, facts, judged)
        carried = _make_steps(config, job, parts, begun.carried, range(begun.step + 1, inputs.steps + 1))
    checkpoints.wait()
    feed.close()
    counts = {"steps": inputs.steps, "tokens": job.total, **_counts(feed, own)}
    job.record(device=devices(), counts=counts, **decisive)
    return Trained(source, carried)


def _make_steps(config: Config, job: Run, parts: Parts, carried: Carried, steps: range) -> Carried:
    """Trains, tells, looks at held-out text and saves, each in its time."""
    trainer, feed, log, checkpoints, facts, judged = parts

    def save(step: int) -> None:
        if step != checkpoints.newest:
            checkpoints.save(step, carried, facts | {"states": from_all(feed.state()), "pending": log.pending()})

    for step in steps:
        carried, reports = trainer.step(carried, next(feed))
        log.add(reports)
        last = step == steps[-1]
        told = last or step % config.log_every == 0
        if told:
            looks = judged and (last or step % config.judge_every == 0)
            failing, job.note = log.write(step, trainer.judge(carried, judged[0]) if looks else None)
            _check(failing, config.max_failing, lambda step=step: save(step))
        job.progress(tokens=trainer.plan.batch_tokens)
        if last or step % config.checkpoint_every == 0:
            save(step)
            job.publish()
        # Over processes the question is a collective that all must ask at the same step, and waits for the devices.
        if (jax.process_count() == 1 or told) and not last and not everywhere(not job.stopping):
            save(step)
            checkpoints.wait()
            raise job.interrupted(f"step {step:,} of {steps[-1]:,} is saved")
    return carried


def _compare(config: Config, before: dict[str, Any] | None, decisive: dict[str, Any], facts: dict[str, Any]) -> None:
    """Refuses to go on with other settings or data than before; of other versions it only tells."""
    if before is None:
        return
    if changed := differences({key: before[key] for key in decisive}, decisive):
        raise ValueError(
            f"{checkpoint_folder(config)} is of a run with other settings: {'; '.join(changed[:8])}. Give it those "
            "again, or choose another --out"
        )
    if changed := differences(before["versions"], facts["versions"]):
        say(
            f"train-sae: goes on in other versions than those of the last checkpoint ({'; '.join(changed)}); what "
            "comes out may differ a little from a run in one version"
        )


def _counts(feed: Feed | VectorFeed, own: Sequence[int]) -> dict[str, int]:
    """What all processes have read; some read the same shards, and count once."""
    counts = {tuple(shards): found for shards, found in from_all([[list(own), feed.counts]])}
    return {name: sum(found[name] for found in counts.values()) for name in feed.counts}


def _begin(
    config: Config, inputs: Inputs, trainer: Trainer, checkpoints: Checkpoints, feed: Any, own: Sequence[int]
) -> Begun:
    """The state to go on from, and the number of steps behind it."""
    if (found := checkpoints.restore(trainer.abstract())) is not None:
        feed.restore(found.facts["states"])
        say(f"train-sae: goes on from step {found.step:,} of {inputs.steps:,}")
        return Begun(found.arrays, found.step, found.facts["pending"])
    first, plan = open_rows(config, inputs, own), inputs.plan
    say(
        f"train-sae: {', '.join(group.name for group in plan.groups)} for layers {', '.join(map(str, plan.layers))}; "
        f"{inputs.steps:,} steps of {plan.batch_tokens:,} tokens, the first ones to measure norms"
        + (f" and to fill a buffer of {plan.buffer} steps" if plan.buffer else "")
    )
    count = min(-(-_MEASURED // plan.batch_tokens), inputs.steps)
    seen = [next(first) for _ in range(count)]
    first.close()
    carried = trainer.fit(trainer.init(trainer.measure(seen)), seen[0])
    for number in range(plan.buffer):
        carried = jax.block_until_ready(trainer.fill(carried, next(feed), number))  # one batch under way at a time
    return Begun(carried, 0, [])


def _check(failing: dict[str, int], limit: int, save: Callable[[], None]) -> None:
    """Gives up where an SAE has been failing for too long; its weights are those of its last good step."""
    if wrong := [name for name, count in failing.items() if count >= limit]:
        save()
        raise FloatingPointError(
            f"{', '.join(wrong)}: {limit} steps or more, in a row or with few good ones between them, gave no finite "
            "loss or gradient and were skipped. The state is saved; look at the data and the model, or try a smaller "
            "--lr or --precision parity"
        )
