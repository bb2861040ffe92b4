"""The 14 released SAE sets as data, and what a set's name tells: `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50`.

Table 1 of the report and the model cards; all weights are float32. Widths count in 1024s: W32K has 32,768 latents.
"""

import re
from typing import NamedTuple

_NAME = re.compile(r"SAE-Res-(?P<backbone>[A-Za-z0-9][A-Za-z0-9._-]*?)-W(?P<width>\d{1,7}K?)-L0_(?P<k>\d{1,6})")


class ReleasedSet(NamedTuple):
    """One repository of the release: one SAE per layer of its backbone, files `layer{n}.sae.pt`."""

    backbone: str
    layers: int
    d_model: int
    d_sae: int
    k: int
    mixture_of_experts: bool = False

    @property
    def name(self) -> str:
        return f"SAE-Res-{self.backbone}-W{self.d_sae // 1024}K-L0_{self.k}"

    @property
    def repo(self) -> str:
        return f"Qwen/{self.name}"

    @property
    def kind(self) -> str:
        """ "base" or "instruct": what the SAEs were trained on."""
        return "base" if self.backbone.endswith("-Base") else "instruct"

    @property
    def expansion(self) -> int:
        return self.d_sae // self.d_model

    @property
    def layer_bytes(self) -> int:
        """Float32 weights of one layer's file."""
        return 4 * (2 * self.d_model * self.d_sae + self.d_model + self.d_sae)

    @property
    def repo_bytes(self) -> int:
        return self.layers * self.layer_bytes


RELEASED: tuple[ReleasedSet, ...] = (
    ReleasedSet("Qwen3-1.7B-Base", 28, 2048, 32768, 50),
    ReleasedSet("Qwen3-1.7B-Base", 28, 2048, 32768, 100),
    ReleasedSet("Qwen3-8B-Base", 36, 4096, 65536, 50),
    ReleasedSet("Qwen3-8B-Base", 36, 4096, 65536, 100),
    ReleasedSet("Qwen3.5-2B-Base", 24, 2048, 32768, 50),
    ReleasedSet("Qwen3.5-2B-Base", 24, 2048, 32768, 100),
    ReleasedSet("Qwen3.5-9B-Base", 32, 4096, 65536, 50),
    ReleasedSet("Qwen3.5-9B-Base", 32, 4096, 65536, 100),
    ReleasedSet("Qwen3.5-27B", 64, 5120, 81920, 50),
    ReleasedSet("Qwen3.5-27B", 64, 5120, 81920, 100),
    ReleasedSet("Qwen3-30B-A3B-Base", 48, 2048, 32768, 50, mixture_of_experts=True),
    ReleasedSet("Qwen3-30B-A3B-Base", 48, 2048, 131072, 100, mixture_of_experts=True),
    ReleasedSet("Qwen3.5-35B-A3B-Base", 40, 2048, 32768, 50, mixture_of_experts=True),
    ReleasedSet("Qwen3.5-35B-A3B-Base", 40, 2048, 131072, 100, mixture_of_experts=True),
)


class SetName(NamedTuple):
    """What a set's name says; true of released sets and of sets named like them."""

    name: str
    backbone: str
    d_sae: int
    k: int

    @property
    def released(self) -> ReleasedSet | None:
        """The row of the table with this very name, if there is one."""
        return next((row for row in RELEASED if row.name == self.name), None)


def parse_name(text: str) -> SetName | None:
    """Reads backbone, width and k from a repository, folder or path name; None where it does not speak that language.

    A plain width is itself (W768); the caches' own spellings (`models--Qwen--...`, `3___5` for `3.5`) are understood.
    """
    found = _NAME.search(text.replace("___", "."))
    if found is None:
        return None
    width = found["width"]
    d_sae = 1024 * int(width[:-1]) if width.endswith("K") else int(width)
    return SetName(found[0], found["backbone"], d_sae, int(found["k"]))
