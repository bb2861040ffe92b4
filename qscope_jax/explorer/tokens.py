"""How a token looks to a person: byte-level pieces as text, with what cannot be seen made visible."""

from collections.abc import Sequence
from typing import Any

PART = "▯"


def token_labels(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """One visible label per token id.

    A character that several tokens share stands whole at the token that completes it; the tokens before show ▯. Line
    breaks become ⏎, tabs ⇥; a leading space stays.
    """
    labels, pending = [], b""
    for raw in token_bytes(tokenizer, ids):
        pending += raw
        text = _complete(pending)
        if text is None and len(pending) < 4:
            labels.append(PART)
            continue
        labels.append(visible(pending.decode("utf-8", "replace") if text is None else text))
        pending = b""
    return labels


def token_bytes(tokenizer: Any, ids: Sequence[int]) -> list[bytes]:
    """The bytes of text that each token id stands for: of a special token its name, of an id without a token none."""
    return [_bytes(piece or "") for piece in tokenizer.convert_ids_to_tokens(list(ids))]


def visible(text: str) -> str:
    """Replaces control, direction and zero-width characters by signs for them, so that a label cannot deceive."""
    shown = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"‹U+{ord(c):04X}›" for c in shown)


def _complete(raw: bytes) -> str | None:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (GPT-2's bijection)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


_BYTES = _byte_alphabet()


def _bytes(piece: str) -> bytes:
    if all(c in _BYTES for c in piece):
        return bytes(_BYTES[c] for c in piece)
    return piece.encode()  # a special token is itself
