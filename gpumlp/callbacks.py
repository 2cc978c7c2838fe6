"""Callbacks observe a fit: progress, early stopping, logs. They never drive it.

A callback is any object with some of the methods of :class:`Callback`. ``on_epoch_end`` may return a (models,) bool array:
models that have nothing more to learn; ``fit`` stops training them, and ends when none is left.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .metrics import METRICS

if TYPE_CHECKING:
    from .trainer import Trainer

Record = dict[str, Any]  # of one epoch: epoch, loss, val_loss, a metric's name, learning_rate, seconds


class Callback:
    """Methods that ``Trainer.fit`` calls; all do nothing here.

    A GPU makes many steps at a time; a callback with ``on_step_end`` has it stop and report after every one, which takes
    far longer, unless it says ``every_step = False``: then it is called after as many as were made together.

    ``trainer`` has ``network``, ``epoch``, ``epochs``, ``position`` (steps made in this epoch), ``steps_per_epoch`` and
    ``history``. Values in a record are numbers, or lists of one for each model of a fleet.
    """

    every_step = True

    def on_fit_begin(self, trainer: Trainer) -> None: ...

    def on_step_end(self, trainer: Trainer, loss: np.ndarray) -> None:
        """After every step; ``loss`` (models,) is the batch's, None where ``every_step`` is False."""

    def on_epoch_end(self, trainer: Trainer, record: Record) -> np.ndarray | None: ...

    def on_fit_end(self, trainer: Trainer) -> None:
        """At the end, also after Ctrl-C, a time limit or an error."""

    def state(self) -> dict[str, np.ndarray]:
        """Arrays that an exact resume needs."""
        return {}

    def load_state(self, state: dict[str, np.ndarray]) -> None: ...


def hooks(callbacks: Sequence[Any], name: str) -> list[Any]:
    """The methods ``name`` of the callbacks that have one of their own."""
    methods = (getattr(callback, name, None) for callback in callbacks)
    return [m for m in methods if m is not None and getattr(m, "__func__", None) is not getattr(Callback, name)]


def end_all(callbacks: Sequence[Any], trainer: Trainer) -> None:
    """Call every ``on_fit_end``, also where one fails; then raise the first error."""
    errors = []
    for end in hooks(callbacks, "on_fit_end"):
        try:
            end(trainer)
        except BaseException as error:
            errors.append(error)
    if errors:
        raise errors[0]


def check_callbacks(callbacks: Any) -> None:
    """Raise TypeError unless ``callbacks`` is a list of objects with methods of :class:`Callback`."""
    if not isinstance(callbacks, list | tuple):
        raise TypeError(f"callbacks={callbacks!r} must be a list")
    for callback in callbacks:
        if isinstance(callback, type):
            raise TypeError(f"callbacks holds the class {callback.__name__}; give an object, {callback.__name__}(...)")
        if not any(hasattr(callback, name) for name in vars(Callback) if name.startswith("on_")):
            raise TypeError(f"callbacks holds {callback!r}, which has no method of gm.Callback, say on_epoch_end")


class EarlyStopping(Callback):
    """Stop a model when ``monitor`` has not improved for ``patience`` epochs, and put its best weights back at the end.

    Every model of a fleet stops by itself. (Prechelt 1998.)

    Args:
        patience: epochs without improvement that are waited for, at least 1.
        monitor: a value of the epoch's record, say "val_loss", "val_accuracy", "loss"; None takes "val_loss", or "loss"
            where ``fit`` has no validation data.
        min_delta: smallest change that counts as improvement.
        restore_best: put the weights of the best epoch back.

    Raises:
        ValueError: values out of range; at ``fit``, a monitor that the record does not have.
    """

    def __init__(
        self, patience: int = 5, *, monitor: str | None = None, min_delta: float = 0.0, restore_best: bool = True
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, int | np.integer) or patience < 1:
            raise ValueError(f"patience={patience!r} must be an integer of at least 1")
        if not 0 <= min_delta < np.inf:
            raise ValueError(f"min_delta={min_delta!r} must be a number of at least 0")
        self.patience, self.monitor, self.min_delta, self.restore_best = patience, monitor, min_delta, restore_best
        self._reset(0)

    def _reset(self, models: int) -> None:
        self.best = np.full(models, np.inf)  # of the monitor, negated where larger is better
        self.best_epoch = np.zeros(models, np.int64)
        self.best_weights: dict[str, np.ndarray] = {}

    def on_fit_begin(self, trainer: Trainer) -> None:
        if not trainer.resumed:
            self._reset(trainer.network.models)

    def on_epoch_end(self, trainer: Trainer, record: Record) -> np.ndarray:
        name = self.monitor or ("val_loss" if "val_loss" in record else "loss")
        if name not in record:
            raise ValueError(f"EarlyStopping monitors {name!r}; this fit records {', '.join(record)}")
        values = np.atleast_1d(np.asarray(record[name], np.float64))
        metric = METRICS.get(name.removeprefix("val_"))
        values = -values if metric is not None and metric.larger_is_better else values
        better = values < self.best - self.min_delta
        better |= ~np.isfinite(self.best) & np.isfinite(values)
        self.best[better], self.best_epoch[better] = values[better], record["epoch"]
        if self.restore_best and better.any():
            trainer.network.copy_weights(self.best_weights, better)
        return record["epoch"] - self.best_epoch >= self.patience

    def on_fit_end(self, trainer: Trainer) -> None:
        if self.restore_best and self.best_weights:
            trainer.put_back(self.best_weights, np.isfinite(self.best))

    def state(self) -> dict[str, np.ndarray]:
        kept = {f"weights.{name}": values for name, values in self.best_weights.items()}
        return {"best": self.best, "best_epoch": self.best_epoch} | kept

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.best, self.best_epoch = state["best"].copy(), state["best_epoch"].copy()
        self.best_weights = {k.removeprefix("weights."): v.copy() for k, v in state.items() if k.startswith("weights.")}


