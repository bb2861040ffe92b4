"""A direction that is no language: stories against manuals, in English; difference of means, no SAE."""

from typing import Any

import jax
import numpy as np
from setting import NEW, PROMPT, TEMPERATURE, Setting, choose, prompts, table

from qscope_jax.analysis.directions import difference_of_means
from qscope_jax.analysis.features import auroc
from qscope_jax.backbone.forward import forward
from qscope_jax.generation import pad_left
from qscope_jax.steering import Steer
from qscope_jax.steering.controls import control_recipes
from qscope_jax.trials import Writing, try_recipes

STRENGTHS = (0.25, 0.5, 0.75)  # xnorm
TRAINED, JUDGED, REPORTED, LENGTH = 150, 30, 30, 128
MANUALS = ("office", "image", "desktop")


def register(setting: Setting) -> tuple[str, dict[str, Any]]:
    """The direction's AUROC in every layer, on documents that choose the layer and on held-out ones, and its effect."""
    train, train_story = _documents(setting.train, TRAINED)
    chooses = np.arange(len(train)) % 3 == 0  # a third of the train documents chooses the layer
    judged, judged_story = _documents(setting.held_out, JUDGED)
    vectors, mask = _residuals(setting, train)
    held, held_mask = _residuals(setting, judged)
    directions, scores = {}, {}
    for layer in setting.saes:
        positive = np.broadcast_to(train_story[:, None], mask.shape)
        direction = difference_of_means(vectors[layer][~chooses], positive[~chooses], mask[~chooses])
        chosen = _auroc(vectors[layer][chooses], mask[chooses], direction, train_story[chooses])
        directions[layer] = direction
        scores[layer] = chosen, _auroc(held[layer], held_mask, direction, judged_story)
    layer = max(scores, key=lambda n: scores[n][0])
    classify, accuracy = _classifier(train, train_story, judged, judged_story, setting.backbone.config.vocab_size)
    given = prompts([ids for ids, story in zip(judged, judged_story, strict=True) if not story][:REPORTED])
    arms = {
        f"{sign * s:+} xnorm": [[Steer(layer, strength=sign * s, units="xnorm", direction=directions[layer])]]
        for s in STRENGTHS
        for sign in (1, -1)
    }
    arms |= {
        name: recipes
        for name, recipes in control_recipes(
            arms[f"+{STRENGTHS[1]} xnorm"][0], setting.saes, stats=setting.stats, random=10
        ).items()
        if name in ("unsteered", "random")
    }
    writing = Writing(NEW, TEMPERATURE, eos=(), languages=("en", "de", "fr", "es"), batch_rows=96)
    found = try_recipes(
        setting.backbone, setting.tokenizer, setting.saes, given, arms, stats=setting.stats, writing=writing
    )
    encode = setting.tokenizer.encode
    stories = {
        name: float(np.mean([classify(encode(text)) for text in outcome.texts])) for name, outcome in found.items()
    }
    rows = [
        [name, f"{stories[name]:.2f}", f"{o.nll:.2f}", f"{o.distinct:.2f}", f"{o.languages['en']:.2f}"]
        for name, o in found.items()
    ]
    head = (f"direction of layer {layer}", "told to be a story", "NLL", "distinct 3-grams", "rows in English")
    numbers = {"auroc": scores, "layer": layer, "classifier_accuracy": accuracy, "stories": stories}
    return table(head, rows), numbers | {name: o._asdict() | {"texts": o.texts[:4]} for name, o in found.items()}


def _documents(texts, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """As many stories as manuals, cut to one length."""
    stories = choose(texts, "en", count, source="story")
    manuals = [ids for source in MANUALS for ids in choose(texts, "en", count // len(MANUALS), source=source)]
    return [ids[:LENGTH] for ids in (*stories, *manuals)], np.arange(len(stories) + len(manuals)) < len(stories)


def _residuals(setting: Setting, documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[layer, document, token, d], and which of them count: real tokens."""
    backbone, found = setting.backbone, []
    tokens, mask = pad_left(documents, LENGTH)
    run = jax.jit(forward, static_argnames=("capture", "logits"))
    layers = tuple(setting.saes)
    for start in range(0, len(tokens), 32):
        part = slice(start, start + 32)
        out = run(backbone.params, backbone.config, tokens[part], mask=mask[part], capture=layers, logits="none")
        found.append(np.asarray(out.captured))
    return np.concatenate(found, axis=1), mask


def _auroc(vectors, mask, direction, positive) -> float:
    """Of the documents' mean projections."""
    mean = (vectors @ direction * mask).sum(1) / mask.sum(1)
    return float(auroc(mean[:, None], positive)[0])


def _classifier(train, train_story, judged, judged_story, vocabulary: int):
    """Naive Bayes over token ids: a function from ids to "is a story", and its accuracy on the held-out documents."""
    counts = np.ones((2, vocabulary))
    for ids, story in zip(train, train_story, strict=True):
        np.add.at(counts[int(story)], ids, 1)
    odds = np.log(counts[1] / counts[1].sum()) - np.log(counts[0] / counts[0].sum())
    classify = lambda ids: float(odds[np.asarray(ids, int)].sum() > 0)  # noqa: E731
    right = [classify(ids[PROMPT : PROMPT + NEW]) == story for ids, story in zip(judged, judged_story, strict=True)]
    return classify, float(np.mean(right))
