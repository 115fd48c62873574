"""The measure of quality of the examples."""

import numpy as np
from numpy.typing import ArrayLike


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the ROC curve: how often a positive outscores a negative, ties half.

    labels  [n]  0 or 1, both present
    scores  [n]  any monotone function of the probability

    This is the rank-sum formula of Mann and Whitney (1947). Equal scores share the mean of their
    ranks.
    """
    positive = np.asarray(labels) > 0
    _, inverse, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    hits = int(positive.sum())
    misses = len(positive) - hits
    if not hits or not misses:
        raise ValueError(f"AUC needs both classes, got {hits} positive and {misses} negative")
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))
