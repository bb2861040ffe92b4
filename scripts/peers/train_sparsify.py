"""EleutherAI sparsify on stored activations: its own Trainer, given a model whose layers look the activations up.

    python scripts/peers/train_sparsify.py --acts FOLDER --out FOLDER [--layers 3] [--set 'lr=8e-3']

A sequence is one batch of token numbers, so that a step sees the tokens that the other trainers see in that step.
"""

import time
from importlib.metadata import version
from types import SimpleNamespace

import torch
from activations import BATCH, WIDTH, Activations, K
from release_form import arguments, fold, settings, steps_of, store
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer
from torch import nn


class StoredModel(nn.Module):
    """What the Trainer needs of a language model; layer n gives the stored residual vectors of the tokens asked for."""

    def __init__(self, acts: Activations, layers: list[int], tokens: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Identity() for _ in range(acts.facts["layers"]))
        self.stored = {n: torch.from_numpy(acts.rows(n, "train", 0, tokens)) for n in layers}
        self.config = SimpleNamespace(num_hidden_layers=acts.facts["layers"])
        self.device = torch.device("cpu")
        self.dummy_inputs = {"input_ids": torch.zeros((1, 2), dtype=torch.long)}

    @property
    def base_model(self) -> "StoredModel":
        return self

    def forward(self, input_ids: torch.Tensor) -> None:
        for n, acts in self.stored.items():
            self.layers[n](acts[input_ids])


def main() -> None:
    parsed = arguments(__doc__.split("\n")[0], "sparsify.toml")
    config, acts = settings(parsed), Activations(parsed.acts)
    steps = steps_of(parsed, acts, BATCH)
    rows = [{"input_ids": torch.arange(i * BATCH, (i + 1) * BATCH)} for i in range(steps)]
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=WIDTH, k=K),
        batch_size=1,
        layers=parsed.layers,
        init_seeds=parsed.seeds,
        save_every=10**9,
        save_dir=str(parsed.out / "own"),
        log_to_wandb=False,
        **config,
    )
    trainer = Trainer(cfg, rows, StoredModel(acts, parsed.layers, steps * BATCH))
    start = time.time()
    trainer.fit()  # ends with a save, of the averaged weights where the optimiser keeps an average
    seconds = (time.time() - start) / len(trainer.saes)
    common = {"trainer": "sparsify", "version": version("eai-sparsify"), "torch": torch.__version__, "k": K}
    for layer in parsed.layers:
        for seed in parsed.seeds:
            name = f"layers.{layer}/seed{seed}" if len(parsed.seeds) > 1 else f"layers.{layer}"
            sae = SparseCoder.load_from_disk(parsed.out / "own" / "unnamed" / name).double()
            p = fold(sae.encoder.weight.T, sae.encoder.bias, sae.W_dec, sae.b_dec)
            facts = {**common, "layer": layer, "seed": seed, "steps": steps, "batch": BATCH, "config": config}
            facts |= {"lr": trainer.optimizers[0].param_groups[0]["lr"], "seconds": round(seconds, 1)}
            own = lambda x, sae=sae: sae(x).sae_out  # noqa: E731
            store(parsed.out / f"layer{layer}_seed{seed}", p, own, acts, facts)


if __name__ == "__main__":
    main()
