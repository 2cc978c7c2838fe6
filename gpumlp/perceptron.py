"""The perceptron: threshold units, trained by Rosenblatt's rule. The ancestor of the networks in this package.

The rule is NumPy alone; its manners are those of scikit-learn 1.9's class of the same name (the extra ``sklearn``).
"""

from __future__ import annotations

import warnings
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context  # type: ignore
from sklearn.exceptions import ConvergenceWarning  # type: ignore
from sklearn.utils import check_random_state  # type: ignore
from sklearn.utils._param_validation import Interval, StrOptions  # type: ignore
from sklearn.utils.class_weight import compute_class_weight  # type: ignore
from sklearn.utils.multiclass import _check_partial_fit_first_call, check_classification_targets  # type: ignore
from sklearn.utils.validation import check_is_fitted, validate_data  # type: ignore

from gpumlp import random
from gpumlp.data.checks import check_sample_weight

AHEAD = 1 << 17  # elements of X that are tried together at most: 1 MiB, which stays in a cache


def threshold(z: Any) -> np.ndarray:
    """The unit's output: 1 where z > 0, else 0 (so threshold(0) = 0); int64, in the shape of ``z``."""
    return (np.asarray(z) > 0).astype(np.int64)


def rosenblatt(
    X: np.ndarray, y: np.ndarray, eta: np.ndarray, w: np.ndarray, b: float, fit_intercept: bool
) -> tuple[np.ndarray, float, int, float]:
    """One unit's epoch: from row to row, and a step at each mistake.

        for each i:  if y_i (w · x_i + b) <= 0:  w <- w + η_i y_i x_i,  b <- b + η_i y_i

    Between two mistakes w and b stand still. So the rows ahead are tried together, four times as far as the last mistake
    was away, and those behind the first mistake among them are tried anew: the answer is that of row by row.

    Args:
        X: the rows in their order, (n_samples, n_features) float64.
        y: (n_samples,) float64, -1 or 1.
        eta: the size of the step at each row, (n_samples,) float64; a row of 0 teaches nothing and is no mistake.
        w, b: weights, (n_features,) float64, and bias; not changed.
        fit_intercept: whether b learns.

    Returns:
        w, b, the number of mistakes, and the sum of the perceptron's loss max(0, -y_i (w · x_i + b)) over the rows, each
        with the w and b that it met.

    Source: Rosenblatt 1958.
    """
    w, step, mistakes, loss = w.copy(), eta * y, 0, 0.0
    most = max(1, AHEAD // X.shape[1])
    start, ahead = 0, 1
    while start < len(X):
        rows = slice(start, start + ahead)
        yz = y[rows] * (X[rows] @ w + b)
        right = yz > 0
        first = int(right.argmin())
        if right[first]:  # then all are
            start, ahead = start + ahead, min(2 * ahead, most)
            continue
        i = start + first
        loss -= float(yz[first])
        if step[i]:
            w += step[i] * X[i]
            b += float(step[i]) * fit_intercept
            mistakes += 1
        start, ahead = i + 1, min(4 * (first + 1), most)
    return w, b, mistakes, loss


_AT_LEAST_ONE = Interval(Integral, 1, None, closed="left")


class Perceptron(ClassifierMixin, BaseEstimator):
    """A linear classifier, trained row by row, only on its mistakes.

        z = w · x + b,   ŷ = threshold(z)
        w <- w + η y x,   b <- b + η y        for each row with y z <= 0, y = -1 or 1, in a new order in each epoch

    Several classes have one unit each, which tells its class from the rest; the largest z decides. A unit stops after an
    epoch without a mistake. On classes that a hyperplane separates with margin γ inside a ball of radius R (both of the
    vectors (x, 1), all rows weighing the same) a unit that starts at 0 makes at most (R / γ)² mistakes in all. On others
    (XOR) it never has such an epoch; ``tol`` ends that.

    Parameters and defaults are those of scikit-learn 1.9's Perceptron, less its penalties, which Rosenblatt's rule does not
    have, early stopping and ``n_jobs``. Without shuffling the coefficients are its own, in float64 whatever X is, but for
    sparse X: there it slows b down a hundred times, and this class does not.

    Args:
        fit_intercept: whether b learns; otherwise it stays where it starts, at 0.
        max_iter: largest number of epochs of ``fit``.
        tol, n_iter_no_change: a unit stops after that many epochs in a row whose mean loss max(0, -y z) is above the best
            so far less tol. With None only an epoch without a mistake, or max_iter, ends a fit.
        shuffle: a new order in every epoch; it is the library's own, so that numbers differ from scikit-learn's.
        verbose: print each epoch's mistakes and mean loss.
        eta0: η > 0. Where w and b start at 0 it scales them and the loss, which tol is compared with, and nothing else.
        random_state: decides the orders.
        class_weight: None, "balanced" or {label: weight}, which multiplies η at the rows of a class. Of several classes
            only a unit's own class is weighted, not the rest, as in scikit-learn.
        warm_start: a further ``fit`` goes on from the present weights.

    Attributes:
        coef_: the weights, (1, n_features) for two classes, else (n_classes, n_features); float64.
        intercept_: the biases, (1,) or (n_classes,) float64.
        classes_: the classes, sorted; of two, the second one is output 1.
        mistakes_: mistakes in each epoch of ``fit``, a list of int, summed over the units; ``partial_fit`` adds its own.
        converged_: whether every unit's last epoch had none.
        n_iter_: epochs of the last call, those of the unit that took longest.
        t_: 1 + the rows seen in the epochs of ``mistakes_``, counted once for all units.
        n_features_in_, feature_names_in_: as scikit-learn's.

    Raises:
        ValueError: parameters out of range, when ``fit`` is called.

    Source: Rosenblatt 1958; the bound: Novikoff 1962.
    """

    _parameter_constraints: dict = {  # noqa: RUF012
        "fit_intercept": ["boolean"],
        "max_iter": [_AT_LEAST_ONE],
        "tol": [Interval(Real, 0, None, closed="left"), None],
        "shuffle": ["boolean"],
        "verbose": ["verbose"],
        "eta0": [Interval(Real, 0, None, closed="neither")],
        "random_state": ["random_state"],
        "n_iter_no_change": [_AT_LEAST_ONE],
        "class_weight": [dict, StrOptions({"balanced"}), None],
        "warm_start": ["boolean"],
    }

    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray
    mistakes_: list[int]
    converged_: bool
    n_iter_: int
    t_: int

    def __init__(
        self, *, fit_intercept=True, max_iter=1000, tol=1e-3, shuffle=True, verbose=0, eta0=1.0, random_state=0,
        n_iter_no_change=5, class_weight=None, warm_start=False,
    ):  # fmt: skip
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.shuffle = shuffle
        self.verbose = verbose
        self.eta0 = eta0
        self.random_state = random_state
        self.n_iter_no_change = n_iter_no_change
        self.class_weight = class_weight
        self.warm_start = warm_start

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, coef_init: Any = None, intercept_init: Any = None, sample_weight: Any = None
    ) -> Perceptron:
        """Learn from the rows of X and their classes y.

        Args:
            X: (n_samples, n_features), dense or sparse; a sparse X is made dense as a whole.
            y: (n_samples,), at least two classes.
            coef_init, intercept_init: where to start, in the shapes of ``coef_`` and ``intercept_`` (for two classes also
                (n_features,) and a number); None is 0, or with ``warm_start`` the present weights.
            sample_weight: (n_samples,), not negative; multiplies η.

        Returns:
            The estimator.

        Raises:
            ValueError, TypeError: data or parameters that do not fit; the message says which and what is allowed.
        """
        again = self.warm_start and hasattr(self, "coef_")
        X, y = self._check_data(X, y, reset=not again)
        check_classification_targets(y)
        classes = np.unique(y)
        if again and not np.array_equal(classes, self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. "
                f"Previously got {self.classes_}, `y` has {classes}"
            )
        coef, intercept = (self.coef_, self.intercept_) if again else _zeros(classes, X)
        coef, intercept = _start(coef_init, coef, "coef_init"), _start(intercept_init, intercept, "intercept_init")
        weight = _checked_weight(sample_weight, len(X))
        self.classes_, self.coef_, self.intercept_ = classes, coef, intercept
        self.mistakes_, self.t_ = [], 1
        if self._train(X, y, weight, self.max_iter) and self.tol is not None:
            message = (
                "Maximum number of iteration reached before convergence. Consider increasing "
                f"max_iter={self.max_iter} to improve the fit, or scaling X."
            )
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        return self

    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Perceptron:
        """Train for one epoch on these rows; the first call needs all ``classes``. Errors as in ``fit``."""
        if self.class_weight == "balanced":
            raise ValueError("class_weight='balanced' counts all rows, which partial_fit does not see; give a dict")
        first = not hasattr(self, "coef_")
        X, y = self._check_data(X, y, reset=first)
        _check_partial_fit_first_call(self, classes)
        if not (y == self.classes_[:, None]).any(axis=0).all():
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {np.unique(y)}."
            )
        weight = _checked_weight(sample_weight, len(X))
        if first:
            self.coef_, self.intercept_ = _zeros(self.classes_, X)
            self.mistakes_, self.t_ = [], 1
        self._train(X, y, weight, 1)
        return self

    def _check_data(self, X: Any, y: Any, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64, order="C", reset=reset)
        return (X.toarray() if hasattr(X, "toarray") else X), y

    def _train(self, X: np.ndarray, y: np.ndarray, weight: np.ndarray, max_iter: int) -> bool:
        """Epochs until every unit has stopped; returns whether max_iter ended them before."""
        n, units = len(X), len(self.coef_)
        by_class = compute_class_weight(self.class_weight, classes=self.classes_, y=y)
        of_the_rest = by_class[0] if units == 1 else 1.0
        positive = y == self.classes_[-units:, None]  # (units, n_samples); of two classes, the second
        Y = np.where(positive, 1.0, -1.0)
        eta = self.eta0 * (np.where(positive, by_class[-units:, None], of_the_rest) * weight)
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        tol = -np.inf if self.tol is None else self.tol

        coef, intercept = self.coef_.copy(), self.intercept_.copy()
        counts: list[int] = []
        best, no_better = np.full(units, np.inf), np.zeros(units, int)
        loss, mistakes, running = np.zeros(units), np.zeros(units, int), np.ones(units, bool)
        while running.any() and len(counts) < max_iter:
            seen = self.t_ - 1 + len(counts) * n  # another number in every epoch, also of partial_fit
            order = random.permutation(n, seed=seed, step=seen) if self.shuffle else slice(None)
            rows, now = X[order], np.flatnonzero(running)
            for k in now:
                with np.errstate(over="ignore", invalid="ignore"):
                    coef[k], intercept[k], mistakes[k], loss[k] = rosenblatt(
                        rows, Y[k, order], eta[k, order], coef[k], float(intercept[k]), self.fit_intercept
                    )
                if not (np.isfinite(coef[k]).all() and np.isfinite(intercept[k] + loss[k])):
                    raise ValueError(
                        f"the weights are no longer finite after epoch {len(counts) + 1}; scale X, for example with "
                        f"StandardScaler, or lower eta0={self.eta0!r}"
                    )
            counts.append(int(mistakes[now].sum()))
            if self.verbose:
                print(f"Epoch {len(counts)}, mistakes = {counts[-1]}, loss = {loss[now].sum() / n:.8f}")
            no_better = np.where(loss / n > best - tol, no_better + 1, 0)
            best = np.minimum(best, loss / n)
            running &= (mistakes > 0) & (no_better < self.n_iter_no_change)
        self.coef_, self.intercept_ = coef, intercept
        self.mistakes_, self.converged_ = self.mistakes_ + counts, not mistakes.any()
        self.n_iter_ = len(counts)
        self.t_ += len(counts) * n
        return bool(running.any())

    def decision_function(self, X: Any) -> np.ndarray:
        """z = X w + b of each unit, (n_samples, n_classes) float64; of two classes (n_samples,), positive for the second.

        Raises ValueError, NotFittedError.
        """
        check_is_fitted(self, "coef_")
        X = validate_data(self, X, accept_sparse="csr", dtype=np.float64, reset=False)
        z = X @ self.coef_.T + self.intercept_  # (n_samples, units)
        return z[:, 0] if z.shape[1] == 1 else z

    def predict(self, X: Any) -> np.ndarray:
        """The class of each row, (n_samples,) in the dtype of ``classes_``. Raises ValueError, NotFittedError."""
        z = self.decision_function(X)
        return self.classes_[threshold(z) if z.ndim == 1 else z.argmax(axis=1)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


def _zeros(classes: np.ndarray, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of the units that these classes take. Raises ValueError for less than two classes."""
    if len(classes) < 2:
        raise ValueError(f"y has one class only, {classes[0]}; a perceptron takes at least two classes")
    units = 1 if len(classes) == 2 else len(classes)
    return np.zeros((units, X.shape[1])), np.zeros(units)


def _start(given: Any, present: np.ndarray, name: str) -> np.ndarray:
    """What is given, in the shape of what is present. Raises ValueError for another shape, NaN or infinity."""
    if given is None:
        return present
    value = np.asarray(given, np.float64)
    allowed = (present.shape, present.shape[1:]) if len(present) == 1 else (present.shape,)
    if value.shape not in allowed or not np.isfinite(value).all():
        shapes = " or ".join(map(str, allowed))
        raise ValueError(f"{name} of shape {value.shape} must be finite numbers of shape {shapes}")
    return value.reshape(present.shape)


def _checked_weight(sample_weight: Any, n: int) -> np.ndarray:
    return np.ones(n) if sample_weight is None else check_sample_weight(sample_weight, n, np.float64)
