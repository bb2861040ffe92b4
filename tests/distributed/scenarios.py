"""What several processes do together. A scenario is a function of a folder that all processes run; see conftest.py.

python scenarios.py SCENARIO FOLDER SECONDS_OF_SILENCE [COORDINATOR PROCESSES PROCESS]
"""

import json
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from qscope_jax.backbone.forward import forward
from qscope_jax.backbone.tables import Piece
from qscope_jax.backbone.weights import load_backbone, save_backbone
from qscope_jax.data.batches import Filled
from qscope_jax.evaluate import evaluate_saes
from qscope_jax.generation import advance, finished, generate, result, start
from qscope_jax.mesh import finish_together, make_mesh, start_distributed, to_host
from qscope_jax.sae.formats import load_sae, load_saes, sae_sha256, save_sae
from qscope_jax.sae.model import decode, encode
from qscope_jax.training.checkpoint_folder import open_folder
from qscope_jax.training.checkpoints import Checkpoints

MESHES = {"within": (2, 4), "across": (1, 8)}  # weights split inside each process, or over both


def outcome(action) -> str:
    """The name of the error that an action ends with, and what it says."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "done"


def hello(folder: Path) -> None:
    """Who is there."""
    print(f"process {jax.process_index()} of {jax.process_count()}, {jax.device_count()} devices")


def sae(folder: Path) -> None:
    """Loads `sae/` over all devices, encodes and decodes `x.npy`, saves it again; and meets two faults."""
    x, results = np.load(folder / "x.npy"), {}
    for name, shape in MESHES.items():
        mesh = make_mesh(*shape)
        loaded = load_sae(folder / "sae", mesh=mesh)
        tokens = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data", None)))
        code = jax.jit(encode)(loaded, tokens)
        x_hat = jax.jit(decode)(loaded, code)
        gradient = jax.jit(jax.grad(lambda sae, x: jnp.sum((decode(sae, encode(sae, x)) - x) ** 2)))(loaded, tokens)
        arrays = {"values": code.values, "indices": code.indices, "x_hat": x_hat, **gradient.params._asdict()}
        results |= {f"{name}.{key}": to_host(array) for key, array in arrays.items()}
        results[f"{name}.sha256"] = np.array(sae_sha256(loaded))
        save_sae(loaded, folder / name)
    me = jax.process_index()
    np.savez(folder / f"results{me}.npz", **results)
    # Latents of process 1 hold a NaN, which process 0 does not read.
    read = outcome(lambda: load_sae(folder / "damaged", mesh=make_mesh(*MESHES["across"])))
    # A folder of other SAEs: only process 0 looks there.
    written = outcome(lambda: save_sae(loaded, folder / "others"))
    (folder / f"outcome{me}.txt").write_text(f"{read}\n{written}\n")


class Counted(np.ndarray):
    """A view of a file that adds up what is taken from it."""

    taken = 0

    def __getitem__(self, index):
        found = super().__getitem__(index)
        Counted.taken += found.nbytes
        return found


def loss(params, config, tokens):
    return jnp.sum(jax.nn.log_softmax(forward(params, config, tokens).logits)[..., 7])


def backbone(folder: Path) -> None:
    """Loads `model/` over all devices, runs it forward and backward on `tokens.npy`, and saves it again."""
    tokens, results, view = np.load(folder / "tokens.npy"), {}, Piece.view
    Piece.view = lambda self, stored: view(self, stored).view(Counted)
    for name, shape in MESHES.items():
        mesh, Counted.taken = make_mesh(*shape), 0
        loaded = load_backbone(folder / "model", dtype="float32", mesh=mesh)
        results[f"{name}.taken"] = np.array(Counted.taken)
        placed = jax.device_put(tokens, NamedSharding(mesh, PartitionSpec("data", None)))
        logits = jax.jit(forward)(loaded.params, loaded.config, placed).logits
        places = jax.tree.map(lambda leaf: leaf.sharding, loaded.params)
        gradient = jax.jit(jax.grad(loss), out_shardings=places)(loaded.params, loaded.config, placed)
        results |= {f"{name}.logits": to_host(logits)}
        results |= {f"{name}.{i}": to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(gradient))}
        save_backbone(loaded, folder / name)
    np.savez(folder / f"results{jax.process_index()}.npz", **results)


def write(folder: Path) -> None:
    """Continues `tokens.npy` with `model/` over all devices, in one call and token by token."""
    tokens, results = np.load(folder / "tokens.npy"), {}
    options = {"max_new_tokens": 6, "eos": (3,), "temperature": 1.0, "seeds": [1, 2, 3, 4]}
    for name, shape in MESHES.items():
        loaded = load_backbone(folder / "model", dtype="float32", mesh=make_mesh(*shape))
        out = generate(loaded.params, loaded.config, tokens, **options)
        begun = start(loaded.params, loaded.config, tokens, **options)
        while not finished(begun):
            begun = advance(begun, 1)
        results |= {f"{name}.tokens": out.tokens, f"{name}.logprobs": out.logprobs}
        results |= {f"{name}.streamed": result(begun).tokens}
    np.savez(folder / f"results{jax.process_index()}.npz", **results)


def evaluate(folder: Path) -> None:
    """Evaluates `sae/` on `model/`; each process brings its half of the rows of every batch in `batches.npz`."""
    mesh, me = make_mesh(4, 2), jax.process_index()
    backbone, saes = load_backbone(folder / "model", dtype="float32", mesh=mesh), load_saes(folder / "sae", mesh=mesh)
    arrays = np.load(folder / "batches.npz")
    half = len(arrays["mask"][0]) // 2
    rows = slice(me * half, (me + 1) * half)
    batches = [Filled(*(arrays[name][i, rows] for name in Filled._fields)) for i in range(len(arrays["mask"]))]
    found = evaluate_saes(backbone, saes, batches, sink_thresholds={0: 20.0, 1: 30.0}, predict_tokens=1)
    (folder / f"quality{me}.json").write_text(json.dumps(found))


def lose_process(folder: Path) -> None:
    """All add up numbers for ever; `victim` names the process that is lost on the way, and `how`."""
    mesh, victim, how = make_mesh(2, 4), int((folder / "victim").read_text()), (folder / "how").read_text()
    ones = jax.make_array_from_callback(
        (8,), NamedSharding(mesh, PartitionSpec(("data", "model"))), lambda index: np.ones(8, np.float32)[index]
    )
    total, steps = jax.jit(jnp.sum), 0
    while True:
        assert total(ones) == 8
        steps += 1
        if steps == 3 and jax.process_index() == victim:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("this one failed")


def loop() -> SimpleNamespace:
    """tests/training/loop.py; a script that is started by its path cannot import its neighbours."""
    return SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "training" / "loop.py")))


def checkpoints(folder: Path) -> None:
    """Trains over both processes with checkpoints, meets faults that only one process has, and comes back."""
    me, training, mesh = jax.process_index(), loop(), make_mesh(1, 8)
    training.run(folder, mesh, 6)
    outcomes = []
    with Checkpoints(folder / "checkpoints") as kept:
        state = training.first_state(mesh)
        for step, facts in [(9, {"me": me}), (9 + me, {})]:
            outcomes.append(outcome(lambda step=step, facts=facts: kept.save(step, state, facts)))
        local = state | {"n": jnp.zeros((), jnp.int32)}
        outcomes.append(outcome(lambda: kept.save(9, local, {})))
    (folder / f"own{me}").mkdir()
    outcomes.append(outcome(open_folder(folder / f"own{me}").check_shared))
    if me == 0:  # what only process 1 reads
        path = max((folder / "checkpoints" / "6" / "arrays" / "ocdbt.process_1" / "d").iterdir(), key=os.path.getsize)
        os.truncate(path, os.path.getsize(path) // 3)
    finish_together("damaged")
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        final = training.run(folder, mesh, 12)
    outcomes.append(str([str(one.message) for one in warned if "damaged" in str(one.message)]))
    np.savez(folder / f"results{me}.npz", **training.bits(final))
    (folder / f"outcome{me}.txt").write_text("\n".join(outcomes))


def lose_process_saving(folder: Path) -> None:
    """Trains over both processes; with a file `victim`, that process is killed while its second save is under way."""
    training, victim = loop(), folder / "victim"

    def on_save(step: int) -> None:
        if step == 6 and victim.exists() and int(victim.read_text()) == jax.process_index():
            os.kill(os.getpid(), signal.SIGKILL)

    final = training.run(folder, make_mesh(1, 8), 12, rows=4096, on_save=on_save)
    np.savez(folder / f"results{jax.process_index()}.npz", **training.bits(final))


if __name__ == "__main__":
    scenario, folder, silence, *flags = sys.argv[1:]
    coordinator, processes, process = (flags[0], *map(int, flags[1:])) if flags else (None, None, None)
    start_distributed(coordinator, processes, process, start_timeout=120, silence_timeout=int(silence))
    globals()[scenario](Path(folder))
