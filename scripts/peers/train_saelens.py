"""SAELens TopK on stored activations: its own SAETrainer, given an iterator over the batches.

python scripts/peers/train_saelens.py --acts FOLDER --out FOLDER [--layers 3] [--set 'trainer.lr=1e-3']
"""

import time
from collections.abc import Iterator
from importlib.metadata import version

import torch
from activations import BATCH, WIDTH, Activations, K
from release_form import arguments, fold, settings, steps_of, store
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer


def batches(x: torch.Tensor) -> Iterator[torch.Tensor]:
    """Endless, since the scale of the activations is measured on batches that training then passes over."""
    while True:
        yield from x.split(BATCH)


def main() -> None:
    parsed = arguments(__doc__.split("\n")[0], "saelens.toml")
    config, acts = settings(parsed), Activations(parsed.acts)
    steps = steps_of(parsed, acts, BATCH)
    decay = config.get("decay_share", 0.0)
    common = {"trainer": "saelens", "version": version("sae-lens"), "torch": torch.__version__, "k": K}
    for layer in parsed.layers:
        x = torch.from_numpy(acts.rows(layer, "train", 0, steps * BATCH))
        for seed in parsed.seeds:
            torch.manual_seed(seed)
            sae_config = TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=WIDTH, k=K, **config.get("sae", {}))
            sae = TopKTrainingSAE(sae_config)
            trainer_config = SAETrainerConfig(
                total_training_samples=steps * BATCH,
                train_batch_size_samples=BATCH,
                lr_decay_steps=int(steps * decay),
                # The scale is measured on whole passes, so that training starts with the first batch.
                n_batches_for_norm_estimate=steps,
                **{"lr_end": config["trainer"]["lr"] / 10, **config["trainer"]},  # as its runner's config sets it
            )
            start = time.time()
            SAETrainer(trainer_config, sae, batches(x)).fit()
            seconds = time.time() - start
            sae = sae.double().eval()
            norms = sae.W_dec.norm(dim=-1) if sae_config.rescale_acts_by_decoder_norm else torch.ones(WIDTH)
            p = fold(sae.W_enc * norms, sae.b_enc * norms, sae.W_dec / norms[:, None], sae.b_dec)
            facts = {**common, "layer": layer, "seed": seed, "steps": steps, "batch": BATCH, "config": config}
            facts |= {"lr": trainer_config.lr, "seconds": round(seconds, 1)}
            store(parsed.out / f"layer{layer}_seed{seed}", p, sae, acts, facts)


if __name__ == "__main__":
    main()
