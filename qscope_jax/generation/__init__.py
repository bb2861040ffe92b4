"""Text from a backbone: batches on a device, how tokens are chosen, completions of many prompts, and their file."""

from qscope_jax.generation.batch import (
    GenerateOutput,
    Generation,
    Taps,
    Written,
    advance,
    bucket,
    finished,
    generate,
    pad_left,
    result,
    start,
    written,
)
from qscope_jax.generation.steps import make_steps

__all__ = [
    "GenerateOutput",
    "Generation",
    "Taps",
    "Written",
    "advance",
    "bucket",
    "finished",
    "generate",
    "make_steps",
    "pad_left",
    "result",
    "start",
    "written",
]
