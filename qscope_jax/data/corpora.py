"""Corpora as documents of token ids: texts tokenised when they are read, and lists of ids made by others."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from qscope_jax.data.documents import Encoder
from qscope_jax.data.inputs import DataFile, Format, find_files
from qscope_jax.data.rows import RowFile, open_rows
from qscope_jax.data.sources import DocumentSource
from qscope_jax.data.spool import Spool, SpooledRows
from qscope_jax.data.synthetic import SyntheticDocuments
from qscope_jax.data.text import Corpus, Fields
from qscope_jax.data.tokenizer import check_vocabulary, make_encoder, tokenizer_hash

_MAX_ROW = 64 << 20  # bytes of a row; longer ones are skipped and counted
_LOOKED_AT = 1000  # rows in which a field must occur at least once


class TextDocuments:
    """A `DocumentSource`: the texts of a corpus, tokenised when read, with nothing added."""

    def __init__(self, name: str, corpus: Corpus, encoder: Encoder, tokenizer_sha256: str):
        self.name, self._corpus, self._encoder, self._tokenizer = name, corpus, encoder, tokenizer_sha256

    def __len__(self) -> int:
        return len(self._corpus)

    def read(self, number: int) -> np.ndarray | str:
        documents, bad = self._corpus.read(number, number + 1)
        if bad:
            return bad[0].reason
        (ids,) = self._encoder([documents[0].text])
        return ids if len(ids) else "no tokens are left of the text"

    def place(self, number: int) -> str:
        return "{}:{}".format(*self._corpus.place(number))

    def fingerprint(self) -> dict[str, Any]:
        files, field = self._corpus.fingerprint(), self._corpus.fields.text
        return {"kind": "text", "field": field, "tokenizer": self._tokenizer, "files": files}


class TokenDocuments:
    """A `DocumentSource`: token ids from a column of parquet or a field of JSONL, one list per document."""

    def __init__(self, name: str, files: Sequence[RowFile], field: str):
        self.name, self._files, self._field = name, files, field
        self._starts = np.cumsum([0, *(len(file) for file in files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, number: int) -> np.ndarray | str:
        which, row = self._find(number)
        (raw,) = self._files[which].read(row, row + 1)
        if raw.record is None:
            return raw.error or "no record"
        if self._field not in raw.record:
            return f"field {self._field!r} is missing"
        value = raw.record[self._field]
        if not isinstance(value, list | np.ndarray):
            return f"field {self._field!r} holds {type(value).__name__}; expected a list of token ids"
        try:
            ids = np.asarray(value)
        except (ValueError, OverflowError) as error:
            return f"field {self._field!r} is no list of token ids ({error})"
        if not len(ids):
            return "no tokens in it"
        if ids.ndim != 1 or ids.dtype.kind not in "iu":
            return f"field {self._field!r} holds {ids.dtype} of shape {ids.shape}; expected a list of token ids"
        return ids

    def place(self, number: int) -> str:
        which, row = self._find(number)
        return f"{self._files[which].file.name}:{row + 1}"

    def fingerprint(self) -> dict[str, Any]:
        files = [{"name": file.file.name, "rows": len(file), "sha256": file.digest} for file in self._files]
        return {"kind": "tokens", "field": self._field, "files": files}

    def _find(self, number: int) -> tuple[int, int]:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        return which, number - int(self._starts[which])


def open_sources(
    names: Sequence[str],
    *,
    vocab_size: int,
    tokenizer: Any = None,
    weights: Sequence[float] | None = None,
    text_field: str = "text",
    token_field: str | None = None,
    format: Format | None = None,
    whole_files: bool = False,
    special_tokens: bool = False,
    say: Callable[[str], None] | None = None,
) -> list[DocumentSource]:
    """What a user names as training data, as the sources of `open_feed`.

    Without weights all names are one corpus, every document as likely as any other; with weights each name is a source.
    A name is a file, folder, glob or address (`hf://datasets/owner/name@revision/folder` for the hub's), "demo" for the
    shipped texts, or "synthetic" for random tokens. With `token_field` the data are lists of ids, else texts.

    Raises:
      FileNotFoundError: a name matches nothing.
      ValueError: no names, weights that do not fit them, a file that cannot be read at all, or no tokenizer for texts.
    """
    if not names:
        raise ValueError("no data given: name files, folders, globs, addresses, demo or synthetic")
    if weights is not None and len(weights) != len(names):
        raise ValueError(f"{len(weights)} weight(s) for {len(names)} name(s) of data; expected one each")
    if "synthetic" in names and weights is None and len(names) > 1:
        raise ValueError("synthetic beside other data: say in which shares, a weight for each name")

    def open_one(specs: Sequence[str]) -> DocumentSource:
        if specs == ["synthetic"]:
            return SyntheticDocuments(vocab_size)
        if token_field is not None:
            return open_tokens(specs, field=token_field, format=format, say=say)
        if tokenizer is None:
            raise ValueError(f"{' '.join(specs)}: texts need the model's tokenizer, and it has none")
        return open_texts(
            specs, tokenizer, vocab_size=vocab_size, field=text_field, format=format, whole_files=whole_files,
            special_tokens=special_tokens, say=say,
        )  # fmt: skip

    return [open_one(list(specs)) for specs in ([names] if weights is None else [[name] for name in names])]


def open_texts(
    specs: Sequence[str],
    tokenizer: Any,
    *,
    vocab_size: int,
    field: str = "text",
    format: Format | None = None,
    whole_files: bool = False,
    special_tokens: bool = False,
    name: str | None = None,
    say: Callable[[str], None] | None = None,
) -> TextDocuments:
    """Opens files, folders, globs or addresses of texts. Each file is read once now; parquet is unpacked into TMPDIR.

    Args:
      specs: what to read; see `find_files`.
      tokenizer: from `load_tokenizer`.
      vocab_size: the model's; a tokenizer that can make larger ids is refused.
      field: the field or column that holds the text.
      format: what the files are, where their endings do not say it.
      whole_files: a file of plain text is one document, instead of each of its lines.
      special_tokens: strings such as `<|im_end|>` in the text are the tokens they name.
      name: what messages call the source; the specs by default.
      say: told what takes time.

    Raises:
      FileNotFoundError: a name matches nothing.
      ValueError: a file that cannot be read at all, no row with that field, or a tokenizer beyond the vocabulary.
    """
    check_vocabulary(tokenizer, vocab_size)
    files = _open_files(specs, field, tokens=False, format=format, whole_files=whole_files, say=say)
    sha256 = tokenizer_hash(tokenizer) + (":special" if special_tokens else "")
    encoder = make_encoder(tokenizer, special_tokens=special_tokens)
    return TextDocuments(name or " ".join(specs), Corpus(files, Fields(text=field)), encoder, sha256)


def open_tokens(
    specs: Sequence[str],
    *,
    field: str = "input_ids",
    format: Format | None = None,
    name: str | None = None,
    say: Callable[[str], None] | None = None,
) -> TokenDocuments:
    """Opens parquet or JSONL whose `field` holds one list of token ids per document; otherwise as `open_texts`.

    Raises:
      FileNotFoundError: a name matches nothing.
      ValueError: a file that cannot be read at all, plain text, or a parquet column that holds no lists of ids.
    """
    files = _open_files(specs, field, tokens=True, format=format, whole_files=False, say=say)
    for file in files:
        if file.file.format == "text":
            raise ValueError(f"{file.file.path}: expected parquet or JSONL with lists of token ids, found plain text")
        records = [raw.record for raw in file.read(0, min(len(file), _LOOKED_AT)) if raw.record is not None]
        if records and not any(field in record for record in records):
            raise ValueError(f"{file.file.path}: no row among the first {_LOOKED_AT} holds {field!r}")
    return TokenDocuments(name or " ".join(specs), files, field)


def _open_files(
    specs: Sequence[str],
    field: str,
    *,
    tokens: bool,
    format: Format | None,
    whole_files: bool,
    say: Callable[[str], None] | None,
) -> list[RowFile]:
    found, spool = find_files(specs, format=format), Spool()
    plain = [file.name for file in found if file.format == "text"]
    if 0 < len(plain) < len(found):
        table = next(file.name for file in found if file.format != "text")
        raise ValueError(
            f"{' '.join(specs)}: plain text ({plain[0]}) beside tables ({table}): a README among the data? Name the "
            "folder that holds just the data, or a glob such as FOLDER/*.parquet"
        )
    if say:
        size = sum(file.path.stat().st_size for file in found)
        say(f"reading {len(found)} file(s) of {size / 1e6:,.1f} MB")

    def open_file(file: DataFile) -> RowFile:
        if file.format == "parquet":
            return SpooledRows(file, field, spool, tokens=tokens)
        return open_rows(file, (field,), whole=whole_files, max_bytes=_MAX_ROW)

    return [open_file(file) for file in found]
