"""A training run, texts in and metrics out, over its arithmetic alone: the bare forward pass and the bare step of all
SAEs, fed from memory. The difference is what reading, tokenising, packing, placing, mixing and telling cost.

Checkpoints and looks at held-out text, which come every hundreds of steps, are not in it.
"""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from qscope_kernels.dispatch import device_of

from qscope_jax.backbone.weights import Backbone, load_backbone
from qscope_jax.benchmarks.extract import random_documents
from qscope_jax.benchmarks.paired import paired, seconds
from qscope_jax.benchmarks.shapes import qwen3_1p7b, random_params
from qscope_jax.data.batches import Filled
from qscope_jax.data.corpora import open_sources
from qscope_jax.data.feed import Feed, open_feed
from qscope_jax.data.tokenizer import load_tokenizer
from qscope_jax.sae.loss import Objective
from qscope_jax.training.activations import make_collect, place_rows
from qscope_jax.training.loop import Plan, Trainer, buffer_batches
from qscope_jax.training.metrics import TrainLog
from qscope_jax.training.optimizer import Schedule
from qscope_jax.training.state import Group
from qscope_jax.training.step import make_train_step

_TOLD = 10  # steps between lines of the log, as by default
_SUITE = 500_000_000  # tokens


def bench_train(*, rounds: int) -> dict[str, Any]:
    """Time of a run over that of its arithmetic, below 1.1 where the goal is met, and what follows from its tokens/s.

    On a CPU for the embedded model and SAEs of all its layers; on an accelerator for all 28 layers of Qwen3-1.7B's
    shape at once, W32K, k = 50, 32,768 tokens a step, in bfloat16, with random weights.
    """
    if device_of().platform == "cpu":
        backbone = load_backbone("demo", dtype="float32")
        objective = Objective(1536, 32, aux_k=96, dead_after=100_000)
        found = {"embedded": compare(backbone, _plan(backbone, objective, rows=4), steps=10, rounds=rounds)}
    else:
        backbone = _released()
        objective = Objective(32_768, 50, aux_k=512, dtype=jnp.bfloat16, contract="fast")
        plan = _plan(backbone, objective, rows=64)
        found = {"1.7b, 28 layers": compare(backbone, plan, steps=10, rounds=max(5, rounds // 4), documents=40_000)}
    return found | {"hours": hours(found.get("1.7b, 28 layers"))}


def compare(backbone: Backbone, plan: Plan, *, steps: int, rounds: int, documents: int = 4000) -> dict[str, Any]:
    """Times `steps` steps of both in turns, each with a state of its own, and the parts of the bare one."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "texts.jsonl"
        data.write_text("".join(random_documents(documents, 5.0)), encoding="utf-8")
        feed = _open(backbone, plan, data)
        batches = [next(feed) for _ in range(steps)]
        trainer = Trainer(backbone, plan)
        log = TrainLog(Path(folder), plan, (), first=0)
        held = [trainer.init(trainer.measure(batches[:2]))]
        for number in range(plan.buffer):
            held[0] = trainer.fill(held[0], next(feed), number)

        def run() -> Any:
            for step in range(1, steps + 1):
                held[0], reports = trainer.step(held[0], next(feed))
                log.add(reports)
                if step % _TOLD == 0 or step == steps:
                    log.write(step)
            return held[0].train.step

        bare = Bare(backbone, plan, batches, held[0].train)
        result = paired(bare, run, rounds=rounds)
        tokens = steps * plan.batch_tokens
        forward = plan.batch_tokens / seconds(bare.forward, rounds=rounds)
        step = plan.batch_tokens / seconds(bare.step, rounds=rounds)
        log.close()
        feed.close()
    return {
        "what": "time of a run / of its forward passes and steps alone",
        "tokens_per_second": tokens / result["b_seconds"],
        "forward_tokens_per_second": forward,
        "step_tokens_per_second": step,
        "buffer": plan.buffer,
        **result,
    }


class Bare:
    """The arithmetic of a run on rows that lie on the device already: called, a step on each batch."""

    def __init__(self, backbone: Backbone, plan: Plan, batches: list[Filled], start: Any):
        self._params, self._batches = backbone.params, [place_rows(batch, None) for batch in batches]
        self._collect = make_collect(backbone.config, plan.layers)
        self._step = make_train_step(plan.groups, plan.layers)
        self._state = jax.tree.map(jnp.copy, start)
        self._seen = self.forward()

    def forward(self) -> Any:
        """The forward pass of one batch."""
        return self._collect(self._params, *self._batches[0])

    def step(self) -> Any:
        """The step of all SAEs on one batch."""
        self._state, reports = self._step(self._state, *self._seen)
        return reports

    def __call__(self) -> Any:
        before = None
        for batch in self._batches:
            self._state, reports = self._step(self._state, *self._collect(self._params, *batch))
            jax.block_until_ready(before)  # as a run does: one step is under way while the next one is prepared
            before = reports
        return self._state.step


def hours(measured: dict[str, Any] | None) -> dict[str, Any] | str:
    """Hours for all 28 layers over 0.5 billion tokens, computed from measured tokens/s; on a CPU none are stated."""
    device = device_of()
    if measured is None or device.platform == "cpu":
        return f"not stated: it takes tokens/s measured on the accelerator in question, and this is a {device.platform}"
    forward, step = (1 / measured[f"{name}_tokens_per_second"] for name in ("forward", "step"))
    return {
        "what": f"computed: 28 layers of Qwen3-1.7B, W32K, over {_SUITE:,} tokens on one {device.kind}",
        "from_parts": _SUITE * (forward + step) / 3600,
        "from_the_run": _SUITE / measured["tokens_per_second"] / 3600,
    }


def _plan(backbone: Backbone, objective: Objective, *, rows: int) -> Plan:
    """SAEs of all layers; rows of 512 tokens and the default buffer."""
    layers, params = tuple(range(backbone.config.num_layers)), backbone.params["embed"]
    group = Group(layers, objective, Schedule(1e-4, steps=1_000_000, decay=0))
    size = len(layers) * rows * 512 * params.shape[1] * params.dtype.itemsize
    return Plan((group,), 0, rows, 512, 4, buffer_batches(None, size, rows, 1))


def _released() -> Backbone:
    config = replace(qwen3_1p7b(28), precision="default")
    return Backbone(config, random_params(config, dtype=jnp.bfloat16))


def _open(backbone: Backbone, plan: Plan, data: Path) -> Feed:
    vocabulary = backbone.config.vocab_size
    sources = open_sources([str(data)], vocab_size=vocabulary, tokenizer=load_tokenizer("demo"))
    return open_feed(
        sources, row_length=plan.row_length, rows=plan.rows, shards=plan.shards, seed=plan.seed, vocab_size=vocabulary
    )
