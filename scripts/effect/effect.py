"""What steering does to the embedded model, with its controls: the tables of README.

python scripts/effect/effect.py --corpus CACHE/corpus.jsonl --out DIR        (scripts/assets/build makes the corpus)

Features and strengths are chosen on other prompts than those reported. A quarter of an hour on two cores.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from amplify import amplify
from register import register
from setting import contrast, load
from suppress import suppress

LANGUAGES = ("zh", "ru", "ko")


def main() -> None:
    parser = argparse.ArgumentParser(description="What steering does to the embedded model.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parsed = parser.parse_args()
    setting = load(parsed.corpus)
    nu = contrast(setting)
    parsed.out.mkdir(parents=True, exist_ok=True)
    numbers, pages = {}, []
    trials: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        f"{what.__name__} {lang}": partial(what, setting, lang, nu)
        for what in (amplify, suppress)
        for lang in LANGUAGES
    }
    for name, trial in {**trials, "register": partial(register, setting)}.items():
        page, numbers[name] = trial()
        pages.append(f"## {name}\n\n{page}")
        print(pages[-1], flush=True)
        (parsed.out / "effect.json").write_text(json.dumps(numbers, indent=1, ensure_ascii=False) + "\n")
    (parsed.out / "effect.md").write_text("\n".join(pages))


if __name__ == "__main__":
    main()
