"""Writes the SAE files of tests/goldens/sae with torch, so that reading torch's own bytes is tested without torch.

    python scripts/make_sae_goldens.py

The values follow a formula that tests repeat (`golden_values`), exact in float32, float16 and bfloat16.
"""

import collections
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parents[1] / "tests" / "goldens" / "sae"
D_MODEL, D_SAE = 6, 10


def golden_values(shape: tuple[int, ...], start: int) -> np.ndarray:
    """Small integers over 64: at most six significant bits."""
    count = int(np.prod(shape))
    return (((np.arange(start, start + count) * 37) % 101 - 50) / 64).astype(np.float32).reshape(shape)


def release_tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The four tensors in the release's shapes."""
    shapes = {"W_enc": (D_SAE, D_MODEL), "W_dec": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "b_dec": (D_MODEL,)}
    return {
        name: torch.from_numpy(golden_values(shape, i * 1000)).to(dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }


def main() -> None:
    """Writes one file per way in which torch may lay the same tensors out."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(release_tensors(torch.float32), FOLDER / "layer0.sae.pt")
    half = release_tensors(torch.float16)
    half["W_enc"] = half["W_enc"].T.contiguous().T
    torch.save(collections.OrderedDict(half), FOLDER / "layer1.sae.pt")
    brain = release_tensors(torch.bfloat16)
    torch.save({name: t.T.contiguous().T if t.ndim == 2 else t for name, t in brain.items()}, FOLDER / "layer2.sae.pt")
    full = release_tensors(torch.float32)
    shared = torch.cat([full["b_dec"], full["b_enc"]])  # both biases in one storage, one of them at an offset
    full |= {"b_dec": shared[:D_MODEL], "b_enc": shared[D_MODEL:]}
    torch.save(full, FOLDER / "layer3.sae.pt")


if __name__ == "__main__":
    main()
