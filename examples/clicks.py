"""Generated clicks with known probabilities, and a factorization machine that learns them.

The probability of a click is a function of hidden factors of the user, the item and the context.
The hidden factors are random numbers computed from the key, so every key has them and none are
stored. The AUC of the true probabilities is the best that any model could reach.

The model is a factorization machine (Rendle, 2010, https://doi.org/10.1109/ICDM.2010.127). Each key
has a row [w, v]: a weight and a vector of FACTORS numbers. A field is one of user, item, context.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIELDS = ("user", "item", "context")
FACTORS = 8  # length of v
CONTEXTS = 200

HIDDEN = 4  # length of a hidden vector
BIAS = -1.2
BIAS_STD = 0.7  # scale of the biases of user, item and context in the logit
MATCH_STD = 1.0  # scale of the inner product of user and item in the logit

Keys = NDArray[np.int64]
Rows = NDArray[np.float32]
Floats = NDArray[np.float64]


def scatter(numbers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply the finalizer of splitmix64 (Steele, Lea and Flood, 2014), a bijection of uint64."""
    mixed = numbers + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)))


def hidden(keys: Keys, count: int) -> Floats:
    """Return ``count`` standard normal numbers for each key, float64[n, count]; the same for equal
    keys (Box-Muller transform of hashes).
    """
    positions = np.arange(2 * count).astype(np.uint64)
    bits = scatter(scatter(keys.view(np.uint64)[:, None] + positions)) >> np.uint64(11)
    uniform = (bits.astype(np.float64) + 0.5) / 2.0**53
    radius = np.sqrt(-2 * np.log(uniform[:, :count]))
    return np.asarray(radius * np.cos(2 * np.pi * uniform[:, count:]))


def sigmoid(logits: NDArray[np.floating]) -> Floats:
    """Return the probability for each logit, as float64."""
    return np.asarray(1 / (1 + np.exp(-logits.astype(np.float64))))


def keys_of(field: str, numbers: NDArray[np.uint64], seed: int) -> Keys:
    """Return a random int64 key for each number (of a user, item or context).

    Equal arguments give equal keys; different fields and seeds give different keys.
    """
    space = np.array([seed * len(FIELDS) + FIELDS.index(field)], dtype=np.uint64)
    return np.asarray(scatter(scatter(numbers) ^ scatter(scatter(space))).view(np.int64))


def popular(generator: np.random.Generator, count: int, size: int) -> NDArray[np.uint64]:
    """Draw ``size`` ranks 0..count - 1, uint64[size], with probability about 1 / (rank + 1)."""
    ranks = np.exp(generator.random(size) * np.log(count + 1)) - 1
    return np.asarray(ranks.astype(np.uint64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A batch of n impressions (shown items, clicked or not)."""

    keys: dict[str, Keys]  # field: int64[n]
    clicks: Rows  # float32[n], 0 or 1
    truth: Floats  # float64[n], the true probability of each click


def probability(keys: dict[str, Keys]) -> Floats:
    """Return the true probability of each click, float64[n], from the hidden factors of its keys.

    keys  field: int64[n]
    """
    user, item = hidden(keys["user"], 1 + HIDDEN), hidden(keys["item"], 1 + HIDDEN)
    context = hidden(keys["context"], 1)
    match = np.sum(user[:, 1:] * item[:, 1:], axis=1) / np.sqrt(HIDDEN)
    biases = user[:, 0] + item[:, 0] + context[:, 0]
    return sigmoid(BIAS + BIAS_STD * biases + MATCH_STD * match)


def predict(rows: dict[str, Rows]) -> Floats:
    """Return the model's click probabilities, float64[n].

    rows  field: float32[n, 1 + FACTORS], the row [w, v] of each impression's key

    The logit is the sum of the w, plus the inner products of the v of each pair of fields. It needs
    no constant term, because the w of the context includes it.
    """
    stacked = np.stack([rows[field] for field in FIELDS])
    total = stacked.sum(axis=0)
    pairs = (total[:, 1:] ** 2 - (stacked[:, :, 1:] ** 2).sum(axis=0)).sum(axis=1) / 2
    return sigmoid(total[:, 0] + pairs)


def gradients(rows: dict[str, Rows], error: Rows) -> dict[str, Rows]:
    """Return the gradients of the logistic loss by the rows, field: float32[n, 1 + FACTORS].

    rows   field: float32[n, 1 + FACTORS], the row [w, v] of each impression's key
    error  float32[n], predicted probability - click

    The gradient by w is the error; by v it is the error times the sum of the other fields' v.
    Gradients of duplicate keys are not summed.
    """
    total = np.sum([rows[field] for field in FIELDS], axis=0)
    result = {}
    for field in FIELDS:
        by_logit = total - rows[field]
        by_logit[:, 0] = 1
        result[field] = by_logit * error[:, None]
    return result


def share(model: float, best: float) -> float:
    """Return the share of the possible AUC that a model reaches: 0 if it guesses, 1 if perfect.

    model, best  AUC of the model, and of the true probabilities
    """
    return (model - 0.5) / (best - 0.5)
