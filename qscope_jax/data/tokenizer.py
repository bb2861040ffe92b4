"""Tokenizers of checkpoints: text in, ids out, nothing added and nothing in the text obeyed.

Text that spells a special token (`<|im_end|>`) is text: it is split like any other unless the caller asks otherwise.
No token is put before or after a document; Qwen models have no BOS.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from qscope_jax.files.source import Source, resolve

# What AutoTokenizer may read; config.json tells it the class.
FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "config.json",
)


def load_tokenizer(source: str | os.PathLike[str] | Source) -> Any:
    """The tokenizer of a model source, as transformers' fast tokenizer.

    Raises:
      SourceError: the source cannot be had.
      ValueError: it has no tokenizer, or one that only slow Python code can run.
    """
    source = source if isinstance(source, Source) else resolve(source, what="model")
    present = [name for name in FILES if source.has(name)]
    if "tokenizer.json" not in present and not {"vocab.json", "merges.txt"} <= set(present):
        raise ValueError(f"{source}: no tokenizer; expected tokenizer.json, or vocab.json with merges.txt")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        # A folder of exactly these files: nothing else of the source, above all no code, is in its reach.
        for name in present:
            shutil.copyfile(source.fetch(name), Path(folder) / name)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise ValueError(f"{source}: {type(tokenizer).__name__} has no fast backend (tokenizer.json)")
    tokenizer.name_or_path = str(source)
    return tokenizer


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuses a tokenizer that can make ids the model has no row for.

    Raises:
      ValueError: both sizes.
    """
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path!r} makes ids up to {highest}, the model has rows for {vocab_size}: "
            "they do not belong together"
        )


def tokenizer_hash(tokenizer: Any) -> str:
    """SHA-256 of the whole tokenizer: vocabulary, merges, normaliser, added tokens."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def make_encoder(tokenizer: Any, *, special_tokens: bool = False) -> Callable[[Sequence[str]], list[np.ndarray]]:
    """A function from texts to their token ids, uint32 [n_tokens] each: no BOS, no EOS, no truncation, no padding.

    It works on a copy of the tokenizer's backend, so that what others set on the tokenizer does not matter, and it may
    be called from several threads.

    Args:
      tokenizer: from `load_tokenizer`.
      special_tokens: True reads strings such as `<|im_end|>` in the text as the tokens they name.
    """
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not special_tokens

    def encode_texts(texts: Sequence[str]) -> list[np.ndarray]:
        encodings = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    return encode_texts
