"""The backend's verbs in NumPy: the definition that every other backend is held against."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import random
from ..losses import weighted_mean
from .base import Batch, Dense, Draw, Dropout, Embed, Join, Norm

CACHE_LINE = 64  # bytes
SMALL_WEIGHTS = 8_192  # elements up to which W is transposed by a copy
BLOCK = 32_768  # elements that element-wise work handles at a time, so that they stay in the processor's cache
EPSILON = 1e-5  # under normalisation's root
DEVICES = (2, 13)  # DLPack's numbers for CUDA and for CUDA's managed memory
MOMENTUM = 0.1  # share of the batch in the running statistics, as PyTorch


class NumpyBackend:
    """All verbs on the host."""

    name = "numpy"
    device = "cpu"
    is_device = False
    keeps_masks = True
    prediction_rows = 1024

    def empty(self, shape, dtype):
        return aligned(shape, dtype)

    def zeros(self, shape, dtype):
        array = aligned(shape, dtype)
        array.fill(0)
        return array

    def asarray(self, values, dtype=None):
        return np.asarray(values, dtype)

    def to_numpy(self, array):
        return array

    def adopt(self, values):
        on_device = hasattr(values, "__dlpack_device__") and int(values.__dlpack_device__()[0]) in DEVICES
        if on_device or hasattr(values, "__cuda_array_interface__"):
            raise TypeError(
                "the data lie on a GPU and the network on the CPU: copy them, or build it with device='cuda'"
            )
        return None

    def export(self, values, like):
        return values

    def draw(self, seeds, streams, steps) -> Draw:
        return Draw(seeds, streams, steps)

    def storage(self, dtype, precision):
        return dtype  # lower precisions are a permission, and the host has no use for it

    def fill(self, x, rows) -> None:
        np.copyto(x, rows, casting="unsafe")

    # --- the batch

    def gather(self, batch: Batch, rows: Any) -> None:
        # mode="clip" spares the check of every index, which takes two thirds of the time; our rows are in range.
        if batch.raw is None:
            batch.X.take(rows, axis=0, out=batch.x, mode="clip")
        else:
            batch.X.take(rows, axis=0, out=batch.raw, mode="clip")
            np.copyto(batch.x, batch.raw, casting="unsafe")
        batch.y.take(rows, axis=0, out=batch.targets, mode="clip")
        if batch.weight is not None:
            batch.weight.take(rows, axis=0, out=batch.weights, mode="clip")
        self.standardize(batch.x, batch.shift, batch.scale)
        self.standardize(batch.targets, batch.target_shift, batch.target_scale)

    def standardize(self, x, shift, scale) -> None:
        """x ← (x - shift) · scale."""
        if shift is not None:
            np.subtract(x, shift, out=x)
            np.multiply(x, scale, out=x)

    def augment(self, row, batch: Batch, draw: Draw) -> None:
        row.apply(batch, draw)

    # --- layers

    def prepare(self, dense: Dense) -> None:
        dense.work = _DenseViews(dense)

    def dense_forward(self, dense: Dense, draw: Draw | None, update_running: bool) -> None:
        views = dense.work
        if views.W_copy is not None:
            np.copyto(views.W_copy, views.W_view)
        views.product(views.x, views.W_T, out=views.z)  # (models, batch, fan_out)
        if dense.before is not None:
            if dense.b is not None:
                np.add(dense.z, dense.b[:, None, :], out=dense.z)
            norm_forward(dense.before, draw is not None, update_running)
        f = views.f
        for u, b, a in views.forward:
            if b is not None:
                np.add(u, b, out=u)
            if f is not None:
                f(u, out=a)
        if dense.after is not None:
            norm_forward(dense.after, draw is not None, update_running)
        if dense.dropout is not None:
            self.dropout_forward(dense.dropout, draw)

    def dense_backward(self, dense: Dense, draw: Draw) -> None:
        views, d = dense.work, dense.d
        if dense.dropout is not None:
            np.multiply(d, dense.dropout.keep, out=d)  # type: ignore[arg-type]
        if dense.after is not None:
            norm_backward(dense.after)
        f_grad = dense.f.f_grad
        for d_block, u, a, slope in views.backward:
            f_grad(u, a, out=slope)
            np.multiply(d_block, slope, out=d_block)
        if dense.before is not None:
            norm_backward(dense.before)
        product = views.product
        product(views.d_T, views.x, out=views.dW)  # (models, fan_out, fan_in)
        if dense.db is not None:
            product(views.ones, views.d, out=views.db)  # (models, 1, fan_out): a product is faster than a sum over rows
        if dense.dx is None:
            return
        if dense.dx_adds:
            dense.dx += np.matmul(d, dense.W)
        else:
            product(views.d, views.W, out=views.dx)  # (models, batch, fan_in)

    def dropout_forward(self, dropout: Dropout, draw: Draw | None) -> None:
        if draw is None:
            np.copyto(dropout.out, dropout.x)
            return
        for i, rate in enumerate(dropout.rates):
            random.dropout_scale(
                dropout.keep[i],  # type: ignore[index]
                rate,
                seed=int(draw.seeds[i]),
                step=int(draw.steps[i]),
                model=int(draw.streams[i]),
                layer=dropout.layer,
            )
        np.multiply(dropout.x, dropout.keep, out=dropout.out)  # type: ignore[arg-type]

    def embed_forward(self, embed: Embed) -> None:
        numbers = embed.numbers
        np.copyto(embed.out[..., :numbers], embed.x[..., :numbers])
        vectors = _vectors(embed.out, embed)
        for m, rows in enumerate(_rows_of_codes(embed)):
            vectors[m] = embed.E[m].take(rows, axis=0)  # (batch, columns, units)

    def embed_backward(self, embed: Embed) -> None:
        vectors, dE = _vectors(embed.d, embed), embed.dE
        dE.fill(0)  # type: ignore[union-attr]
        for m, rows in enumerate(_rows_of_codes(embed)):
            np.add.at(dE[m], rows, vectors[m])  # type: ignore[index]

    def join(self, join: Join) -> None:
        if join.concat:
            stop = 0
            for part in join.parts:
                start, stop = stop, stop + part.shape[-1]
                np.copyto(join.out[..., start:stop], part)
            return
        np.add(join.parts[0], join.parts[1], out=join.out)
        for part in join.parts[2:]:
            np.add(join.out, part, out=join.out)

    def split(self, join: Join) -> None:
        start = 0
        for part, (buffer, adds) in zip(join.parts, join.to, strict=True):
            width = part.shape[-1]
            piece = join.d[..., start : start + width] if join.concat else join.d
            start += width
            if buffer is not None:
                np.add(buffer, piece, out=buffer) if adds else np.copyto(buffer, piece)

    # --- loss and update

    def loss(self, loss: Any, z, batch: Batch, dz) -> np.ndarray:
        return weighted_mean(loss.f(z, batch.targets, dz), batch.weights, dz)

    def update(self, bound: Any, models: slice, learning_rate: Any) -> None:
        bound.step(models, learning_rate)

    def limit_norms(self, network: Any, name: str, max_norm: float, models: slice) -> None:
        W = network.parameters[name][models]
        norm = np.sqrt(np.vecdot(W, W))
        np.multiply(W, (max_norm / np.maximum(norm, max_norm))[..., None], out=W)

    def average(self, average: Any, models: slice) -> None:
        for mean, w, rest, scratch in average.blocks(models):
            np.subtract(w, mean, out=scratch)
            np.multiply(scratch, rest, out=scratch)
            np.add(mean, scratch, out=mean)

    # --- vectors of parameters, for L-BFGS

    def dot(self, a, b) -> np.ndarray:
        if b is None:
            return np.abs(a).sum(axis=1, dtype=np.float64)
        return np.vecdot(a.astype(np.float64), b.astype(np.float64))

    def combine(self, out, alpha, x, beta, y) -> None:
        first = x if alpha is None else alpha[:, None].astype(x.dtype) * x
        if y is None:
            np.copyto(out, first)
            return
        np.add(first, y if beta is None else beta[:, None].astype(y.dtype) * y, out=out)

    def penalize(self, bound: Any) -> None:
        for _, penalties in bound.blocks(slice(0, bound.network.models)):
            if penalties is not None:
                bound.regularise(*penalties)


def _vectors(array: Any, embed: Embed) -> np.ndarray:
    """The vectors in ``out`` or its gradient, (models, batch, columns, units): a view."""
    return array[..., embed.numbers :].reshape(*array.shape[:2], len(embed.starts) - 1, embed.E.shape[2])


def _rows_of_codes(embed: Embed) -> np.ndarray:
    """Which rows of E the batch reads, (models, batch, columns) int64."""
    codes, starts = embed.x[..., embed.numbers :], embed.starts
    known = (codes >= 0) & (codes < np.diff(starts))
    rows = np.where(known, codes, 0).astype(np.int64) + starts[:-1]
    return np.broadcast_to(rows, (len(embed.E), *rows.shape[1:]))


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array that begins at a cache line: NumPy's own begin 16 bytes into one, and every vector load of
    64 bytes then touches two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)


class _DenseViews:
    """Transposes and cache-sized blocks of a layer's buffers, made once so that a step makes no view.

    One model alone is multiplied as plain matrices: np.dot takes a third less time than np.matmul on small ones.
    """

    def __init__(self, dense: Dense) -> None:
        alone = len(dense.W) == 1
        self.product = np.dot if alone else np.matmul

        def matrix(array: np.ndarray | None) -> np.ndarray | None:
            return None if array is None else array[0] if alone else array

        self.x, self.z, self.W = matrix(dense.x), matrix(dense.z), matrix(dense.W)
        self.W_T = self.W_view = matrix(dense.W.swapaxes(1, 2))
        self.W_copy = None
        if dense.W[0].size <= SMALL_WEIGHTS:
            # OpenBLAS takes up to twice as long for a small matrix that is transposed as for one that is not.
            self.W_T = self.W_copy = np.empty(self.W_view.shape, dense.W.dtype)  # type: ignore[union-attr]
        bias = None if dense.before else dense.b  # before a normalisation the bias cannot wait for the non-linearity
        identity = dense.f.name == "identity"
        in_place = identity and dense.a is dense.u
        self.forward = [
            (dense.u[part], None if bias is None else bias[part[0], None, :], dense.a[part])
            for part in _blocks(dense.u.shape)
            if bias is not None or not in_place
        ]
        self.f = None if in_place else dense.f.f
        if dense.d is None:
            return
        self.d, self.dx, self.dW = matrix(dense.d), matrix(dense.dx), matrix(dense.dW)
        self.d_T = matrix(dense.d.swapaxes(1, 2))
        self.ones = matrix(np.ones((1, 1, dense.d.shape[1]), dense.d.dtype))
        self.db = None if dense.db is None else matrix(dense.db[:, None, :])
        scratch = aligned((max(BLOCK, dense.d.shape[2]),), dense.d.dtype)
        self.backward = [
            (dense.d[part], dense.u[part], dense.a[part], _like(scratch, dense.d[part]))
            for part in _blocks(dense.d.shape)
            if not identity
        ]


def _like(scratch: np.ndarray, block: np.ndarray) -> np.ndarray:
    return scratch[: block.size].reshape(block.shape)


def _blocks(shape: tuple[int, ...]) -> list[tuple[slice, slice]]:
    """(models, rows) slices of about BLOCK elements: several small models, or some rows of a large one."""
    models, batch, units = shape
    group = max(1, BLOCK // max(1, batch * units))
    rows = batch if group > 1 else max(1, BLOCK // units)
    return [(slice(m, m + group), slice(r, r + rows)) for m in range(0, models, group) for r in range(0, batch, rows)]


# --- normalisation --------------------------------------------------------------------------------------------------


def norm_forward(norm: Norm, training: bool, update_running: bool) -> None:
    """x̂ and γ x̂ + β; batch normalisation predicts with its running statistics (Ioffe & Szegedy 2015, algorithms 1, 2)."""
    over = 1 if norm.kind == "batch" else 2
    if norm.kind == "batch" and not training:
        mean = norm.running_mean[:, None, :]  # type: ignore[index]
        variance = norm.running_variance[:, None, :]  # type: ignore[index]
        np.subtract(norm.x, mean, out=norm.x_hat)
    else:
        mean = norm.x.mean(axis=over, keepdims=True)
        np.subtract(norm.x, mean, out=norm.x_hat)
        variance = np.square(norm.x_hat).mean(axis=over, keepdims=True)
        n = norm.x.shape[1]
        if norm.kind == "batch" and update_running and n > 1:  # one row alone has no variance to learn from
            moves = np.isfinite(mean[:, 0]) & np.isfinite(variance[:, 0])  # a model that diverges is left as it was
            _move(norm.running_mean, mean[:, 0], moves)
            _move(norm.running_variance, variance[:, 0] * (n / (n - 1)), moves)
    np.add(variance, EPSILON, out=norm.inverse_std)
    np.sqrt(norm.inverse_std, out=norm.inverse_std)
    np.divide(1, norm.inverse_std, out=norm.inverse_std)
    np.multiply(norm.x_hat, norm.inverse_std, out=norm.x_hat)
    np.multiply(norm.x_hat, norm.gamma[:, None, :], out=norm.out)
    np.add(norm.out, norm.beta[:, None, :], out=norm.out)


def norm_backward(norm: Norm) -> None:
    """dγ = Σ d x̂, dβ = Σ d, and d ← (d̂ - mean d̂ - x̂ mean(d̂ x̂)) / std with d̂ = γ d, means over what was normalised."""
    over = 1 if norm.kind == "batch" else 2
    d = norm.d
    np.einsum("mbu,mbu->mu", d, norm.x_hat, out=norm.dgamma)
    np.sum(d, axis=1, out=norm.dbeta)
    np.multiply(d, norm.gamma[:, None, :], out=d)
    along = (d * norm.x_hat).mean(axis=over, keepdims=True)
    np.subtract(d, d.mean(axis=over, keepdims=True), out=d)
    np.subtract(d, norm.x_hat * along, out=d)
    np.multiply(d, norm.inverse_std, out=d)


def _move(running: Any, value: np.ndarray, moves: np.ndarray) -> None:
    """running ← (1 - MOMENTUM) running + MOMENTUM value where it moves, in place."""
    np.multiply(running, 1 - MOMENTUM, out=running, where=moves)
    np.add(running, MOMENTUM * value, out=running, where=moves)
