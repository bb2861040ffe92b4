"""Features behind bad answers: what is wrong with them in tokens, and what rises on those.

score = rise of the mean activation x |decoder row| / median residual norm of the layer, comparable over layers.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from qscope_jax.analysis.diagnosis import Loop, character_spans, covering, loop_ends, rise, tail_loop
from qscope_jax.analysis.text import has_script
from qscope_jax.backbone.weights import Backbone
from qscope_jax.extract import DocumentCodes, ExtractStep, extract_documents
from qscope_jax.sae.model import Sae, row_norms_of
from qscope_jax.sae.quality import sink_threshold
from qscope_jax.steering.positions import parse_positions


class Complaint(NamedTuple):
    """What is wrong with an answer.

    `kind` "script": letters of the Unicode script `value`; "match": what the regular expression `value` matches;
    "substring": the text `value`, wherever it stands; "positions": these tokens, counted from the prompt's first
    ("0,2,5-8"); "loop": it ends in a phrase that stands there at least `repeats` times.
    """

    kind: Literal["script", "match", "substring", "positions", "loop"]
    value: str = ""
    repeats: int = 3

    def __str__(self) -> str:
        return f"repeats a phrase {self.repeats} times or more" if self.kind == "loop" else f"{self.kind} {self.value}"


class Answer(NamedTuple):
    """Prompt and answer as token ids [n], the answer from `begin` on.

    `wrong` are the numbers of the tokens in question, `others` of those that they are compared with: the rest of the
    answer; or a loop's phrase at its last and at its first occurrence.
    """

    ids: np.ndarray
    begin: int
    wrong: np.ndarray
    others: np.ndarray
    loop: Loop | None = None


@dataclasses.dataclass(frozen=True)
class Suspect:
    """A feature that is higher on the tokens in question than on the others; see the module for `score`."""

    layer: int
    feature: int
    score: float
    difference: float
    mean: float
    other_mean: float
    rate: float
    other_rate: float


def judge_answer(
    complaint: Complaint, prompt: np.ndarray, answer: np.ndarray, pieces: Sequence[bytes]
) -> Answer | None:
    """Finds the tokens in question; None if there are none, or if there is nothing to compare them with.

    Args:
      complaint: what is wrong.
      prompt: token ids before the answer, maybe none; context that is never judged.
      answer: its token ids.
      pieces: the bytes of text of each of the answer's tokens.

    Raises:
      ValueError: an unknown script, or no regular expression.
    """
    ids, begin = np.concatenate([prompt, answer]), len(prompt)
    if complaint.kind == "loop":
        loop = tail_loop(answer, least=complaint.repeats)
        if loop is None:
            return None
        last, first = loop_ends(loop, len(answer))
        return Answer(ids, begin, begin + last, begin + first, loop)
    if complaint.kind == "positions":
        place, wrong = np.arange(len(ids)), np.zeros(len(ids), bool)
        for low, high, relative in parse_positions(complaint.value):
            wrong |= (place - begin * relative >= low) & (place - begin * relative < high)
        wrong = wrong[begin:]
    else:
        text = b"".join(pieces).decode("utf-8", "surrogateescape")
        wrong = covering(pieces, character_spans(text, _wrong_characters(complaint, text)))
    if not wrong.any() or wrong.all():
        return None
    return Answer(ids, begin, begin + np.flatnonzero(wrong), begin + np.flatnonzero(~wrong))


def find_suspects(
    backbone: Backbone,
    saes: Mapping[int, Sae],
    answers: Sequence[Answer],
    *,
    top: int = 10,
    step: ExtractStep | None = None,
    row_norms: Mapping[int, np.ndarray] | None = None,
) -> tuple[dict[int, list[Suspect]], list[DocumentCodes]]:
    """The `top` features of every layer that rise most over all answers together, and the answers' codes.

    Sinks do not count: tokens above the SAE's threshold, or ten times these answers' median norm where it has none. In
    a loop neither occurrence of a token counts if one of them is a sink.

    Args:
      backbone: the model.
      saes: per layer; with their decoders, unless `row_norms` are given.
      answers: from `judge_answer`; none longer than the model's context.
      top: how many.
      step: a step to use again, made for the same model and layers.
      row_norms: per layer |decoder row| [f], for SAEs without decoders.

    Raises:
      ValueError: no answer, SAEs that do not fit the model, or only sinks among the tokens in question.
    """
    if not answers:
        raise ValueError("there is no answer with anything wrong in it")
    rows = row_norms or {layer: row_norms_of(sae) for layer, sae in saes.items()}
    longest = max(len(answer.ids) for answer in answers)
    documents = extract_documents(
        backbone, saes, [a.ids for a in answers], batch_tokens=max(4096, longest), max_length=longest, step=step
    )
    found = {}
    for layer, sae in saes.items():
        values, indices = (np.concatenate([d.codes[layer][i] for d in documents]) for i in range(2))
        norms = np.concatenate([d.norms[layer] for d in documents])
        fine = norms <= (sae.config.sink_threshold or sink_threshold(norms))
        own = rise(values, indices, *_compared(answers, fine), sae.config.d_sae)
        order = np.argsort(-own.difference, kind="stable")[:top]
        order = order[own.difference[order] > 0]
        scores = own.difference[order] * rows[layer][order] / np.median(norms)
        columns = (scores, *(column[order] for column in (own.difference, *own)))
        facts = zip(order.tolist(), *(column.tolist() for column in columns), strict=True)
        found[layer] = [Suspect(layer, f, s, d, m, o, r, q) for f, s, d, m, r, o, q in facts]
    return found, documents


def _compared(answers: Sequence[Answer], fine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The tokens in question and the others that are `fine` [n], numbered over all answers; a loop's come in pairs."""
    wrong, others, begin = list[np.ndarray](), list[np.ndarray](), 0
    for answer in answers:
        own, other = begin + answer.wrong, begin + answer.others
        kept, kept_others = fine[own], fine[other]
        if answer.loop is not None:
            kept = kept_others = kept & kept_others
        wrong.append(own[kept])
        others.append(other[kept_others])
        begin += len(answer.ids)
    return np.concatenate(wrong), np.concatenate(others)


def _wrong_characters(complaint: Complaint, text: str) -> list[tuple[int, int]]:
    if complaint.kind == "script":
        return [(i, i + 1) for i, character in enumerate(text) if has_script(character, complaint.value)]
    pattern = complaint.value if complaint.kind == "match" else re.escape(complaint.value)
    try:
        return [match.span() for match in re.finditer(pattern, text)]
    except re.error as error:
        raise ValueError(f"{complaint.value!r} is no regular expression: {error}") from None
