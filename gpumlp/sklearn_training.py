"""How scikit-learn's MLP classes train, in the library's terms: the size of a loss, the end of a fit, the initial weights.

Its loss halves squared errors, and its gradient is of the sum over the outputs where ours is of their mean. ``Task`` holds
both factors; learning rate, epsilon, penalty and clipping go through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from .callbacks import Callback
from .losses import Loss
from .network import Network
from .trainer import Trainer

SKLEARN_ACTIVATIONS = {"identity", "logistic", "tanh", "relu"}  # whose initial weights are drawn as scikit-learn does
SMALLEST_RATE = 1e-6  # at which "adaptive" stops
LBFGS_FTOL = 2.220446049250313e-09  # scipy's: an iteration that lowers the loss by less than this share is the last


@dataclass(frozen=True)
class Task:
    """What the network fits, and how scikit-learn's loss relates to the library's."""

    loss: Loss
    outputs: int
    metric: str | None  # the score of validation; None is the loss itself, negated
    factor: float  # scikit-learn's loss = factor · ours
    slope: float  # scikit-learn's gradient = slope · ours


@dataclass(frozen=True)
class Rows:
    """Checked rows as the trainer reads them."""

    X: np.ndarray  # (n, n_features)
    y: np.ndarray  # (n,) labels or (n, n_outputs) targets
    weight: np.ndarray | None  # (n,)

    def __getitem__(self, rows: np.ndarray) -> Rows:
        return Rows(self.X[rows], self.y[rows], None if self.weight is None else self.weight[rows])

    def __len__(self) -> int:
        return len(self.X)


class Monitor(Callback):
    """Keeps an estimator's curves, and decides as scikit-learn does when a fit ends."""

    def __init__(self, estimator: Any, task: Task, train: Rows, penalty: float, score: Callable[[dict], float] | None):
        self.estimator, self.task, self.penalty, self.score = estimator, task, penalty, score
        self.offset = offset_of(task, train)
        self.n_samples, self.converged, self.out_of_calls = len(train), False, False
        self.best_weights: dict[str, Any] = {}

    def on_epoch_end(self, trainer: Trainer, record: dict[str, Any]) -> np.ndarray | None:
        e = self.estimator
        e.n_iter_ += 1
        e.loss_ = self.task.factor * record["loss"] + self.offset + self.penalty * squared_norm(trainer.network)
        if self.score is not None:
            score = self.score(record)
            e.validation_scores_.append(score)
            e.validation_loss_curve_.append(self.task.factor * record["val_loss"])
        self.converged = self._lbfgs(trainer) if e.solver == "lbfgs" else self._stochastic(trainer)
        return np.array([self.converged or self.out_of_calls])

    def _lbfgs(self, trainer: Trainer) -> bool:
        """scipy's rules: the largest element of the gradient, and the share by which the loss fell."""
        e, network = self.estimator, trainer.network
        memory = trainer.optimizer.bind(network).states
        value = self.task.factor * float(memory["value"][0])
        before, self.value = getattr(self, "value", np.inf), value
        gradient = self.task.slope * np.abs(network.backend.to_numpy(memory["gradient"])).max()
        e.loss_ = value + self.offset  # of the weights as they are now; the record's is of those before
        if self.task.factor != self.task.slope:  # the penalty is in units of the gradient
            e.loss_ += self.penalty * squared_norm(network) * (1 - self.task.factor / self.task.slope)
        if e.verbose:
            print(f"Iteration {e.n_iter_}, loss = {e.loss_:.8f}")
        still = np.isfinite(before) and before - value <= LBFGS_FTOL * max(abs(before), abs(value), 1.0)
        self.out_of_calls = e.n_iter_ + 1 >= e.max_fun  # at least one evaluation for each iteration, one before them
        return bool(gradient <= e.tol or still)

    def _stochastic(self, trainer: Trainer) -> bool:
        e = self.estimator
        e.t_ += self.n_samples
        e.loss_curve_.append(e.loss_)
        if e.verbose:
            print(f"Iteration {e.n_iter_}, loss = {e.loss_:.8f}")
        if self.score is not None:
            self._keep_best(trainer)
        no_better = e.loss_ > (np.inf if e.best_loss_ is None else e.best_loss_) - e.tol
        if e.early_stopping:
            no_better = e.validation_scores_[-1] < self.best_before + e.tol
        else:
            e.best_loss_ = min(e.best_loss_, e.loss_)
        e._no_improvement_count = e._no_improvement_count + 1 if no_better else 0
        if e._no_improvement_count <= e.n_iter_no_change:
            return False
        what = "Validation score" if e.early_stopping else "Training loss"
        message = f"{what} did not improve more than tol={e.tol:f} for {e.n_iter_no_change} consecutive epochs."
        rate = e.learning_rate_init * e._rate_factor
        adapts = e.solver == "sgd" and e.learning_rate == "adaptive"
        if adapts and rate > SMALLEST_RATE:
            e._rate_factor /= 5
            e._no_improvement_count = 0
            message += f" Setting learning rate to {rate / 5:f}"
        else:
            adapts = False
            message += " Stopping."
        if e.verbose:
            print(message)
        return not adapts

    def _keep_best(self, trainer: Trainer) -> None:
        e, score = self.estimator, self.estimator.validation_scores_[-1]
        if e.verbose:
            print(f"Validation score: {score:f}")
        self.best_before = e.best_validation_score_
        if score > e.best_validation_score_:
            e.best_validation_score_ = score
            if e.early_stopping:
                trainer.network.copy_weights(self.best_weights, np.ones(1, bool))


