"""Data sets that need no file: handwritten digits, and small problems that show what a network can learn.

Each function returns a `Dataset`. The generated sets hold out a fifth of their `n` rows as test rows and are a
function of their arguments: the same seed gives the same rows. X is float32.
"""

import gzip
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..random import Purpose, generator
from .checks import check_integer, check_number
from .dataset import Dataset
from .splits import split_indices

TEST_FRACTION = 0.2


def digits() -> Dataset:
    """Handwritten digits: 1797 images of 8 x 8 pixels with values 0..16, ten classes; 1437 to train on, 360 to test.

    The split is fixed and has the same share of every digit on both sides.

    Source: the test set of "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak 1998, UCI Machine
        Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY 4.0.
    """
    with gzip.open(Path(__file__).with_name("digits.csv.gz"), "rt", encoding="ascii") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)  # (1797, 65): pixels, then the digit
    X, y = np.ascontiguousarray(table[:, :64]), table[:, 64].astype(np.int64)
    train, test = split_indices(len(X), 360 / len(X), seed=0, stratify=y)
    return Dataset("digits", X[train], y[train], "classification", X[test], y[test], np.arange(10), image_shape=(8, 8))


def moons(n: int = 1000, noise: float = 0.1, seed: int = 0) -> Dataset:
    """Two half circles that reach into each other.

        (cos t, sin t) for class 0,    (1 - cos t, 1/2 - sin t) for class 1,    t uniform in [0, π]

    plus normal noise of standard deviation `noise`. Source: scikit-learn's make_moons.
    """
    rng = _generator(n, noise, seed)
    k = np.arange(n) % 2
    t = rng.uniform(0.0, np.pi, n)
    x1 = np.where(k == 0, np.cos(t), 1.0 - np.cos(t))
    x2 = np.where(k == 0, np.sin(t), 0.5 - np.sin(t))
    return _two_classes("moons", _noisy(x1, x2, noise, rng), k, seed)


def circles(n: int = 1000, noise: float = 0.05, seed: int = 0) -> Dataset:
    """A circle inside a circle: radius 1 for class 0, 1/2 for class 1, plus normal noise.

    Source: scikit-learn's make_circles.
    """
    rng = _generator(n, noise, seed)
    k = np.arange(n) % 2
    t = rng.uniform(0.0, 2.0 * np.pi, n)
    r = np.where(k == 0, 1.0, 0.5)
    return _two_classes("circles", _noisy(r * np.cos(t), r * np.sin(t), noise, rng), k, seed)


def spirals(n: int = 1000, noise: float = 0.02, seed: int = 0) -> Dataset:
    """Two spiral arms of one and a half turns, wound into each other.

        r (cos(3π r + π k), sin(3π r + π k)) for class k,    r = sqrt(u),    u uniform in [0, 1]

    plus normal noise; the root spreads the rows evenly along the arm. Source: after Lang & Witbrock 1988, "Learning to
    tell two spirals apart", whose arms have three turns.
    """
    rng = _generator(n, noise, seed)
    k = np.arange(n) % 2
    r = np.sqrt(rng.uniform(0.0, 1.0, n))
    t = 3.0 * np.pi * r + np.pi * k
    return _two_classes("spirals", _noisy(r * np.cos(t), r * np.sin(t), noise, rng), k, seed)


def xor(n: int = 1000, noise: float = 0.15, seed: int = 0) -> Dataset:
    """The exclusive or: clouds of normal noise around the corners of the unit square, class = x1 xor x2 of the corner.

    `xor(n=4, noise=0)` is the truth table, in the order 00, 01, 10, 11. Without noise all rows of a corner are equal,
    so there are no test rows. Source: Minsky & Papert 1969, "Perceptrons".
    """
    rng = _generator(n, noise, seed)
    x1, x2 = np.arange(n) // 2 % 2, np.arange(n) % 2
    X, k = _noisy(x1, x2, noise, rng), x1 ^ x2
    if noise == 0:
        return Dataset("xor", X, k, "classification", classes=np.arange(2))
    return _two_classes("xor", X, k, seed)


def sine(n: int = 1000, noise: float = 0.1, seed: int = 0) -> Dataset:
    """Regression on two periods of a sine: y = sin(2π x) + normal noise, x uniform in [-1, 1]."""
    rng = _generator(n, noise, seed)
    X = rng.uniform(-1.0, 1.0, (n, 1))
    y = np.sin(2.0 * np.pi * X) + noise * rng.standard_normal((n, 1))
    X, y = X.astype(np.float32), y.astype(np.float32)
    train, test = split_indices(n, TEST_FRACTION, seed=seed)
    return Dataset("sine", X[train], y[train], "regression", X[test], y[test])


BUILTIN: dict[str, Callable[[], Dataset]] = {
    "digits": digits,
    "moons": moons,
    "circles": circles,
    "spirals": spirals,
    "xor": xor,
    "sine": sine,
}


def _generator(n: int, noise: float, seed: int) -> np.random.Generator:
    check_integer(n, "n", 4)
    check_number(noise, "noise", 0.0, math.inf, "[)")
    return generator(seed=seed, purpose=Purpose.DATA)


def _noisy(x1: np.ndarray, x2: np.ndarray, noise: float, rng: np.random.Generator) -> np.ndarray:
    """Return the points (x1, x2), each (n,), plus normal noise as (n, 2) float32."""
    points = np.column_stack([x1, x2])
    return (points + noise * rng.standard_normal(points.shape)).astype(np.float32)


def _two_classes(name: str, X: np.ndarray, y: np.ndarray, seed: int) -> Dataset:
    train, test = split_indices(len(X), TEST_FRACTION, seed=seed, stratify=y)
    return Dataset(name, X[train], y[train], "classification", X[test], y[test], np.arange(2))
