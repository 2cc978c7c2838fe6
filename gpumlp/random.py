"""Randomness as a function: every draw is computed from integers that say what it is for, and nothing is remembered.

    word w of a stream = word w % 4 of Philox4x64-10(key = (seed, purpose), counter = (w // 4 + 1, step, model, layer))

(Salmon, Moraes, Dror & Shaw 2011, Parallel random numbers: as easy as 1, 2, 3.) The first block's counter is 1, not 0,
because NumPy's own Philox, which computes the words here, counts before it draws; kernels/philox.cuh does the same and
gives the same words. So a stopped run needs integers only to go on, threads cannot change a result, and NumPy's global
random state is never touched.

Every function takes the same keywords, which name a stream: ``seed``, ``purpose`` (a Purpose), ``step``, ``model`` and
``layer``, integers from 0 to 2**64 - 1; anything else raises TypeError or ValueError. Words are read in order from the
first; a 32-bit lane is half a word, the low half first. What a stream holds is fixed for good: files and results depend
on it.
"""

import operator
import threading
from enum import IntEnum
from typing import Any

import numpy as np

Array = np.ndarray


class Purpose(IntEnum):
    """What a draw is for: the second half of the key, so draws for different purposes never meet.

    The numbers are fixed for good and stand in kernels/philox.cuh too. None is 0, so that a forgotten one shows.
    """

    WEIGHTS = 1
    SHUFFLE = 2
    DROPOUT = 3
    NOISE = 4
    MIXUP = 5
    SHIFT = 6
    SPLIT = 7
    DATA = 8


def words(n: int, *, seed: int, purpose: int, step: int = 0, model: int = 0, layer: int = 0) -> Array:
    """The first n raw 64-bit words of a stream, (n,) uint64; everything below is made of these."""
    return _engine.words(_check_count(n), seed, purpose, step, model, layer)


def generator(*, seed: int, purpose: int, step: int = 0, model: int = 0, layer: int = 0) -> np.random.Generator:
    """A NumPy Generator on a stream, for draws that the host alone makes, such as initial weights."""
    philox = np.random.Philox(key=0)
    philox.state = _engine.at(seed, purpose, step, model, layer)
    return np.random.Generator(philox)


def permutation(
    n: int, *, seed: int, purpose: int = Purpose.SHUFFLE, step: int = 0, model: int = 0, layer: int = 0
) -> Array:
    """A random order of 0 .. n-1, (n,) int64: the stable argsort of the stream's first n words."""
    drawn = words(n, seed=seed, purpose=purpose, step=step, model=model, layer=layer)
    order = np.argsort(drawn)  # five times as fast as a stable one, and the same where no two words are equal
    ascending = drawn[order]
    return np.argsort(drawn, kind="stable") if (ascending[1:] == ascending[:-1]).any() else order


def uniform(n: int, *, seed: int, purpose: int, step: int = 0, model: int = 0, layer: int = 0) -> Array:
    """Uniform draws u = ((word >> 12) + 1/2) / 2**52, (n,) float64, one word each: in (0, 1), never 0 and never 1."""
    return _unit_interval(words(n, seed=seed, purpose=purpose, step=step, model=model, layer=layer))


def normal(n: int, *, seed: int, purpose: int, step: int = 0, model: int = 0, layer: int = 0) -> Array:
    """Standard normal draws, (n,) float64, by Box & Muller (1958): elements 2i, 2i + 1 come from words 2i, 2i + 1.

    With u, v the uniforms of those words, element 2i is √(-2 log u) cos(2πv), element 2i + 1 √(-2 log u) sin(2πv).
    """
    u = _unit_interval(words(_check_count(n) + n % 2, seed=seed, purpose=purpose, step=step, model=model, layer=layer))
    radius = np.sqrt(-2.0 * np.log(u[0::2]))
    angle = (2.0 * np.pi) * u[1::2]
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)  # (n / 2, 2)
    return pairs.reshape(-1)[:n]


