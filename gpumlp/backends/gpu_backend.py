"""The backend's verbs as kernel launches and matrix products, over a device (``device.Runtime``).

A verb of a training step launches and returns. Arguments are pointers and sizes that stay the same from step to step, so a
recorded sequence of verbs is a whole training step. What brings numbers to the host (``to_numpy``, ``dot``,
``first_nonfinite``) waits for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import random
from ..data.checks import largest_of
from ..losses import LOSSES
from .base import Dense, Draw, Dropout, Embed, Join, Norm
from .device import TYPE_NAMES, DeviceArray, Runtime, bind
from .gpu_work import LARGEST_GRID, PARTIALS, WARP, Counters, DenseWork, DeviceBatch, OptimizerWork

THREADS = 256  # of a block
BLOCKS = 8  # of a grid, for each multiprocessor
UPLOADED_AS = {"u32": np.int64, "u64": np.float64}  # types of data that no kernel gathers
WIDENED = (*UPLOADED_AS, "bf16")  # the same of data that are on the device already
OLDEST_BF16 = (8, 0)  # compute capability
LOCAL_SORT = 1024  # elements that a block sorts in shared memory


class GpuBackend:
    """All verbs on a device."""

    name = "gpu"
    is_device = True
    keeps_masks = False
    prediction_rows = 16_384

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.device = runtime, runtime.device
        self._partials: dict[int, DeviceArray] = {}  # of dot, by the number of models

    # --- arrays

    def empty(self, shape, dtype) -> DeviceArray:
        return DeviceArray.empty(self.runtime, shape, dtype if isinstance(dtype, str) else TYPE_NAMES[np.dtype(dtype)])

    def zeros(self, shape, dtype) -> DeviceArray:
        array = self.empty(shape, dtype)
        self.runtime.zero(array.pointer, array.nbytes)
        return array

    def asarray(self, values, dtype=None) -> DeviceArray:
        if isinstance(values, DeviceArray):
            return values
        values = np.asarray(values, dtype)
        array = self.empty(values.shape, values.dtype)
        array[...] = values
        return array

    def to_numpy(self, array) -> np.ndarray:
        return array.get() if isinstance(array, DeviceArray) else array

    def adopt(self, values):
        return self.runtime.adopt(values)

    def export(self, values, like):
        return self.runtime.export(self.asarray(values), like)

    def draw(self, seeds, streams, steps) -> Draw:
        return Draw(*(self.asarray(values.astype(np.uint64)) for values in (seeds, streams, steps)))

    def storage(self, dtype, precision):
        if precision == "bf16" and self.runtime.capability < OLDEST_BF16:
            has = ".".join(map(str, self.runtime.capability))
            raise ValueError(
                f"precision='bf16' needs a GPU of compute capability 8.0 (Ampere) or later; {self.device} has {has}: "
                "use precision='float32'"
            )
        return "bf16" if precision == "bf16" else dtype

    def data(self, values: Any) -> DeviceArray:
        """A data set, in its own type where a kernel gathers that."""
        if not isinstance(values, DeviceArray):
            return self.asarray(self.as_gathered(values))
        if values.type not in WIDENED:
            return values
        wide = self.empty(values.shape, np.float64)
        self.fill(wide[None], values[None])
        return wide

    def as_gathered(self, values: np.ndarray) -> np.ndarray:
        """The values on the host, in a type that a kernel gathers."""
        return values.astype(UPLOADED_AS.get(TYPE_NAMES[values.dtype], values.dtype), copy=False)

    def fill(self, x, rows) -> None:
        if not isinstance(rows, DeviceArray):
            rows = self.data(np.asarray(rows))
        if rows.ndim == 2 and x.ndim == 3:
            rows = rows[None]
        n = int(np.prod(x.shape[1:]))
        models = len(x)
        stride = rows.strides[0] if len(rows) == models else 0
        grid = (self._blocks(n, 4), min(models, LARGEST_GRID))
        self._launch(f"cast_{rows.type}_{x.type}", grid, rows, stride, x, x.strides[0], n, models)

    # --- launching

    def _launch(self, name: str, grid: tuple, *arguments: Any, block: tuple = (THREADS,)) -> None:
        instance, values = bind(name, arguments)
        self.runtime.launch(instance, (*grid, 1, 1)[:3], (*block, 1, 1)[:3], values)

    def _blocks(self, n: int, each: int) -> int:
        """Blocks for n elements of which a thread takes ``each`` at a time."""
        return max(1, min(-(-n // (THREADS * each)), BLOCKS * self.runtime.processors))

    def _row_blocks(self, rows: int) -> int:
        """Blocks for a warp per row."""
        return max(1, min(-(-rows // (THREADS // WARP)), BLOCKS * self.runtime.processors))

    # --- the batch

    def gather(self, batch: DeviceBatch, rows: Any = None) -> None:  # type: ignore[override]
        x, targets, spare = batch.x, batch.targets, batch.spare
        models, size, features = x.shape
        counters = batch.counters
        valid = None if counters is None else counters.valid[_valid_from(counters, models) :]
        labels = targets.type == "i64"
        order = batch.order
        shift, scale, target_shift, target_scale = batch.shift, batch.scale, batch.target_shift, batch.target_scale
        assert spare is None or shift is None
        self._launch(
            f"gather_{batch.X.type}_{x.type}",
            (self._blocks(size * features, 4), min(models, LARGEST_GRID)),
            *(batch.X, order, 0 if order is None else order.strides[0], batch.step, batch.batch_size, valid),
            *(x, x.strides[0], features, shift, scale, _model_stride(shift)),
            *(batch.y if labels else None, targets if labels else None),
            *(None if labels else batch.y, None if labels else targets),
            *(1 if labels else targets.shape[2], targets.strides[0]),
            *(target_shift, target_scale, _model_stride(target_shift)),
            *(batch.weight, batch.weights, 0 if batch.weights is None else batch.weights.strides[0]),
            *(models, size),
        )

    def standardize(self, x, shift, scale) -> None:
        if shift is None:
            return
        models, size, features = x.shape
        grid = (self._blocks(size * features, 4), min(models, LARGEST_GRID))
        self._launch(
            f"standardize_{x.type}", grid, x, x.strides[0], features, shift, scale, _model_stride(shift), models, size
        )

    def augment(self, row, batch: DeviceBatch, draw: Draw) -> None:  # type: ignore[override]
        counters, x = batch.counters, batch.x
        assert counters is not None
        models, size, features = x.shape
        valid, streams = counters.valid, (draw.seeds, draw.streams, draw.steps)
        grid = (self._blocks(size * features, 4), min(models, LARGEST_GRID))
        kind = type(row).__name__
        if kind == "GaussianNoise":
            self._launch(f"noise_{x.type}", grid, x, x.strides[0], features, *streams, valid, row.std, models, size)
        elif kind == "Mixup":
            targets, weights = batch.targets, batch.weights
            self._launch(
                f"mixup_{x.type}", grid, x, x.strides[0], features, targets, targets.shape[2], targets.strides[0],
                weights, 0 if weights is None else weights.strides[0], valid, batch.shares[id(row)], models, size,
            )  # fmt: skip
        else:
            spare, (rows, columns) = batch.spare, row.image_shape
            assert kind == "RandomShift" and spare is not None
            self._launch(
                f"shift_images_{x.type}", grid, x, spare, x.strides[0], rows, columns, row.pixels, *streams, valid,
                models, size,
            )  # fmt: skip
            self.runtime.copy(x.pointer, spare.pointer, x.nbytes)

    # --- layers

    def prepare(self, dense: Dense) -> None:
        # Ways to a product are tried where its result goes, and the gradient there may still wait for its update.
        kept = [(gradient, self._copy(gradient)) for gradient in (dense.dW, dense.db) if gradient is not None]
        DenseWork(self, dense)
        for gradient, values in kept:
            gradient[...] = values

    def _copy(self, array: DeviceArray) -> DeviceArray:
        copy = DeviceArray.empty(self.runtime, array.shape, array.type)
        copy[...] = array
        return copy

    def dense_forward(self, dense: Dense, draw: Draw | None, update_running: bool) -> None:
        work, training = dense.work, draw is not None
        work.forward[work.way]()
        if dense.before is not None:
            if dense.b is not None:
                self.activate(dense, dense.z, dense.z, dense.b, None, 0, 1.0)
            self._norm_forward(dense.before, training, update_running)
        dropped = dense.after is None and dense.dropout is not None and training
        bias = None if dense.before is not None or work.way else dense.b
        if work.way == 0 and (dense.a is not dense.u or bias is not None or dropped or work.row != 0):
            self.activate(dense, dense.u, dense.a, bias, draw if dropped else None, work.row, work.alpha)
        elif dropped:
            self.dropout_forward(dense.dropout, draw)  # type: ignore[arg-type]
        if dense.after is not None:
            self._norm_forward(dense.after, training, update_running)
            if dense.dropout is not None:
                self.dropout_forward(dense.dropout, draw)
        elif dense.dropout is not None and not training:
            self.dropout_forward(dense.dropout, None)

    def dense_backward(self, dense: Dense, draw: Draw) -> None:
        work, d = dense.work, dense.d
        dropout = dense.dropout
        if dense.after is not None:
            if dropout is not None:
                self._dropout(dropout, d, d, draw)
                dropout = None
            self._norm_backward(dense.after)
        needs_sum = dense.db is not None and not work.backward_way
        identity = work.row == 0 and dropout is None
        if not identity or (needs_sum and dense.before is None):
            db = dense.db if needs_sum and dense.before is None else None
            self.derive(dense, dropout, draw, db, work.row)
        if dense.before is not None:
            self._norm_backward(dense.before)
            if needs_sum:
                self.derive(dense, None, draw, dense.db, 0)
        work.backward[work.backward_way]()
        if work.input is not None:
            work.input()

    def activate(self, dense: Dense, z, a, b, draw: Draw | None, row: int, alpha: float) -> None:
        models, batch, units = a.shape
        dropout = dense.dropout if draw is not None else None
        self._launch(
            f"dense_forward_{a.type}",
            (self._blocks(batch * units, 8), min(models, LARGEST_GRID)),
            *(z, a, None if dropout is None else dropout.out, a.strides[0], b, 0 if b is None else b.strides[0]),
            *(row, alpha, *self._draws(dropout, draw), models, batch, units),
        )

    def derive(self, dense: Dense, dropout: Dropout | None, draw: Draw, db: Any, row: int) -> None:
        d, work = dense.d, dense.work
        models, batch, units = d.shape
        self._launch(
            f"dense_backward_{d.type}",
            work.tiles,
            *(d, dense.u, dense.a, d.strides[0], row, work.alpha, *self._draws(dropout, draw)),
            *(db, 0 if db is None else db.strides[0], work.partial, work.tickets, models, batch, units),
            block=(WARP, THREADS // WARP),
        )

    def _draws(self, dropout: Dropout | None, draw: Draw | None) -> tuple:
        """The arguments that say where a dropout's numbers come from."""
        if dropout is None or draw is None:
            return None, None, None, 0, None, None
        if dropout.work is None:
            scales = (1.0 / (1.0 - np.asarray(dropout.rates))).astype(np.float64)
            thresholds = np.array([random.keep_threshold(rate) for rate in dropout.rates], np.uint32)
            wide = np.float64 if dropout.x.type == "f64" else np.float32
            dropout.work = self.asarray(thresholds), self.asarray(scales.astype(wide))
        return draw.seeds, draw.streams, draw.steps, dropout.layer, *dropout.work

    def dropout_forward(self, dropout: Dropout, draw: Draw | None) -> None:
        self._dropout(dropout, dropout.x, dropout.out, draw)

    def _dropout(self, dropout: Dropout, x, out, draw: Draw | None) -> None:
        models, batch, units = out.shape
        grid = (self._blocks(batch * units, 8), min(models, LARGEST_GRID))
        stride = 0 if len(x) < models else x.strides[0]
        draws = self._draws(dropout, draw)
        self._launch(f"dropout_{out.type}", grid, x, stride, out, out.strides[0], *draws, models, batch * units)

    def embed_forward(self, embed: Embed) -> None:
        models, batch, width = embed.out.shape
        grid = (self._blocks(batch * width, 4), min(models, LARGEST_GRID))
        self._launch(
            f"embed_forward_{embed.x.type}_{embed.out.type}",
            grid,
            *(*self._codes(embed), embed.E, embed.E.strides[0], embed.E.shape[2]),
            *(embed.out, embed.out.strides[0], models, batch),
        )

    def embed_backward(self, embed: Embed) -> None:
        models, codes, units = embed.dE.shape  # type: ignore[union-attr]
        batch, across = embed.out.shape[1], min(models, LARGEST_GRID)
        dE, stride = embed.dE, embed.dE.strides[0]  # type: ignore[union-attr]
        self._launch(
            f"embed_clear_{embed.x.type}", (self._blocks(codes * units, 4), across), dE, stride, codes * units, models
        )
        self._launch(
            f"embed_backward_{embed.x.type}_{embed.out.type}",
            (self._row_blocks(batch * (len(embed.starts) - 1)), across),
            *(*self._codes(embed), dE, stride, units, embed.d, embed.d.strides[0], models, batch),  # type: ignore[union-attr]
        )

    def _codes(self, embed: Embed) -> tuple:
        """The arguments that say where a batch's codes are."""
        if embed.work is None:
            embed.work = self.asarray(embed.starts)
        x = embed.x
        return x, x.strides[0] if len(x) == len(embed.E) else 0, embed.numbers, embed.work, len(embed.starts) - 1

    def join(self, join: Join) -> None:
        start = 0
        for i, part in enumerate(join.parts):
            width = part.shape[2]
            out = join.out[..., start : start + width] if join.concat else join.out
            self.add_columns(part, out, adds=bool(i) and not join.concat)
            start += width

    def split(self, join: Join) -> None:
        start = 0
        for part, (buffer, adds) in zip(join.parts, join.to, strict=True):
            width = part.shape[2]
            if buffer is not None:
                self.add_columns(join.d[..., start : start + width] if join.concat else join.d, buffer, adds)
            start += width

    def add_columns(self, values, out, adds: bool) -> None:
        models, batch, width = out.shape
        grid = (self._blocks(batch * width, 4), min(models, LARGEST_GRID))
        stride = 0 if len(values) < models else values.strides[0]
        self._launch(
            f"add_columns_{out.type}",
            grid,
            *(values, stride, values.strides[1], out, out.strides[0], out.strides[1], int(adds), models, batch, width),
        )

    # --- normalisation

    def _norm_forward(self, norm: Norm, training: bool, update_running: bool) -> None:
        models, batch, units = norm.out.shape
        arrays = (norm.x, norm.x_hat, norm.out, norm.out.strides[0], norm.inverse_std, norm.inverse_std.strides[0])
        parameters = (norm.gamma, norm.beta, norm.gamma.strides[0])
        if norm.kind == "layer":
            grid = (self._row_blocks(batch), min(models, LARGEST_GRID))
            self._launch(f"layer_norm_forward_{norm.out.type}", grid, *arrays, *parameters, models, batch, units)
            return
        mean, variance = norm.running_mean, norm.running_variance
        self._launch(
            f"batch_norm_forward_{norm.out.type}",
            self._columns(models, units),
            *(*arrays, *parameters, mean, variance, mean.strides[0], norm.valid),  # type: ignore[union-attr]
            *(int(training), int(training and update_running), models, batch, units),
            block=(WARP, THREADS // WARP),
        )

    def _norm_backward(self, norm: Norm) -> None:
        models, batch, units = norm.d.shape
        inverse_std, gamma, sums = norm.inverse_std, norm.gamma, (norm.dgamma, norm.dbeta, norm.gamma.strides[0])
        arrays = (norm.d, norm.x_hat, norm.d.strides[0])
        columns, block, T = self._columns(models, units), (WARP, THREADS // WARP), norm.d.type
        if norm.kind == "batch":
            self._launch(
                f"batch_norm_backward_{T}",
                columns,
                *(*arrays, inverse_std, inverse_std.strides[0], gamma, *sums, norm.valid, models, batch, units),
                block=block,
            )
            return
        self._launch(f"layer_norm_parameters_{T}", columns, *arrays, *sums, models, batch, units, block=block)
        grid = (self._row_blocks(batch), min(models, LARGEST_GRID))
        self._launch(
            f"layer_norm_backward_{T}",
            grid,
            *(*arrays, inverse_std, inverse_std.strides[0], gamma, gamma.strides[0], models, batch, units),
        )

    def _columns(self, models: int, units: int) -> tuple[int, int]:
        return -(-units // WARP), min(models, LARGEST_GRID)

    # --- loss and update

    def loss(self, loss: Any, z, batch: DeviceBatch, dz) -> None:  # type: ignore[override]
        models, size, outputs = z.shape
        counters, weights, targets = batch.counters, batch.weights, batch.targets
        valid = None if counters is None else counters.valid
        weight_stride = 0 if weights is None or len(weights) < models else weights.strides[0]
        total = total_stride = None
        if weights is not None and counters is not None:
            total = counters.weight_total
            groups = len(weights)
            first = valid[_valid_from(counters, groups) :]  # type: ignore[index]
            grid = (1, min(groups, LARGEST_GRID))
            self._launch(f"weight_total_{total.type}", grid, weights, weights.strides[0], first, total, groups)
            total_stride = int(groups > 1)
        elif counters is None:
            weights = None  # an evaluation takes each row's loss as it is
        T, row_loss = z.type, batch.row_loss
        target_stride = 0 if len(targets) < models else targets.strides[0]
        tail = (
            *(*batch.option, weights, weight_stride, total, total_stride or 0, valid),
            *(row_loss, row_loss.strides[0]),
        )
        grid = (self._row_blocks(size) if outputs <= 1024 else min(size, 65_535), min(models, LARGEST_GRID))
        labels = targets.type == "i64"
        if loss.row.name == "softmax_cross_entropy":
            y = (targets if labels else None, None if labels else targets)
            self._launch(
                f"softmax_loss_{T}", grid, z, dz, z.strides[0], *y, target_stride, *tail, None, models, size, outputs
            )
        else:
            row = list(LOSSES).index(loss.row.name)
            arrays = (z, dz, z.strides[0], targets, target_stride)
            self._launch(f"elementwise_loss_{T}", grid, row, *arrays, *tail, models, size, outputs)
        if counters is not None:
            C = row_loss.type
            self._launch(
                f"loss_total_{C}",
                (min(models, LARGEST_GRID),),
                *(row_loss, row_loss.strides[0], weights, weight_stride, valid, counters.step, counters.losses),
                *(
                    counters.weights,
                    counters.losses.strides[0],
                    counters.ok,
                    counters.active,
                    counters.diverged_at,
                    models,
                ),
            )

    def option(self, loss: Any, dtype: np.dtype) -> tuple:
        """A loss's option on the device, and its strides over models and outputs.

        Raises:
            ValueError: a loss that is not in the table, and has no kernel.
        """
        if LOSSES.get(loss.row.name) is not loss.row:
            raise ValueError(f"loss {loss.row.name!r} is not in gpumlp's table and has no kernel: use device='cpu'")
        if not loss.options:
            return None, 0, 0
        ((name, value),) = loss.options.items()
        values, several = self.asarray(np.atleast_1d(np.asarray(value, dtype))), int(np.ndim(value) > 0)
        return (values, 0, several) if name == "quantile" else (values, several, 0)

    def update(self, bound: Any, models: slice, learning_rate: Any) -> None:
        bound.advance(models, learning_rate)
        work = self._optimizer_work(bound)
        values = np.concatenate([bound.c, bound.shrink.T])
        work.current[...] = values
        self.optimizer_step(bound, models, work.current, None)

    def optimizer_step(self, bound: Any, models: slice, current: DeviceArray, counters: Counters | None) -> None:
        """One launch (two with clipping) over the flat buffer, with the coefficients in ``current`` (rows, models)."""
        network, optimizer, work = bound.network, bound.optimizer, self._optimizer_work(bound)
        w, g = network.flat[models], network.flat_gradient[models]
        count, n = w.shape
        T, stride = w.type, w.strides[0]
        of = lambda array: None if array is None else array[models]  # noqa: E731
        partials = None
        if work.clip_norm is not None:
            grid = (PARTIALS, min(count, LARGEST_GRID))
            partials = work.partials[models]
            self._launch(f"gradient_norm_{T}", grid, g, stride, n, of(work.clip_value), partials, count)
        states = [*(state[models] for state in bound.states.values()), None, None][:2]
        shrink = current[len(bound.c), models] if bound.has_decay else None
        valid, ok = (None, None) if counters is None else (counters.valid, counters.ok)
        self._launch(
            f"update_{optimizer.rule}_{T}",
            (self._blocks(n, 4), min(count, LARGEST_GRID)),
            *(w, g, *states, stride, n, network.n_weights, current[:, models], current.strides[0]),
            *(of(work.l1), of(work.l2), shrink, of(work.clip_value), of(work.clip_norm), partials, PARTIALS),
            *(of(network.shadow), valid, ok, count),
        )

    def _optimizer_work(self, bound: Any) -> OptimizerWork:
        if bound.work is None:
            bound.work = OptimizerWork(self, bound)
        return bound.work

    def limit_norms(self, network: Any, name: str, max_norm: float, models: slice, counters: Any = None) -> None:
        W, stride = network.parameters[name][models], network.flat.strides[0]
        shadow = None if network.shadow is None else network.working[name][models]
        count, units, fan_in = W.shape
        valid, ok = (None, None) if counters is None else (counters.valid, counters.ok)
        grid = (self._row_blocks(units), min(count, LARGEST_GRID))
        self._launch(f"limit_norms_{W.type}", grid, W, stride, units, fan_in, max_norm, shadow, ok, valid, count)

    def average(self, average: Any, models: slice, counters: Any = None) -> None:
        rest = average.rest[models]
        valid, ok = (None, None) if counters is None else (counters.valid, counters.ok)
        for name, values in average.weights.items():
            mean, w = average.averages[name][models], values[models]
            count, n = w.shape
            grid = (self._blocks(n, 4), min(count, LARGEST_GRID))
            self._launch(f"average_{w.type}", grid, mean, w, w.strides[0], n, rest, valid, ok, count)

    # --- vectors of parameters, for L-BFGS

    def dot(self, a, b) -> np.ndarray:
        models, n = a.shape
        if models not in self._partials:
            self._partials[models] = self.empty((models, PARTIALS), np.float64)
        partial = self._partials[models]
        grid = (PARTIALS, min(models, LARGEST_GRID))
        b_stride = 0 if b is None else b.strides[0]
        self._launch(f"dot_{a.type}", grid, a, a.strides[0], b, b_stride, n, partial, models)
        return partial.get().sum(axis=1)

    def combine(self, out, alpha, x, beta, y) -> None:
        models, n = out.shape
        alpha, beta = (None if v is None else self.asarray(np.asarray(v, out.dtype)) for v in (alpha, beta))
        y_stride = 0 if y is None else y.strides[0]
        grid = (self._blocks(n, 4), min(models, LARGEST_GRID))
        self._launch(
            f"combine_{out.type}", grid, out, out.strides[0], alpha, x, x.strides[0], beta, y, y_stride, n, models
        )

    def penalize(self, bound: Any) -> None:
        network, work = bound.network, self._optimizer_work(bound)
        g, w, n = network.flat_gradient, network.flat, network.n_weights
        grid = (self._blocks(n, 4), min(network.models, LARGEST_GRID))
        self._launch(f"penalize_{g.type}", grid, g, w, w.strides[0], n, work.l1, work.l2, network.models)

    # --- the steps of a fit

    def advance(self, counters: Counters, steps: DeviceArray, batch_size: int, by: int) -> None:
        """End a step (``by`` = 1), or set up the present one (0)."""
        c = counters
        rows, length, models = c.table.shape
        self._launch(
            f"advance_{c.table.type}",
            (1,),
            *(
                c.step,
                by,
                batch_size,
                c.counts,
                c.active,
                c.valid,
                c.ok,
                steps,
                c.table,
                rows,
                length,
                c.current,
                models,
            ),
        )

    def shuffle(self, keys, index, rows, order, counts, draw: Draw, epoch: int) -> None:
        """order ← rows in the order of the epoch: a stable argsort of random words, by a bitonic sort."""
        models, stride = keys.shape
        across = min(models, LARGEST_GRID)
        grid = (self._blocks(stride, 1), across)
        self._launch("shuffle_words", grid, keys, index, stride, counts, draw.seeds, draw.streams, epoch, models)
        tiles = (max(1, -(-stride // LOCAL_SORT)), across)
        local = min(stride, LOCAL_SORT)
        if local > 1:
            self._launch("sort_local", tiles, keys, index, stride, 2, local, models)
        size = 2 * LOCAL_SORT
        while size <= stride:
            distance = size // 2
            while distance >= LOCAL_SORT:
                self._launch("sort_pass", grid, keys, index, stride, size, distance, models)
                distance //= 2
            self._launch("sort_local", tiles, keys, index, stride, size, size, models)
            size *= 2
        rows_stride = 0 if len(rows) < models else rows.strides[0]
        self._launch("take_rows", grid, rows, rows_stride, index, stride, order, order.strides[0], counts, models)

    def first_nonfinite(self, x: DeviceArray, dtype: Any) -> int | None:
        """Where in a contiguous array the first number stands that is not finite in ``dtype``; waits for the device."""
        if x.type not in ("f16", "f32", "f64", "bf16"):
            return None
        first = self.asarray(np.full(1, 2**64 - 1, np.uint64))
        largest = largest_of(dtype, x.dtype)
        self._launch(f"find_nonfinite_{x.type}", (self._blocks(x.size, 4),), x, x.size, largest, first)
        found = int(first.get()[0])
        return None if found == 2**64 - 1 else found


def _valid_from(counters: Counters, groups: int) -> int:
    """Where in ``valid`` the groups of rows stand: each model's own, or the one entry for rows that all share."""
    models = len(counters.counts)
    return 0 if groups == models else models


def _model_stride(values: DeviceArray | None) -> int:
    """From one model to the next in (models or 1, 1, n)."""
    return 0 if values is None or len(values) == 1 else values.strides[0]
