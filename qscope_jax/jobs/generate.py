"""`qscope generate`: prompts in, continuations out, steered or not.

One prompt is written to the terminal as it comes; many go to results.jsonl in --out, in batches of like length. The
same command goes on where it was stopped; another (other prompts, options, weights or recipes) is refused.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import tyro

from qscope_jax.backbone.parameters import split_layers
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.files.atomic import write_json, write_text
from qscope_jax.files.differences import differences
from qscope_jax.generation import make_steps
from qscope_jax.generation.completions import Completion, Prompt, Stopped, complete, plan_rows
from qscope_jax.generation.results_file import append, dump, sort, take_up
from qscope_jax.generation.sampling import check_sampling
from qscope_jax.jobs.generate_inputs import Asked, Opened, Steering, load_steering, open_inputs
from qscope_jax.jobs.recipes import SteerOptions
from qscope_jax.jobs.run import Run, devices, say

_RESULTS, _FACTS = "results.jsonl", "generation.json"


@dataclasses.dataclass(frozen=True)
class Config(SteerOptions):
    """Continue prompts."""

    prompt: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts; without any, and without --prompts, standard input is one."""
    prompts: tuple[str, ...] = ()
    """Files, folders or globs of prompts: JSONL, parquet or text (a prompt per line); compressed or remote too."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs of the features that are steered, likewise."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    out: Path | None = None
    """Folder of results.jsonl; without one, results go to standard output and a stopped run begins anew."""

    text_field: str = "text"
    """Column of the prompt."""
    id_field: str | None = None
    """Column of the id; by default a prompt is called file:line."""
    format: Literal["jsonl", "parquet", "text"] | None = None
    """What the files are, where their endings do not say it."""
    document: Literal["line", "file"] = "line"
    """Whether each line or each file of plain text is a prompt."""
    max_row_bytes: int = 1 << 20
    """Longer rows are errors."""
    on_error: Literal["skip", "fail"] = "skip"
    """Rows that cannot be used: list them in errors.jsonl, or stop at the first."""
    special_tokens: bool = False
    """Read strings such as <|im_end|> in a prompt as the tokens they name."""
    chat: bool = False
    """Take each prompt for a user's message and let the model's chat template frame it."""
    thinking: bool = True
    """With --chat: what templates that ask are told about whether the model should think first."""
    system: str | None = None
    """With --chat: the system message."""

    max_new_tokens: int = 128
    """At most so many tokens per prompt."""
    temperature: float = 0.0
    """Of sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens up to this mass."""
    top_k: int = 0
    """Sample from this many tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Divides logits of tokens that were there before; 1 is none."""
    seed: int = 0
    """Of the first prompt; the i-th has seed + i, whatever is left out."""
    stop: tuple[str, ...] = ()
    """Strings that end a text; they are no part of it."""
    ignore_eos: bool = False
    """Go on after the tokens that end a text."""
    top_logprobs: int = 0
    """Tell so many of the likeliest tokens at each place."""
    batch: int = 8
    """Prompts at a time."""
    precision: Literal["fast", "parity"] | None = None
    """bfloat16, or float32; by default float32 on a CPU."""
    mesh: str = "1x1"
    """DATAxMODEL, for example 2x4: split rows over DATA and weights over MODEL of this process's devices."""


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named.
      FloatingPointError: logits that are no distribution.
      Interrupted: SIGTERM or SIGINT came; finished batches are saved.
    """
    if config.batch < 1:
        raise ValueError(f"--batch {config.batch}: expected at least 1")
    if "" in config.stop:
        raise ValueError("--stop '': an empty string ends every text before it begins")
    if not config.chat and (config.system is not None or not config.thinking):
        raise ValueError("--system and --no-thinking speak to a chat template; give --chat too")
    if not 0 <= config.seed < 1 << 32:
        raise ValueError(f"--seed {config.seed}: expected 0..2**32 - 1")
    check_sampling(
        1, temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seeds=[0],
        repetition_penalty=config.repetition_penalty,
    )  # fmt: skip
    with Run("generate", config, config.out, resumes=(_FACTS, _RESULTS)) as job:
        opened = open_inputs(config, job)
        steering = load_steering(config, opened)
        facts = opened.facts | {"steer": steering.facts, "saes": steering.saes}
        if config.out is not None:
            _claim(job.out, facts)
            if opened.bad:
                write_text(job.out / "errors.jsonl", "".join(dump(row._asdict()) + "\n" for row in opened.bad))
        job.record(facts=facts)
        _write_all(config, job, opened, steering)


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Makes the folder this run's own; a resumed run must decide everything as before."""
    path = folder / _FACTS
    if not path.exists():
        write_json(path, facts)
    elif found := differences(json.loads(path.read_text(encoding="utf-8")), facts):
        raise ValueError(
            f"{folder} holds the results of another run; choose another --out, or run with the same settings:\n"
            + "\n".join(f"  {line}" for line in found)
        )


