"""What a training run tells while it runs: metrics.jsonl, TensorBoard and wandb when asked, a trace for XProf."""

import contextlib
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from qscope_jax.files.atomic import write_text
from qscope_jax.mesh import to_host
from qscope_jax.sae.loss import Report
from qscope_jax.training.loop import Plan
from qscope_jax.training.step import StepReport

Writer = Literal["tensorboard", "wandb"]
Write = Callable[[int, dict[str, float]], None]

_WARM = 10  # steps of this process before a trace begins


def check_writers(names: Sequence[Writer]) -> None:
    """Refuses writers whose package is not there.

    Raises:
      ValueError: the package of a writer is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise ValueError(f"--log {name} needs one more package: pip install 'qscope-jax[logging]'")


class TrainLog:
    """Reports of steps, averaged from line to line, in `folder`/metrics.jsonl. Every process calls it alike; the first
    one writes. Leaving its `with` block, in whatever way, calls `close`.

    Args:
      folder: where metrics.jsonl, tensorboard/ and profile/ lie.
      plan: what is trained.
      writers: where metrics go besides.
      first: the step that the run goes on from; lines behind it are dropped, as they are made again.
      pending: what `pending` was at that step.
      profile: how many steps to trace.
    """

    def __init__(
        self,
        folder: Path,
        plan: Plan,
        writers: tuple[Writer, ...],
        *,
        first: int,
        pending: Sequence[Sequence[Any]] = (),
        profile: int = 0,
    ):
        self._folder, self._plan, self._path = folder, plan, folder / "metrics.jsonl"
        one = StepReport(Report(*Report._fields), *StepReport._fields[1:])  # type: ignore[arg-type]
        form = jax.tree.structure((one,) * len(plan.groups))
        self._pending: list[tuple[StepReport, ...]] = [
            jax.tree.unflatten(form, [np.array(leaf, np.float64) for leaf in leaves]) for leaves in pending
        ]
        self._writes, self._closes = list[Write](), contextlib.ExitStack()
        self._taken, self._profile, self._tracing = 0, profile, False
        self._mostly = dict[str, int]()  # per SAE, the steps of successive lines of which it skipped more than half
        if jax.process_index() == 0:
            write_text(self._path, "".join(_lines_until(self._path, first)))
            for name in writers:
                write, close = _WRITERS[name](folder, first)
                self._writes.append(write)
                self._closes.callback(close)

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def pending(self) -> list[list[Any]]:
        """The reports since the last line, as JSON holds them, for a checkpoint: the next line tells of them too."""
        leaves = lambda reports: [to_host(leaf) for leaf in jax.tree.leaves(reports)]  # noqa: E731
        return [[[_number(x) for x in leaf] for leaf in leaves(reports)] for reports in self._pending]

    def add(self, reports: tuple[StepReport, ...]) -> None:
        """Takes the reports of a step, and waits for those of the step before: more must not be under way, since each
        holds the residual streams of its batch."""
        if self._pending:
            jax.block_until_ready(self._pending[-1])
        self._pending.append(reports)
        self._taken += 1
        if self._profile and self._taken == _WARM:
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # following Python's calls can crash while other threads save
            jax.profiler.start_trace(str(self._folder / "profile"), profiler_options=options)
            self._tracing = True
        if self._tracing and self._taken == _WARM + self._profile:
            jax.block_until_ready(self._pending)
            self._end_trace()

    def write(self, step: int, judged: tuple[Report, ...] | None = None) -> tuple[dict[str, int], str]:
        """Writes a line; returns for how many steps each SAE has been failing, and a summary for a person.

        An SAE is failing for as many steps as it skipped in a row at most, at any time since the last line; or for all
        steps of the last lines, this one among them, of each of which it skipped more than half (those that a process
        before wrote do not count).

        Args:
          step: how many steps are done.
          judged: reports on held-out text.
        """
        reports = jax.tree.map(lambda *leaves: np.stack([to_host(leaf) for leaf in leaves]), *self._pending)
        self._pending.clear()
        held_out = jax.tree.map(to_host, judged)
        line: dict[str, Any] = {"step": step, "tokens": step * self._plan.batch_tokens}
        failing, told = dict[str, np.ndarray](), list[str]()
        for number, (group, report) in enumerate(zip(self._plan.groups, reports, strict=True)):
            own = {str(layer): _numbers(report, i) for i, layer in enumerate(group.layers)}
            for i, numbers in enumerate(own.values()):
                if held_out is not None:
                    numbers["held_out_fvu"] = _number(held_out[number].fvu[i])
            line[group.name] = own
            failing |= {f"{group.name} layer {n}": report.failing[:, i] for i, n in enumerate(group.layers)}
            told.append(_told(own))
        if jax.process_index() == 0:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            flat = {f"{g.name}/layer{n}/{k}": v for g in self._plan.groups for n, own in line[g.name].items()
                    for k, v in own.items() if v is not None}  # fmt: skip
            for write in self._writes:
                write(step, flat)
        return {name: self._failing(name, counts) for name, counts in failing.items()}, "; ".join(told)

    def close(self) -> None:
        """Ends a trace that is under way, and what else is open."""
        try:
            self._end_trace()
        finally:
            self._closes.close()

    def _failing(self, name: str, counts: np.ndarray) -> int:
        """As `write` says; `counts` are the steps that an SAE had skipped in a row, after each step since a line."""
        mostly = 2 * np.count_nonzero(counts) > len(counts)
        self._mostly[name] = self._mostly.get(name, 0) + len(counts) if mostly else 0
        return max(int(counts.max()), self._mostly[name])

    def _end_trace(self) -> None:
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()


def _lines_until(path: Path, step: int) -> list[str]:
    """The lines of metrics.jsonl up to that of a step; one that a full disk cut short is behind the last checkpoint."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else ():
        if not line.endswith("\n") or json.loads(line)["step"] > step:
            break
        kept.append(line)
    return kept


def _numbers(report: StepReport, i: int) -> dict[str, float | None]:
    """Means over the steps since the last line, of one SAE; `skipped` as it is now."""
    mean = lambda values: _number(values[:, i].mean(dtype=np.float64))  # noqa: E731
    batch = {name: mean(value) for name, value in report.batch._asdict().items()}
    means = {name: mean(getattr(report, name)) for name in ("gradient_norm", "rate", "sinks")}
    return batch | means | {"skipped": int(report.skipped[-1, i])}


def _told(own: dict[str, dict[str, float | None]]) -> str:
    fvu, dead = ([x for one in own.values() if (x := one[name]) is not None] for name in ("fvu", "dead"))
    if not fvu or not dead:
        return "nothing is finite"
    return f"FVU {min(fvu):.3f}{f' to {max(fvu):.3f}' if len(fvu) > 1 else ''}, dead {max(dead):.1%}"


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _tensorboard(folder: Path, first: int) -> tuple[Write, Callable[[], None]]:
    from tensorboardX import SummaryWriter  # type: ignore[import-not-found]

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first + 1)  # those steps are made again

    def write(step: int, numbers: dict[str, float]) -> None:
        for name, number in numbers.items():
            writer.add_scalar(name, number, step)

    return write, writer.close


def _wandb(folder: Path, first: int) -> tuple[Write, Callable[[], None]]:
    import wandb  # type: ignore[import-not-found]

    del first  # a run that goes on is another run there
    run = wandb.init(dir=str(folder), project="qscope-train-sae")
    return lambda step, numbers: run.log(numbers, step=step), run.finish


_PACKAGES: dict[Writer, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_WRITERS: dict[Writer, Callable[[Path, int], tuple[Write, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
