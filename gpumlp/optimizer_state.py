"""An optimizer at work on one network: its buffers, its step count, and the blocks that an update goes through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .network import Network
    from .optimizers import Optimizer

BLOCK = 32_768  # elements: parameter, gradient, two states and a scratch block of float32 fill 640 KB, within L2 caches


class OptimizerState:
    """An optimizer's buffers for one network, and the blocks that its update works through."""

    def __init__(self, optimizer: Optimizer, network: Network) -> None:
        self.optimizer, self.network = optimizer, network
        shape, dtype, models = network.flat.shape, network.flat.dtype, network.models
        for f in fields(optimizer):
            value = getattr(optimizer, f.name)
            if np.ndim(value) and len(value) != models:
                raise ValueError(
                    f"{f.name} has {len(value)} values for {models} models; give one number, or one for each"
                )
        self.states = {name: network.backend.zeros(shape, dtype) for name in optimizer.states}
        self.t = np.zeros(models, np.int64)  # steps taken, per model
        self.scratch = np.empty(0, dtype) if network.backend.is_device else network.backend.empty((BLOCK,), dtype)
        self._blocks: dict[tuple[int, int], list] = {}
        self._cuts: dict[tuple[int, int], Optimizer] = {}
        n = len(optimizer.coefficients(1, 1.0)) if not optimizer.full_batch else 0
        self.c = np.empty((n, models), dtype)  # the coefficients of this step
        self.shrink = np.ones((models, 1), dtype)  # 1 - learning_rate weight_decay
        column = lambda value: np.broadcast_to(np.asarray(value, dtype).reshape(-1, 1), (models, 1))  # noqa: E731
        self.l1, self.l2 = column(optimizer.l1), column(optimizer.l2)
        self.has_l1, self.has_l2 = bool(self.l1.any()), bool(self.l2.any())
        self.has_decay = bool(np.any(optimizer.weight_decay))
        self.regularises = self.has_l1 or self.has_l2 or self.has_decay
        self.clips = optimizer.clip_norm is not None or optimizer.clip_value is not None
        # What a line search puts back before each trial.
        kept = network.statistics.items() if optimizer.full_batch else ()
        self.statistics = {name: network.backend.zeros(values.shape, dtype) for name, values in kept}
        self.work: Any = None  # what a backend keeps for it

    def step(self, models: slice, learning_rate: Any) -> None:
        """One update of the models in ``models``, on the host; the others stay as they are."""
        self.advance(models, learning_rate)
        if self.clips:
            self.clip(models)
        for arrays, penalties in self.blocks(models):
            if penalties is not None:
                self.regularise(*penalties)
            self.optimizer.update(*arrays)

    def advance(self, models: slice, learning_rate: Any) -> None:
        """Count a step of ``models`` and set its coefficients."""
        o = self.optimizer
        self.t[models] += 1
        rate, steps = _of(learning_rate, models), self.t[models]
        t: Any = int(steps[0])  # one number where the models agree
        if len(steps) > 1 and (steps != t).any():
            t = steps
        coefficients = self.cut(models).coefficients(t, rate)
        if self.network.models == 1:
            self.c[:, 0] = coefficients
        else:
            for c, value in zip(self.c, coefficients, strict=True):
                c[models] = value
        if self.has_decay:
            self.shrink[models, 0] = 1 - rate * np.asarray(_of(o.weight_decay, models))

    def table(self, t: np.ndarray, rates: np.ndarray) -> np.ndarray:
        """The coefficients of many steps, and behind them ``shrink``: (coefficients + 1, steps, models).

        Args:
            t: (steps, models) steps taken, each counted from 1.
            rates: (steps, models) learning rates.
        """
        rows = [*self.optimizer.coefficients(t, rates), 1 - rates * np.asarray(self.optimizer.weight_decay)]
        return np.stack([np.broadcast_to(np.asarray(row, self.network.dtype), t.shape) for row in rows])

    def cut(self, models: slice) -> Optimizer:
        """The optimizer with its per-model hyper-parameters cut to ``models``; itself where all are numbers."""
        o, key = self.optimizer, (models.start, models.stop)
        if key not in self._cuts:
            parts = {f.name: _of(v, models) for f in fields(o) if np.ndim(v := getattr(o, f.name))}
            self._cuts[key] = replace(o, **parts) if parts else o
        return self._cuts[key]

    def clip(self, models: slice) -> None:
        o, g = self.optimizer, self.network.flat_gradient[models]
        if o.clip_value is not None:
            limit = np.asarray(_of(o.clip_value, models), g.dtype).reshape(-1, 1)
            np.clip(g, -limit, limit, out=g)
        if o.clip_norm is not None:
            norm = np.sqrt(np.vecdot(g, g).astype(np.float64))
            limit = np.asarray(_of(o.clip_norm, models), np.float64)
            g *= (limit / np.maximum(norm, limit)).astype(g.dtype)[:, None]

    def regularise(self, w, g, scratch, l1, l2, shrink) -> None:
        """Add the penalties' gradient, l2 w + l1 sign(w), and shrink the weights."""
        if self.has_l2:
            np.multiply(w, l2, out=scratch)
            np.add(g, scratch, out=g)
        if self.has_l1:
            np.sign(w, out=scratch)
            np.multiply(scratch, l1, out=scratch)
            np.add(g, scratch, out=g)
        if self.has_decay:
            np.multiply(w, shrink, out=w)

    def penalty(self) -> np.ndarray:
        """l1 Σ|w| + ½ l2 Σ w², (models,) float64."""
        if not (self.has_l1 or self.has_l2):
            return np.zeros(self.network.models)
        w, dot = self.network.flat[:, : self.network.n_weights], self.network.backend.dot
        return self.l1[:, 0] * dot(w, None) + 0.5 * self.l2[:, 0] * dot(w, w)

    def blocks(self, models: slice) -> list:
        """Views of all buffers in blocks of at most BLOCK elements: whole rows of small models, parts of large ones."""
        key = (models.start, models.stop)
        if key not in self._blocks:
            self._blocks[key] = [self._block(*part) for part in self._parts(models)]
        return self._blocks[key]

    def _parts(self, models: slice):
        n = self.network
        size, n_weights = n.flat.shape[1], n.n_weights if self.regularises else 0
        for is_weights, start, stop in ((True, 0, n_weights), (False, n_weights, size)):
            for rows, columns in parts(models, start, stop):
                yield is_weights, rows, columns

    def _block(self, is_weights: bool, rows: slice, columns: slice) -> tuple:
        """The arguments of ``update`` and, for weights that are regularised, of ``regularise``."""
        n = self.network
        # One model's numbers as scalars and its buffers as plain vectors: array operations start faster on them.
        part: Any = rows.start if rows.stop - rows.start == 1 else rows
        w, g = n.flat[part, columns], n.flat_gradient[part, columns]
        states = [state[part, columns] for state in self.states.values() if state.shape == n.flat.shape]
        scratch = self.scratch[: w.size].reshape(w.shape)
        numbers = [values[part, ...] for values in (self.l1, self.l2, self.shrink, *self.c[..., None])]
        if rows.stop - rows.start == 1:
            numbers = [values[0, ...] for values in numbers]
        penalties = (w, g, scratch, *numbers[:3]) if is_weights else None
        return (w, g, *states, scratch, *numbers[3:]), penalties


def parts(models: slice, start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """(models, columns) slices of at most BLOCK elements: whole rows of small models, parts of large ones."""
    if start == stop:
        return
    rows, width = max(1, BLOCK // (stop - start)), min(BLOCK, stop - start)
    for row in range(models.start, models.stop, rows):
        for column in range(start, stop, width):
            yield slice(row, min(row + rows, models.stop)), slice(column, min(column + width, stop))


def _of(value: Any, models: slice) -> Any:
    """The part of a hyper-parameter that belongs to ``models``; a number where that is one model."""
    if np.ndim(value) == 0:
        return value
    part = np.asarray(value, np.float64)[models]
    return part.item() if len(part) == 1 else part
