"""`qscope features diagnose`: which features stand behind a bad answer.

Say what is wrong with it: a script or text that should not be there (features by activation on those tokens against
the rest of the answer), or that it loops (features by increase from the repeated phrase's first to its last
occurrence). diagnosis.json and index.html have the features of every layer.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import tyro

from qscope_jax.analysis.compare import activations
from qscope_jax.data.inputs import Format
from qscope_jax.explorer.page import write_page
from qscope_jax.explorer.terminal import has_colour, tinted
from qscope_jax.explorer.tokens import token_bytes, token_labels
from qscope_jax.extract import DocumentCodes, HostCode
from qscope_jax.features.diagnosis import Answer, Complaint, Suspect, find_suspects, judge_answer
from qscope_jax.files.atomic import write_json
from qscope_jax.jobs.answers import read_answers
from qscope_jax.jobs.opened import Precision, Sources, load, open_sources
from qscope_jax.jobs.run import Run, plain

_PAGE_TEXTS = 8
_KINDS = get_args(Complaint.__annotations__["kind"])


@dataclasses.dataclass(frozen=True)
class Config:
    """Find the features behind a bad answer. Say what is wrong with it by one of the first five options."""

    answer: tyro.conf.Positional[str | None] = None
    """What the model wrote; @FILE reads it from a file."""
    script: str | None = None
    """Letters of this script should not be there: Han, Cyrillic, Hangul, ... (Unicode's names)."""
    match: str | None = None
    """What this regular expression matches should not be there."""
    substring: str | None = None
    """This text should not be there, wherever it stands."""
    positions: str | None = None
    """These tokens should not be there: 5, 3-7, 0,2,5-8, counted from the prompt's first."""
    loop: bool = False
    """It ends in a phrase that is repeated over and over."""
    repeats: int = 3
    """How often a phrase must stand at the end to be a loop."""
    prompt: str = ""
    """What came before the answer: context that is not judged; @FILE reads it from a file."""

    data: tuple[str, ...] = ()
    """Instead of one answer many: files, folders or globs, as everywhere; those with nothing wrong are skipped. Of what
    `qscope generate` wrote (results.jsonl) the token ids are used."""
    text_field: str = "text"
    """Column of the answer."""
    prompt_field: str | None = None
    """Column of the prompt."""
    format: Format | None = None
    """What the files are, where their endings do not say it."""

    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs, likewise. Only encoders stay in memory: of Qwen3-8B with 65,536 features 1 GiB a layer in float32, half of
    it in bfloat16."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    layers: tuple[int, ...] = ()
    """Layers (0-based, the output of decoder layer n); all that the SAE source holds by default."""
    top: int = 10
    """Features to show, over all layers; the files have as many of every layer."""
    precision: Precision = "parity"
    """float32, or bfloat16."""
    mesh: str = "1x1"
    """DATAxMODEL: split rows over DATA and weights over MODEL of this process's devices."""
    out: Path = Path("qscope-out/features-diagnose")
    """Folder of diagnosis.json, index.html and manifest.json."""


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: nothing wrong is found in the answer, or wrong input or options, named.
      FloatingPointError: the model overflows.
    """
    complaint = _complaint(config)
    with Run("features diagnose", config, config.out) as job:
        sources = open_sources(config)
        tokenizer = sources.tokenizer
        answers, skipped = _answers(config, complaint, sources)
        backbone, (saes, norms), step = load(sources, config.precision)
        suspects, documents = find_suspects(backbone, saes, answers, top=config.top, step=step, row_norms=norms)
        job.progress(answers=len(answers), tokens=sum(len(answer.ids) for answer in answers))
        best = sorted((s for own in suspects.values() for s in own), key=lambda s: -s.score)[: config.top]
        labels = [token_labels(tokenizer, answer.ids.tolist()) for answer in answers]
        content = {"wrong": str(complaint), "best": best, "layers": suspects, "answers": _texts(answers, labels)}
        write_json(job.out / "diagnosis.json", plain(content))
        page = _page(complaint, labels, suspects, best, documents)
        write_page(job.out / "index.html", "What stands behind the answer", page)
        job.record(
            counts={"answers": len(answers), "skipped": skipped, "wrong_tokens": sum(len(a.wrong) for a in answers)},
            hashes=sources.hashes(),
        )
    _print(answers, labels, best, skipped)
    print(f"\n{job.address}: diagnosis.json, index.html")


def _complaint(config: Config) -> Complaint:
    said = [name for name in _KINDS if getattr(config, name) not in (None, False)]
    if len(said) != 1:
        raise ValueError(
            "say what is wrong with the answer by one of --script, --match, --substring, --positions, --loop; found "
            f"{', '.join(said) or 'none'}"
        )
    if (config.answer is None) == (not config.data):
        raise ValueError("give one answer, or --data with many")
    if config.top < 1 or config.repeats < 2:
        raise ValueError(f"--top {config.top} --repeats {config.repeats}: expected at least 1 and at least 2")
    value = getattr(config, said[0])
    return Complaint(cast(Any, said[0]), "" if value is True else value, config.repeats)


def _answers(config: Config, complaint: Complaint, sources: Sources) -> tuple[list[Answer], int]:
    """The answers in which something is wrong, and the number of others."""
    found, skipped, context = list[Answer](), 0, sources.constants.max_position_embeddings
    given = read_answers(config, sources.tokenizer, sources.constants.vocab_size)
    for before, own, text in given:
        if not len(own) or len(before) + len(own) > context:
            raise ValueError(
                f"prompt and answer have {len(before)} + {len(own)} tokens; expected an answer, and at most {context} "
                f"in all, the model's context: {text[:60]!r}"
            )
        answer = judge_answer(complaint, before, own, token_bytes(sources.tokenizer, own.tolist()))
        if answer is not None:
            found.append(answer)
        skipped += answer is None
    if not found:
        raise ValueError(f"{complaint}: found in none of the {len(given)} answers, or there is nothing else in them")
    return found, skipped


def _texts(answers: list[Answer], labels: list[list[str]]) -> list[dict[str, Any]]:
    return [
        {
            "tokens": own,
            "answer_begins": answer.begin,
            "wrong": answer.wrong.tolist(),
            "others": answer.others.tolist(),
            "loop": None if answer.loop is None else answer.loop._asdict(),
        }
        for answer, own in zip(answers, labels, strict=True)
    ]


def _page(
    complaint: Complaint,
    labels: list[list[str]],
    suspects: dict[int, list[Suspect]],
    best: list[Suspect],
    documents: list[DocumentCodes],
) -> dict[str, Any]:
    most = max((s.score for s in best), default=1.0)
    rows = []
    for s in best:
        shown = (f"{s.mean:.3g}", f"{s.other_mean:.3g}", f"{s.rate:.1%}", f"{s.other_rate:.1%}")
        score = {"text": f"{s.score:.3g}", "share": s.score / most}
        rows.append([s.layer, s.feature, score, *({"text": text} for text in shown)])
    there, elsewhere = _names(complaint.kind == "loop")
    drawn = []
    for i, own in enumerate(labels[:_PAGE_TEXTS]):
        cells = {n: [_cells(documents[i].codes[n], s.feature) for s in found] for n, found in suspects.items()}
        layers = [{"layer": n, "rows": heat} for n, heat in cells.items()]
        drawn.append({"label": f"answer {i + 1}", "tokens": own, "layers": layers})
    return {
        "facts": [["What is wrong", str(complaint)], ["Answers", str(len(labels))]],
        "summary": {
            "title": "Features that rise on the tokens in question",
            "note": "The score is the rise of the mean activation as a share of the layer's residual norm.",
            "head": ["Layer", "Feature", "Score", f"Mean {there}", elsewhere, f"Fires {there}", elsewhere],
            "rows": rows,
        },
        "rows": "Rows are the features of this layer that rise most, columns the tokens of prompt and answer.",
        "layer": [*suspects].index(best[0].layer) if best else 0,
        "texts": drawn,
    }


def _cells(code: HostCode, feature: int) -> dict[str, Any]:
    values = activations(*code, feature)
    return {"feature": feature, "cells": [[int(t), round(float(values[t]), 4)] for t in np.flatnonzero(values)]}


def _names(loop: bool) -> tuple[str, str]:
    return ("at last", "at first") if loop else ("there", "elsewhere")


def _print(answers: list[Answer], labels: list[list[str]], best: list[Suspect], skipped: int) -> None:
    first, own = answers[0], labels[0]
    marked = np.zeros(len(own))
    marked[first.wrong] = 1
    print(tinted(own, marked.tolist(), colour=has_colour()))
    if first.loop is not None:
        print(f"\n{first.loop.period} tokens, {first.loop.repeats} times; marked: the last of them")
    if len(answers) > 1 or skipped:
        print(f"\n{len(answers)} answers, of which the first is shown; in {skipped} others there was nothing to find")
    there, elsewhere = _names(first.loop is not None)
    print(f"\nlayer feature   score  {f'mean {there}':>14} {elsewhere:>9}  {f'fires {there}':>14} {elsewhere:>9}")
    for s in best:
        means = f"{s.mean:>14.3g} {s.other_mean:>9.3g}"
        print(f"{s.layer:>5} {s.feature:>7} {s.score:>7.3g}  {means}  {s.rate:>14.1%} {s.other_rate:>9.1%}")
