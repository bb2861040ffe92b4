"""What the mixing buffer is worth: held-out FVU of SAEs trained with buffers of 0, 1 and 8 batches, on the same rows.

    python scripts/mixing.py DATA.jsonl [--layers 1 3 5] [--tokens 524288] [--seeds 3] [--out FILE.json]

Everything else is alike: the rows and their order, what SAEs start from, the number of steps. With a buffer of n
batches the first n only fill it, so that those runs end n batches further on in the data.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.data.corpora import open_sources
from qscope_jax.data.feed import DocumentSource, open_feed
from qscope_jax.data.tokenizer import load_tokenizer
from qscope_jax.mesh import to_host
from qscope_jax.sae.loss import Objective
from qscope_jax.training.loop import Plan, Trainer
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group

ROWS, LENGTH, SHARDS = 8, 512, 8
WIDTH, K, RATE, AUX = 1536, 32, 5e-3, 96
BUFFERS = (0, 1, 8)
JUDGED = 16  # held-out batches


def plan_of(layers: tuple[int, ...], steps: int, seed: int, buffer: int) -> Plan:
    objective = Objective(WIDTH, K, aux_k=AUX, dead_after=100_000)
    group = Group(layers, objective, Schedule(RATE, steps, warmup=steps // 20))
    return Plan((group,), seed, ROWS, LENGTH, SHARDS, buffer)


def held_out_fvu(backbone: Backbone, sources: list[DocumentSource], plan: Plan, steps: int) -> list[float]:
    """Per layer, after training; the mean over held-out batches."""
    vocab, end = backbone.config.vocab_size, backbone.config.eos_token_ids[0]
    common = {"row_length": LENGTH, "rows": ROWS, "vocab_size": vocab, "end_token": end, "held_out": 0.05}
    feed = open_feed(sources, shards=SHARDS, seed=plan.seed, **common)
    begun = open_feed(sources, shards=SHARDS, seed=plan.seed, **common)
    first = [next(begun) for _ in range(16)]
    trainer = Trainer(backbone, plan)
    carried = trainer.fit(trainer.init(trainer.measure(first)), first[0])
    for number in range(plan.buffer):
        carried = trainer.fill(carried, next(feed), number)
    for _ in range(steps):
        carried, _ = trainer.step(carried, next(feed))
    looks = open_feed(sources, shards=1, seed=0, split="held-out", **common)
    judged = [to_host(trainer.judge(carried, next(looks))[0].fvu) for _ in range(JUDGED)]
    for opened in (feed, begun, looks):
        opened.close()
    return np.mean(judged, axis=0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 3, 5])
    parser.add_argument("--tokens", type=int, default=524_288)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("qscope-out/mixing.json"))
    given = parser.parse_args()
    backbone, steps = load_backbone("demo", dtype="float32"), given.tokens // (ROWS * LENGTH)
    sources = open_sources([given.data], vocab_size=backbone.config.vocab_size, tokenizer=load_tokenizer("demo"))
    given.out.parent.mkdir(parents=True, exist_ok=True)
    fvu: dict[str, list[list[float]]] = {str(buffer): [] for buffer in BUFFERS}
    for seed in range(given.seeds):
        for buffer in BUFFERS:
            begun = time.monotonic()
            plan = plan_of(tuple(given.layers), steps, seed, buffer)
            fvu[str(buffer)].append(held_out_fvu(backbone, sources, plan, steps))
            told = " ".join(f"{share:.4f}" for share in fvu[str(buffer)][-1])
            print(f"seed {seed}, buffer of {buffer}: {told} ({time.monotonic() - begun:.0f} s)", flush=True)
            given.out.write_text(json.dumps({"layers": given.layers, "steps": steps, "fvu": fvu}, indent=1) + "\n")
    print(f"| batches in the buffer | {' | '.join(f'layer {layer}' for layer in given.layers)} | over none |")
    print("|---" * (len(given.layers) + 2) + "|")
    none = np.array(fvu["0"])
    for buffer, seeds in fvu.items():
        per_layer = [statistics.mean(column) for column in zip(*seeds, strict=True)]
        ratio = float(np.mean(np.array(seeds) / none))
        print(f"| {buffer} | {' | '.join(f'{share:.4f}' for share in per_layer)} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
