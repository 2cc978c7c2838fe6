"""A training step on a device: recorded once, many steps to a graph, and replayed.

What changes from step to step stands in device memory (``Counters``) and is advanced there by a kernel, so the host says
nothing to the device between the beginning of an epoch and its end. The coefficients of the optimizer's steps, with
learning rate and bias corrections in them, are a table that the host fills for many steps at a time from the same rows that
NumPy uses.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from .augment import Mixup, RandomShift
from .backends.device import DeviceArray, row_major
from .backends.gpu_backend import GpuBackend
from .backends.gpu_work import Counters, DeviceBatch
from .evaluation import Evaluation
from .streaming import Stream, must_stream
from .train_step import TrainStep
from .workspace import Workspace

STEPS = 32  # that a graph makes
EAGER = 2  # steps made one launch after the other before any are recorded: kernels are loaded, products planned
TABLE = 4096  # steps that the table of coefficients holds
AHEAD = 2  # graphs that the host may be ahead of the device, so that it can still be stopped
CHECK = "GPUMLP_CHECK_GRAPH"  # environment: hold the first replay against a step made launch by launch


class DeviceStep(TrainStep):
    """The steps of one fit on a device; see ``TrainStep`` for what they are."""

    backend: GpuBackend

    def _prepare(self) -> None:
        network, backend, runtime = self.network, self.backend, self.backend.runtime
        models, steps, size = network.models, self.steps_per_epoch, self.batch_size
        empty, wide = backend.empty, network.dtype
        self._row_count = len(self.bound.c) + 1 + sum(isinstance(row, Mixup) for row in self.augment)
        # What the host reads after an epoch lies side by side, for one copy.
        self._report = backend.zeros((2 * models * steps + 2 * models,), np.float64)

        def part(start: int, shape: tuple, type: str) -> DeviceArray:
            report = self._report
            return DeviceArray(report.memory, report.pointer + 8 * start, shape, row_major(shape), type)

        n = models * steps
        self.counters = Counters(
            step=backend.zeros((8,), np.int64),
            counts=backend.asarray(self.counts.astype(np.int64)),
            active=backend.asarray(self.active.astype(np.int32)),
            valid=backend.zeros((models + 1,), np.int32),
            ok=backend.zeros((models,), np.int32),
            table=empty((self._row_count, min(steps, TABLE), models), wide),
            current=empty((self._row_count, models), wide),
            losses=part(0, (models, steps), "f64"),
            weights=part(n, (models, steps), "f64"),
            diverged_at=part(2 * n, (models,), "i64"),
            row_loss=empty((models, size), wide),
            weight_total=empty((models if self.per_model_rows else 1,), wide),
        )
        self.workspace = Workspace(
            network, size, training=True, per_model_rows=self.per_model_rows, valid=self.counters.valid
        )
        self.draw = self.workspace.draw
        counted = part(2 * n + models, (models,), "u64")
        counted[...] = network.steps
        self.draw.steps = counted
        self._stream = self._streaming()
        self._order = backend.asarray(self.order) if self._stream is None else self._stream.order
        self._sort: tuple | None = self._sorting() if self.shuffle and self._stream is None else None
        self._batch = self._device_batch()  # type: ignore[assignment]
        self._graphs: dict[int, Callable[[], None]] = {}
        self._can_capture = runtime.can_capture
        self._eager = EAGER
        self._events: list[Any] = []
        self._rates: Any = None  # whose coefficients the table holds
        self._table = range(0)  # the steps that it covers
        self._position = 0  # the step at which the device stands
        self._known = 0  # the step up to which the host has caught up
        network.renew()
        runtime.synchronize()

    def _sorting(self) -> tuple:
        """Scratch for the shuffle: words, their places, and the rows that are put in order."""
        groups, most = self.order.shape
        stride = 1 << max(0, int(most - 1).bit_length())
        shape = (groups, stride)
        return (
            self.backend.empty(shape, np.uint64),
            self.backend.empty(shape, np.int64),
            self.backend.asarray(self.order),
        )

    def _device_batch(self) -> DeviceBatch:
        """The data, moved to the device once, and a batch's buffers."""
        network, data, backend = self.network, self.data, self.backend
        y, groups, size, models = self._targets(), len(self.order), self.batch_size, slice(0, network.models)
        shift, scale = (None, None) if self.augment else self._input_scaling(models)
        target_shift, target_scale = network.target_scaling_of(models, self.per_model_rows)
        images = any(isinstance(row, RandomShift) for row in self.augment)
        if self._stream is None:
            X, y_there, *weight = (backend.data(v) for v in (data.X, y, data.weight) if v is not None)
        else:
            X, y_there, *weight = self._stream.flat
        return DeviceBatch(
            X=X,
            y=y_there,
            weight=weight[0] if weight else None,
            raw=None,
            x=self.workspace.x,
            targets=backend.empty((groups, size, *y.shape[1:]), y.dtype),
            weights=None if data.weight is None else backend.empty((groups, size), network.dtype),
            shift=shift,
            scale=scale,
            target_shift=target_shift,
            target_scale=target_scale,
            order=self._order,
            batch_size=size,
            counters=self.counters,
            step=self.counters.step,
            spare=backend.empty(self.workspace.x.shape, network.storage) if images else None,
            row_loss=self.counters.row_loss,
            option=backend.option(self.loss, network.dtype),
            shares=self._shares(),
        )

    def _streaming(self) -> Stream | None:
        """The data's way to the device where they are larger than the limit, or than what the device has free."""
        data, backend = self.data, self.backend
        if self.optimizer.full_batch or not must_stream(backend, data.X, self.memory_limit):
            return None  # a full batch lies there as a whole in any case
        arrays = [backend.as_gathered(v) for v in (data.X, self._targets(), data.weight) if v is not None]
        return Stream(backend, arrays, self.order, min(STEPS * self.batch_size, self.order.shape[1]))

    def _shares(self) -> dict[int, DeviceArray]:
        rows = [row for row in self.augment if isinstance(row, Mixup)]
        return {id(row): self.counters.current[len(self.bound.c) + 1 + i] for i, row in enumerate(rows)}

    # --- an epoch

    def begin_epoch(self, epoch: int) -> None:
        self.log[...] = 0.0
        self._report[: 2 * self.log[0].size] = 0
        self._rates, self._known, self._position = None, 0, 0
        if self._stream is not None:
            super().begin_epoch(epoch)  # picks the order on the host
            self._stream.begin_epoch()
        if self._sort is not None:
            keys, index, rows = self._sort
            self.backend.shuffle(keys, index, rows, self._order, self.counters.counts, self.draw, epoch)

    def take_up(self, log: np.ndarray, active: np.ndarray) -> None:
        super().take_up(log, active)
        self._report[: 2 * log[0].size] = log.reshape(-1)

    def epoch_loss(self) -> np.ndarray:
        self.catch_up()
        return super().epoch_loss()

    def last_loss(self) -> np.ndarray:
        self.catch_up()
        losses, weights = self.log[:, :, max(self._known, 1) - 1]
        return np.where(weights > 0, losses, np.nan) if not self.optimizer.full_batch else self._last

    def catch_up(self) -> None:
        """Wait for the device and read what it has logged: losses, steps, models that diverged."""
        if self.optimizer.full_batch or self._known == self._position:
            return
        network, n, models = self.network, self.log[0].size, self.network.models
        report = self._report.get()
        self.log[...] = report[: 2 * n].reshape(self.log.shape)
        made = report[2 * n + models :].view(np.uint64).astype(np.int64) - network.steps
        network.steps += made
        self.bound.t += made
        self._known = self._position
        finite = np.isfinite(self.log[0, :, : self._position]).all(axis=1)
        self.diverged |= self.active & ~finite
        self.diverged_at[self.diverged] = report[2 * n : 2 * n + models].view(np.int64)[self.diverged]
        self.has_diverged = bool(self.diverged.any())

    def release(self) -> None:
        """Give the device's memory back; what the host knows of the fit stays."""
        if getattr(self, "_stream", None) is not None:
            self._stream.close()  # type: ignore[union-attr]
        for name in (
            "workspace",
            "draw",
            "counters",
            "_batch",
            "_order",
            "_sort",
            "_stream",
            "_report",
            "_scaling",
        ):
            vars(self).pop(name, None)
        self._graphs.clear()
        self._events.clear()

    def retire(self, models: np.ndarray) -> None:
        super().retire(models)
        self.counters.active[...] = self.active.astype(np.int32)
        self._rates = None

    # --- steps

    def run(self, position: int, rates: Any, alone: bool = False) -> int:
        if self.optimizer.full_batch:  # a trial of the line search that went too far is no end
            self.counters.active[...] = self.active.astype(np.int32)
        self._provide(position, rates)
        if self.optimizer.full_batch:
            self._last = self._full_batch_step(rates[position])
            return 1
        chunk, within = divmod(position, STEPS)
        most = min(self._table.stop, self.steps_per_epoch, position + STEPS - within) - position
        steps = most if most in (STEPS, self.steps_per_epoch % STEPS) else 1
        if alone or self._eager > 0 or not self._can_capture:
            steps = 1
        if alone:
            self.network.renew()  # the same
        if self._stream is not None:
            self._stream.provide(chunk)
        self._make(steps)
        self._position = position + steps
        if self._stream is not None and self._position % STEPS == 0:
            self._stream.done(chunk)
            self._stream.send(chunk + 1)
        if alone:
            self.catch_up()  # a loss that is not finite ends the fit before anybody is told of it
        return steps

    def _make(self, steps: int) -> None:
        if self._eager > 0:
            self._eager -= 1
            self._launch_step()
            return
        if self._can_capture and steps not in self._graphs:
            self._record(steps)
        if not self._can_capture:
            for _ in range(steps):
                self._launch_step()
            return
        if len(self._events) > AHEAD:  # waited for before the launch: an interruption then finds nothing half done
            self._events.pop(0).wait()
        self._graphs[steps]()
        self._events.append(self.backend.runtime.event())

    def _record(self, steps: int) -> None:
        """Record ``steps`` steps as a graph; where the device cannot, say so once and go on launch by launch."""

        def several() -> None:
            for _ in range(steps):
                self._launch_step()

        try:
            graph = self.backend.runtime.capture(several)
        except Exception as error:
            self._can_capture = False
            warnings.warn(
                f"training steps could not be recorded as a CUDA graph and run launch by launch, which is slower: {error}",
                RuntimeWarning,
                stacklevel=5,
            )
            return
        self._graphs[steps] = graph
        if os.environ.get(CHECK) and len(self._graphs) == 1:
            self._check(graph, several)

    def _check(self, graph: Callable[[], None], eager: Callable[[], None]) -> None:
        """Hold two replays against the same steps launch by launch, from the same state; the state is put back.

        What should change from step to step and was recorded as it stood shows at the second.
        """
        network, c = self.network, self.counters
        changing = [network.flat, *self.bound.states.values(), *network.statistics.values(), self._report]
        changing += [c.step, c.active, c.valid, c.ok, c.current] + ([network.shadow] if network.shadow else [])
        changing += [] if self.average is None else self.average.averages.values()
        before = [array.get() for array in changing]

        def outcome(run: Callable[[], None]) -> list[np.ndarray]:
            for array, values in zip(changing, before, strict=True):
                array[...] = values
            for _ in range(2):
                run()
            return [array.get() for array in changing]

        launched, replayed = outcome(eager), outcome(graph)
        outcome(lambda: None)
        for array, a, b in zip(changing, launched, replayed, strict=True):
            assert np.array_equal(a, b, equal_nan=True), f"a replayed graph differs from its launches in {array!r}"

    def _launch_step(self) -> None:
        """Gather, forward, loss, backward, update, advance: the launches of one step."""
        network, backend, everything = self.network, self.backend, slice(0, self.network.models)
        self._launch_gradient()
        backend.optimizer_step(self.bound, everything, self.counters.current, self.counters)
        for name, max_norm in network._limits:
            backend.limit_norms(network, name, max_norm, everything, self.counters)
        if self.average is not None:
            backend.average(self.average, everything, self.counters)
        backend.advance(self.counters, self.draw.steps, self.batch_size, 1)

    def _launch_gradient(self) -> None:
        workspace, backend, batch = self.workspace, self.backend, self._batch
        assert isinstance(batch, DeviceBatch)
        backend.gather(batch)
        if self.augment:
            self._augment(workspace, batch)
        z = workspace.forward()
        backend.loss(self.loss, z, batch, workspace.dz)
        workspace.backward()

    def _input_scaling(self, models: slice) -> tuple[Any, Any]:
        # Uploaded once: what is recorded must find the same memory at every replay.
        if not hasattr(self, "_scaling"):
            self._scaling = super()._input_scaling(models)
        return self._scaling

    def _full_gradient(self) -> np.ndarray:
        self.draw.steps[...] = self.network.steps
        self._launch_gradient()
        losses = self.counters.losses.get()[:, 0]
        return np.where(self.active, losses, 0.0)

    # --- what the steps read

    def _provide(self, position: int, rates: Any) -> None:
        """Have the table cover ``position`` and the device stand there."""
        if rates is self._rates and position in self._table and position == self._position:
            return
        if rates is not self._rates or position not in self._table:
            self.catch_up()
            self.network.renew()  # a callback may have assigned to the parameters
            self._known = position  # where the host's counts stand, also after a resume
            stop = min(position + TABLE, self.steps_per_epoch)
            self.counters.table[:, : stop - position] = self._coefficients(position, stop, rates)
            self._rates, self._table = rates, range(position, stop)
        self.counters.step[:2] = np.array([position, self._table.start])
        self._position = position
        self.backend.advance(self.counters, self.draw.steps, self.batch_size, 0)

    def _coefficients(self, start: int, stop: int, rates: Any) -> np.ndarray:
        """(rows, steps, models): what each step takes from the optimizer's rows, and the shares of mixup."""
        network, models = self.network, self.network.models
        position = np.arange(start, stop)[:, None]
        own = np.minimum(position, self.own_steps - 1)  # a model with fewer rows has made its last step by then
        made = own - np.minimum(self._known, self.own_steps - 1)  # since the host's counts
        rows = []
        if not self.optimizer.full_batch:
            each = np.stack([np.broadcast_to(np.asarray(rates[p], np.float64), (models,)) for p in range(start, stop)])
            rows.append(self.bound.table(self.bound.t + made + 1, each))
        else:
            rows.append(np.zeros((1, stop - start, models)))
        for row in self.augment:
            if isinstance(row, Mixup):
                steps = network.steps + made
                draws = np.broadcast(network.seeds, network.streams, steps)
                shares = [row.share(int(seed), int(stream), int(step)) for seed, stream, step in draws]
                rows.append(np.reshape(shares, (1, stop - start, models)))
        return np.concatenate(rows)