class ProgressBar(Callback):
    """A tqdm bar over all steps of the fit, with loss, validation metric and rate, on standard error.

    Args:
        show: True, False, or None for only when standard error is a terminal.
    """

    every_step = False

    def __init__(self, show: bool | None = None) -> None:
        self.show = show
        self.bar: Any = None

    def on_fit_begin(self, trainer: Trainer) -> None:
        if not (sys.stderr.isatty() if self.show is None else self.show):
            return
        from tqdm import tqdm

        self.values: dict[str, str] = {}
        done = trainer.epochs_done * trainer.steps_per_epoch + trainer.position
        total = trainer.epochs * trainer.steps_per_epoch
        self.bar = tqdm(total=total, initial=done, unit="step", file=sys.stderr, mininterval=0.1, dynamic_ncols=True)
        self._shown = 0.0

    def on_step_end(self, trainer: Trainer, loss: np.ndarray) -> None:
        if self.bar is None:
            return
        self.bar.update(trainer.epochs_done * trainer.steps_per_epoch + trainer.position - self.bar.n)
        now = time.monotonic()
        if now - self._shown > 0.1:  # writing the loss costs more than a small network's step
            self._shown = now
            self._write(trainer, trainer.epoch_loss())

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        if self.bar is not None:
            self.values = {k: _shown(v) for k, v in record.items() if k.startswith("val_")}
            self._write(trainer, record["loss"])

    def _write(self, trainer: Trainer, loss: Any) -> None:
        self.bar.set_description(
            f"epoch {min(trainer.epochs_done + 1, trainer.epochs)}/{trainer.epochs}", refresh=False
        )
        self.bar.set_postfix({"loss": _shown(loss)} | self.values, refresh=True)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class CSVLogger(Callback):
    """One line for each epoch in a CSV file, flushed at once; a fleet's values stand in columns loss.0, loss.1, ...

    Args:
        path: the file; replaced when a new fit begins, continued when a fit is resumed.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file: Any = None

    def on_fit_begin(self, trainer: Trainer) -> None:
        # A stopped run may have gone on after its state was saved: those epochs come again.
        lines = self.path.read_text().splitlines(True) if trainer.resumed and self.path.exists() else []
        self._file = open(self.path, "w", newline="")
        self._file.writelines(lines[: 1 + trainer.epochs_done])
        self._has_header = bool(lines)
        self._writer = csv.writer(self._file, lineterminator="\n")

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        flat = _one_value_each(record)
        if not self._has_header:
            self._writer.writerow(flat)
            self._has_header = True
        self._writer.writerow(flat.values())
        self._file.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class TensorBoard(Callback):
    """Scalars of each epoch for TensorBoard (the extra ``tensorboard``).

    Args:
        folder: where event files go, one for each fit.

    Raises:
        ImportError: tensorboardX is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        try:
            import tensorboardX
        except ImportError as error:
            raise ImportError('TensorBoard needs tensorboardX: pip install "gpumlp[tensorboard]"') from error
        self.folder, self._new_writer = str(folder), tensorboardX.SummaryWriter
        self._writer: Any = None

    def on_fit_begin(self, trainer: Trainer) -> None:
        # The library names files by the second: of two fits within one, the second would overwrite the first.
        self._writer = self._new_writer(self.folder, filename_suffix=f".{time.time_ns()}")

    def on_epoch_end(self, trainer: Trainer, record: Record) -> None:
        for name, value in _one_value_each(record).items():
            if name != "epoch":
                self._writer.add_scalar(name, value, record["epoch"])
        self._writer.flush()

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._writer is not None:
            self._writer.close()  # flush alone leaves what its thread has not taken up yet
            self._writer = None


def _shown(values: Any) -> str:
    """A number, or the mean over the models that have one, in four digits."""
    values = np.atleast_1d(values)
    finite = values[np.isfinite(values)]
    return f"{finite.mean() if len(finite) else values[0]:.4g}"


def _one_value_each(record: Record) -> dict[str, Any]:
    """The record with a fleet's lists spread over numbered names."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat.update({f"{name}.{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value})
    return flat
