"""Directions of the residual stream that need no SAE.

d = mean over positive vectors - mean over negative vectors        (DiffMean; AxBench, 2501.17148)
"""

import numpy as np
from jaxtyping import Bool, Float


def difference_of_means(
    vectors: Float[np.ndarray, "*n d"], positive: Bool[np.ndarray, "*n"], mask: Bool[np.ndarray, "*n"] | None = None
) -> Float[np.ndarray, "d"]:
    """The mean of the positive residual vectors less that of the others, float32 [d], in raw units.

    Args:
      vectors: [..., d]; sums are taken in float64, in blocks, so that bfloat16 of any number may come in.
      positive: [...], which vectors show what the direction shall stand for.
      mask: [...], the vectors that count: real tokens, and no sinks, which would drown all others.

    Raises:
      ValueError: shapes that do not fit, no vector of one kind, vectors that are not finite, or equal means.
    """
    positive, counted = np.asarray(positive, bool), np.ones(positive.shape, bool) if mask is None else np.asarray(mask)
    if vectors.ndim < 2 or vectors.shape[:-1] != positive.shape or counted.shape != positive.shape:
        raise ValueError(
            f"vectors {vectors.shape}, positive {positive.shape} and mask {counted.shape} do not fit; expected "
            "[..., d] and twice [...]"
        )
    yes, no = counted.astype(bool) & positive, counted.astype(bool) & ~positive
    if not yes.any() or not no.any():
        raise ValueError(f"a difference of means needs both kinds, found {yes.sum()} positive and {no.sum()} others")
    direction = _mean(vectors, yes) - _mean(vectors, no)
    if not np.isfinite(direction).all() or not direction.any():
        raise ValueError("the means are equal, or vectors are not finite: there is no direction between them")
    return direction.astype(np.float32)


def _mean(vectors, chosen: Bool[np.ndarray, "*n"], block: int = 4096) -> Float[np.ndarray, "d"]:
    total, rows = np.zeros(vectors.shape[-1]), np.flatnonzero(chosen)
    flat = vectors.reshape(-1, vectors.shape[-1])
    for start in range(0, len(rows), block):
        total += np.asarray(flat[rows[start : start + block]], np.float64).sum(axis=0)
    return total / len(rows)
