"""What the GPU backend keeps: a layer's products, an optimizer's numbers, and what changes from step to step of a fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..activations import ACTIVATIONS
from .base import Batch, Dense
from .device import DeviceArray, Product, Runtime

if TYPE_CHECKING:
    from .gpu_backend import GpuBackend

WARP = 32  # threads
PARTIALS = 64  # sums of a long vector that are made at a time, and then added in order
LARGEST_GRID = 65_535  # in y and z
# Activations that a product can end with.
EPILOGUES = {"identity": "bias", "relu": "relu_bias", "gelu_tanh": "gelu_bias"}


@dataclass(slots=True)
class Counters:
    """What of a fit changes from step to step, in device memory: kernels read and advance it."""

    step: DeviceArray  # (8,) i64: position in the epoch, position of the table's first row
    counts: DeviceArray  # (models,) i64 rows of each model
    active: DeviceArray  # (models,) i32
    valid: DeviceArray  # (models + 1,) i32 rows of the present batch; behind them the largest
    ok: DeviceArray  # (models,) i32 the batch's loss is finite
    table: DeviceArray  # (rows, steps, models) coefficients of the optimizer's steps
    current: DeviceArray  # (rows, models) those of the present step
    losses: DeviceArray  # (models, steps) f64 mean loss of each batch
    weights: DeviceArray  # (models, steps) f64
    diverged_at: DeviceArray  # (models,) i64
    row_loss: DeviceArray  # (models, batch)
    weight_total: DeviceArray  # (models or 1,)


@dataclass(slots=True)
class DeviceBatch(Batch):
    """A batch whose rows a kernel finds by itself."""

    order: DeviceArray | None  # (models or 1, rows) i64 row numbers in the order of the epoch; None: as they stand
    batch_size: int
    counters: Counters | None
    step: DeviceArray  # (8,) i64, element 0 the batch's number
    spare: DeviceArray | None  # of x's shape, for a shift of images
    row_loss: DeviceArray  # (models, batch)
    option: tuple  # of the loss: values on the device or None, strides over models and outputs
    shares: dict[int, DeviceArray]  # of each mixup, by id: (models,)


class DenseWork:
    """A layer's products, and scratch for its column sums: made once.

    ``forward`` and ``backward`` hold ways to the same result: a plain product, which own kernels go on from, and one with
    an epilogue where cuBLASLt has it. The device says which takes less time.
    """

    def __init__(self, backend: GpuBackend, dense: Dense) -> None:
        runtime, f = backend.runtime, dense.f
        dense.work = self
        if f.name not in ACTIVATIONS:
            raise ValueError(f"activation {f.name!r} is not in gpumlp's table and has no kernel: use device='cpu'")
        self.row, self.alpha = list(ACTIVATIONS).index(f.name), 0.0 if f.alpha is None else float(f.alpha)
        tf32 = dense.tf32 and runtime.capability >= (8, 0)  # a permission: older GPUs have none
        models, batch, units = dense.z.shape
        W_T = dense.W.swapaxes(1, 2)
        x = dense.x
        self.forward = [runtime.product(Product(x, W_T, dense.z, tf32=tf32))]  # z = x W.T: (models, batch, fan_out)
        self.way = self.backward_way = 0
        ending = EPILOGUES.get(f.name)
        key = f"{dense.z.type}{' tf32' * tf32} {x.shape} {x.strides} {dense.W.shape} {dense.W.strides} {f.name}"
        # Own kernels drop out in the pass that adds the bias; behind an epilogue that would be one more.
        if ending and dense.working_b is not None and dense.before is None and dense.dropout is None:
            auxiliary = dense.z if ending == "gelu_bias" else None
            product = Product(x, W_T, dense.a, False, ending, dense.working_b, auxiliary, tf32)
            self.way = _choose(runtime, f"forward {key}", self.forward, product, lambda: backend.activate(
                dense, dense.u, dense.a, dense.b, None, self.row, self.alpha))  # fmt: skip
        self.input: Callable[[], None] | None = None
        self.partial = self.tickets = None
        if dense.d is None:
            return
        wide = dense.db.type if dense.db is not None else "f64" if dense.d.type == "f64" else "f32"
        tiles = -(-units // WARP)
        splits = max(1, min(-(-batch // 64), 4 * runtime.processors // max(1, tiles * models)))
        self.tiles = (tiles, min(models, LARGEST_GRID), splits)
        self.partial = DeviceArray.empty(runtime, (models, splits, units), wide)
        self.tickets = backend.zeros((models, tiles), "u32")
        d_T = dense.d.swapaxes(1, 2)
        self.backward = [
            runtime.product(Product(d_T, x, dense.dW, tf32=tf32))
        ]  # dW = dz.T x: (models, fan_out, fan_in)
        if dense.db is not None and self.row == 0 and dense.dropout is None and dense.before is None:
            product = Product(d_T, x, dense.dW, False, "bias_gradient", dense.db, None, tf32)
            self.backward_way = _choose(runtime, f"backward {key}", self.backward, product, lambda: backend.derive(
                dense, None, None, dense.db, 0))  # type: ignore[arg-type]  # fmt: skip
        if dense.dx is not None:
            product = Product(dense.d, dense.W, dense.dx, adds=dense.dx_adds, tf32=tf32)
            self.input = runtime.product(product)  # dx = dz W: (models, batch, fan_in)


def _choose(runtime: Runtime, key: str, ways: list, product: Product, rest: Callable[[], None]) -> int:
    """Add the way with an epilogue to ``ways``, where it is to be had; returns which takes less time.

    ``rest`` is what the plain way needs beside its product.
    """
    plain = ways[0]

    def both() -> None:
        plain()
        rest()

    try:
        ways.append(runtime.product(product))
    except ValueError:  # a shape that cuBLASLt has no epilogue for
        return 0
    return runtime.fastest(key, [both, ways[1]])


class OptimizerWork:
    """An optimizer's own numbers on the device."""

    def __init__(self, backend: GpuBackend, bound: Any) -> None:
        optimizer, models, dtype = bound.optimizer, bound.network.models, bound.network.dtype
        if not optimizer.rule and not optimizer.full_batch:
            raise ValueError(f"{type(optimizer).__name__} is not in gpumlp's table and has no kernel: use device='cpu'")

        def column(value: Any, wanted: bool = True) -> DeviceArray | None:
            if value is None or not wanted:
                return None
            return backend.asarray(np.broadcast_to(np.asarray(value, dtype).reshape(-1), (models,)))

        self.l1, self.l2 = column(optimizer.l1, bound.has_l1), column(optimizer.l2, bound.has_l2)
        self.clip_value, self.clip_norm = column(optimizer.clip_value), column(optimizer.clip_norm)
        self.partials = backend.empty((models, PARTIALS), dtype)
        self.current = backend.empty((len(bound.c) + 1, models), dtype)
