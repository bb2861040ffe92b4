"""What `qscope generate` reads: prompts as token ids, the tokens that end a text, the facts that decide all results."""

import contextlib
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from qscope_jax.backbone.checkpoint import find_config
from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.data.chat import ChatError, chat_encoder
from qscope_jax.data.text import BadRow, Document, Fields, open_corpus
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder, tokenizer_hash
from qscope_jax.extract import check_sae
from qscope_jax.features.files import check_statistics, statistics_of
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.generation import GenerateOutput
from qscope_jax.jobs.places import bind, local_mesh, model_files
from qscope_jax.jobs.progress import Meter
from qscope_jax.jobs.recipes import SteerOptions, chosen_entries, load_needed
from qscope_jax.jobs.run import Run, say
from qscope_jax.steering import count_applied, describe, steer
from qscope_jax.taps import Tap

_SILENT = 2.0  # seconds of preparing before it shows progress
_OF_FEATURE = ("strength", "mode", "units", "positions", "preserve_norm")
# Options that do not decide what is written, or that the facts say in another way.
_NO_SETTINGS = frozenset(
    {"prompt", "prompts", "model", "sae", "k", "out", "mesh", "on_error", "max_row_bytes", "precision"}
    | {field.name for field in dataclasses.fields(SteerOptions)}
)


class Asked(NamedTuple):
    """A prompt: its number over the whole input, its id, text and token ids."""

    number: int
    id: str
    text: str
    tokens: np.ndarray


class Opened(NamedTuple):
    """What a run reads; nothing large is loaded. `facts` decide every result."""

    model: Source
    constants: ModelConfig
    tokenizer: Any
    asked: list[Asked]
    bad: list[BadRow]
    eos: tuple[int, ...]
    mesh: Any
    facts: dict[str, Any]


class Steering(NamedTuple):
    """The tap of all entries (None without any), what they are, and SHA-256 and k of the SAE of each layer."""

    tap: Tap | None
    facts: list[dict[str, Any]]
    saes: dict[str, dict[str, Any]]

    def applied(self, out: GenerateOutput, row: int, tokens: int) -> dict[str, Any]:
        """What was done in one row, of which `tokens` generated ones were kept: the last of them was never read."""
        if self.tap is None:
            return {}
        counts = count_applied(*_kept(out, tokens))
        return {
            "steer": [
                {**facts, "selected": int(counts.selected[row, i]), "changed": int(counts.changed[row, i])}
                for i, facts in enumerate(self.facts)
            ]
        }

    def told(self, out: GenerateOutput, row: int, prompt: int, tokens: int) -> str:
        """The same in one line, for people: how many of the tokens that the model read were changed."""
        read, written = (count_applied(taps).changed[row] for taps in _kept(out, tokens))
        after = max(tokens - 1, 0)
        return "steered: " + "; ".join(
            f"{_words(facts)}: {read[i]} of {prompt} prompt and {written[i]} of {after} generated tokens"
            for i, facts in enumerate(self.facts)
        )


def _kept(out: GenerateOutput, tokens: int) -> tuple[Any, Any]:
    return out.taps.prompt, jax.tree.map(lambda a: a[: max(tokens - 1, 0)], out.taps.generated)


def _words(facts: dict[str, Any]) -> str:
    """An entry as people say it: `clamp 3:314 0.9 xmax (45.7 raw) at model.layers.3`."""
    strength = "" if facts["strength"] is None else f" {facts['strength']:g} {facts['units']}"
    raw = f" ({facts['raw']:.3g} raw)" if strength and facts["units"] != "raw" else ""
    positions = "" if facts["positions"] == "all" else f", positions {facts['positions']}"
    name = f"{facts['layer']}:{facts.get('feature', 'direction')}"
    return f"{facts['mode']} {name}{strength}{raw} at {facts['hook']}{positions}"


def load_steering(config: Any, opened: Opened) -> Steering:
    """Reads recipes and the SAEs that they need.

    Raises:
      ValueError, OSError: a recipe of another model or SAE, or options that mean nothing; named.
    """
    if not config.feature:
        for field in dataclasses.fields(SteerOptions):
            if field.name in _OF_FEATURE and getattr(config, field.name) != field.default:
                name = field.name.replace("_", "-")
                raise ValueError(f"--{name} belongs to --feature LAYER:INDEX, which is not given")
        if not config.steer:
            return Steering(None, [], {})
    source = resolve(config.sae, what="sae")
    stats = statistics_of(source, config.statistics)
    entries = chosen_entries(config, opened.model, source, stats, k=config.k)
    saes = load_needed(entries, source, config.k, mesh=opened.mesh)
    check_statistics(stats, source, saes)
    for layer, sae in saes.items():
        check_sae(opened.constants, layer, sae.config)
    tap = steer(entries, saes, stats=stats, num_layers=opened.constants.num_layers)
    hashes = bind(opened.model, source, tuple(saes), k=config.k).saes
    used = {str(layer): {"sha256": hashes[layer], "k": sae.config.k} for layer, sae in saes.items()}
    return Steering(tap, describe(entries, saes, stats=stats), used)


