"""Loss and metrics of a network on data, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .fit_data import scaled_targets
from .losses import Loss, output_values
from .metrics import Metric

if TYPE_CHECKING:
    from .network import Network


class Evaluation:
    """Loss and metrics of a network on certain rows, as often as they are asked for.

    Args:
        X, y, weight: checked arrays, as ``Trainer`` prepares them: y (n,) labels or (n, n_outputs) targets.
    """

    def __init__(
        self, network: Network, loss: Loss, metrics: list[Metric], X: Any, y: np.ndarray, weight: np.ndarray | None
    ) -> None:
        self.network, self.loss, self.metrics, self.X, self.y, self.weight = network, loss, metrics, X, y, weight

    def run(self) -> dict[str, np.ndarray]:
        """Name → (models,) values: the loss and every metric, of the network as it is now."""
        network, loss, y, weight = self.network, self.loss, self.y, self.weight
        z, rows = self.passes()
        by_class = loss.class_weight_of(y, network.n_outputs)  # in the loss as in training, but in no metric
        own = by_class if weight is None else weight if by_class is None else weight * by_class
        found = {"loss": np.average(rows, axis=1, weights=own)}
        for metric in self.metrics:
            found[metric.name] = np.array(
                [metric.f(*_sides(network, loss, metric, z, y, i), weight) for i in range(network.models)]
            )
        return found

    def release(self) -> None:
        """Give back what ``run`` keeps for its next time."""

    def passes(self) -> tuple[np.ndarray, np.ndarray]:
        """Logits (models, n, n_outputs) and each row's loss (models, n)."""
        network, y, n = self.network, self.y, len(self.X)
        z = np.empty((network.models, n, network.n_outputs), network.dtype)
        rows = np.empty((network.models, n))
        for start, part in network.logits_of(self.X):
            stop = start + part.shape[1]
            z[:, start:stop] = part
            rows[:, start:stop] = self.loss.f(part, scaled_targets(network, y[start:stop]), np.empty_like(part))
        return z, rows


def _sides(network: Network, loss: Loss, metric: Metric, z: np.ndarray, y: np.ndarray, i: int) -> tuple:
    """What a metric compares for model i: truth and prediction."""
    output = loss.row.output
    if output in ("identity", "exp"):
        return y, network.values(z, output)[i]
    if output == "sigmoid":
        truth = y[:, 0] if y.shape[1] == 1 else y
        scores = output_values(z[i], output)
        scores = scores[:, 0] if y.shape[1] == 1 else scores
        return (truth > 0.5).astype(int), (scores > 0.5).astype(int) if metric.takes == "labels" else scores
    truth = y if y.ndim == 1 else y.argmax(axis=1)
    return truth, z[i].argmax(axis=1) if metric.takes == "labels" else output_values(z[i], output)
