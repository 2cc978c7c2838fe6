"""The perceptron: one threshold unit, trained by Rosenblatt's rule. The ancestor of the networks in this package."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpumlp import random
from gpumlp.data.checks import check_X


def threshold(z: Any) -> np.ndarray:
    """The unit's output: 1 where z > 0, else 0 (so threshold(0) = 0); int64, in the shape of ``z``."""
    return (np.asarray(z) > 0).astype(np.int64)


class Perceptron:
    """A linear classifier for two classes, trained row by row, only on its mistakes.

        ŷ = threshold(w · x + b)
        w <- w + η (y - ŷ) x,   b <- b + η (y - ŷ)        for each row, in an order shuffled anew in each epoch

    It stops after an epoch without a mistake. On classes that a hyperplane separates with margin γ inside a ball of
    radius R (of the vectors (x, 1)) it makes at most (R / γ)² mistakes in all; on others (XOR) it never stops early.

    Args:
        learning_rate: η > 0. As w starts at 0 it scales w and b only: the predictions do not depend on it.
        epochs: passes over the rows at most, >= 1.
        seed: integer >= 0; decides the order of the rows.

    Attributes (after `fit`):
        w: weights, (n_features,) float64.
        b: bias, a float.
        classes: the two classes, sorted, (2,) in the dtype of ``y``; the second one is output 1.
        mistakes: mistakes made in each epoch, a list of int.
        converged: whether the last epoch had none.

    Raises:
        ValueError: for a setting outside these ranges.

    Source: Rosenblatt 1958; the bound: Novikoff 1962.
    """

    w: np.ndarray
    b: float
    classes: np.ndarray
    mistakes: list[int]
    converged: bool

    def __init__(self, learning_rate: float = 1.0, epochs: int = 100, seed: int = 0) -> None:
        if not isinstance(learning_rate, (int, float, np.number)) or not 0 < learning_rate < float("inf"):
            raise ValueError(f"learning_rate={learning_rate!r} must be a finite number > 0")
        if not isinstance(epochs, (int, np.integer)) or epochs < 1:
            raise ValueError(f"epochs={epochs!r} must be an integer >= 1")
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed={seed!r} must be an integer >= 0")
        self.learning_rate = learning_rate
        self.epochs = epochs
        self.seed = seed

    def fit(self, X: Any, y: Any) -> Perceptron:
        """Learns from the rows of X, (n_samples, n_features), and their classes y, (n_samples,): any two values.

        Starts anew at w = 0, b = 0. Returns the perceptron itself.

        Raises:
            ValueError: if X is not finite numbers of that shape, y has another length or not exactly two classes.
        """
        X = np.asarray(check_X(X), np.float64)
        y = np.asarray(y)
        if y.shape != (len(X),):
            raise ValueError(f"y of shape {y.shape} must be ({len(X)},): one class per row of X")
        classes, target = np.unique(y, return_inverse=True)
        if len(classes) != 2:
            shown = ", ".join(map(str, classes[:5].tolist())) + (", ..." if len(classes) > 5 else "")
            raise ValueError(
                f"y has {len(classes)} classes ({shown}); a perceptron tells exactly two apart (for more, use "
                "an MLP with a softmax output)"
            )
        self.classes, self.mistakes, self.converged = classes, [], False
        self.w, self.b = np.zeros(X.shape[1]), 0.0
        for epoch in range(self.epochs):
            mistakes = 0
            for i in random.permutation(len(X), seed=self.seed, step=epoch):
                error = int(target[i]) - int(self.w @ X[i] + self.b > 0)  # y - ŷ: -1, 0 or 1
                if error:
                    self.w += self.learning_rate * error * X[i]
                    self.b += self.learning_rate * error
                    mistakes += 1
            self.mistakes.append(mistakes)
            if not mistakes:
                self.converged = True
                break
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Returns z = X w + b, (n_samples,) float64: positive on the side of ``classes[1]``.

        Raises:
            ValueError: if X is not finite numbers, (n_samples, n_features).
            RuntimeError: before `fit`.
        """
        if not hasattr(self, "w"):
            raise RuntimeError("this Perceptron has learned nothing yet; call fit(X, y) first")
        return np.asarray(check_X(X, n_features=len(self.w)), np.float64) @ self.w + self.b

    def predict(self, X: Any) -> np.ndarray:
        """Returns the class of each row of X, (n_samples,) in the dtype of the ``y`` of `fit`; raises as above."""
        output = threshold(self.decision_function(X))
        return self.classes[output]
