"""Compute the AUC, the measure of quality in the examples."""

import numpy as np
from numpy.typing import ArrayLike


def auc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the area under the ROC curve: the probability that a random positive sample has a
    higher score than a random negative one; equal scores count half.

    labels  [n]  0 or 1; raises ValueError unless both occur
    scores  [n]  predictions: larger means more likely positive

    Uses the rank-sum formula of Mann and Whitney (1947), with mean ranks for equal scores.
    """
    positive = np.asarray(labels) > 0
    _, inverse, counts = np.unique(np.asarray(scores), return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    hits = int(positive.sum())
    misses = len(positive) - hits
    if not hits or not misses:
        raise ValueError(f"AUC needs both classes, got {hits} positive and {misses} negative")
    return float((ranks[positive].sum() - hits * (hits + 1) / 2) / (hits * misses))