class Adaptive:
    """The factor that ``learning_rate="adaptive"`` has come to."""

    def __init__(self, estimator: Any) -> None:
        self.estimator = estimator

    def __call__(self, epoch: Any, epochs: int) -> np.ndarray:
        return np.array([self.estimator._rate_factor])

    def observe(self, values: np.ndarray) -> None:
        """Its presence has the trainer ask anew in every epoch."""


def inverse_scaling(power: float, n_samples: int, seen: int, incremental: bool) -> Callable:
    """1 / (t + 1) ** power, t the samples seen before the epoch; 1 in the first epoch of a fit."""

    def factor(epoch: Any, epochs: int) -> np.ndarray:
        whole = np.floor(np.asarray(epoch, np.float64))
        t = seen + whole * n_samples
        return np.where((whole == 0) & (not incremental), 1.0, (t + 1) ** -power)

    return factor


def squared_norm(network: Network) -> float:
    w = network.flat[:, : network.n_weights]
    return float(network.backend.dot(w, w)[0])


def offset_of(task: Task, rows: Rows) -> float:
    """What the Poisson deviance has beyond the loss, Σ y log y - y over outputs, which no weight of the network changes."""
    if task.loss.name != "poisson":
        return 0.0
    y = np.asarray(rows.y, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        own = np.where(y > 0, y * np.log(y) - y, 0.0).sum(axis=1)
    return float(np.average(own, weights=rows.weight))


def sklearn_weights(random_state: Any, sizes: Sequence[int], activations: list) -> list | None:
    """Weights and biases as scikit-learn draws them, uniform within √(6 / (fan_in + fan_out)) (2 for logistic).

    None where an activation is not one of its four: its layers take the library's initializers.
    """
    if not all(isinstance(f, str) and f in SKLEARN_ACTIVATIONS for f in activations):
        return None
    drawn = []
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        own = activations[min(i, len(activations) - 1)] if activations else "relu"
        bound = np.sqrt((2.0 if own == "logistic" else 6.0) / (fan_in + fan_out))
        W = random_state.uniform(-bound, bound, (fan_in, fan_out))
        drawn.append((W, random_state.uniform(-bound, bound, fan_out)))
    return drawn


def probabilities_if_one_class(y: np.ndarray, task: Task, dtype: np.dtype) -> np.ndarray:
    """Labels of one class only, which the trainer refuses as a mistake but partial_fit may bring, as probabilities."""
    if not task.loss.row.is_classifier or (y != y[0]).any():
        return y
    if y.ndim == 1:
        return np.eye(task.outputs, dtype=dtype)[y]
    y = y.astype(dtype)
    if task.outputs == 1:  # one step away from 0 or 1, which no loss can tell
        y[0] = np.finfo(dtype).tiny if y[0] == 0 else np.nextafter(dtype.type(1), dtype.type(0))
    return y