def _write_all(config: Config, job: Run, opened: Opened, steering: Steering) -> None:
    data = 1 if opened.mesh is None else opened.mesh.shape["data"]
    rows = -(-min(config.batch, len(opened.asked)) // data) * data
    batches = plan_rows([len(asked.tokens) for asked in opened.asked], rows)
    path = None if config.out is None else job.out / _RESULTS
    done = set() if path is None else take_up(path, [[opened.asked[i].number for i in batch] for batch in batches])
    job.total, finished, alone = len(opened.asked), sum(len(batches[place]) for place in done), len(opened.asked) == 1
    if not alone:  # a single one is its own progress
        job.progress(prompts=0, tokens=0, already=finished)
    backbone, compiled = None, 0
    for place, batch in enumerate(batches):
        if place in done:
            continue
        if backbone is None:
            backbone = _load(opened)
            compiled = len(make_steps(backbone.config).shapes)
        try:
            made = _make(config, job, opened, steering, backbone, [opened.asked[i] for i in batch], rows)
        except Stopped:
            saved = f"{finished} of {len(opened.asked)} prompts are done" if path is not None else "nothing is saved"
            raise job.interrupted(saved) from None
        if path is not None:
            append(path, made)
        finished += len(made)
        if not alone:
            job.progress(prompts=len(made), tokens=sum(len(row["tokens"]) for row in made))
    if path is not None:
        sort(path)
    if backbone is not None:
        job.record(device=devices(), programs=make_steps(backbone.config).shapes[compiled:])
    job.record(counts={"prompts": finished, "left_out": len(opened.bad)})


def _load(opened: Opened) -> Backbone:
    dtype = "float32" if opened.facts["precision"] == "parity" else "bfloat16"
    config, params = load_backbone(opened.model, dtype=dtype, mesh=opened.mesh)
    if opened.mesh is None and jax.default_backend() == "gpu":
        params = split_layers(params, config, consume=True)
    return Backbone(config, params)


def _make(
    config: Config, job: Run, opened: Opened, steering: Steering, backbone: Backbone, asked: list[Asked], rows: int
) -> list[dict[str, Any]]:
    """The results of one batch; a single prompt is printed as it is written, several without --out as lines of JSON."""
    prompts = [Prompt(one.tokens, (config.seed + one.number) % 2**32) for one in asked]
    told = _Teller() if len(opened.asked) == 1 else None
    made, out = complete(
        backbone.params, backbone.config, opened.tokenizer, prompts, rows=rows, stop=config.stop, tap=steering.tap,
        stopping=lambda: job.stopping, watch=told and told.tell, eos=opened.eos, temperature=config.temperature,
        top_p=config.top_p, top_k=config.top_k, repetition_penalty=config.repetition_penalty,
        max_new_tokens=config.max_new_tokens, top_logprobs=config.top_logprobs,
    )  # fmt: skip
    found = [
        _as_row(one, prompt.seed, completion) | steering.applied(out, row, len(completion.tokens))
        for row, (one, prompt, completion) in enumerate(zip(asked, prompts, made, strict=True))
    ]
    if told is not None:
        told.tell(made[0].text, last=True)
        if steering.tap is not None:
            say(steering.told(out, 0, len(asked[0].tokens), len(made[0].tokens)))
    elif config.out is None:
        print("\n".join(map(dump, found)), flush=True)
    return found


def _as_row(asked: Asked, seed: int, made: Completion) -> dict[str, Any]:
    row = {
        "number": asked.number, "id": asked.id, "prompt": asked.text, "text": made.text, "ended": made.ended,
        "prompt_tokens": len(asked.tokens), "tokens": made.tokens.tolist(), "logprobs": _rounded(made.logprobs),
        "seed": seed,
    }  # fmt: skip
    if made.top_ids is not None and made.top_logprobs is not None:
        row["top_tokens"], row["top_logprobs"] = made.top_ids.tolist(), _rounded(made.top_logprobs)
    return row


def _rounded(values: Any) -> Any:
    """As many digits as float32 holds."""
    return np.vectorize(lambda value: float(f"{value:.8g}"), otypes=[float])(values).tolist()


class _Teller:
    """Prints a text as it grows; what was printed is never taken back."""

    def __init__(self):
        self.printed = 0

    def tell(self, text: str, *, last: bool = False) -> None:
        print(text[self.printed :], end="\n" if last else "", flush=True)
        self.printed = max(self.printed, len(text))
