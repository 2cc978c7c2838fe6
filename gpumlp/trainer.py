"""Trainer.fit: the whole training loop on one screen, and what it needs around it."""

from __future__ import annotations

import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .augment import check_augmentation
from .averaging import WeightAverage
from .callbacks import Callback, ProgressBar, check_callbacks, end_all, hooks
from .checkpoints import resume_newest
from .data.checks import check_integer, check_number, check_sample_weight
from .device_step import DeviceEvaluation, DeviceStep
from .evaluation import Evaluation
from .fit_data import Data, on_host, prepare, targets_for
from .losses import Loss, get_loss
from .metrics import Metric, get_metric
from .network import Network
from .optimizers import Optimizer, get_optimizer
from .schedules import Schedule, get_schedule
from .train_step import TrainStep
from .training_state import check_data, load_state, save_state

History = dict[str, list]
ADVICE = "try a smaller learning rate, clip_norm=1.0 in the optimizer, or standardize=True in the network"


class DivergedError(ArithmeticError):
    """Loss or weights turned NaN or infinite; the message names the step, the learning rate and what to try."""


class Trainer:
    """Trains a network, or a fleet, on arrays.

    Args:
        network: what to train; its parameters change in place.
        loss: a name of ``gpumlp.losses.LOSSES`` or a ``Loss`` with options.
        optimizer: a name or an ``Optimizer``; the trainer takes a fresh copy.
        schedule: None, a name of ``gpumlp.schedules.SCHEDULES`` or a schedule: the factor on the learning rate.
        metrics: one name or several of ``gpumlp.metrics.METRICS`` that validation reports; None: the loss's usual one.
        augment: augmentations of the training batches, in order: ``GaussianNoise``, ``Mixup``, ``RandomShift``.
        ema: β of an exponential moving average of the weights, a number in (0, 1), say 0.999, or one for each model of a
            fleet; None for none. After every update average ← β average + (1 - β) w, also of batch normalisation's
            running statistics; average / (1 - βᵗ) after t updates are the averaged weights (Polyak & Juditsky 1992;
            Kingma & Ba 2015 for the correction). The network holds them when an epoch ends, for validation and in
            ``on_epoch_end``, so that ``EarlyStopping`` keeps the best averaged ones, and when the fit has ended.
            Training goes on from w, also in a further fit: what was assigned to the parameters meanwhile is lost.

    Attributes:
        history: plain lists, one value for each epoch: epoch, loss, learning_rate, seconds, and with validation data
            val_loss and val_<metric>; a fleet has a list of one value for each model in each place. ``loss`` is the mean
            of the batches' losses while the weights moved; penalties (l1, l2) are not in it.
        stopped: why the last fit ended: "epochs", "early", "time limit" or "interrupted".

    Raises:
        ValueError, TypeError: unknown names, options that do not fit the network, ``ema`` with L-BFGS.
    """

    def __init__(
        self,
        network: Network,
        loss: str | Loss,
        optimizer: str | Optimizer = "adam",
        *,
        schedule: str | Schedule | None = None,
        metrics: str | Sequence[str] | None = None,
        augment: Any = (),
        ema: Any = None,
    ) -> None:
        if not isinstance(network, Network):
            raise TypeError(f"network={network!r} must be a gm.Network")
        self.network = network
        self.loss = get_loss(loss)
        self.loss.check_fits(network.models, network.n_outputs)
        self.optimizer = get_optimizer(optimizer).fresh()
        self.schedule = get_schedule(schedule)
        self.metrics = self._metrics(metrics)
        self.augment = check_augmentation(augment, network)
        if network.standardize_targets and self.loss.row.output != "identity":
            raise ValueError(
                f"standardize_targets fits losses over values; {self.loss.name!r} reads its targets as they are"
            )
        if self.loss.row.output == "softmax" and network.n_outputs < 2:
            raise ValueError(
                "softmax_cross_entropy needs an output for each class, at least 2; for one, use binary_cross_entropy"
            )
        if ema is not None and self.optimizer.full_batch:
            raise ValueError(
                f"ema={ema!r} averages over many small steps, and {type(self.optimizer).__name__} makes few large ones: "
                "leave ema=None, or take a first-order optimizer, say 'adam'"
            )
        self.average = None if ema is None else WeightAverage(network, ema)
        network.loss = self.loss
        self.epoch = 0  # epochs begun and finished since the trainer was made: the shuffle's counter
        self.position = 0  # steps made in the present epoch
        self.epochs = self.epochs_done = self.steps_per_epoch = 0  # of the present fit
        self.resumed = False
        self.history: History = {}
        self.stopped = ""
        self.callbacks: list[Callback] = []  # of the last fit
        self._step: TrainStep | None = None
        self._seconds = 0.0
        self._last: dict[str, Any] = {}  # the weights that training had reached, while the network holds others
        self._pending: dict[str, Any] | None = None  # what resume loaded and the next fit takes up

    # --- the loop

    def fit(
        self,
        X: Any,
        y: Any,
        *,
        epochs: int = 10,
        batch_size: int = 128,
        validation_data: tuple | None = None,
        validation_split: float | None = None,
        sample_weight: Any = None,
        rows: Sequence[Any] | None = None,
        shuffle: bool = True,
        callbacks: Sequence[Callback] = (),
        progress: bool | None = None,
        time_limit: float | None = None,
        memory_limit: int | None = None,
        resume: Any = None,
    ) -> History:
        """Train for ``epochs`` epochs; a further call trains on from there.

        Args:
            X: (n_samples, n_features), any float or integer dtype; cast batch by batch, never modified.
            y: (n_samples,) labels 0 to n_outputs - 1, or labels of any kind (strings, ...), kept as ``network.classes``;
                or targets (n_samples,) or (n_samples, n_outputs).
            batch_size: rows of a step; the last step of an epoch takes what is left.
            validation_data: (X, y) or (X, y, sample_weight), evaluated after every epoch.
            validation_split: share of the rows to hold out for that instead, in (0, 1); stratified by label.
            sample_weight: (n_samples,), not negative: losses are weighted means.
            rows: for a fleet, the row numbers that each model sees, as ``models`` integer arrays.
            shuffle: a new order in every epoch; each model has its own.
            callbacks: observers, called in order.
            progress: show a bar; None shows one on a terminal.
            time_limit: seconds after which the fit ends, at the end of a step (on a GPU, of those made together).
            memory_limit: bytes of a GPU's memory that X may fill. Larger data stay on the host and travel to the GPU while
                it works on the steps before. None: four fifths of what is free.
            resume: a folder of ``gm.Checkpoint``: go on from its newest checkpoint, to the same bits as if the fit had
                never stopped; begin anew where it has none. A damaged one is passed over with a warning. Everything
                else is given as it was, also the data and ``epochs``, which counts those that are done.

        Returns:
            ``history``.

        Ctrl-C ends the fit after the current step (on a GPU, after those that were launched) with a warning, and
        ``EarlyStopping`` puts the best weights back as it does at any end; a second Ctrl-C raises KeyboardInterrupt.
        SIGTERM ends it in the same way, and then goes to whatever handled it before: by default the process ends.

        Raises:
            ValueError, TypeError: data or arguments that do not fit; the message says what and what to do.
            FileError: ``resume`` holds checkpoints, and none of them can be read.
            DivergedError: the loss of the network, or of all models of a fleet, is no longer finite, or at the end the
                weights. A fleet's model that diverges alone is left as it was, with a warning.
            RuntimeError: another fit of the same network is under way, in another thread or around this one.
        """
        check_integer(epochs, "epochs", 1)
        check_integer(batch_size, "batch_size", 1)
        if time_limit is not None:
            check_number(time_limit, "time_limit", 0, np.inf, "()")
        if memory_limit is not None:
            check_integer(memory_limit, "memory_limit", 0)
        check_callbacks(callbacks)
        with one_at_a_time(self.network, "network"):
            if resume is not None:
                resume_newest(self, resume)
            # Where nothing is learned yet, classes and scales are.
            fresh = not self.network.steps.any() and self._pending is None
            data, validation = prepare(
                self.network, self.loss, X, y, sample_weight, rows, validation_data, validation_split, learn=fresh
            )
            step = self._begin(data, epochs, batch_size, shuffle, callbacks, memory_limit)
            evaluation = None if validation is None else self._evaluation(*validation, memory_limit)
            own_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
            observers = [*callbacks] if own_bar else [ProgressBar(progress), *callbacks]
            started = time.monotonic() - self._seconds
            deadline = np.inf if time_limit is None else time.monotonic() + time_limit
            rates: list = []
            with _interruptible() as interrupted, np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                begun = []
                try:
                    for observer in observers:
                        begun.append(observer)
                        for begin in hooks([observer], "on_fit_begin"):
                            begin(self)
                    on_step, on_epoch = hooks(observers, "on_step_end"), hooks(observers, "on_epoch_end")
                    alone = any(getattr(o, "every_step", True) for o in observers if hooks([o], "on_step_end"))
                    self.stopped = "epochs" if step.active.any() else "early"
                    while self.epochs_done < epochs and self.stopped == "epochs":
                        rates = self._learning_rates()
                        while self.position < step.steps_per_epoch and self.stopped == "epochs":
                            self.position += step.run(self.position, rates, alone)
                            if self.position == step.steps_per_epoch:
                                step.catch_up()  # the epoch's one wait for a device
                            if step.has_diverged:
                                self._diverged(step, rates)
                            for observe in on_step:
                                observe(self, step.last_loss() if alone else None)
                            if interrupted():
                                self.stopped = "interrupted"
                            elif time.monotonic() > deadline:
                                self.stopped = "time limit"
                        if self.position < step.steps_per_epoch:
                            step.catch_up()
                            if step.has_diverged:
                                self._diverged(step, rates)
                            break
                        self._seconds = time.monotonic() - started
                        self._show_average()
                        record = self._record(rates[-1], evaluation)
                        self._next_epoch()
                        for observe in on_epoch:
                            done = observe(self, record)
                            if done is not None:
                                step.retire(np.asarray(done, bool))
                        self._hide_average()
                        if not step.active.any():
                            self.stopped = "early"
                finally:
                    try:
                        step.catch_up()
                        self._show_average()
                    finally:
                        if interrupted():
                            self.stopped = "interrupted"  # also between steps
                        self._seconds = time.monotonic() - started
                        step.release()
                        if evaluation is not None:
                            evaluation.release()
                        end_all(begun, self)
            if rates:
                self._check_weights(step, rates[self.position - 1])
            if self.stopped == "interrupted":
                where = f"in epoch {self.epochs_done + 1}" if self.position else f"after epoch {self.epochs_done}"
                warnings.warn(f"fit was interrupted {where} of {epochs}; the network is usable as it is", stacklevel=2)
        return self.history

    # --- the loop's parts

    def _begin(
        self, data: Data, epochs: int, batch_size: int, shuffle: bool, callbacks: Sequence, memory_limit: int | None
    ) -> TrainStep:
        """The step for this data, and the counters of a new fit or of the one that is resumed."""
        make = DeviceStep if self.network.backend.is_device else TrainStep
        options = (batch_size, shuffle, self.augment, memory_limit, self.average)
        step = make(self.network, self.loss, self.optimizer, data, *options)
        self.resumed = self._pending is not None
        if self._pending is not None:
            self._take_up(self._pending, step, epochs, callbacks)
            self._pending = None
        else:
            self.position, self.epochs_done, self._seconds, self.history = 0, 0, 0.0, {}
            self.schedule = get_schedule(self.schedule)  # one with memory begins anew
            self._hide_average()
            step.begin_epoch(self.epoch)
        self._step, self._last, self.callbacks = step, {}, list(callbacks)
        self.epochs, self.steps_per_epoch = epochs, step.steps_per_epoch
        return step

    def _take_up(self, pending: dict[str, Any], step: TrainStep, epochs: int, callbacks: Sequence) -> None:
        """Check that this fit is the one that ``resume`` loaded, then give step and callbacks their parts of it."""
        facts, arrays = pending["facts"], pending["arrays"]
        for name, now in self.fit_facts(step).items():
            saved = facts["fit"][name]
            if saved != now:
                raise ValueError(
                    f"the resumed training had {name} {saved!r}, this fit has {now!r}; they must be the same"
                )
        check_data(facts["data"], step.data)
        if epochs < self.epochs_done:
            raise ValueError(
                f"epochs={epochs}, but the resumed fit has finished {self.epochs_done}; epochs counts them too"
            )
        saved, names = facts["callbacks"], [type(callback).__name__ for callback in callbacks]
        if saved != names:
            raise ValueError(
                f"the saved fit had callbacks {saved}, this one has {names}; give the same ones in the same order"
            )
        step.begin_epoch(self.epoch)
        step.take_up(arrays["log"], arrays["active"])
        for i, callback in enumerate(callbacks):
            prefix = f"callbacks.{i}."
            state = {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
            for load in hooks([callback], "load_state"):
                load(state)

    def fit_facts(self, step: TrainStep) -> dict[str, Any]:
        """What a resumed fit must share with the one that was saved."""
        return {
            "n_samples": len(step.data.X),
            "precision": self.network.precision,
            "rows": step.counts.tolist(),
            "batch_size": step.batch_size,
            "shuffle": bool(step.shuffle),
            "steps_per_epoch": step.steps_per_epoch,
        }

    def _learning_rates(self) -> list:
        """The learning rate of every step of this epoch: numbers, or (models,) arrays."""
        assert self._step is not None
        n, own = self.steps_per_epoch, self._step.own_steps
        times = self.epochs_done + np.minimum(np.arange(n)[:, None], own - 1) / own  # (steps, models)
        factors = np.asarray(self.schedule(times, self.epochs), np.float64)
        base = np.asarray(self.optimizer.learning_rate, np.float64)
        if hasattr(self.schedule, "observe"):  # its factor is one for each model, and holds for the whole epoch
            rate = base * factors
            return [float(rate[0]) if rate.shape == (1,) else rate] * n
        factors = np.broadcast_to(factors, times.shape)  # a function may return one number
        if base.ndim or (factors != factors[:, :1]).any():
            return [*(base * factors)]
        return (base * factors[:, 0]).tolist()

    def _diverged(self, step: TrainStep, rates: list) -> None:
        """Stop training the models whose loss is not finite; an error where none is left."""
        bad, at = step.diverged.copy(), step.diverged_at.copy()
        for first in np.unique(at[bad]):  # a device reports the steps of an epoch together
            self._lose(step, bad & (at == first), int(first), rates[first])

    def _lose(self, step: TrainStep, models: np.ndarray, position: int, rate: Any) -> None:
        step.lost |= models
        where = f"at step {position + 1} of epoch {self.epochs_done + 1}"
        if step.lost.all():
            loss = step.log[0, models, position][0]
            raise DivergedError(f"the loss is {loss} {where} with learning rate {_of(rate, models)}; {ADVICE}")
        names = ", ".join(str(i) for i in np.flatnonzero(models))
        warnings.warn(f"the loss of model {names} is not finite {where}: it is left as it is; {ADVICE}", stacklevel=4)
        step.retire(models)

    def _check_weights(self, step: TrainStep, rate: Any) -> None:
        """What the last step has made of the weights, no loss has told."""
        broken = ~np.isfinite(self.network.backend.dot(self.network.flat, None)) & ~step.lost
        if not broken.any():
            return
        made = self.epochs_done * self.steps_per_epoch + self.position
        what = f"are NaN or infinite after the last step, step {made} of the fit"
        if (step.lost | broken).all():
            raise DivergedError(f"the weights {what}, with learning rate {_of(rate, broken)}; {ADVICE}")
        names = ", ".join(str(i) for i in np.flatnonzero(broken))
        warnings.warn(f"the weights of model {names} {what}; {ADVICE}", stacklevel=3)

    def _record(self, rate: Any, evaluation: Evaluation | None) -> dict[str, Any]:
        """What the epoch gave, appended to ``history`` and returned."""
        assert self._step is not None
        record: dict[str, Any] = {"epoch": self.epochs_done + 1, "loss": self._plain(self._step.epoch_loss())}
        if evaluation is not None:
            record |= {f"val_{name}": self._plain(values) for name, values in evaluation.run().items()}
        record["learning_rate"] = rate if np.ndim(rate) == 0 else np.asarray(rate).tolist()
        record["seconds"] = round(self._seconds, 6)
        for name, value in record.items():
            self.history.setdefault(name, []).append(value)
        if hasattr(self.schedule, "observe"):
            watched = record.get("val_loss", record["loss"])
            self.schedule.observe(np.atleast_1d(np.asarray(watched, np.float64)))
        return record

    def _next_epoch(self) -> None:
        assert self._step is not None
        self.epoch, self.epochs_done, self.position = self.epoch + 1, self.epochs_done + 1, 0
        self._step.begin_epoch(self.epoch)

    def _plain(self, values: np.ndarray) -> Any:
        return [float(v) for v in values] if self.network.is_fleet else float(values[0])

    def epoch_loss(self) -> np.ndarray:
        """Mean loss over the present epoch so far, (models,)."""
        assert self._step is not None
        return self._step.epoch_loss()

    def put_back(self, weights: dict[str, np.ndarray], models: np.ndarray) -> None:
        """Give the models in the mask other weights for use; ``save_state`` still saves those that training had reached."""
        if not self._last:
            self.network.copy_weights(self._last, np.ones(self.network.models, bool))
        self.network.set_weights(weights, models)

    def _show_average(self) -> None:
        """Have the network hold the averaged weights, where there are any, until ``_hide_average``."""
        if self.average is not None and not self._last:
            self._last = self.average.keep()
            self.average.show(self.optimizer.bind(self.network).t)

    def _hide_average(self) -> None:
        """Have the network hold the weights that training goes on from."""
        if self.average is not None and self._last:
            self.network.set_weights(self._last, np.ones(self.network.models, bool))
            self._last = {}

    # --- evaluation

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Loss and metrics on X, y, without training: {"loss": ..., "accuracy": ...}; lists for a fleet.

        Args and errors as in ``fit``.
        """
        X = self.network.check_X(X)
        y, sample_weight = on_host(self.network, y), on_host(self.network, sample_weight)
        weight = None if sample_weight is None else check_sample_weight(sample_weight, len(X))
        y = targets_for(self.network, self.loss, y, len(X), "evaluation y")
        evaluation = self._evaluation(X, y, weight)
        found = evaluation.run()
        evaluation.release()
        return {name: self._plain(values) for name, values in found.items()}

    def _evaluation(self, X: Any, y: Any, weight: Any, limit: int | None = None) -> Evaluation:
        if self.network.backend.is_device:
            return DeviceEvaluation(self.network, self.loss, self.metrics, X, y, weight, memory_limit=limit)
        return Evaluation(self.network, self.loss, self.metrics, X, y, weight)

    # --- saving in the middle

    def save_state(self, path: Any) -> None:
        """Write all that an exact resume needs to one file, at any step: from a callback, or after ``fit`` ended.

        A callback that saves in ``on_epoch_end`` belongs last in the list: those behind it have not seen the epoch yet.

        Raises:
            RuntimeError: nothing was trained yet.
            OSError: the file cannot be written; an earlier one of that name stays as it was.
        """
        save_state(self, path)

    def resume(self, path: Any) -> None:
        """Take up what ``save_state`` wrote: the next ``fit`` with the same data and settings ends with the same bits.

        Raises:
            FileError: the file is damaged or of another format.
            ValueError: it belongs to another network, loss or optimizer.
        """
        load_state(self, path)

    def _metrics(self, names: str | Sequence[str] | None) -> list[Metric]:
        """The rows of the metrics that were asked for. Raises ValueError where one does not fit the loss."""
        loss, outputs = self.loss.row, self.network.n_outputs
        several = loss.output == "sigmoid" and outputs > 1
        if names is None:
            names = ["subset_accuracy" if several else loss.metric]
        metrics = [get_metric(name) for name in ([names] if isinstance(names, str) else names)]
        for metric in metrics:
            fits = metric.takes != "values" if loss.is_classifier else metric.takes == "values"
            if loss.is_classifier:
                fits &= several == (metric.name == "subset_accuracy") and (metric.name != "roc_auc" or outputs <= 2)
            if not fits:
                over = "several labels a row" if several else "classes" if loss.is_classifier else "values"
                raise ValueError(
                    f"metric {metric.name!r} does not fit {loss.name!r} over {over} with {outputs} outputs"
                )
        return metrics


def _of(rate: Any, models: np.ndarray) -> Any:
    """The learning rate of the models in the mask, to be shown."""
    return rate if np.ndim(rate) == 0 else np.asarray(rate)[models].tolist()


_fitting: dict[int, object] = {}  # by the id of what is being fitted: no part of it, so that it copies and pickles
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fitting.clear)  # the parent's fits do not go on in a fork


@contextmanager
def one_at_a_time(thing: Any, name: str) -> Iterator[None]:
    """Within, a second fit of the same thing is refused: two would write to the same weights.

    Raises:
        RuntimeError: one is under way.
    """
    own = object()
    if _fitting.setdefault(id(thing), own) is not own:
        raise RuntimeError(
            f"this {name} is being fitted already, in another thread or by a fit around this one: wait until that fit has "
            "ended, or fit a copy"
        )
    try:
        yield
    finally:
        _fitting.pop(id(thing), None)


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Within, the first Ctrl-C and any SIGTERM are only noted; a further Ctrl-C raises. Yields a function that says whether
    one was noted. A SIGTERM is passed on at the end: whoever asks a process to end has to see it end."""
    noted, terminated = threading.Event(), threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield noted.is_set  # only the main thread may handle signals
        return

    def note(signum: int, frame: Any) -> None:
        if signum == signal.SIGINT and noted.is_set():
            raise KeyboardInterrupt
        noted.set()
        if signum == signal.SIGTERM:
            terminated.set()

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    # What is ignored stays so; None was set from outside Python, which could not put it back.
    before = {signum: handler for signum, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for signum in before:
            signal.signal(signum, note)
        yield noted.is_set
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        if terminated.is_set():
            signal.raise_signal(signal.SIGTERM)