def integers(
    n: int, low: int, high: int, *, seed: int, purpose: int, step: int = 0, model: int = 0, layer: int = 0
) -> Array:
    """Integers low <= i < high, (n,) int64: low + (lane * (high - low) >> 32), one 32-bit lane each.

    The span high - low is at most 2**32; a value's probability is off by less than span / 2**32 of itself.
    Raises ValueError unless low < high <= low + 2**32.
    """
    span = operator.index(high) - operator.index(low)
    if not 0 < span <= 2**32:
        raise ValueError(f"low={low}, high={high} must be integers with low < high <= low + 2**32")
    lanes = _lanes(n, seed, purpose, step, model, layer)
    return ((lanes * np.uint64(span)) >> np.uint64(32)).astype(np.int64) + low


def keep_threshold(rate: float) -> int:
    """The integer that a 32-bit lane must reach for dropout to keep an element: rate * 2**32, rounded, below 2**32.

    Raises ValueError unless 0 <= rate < 1.
    """
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate={rate!r} must be at least 0 and below 1")
    return min(round(rate * 2**32), 2**32 - 1)


def dropout_scale(
    out: Array, rate: float, *, seed: int, step: int, model: int = 0, layer: int = 0, purpose: int = Purpose.DROPOUT
) -> Array:
    """Fill out with 0 (dropped) or 1 / (1 - rate) (kept), so that out * a keeps the mean of a.

    Element e, in memory order, is kept if and only if lane e of the stream reaches keep_threshold(rate). As the mask is
    a function of integers, the backward pass draws it again instead of storing it.

    Args:
        out: C-contiguous float32 or float64 array of any shape, one model's; overwritten.
        rate: the probability of dropping, 0 <= rate < 1.

    Returns:
        out.

    Raises:
        ValueError: rate out of range, or out not C-contiguous.

    Source: Srivastava et al. 2014, JMLR 15; scaled in training ("inverted"), so that prediction needs no factor.
    """
    threshold = keep_threshold(rate)
    if not out.flags.c_contiguous:
        raise ValueError("out must be C-contiguous; pass a contiguous buffer and copy it where it belongs")
    lanes = _lanes(out.size, seed, purpose, step, model, layer)
    np.greater_equal(lanes, threshold, out=out.reshape(-1))
    return np.multiply(out, 1.0 / (1.0 - float(rate)), out=out)  # a NumPy float64 would make this a float64 pass


def check_seed(seed: int) -> int:
    """The seed as an int. Raises TypeError unless it is an integer (no bool), ValueError unless 0 <= seed < 2**64."""
    return _check_word("seed", seed)


def _check_word(name: str, value: int) -> int:
    if type(value) is not int:  # the common case first: five of these precede each draw
        if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
            raise TypeError(f"{name}={value!r} must be an integer, not {type(value).__name__}")
        value = operator.index(value)
    if not 0 <= value < 2**64:
        raise ValueError(f"{name}={value} must be at least 0 and below 2**64")
    return value


def _check_count(n: int) -> int:
    if n < 0:
        raise ValueError(f"n={n} must be at least 0")
    return n


def _lanes(n: int, seed: int, purpose: int, step: int, model: int, layer: int) -> Array:
    """The first n 32-bit lanes of a stream: the halves of its words, low half first on every host."""
    pairs = _engine.words((_check_count(n) + 1) // 2, seed, purpose, step, model, layer)
    return pairs.astype("<u8", copy=False).view("<u4")[:n]


def _unit_interval(w: Array) -> Array:
    # 52 bits and a half, because 53 and a half would round to 1.0
    return ((w >> np.uint64(12)) + 0.5) * 2.0**-52


class _Engine(threading.local):
    """NumPy's Philox, one for each thread, set to a stream before each draw: that takes 2 µs, a new Philox 10."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.counter = np.zeros(4, np.uint64)
        self.key = np.zeros(2, np.uint64)
        self.state: Any = self.philox.state  # its buffer is used up, so the next word starts a block
        self.state["state"] = {"counter": self.counter, "key": self.key}

    def at(self, seed: int, purpose: int, step: int, model: int, layer: int) -> Any:
        """The state of a Philox that is about to draw word 0 of a stream."""
        self.key[0] = _check_word("seed", seed)
        self.key[1] = _check_word("purpose", purpose)
        self.counter[1] = _check_word("step", step)
        self.counter[2] = _check_word("model", model)
        self.counter[3] = _check_word("layer", layer)
        return self.state

    def words(self, n: int, *stream: int) -> Array:
        self.philox.state = self.at(*stream)
        return self.philox.random_raw(n)


_engine = _Engine()
