"""Which rows train and which are held out; rows in batches. All of it a function of the seed."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..random import Purpose, permutation
from .checks import check_integer, check_number


def split_indices(
    n: int, fraction: float, *, seed: int, stratify: ArrayLike | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Divide n rows at random into training rows and round(fraction * n) held-out rows.

    With `stratify`, class k of c_k rows gets c_k / n of the held-out rows: first the whole part of its quota, then the
    rows that are left go to the largest remainders. Each class keeps at least one training row.

    Arguments:
        n: number of rows, at least 2.
        fraction: of the rows to hold out, in (0, 1).
        seed: the same seed gives the same split.
        stratify: (n,) labels of any dtype that sorts; None draws without regard to classes.

    Returns: (train, held_out), sorted int64 indices, together each of 0..n-1 once.

    Raises: ValueError for a fraction outside (0, 1), a length of `stratify` other than n, or too few rows for both
        sides.
    """
    n = check_integer(n, "n", 2)
    fraction = check_number(fraction, "fraction", 0.0, 1.0, "()")
    held = round(fraction * n)
    if held in (0, n):
        raise ValueError(
            f"fraction {fraction:g} of {n} rows holds out {held}; both sides need at least one row. "
            f"Use a fraction from {1 / n:.3g} to {1 - 1 / n:.3g}, or more rows"
        )
    order, counts = _by_class(n, seed, stratify)
    rank = np.arange(n) - np.repeat(np.cumsum(counts) - counts, counts)  # place of each row within its class
    is_held = np.empty(n, dtype=bool)
    is_held[order] = rank < np.repeat(_allocate(counts, held), counts)
    return np.flatnonzero(~is_held), np.flatnonzero(is_held)


def kfold_indices(
    n: int, folds: int, *, seed: int, stratify: ArrayLike | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return `folds` pairs (train, held_out) in which every row is held out once.

    Rows are dealt out like cards, class after class: fold sizes differ by at most one row, and with `stratify` so do
    the counts of each class. A class with a single row is missing from the training rows of the fold that holds it out.

    Arguments: as `split_indices`; folds from 2 to n.

    Returns: sorted int64 indices; train has the rows of the other folds.

    Raises: ValueError for a number of folds outside 2..n or a length of `stratify` other than n.
    """
    n = check_integer(n, "n", 2)
    folds = check_integer(folds, "folds", 2)
    if folds > n:
        raise ValueError(f"folds is {folds}; {n} rows allow at most {n}")
    order, _ = _by_class(n, seed, stratify)
    fold_of = np.empty(n, dtype=np.int64)
    fold_of[order] = np.arange(n) % folds
    return [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(folds)]


def _by_class(n: int, seed: int, stratify: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Return all rows in random order, sorted by class, and the number of rows of each class."""
    order = permutation(n, seed=seed, purpose=Purpose.SPLIT)
    if stratify is None:
        return order, np.array([n])
    labels = np.asarray(stratify)
    if labels.shape != (n,):
        raise ValueError(f"stratify has shape {labels.shape}; expected one label per row, shape ({n},)")
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return order[np.argsort(codes[order], kind="stable")], counts


def _allocate(counts: np.ndarray, held: int) -> np.ndarray:
    """Share `held` rows among classes by largest remainder, leaving at least one row of each."""
    n = int(counts.sum())
    if held > n - len(counts):
        raise ValueError(
            f"cannot hold out {held} of {n} rows and keep one row of each of {len(counts)} classes for training; "
            "use a smaller fraction, more rows or stratify=None"
        )
    shares = counts * held // n  # in integers: remainders must compare exactly
    left = held - int(shares.sum())
    while left:  # once, unless classes with one row to keep have no room
        room = np.flatnonzero(shares < counts - 1)
        remainders = counts[room] * held - shares[room] * n
        chosen = room[np.argsort(-remainders, kind="stable")[:left]]
        shares[chosen] += 1
        left -= len(chosen)
    return shares


def batches(
    X: ArrayLike,
    y: ArrayLike | None = None,
    *,
    batch_size: int,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
) -> Iterator[Any]:
    """Go once through the rows in batches, in the order that the trainer takes in this epoch.

    Arguments:
        X: (n_samples, n_features).
        y: (n_samples, ...) labels or targets, or None.
        batch_size: rows per batch, at least 1; the last batch holds what is left, unless `drop_last` leaves it out.
        seed, epoch: fix the order: permutation(n_samples, seed=seed, step=epoch).
        shuffle: False keeps the rows as they are; batches may then be views of X and y.

    Yields: (X_batch, y_batch), or X_batch alone without y. X_batch is float32, float64 where X is; y keeps its dtype.

    Raises: at the call, not at the first batch: ValueError for batch_size < 1, TypeError where it is no integer,
        ValueError for different lengths of X and y.
    """
    batch_size = check_integer(batch_size, "batch_size", 1)
    X, y = np.asarray(X), None if y is None else np.asarray(y)
    n = len(X)
    if y is not None and len(y) != n:
        raise ValueError(f"y has {len(y)} rows, X has {n}; they must have the same number")
    order = permutation(n, seed=seed, step=epoch) if shuffle else None
    dtype = np.float64 if X.dtype == np.float64 else np.float32

    def one_pass() -> Iterator[Any]:
        for start in range(0, n - batch_size + 1 if drop_last else n, batch_size):
            part = slice(start, start + batch_size)
            rows = part if order is None else order[part]
            X_batch = X[rows].astype(dtype, copy=False)
            yield X_batch if y is None else (X_batch, y[rows])

    return one_pass()
