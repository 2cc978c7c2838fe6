"""One training step: its buffers and its order, gather, forward, loss, backward, update.

Network, loss, optimizer and batch size decide every buffer in advance; a step allocates none. The rows of a fleet's models
may differ in number: the last batches of an epoch then are shorter for some models, and each goes on with its own.
"""

from __future__ import annotations

from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from . import random
from .augment import Mixup
from .averaging import WeightAverage
from .backends.base import Batch
from .fit_data import Data
from .lbfgs import iterate
from .optimizers import LBFGS, Optimizer
from .workspace import Workspace

if TYPE_CHECKING:
    from .losses import Loss
    from .network import Network


class Part(NamedTuple):
    """Some models at a number of rows: views of the buffers, made once."""

    models: slice
    n: int  # rows
    order: slice  # of TrainStep.order
    workspace: Workspace
    batch: Batch
    loss: Loss
    losses: np.ndarray  # of TrainStep.log
    weights: np.ndarray


class TrainStep:
    """Buffers and views for the steps of one fit.

    Args:
        batch_size: rows of a step; the full batch for an optimizer that needs it.
        shuffle: a new order in every epoch, of each model its own.
        memory_limit: bytes of a device's memory that the data may fill; larger data stay on the host and travel in parts.
        average: what every update moves on, or None.
    """

    def __init__(
        self,
        network: Network,
        loss: Loss,
        optimizer: Optimizer,
        data: Data,
        batch_size: int,
        shuffle: bool,
        augment: tuple,
        memory_limit: int | None = None,
        average: WeightAverage | None = None,
    ) -> None:
        self.network, self.backend, self.loss, self.data, self.augment = network, network.backend, loss, data, augment
        self.optimizer, self.bound = optimizer, optimizer.bind(network)
        self.memory_limit, self.average = memory_limit, average
        self.shuffle = shuffle and not optimizer.full_batch
        rows = data.rows or [np.arange(len(data.X))]
        self.rows = rows if len(rows) == network.models else rows * network.models
        self.counts = np.array([len(r) for r in self.rows])  # rows of each model
        self.batch_size = int(self.counts.max() if optimizer.full_batch else min(batch_size, self.counts.max()))
        self.own_steps = -(-self.counts // self.batch_size)  # of each model in an epoch: with fewer rows fewer
        self.steps_per_epoch = int(self.own_steps.max())
        self.active = np.ones(network.models, bool)  # models that still train
        varies = self.shuffle or data.rows is not None or bool(augment) or network.scales_apart
        self.per_model_rows = network.models > 1 and varies
        self.order = np.zeros((network.models if self.per_model_rows else 1, self.counts.max()), np.int64)
        self._full_steps = int(self.counts.min() // self.batch_size)  # steps in which every model has a full batch
        self._repeats = False  # the full batch's loss and gradient after the last step are those before the next
        # Of each step of the epoch: the batch's mean loss, and its weight.
        self.log = np.zeros((2, network.models, self.steps_per_epoch))
        self.diverged = np.zeros(network.models, bool)  # models whose loss was not finite; retire clears them
        self.has_diverged = False
        self.lost = np.zeros(network.models, bool)  # all that diverged in this fit
        self.diverged_at = np.zeros(network.models, np.int64)  # the step of the epoch at which they did
        for i in range(len(self.order)):
            self.order[i, : self.counts[i]] = self.rows[i]
        self._prepare()

    def _prepare(self) -> None:
        """Make the buffers."""
        network = self.network
        self.workspace = Workspace(network, self.batch_size, training=True, per_model_rows=self.per_model_rows)
        self._batch = self._buffers()
        self._parts: dict[tuple, Part] = {}
        self._all = [self._part(slice(0, network.models), self.batch_size)]
        self._last = np.full(network.models, np.nan)

    # --- an epoch

    def begin_epoch(self, epoch: int) -> None:
        """Order the rows for ``epoch``: a function of seed and epoch alone."""
        self.log[...] = 0.0
        if self.shuffle:
            for i, (order, rows, count) in enumerate(zip(self.order, self.rows, self.counts, strict=False)):
                seed, stream = int(self.network.seeds[i]), int(self.network.streams[i])
                np.take(rows, random.permutation(count, seed=seed, step=epoch, model=stream), out=order[:count])

    def epoch_loss(self) -> np.ndarray:
        """Mean loss of each model over the epoch so far, (models,); NaN before its first step."""
        losses, weights = self.log
        loss, weight = np.vecdot(losses, weights), weights.sum(axis=1)
        return np.divide(loss, weight, out=np.full_like(loss, np.nan), where=weight > 0)

    def take_up(self, log: np.ndarray, active: np.ndarray) -> None:
        """Go on in the middle of an epoch, with what its steps have logged and the models that still train."""
        self.log[...] = log
        self.retire(~active)

    def catch_up(self) -> None:
        """Bring what the host knows of the fit up to date; on the host it is."""

    def release(self) -> None:
        """Give a device's memory back when the fit is over."""

    # --- a step

    def run(self, position: int, rates: Any, alone: bool = False) -> int:
        """Make step ``position`` of the epoch, on a device also steps after it; returns how many were made.

        Args:
            rates: the learning rate of every step of the epoch: numbers, or (models,) arrays.
            alone: one step only.

        A model whose loss is not finite is not updated.
        """
        rate = rates[position]
        if self.optimizer.full_batch:
            self._last = self._full_batch_step(rate)
            return 1
        parts = self._groups(position)
        if parts is self._all:
            self._last = self._step(position, parts[0], rate)
            return 1
        self._last = np.full(self.network.models, np.nan)
        for part in parts:
            self._last[part.models] = self._step(position, part, rate)
        return 1

    def last_loss(self) -> np.ndarray:
        """Each model's mean loss over the batch of the last step, (models,); NaN where it had none."""
        return self._last

    def _step(self, position: int, part: Part, learning_rate: Any) -> np.ndarray:
        loss = self._gradient(position, part)
        for models in [part.models] if _all_finite(loss) else self._finite(position, part.models, loss):
            self.backend.update(self.bound, models, learning_rate)
            self.network.after_update(models)
            if self.average is not None:
                self.backend.average(self.average, models)
        return loss

    def _finite(self, position: int, models: slice, loss: np.ndarray) -> list[slice]:
        """The models whose loss is finite, one by one; the others are noted."""
        finite = np.isfinite(loss)
        self.diverged[models] |= ~finite
        self.diverged_at[models][~finite] = position
        self.has_diverged = True
        return [slice(i, i + 1) for i, ok in zip(range(models.start, models.stop), finite, strict=True) if ok]

    def _gradient(self, position: int, part: Part) -> np.ndarray:
        """Gather, forward, loss, backward."""
        workspace, batch, start = part.workspace, part.batch, position * self.batch_size
        self.backend.gather(batch, self.order[part.order, start : start + part.n])
        if self.augment:
            self._augment(workspace, batch)
        z = workspace.forward()
        loss = self.backend.loss(part.loss, z, batch, workspace.dz)
        workspace.backward()
        part.losses[:, position] = loss
        part.weights[:, position] = part.n if batch.weights is None else batch.weights.sum(axis=1, dtype=np.float64)
        return loss

    def _augment(self, workspace: Workspace, batch: Batch) -> None:
        for row in self.augment:
            if row.before_scaling:
                self.backend.augment(row, batch, workspace.draw)
        self.backend.standardize(batch.x, *self._input_scaling(workspace.models))
        for row in self.augment:
            if not row.before_scaling:
                self.backend.augment(row, batch, workspace.draw)

    def _full_batch_step(self, learning_rate: Any) -> np.ndarray:
        network = self.network
        assert isinstance(self.optimizer, LBFGS)
        losses = iterate(
            self.optimizer, self.bound, self._full_gradient, learning_rate, active=self.active, same_data=self._repeats
        )
        losses = np.where(self.active, losses, np.nan)
        moved = any(place.is_dense and place.layer.max_norm is not None for place in network.places)  # by after_update
        self._repeats = not moved and not self.augment and not any(place.dropout.any() for place in network.places)
        self.log[:, :, 0] = losses, np.isfinite(losses)
        self.diverged |= self.active & ~np.isfinite(losses)
        self.has_diverged = bool(self.diverged.any())
        for i in np.flatnonzero(self.active):
            network.after_update(slice(i, i + 1))
        return losses

    def _full_gradient(self) -> np.ndarray:
        """The gradient over all rows, and each model's loss."""
        losses = np.zeros(self.network.models)
        for part in self._groups(0):
            losses[part.models] = self._gradient(0, part)
        return losses

    # --- which models, how many rows

    def retire(self, models: np.ndarray) -> None:
        """Train the models of the mask no further in this fit."""
        self.active &= ~models
        self.diverged[...], self.has_diverged = False, False
        if not self.active.all():
            self._full_steps = 0

    def _groups(self, position: int) -> list[Part]:
        """The models that have rows left at this step, together where they have equally many, else one by one."""
        if position < self._full_steps:
            return self._all
        left = np.where(self.active, np.minimum(self.counts - position * self.batch_size, self.batch_size), 0)
        first = int(left[0])
        if first > 0 and (left == first).all():
            return [self._part(slice(0, self.network.models), first)]
        return [self._part(slice(i, i + 1), int(n)) for i, n in enumerate(left) if n > 0]

    def _part(self, models: slice, n: int) -> Part:
        """Buffers and loss cut to ``n`` rows of ``models``, which are all models or one."""
        key = (models.start, models.stop, n)
        if key not in self._parts:
            self._parts[key] = self._make_part(models, n)
        return self._parts[key]

    def _make_part(self, models: slice, n: int) -> Part:
        workspace, batch = self.workspace.view(models, n), self._batch
        rows = models if self.per_model_rows else slice(0, 1)
        shift, scale = (None, None) if self.augment else self._input_scaling(models)
        target_shift, target_scale = self.network.target_scaling_of(models, self.per_model_rows)
        own = replace(
            batch,
            x=workspace.x,
            raw=None if batch.raw is None else batch.raw[rows, :n],
            targets=batch.targets[rows, :n],
            weights=None if batch.weights is None else batch.weights[rows, :n],
            shift=shift,
            scale=scale,
            target_shift=target_shift,
            target_scale=target_scale,
        )
        loss = self.loss if workspace.models == self.workspace.models else self.loss.for_model(models.start)
        return Part(models, n, rows, workspace, own, loss, *self.log[:, models])

    def _input_scaling(self, models: slice) -> tuple[Any, Any]:
        """Shift and scale of the input."""
        return self.network.standardization_of(models, self.per_model_rows)

    def _buffers(self) -> Batch:
        """The batch's own buffers at full size; x belongs to the workspace."""
        network, data, empty = self.network, self.data, self.backend.empty
        y = self._targets()
        shape = (len(self.order), self.batch_size)
        return Batch(
            X=data.X,
            y=y,
            weight=data.weight,
            raw=None if data.X.dtype == network.dtype else empty((*shape, network.n_features), data.X.dtype),
            x=self.workspace.x,
            targets=empty((*shape, *y.shape[1:]), y.dtype),
            weights=None if data.weight is None else empty(shape, data.weight.dtype),
            shift=None,
            scale=None,
            target_shift=None,
            target_scale=None,
        )

    def _targets(self) -> np.ndarray:
        """y as the loss reads it: labels that mix are probabilities."""
        y = self.data.y
        if any(isinstance(row, Mixup) for row in self.augment) and y.ndim == 1:
            y = np.eye(self.network.n_outputs, dtype=self.network.dtype)[y]
        return y


def _all_finite(loss: np.ndarray) -> bool:
    return isfinite(loss[0]) if len(loss) == 1 else bool(np.isfinite(loss).all())
