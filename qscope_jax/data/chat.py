"""Messages to token ids through a checkpoint's own chat template, which nobody here has checked.

The template runs in jinja's sandbox, in a process of its own with a limit on memory, which is killed when it takes too
long: no thread can be stopped inside one long call. What the template writes itself may name special tokens; what
stands in a message is text, whatever it spells.
"""

import contextlib
import itertools
import json
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qscope_jax.data.tokenizer import make_encoder

LONGEST_TEMPLATE = 1 << 20  # characters; those of the Qwen releases have about 5,000
LONGEST_CHAT = 1 << 24
SECONDS = 10.0
MEMORY = 1 << 30  # bytes
_START = 60.0  # seconds, for Python to begin on a busy machine
# Stand for special tokens inside messages while the template runs: private characters, of which texts hold few.
_PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))

Encoder = Callable[[Sequence[Mapping[str, str]]], np.ndarray]


class ChatError(ValueError):
    """One conversation that the template refuses or that cannot be written; others may be fine."""


@contextlib.contextmanager
def chat_encoder(tokenizer: Any, *, thinking: bool = True, special_tokens: bool = False) -> Iterator[Encoder]:
    """A function from messages, {"role": ..., "content": ...} each, to ids [n] uint32 up to the assistant's first word.

    It raises ChatError where the template fails or writes too much, and ValueError where it takes more time than any
    template needs. A process that renders templates lives as long as the context.

    Args:
      tokenizer: from `load_tokenizer`, with a chat template.
      thinking: told to the template as `enable_thinking`; templates that do not know it do not care.
      special_tokens: read strings such as `<|im_end|>` in a message as the tokens they name.

    Raises:
      ValueError: there is no template, it is too large, or the process cannot be started.
    """
    template, name = tokenizer.chat_template, tokenizer.name_or_path
    if not isinstance(template, str):
        raise ValueError(f"the tokenizer of {name} has no chat template; leave --chat out")
    if len(template) > LONGEST_TEMPLATE:
        raise ValueError(f"the chat template has {len(template):,} characters; at most {LONGEST_TEMPLATE:,} are run")
    added = tokenizer.added_tokens_decoder.values()
    special = sorted((token.content for token in added if token.special), key=len, reverse=True)
    named = re.compile(f"({'|'.join(map(re.escape, special)) or r'(?!)'})")
    text_ids, special_ids = make_encoder(tokenizer), make_encoder(tokenizer, special_tokens=True)
    values = {"add_generation_prompt": True, "enable_thinking": thinking, "tools": None, "documents": None}
    values |= tokenizer.special_tokens_map

    with _Worker(name, template) as worker:

        def encode(messages: Sequence[Mapping[str, str]]) -> np.ndarray:
            said = "".join(value for message in messages for value in message.values())
            hidden = {} if special_tokens else _marks(named.findall(said), said + template)
            guarded = [
                {key: named.sub(lambda found: hidden.get(found[0], found[0]), value) for key, value in message.items()}
                for message in messages
            ]
            rendered = worker.render(values | {"messages": guarded})
            shown = {ord(mark): text for text, mark in hidden.items()}
            # Special tokens cut a text before anything else does, so the pieces between them may be encoded one by one.
            pieces = named.split(rendered)
            plain = [piece.translate(shown) for piece in pieces[::2]]
            both = zip(text_ids(plain), special_ids([*pieces[1::2], ""]), strict=True)
            return np.concatenate([ids for pair in both for ids in pair])

        yield encode


def _marks(special: Sequence[str], taken: str) -> dict[str, str]:
    """For each of these strings a character that stands nowhere in `taken`."""
    used = set(taken)
    free = (chr(number) for number in itertools.chain(*_PRIVATE) if chr(number) not in used)
    marks = dict(zip(dict.fromkeys(special), free, strict=False))
    if len(marks) < len(set(special)):
        raise ChatError("the messages hold every private character, so that none can stand for a special token")
    return marks


class _Worker:
    """The process, from its start to the end of the context."""

    def __init__(self, name: str, template: str):
        self.name, self.template = name, template

    def __enter__(self) -> "_Worker":
        limits = map(str, (MEMORY, int(SECONDS) + 1, LONGEST_CHAT))
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(Path(__file__).with_name("chat_worker.py")), *limits],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
            start_new_session=True,  # a signal to the command is the command's to answer
        )  # fmt: skip
        try:
            begun = self._read(_START)
            if begun is None:
                raise ValueError(f"the process for chat templates did not start (exit status {self.process.wait()})")
            if "unlimited" in begun:
                warnings.warn(f"the chat template may use any amount of memory: {begun['unlimited']}", stacklevel=4)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what a dead process has not read
                pipe.close()

    def render(self, values: dict[str, Any]) -> str:
        what = f"the chat template of {self.name}"
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then it cannot answer either
            self.process.stdin.write(json.dumps({"template": self.template, "values": values}) + "\n")
            self.process.stdin.flush()
        found = self._read(SECONDS)
        if found is None and self.late:
            raise ValueError(f"{what} took more than {SECONDS:g} s")
        if found is None:
            raise ValueError(f"{what} ended its process (exit status {self.process.wait()})")
        if "error" in found:
            raise ChatError(f"{what} {found['error']}")
        return found["text"]

    def _read(self, seconds: float) -> dict[str, str] | None:
        """An answer, or None where the process ended, by itself or because it was late."""
        assert self.process.stdout is not None
        self.late = False
        timer = threading.Timer(seconds, self._end)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        return json.loads(line) if line.endswith("\n") else None

    def _end(self) -> None:
        self.late = True
        self.process.kill()
