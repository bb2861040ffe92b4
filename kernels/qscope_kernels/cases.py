"""The shapes that decide everything here: those of the 14 released SAE sets, which share seven (d, f, k)."""

from typing import NamedTuple


class Case(NamedTuple):
    """An SAE of f latents over vectors of d, of which k are active."""

    d: int
    f: int
    k: int

    @property
    def name(self) -> str:
        return f"d{self.d}-f{self.f}-k{self.k}"


RELEASED = (
    Case(2048, 32_768, 50),
    Case(2048, 32_768, 100),
    Case(2048, 131_072, 100),
    Case(4096, 65_536, 50),
    Case(4096, 65_536, 100),
    Case(5120, 81_920, 50),
    Case(5120, 81_920, 100),
)
