"""Which features tell groups of texts (languages, topics) apart.

auroc:          P(score of a positive > score of a negative) + P(equal) / 2
monolinguality: nu_g = mean activation in group g - unweighted mean over the other groups   (Deng et al. 2025)
"""

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata


def auroc(scores: Float[np.ndarray, "n f"], positive: Bool[np.ndarray, "n"]) -> Float[np.ndarray, "f"]:
    """Area under the ROC curve of every column of scores as a test for `positive`; ties count half.

    Raises:
      ValueError: there is no positive or no negative row.
    """
    wins = int(positive.sum())
    losses = len(positive) - wins
    if not wins or not losses:
        raise ValueError(f"AUROC needs rows of both kinds, found {wins} positive and {losses} negative")
    ranks = rankdata(scores, axis=0)[positive].sum(axis=0)
    return (ranks - wins * (wins + 1) / 2) / (wins * losses)


def monolinguality(means: Float[np.ndarray, "g f"]) -> Float[np.ndarray, "g f"]:
    """nu of every group and feature, from the groups' mean activations over tokens.

    Raises:
      ValueError: fewer than two groups.
    """
    groups = len(means)
    if groups < 2:
        raise ValueError(f"monolinguality compares groups, found {groups}")
    others = (means.sum(axis=0) - means) / (groups - 1)
    return means - others


def firing_rates(
    values: Float[np.ndarray, "n k"], indices: Int[np.ndarray, "n k"], groups: Int[np.ndarray, "n"], d_sae: int
) -> Float[np.ndarray, "g f"]:
    """Share of each group's tokens on which each feature is active, from the code of n tokens and their groups."""
    rows = np.broadcast_to(groups[:, None], values.shape)
    counts = np.zeros((int(groups.max()) + 1, d_sae))
    used = values > 0
    np.add.at(counts, (rows[used], indices[used]), 1)
    return counts / np.maximum(np.bincount(groups, minlength=len(counts)), 1)[:, None]


def pool_max(
    values: Float[np.ndarray, "n k"], indices: Int[np.ndarray, "n k"], passages: Int[np.ndarray, "n"], d_sae: int
) -> Float[np.ndarray, "p f"]:
    """Largest activation of every feature in each passage, dense; for a few hundred passages."""
    pooled = np.zeros((int(passages.max()) + 1, d_sae), np.float32)
    np.maximum.at(pooled, (passages[:, None], indices), values)
    return pooled
