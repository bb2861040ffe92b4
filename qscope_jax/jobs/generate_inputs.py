"""What `qscope generate` reads: prompts as token ids, the tokens that end a text, the facts that decide all results."""

import dataclasses
import hashlib
import json
import sys
from typing import Any, NamedTuple

import jax
import numpy as np

from qscope_jax.backbone.config import ModelConfig, read_config
from qscope_jax.backbone.config_reader import read_object
from qscope_jax.backbone.parameters import parameter_shapes
from qscope_jax.data.chat import encode_chat
from qscope_jax.data.text import BadRow, Document, Fields, open_corpus
from qscope_jax.data.tokenizer import check_vocabulary, load_tokenizer, make_encoder, tokenizer_hash
from qscope_jax.extract import check_sae
from qscope_jax.features.files import check_statistics
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.generation import GenerateOutput
from qscope_jax.jobs.places import bind, local_mesh, model_files
from qscope_jax.jobs.recipes import SteerOptions, chosen_entries, load_needed, load_stats
from qscope_jax.jobs.run import say
from qscope_jax.steering import count_applied, describe, steer
from qscope_jax.taps import Tap

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
        prompt, generated = out.taps
        kept = jax.tree.map(lambda a: a[: max(tokens - 1, 0)], generated)
        counts = count_applied(prompt, kept)
        return {
            "steer": [
                {**facts, "selected": int(counts.selected[row, i]), "changed": int(counts.changed[row, i])}
                for i, facts in enumerate(self.facts)
            ]
        }


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
    stats = load_stats(config, source)
    entries = chosen_entries(config, opened.model, source, stats, k=config.k)
    saes = load_needed(entries, source, config.k, mesh=opened.mesh)
    check_statistics(stats, source, saes)
    for layer, sae in saes.items():
        check_sae(opened.constants, layer, sae.config)
    tap = steer(entries, saes, stats=stats, num_layers=opened.constants.num_layers)
    hashes = bind(opened.model, source, tuple(saes), k=config.k).saes
    used = {str(layer): {"sha256": hashes[layer], "k": sae.config.k} for layer, sae in saes.items()}
    return Steering(tap, describe(entries, saes, stats=stats), used)


def open_inputs(config: Any) -> Opened:
    """Reads everything but weights; `config` is that of `qscope generate`.

    Raises:
      ValueError, OSError: wrong input or options, named; a prompt that cannot be used, unless it stands in a file and
        may be skipped.
    """
    model, mesh = resolve(config.model, what="model"), local_mesh(config.mesh)
    constants = read_config(model.fetch("config.json"))
    if mesh is not None:  # before anything large is read
        parameter_shapes(constants, mesh=mesh)
    tokenizer = load_tokenizer(model)
    check_vocabulary(tokenizer, constants.vocab_size)
    read, bad, source = _read(config)
    asked, left_out = _tokenize(config, tokenizer, constants, read)
    bad = sorted([*bad, *left_out])
    if bad and (config.on_error == "fail" or not config.prompts):
        raise ValueError(f"{bad[0].id}: {bad[0].reason}")
    if not asked:
        raise ValueError(f"there is no prompt that can be used; the first of {len(bad)}: {bad[0].id}: {bad[0].reason}")
    eos = _eos(config, model, constants, tokenizer)
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


def _tokenize(config: Any, tokenizer: Any, constants: ModelConfig, read) -> tuple[list[Asked], list[BadRow]]:
    encode, asked, bad = make_encoder(tokenizer, special_tokens=config.special_tokens), [], []
    system = [] if config.system is None else [{"role": "system", "content": config.system}]
    context = constants.max_position_embeddings
    for (number, name, text, _), file, line in read:
        if config.chat:
            messages = [*system, {"role": "user", "content": text}]
            ids = encode_chat(tokenizer, messages, thinking=config.thinking, special_tokens=config.special_tokens)
        else:
            (ids,) = encode([text])
        if not len(ids):
            reason = "the prompt is empty"
        elif len(ids) + config.max_new_tokens > context:
            new = f"--max-new-tokens {config.max_new_tokens}"
            reason = f"{len(ids)} tokens and {new} go beyond the model's context of {context}"
        else:
            asked.append(Asked(number, name, text, ids.astype(np.int32)))
            continue
        bad.append(BadRow(number, name, file, line, reason))
    return asked, bad


def _eos(config: Any, model: Source, constants: ModelConfig, tokenizer: Any) -> tuple[int, ...]:
    """The ids that end a text: config.json's, generation_config.json's, and for chats the tokenizer's."""
    if config.ignore_eos:
        return ()
    found = list(constants.eos_token_ids)
    if model.has("generation_config.json"):
        path = model.fetch("generation_config.json")
        said = read_object(path).get("eos_token_id")
        ids = said if isinstance(said, list) else [] if said is None else [said]
        if not all(type(number) is int for number in ids):
            raise ValueError(f"{path}: eos_token_id = {said!r}; expected a token id, or several")
        found += ids
    if config.chat and tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    return tuple(dict.fromkeys(found))
