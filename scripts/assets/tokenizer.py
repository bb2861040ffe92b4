"""Train the byte-level BPE tokenizer in Qwen2 form on the train split, languages balanced.

    python scripts/assets/tokenizer.py --cache DIR --out FOLDER

Text tokens come first, then <|endoftext|>, <|im_start|>, <|im_end|>, as in the released tokenizers.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from corpus import BYTES_PER_EN
from sources import LANGS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

VOCAB = 4096
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SAMPLE_EN = 1_600_000  # bytes of English; other languages scaled to the same content
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def empty() -> Tokenizer:
    """The pipeline of Qwen2's tokenizer without a vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def balanced(corpus: Path) -> Iterator[str]:
    """Train texts, each language up to (or repeated to) its budget."""
    with corpus.open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == "train"]
    for lang in LANGS:
        left = SAMPLE_EN * BYTES_PER_EN[lang]
        for text in cycle([row["text"] for row in rows if row["lang"] == lang]):
            if left <= 0:
                break
            left -= len(text.encode())
            yield text


def train(corpus: Path) -> Tokenizer:
    tokenizer = empty()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(balanced(corpus), trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if tokenizer.get_vocab_size() != VOCAB:
        raise ValueError(f"expected {VOCAB} tokens, found {tokenizer.get_vocab_size()}")
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    added = {str(tokenizer.token_to_id(token)): _added(token) for token in SPECIAL}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[0],
        "errors": "replace",
        "model_max_length": 512,
        "pad_token": SPECIAL[0],
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _added(token: str) -> dict[str, str | bool]:
    return {
        "content": token,
        "lstrip": False,
        "normalized": False,
        "rstrip": False,
        "single_word": False,
        "special": True,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    save(train(arguments.cache / "corpus.jsonl"), arguments.out)
