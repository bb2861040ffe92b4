"""`qscope steer`: recipes tried on prompts, beside controls or over a range of strengths, with what came of them.

report.json holds every arm's figures and texts, report.md the table; recipe.toml is the recipe, or with --sweep the
weakest one that reaches --until, bound to the model and the SAEs.
"""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from qscope_jax.analysis.text import language_shares, script_share
from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.tokenizer import make_encoder
from qscope_jax.features.concepts import text_sets
from qscope_jax.features.discovery import discover
from qscope_jax.features.files import check_statistics, statistics_of
from qscope_jax.files.atomic import write_json, write_text
from qscope_jax.files.hashes import hash_files
from qscope_jax.files.source import Source, resolve
from qscope_jax.jobs.opened import ARITHMETIC, Precision, chosen_layers, load_encoders, open_model
from qscope_jax.jobs.places import bind, model_files
from qscope_jax.jobs.recipes import SteerOptions, chosen_entries, load_needed
from qscope_jax.jobs.run import Run, devices, plain
from qscope_jax.sae.model import Sae
from qscope_jax.steering import Steer, describe, save_recipe
from qscope_jax.steering.controls import control_recipes
from qscope_jax.steering.units import Stats
from qscope_jax.trials import Outcome, Writing, try_recipes

PROMPTS = (
    "To open a file,", "The old king looked at the", "If you want to change the color of", "She crossed the river at",
    "Before you start, check that", "Select the layer that you want to", "The soldiers of the", "This option shows",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(SteerOptions):
    """Try a recipe, with its controls, or over strengths and layers."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Texts to go on from; by default eight beginnings of English sentences."""
    concept: str | None = None
    """Instead of --feature: the best feature of every layer for a set of texts that ships along, such as chinese."""
    layers: tuple[int, ...] = ()
    """Of --concept: the layers to look at; all by default."""
    controls: bool = False
    """Also try its controls: unsteered, identity, random features of equal norm, sign flipped, prompt alone."""
    random: int = 10
    """How many random recipes the control averages."""
    sweep: tuple[float, ...] = ()
    """Strengths to try in place of --strength, each feature by itself; the weakest that reaches --until is kept."""
    until: float = 0.8
    """With --sweep: the share of letters in --script to reach."""
    below: float | None = None
    """With --sweep, in place of --until: the share not to exceed, for recipes that take something away."""
    script: tuple[str, ...] = ()
    """Scripts whose share of letters counts, by their Unicode names, such as Han, Cyrillic, Hangul."""
    languages: tuple[str, ...] = ()
    """Languages to tell apart in what is written, by their codes, such as en zh ja."""
    model: str = "demo"
    """Backbone: "demo" (embedded), a folder, owner/name[@revision] on the hub, or a remote folder."""
    sae: str = "demo"
    """SAEs, likewise."""
    k: int | None = None
    """Features per token, where the SAE source does not say it (or says it wrong)."""
    out: Path = Path("qscope-out/steer")
    """Folder of report.json, report.md, recipe.toml and manifest.json."""

    max_new_tokens: int = 48
    """Tokens to write for every prompt; nothing ends a text earlier."""
    temperature: float = 0.3
    """Of sampling; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Keep the likeliest tokens up to this mass."""
    seed: int = 0
    """Of sampling, and of the random controls."""
    batch_rows: int = 64
    """Texts written at once."""
    precision: Precision = "parity"
    """The model in bfloat16, or in float32. SAEs are float32 in both."""


def run(config: Config) -> None:
    """Runs the command.

    Raises:
      ValueError, OSError: wrong input or options, named.
      FloatingPointError: a recipe drives the model to values that are not finite.
      Interrupted: SIGTERM or SIGINT came; nothing is kept, the same command begins anew.
    """
    _check(config)
    with Run("steer", config, config.out) as job:
        (model, _, tokenizer), source = open_model(config.model), resolve(config.sae, what="sae")
        backbone = load_backbone(model, dtype=ARITHMETIC[config.precision][0])
        stats = statistics_of(source, config.statistics)
        entries = _entries(config, backbone, tokenizer, model, source, stats)
        saes = load_needed(entries, source, config.k)
        check_statistics(stats, source, saes)
        trial = _Trial(config, job, backbone, tokenizer, saes, stats)
        found, kept = trial.sweep(entries) if config.sweep else trial.compare(entries)
        text = _table(found, [f"{entry.layer}:{entry.feature}" for entry in entries if entry.feature is not None])
        write_text(job.out / "report.md", text)
        write_json(job.out / "report.json", plain(trial.report(found, kept)))
        layers = tuple(sorted({entry.layer for entry in kept or () if entry.feature is not None}))
        if kept is not None:
            save_recipe(job.out / "recipe.toml", kept, trial.saes, bind(model, source, layers, k=config.k), stats=stats)
        hashes = {"model": hash_files(model_files(model))}
        job.record(counts={"arms": len(found), "prompts": len(trial.prompts)}, hashes=hashes, device=devices())
    print(text)
    print(_conclusion(config, kept, job.address))


def _check(config: Config) -> None:
    if bool(config.concept) + bool(config.steer or config.feature) != 1:
        raise ValueError("say what to steer: either --concept NAME, or --feature LAYER:INDEX and recipes with --steer")
    if config.sweep and config.steer:
        raise ValueError("--sweep tries strengths of single features; a recipe file has its own: leave one of them out")
    if (config.sweep or config.below is not None) and not config.script:
        raise ValueError("--sweep looks for a share of letters: say of which script, for example --script Han")
    for name, low in (("max_new_tokens", 3), ("batch_rows", 1), ("random", 1)):
        if getattr(config, name) < low:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected at least {low}")
    for name in ("until", "below"):
        if (share := getattr(config, name)) is not None and not 0 <= share <= 1:
            raise ValueError(f"--{name} {share}: a share lies in 0..1")
    script_share("", *config.script or ("Latin",))  # unknown ones are refused before any work
    language_shares([""], config.languages or ("en",))


def _entries(config: Config, backbone: Backbone, tokenizer: Any, model: Source, source: Source, stats) -> list[Steer]:
    """What the options name; of a concept the best feature of every layer."""
    if config.sweep:  # any strength: others take its place
        config = dataclasses.replace(config, strength=config.sweep[0])
    if config.concept is None:
        return chosen_entries(config, model, source, stats, k=config.k)
    sets, encoder = text_sets(config.concept), make_encoder(tokenizer)
    saes, norms = load_encoders(source, chosen_layers(config.layers, source), k=config.k)
    options: Any = {"permutations": 0, "row_norms": norms}  # the best features are used, not their p
    profile = discover(backbone, saes, encoder, sets.positive, sets.negative, **options).profile
    names = tuple(f"{one.layer}:{one.best.feature}" for one in profile)
    return chosen_entries(dataclasses.replace(config, feature=names), model, source, stats, k=config.k)


@dataclasses.dataclass(frozen=True)
class _Trial:
    config: Config
    job: Run
    backbone: Backbone
    tokenizer: Any
    saes: dict[int, Sae]
    stats: Stats | None

    @property
    def prompts(self) -> list[np.ndarray]:
        return make_encoder(self.tokenizer)(self.config.prompts or PROMPTS)

    def compare(self, entries: list[Steer]) -> tuple[dict[str, Outcome], list[Steer]]:
        """The recipe of all entries, and its controls if they are asked for, else the model left alone."""
        arms: dict[str, Sequence[Sequence[Steer]]] = {"recipe": [entries], "unsteered": [[]]}
        if self.config.controls:
            options = {"stats": self.stats, "seed": self.config.seed, "random": self.config.random}
            arms |= control_recipes(entries, self.saes, **options)
        return self._try(arms, entries), entries

    def sweep(self, entries: list[Steer]) -> tuple[dict[str, Outcome], list[Steer] | None]:
        """Every feature at every strength; with them the weakest recipe that does enough, and its controls."""
        config = self.config
        tried = {
            f"{entry.layer}:{entry.feature} at {strength:g} {entry.units}": [
                dataclasses.replace(entry, strength=strength)
            ]
            for entry in entries
            for strength in config.sweep
        }
        found = self._try({"unsteered": [[]], **{name: [recipe] for name, recipe in tried.items()}}, entries)
        enough = [name for name in tried if self._reached(found[name].share)]
        if not enough:
            return found, None
        kept = tried[min(enough, key=lambda name: self._effort(tried[name][0]))]
        return found | (self.compare(kept)[0] if config.controls else {}), kept

    def report(self, found: dict[str, Outcome], kept: list[Steer] | None) -> dict[str, Any]:
        nothing = lambda value: None if isinstance(value, float) and math.isnan(value) else value  # noqa: E731
        arms = {arm: {name: nothing(v) for name, v in outcome._asdict().items()} for arm, outcome in found.items()}
        facts = None if kept is None else describe(kept, self.saes, stats=self.stats)
        return {"recipe": facts, "prompts": list(self.config.prompts or PROMPTS), "arms": arms}

    def _reached(self, share: float) -> bool:
        return share <= self.config.below if self.config.below is not None else share >= self.config.until

    def _effort(self, entry: Steer) -> float:
        """How far an entry is from changing nothing, in median norms where these are known."""
        (facts,) = describe([entry], self.saes, stats=self.stats)
        if entry.mode == "scale":
            return abs(facts["raw"] - 1)
        length = facts["xnorm"] if facts["xnorm"] is not None else facts["raw"] * facts["norm"]
        # A clamp that takes away is the stronger, the lower it is.
        return -length if entry.mode == "clamp" and self.config.below is not None else abs(length)

    def _try(self, arms, entries: list[Steer]) -> dict[str, Outcome]:
        config = self.config
        writing = Writing(
            config.max_new_tokens, config.temperature, config.top_p, config.seed, (), config.script, config.languages,
            config.batch_rows,
        )  # fmt: skip
        rows = sum(map(len, arms.values())) * len(self.prompts)
        self.job.total = (self.job.total or 0) + rows

        def progress(rows: int, tokens: int) -> None:
            self.job.progress(texts=rows, tokens=tokens)
            if self.job.stopping:
                raise self.job.interrupted("nothing is kept of a trial", resumes=False)

        read = [(entry.layer, entry.feature) for entry in entries if entry.feature is not None]
        return try_recipes(
            self.backbone, self.tokenizer, self.saes, self.prompts, arms, stats=self.stats, features=read,
            writing=writing, progress=progress,
        )  # fmt: skip


def _table(found: dict[str, Outcome], features: list[str]) -> str:
    languages = sorted({name for outcome in found.values() for name in outcome.languages})
    read = (f"activation of {feature}" for feature in features)
    spoken = (name or "no letters" for name in languages)
    head = ["", "share", *spoken, "NLL", "KL", "distinct 3-grams", *read, "tokens changed"]
    rows = [
        [name, _number(o.share, 3), *(f"{o.languages.get(n, 0):.2f}" for n in languages), f"{o.nll:.2f}", f"{o.kl:.2f}",
         _number(o.distinct, 2), *(f"{a:.3g}" for a in o.read), f"{o.changed:.0f} of {o.selected:.0f}"]
        for name, o in found.items()
    ]  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]]) + "\n"


def _number(value: float, digits: int) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _conclusion(config: Config, kept: list[Steer] | None, folder: str) -> str:
    files = f"{folder}: report.json with all texts, report.md"
    if kept is None:
        return f"No recipe did enough; try other strengths or --mode. {files}"
    what = ", ".join(f"{e.mode} {e.layer}:{e.feature} {e.strength} {e.units}" for e in kept)
    return f"{'The weakest that does enough' if config.sweep else 'The recipe'}: {what}. {files}, recipe.toml"
