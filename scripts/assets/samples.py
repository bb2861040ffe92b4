"""Continue short prompts in every language and count how often the text changes language on the way.

Every line of a sample is judged by its letters: Han, kana, Hangul, Cyrillic or Latin; a Latin line of at least six
words is judged further by the commonest words of the four languages.
"""

import re
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from packing import EOT
from tokenizers import Tokenizer

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.weights import Backbone

PROMPTS = {
    "en": ("To open a file", "The king looked at the old city.", "If you want to change the color,"),
    "zh": ("要打开文件", "国王看着古老的城市。", "如果您想要更改颜色，"),
    "ru": ("Чтобы открыть файл", "Король посмотрел на старый город.", "Если вы хотите изменить цвет,"),
    "ko": ("파일을 열려면", "왕은 오래된 도시를 바라보았다.", "색을 바꾸려면"),
    "ja": ("ファイルを開くには", "王は古い都を見つめていた。", "色を変更するには、"),
    "de": ("Um eine Datei zu öffnen", "Der König blickte auf die alte Stadt.", "Wenn Sie die Farbe ändern möchten,"),
    "fr": ("Pour ouvrir un fichier", "Le roi regarda la vieille ville.", "Si vous voulez changer la couleur,"),
    "es": ("Para abrir un archivo", "El rey miró la vieja ciudad.", "Si quiere cambiar el color,"),
}
COPIES, NEW_TOKENS, TEMPERATURE = 8, 96, 0.7
_LETTERS = {
    "kana": re.compile(r"[\u3040-\u30ff]"),
    "han": re.compile(r"[\u4e00-\u9fff]"),
    "hangul": re.compile(r"[\uac00-\ud7a3]"),
    "cyrillic": re.compile(r"[\u0400-\u04ff]"),
    "latin": re.compile(r"[A-Za-z\u00c0-\u024f]"),
}
_SCRIPTS = {"zh": ("han",), "ja": ("han", "kana"), "ko": ("hangul",), "ru": ("cyrillic",)}
_COMMON = {
    "en": "the of and is to you for with this that are it be can your if when or from",
    "de": "der die das und ist sie zu den wenn mit für ein eine nicht auf werden wird von im dem",
    "fr": "le les des et est vous pour dans qui sur avec du ce pas votre sont au cette ou",
    "es": "el los las del y es para con por su este esta al puede como lo más está",
}
_WORDS = {lang: set(words.split()) for lang, words in _COMMON.items()}


def generate(backbone: Backbone, tokenizer: Tokenizer, prompts: list[str], seed: int) -> list[str]:
    """Prompt and continuation as text, stopped at the end token; plain sampling that recomputes the whole row."""
    encoded = [tokenizer.encode(prompt).ids for prompt in prompts]
    lengths = jnp.array([len(ids) for ids in encoded])
    end, width = tokenizer.token_to_id(EOT), max(map(len, encoded)) + NEW_TOKENS
    tokens = np.full((len(prompts), width), end, np.int32)
    for row, ids in zip(tokens, encoded, strict=True):
        row[: len(ids)] = ids

    @jax.jit
    def one(params: Any, tokens: jax.Array, count: jax.Array, key: jax.Array) -> jax.Array:
        mask = jnp.arange(width) < count[:, None]
        logits = forward(params, backbone.config, tokens, mask=mask, logits="last").logits.astype(jnp.float32)
        chosen = jax.random.categorical(key, logits / TEMPERATURE)
        return jnp.where(jnp.arange(width) == count[:, None], chosen[:, None], tokens)

    tokens = jnp.asarray(tokens)
    for step, key in enumerate(jax.random.split(jax.random.key(seed), NEW_TOKENS)):
        tokens = one(backbone.params, tokens, lengths + step, key)
    texts = []
    for row, ids in zip(np.asarray(tokens), encoded, strict=True):
        new = row[len(ids) : len(ids) + NEW_TOKENS].tolist()
        kept = new[: new.index(end)] if end in new else new
        texts.append(tokenizer.decode([*ids, *kept]))
    return texts


def language_of(line: str) -> str | None:
    """The language of a line, "latin" where the Latin languages cannot be told apart, None without enough letters."""
    counts = {name: len(pattern.findall(line)) for name, pattern in _LETTERS.items()}
    if sum(counts.values()) < 8:
        return None
    if counts["kana"] + counts["han"] > 0.3 * sum(counts.values()):
        return "ja" if counts["kana"] > 0.1 * (counts["kana"] + counts["han"]) else "zh"
    for name, lang in (("hangul", "ko"), ("cyrillic", "ru")):
        if counts[name] > 0.3 * sum(counts.values()):
            return lang
    words = re.findall(r"[^\W\d_]+", line.lower())
    hits = {lang: sum(word in known for word in words) for lang, known in _WORDS.items()}
    first, second = sorted(hits.values(), reverse=True)[:2]
    return max(hits, key=lambda lang: hits[lang]) if first >= second + 2 else "latin"


def jumps(text: str, lang: str) -> bool:
    """Whether some line is in another language than the prompt's."""
    allowed = {None, lang} | ({"latin"} if lang in _WORDS else set())
    return any(language_of(line) not in allowed for line in text.split("\n"))


def jumps_at_newline(text: str, lang: str) -> bool:
    """Whether a line is in another language after a line that was in the prompt's."""
    lines = [found for line in text.split("\n") if (found := language_of(line)) not in (None, "latin")]
    return any(before == lang != after for before, after in pairwise(lines))


def has_alien_letters(text: str, lang: str) -> bool:
    """Whether a letter of a script that the language does not use stands anywhere; Latin is at home everywhere."""
    return any(_LETTERS[name].search(text) for name in _LETTERS if name not in ("latin", *_SCRIPTS.get(lang, ())))


def judge_samples(backbone: Backbone, tokenizer: Tokenizer) -> dict[str, Any]:
    """Counts of samples with a new line, a line in another language, a letter of an alien script; and examples."""
    prompts = [(lang, prompt) for lang, given in PROMPTS.items() for prompt in given]
    texts, langs = [], []
    for copy in range(COPIES):
        texts += generate(backbone, tokenizer, [prompt for _, prompt in prompts], copy)
        langs += [lang for lang, _ in prompts]
    jumped = [jumps(text, lang) for text, lang in zip(texts, langs, strict=True)]
    lines = ["\n" in text for text in texts]
    return {
        "samples": len(texts),
        "with_newline": sum(lines),
        "jump": sum(jumped),
        "jump_at_newline": sum(jumps_at_newline(text, lang) for text, lang in zip(texts, langs, strict=True)),
        "alien_letters": sum(has_alien_letters(text, lang) for text, lang in zip(texts, langs, strict=True)),
        "jumping": [text for text, wrong in zip(texts, jumped, strict=True) if wrong][:8],
        "examples": texts[: len(prompts)],
    }
