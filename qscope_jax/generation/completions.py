"""Texts for prompts: batches of like length, stop strings, and what each row's end was.

A batch's rows, and so every bit of the result, depend on all prompts and `rows` alone: a run that goes on after a stop
ends like one that was never stopped.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from qscope_jax.backbone.config import ModelConfig
from qscope_jax.backbone.forward import Params
from qscope_jax.generation.batch import (
    GenerateOutput,
    Generation,
    Written,
    advance,
    bucket,
    finished,
    pad_left,
    result,
    start,
    written,
)
from qscope_jax.taps import Tap

_CHUNK = 16  # tokens between two looks at the texts

Ended = Literal["eos", "stop", "length"]


class Prompt(NamedTuple):
    """Token ids [n] and the seed of the row."""

    tokens: np.ndarray
    seed: int


class Completion(NamedTuple):
    """What follows a prompt.

    text: without the eos or the stop string that ended it. tokens [n] with the eos, or up to the token that completed
    the stop string; logprobs [n], top_ids and top_logprobs [n, top] or None: see `GenerateOutput`.
    """

    text: str
    tokens: np.ndarray
    logprobs: np.ndarray
    top_ids: np.ndarray | None
    top_logprobs: np.ndarray | None
    ended: Ended


class Stopped(Exception):
    """`stopping` said so in the middle of a batch, of which nothing is kept."""


def plan_rows(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Batches of at most `rows` prompts whose lengths fall into like buckets, the shortest first."""
    order = sorted(range(len(lengths)), key=lambda i: (bucket(lengths[i]), i))
    batches: list[list[int]] = []
    for i in order:
        if not batches or len(batches[-1]) == rows or bucket(lengths[batches[-1][0]]) != bucket(lengths[i]):
            batches.append([])
        batches[-1].append(i)
    return batches


def complete(
    params: Params,
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    rows: int,
    stop: Sequence[str] = (),
    tap: Tap | None = None,
    stopping: Callable[[], bool] = lambda: False,
    watch: Callable[[str], None] | None = None,
    **options: Any,
) -> tuple[list[Completion], GenerateOutput]:
    """Completes one batch of prompts.

    Args:
      params: see `forward`.
      config: see `forward`.
      tokenizer: from `load_tokenizer`.
      prompts: of one batch, at most `rows`; copies of the last one fill it up, so that every batch has one shape.
      rows: of the batch.
      stop: strings that end a row.
      tap: see `generate`.
      stopping: asked now and then.
      watch: told the text of the first row after every token, as far as no later token can change it.
      options: others of `generate`.

    Raises:
      Stopped: `stopping` was true.
      ValueError, FloatingPointError: see `generate`.
    """
    filled = [*prompts, *[prompts[-1]] * (rows - len(prompts))]
    tokens, mask = pad_left([prompt.tokens for prompt in filled])
    if np.any(options.get("temperature", 0)):
        options["seeds"] = [prompt.seed for prompt in filled]
    running = start(params, config, tokens, mask=mask, tap=tap, **options)
    while not finished(running):
        if stopping():
            raise Stopped
        stopped = None
        if watch or stop:
            texts = _texts(written(running), tokenizer)
            stopped = np.array([_first(text, stop) is not None for text in texts])
            if watch:
                watch(_settled(texts[0], stop))
        running = advance(running, 1 if watch else _CHUNK, stopped=stopped)
    return _conclude(running, tokenizer, len(prompts), stop)


def _conclude(running: Generation, tokenizer: Any, number: int, stop) -> tuple[list[Completion], GenerateOutput]:
    out = result(running)
    found = []
    for row, text in enumerate(_texts(out, tokenizer)[:number]):
        n, ended = int(out.lengths[row]), "eos" if out.ended[row] else "length"
        if (at := _first(text, stop)) is not None:
            # The tokens up to the one that completed the string: the first so many that hold one.
            n = next(i for i in range(1, n + 1) if _first(_decode(tokenizer, out.tokens[row, :i]), stop) is not None)
            text, ended = text[:at], "stop"
        ids, chances = (None if a is None else a[row, :n] for a in (out.top_ids, out.top_logprobs))
        found.append(Completion(text, out.tokens[row, :n], out.logprobs[row, :n], ids, chances, ended))
    return found, out


def _texts(out: Written | GenerateOutput, tokenizer: Any) -> list[str]:
    ends = out.lengths - out.ended  # the eos is no text
    return [_decode(tokenizer, row[:end]) for row, end in zip(out.tokens, ends, strict=True)]


def _decode(tokenizer: Any, ids: np.ndarray) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _first(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins."""
    return min((at for string in stop if (at := text.find(string)) >= 0), default=None)


def _settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of a text that more tokens cannot change: no half character, nothing that may be a stop string."""
    if (at := _first(text, stop)) is not None:
        return text[:at]
    text = text.rstrip("\N{REPLACEMENT CHARACTER}")
    for length in range(max(map(len, stop), default=1) - 1, 0, -1):
        if any(string.startswith(text[-length:]) for string in stop if len(string) > length):
            return text[:-length]
    return text
