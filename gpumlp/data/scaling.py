"""Standardisation: features with mean 0 and standard deviation 1."""

from collections.abc import Iterator

import numpy as np

from .checks import BLOCK_BYTES

CONSTANT = 1e-7  # a column whose deviation is below this part of its mean is rounding noise of float32, not information
TINY = float(np.finfo(np.float32).tiny)  # below this 1/std overflows float32


def standardization(
    X: np.ndarray, rows: np.ndarray | None = None, mode: str = "columns"
) -> tuple[np.ndarray, np.ndarray]:
    """Return shift and scale such that (X - shift) * scale has mean 0 and standard deviation 1.

        shift_j = mean_j,    scale_j = 1 / std_j,    std_j² = 1/n Σ_i (x_ij - mean_j)²

    A constant column gets its value as shift and scale 1: it becomes 0. A column whose std is below 1e-7 |mean| holds
    the rounding noise of float32 rather than information: it gets scale 0.

    Arguments:
        X: (n_samples, n_features), any bool, integer or float dtype, finite (see `check_X`).
        rows: (n,) indices of the training rows, or a bool mask; None uses all. Take these from the training rows
            alone: statistics of held-out rows would leak into the model.
        mode: "columns", each column by itself; or "global", one mean and one std over all columns, which is right for
            images, where columns are one quantity and a pixel that is nearly always 0 must not be blown up.

    Returns: shift and scale, each (n_features,) float32. They are computed in float64 with two passes over blocks of
        rows: about 2 MB of temporaries whatever the size of X.

    Raises: ValueError for an unknown mode, for X that is not two-dimensional, for no rows, and for
        columns whose mean or deviation float32 cannot hold.

    Source: two-pass variance with compensation, Chan, Golub & LeVeque 1983, "Algorithms for Computing the Sample
        Variance", The American Statistician 37, equation 1.7.
    """
    if mode not in ("columns", "global"):
        raise ValueError(f"mode is {mode!r}; it must be 'columns' or 'global'")
    if X.ndim != 2 or X.shape[1] == 0:
        raise ValueError(f"X has shape {X.shape}; expected (samples, features)")
    if rows is not None:
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows
    n = len(X) if rows is None else len(rows)
    if n == 0:
        raise ValueError("there are no rows to take mean and deviation from; at least one is needed")

    with np.errstate(over="ignore", invalid="ignore"):  # beyond float32 there is an error below
        mean, variance = _mean_and_variance(X, rows, n)
    beyond = ~(np.maximum(np.abs(mean), np.sqrt(variance)) <= np.finfo(np.float32).max)
    if beyond.any():
        raise ValueError(f"column {np.argmax(beyond)} of X has a mean or deviation beyond float32; scale it first")
    first = X[0 if rows is None else rows[0]].astype(np.float64)

    if mode == "global":
        overall = mean.mean()
        variance = np.full_like(variance, (variance + (mean - overall) ** 2).mean())
        mean = np.full_like(mean, overall)
        first = np.full_like(first, first[0])
    std = np.sqrt(variance)
    constant = std <= np.maximum(CONSTANT * np.abs(mean), TINY)
    noise = constant & (std > 2 * np.spacing(np.abs(first)))
    std[constant] = 1.0
    shift = np.where(constant, first, mean)  # a mean may miss the constant by one rounding
    return shift.astype(np.float32), np.where(noise, 0.0, 1.0 / std).astype(np.float32)


def _mean_and_variance(X: np.ndarray, rows: np.ndarray | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both of each column of the n chosen rows, (n_features,) float64."""
    mean, total, squares = np.zeros((3, X.shape[1]))
    for block in _blocks(X, rows):
        mean += np.ones(len(block)) @ block  # (features,): BLAS sums columns faster than block.sum(axis=0)
    mean /= n
    for block in _blocks(X, rows):
        block -= mean
        total += np.ones(len(block)) @ block
        squares += np.einsum("ij,ij->j", block, block)
    variance = np.maximum(squares - total**2 / n, 0.0) / n  # the total would be 0 without rounding
    return mean + total / n, variance


def _blocks(X: np.ndarray, rows: np.ndarray | None) -> Iterator[np.ndarray]:
    """Yield the chosen rows as fresh float64 blocks."""
    n = len(X) if rows is None else len(rows)
    step = max(1, BLOCK_BYTES // (8 * X.shape[1]))
    for start in range(0, n, step):
        part = slice(start, start + step)
        yield X[part if rows is None else rows[part]].astype(np.float64)
