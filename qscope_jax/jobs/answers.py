"""What `qscope features diagnose` reads: one answer as text, rows of files, or results of `qscope generate`.

Of results the token ids count, not what the text would be read as: the answer's stand in the row, the prompt's come
from its text and from generation.json beside the file, which says how it was framed.
"""

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from qscope_jax.backbone.config_reader import read_object
from qscope_jax.data.chat import chat_encoder
from qscope_jax.data.inputs import Format
from qscope_jax.data.text import Corpus, Document, Fields, open_corpus
from qscope_jax.data.tokenizer import make_encoder, tokenizer_hash
from qscope_jax.jobs.run import say

# What tells a row of results.jsonl from others.
_WRITTEN = ("prompt", "prompt_tokens", "tokens", "ended")

Framing = Callable[[str], np.ndarray]


class Asked(Protocol):
    """The options that say what to read."""

    @property
    def answer(self) -> str | None: ...
    @property
    def prompt(self) -> str: ...
    @property
    def data(self) -> tuple[str, ...]: ...
    @property
    def text_field(self) -> str: ...
    @property
    def prompt_field(self) -> str | None: ...
    @property
    def format(self) -> Format | None: ...


class Given(NamedTuple):
    """Token ids of a prompt, maybe none, and of its answer, with the answer's text."""

    prompt: np.ndarray
    answer: np.ndarray
    text: str


def read_answers(asked: Asked, tokenizer: Any, vocabulary: int) -> list[Given]:
    """All answers; rows that cannot be used are told and left out.

    Raises:
      ValueError, OSError: results that another model wrote, ids beyond the vocabulary, or input that cannot be read.
    """
    encode = make_encoder(tokenizer)
    if asked.answer is not None:
        read = lambda text: Path(text[1:]).read_text(encoding="utf-8") if text.startswith("@") else text  # noqa: E731
        return [_encoded(encode, read(asked.prompt), read(asked.answer))]
    options: Any = {"format": asked.format, "say": say}
    corpus = open_corpus(asked.data, Fields(asked.text_field), **options)
    written = asked.text_field == "text" and asked.prompt_field is None and _is_written(corpus)
    if written and asked.prompt:
        raise ValueError("--prompt beside results of qscope generate: they have prompts of their own")
    if written or asked.prompt_field is not None:
        keep = _WRITTEN if written else (str(asked.prompt_field),)
        corpus = open_corpus(asked.data, Fields(asked.text_field, keep=keep), **options)
    documents, bad = corpus.read(0, len(corpus))
    if bad:
        say(f"{len(bad)} rows cannot be used; the first: {bad[0].file}:{bad[0].line}: {bad[0].reason}")
    if written:
        return _read_written(corpus, documents, tokenizer, vocabulary)
    prompts = [str(one.kept[0] or "") if one.kept else asked.prompt for one in documents]
    return [_encoded(encode, prompt, one.text) for prompt, one in zip(prompts, documents, strict=True)]


def _encoded(encode: Callable[..., list[np.ndarray]], prompt: str, text: str) -> Given:
    before, own = encode([prompt, text])
    return Given(before, own, text)


def _is_written(corpus: Corpus) -> bool:
    rows = (raw.record for file in corpus.files if len(file) for raw in file.read(0, 1))
    return all(record is not None and set(_WRITTEN) <= set(record) for record in rows)


def _read_written(corpus: Corpus, documents: list[Document], tokenizer: Any, vocabulary: int) -> list[Given]:
    found, own = list[Given](), np.searchsorted(corpus.starts, [one.number for one in documents], side="right") - 1
    for which in np.unique(own).tolist():
        beside = corpus.files[which].file.path.with_name("generation.json")
        facts = read_object(beside) if beside.is_file() else {}
        if facts.get("tokenizer", tokenizer_hash(tokenizer)) != tokenizer_hash(tokenizer):
            raise ValueError(f"{beside}: a model with another tokenizer wrote these results; name it with --model")
        with _framing(facts, tokenizer) as frame:
            for i in np.flatnonzero(own == which):
                place = "{}:{}".format(*corpus.place(documents[i].number))
                found.append(_written(documents[i], place, frame, vocabulary))
    return found


def _written(row: Document, place: str, frame: Framing, vocabulary: int) -> Given:
    prompt, count, tokens, ended = row.kept
    try:
        ids = json.loads(str(tokens))  # lists are carried as JSON
    except ValueError:
        ids = None
    if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < vocabulary for one in ids):
        raise ValueError(f"{place}: tokens: expected a list of token ids below {vocabulary}, the model's vocabulary")
    before = frame(str(prompt))
    if len(before) != count:
        raise ValueError(
            f"{place}: the prompt was {count} tokens when it was answered, here it is {len(before)}: leave "
            "generation.json beside the results, which says how it was framed, and name the model that wrote them"
        )
    # The token that ended the text is no part of it.
    return Given(before, np.array(ids[:-1] if ended == "eos" else ids, np.uint32), row.text)


@contextlib.contextmanager
def _framing(facts: Mapping[str, Any], tokenizer: Any) -> Iterator[Framing]:
    """From a prompt's text to its ids, as `qscope generate` made them."""
    special = bool(facts.get("special_tokens"))
    if not facts.get("chat"):
        encode = make_encoder(tokenizer, special_tokens=special)
        yield lambda text: encode([text])[0]
        return
    system = [] if facts.get("system") is None else [{"role": "system", "content": str(facts["system"])}]
    with chat_encoder(tokenizer, thinking=bool(facts.get("thinking")), special_tokens=special) as encode_chat:
        yield lambda text: encode_chat([*system, {"role": "user", "content": text}])
