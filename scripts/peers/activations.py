"""Residual vectors on disk that every trainer reads alike: layer{n}.{split}.npy [tokens, d], the bits of bfloat16.

Needs NumPy only, so that each package reads them in its own environment.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

BATCH, WIDTH, K = 2048, 1536, 32  # tokens per step, latents, latents per token: the same for every trainer


class Activations:
    """A folder that `dump.py` wrote; rows come out as float32, exactly."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "facts.json").read_text())

    def rows(self, layer: int, split: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start..stop - 1 of one layer [n, d] in the order in which they are trained on."""
        return widen(np.load(self.folder / f"layer{layer}.{split}.npy", mmap_mode="r")[start:stop])

    def count(self, split: str) -> int:
        return self.facts[f"{split}_tokens"]


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 given as uint16 -> float32."""
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)
