"""Augmentation of a training batch on the device: noise, mixup, shifted images. Rows of a table, applied in order.

Each is a function of the model's seed and step, so that a run repeats and resumes bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from . import random
from .backends.base import Batch, Draw
from .data.checks import check_number
from .random import Purpose


@dataclass(frozen=True)
class GaussianNoise:
    """x ← x + σ n, n standard normal, after standardisation (Bishop 1995: training with noise is Tikhonov regularisation).

    Args:
        std: σ >= 0, in the units of the network's input.
    """

    std: float = 0.1
    before_scaling = False

    def __post_init__(self) -> None:
        check_number(self.std, "std", 0, np.inf, "[)")

    def apply(self, batch: Batch, draw: Draw) -> None:
        for x, seed, model, step in _models(batch.x, draw):
            noise = random.normal(x.size, seed=seed, purpose=Purpose.NOISE, step=step, model=model)
            x += (self.std * noise).reshape(x.shape).astype(x.dtype)


@dataclass(frozen=True)
class Mixup:
    """x ← λ x + (1 - λ) x', and the same for targets and weights, x' the batch's rows in reverse (Zhang et al. 2018).

    λ ~ Beta(alpha, alpha), one for each batch and model. Labels become probabilities.

    Args:
        alpha: strength > 0; 0.2 is usual for images.
    """

    alpha: float = 0.2
    before_scaling = False

    def __post_init__(self) -> None:
        check_number(self.alpha, "alpha", 0, np.inf, "()")

    def share(self, seed: int, model: int, step: int) -> float:
        """λ of one batch."""
        return random.generator(seed=seed, purpose=Purpose.MIXUP, step=step, model=model).beta(self.alpha, self.alpha)

    def apply(self, batch: Batch, draw: Draw) -> None:
        targets = batch.targets
        for i, (x, seed, model, step) in enumerate(_models(batch.x, draw)):
            share = self.share(seed, model, step)
            for part in (x, targets[i]) if batch.weights is None else (x, targets[i], batch.weights[i]):
                part[...] = share * part + (1 - share) * part[::-1]


@dataclass(frozen=True)
class RandomShift:
    """Move each image by up to ``pixels`` in each direction, the uncovered edge filled with zeros of the raw data.

    Args:
        pixels: largest shift, at least 1.
        image_shape: (rows, columns); rows · columns is the number of features.
    """

    pixels: int
    image_shape: tuple[int, int]
    before_scaling = True

    def __post_init__(self) -> None:
        shape = self.image_shape
        sizes = [self.pixels, *shape] if isinstance(shape, list | tuple) and len(shape) == 2 else [None]
        if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in sizes):
            raise ValueError(
                f"RandomShift(pixels={self.pixels!r}, image_shape={self.image_shape!r}): pixels must be an integer "
                "of at least 1 and image_shape (rows, columns)"
            )

    def apply(self, batch: Batch, draw: Draw) -> None:
        rows, columns = self.image_shape
        p, size = self.pixels, 2 * self.pixels + 1
        for x, seed, model, step in _models(batch.x, draw):
            moves = random.integers(2 * len(x), 0, size, seed=seed, purpose=Purpose.SHIFT, step=step, model=model)
            padded = np.zeros((len(x), rows + 2 * p, columns + 2 * p), x.dtype)
            padded[:, p : p + rows, p : p + columns] = x.reshape(-1, rows, columns)
            windows = np.lib.stride_tricks.sliding_window_view(padded, (rows, columns), axis=(1, 2))
            x[...] = windows[np.arange(len(x)), moves[::2], moves[1::2]].reshape(x.shape)


def _models(x: np.ndarray, draw: Draw):
    """Each model's rows with its seed, stream and step."""
    for rows, seed, stream, step in zip(x, draw.seeds, draw.streams, draw.steps, strict=True):
        yield rows, int(seed), int(stream), int(step)


def check_augmentation(augment: Any, network: Any) -> tuple:
    """The augmentations as a tuple. Raises TypeError and ValueError where one does not fit the network or its loss."""
    augment = tuple(augment) if isinstance(augment, list | tuple) else (augment,)
    if augment and network.code_sizes:
        raise ValueError(
            "augment changes numbers, and this network's rows hold codes of categories: leave augment out, or have the "
            "categories one-hot (TableEncoder(one_hot_limit=...))"
        )
    for row in augment:
        if not isinstance(row, GaussianNoise | Mixup | RandomShift):
            raise TypeError(f"augment holds {row!r}; allowed: GaussianNoise, Mixup, RandomShift")
        if isinstance(row, RandomShift) and row.image_shape[0] * row.image_shape[1] != network.n_features:
            raise ValueError(
                f"RandomShift has image_shape {row.image_shape}, {row.image_shape[0] * row.image_shape[1]} pixels, but "
                f"the network takes {network.n_features} features"
            )
    return augment
