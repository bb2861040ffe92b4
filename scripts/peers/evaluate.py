"""One measure for all: held-out FVU and dead latents of every trained SAE, by `qscope_jax.sae.quality`.

    python scripts/peers/evaluate.py --acts FOLDER --saes FOLDER --out FOLDER

--saes holds one folder per trainer. Writes peers.json and peers.md: means over seeds per layer, and ours over the
better of the others. A latent is dead if it fires on none of the train tokens.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from activations import Activations
from safetensors.numpy import load_file

from qscope_jax.sae.model import Sae, SaeConfig, SaeParams
from qscope_jax.sae.quality import Quality, init_quality, summarize, update_quality

CHUNK = 4096
OURS = "qscope"

update = jax.jit(update_quality)


def measure(sae: Sae, acts: Activations, facts: dict[str, Any]) -> dict[str, float]:
    """FVU on the held-out tokens, and the share of latents that no train token fires.

    Raises:
      SystemExit: the package's own forward gave another FVU on the tokens it was asked about.
    """
    layer = sae.config.layer
    if "own_fvu" in facts:
        here = summarize(_fold(sae, acts, "heldout", facts["own_tokens"]))["fvu"]
        if abs(here / facts["own_fvu"] - 1) > 1e-5:
            raise SystemExit(f"layer {layer}: FVU {here:.7f} here, {facts['own_fvu']:.7f} by {facts['trainer']} itself")
    found = summarize(_fold(sae, acts, "heldout", acts.count("heldout")))
    dead = summarize(_fold(sae, acts, "train", facts["steps"] * facts["batch"], until_alive=True))["dead_fraction"]
    return {"fvu": found["fvu"], "l0": found["l0"], "dead": dead}


def _fold(sae: Sae, acts: Activations, split: str, count: int, *, until_alive: bool = False) -> Quality:
    """Everything seen on the first `count` tokens; with `until_alive` as many as it takes for every latent to fire."""
    quality = init_quality(sae.config)
    for start in range(0, count, CHUNK):
        quality = update(quality, sae, acts.rows(sae.config.layer, split, start, min(start + CHUNK, count)))
        if until_alive and start % (16 * CHUNK) == 0 and summarize(quality)["dead_fraction"] == 0:
            break
    return quality


def load(path: Path) -> tuple[Sae, dict[str, Any]]:
    facts, arrays = json.loads(path.with_suffix(".json").read_text()), load_file(path)
    params = SaeParams(*(jnp.asarray(arrays[name]) for name in SaeParams._fields))
    return Sae(params, SaeConfig(*params.w_enc.shape, facts["k"], facts["layer"])), facts


def table(records: list[dict[str, Any]]) -> str:
    """Markdown: one line per layer, FVU (dead %) of each trainer as the mean of its seeds, and the ratio."""
    trainers = sorted({r["trainer"] for r in records}, key=lambda name: name != OURS)
    lines = ["| layer | " + " | ".join(f"{t} FVU (dead %)" for t in trainers) + " | ours / best other |"]
    lines.append("|---" * (len(trainers) + 2) + "|")
    for layer in sorted({r["layer"] for r in records}):
        mean = partial(_mean, [r for r in records if r["layer"] == layer])
        fvu = {t: mean(t, "fvu") for t in trainers}
        cells = [f"{fvu[t]:.4f} ({100 * mean(t, 'dead'):.2f})" for t in trainers]
        others = [value for name, value in fvu.items() if name != OURS]
        ratio = f"{fvu[OURS] / min(others):.4f}" if OURS in fvu and others else ""
        lines.append(f"| {layer} | " + " | ".join(cells) + f" | {ratio} |")
    return "\n".join(lines) + "\n"


def _mean(records: list[dict[str, Any]], trainer: str, key: str) -> float:
    return float(np.mean([r[key] for r in records if r["trainer"] == trainer] or [np.nan]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("acts", "saes", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parsed = parser.parse_args()
    acts, records = Activations(parsed.acts), []
    for path in sorted(parsed.saes.glob("*/layer*.safetensors")):
        sae, facts = load(path)
        records.append({**facts, **measure(sae, acts, facts)})
        print(path.parent.name, path.stem, *(f"{key} {records[-1][key]:.5f}" for key in ("fvu", "dead")), flush=True)
    parsed.out.mkdir(parents=True, exist_ok=True)
    (parsed.out / "peers.json").write_text(json.dumps({"activations": acts.facts, "saes": records}, indent=1) + "\n")
    (parsed.out / "peers.md").write_text(table(records))
    print(table(records))


if __name__ == "__main__":
    main()
