"""Messages to token ids through a checkpoint's own chat template, which nobody here has checked.

The template runs in the sandbox of `transformers`, within a size and a time. What it writes itself may name special
tokens; what stands in a message is text, whatever it spells.
"""

import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qscope_jax.data.tokenizer import make_encoder

LONGEST_TEMPLATE = 1 << 20  # characters; those of the Qwen releases have about 5,000
LONGEST_CHAT = 1 << 24
SECONDS = 10.0
# Stand for special tokens inside messages while the template runs: private characters that no text should hold.
_FIRST, _LAST = 0xF0000, 0xFFFFD


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    *,
    thinking: bool = True,
    special_tokens: bool = False,
) -> np.ndarray:
    """The ids [n] uint32 of a conversation up to where the assistant begins to speak.

    Args:
      tokenizer: from `load_tokenizer`, with a chat template.
      messages: {"role": ..., "content": ...} each.
      thinking: False tells the template so (`enable_thinking`); the Qwen releases then write an empty thought.
      special_tokens: read strings such as `<|im_end|>` in a message as the tokens they name.

    Raises:
      ValueError: there is no template; it is too large, fails, takes too long or writes too much.
    """
    added = tokenizer.added_tokens_decoder.values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    hidden = {} if special_tokens else {text: chr(_FIRST + i) for i, text in enumerate(special)}
    hide = re.compile("|".join(map(re.escape, hidden)) or r"(?!)")
    guarded = [
        {key: hide.sub(lambda found: hidden[found[0]], _checked(value)) for key, value in message.items()}
        for message in messages
    ]
    rendered = _render(tokenizer, guarded, thinking)
    shown = {mark: text for text, mark in hidden.items()}
    text_ids, special_ids = make_encoder(tokenizer), make_encoder(tokenizer, special_tokens=True)
    # Special tokens cut a text before anything else does, so that the pieces between them may be encoded one by one.
    pieces = re.split(f"({'|'.join(map(re.escape, special)) or r'(?!)'})", rendered)
    plain = ["".join(shown.get(letter, letter) for letter in piece) for piece in pieces[::2]]
    ids = [ids for pair in zip(text_ids(plain), special_ids([*pieces[1::2], ""]), strict=True) for ids in pair]
    return np.concatenate(ids)


def _checked(value: str) -> str:
    if any(_FIRST <= ord(letter) <= _LAST for letter in value):
        raise ValueError("a message holds characters of the private plane U+F0000, which mean nothing in any text")
    return value


def _render(tokenizer: Any, messages: list[dict[str, str]], thinking: bool) -> str:
    template = tokenizer.chat_template
    if not isinstance(template, str):
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template; leave --chat out")
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"the chat template has {len(template):,} characters; at most {LONGEST_TEMPLATE:,} are run")
    options = {} if thinking else {"enable_thinking": False}
    done: dict[str, Any] = {}

    def run() -> None:
        try:
            done["text"] = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        except Exception as error:
            done["error"] = error

    # A thread that still runs ends with the process, which has refused the template by then.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    if not done:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} took more than {SECONDS:g} s")
    if (error := done.get("error")) is not None:
        raise ValueError(f"the chat template of {tokenizer.name_or_path} failed: {type(error).__name__}: {error}")
    if len(done["text"]) > LONGEST_CHAT:
        raise ValueError(f"the chat template wrote {len(done['text']):,} characters; at most {LONGEST_CHAT:,} are used")
    return done["text"]
