"""How near each kernel comes to the speed of memory: the bytes that it has to move over its time, against a copy.

    python bench/kernels.py --sizes 16,64,256 --json bench/results/kernels-GPU-DATE.json

Each kernel is first held against NumPy at a small size. See bench/README.md for what is counted and how it is timed.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import machine  # puts the checkout on the path
import numpy as np
from timing import launch_times, summary
from train_step import write_json

import gpumlp as gm
from gpumlp import random
from gpumlp.activations import ACTIVATIONS
from gpumlp.averaging import WeightAverage
from gpumlp.backends.base import Dropout
from gpumlp.backends.device import ITEM_SIZES, DeviceArray
from gpumlp.backends.gpu_backend import GpuBackend
from gpumlp.backends.gpu_work import PARTIALS, DeviceBatch
from gpumlp.backends.numpy_backend import NumpyBackend, norm_backward, norm_forward
from gpumlp.losses import get_loss, weighted_mean
from gpumlp.workspace import Workspace

MIB = 1 << 20
SIZES = (16, 64, 256)  # MiB of the largest array
CHECKED = 33 * 1024  # elements of the largest array where a kernel is held against NumPy
COLD = 512 * MIB  # copies of a kernel's arrays that take turns fill about this, so that none is found in a cache
MOST_COPIES = 64
GOAL, GOAL_FROM = 0.85, 64  # share of a copy's bandwidth that element-wise kernels are to reach, from this many MiB on
UNITS, FEATURES = 1024, 784  # of a layer, and of an image
TOLERANCES = {"f32": 2e-5, "bf16": 2e-2, "f64": 1e-9}  # of the largest value; whole numbers are exact

# Kernels that have no line in the table, and why.
NOT_TIMED = {
    "advance": "one block over a few numbers for each model",
    "loss_total": "one block for each model over the losses of its batch",
    "weight_total": "one block for each model over the weights of its batch",
    "limit_norms": "writes back the rows that are too long: what it moves depends on the weights",
}


# --- what a row is ------------------------------------------------------------------------------------------------


@dataclass
class Job:
    """A launch on arrays of its own. What it moves are the arrays that it has to read and to write, each counted once for
    every time that it cannot but be."""

    run: Callable[[], None]
    reads: dict[str, DeviceArray]
    writes: dict[str, DeviceArray]
    wanted: Callable[[], list[tuple[Any, np.ndarray]]]  # arrays, and what NumPy says they hold after one launch
    times: int = 1  # that reads and writes happen, in a row of several launches

    @property
    def moved(self) -> int:
        return self.times * sum(array.nbytes for array in (*self.reads.values(), *self.writes.values()))

    @property
    def formula(self) -> str:
        sides = {"read": self.reads, "write": self.writes}
        text = "; ".join(f"{verb} {', '.join(arrays)}" for verb, arrays in sides.items() if arrays)
        return text if self.times == 1 else f"{self.times} × ({text})"


@dataclass(frozen=True)
class Sum:
    """Partial sums as what they stand for."""

    partials: DeviceArray

    @property
    def type(self) -> str:
        return self.partials.type

    def get(self) -> np.ndarray:
        return self.partials.get().sum(axis=1, dtype=np.float64)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    type: str  # in which the largest array is stored
    templates: str  # of kernels/, that it launches
    make: Callable[[Maker, int], Job]  # for so many elements of the largest array
    is_elementwise: bool = True

    @property
    def kernels(self) -> list[str]:
        return self.templates.split()


class Maker:
    """Arrays for a job: random ones, the same for everybody."""

    def __init__(self, backend: GpuBackend) -> None:
        self.backend = backend
        rng = np.random.default_rng(0)
        self.normals = rng.standard_normal(MIB + 7, dtype=np.float32)  # an odd number: rows differ
        self.integers = rng.integers(0, 256, MIB + 7).astype(np.uint8)
        one = np.ones(1, np.uint64)
        self.draw = backend.draw(one, one, one)
        self._networks: dict[int, Any] = {}

    def room(self, shape: tuple[int, ...], type: str = "f32") -> DeviceArray:
        return DeviceArray.empty(self.backend.runtime, shape, type)

    def put(self, shape: tuple[int, ...], type: str = "f32") -> DeviceArray:
        array = self.room(shape, type)
        array[...] = np.resize(self.normals if type in ("f32", "bf16") else self.integers, shape)
        return array

    def fill(self, *arrays: DeviceArray) -> None:
        for array in arrays:
            array[...] = np.resize(self.normals, array.shape)

    def batch(self, x: DeviceArray, **others: Any) -> Any:
        """As much of a batch as an augmentation or a loss looks at."""
        rows = self.backend.asarray(np.full(2, x.shape[1], np.int32))
        return SimpleNamespace(x=x, weights=None, counters=SimpleNamespace(valid=rows), **others)

    def layer(self, n: int, activation: str, type: str, **options: Any) -> tuple[Workspace, Any]:
        """A layer's buffers for n outputs, filled; its products are small and not run."""
        layer = gm.Dense(UNITS, activation, **options)
        precision = "bf16" if type == "bf16" else "float32"
        network = gm.Network([layer], n_features=8, device=self.backend, precision=precision)
        workspace = Workspace(network, n // UNITS, training=True, per_model_rows=False)
        dense: Any = workspace.operations[0]
        self.fill(dense.z, dense.d)
        dense.a[...] = dense.f.f(np.resize(self.normals, dense.a.shape))  # derivatives count on what f can give
        if dense.b is not None:
            self.fill(dense.b)
        if dense.before is not None:
            self.fill(dense.before.x_hat, dense.before.gamma, dense.before.beta)
            dense.before.inverse_std[...] = np.abs(np.resize(self.normals, dense.before.inverse_std.shape)) + 0.5
        workspace.draw = self.draw
        return workspace, dense

    def network(self, n: int, precision: str = "float32") -> Any:
        """About n parameters with a gradient. Those of one precision are kept, because drawing their weights takes long."""
        if any(held.precision != precision for held in self._networks.values()):
            self._networks.clear()
        if n not in self._networks:
            layer = gm.Dense(n // UNITS, bias=False)
            self._networks[n] = gm.Network([layer], n_features=UNITS, device=self.backend, precision=precision)
        network = self._networks[n]
        self.fill(network.flat, network.flat_gradient)
        return network


# --- the batch ----------------------------------------------------------------------------------------------------


def gather(make: Maker, n: int, source: str) -> Job:
    rows = n // FEATURES
    X, y = make.put((rows, FEATURES), source), make.put((rows,), "i64")
    order = make.backend.asarray(np.random.default_rng(1).permutation(rows)[None])
    shift, scale = make.put((1, 1, FEATURES)), make.put((1, 1, FEATURES))
    x, targets = make.room((1, rows, FEATURES)), make.room((1, rows), "i64")
    batch = DeviceBatch(
        X=X, y=y, weight=None, raw=None, x=x, targets=targets, weights=None, shift=shift, scale=scale, target_shift=None,
        target_scale=None, order=order, batch_size=rows, counters=None, step=make.backend.zeros((8,), np.int64),
        spare=None, row_loss=x, option=(), shares={},
    )  # fmt: skip

    def wanted():
        picked = order.get()[0]
        values = (X.get()[picked].astype(np.float32) - shift.get()[0]) * scale.get()[0]
        return [(x, values[None]), (targets, y.get()[picked][None])]

    reads = {"X": X, "order": order, "y": y}
    return Job(lambda: make.backend.gather(batch), reads, {"x": x, "targets": targets}, wanted)


def cast(make: Maker, n: int) -> Job:
    x, out = make.put((1, n)), make.room((1, n), "bf16")
    return Job(lambda: make.backend.fill(out, x), {"in": x}, {"out": out}, lambda: [(out, x.get())])


def standardize(make: Maker, n: int) -> Job:
    x, shift, scale = (make.put((1, rows, FEATURES)) for rows in (n // FEATURES, 1, 1))
    return Job(
        lambda: make.backend.standardize(x, shift, scale),
        {"x": x},
        {"x": x},
        lambda: [(x, (x.get() - shift.get()) * scale.get())],
    )


def noise(make: Maker, n: int) -> Job:
    x, row = make.put((1, n // FEATURES, FEATURES)), gm.GaussianNoise(0.1)
    batch = make.batch(x)

    def wanted():
        draws = random.normal(x.size, seed=1, purpose=random.Purpose.NOISE, step=1, model=1)
        return [(x, x.get() + 0.1 * draws.reshape(x.shape))]

    return Job(lambda: make.backend.augment(row, batch, make.draw), {"x": x}, {"x": x}, wanted)


def mixup(make: Maker, n: int) -> Job:
    x, targets = make.put((1, n // FEATURES, FEATURES)), make.put((1, n // FEATURES, 10))
    row, share = gm.Mixup(0.2), np.float32(0.25)
    batch = make.batch(x, targets=targets, shares={id(row): make.backend.asarray(np.full(1, share))})

    def wanted():
        return [(a, share * a.get() + (1 - share) * a.get()[:, ::-1]) for a in (x, targets)]

    both = {"x": x, "targets": targets}
    return Job(lambda: make.backend.augment(row, batch, make.draw), both, both, wanted)


def shift_images(make: Maker, n: int) -> Job:
    x, row = make.put((1, n // FEATURES, FEATURES)), gm.RandomShift(2, (28, 28))
    batch = make.batch(x, spare=make.room(x.shape))

    def wanted():
        host, one = x.get(), np.ones(1, np.uint64)
        row.apply(SimpleNamespace(x=host), SimpleNamespace(seeds=one, streams=one, steps=one))  # type: ignore[arg-type]
        return [(x, host)]

    both = {"x": x, "moved x": batch.spare}  # the verb copies back
    return Job(lambda: make.backend.augment(row, batch, make.draw), both, both, wanted)


def find_nonfinite(make: Maker, n: int) -> Job:
    x, first = make.put((1, n)), make.backend.asarray(np.full(1, 2**64 - 1, np.uint64))
    x[:, n - 1 :] = np.nan  # the last one, so that all are read
    grid, last = (make.backend._blocks(n, 4),), np.full(1, n - 1, np.uint64)
    arguments = grid, x, n, np.finfo(np.float32).max, first
    return Job(lambda: make.backend._launch("find_nonfinite_f32", *arguments), {"x": x}, {}, lambda: [(first, last)])


# --- layers -------------------------------------------------------------------------------------------------------


def dropout(make: Maker, n: int, type: str) -> Job:
    x, out = make.put((1, n // UNITS, UNITS), type), make.room((1, n // UNITS, UNITS), type)
    row = Dropout(layer=1, rates=np.array([0.5]), x=x, keep=None, out=out, d=None)
    return Job(
        lambda: make.backend.dropout_forward(row, make.draw),
        {"x": x},
        {"out": out},
        lambda: [(out, x.get() * _keep(x.shape))],
    )


def _keep(shape: tuple[int, ...]) -> np.ndarray:
    return random.dropout_scale(np.empty(shape, np.float32), 0.5, seed=1, step=1, model=1, layer=1)


def dense_forward(make: Maker, n: int, activation: str, rate: float, type: str) -> Job:
    workspace, dense = make.layer(n, activation, type, dropout=rate)
    z, a, f = dense.z, dense.a, ACTIVATIONS[activation]
    dropped = dense.dropout.out if rate else None
    writes = {"z": z} if a is z else {"z": z, "a": a}
    draw = workspace.draw if rate else None

    def wanted():
        u = z.get() + dense.b.get()[:, None, :]
        value = f.f(u)
        found = [(a, value)] if a is z else [(z, u), (a, value)]
        return found if dropped is None else [*found, (dropped, value * _keep(a.shape))]

    return Job(
        lambda: make.backend.activate(dense, z, a, dense.b, draw, dense.work.row, dense.work.alpha),
        {"z": z},
        writes if dropped is None else {**writes, "dropped": dropped},
        wanted,
    )


def dense_backward(make: Maker, n: int, activation: str, rate: float, type: str) -> Job:
    workspace, dense = make.layer(n, activation, type, dropout=rate)
    d, f = dense.d, ACTIVATIONS[activation]

    def wanted():
        keep = _keep(d.shape) if rate else 1.0
        value = d.get() * keep * f.f_grad(dense.u.get(), dense.a.get())
        return [(d, value), (dense.db, value.sum(axis=1))]

    def run() -> None:
        make.backend.derive(dense, dense.dropout, workspace.draw, dense.db, dense.work.row)

    reads = {"d": d, **({"a": dense.a} if f.in_place else {"z": dense.u})}
    return Job(run, reads, {"d": d, "db": dense.db}, wanted)


def add_columns(make: Maker, n: int) -> Job:
    x, out = make.put((1, n // UNITS, UNITS)), make.put((1, n // UNITS, UNITS))
    return Job(
        lambda: make.backend.add_columns(x, out, adds=True),
        {"in": x, "out": out},
        {"out": out},
        lambda: [(out, x.get() + out.get())],
    )


def norm(make: Maker, n: int, kind: str, backward: bool) -> Job:
    _, dense = make.layer(n, "identity", "f32", norm=kind)
    part = dense.before

    def on_host() -> Any:
        held = {f.name: getattr(part, f.name) for f in fields(part)}
        return replace(part, **{k: v.get() for k, v in held.items() if isinstance(v, DeviceArray)})

    def wanted_forward():
        host = on_host()
        norm_forward(host, True, False)
        return [(part.x_hat, host.x_hat), (part.out, host.out)]

    def wanted_backward():
        host = on_host()
        norm_backward(host)
        return [(part.d, host.d), (part.dgamma, host.dgamma), (part.dbeta, host.dbeta)]

    if not backward:
        writes = {"x̂": part.x_hat, "out": part.out}
        return Job(lambda: make.backend._norm_forward(part, True, False), {"x": part.x}, writes, wanted_forward)
    reads = {"d": part.d, "x̂": part.x_hat}
    if kind == "layer":  # two kernels, because one sums over rows and the other over columns
        reads |= {"d again": part.d, "x̂ again": part.x_hat}
    return Job(lambda: make.backend._norm_backward(part), reads, {"d": part.d}, wanted_backward)


# --- loss ---------------------------------------------------------------------------------------------------------


def loss(make: Maker, n: int, name: str, outputs: int, type: str) -> Job:
    rows = n // outputs
    z, dz = make.put((1, rows, outputs), type), make.room((1, rows, outputs), type)
    row_loss, row = make.room((1, rows)), get_loss(name)
    if row.row.name == "softmax_cross_entropy":
        y = make.room((1, rows), "i64")
        y[...] = np.resize(make.integers.astype(np.int64), (1, rows)) % outputs
    else:
        y = make.put((1, rows, outputs))
    batch = make.batch(z, targets=y, row_loss=row_loss, option=make.backend.option(row, np.dtype(np.float32)))
    batch.counters = None  # the loss alone, without its sum over the batch

    def wanted():
        slope = np.empty(z.shape, np.float32)
        losses = row.f(z.get(), y.get(), slope)
        weighted_mean(losses, None, slope)
        return [(row_loss, losses), (dz, slope)]

    return Job(lambda: make.backend.loss(row, z, batch, dz), {"z": z, "y": y}, {"dz": dz, "losses": row_loss}, wanted)


# --- optimizers ---------------------------------------------------------------------------------------------------


def update(make: Maker, n: int, optimizer: Any, precision: str = "float32") -> Job:
    network, everything = make.network(n, precision), slice(0, 1)
    bound = optimizer.fresh().bind(network)
    states = dict(bound.states)
    for state in states.values():
        state[...] = np.abs(np.resize(make.normals, state.shape))
    bound.advance(everything, 1e-3)
    work = make.backend._optimizer_work(bound)
    work.current[...] = np.concatenate([bound.c, bound.shrink.T])

    shadow = {} if network.shadow is None else {"bfloat16 copy": network.shadow}

    def wanted():
        w, g, *rest = (array.get() for array in (network.flat, network.flat_gradient, *states.values()))
        bound.optimizer.update(w, g, *rest, np.empty_like(w), *bound.c[:, :, None])
        return [*zip((network.flat, *states.values()), (w, *rest), strict=True), *((s, w) for s in shadow.values())]

    return Job(
        lambda: make.backend.optimizer_step(bound, everything, work.current, None),
        {"w": network.flat, "g": network.flat_gradient, **states},
        {"w": network.flat, **states, **shadow},
        wanted,
    )


def gradient_norm(make: Maker, n: int) -> Job:
    g, partials = make.put((1, n)), make.room((1, PARTIALS))

    def run() -> None:
        make.backend._launch("gradient_norm_f32", (PARTIALS, 1), g, n, n, None, partials, 1)

    return Job(run, {"g": g}, {}, lambda: [(Sum(partials), (g.get() ** 2).sum(axis=1, dtype=np.float64))])


def average(make: Maker, n: int) -> Job:
    network = make.network(n)
    averaged = WeightAverage(network, 0.999)
    w, mean = network.flat, averaged.averages["flat"]
    mean[...] = np.resize(make.normals[::-1], mean.shape)

    def wanted():
        return [(mean, mean.get() + 1e-3 * (w.get() - mean.get()))]

    return Job(
        lambda: make.backend.average(averaged, slice(0, 1)), {"w": w, "average": mean}, {"average": mean}, wanted
    )


def penalize(make: Maker, n: int) -> Job:
    network = make.network(n)
    bound = gm.SGD(l1=1e-3, l2=1e-2).bind(network)
    w, g = network.flat, network.flat_gradient

    def wanted():
        return [(g, g.get() + 1e-2 * w.get() + 1e-3 * np.sign(w.get()))]

    return Job(lambda: make.backend.penalize(bound), {"w": w, "g": g}, {"g": g}, wanted)


# --- categories ---------------------------------------------------------------------------------------------------


def embed(make: Maker, n: int, backward: bool) -> Job:
    """Rows of 64 numbers and 4 codes, of 1,000 categories each, as vectors of 8."""
    numbers, sizes, units = 64, (1000,) * 4, 8
    rows = n // (numbers + len(sizes) * units)
    X = np.resize(make.normals, (rows, numbers + len(sizes)))
    X[:, numbers:] = np.random.default_rng(1).integers(0, sizes, (rows, len(sizes)))
    network = gm.Network([gm.Embedding(sizes, units), gm.Dense(1)], n_features=X.shape[1], device=make.backend)
    operation: Any = Workspace(network, rows, training=True, per_model_rows=False).operations[0]
    operation.x[...] = X[None]
    make.fill(operation.d)

    def wanted():
        arrays = {name: getattr(operation, name).get() for name in ("x", "E", "out", "dE", "d")}
        host = replace(operation, **arrays, work=None)
        (NumpyBackend().embed_backward if backward else NumpyBackend().embed_forward)(host)
        return [(operation.dE, host.dE)] if backward else [(operation.out, host.out)]

    if not backward:
        writes = {"out": operation.out}
        return Job(lambda: make.backend.embed_forward(operation), {"x": operation.x}, writes, wanted)
    reads = {"x": operation.x, "d": operation.d}
    return Job(lambda: make.backend.embed_backward(operation), reads, {"dE": operation.dE}, wanted)


# --- the rest -----------------------------------------------------------------------------------------------------


def dot(make: Maker, n: int) -> Job:
    a, b, partial = make.put((1, n)), make.put((1, n)), make.room((1, PARTIALS), "f64")

    def run() -> None:
        make.backend._launch("dot_f32", (PARTIALS, 1), a, n, b, n, n, partial, 1)

    def wanted():
        return [(Sum(partial), np.vecdot(a.get().astype(np.float64), b.get().astype(np.float64)))]

    return Job(run, {"a": a, "b": b}, {}, wanted)


def combine(make: Maker, n: int) -> Job:
    x, y, out = make.put((1, n)), make.put((1, n)), make.room((1, n))
    return Job(
        lambda: make.backend.combine(out, None, x, None, y),
        {"x": x, "y": y},
        {"out": out},
        lambda: [(out, x.get() + y.get())],
    )


def shuffle(make: Maker, n: int) -> Job:
    """The order of an epoch of n rows, a power of two. What is counted is the sort of (word, number), not the drawing of
    the words and the picking of the rows, which are two passes beside many."""
    n = 1 << (n.bit_length() - 1)
    keys, index, order = make.room((1, n), "u64"), make.room((1, n), "i64"), make.room((1, n), "i64")
    rows, counts = make.backend.asarray(np.arange(n)[None] * 3), make.backend.asarray(np.array([n]))

    def wanted():
        picked = random.permutation(n, seed=1, step=5, model=1)
        return [(order, rows.get()[:, picked])]

    pairs = {"keys": keys, "numbers": index}
    return Job(
        lambda: make.backend.shuffle(keys, index, rows, order, counts, make.draw, 5), pairs, pairs, wanted, _passes(n)
    )


def _passes(n: int) -> int:
    """Launches of the sort over all pairs: one for the tiles, then for each doubling its far distances and the tiles."""
    doublings = max(0, (n // 1024).bit_length() - 1)
    return 1 + sum(1 + far for far in range(1, doublings + 1))


RELU: dict[str, Any] = {"activation": "relu", "rate": 0.0}
GELU: dict[str, Any] = {"activation": "gelu_tanh", "rate": 0.5}
SOFTMAX = "softmax_cross_entropy"


def layer_rows(type: str) -> list[Row]:
    """What a layer and a loss launch, in one type of storage."""
    return [
        Row("dropout", type, "dropout", partial(dropout, type=type)),
        Row("bias, relu", type, "dense_forward", partial(dense_forward, type=type, **RELU)),
        Row("bias, gelu, dropout", type, "dense_forward", partial(dense_forward, type=type, **GELU)),
        Row("relu backward, column sum", type, "dense_backward", partial(dense_backward, type=type, **RELU)),
        Row("gelu, dropout backward, column sum", type, "dense_backward", partial(dense_backward, type=type, **GELU)),
        Row(
            "squared error", type, "elementwise_loss", partial(loss, name="squared_error", outputs=FEATURES, type=type)
        ),
        Row("softmax loss, 10", type, "softmax_loss", partial(loss, name=SOFTMAX, outputs=10, type=type), False),
        Row("softmax loss, 1000", type, "softmax_loss", partial(loss, name=SOFTMAX, outputs=1000, type=type), False),
    ]


OPTIMIZERS = {
    "SGD": gm.SGD(),
    "SGD with momentum": gm.SGD(momentum=0.9),
    "SGD, Nesterov": gm.SGD(momentum=0.9, nesterov=True),
    **{type(o).__name__: o for o in (gm.RMSprop(), gm.Adagrad(), gm.Adadelta(), gm.Adam(), gm.NAdam())},
}
LAYER_NORM = "layer_norm_backward layer_norm_parameters"
SHUFFLE = "shuffle_words sort_local sort_pass take_rows"

ROWS = [
    Row("gather uint8, standardised", "f32", "gather", partial(gather, source="u8")),
    Row("gather float32, standardised", "f32", "gather", partial(gather, source="f32")),
    Row("cast to bfloat16", "f32", "cast", cast),
    Row("standardize", "f32", "standardize", standardize),
    Row("noise", "f32", "noise", noise),
    Row("mixup", "f32", "mixup", mixup),
    Row("shift images, and copy back", "f32", "shift_images", shift_images),
    Row("find NaN", "f32", "find_nonfinite", find_nonfinite),
    *layer_rows("f32"),
    *layer_rows("bf16"),
    Row("add", "f32", "add_columns", add_columns),
    Row("vectors of categories", "f32", "embed_forward", partial(embed, backward=False), False),
    Row("vectors of categories, backward", "f32", "embed_backward embed_clear", partial(embed, backward=True), False),
    Row("batch norm", "f32", "batch_norm_forward", partial(norm, kind="batch", backward=False), False),
    Row("batch norm backward", "f32", "batch_norm_backward", partial(norm, kind="batch", backward=True), False),
    Row("layer norm", "f32", "layer_norm_forward", partial(norm, kind="layer", backward=False), False),
    Row("layer norm backward", "f32", LAYER_NORM, partial(norm, kind="layer", backward=True), False),
    *(Row(f"update, {name}", "f32", "update", partial(update, optimizer=o)) for name, o in OPTIMIZERS.items()),
    Row("update, Adam, bfloat16 layers", "f32", "update", partial(update, optimizer=gm.Adam(), precision="bf16")),
    Row("gradient norm", "f32", "gradient_norm", gradient_norm, False),
    Row("average", "f32", "average", average),
    Row("penalties", "f32", "penalize", penalize),
    Row("dot", "f32", "dot", dot, False),
    Row("combine", "f32", "combine", combine),
    Row("shuffle", "i64", SHUFFLE, shuffle, False),
]


# --- measuring ----------------------------------------------------------------------------------------------------


class Wrong(Exception):
    """A kernel does not agree with NumPy."""


def check(make: Maker, row: Row, n: int = CHECKED) -> float:
    """The largest difference from NumPy, as a share of the largest value. Raises Wrong beyond the tolerance."""
    job = row.make(make, n)
    pairs = job.wanted()
    job.run()
    errors = [0.0]
    for array, wanted in pairs:
        got = np.asarray(array.get(), np.float64)
        error = float(np.abs(got - wanted).max() / max(float(np.abs(wanted).max()), 1e-30))
        if not error <= TOLERANCES.get(array.type, 0.0):  # so written, a NaN fails too
            raise Wrong(
                f"{row.name} ({row.type}) differs from NumPy by {error:.1e} of the largest value, allowed is "
                f"{TOLERANCES.get(array.type, 0.0):.0e}; its speed would mean nothing"
            )
        errors.append(error)
    return max(errors)


def copy_of(make: Maker, nbytes: int) -> Job:
    """A copy by the driver that reads and writes ``nbytes`` together."""
    source, out = make.room((nbytes // 2,), "u8"), make.room((nbytes // 2,), "u8")
    source[...] = 0
    copy = make.backend.runtime.copy
    return Job(lambda: copy(out.pointer, source.pointer, source.nbytes), {"in": source}, {"out": out}, lambda: [])


def times(make: Maker, job_of: Callable[[], Job], cold: int, seconds: float) -> tuple[Job, dict[str, float]]:
    """A job, and its microseconds; so many copies of it take turns that they fill ``cold`` bytes."""
    jobs = [job_of()]
    used = {a.pointer: a.nbytes for a in (*jobs[0].reads.values(), *jobs[0].writes.values())}
    copies = min(MOST_COPIES, -(-cold // max(1, sum(used.values()))))
    jobs += [job_of() for _ in range(copies - 1)]
    return jobs[0], summary(launch_times(make.backend.runtime, [job.run for job in jobs], seconds))


def measure(make: Maker, row: Row, mib: float, cold: int = COLD, seconds: float = 0.02) -> dict[str, Any]:
    """One kernel at one size, and a copy of as many bytes beside it."""
    n = int(mib * MIB) // ITEM_SIZES[row.type]
    try:
        job, own = times(make, lambda: row.make(make, n), cold, seconds)
        moved, formula = job.moved, job.formula
        del job
        _, copy = times(make, lambda: copy_of(make, moved), cold, seconds)
    except MemoryError as error:
        return {"mib": mib, "status": "no memory", "note": str(error)}
    rate, copy_rate = (moved / us["median_us"] / 1e3 for us in (own, copy))
    return {
        "mib": mib,
        "status": "ok",
        "moved_bytes": moved,
        "formula": formula,
        **own,
        "gb_per_s": round(rate, 1),
        "copy": {**copy, "gb_per_s": round(copy_rate, 1)},
        "share": round(rate / copy_rate, 4),
        "reaches_goal": rate >= GOAL * copy_rate if row.is_elementwise and mib >= GOAL_FROM else None,
    }


def run(
    backend: GpuBackend,
    rows: Sequence[Row],
    sizes: Sequence[float],
    deadline: float = np.inf,
    checked: int = CHECKED,
    keep: Callable[[list], None] = lambda results: None,
    **options: Any,
) -> list[dict[str, Any]]:
    """Checks and measures every row; after each, ``keep`` gets what there is. What is wrong gets no figure."""
    make, results = Maker(backend), []
    for row in rows:
        about = {"name": row.name, "type": row.type, "kernels": row.kernels, "is_elementwise": row.is_elementwise}
        if time.monotonic() > deadline:
            results.append({**about, "status": "no time"})
            continue
        try:
            error = check(make, row, checked)
        except Wrong as wrong:
            results.append({**about, "status": "wrong", "note": str(wrong)})
            print(wrong, file=sys.stderr, flush=True)
            continue
        found = [measure(make, row, mib, **options) for mib in sizes]
        results.append({**about, "status": "ok", "largest_error": error, "sizes": found})
        told = ", ".join(f"{f['mib']:g} MiB {f['share']:.0%}" for f in found if f["status"] == "ok")
        print(f"{row.name} {row.type}: {told}", file=sys.stderr, flush=True)
        keep(results)
        gc.collect()  # networks and their buffers refer to each other
    keep(results)
    return results


# --- the report ---------------------------------------------------------------------------------------------------


def markdown(report: dict[str, Any]) -> str:
    """The table for people: one row per kernel, one column per size, then who misses the goal."""
    sizes = report["protocol"]["sizes_mib"]
    lines = [
        machine.in_words(report),
        "",
        "Bytes that a kernel has to move over its time (median), and that as a share of a device-to-device copy of as "
        f"many, by the size of its largest array. Goal: {GOAL:.0%} for element-wise kernels from {GOAL_FROM} MiB on.",
        "",
        "| kernel | type | moves | " + " | ".join(f"{size:g} MiB" for size in sizes) + " |",
        "|---|---|---|" + "---:|" * len(sizes),
    ]
    for row in report["results"]:
        if row["status"] != "ok":
            lines.append(f"| {row['name']} | {row['type']} | | " + " | ".join([row["status"]] * len(sizes)) + " |")
            continue
        formula = next((f["formula"] for f in row["sizes"] if f["status"] == "ok"), "")
        cells = " | ".join(cell(found) for found in row["sizes"])
        lines.append(f"| {row['name']} | {row['type']} | {formula} | {cells} |")
    judged = [(r, f) for r in report["results"] for f in r.get("sizes", ()) if f.get("reaches_goal") is not None]
    missed = [
        f"{r['name']} {r['type']} at {f['mib']:g} MiB ({f['share']:.0%})" for r, f in judged if not f["reaches_goal"]
    ]
    reached = f"{len(judged) - len(missed)} of {len(judged)} reach the goal"
    lines += ["", f"{reached}; not: {', '.join(missed)}." if missed else f"{reached}."]
    lines += [f"- {row['note']}" for row in report["results"] if row["status"] == "wrong"]
    return "\n".join(lines)


def cell(found: dict[str, Any]) -> str:
    """`GB/s, share of a copy`; bold where the goal is missed."""
    if found["status"] != "ok":
        return found["status"]
    text = f"{found['gb_per_s']:.0f} GB/s, {found['share']:.0%}"
    return f"**{text}**" if found["reaches_goal"] is False else text


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hold every kernel against NumPy, and its speed against a copy.")
    known = sorted({kernel for row in ROWS for kernel in row.kernels})
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)), metavar="MIB,MIB", help="of the largest array")
    parser.add_argument("--kernels", default=",".join(known), metavar="A,B", help=f"of {', '.join(known)}")
    parser.add_argument(
        "--seconds", type=float, default=np.inf, help="begin no further kernel after so many (no limit)"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write machine, versions and all numbers there")
    args = parser.parse_args(argv)
    args.kernels = [name for name in args.kernels.split(",") if name]
    if unknown := [name for name in args.kernels if name not in known]:
        parser.error(f"{', '.join(unknown)} is not known; choose from {', '.join(known)}")
    try:
        args.sizes = [float(size) for size in args.sizes.split(",")]
    except ValueError:
        args.sizes = []
    if not args.sizes or min(args.sizes) <= 0:
        parser.error("--sizes takes numbers above 0 with commas between them, such as 16,64,256")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.monotonic(), parse(argv)
    runtime, reason = machine.find_device()
    if runtime is None:
        raise SystemExit(f"bench/kernels.py needs a GPU: {reason}")
    report = machine.frame("kernels", runtime, reason)
    report["protocol"] = {"sizes_mib": args.sizes, "goal": GOAL, "goal_from_mib": GOAL_FROM, "cold_bytes": COLD}

    def keep(results: list) -> None:
        report["results"] = results
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, report)

    rows = [row for row in ROWS if set(row.kernels) & set(args.kernels)]
    run(GpuBackend(runtime), rows, args.sizes, begin + args.seconds, keep=keep)
    print(markdown(report))
    if any(row["status"] == "wrong" for row in report["results"]):
        raise SystemExit("a kernel does not agree with NumPy: see its note")


if __name__ == "__main__":
    main()