class DeviceEvaluation(Evaluation):
    """Loss and metrics of a network on rows that lie on the device; the passes are recorded once and replayed."""

    def __init__(self, *args: Any, memory_limit: int | None = None) -> None:
        super().__init__(*args)
        self._streams = must_stream(self.network.backend, self.X, memory_limit)
        self._replay: Callable[[], None] | None = None
        self._z: Any = None
        self._rows: Any = None
        self._parts: list[tuple] = []  # of each stretch of rows: buffers, batch, where its logits go

    def passes(self) -> tuple[np.ndarray, np.ndarray]:
        if self._streams:
            return super().passes()
        self.network.renew()
        if not self._parts:
            self._prepare()
            self._launch()  # kernels are loaded, products planned
        else:
            if self._replay is None:
                self._replay = self._recorded()
            self._replay()
        return self._z.get(), self._rows.get().astype(np.float64)

    def _recorded(self) -> Callable[[], None]:
        """The passes as a graph, or launch by launch where the device records none; the training step has said so."""
        runtime = self.network.backend.runtime  # type: ignore[attr-defined]
        try:
            return runtime.capture(self._launch) if runtime.can_capture else self._launch
        except Exception:
            return self._launch

    def release(self) -> None:
        """Give the device's memory back."""
        self._replay = self._z = self._rows = None
        self._parts = []

    def _prepare(self) -> None:
        network, y, n = self.network, self.y, len(self.X)
        backend, models, everything = network.backend, network.models, slice(0, network.models)
        assert isinstance(backend, GpuBackend)
        per_model = network.scales_apart
        size = min(n, backend.prediction_rows)
        workspace = Workspace(network, size, training=False, per_model_rows=per_model)
        shift, scale = network.standardization_of(everything, per_model)
        target_shift, target_scale = network.target_scaling_of(everything, per_model)
        groups = models if per_model else 1
        self._z = backend.empty((models, n, network.n_outputs), network.storage)
        self._rows = backend.empty((models, n), network.dtype)
        targets = backend.empty((groups, size, *y.shape[1:]), y.dtype)
        whole = DeviceBatch(
            backend.data(self.X), backend.data(y), None, None, workspace.x, targets, None, shift, scale, target_shift,
            target_scale, None, size, None, backend.zeros((8,), np.int64), None, self._rows,
            backend.option(self.loss, network.dtype), {},
        )  # fmt: skip
        for i, start in enumerate(range(0, n, size)):
            rows = min(size, n - start)
            view = workspace.view(everything, rows)
            step = backend.zeros((8,), np.int64)
            step[:1] = i
            part = replace(
                whole, x=view.x, targets=targets[:, :rows], step=step, row_loss=self._rows[:, start : start + rows]
            )
            self._parts.append((view, part, self._z[:, start : start + rows]))

    def _launch(self) -> None:
        backend = self.network.backend
        assert isinstance(backend, GpuBackend)
        for workspace, batch, out in self._parts:
            backend.gather(batch)
            z = workspace.forward(training=False)
            backend.loss(self.loss, z, batch, None)
            backend.add_columns(z, out, adds=False)
