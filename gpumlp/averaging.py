"""The exponential moving average of a network's weights, which often predict better than the last ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .optimizer_state import BLOCK, parts
from .optimizers import numbers_of

if TYPE_CHECKING:
    from .network import Network


class WeightAverage:
    """Averages over the updates of each model (Polyak & Juditsky 1992), of its parameters and its running statistics.

    average ← average + (1 - β) (w - average) after every update, which is β average + (1 - β) w. It begins at 0, so that
    after t updates average / (1 - βᵗ) is the mean (the bias correction of Kingma & Ba 2015, section 3).

    Args:
        ema: β in (0, 1), a number or one for each model.

    Raises:
        ValueError: another β.
    """

    def __init__(self, network: Network, ema: Any) -> None:
        self.network = network
        beta = numbers_of(ema)
        if beta.ndim > 1 or not ((beta > 0) & (beta < 1)).all():
            raise ValueError(f"ema={ema!r} is out of range: a number, or one for each model, in (0, 1); None for none")
        if beta.ndim and len(beta) != network.models:
            raise ValueError(
                f"ema has {len(beta)} values for {network.models} models; give one number, or one for each"
            )
        self.beta = np.broadcast_to(beta, network.models)
        backend, dtype = network.backend, network.dtype
        self.rest = backend.asarray((1 - self.beta).astype(dtype))  # (models,)
        self.weights = {"flat": network.flat, **network.statistics}  # each (models, n)
        self.averages = {name: backend.zeros(values.shape, dtype) for name, values in self.weights.items()}
        self.reached: dict[str, Any] = {}  # where the weights stay while the network holds averaged ones
        network.copy_weights(self.reached, np.ones(network.models, bool))  # makes room, which may be lacking later
        self.scratch = np.empty(0, dtype) if backend.is_device else backend.empty((BLOCK,), dtype)
        self._blocks: dict[tuple[int, int], list] = {}

    def blocks(self, models: slice) -> list[tuple]:
        """average, w, 1 - β and scratch for each block, on the host: views that fit into the processor's cache."""
        key = (models.start, models.stop)
        if key not in self._blocks:
            self._blocks[key] = [
                self._block(average, w, *part)
                for average, w in zip(self.averages.values(), self.weights.values(), strict=True)
                for part in parts(models, 0, w.shape[1])
            ]
        return self._blocks[key]

    def _block(self, average: Any, w: Any, rows: slice, columns: slice) -> tuple:
        # One model's block as plain vectors and its 1 - β as a scalar: array operations start faster on them.
        alone = rows.stop - rows.start == 1
        part = (rows.start if alone else rows, columns)
        scratch = self.scratch[: w[part].size].reshape(w[part].shape)
        return average[part], w[part], self.rest[rows.start] if alone else self.rest[rows, None], scratch

    def keep(self) -> dict[str, Any]:
        """A copy of the weights that training has reached; the same memory every time."""
        self.network.copy_weights(self.reached, np.ones(self.network.models, bool))
        return self.reached

    def show(self, t: np.ndarray) -> None:
        """Give the network the averaged weights; a model without an update keeps its own.

        Args:
            t: (models,) updates of each model.
        """
        # By Python's power: NumPy's may round otherwise in the middle of an array than alone.
        factors = np.array([1 / (1 - b**n) if n else 1.0 for b, n in zip(self.beta.tolist(), t.tolist(), strict=True)])
        updated = [slice(0, len(t))] if t.all() else [slice(i, i + 1) for i in np.flatnonzero(t)]
        for average, w in zip(self.averages.values(), self.weights.values(), strict=True):
            for models in updated:
                self.network.backend.combine(w[models], factors[models], average[models], None, None)
        self.network.renew()
