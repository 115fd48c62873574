"""Generate a month of clicks on an unbounded, changing set of ids, with known probabilities.

Users and items are ranked by popularity. An impression draws place p = 0, 1, ... of the ranking
with a probability of about ``(p + FIRST)^-EXPONENT`` (Zipf's law with Mandelbrot's shift). The
ranking has no last place, so there are always new ids, and most ids occur once. The exponent is
close to that of public logs: of the 34 million values in Criteo's display advertising log, 0.91
million (2.7 %) occur ten times or more; here 2.9 % do. The shift limits the most popular id to 1 %
of the clicks.

An id keeps its place for two half-lives, then a new id takes the place. Places change ids at
different times, so after one half-life, half of the places have a different id. clicks.py computes
the click probabilities.
"""

from dataclasses import dataclass

import numpy as np
from clicks import CONTEXTS, Batch, Keys, keys_of, popular, probability, scatter
from numpy.typing import NDArray

LONG = ("user", "item")  # the fields with unbounded sets of ids

EXPONENT = 1.2
FIRST = 21
HALF_LIVES = {"user": 28, "item": 7}  # days
DAYS = 30
HELD_OUT = 3  # number of last days that are not learned from

Places = NDArray[np.uint64]  # bits of the places' numbers as float64, because numbers may be huge


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """Length of the stream."""

    steps: int  # per day
    batch: int  # impressions per step

    def __str__(self) -> str:
        impressions = DAYS * self.steps * self.batch
        return f"{impressions:,} impressions, {DAYS} days of {self.steps} steps of {self.batch:,}"


def draw(generator: np.random.Generator, size: int) -> Places:
    """Draw ``size`` places of the ranking, uint64[size]; the first places are the most probable."""
    tail = (1 - generator.random(size)) ** (-1 / (EXPONENT - 1)) - 1
    return np.floor(FIRST * tail).view(np.uint64)


class Stream:
    """A month of clicks with known probabilities; equal for equal seeds and scales.

    learnt  number of steps to learn from; the steps after them are held out
    steps   number of steps, including those that are held out
    """

    def __init__(self, seed: int, scale: Scale) -> None:
        self.scale = scale
        self.learnt = (DAYS - HELD_OUT) * scale.steps  # first step that is held out
        self.steps = DAYS * scale.steps
        self._seed = seed

    def ids(self, name: str, step: int) -> Keys:
        """Return the keys of field ``name`` ("user" or "item") at a step, int64[batch]."""
        generator = np.random.default_rng([self._seed, step, LONG.index(name)])
        return self._holders(name, draw(generator, self.scale.batch), step)

    def batch(self, step: int) -> Batch:
        """Return the impressions of a step, with their click probabilities and clicks."""
        generator = np.random.default_rng([self._seed, step, len(LONG)])
        contexts = popular(generator, CONTEXTS, self.scale.batch)
        keys = {name: self.ids(name, step) for name in LONG}
        keys["context"] = keys_of("context", contexts, self._seed)
        truth = probability(keys)
        clicks = (generator.random(self.scale.batch) < truth).astype(np.float32)
        return Batch(keys=keys, clicks=clicks, truth=truth)

    def _holders(self, name: str, places: Places, step: int) -> Keys:
        """Return the key of the id that each place has at a step, int64[n].

        name    field, "user" or "item"
        places  uint64[n]
        """
        mixed = scatter(places)
        phase = (mixed >> np.uint64(40)) / 2.0**24
        holder = phase + step / (2 * HALF_LIVES[name] * self.scale.steps)
        return keys_of(name, scatter(mixed + holder.astype(np.uint64)), self._seed)


@dataclass(frozen=True, slots=True)
class Seen:
    """The distinct keys of a field in the steps that are learned from, with their counts."""

    keys: Keys  # int64[n], ascending
    counts: NDArray[np.int64]  # [n]  occurrences of each key

    @classmethod
    def of(cls, stream: Stream, name: str) -> "Seen":
        """Count the keys of field ``name`` in a stream."""
        steps = [stream.ids(name, step) for step in range(stream.learnt)]
        return cls(*np.unique(np.concatenate(steps), return_counts=True))

    def at_least(self, occurrences: int) -> float:
        """Return the share of the keys with at least this many occurrences."""
        return float((self.counts >= occurrences).mean())