def open_inputs(config: Any, job: Run) -> Opened:
    """Reads everything but weights; `config` is that of `qscope generate`.

    Raises:
      Interrupted: `job` is stopping.
      ValueError, OSError: wrong input or options, named; a prompt that cannot be used, unless it stands in a file and
        may be skipped.
    """
    model, mesh = resolve(config.model, what="model"), local_mesh(config.mesh)
    constants = find_config(model)
    if mesh is not None:  # before anything large is read
        parameter_shapes(constants, mesh=mesh)
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, constants.vocab_size)
    read, bad, source = _read(config)
    asked, left_out = _tokenize(config, job, tokenizer, constants, read)
    bad = sorted([*bad, *left_out])
    if bad and (config.on_error == "fail" or not config.prompts):
        raise ValueError(f"{bad[0].id}: {bad[0].reason}")
    if not asked:
        raise ValueError(f"there is no prompt that can be used; the first of {len(bad)}: {bad[0].id}: {bad[0].reason}")
    eos = () if config.ignore_eos else constants.eos_token_ids
    precision = config.precision or ("parity" if jax.default_backend() == "cpu" else "fast")
    options = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name not in _NO_SETTINGS}
    facts = options | {
        "precision": precision,
        "eos": list(eos),
        "model": {"name": model.name, "files": hash_files(model_files(model))},
        "tokenizer": tokenizer_hash(tokenizer),
        "template": hashlib.sha256(str(tokenizer.chat_template).encode()).hexdigest() if config.chat else None,
        "prompts": source,
    }
    return Opened(model, constants, tokenizer, asked, bad, eos, mesh, facts)


def _read(config: Any) -> tuple[list[tuple[Document, str, int]], list[BadRow], Any]:
    """Prompts with their file and line; rows that hold none; and what tells this input from others."""
    if config.prompts and config.prompt:
        raise ValueError("prompts are given both as arguments and as files; choose one")
    if not config.prompts:
        if not config.prompt and sys.stdin.isatty():
            raise ValueError("no prompt: give one as an argument, on standard input, or a file with --prompts")
        texts = config.prompt or (sys.stdin.read().removesuffix("\n"),)
        digest = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        return [(Document(i, f"prompt {i}", text, ()), "", i) for i, text in enumerate(texts)], [], digest
    corpus = open_corpus(
        config.prompts, Fields(config.text_field, config.id_field), format=config.format, document=config.document,
        max_row_bytes=config.max_row_bytes, say=say,
    )  # fmt: skip
    documents, bad = corpus.read(0, len(corpus))
    return [(row, *corpus.place(row.number)) for row in documents], bad, corpus.fingerprint()


def _tokenize(
    config: Any, job: Run, tokenizer: Any, constants: ModelConfig, read: list[Any]
) -> tuple[list[Asked], list[BadRow]]:
    asked, bad = [], []
    with _encoder(config, tokenizer) as encode:
        for (number, name, text, _), file, line in _watched(read, config, job):
            try:
                ids = _checked(encode(text), config.max_new_tokens, constants.max_position_embeddings)
            except _Unusable as error:
                bad.append(BadRow(number, name, file, line, str(error)))
            else:
                asked.append(Asked(number, name, text, ids.astype(np.int32)))
    return asked, bad


class _Unusable(Exception):
    """Why a prompt cannot be used."""


def _checked(ids: np.ndarray, new: int, context: int) -> np.ndarray:
    if not len(ids):
        raise _Unusable("the prompt is empty")
    if len(ids) + new > context:
        raise _Unusable(f"{len(ids)} tokens and --max-new-tokens {new} go beyond the model's context of {context}")
    return ids


@contextlib.contextmanager
def _encoder(config: Any, tokenizer: Any) -> Iterator[Callable[[str], np.ndarray]]:
    """From the text of a prompt to its ids; made once for all prompts."""
    if not config.chat:
        encode = make_encoder(tokenizer, special_tokens=config.special_tokens)
        yield lambda text: encode([text])[0]
        return
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    with chat_encoder(tokenizer, thinking=config.thinking, special_tokens=config.special_tokens) as frame:

        def encode_message(text: str) -> np.ndarray:
            try:
                return frame([*system, {"role": "user", "content": text}])
            except ChatError as error:
                raise _Unusable(str(error)) from None

        yield encode_message


def _watched(rows: list[Any], config: Any, job: Run) -> Iterator[Any]:
    """The rows, with progress where they take long; a signal ends them."""
    began, meter = time.monotonic(), None
    try:
        for done, row in enumerate(rows):
            if job.stopping:
                why = f"{done} of {len(rows)} prompts were prepared"
                raise job.interrupted(why, resumes=config.out is not None)
            if meter is None and time.monotonic() - began > _SILENT:
                meter = Meter("generate: preparing", len(rows), "prompts", began)
                meter.add({"prompts": done}, 0)
            yield row
            if meter is not None:
                meter.add({"prompts": 1}, 0)
    finally:
        if meter is not None:
            meter.close()
