"""Our trainer on stored activations: the step that `qscope train-sae` takes, all layers at once, batch by batch.

python scripts/peers/train_ours.py --acts FOLDER --out FOLDER [--layers 3] [--set 'rate=1e-2']
"""

import argparse
import json
import time
import tomllib
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from activations import BATCH, WIDTH, Activations, K
from safetensors.numpy import save_file

from qscope_jax.sae.loss import Objective
from qscope_jax.sae.quality import sink_threshold
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group, Norms, SaeState, TrainState, folded, init_group
from qscope_jax.training.step import TrainStep, make_fit, make_train_step

SAMPLE = 65_536  # tokens that the mean, the scale and the sink threshold are measured on


def norms_of(acts: Activations, layers: Sequence[int]) -> Norms:
    means, scales, sinks = [], [], []
    for layer in layers:
        x = acts.rows(layer, "train", 0, SAMPLE).astype(np.float64)
        sinks.append(sink_threshold(np.linalg.norm(x, axis=-1)))
        means.append(x.mean(axis=0))
        scales.append(np.sqrt(np.mean(np.square(x - means[-1]))))
    return Norms(*(jnp.asarray(np.stack(part), jnp.float32) for part in (means, scales, sinks)))


def group_of(config: dict[str, Any], layers: Sequence[int], steps: int) -> Group:
    aux = {name: config[name] for name in ("aux_k", "aux_weight", "dead_after")}
    schedule = Schedule(config["rate"], steps, warmup=config["warmup"], decay=config["decay"])
    return Group(tuple(layers), Objective(WIDTH, K, **aux), schedule, clip=config["clip"])


def train(step: TrainStep, saes: SaeState, acts: Activations, group: Group) -> SaeState:
    state, mask, steps = TrainState(jnp.zeros((), jnp.int32), (saes,)), jnp.ones(BATCH, bool), group.schedule.steps
    fit = make_fit([group], group.layers)
    for i in range(steps):
        x = np.stack([acts.rows(layer, "train", i * BATCH, (i + 1) * BATCH) for layer in group.layers])
        if i == 0:
            state = fit(state, x, mask)
        state, reports = step(state, x, mask)
        if (i + 1) % 100 == 0:
            print(f"step {i + 1}/{steps} FVU {np.asarray(reports[0].batch.fvu).round(4)}", flush=True)
    return state.groups[0]


def store(folder: Path, group: Group, saes: SaeState, facts: dict[str, Any]) -> None:
    for place, layer in enumerate(group.layers):
        weights = jax.tree.map(lambda a, place=place: a[place], saes.weights)
        mean, scale = np.asarray(saes.norms.mean[place], np.float64), float(saes.norms.scale[place])
        params = folded(weights, mean, scale)._asdict()
        path = folder / f"layer{layer}_seed{facts['seed']}"
        arrays = {name: np.ascontiguousarray(array, np.float32) for name, array in params.items()}
        save_file(arrays, path.with_suffix(".safetensors"))
        path.with_suffix(".json").write_text(json.dumps({**facts, "layer": layer}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--acts", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path(__file__).parent / "configs" / "ours.toml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a TOML line over the config")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 3, 4, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=0, help="0: as many as the activations give")
    parsed = parser.parse_args()
    parsed.out.mkdir(parents=True, exist_ok=True)
    config = tomllib.loads(parsed.config.read_text())
    for line in parsed.set:
        config.update(tomllib.loads(line))
    acts = Activations(parsed.acts)
    group = group_of(config, parsed.layers, parsed.steps or acts.count("train") // BATCH)
    norms, step = norms_of(acts, group.layers), make_train_step([group], group.layers)
    facts = {"trainer": "qscope", "version": version("qscope-jax"), "jax": jax.__version__, "k": K, "batch": BATCH}
    for seed in parsed.seeds:
        start = time.time()
        saes = init_group(group, norms, seed, mesh=None, model_axis="latents")
        saes = train(step, saes, acts, group)
        facts |= {"seed": seed, "steps": group.schedule.steps, "config": config, "lr": config["rate"]}
        facts |= {"seconds": round((time.time() - start) / len(group.layers), 1)}
        store(parsed.out, group, saes, facts)


if __name__ == "__main__":
    main()
