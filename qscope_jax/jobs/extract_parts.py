"""Which parts of an extraction are there, and what they add up to."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qscope_jax.data import store_files as files
from qscope_jax.jobs.places import meet
from qscope_jax.jobs.run import Run, say


def missing_parts(
    out: Path, job: Run, ranges: Sequence[tuple[int, int]], expected: str, mine: range
) -> tuple[list[int], int]:
    """The parts of this process that are not there yet, and the number of rows of those that are."""
    todo, rows = [], 0
    for part in mine:
        path = files.documents_path(out, part)
        if path.exists():
            files.read_facts(path, expected)
            rows += ranges[part][1] - ranges[part][0]
        else:
            todo.append(part)
    job.total = sum(ranges[part][1] - ranges[part][0] for part in mine)
    say(f"{ranges[-1][1]:,} rows; {len(todo)} of {len(mine)} parts to do")
    return todo, rows


def conclude(out: Path, job: Run, info: dict[str, Any], mine: range, shards: int) -> None:
    """Counts what is there; the process that finds every part done joins the errors and says so for the whole.

    Processes of one job meet before, and it is the first that speaks.

    Raises:
      Interrupted: parts of this process are missing.
    """
    expected, parts = files.fingerprint(info), info["parts"]
    paths = [files.documents_path(out, part) for part in range(parts)]
    finished = all(paths[part].exists() for part in mine)
    if finished:
        meet()
    facts = [files.read_facts(path, expected) for path in paths if path.exists()]
    counts = _counts(info, facts)
    job.record(counts=counts)
    if not finished:
        raise job.interrupted(f"{len(facts)} of {parts} parts are done, finished batches of the next are put aside")
    if jax.process_index() > 0:
        return
    if len(facts) == parts:
        files.join_errors(out, parts)
        if shards > 1:
            job.manifests.append("manifest.json")
    say(
        f"{counts['parts']} parts: {counts['documents']:,} documents ({counts['truncated']:,} truncated), "
        f"{counts['tokens']:,} tokens; {counts['bad']:,} rows left out (errors.jsonl); "
        f"{counts['wasted_positions']:.1%} of positions padding"
    )


def _counts(info: dict[str, Any], facts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    totals = {name: sum(f[name] for f in facts) for name in ("documents", "bad", "tokens", "truncated", "positions")}
    tokens, positions = totals["tokens"], totals["positions"]
    masked = np.sum([np.zeros(len(info["layers"])), *(f["masked"] for f in facts)], 0) / max(tokens, 1)
    return {
        **totals,
        "wasted_positions": 1 - tokens / positions if positions else 0.0,
        "masked_share": dict(zip(info["layers"], masked.tolist(), strict=True)),
        "parts": f"{len(facts)} of {info['parts']}",
    }
