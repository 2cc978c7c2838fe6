"""kernels/step.cu: the counters of a step, the loss of a batch, the order of an epoch and the vectors of L-BFGS."""

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp import random
from gpumlp.backends.device import HOST_TYPES, DeviceArray
from gpumlp.losses import weighted_mean

TYPES = ["f32", "f64"]
TOLERANCES = {"f32": 1e-6, "f64": 1e-14}
LAUNCHES = [((1, 1), (32,), 0), ((3, 2), (96,), 1), ((2, 1), (256,), 2), ((9, 3), (128,), 3)]  # grid, block, schedule
LAYOUTS = [(0, 0), (16, 0), (3, 1)]  # elements between models, and before the first
every_type = pytest.mark.parametrize("T", TYPES)
every_layout = pytest.mark.parametrize(("gap", "offset"), LAYOUTS)


def placed(runtime, values, gap=0, offset=0):
    """``values`` on the device, ``offset`` elements behind 256 bytes, each model ``gap`` elements behind the last one's."""
    values = np.asarray(values)
    packed = on_device(runtime, values.reshape(len(values), values[:1].size))
    n = packed.shape[1]
    store = DeviceArray.empty(runtime, (offset + len(values) * (n + gap),), packed.type)
    array = store[offset:].reshape(len(values), n + gap)[:, :n]
    array[...] = packed
    return array.reshape(*values.shape)


def same_bits(run, launches=LAUNCHES):
    """That ``run(grid, block, schedule)`` gives one result for every launch."""
    first, *others = [run(*how) for how in launches]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


# --- advance


class Counters:
    """What advance reads and writes, on the device."""

    def __init__(self, T, counts, batch_size, table_start, table_shape, schedule=0):
        models = len(counts)
        self.runtime, self.T, self.batch_size = EmulatedRuntime(schedule=schedule), T, batch_size
        self.table = np.random.default_rng(0).random((*table_shape, models)).astype(HOST_TYPES[T])
        self.step = self.put(np.array([0, table_start, -5, -5]))
        self.counts = self.put(np.array(counts))
        self.active, self.ok = self.put(np.ones(models, np.int32)), self.put(np.ones(models, np.int32))
        self.valid = self.put(np.full(models + 1, -1, np.int32))
        self.steps = self.put(np.arange(models).astype(np.uint64) + np.uint64(2**40))
        self.current = self.put(np.full((table_shape[0], models), np.nan, HOST_TYPES[T]))

    def put(self, values):
        return on_device(self.runtime, values)

    def advance(self, by, block=256):
        rows, length, models = self.table.shape
        launch(
            self.runtime, f"advance_{self.T}", (1,), (block,),
            self.step, by, self.batch_size, self.counts, self.active, self.valid, self.ok, self.steps,
            self.put(self.table), rows, length, self.current, models,
        )  # fmt: skip


def expected_rows(counts, active, position, batch_size):
    """As TrainStep._groups counts them."""
    return np.where(active, np.clip(np.array(counts) - position * batch_size, 0, batch_size), 0)


@every_type
@pytest.mark.parametrize("models", [1, 3, 300])
@pytest.mark.parametrize("schedule", range(4))
def test_advance_goes_through_an_epoch(T, models, schedule):
    counts = np.random.default_rng(1).integers(0, 30, models)
    counts[0] = 23
    c = Counters(T, counts, 7, table_start=1, table_shape=(3, 2), schedule=schedule)
    active, ok, steps = np.ones(models, bool), np.ones(models, bool), c.steps.get()
    for position in range(5):
        if position:
            steps += ok & (expected_rows(counts, active, position - 1, 7) > 0)
            active &= np.arange(models) % 5 != position  # stopped in the meantime
            c.active[...] = active.astype(np.int32)
        c.advance(by=int(position > 0))
        rows = expected_rows(counts, active, position, 7)
        np.testing.assert_array_equal(c.step.get(), [position, 1, -5, -5])
        np.testing.assert_array_equal(c.valid.get(), [*rows, rows.max()])
        np.testing.assert_array_equal(c.steps.get(), steps)
        np.testing.assert_array_equal(c.current.get(), c.table[:, np.clip(position - 1, 0, 1)])
        ok = np.random.default_rng(position).random(models) < 0.7  # models whose loss was not finite make no step
        c.ok[...] = ok.astype(np.int32)


def test_advance_by_0_counts_no_step():
    c = Counters("f32", [5, 9], 4, table_start=0, table_shape=(1, 3))
    c.step[...] = np.array([2, 0, 0, 0])
    for _ in range(2):
        c.advance(by=0)
        np.testing.assert_array_equal(c.step.get()[0], 2)
        np.testing.assert_array_equal(c.valid.get(), [0, 1, 1])
        np.testing.assert_array_equal(c.steps.get(), np.uint64(2**40) + np.arange(2, dtype=np.uint64))
        np.testing.assert_array_equal(c.current.get(), c.table[:, 2])


def test_advance_takes_a_block_of_any_size():
    for block in (32, 96):
        c = Counters("f64", np.arange(1, 101), 60, table_start=0, table_shape=(2, 1))
        c.advance(by=0, block=block)
        np.testing.assert_array_equal(c.valid.get(), [*np.minimum(np.arange(1, 101), 60), 60])


# --- the loss of a batch

POSITION = 2


def batch_loss(rows, weights, valid, T, gap=0, offset=0, grid=(2,), block=(64,), schedule=0):
    """losses and log_weights (models, 4), ok, active, diverged_at (models,)."""
    runtime, models = EmulatedRuntime(schedule=schedule), len(rows)
    row_loss = placed(runtime, rows, gap, offset)
    given = None if weights is None else placed(runtime, weights, gap, offset)
    weights_stride = 0 if weights is None or len(weights) < models else given.strides[0]
    logs = [placed(runtime, np.full((models, 4), -1.0), gap, offset) for _ in range(2)]
    ok, active, diverged_at = (
        on_device(runtime, np.full(models, -1, dtype)) for dtype in (np.int32, np.int32, np.int64)
    )
    launch(
        runtime, f"loss_total_{T}", grid, block,
        row_loss, row_loss.strides[0], given, weights_stride, on_device(runtime, np.array(valid, np.int32)),
        on_device(runtime, np.array([POSITION, 0])), *logs, logs[0].strides[0], ok, active, diverged_at, models,
    )  # fmt: skip
    return [array.get() for array in (*logs, ok, active, diverged_at)]


def loss_case(models, batch, T, weights):
    rng, dtype = np.random.default_rng(batch), HOST_TYPES[T]
    shape = {"none": None, "shared": (1, batch), "own": (models, batch)}[weights]
    given = None if shape is None else rng.random(shape).astype(dtype)
    return rng.normal(2.0, 1.0, (models, batch)).astype(dtype), given


@every_type
@every_layout
@pytest.mark.parametrize("weights", ["none", "shared", "own"])
def test_loss_total_is_the_weighted_mean(T, gap, offset, weights):
    for models, batch, valid in [(1, 1, [1]), (3, 33, [33, 1, 0]), (2, 1000, [999, 31]), (1, 2053, [2053])]:
        rows, given = loss_case(models, batch, T, weights)
        losses, log_weights, ok, active, diverged_at = batch_loss(rows, given, valid, T, gap, offset)
        for m, n in enumerate(valid):
            own = None if given is None else given[m if len(given) > 1 else 0, None, :n]
            dz = np.zeros((1, n, 1), rows.dtype)
            mean = weighted_mean(rows[m, None, :n], own, dz)[0] if n else -1.0
            total = -1.0 if n == 0 else n if own is None else own.sum(dtype=np.float64)
            np.testing.assert_allclose(losses[m], [-1, -1, mean, -1], rtol=TOLERANCES[T])
            np.testing.assert_allclose(log_weights[m], [-1, -1, total, -1], rtol=1e-13)
        np.testing.assert_array_equal(ok, np.array(valid) > 0)
        np.testing.assert_array_equal(active, -1)
        np.testing.assert_array_equal(diverged_at, -1)


@every_type
def test_loss_total_stops_a_model_whose_loss_is_not_finite(T):
    rows, _ = loss_case(4, 33, T, "none")
    rows[0, 32], rows[1, 5], rows[3, 20] = np.nan, np.inf, np.nan  # the last one among rows that do not count
    losses, log_weights, ok, active, diverged_at = batch_loss(rows, None, [33, 33, 33, 20], T)
    assert np.isnan(losses[0, POSITION]) and losses[1, POSITION] == np.inf
    np.testing.assert_array_equal(ok, [0, 0, 1, 1])
    np.testing.assert_array_equal(active, [0, 0, -1, -1])
    np.testing.assert_array_equal(diverged_at, [POSITION, POSITION, -1, -1])
    np.testing.assert_array_equal(log_weights[:, POSITION], [33, 33, 33, 20])


@every_type
def test_loss_total_of_weights_that_are_all_zero_is_0(T):
    rows, weights = loss_case(2, 31, T, "own")
    weights[1, :7] = 0
    losses, log_weights, ok, *_ = batch_loss(rows, weights, [31, 7], T)
    assert losses[1, POSITION] == 0 and log_weights[1, POSITION] == 0 and losses[0, POSITION] > 0
    np.testing.assert_array_equal(ok, [1, 1])


@every_type
def test_loss_total_gives_the_same_bits_by_any_grid_and_schedule(T):
    rows, weights = loss_case(5, 333, T, "own")
    launches = [((grid,), (96,), schedule) for schedule, grid in enumerate([1, 5, 2, 7])]
    same_bits(lambda *how: batch_loss(rows, weights, [333, 300, 7, 0, 1], T, 0, 0, *how), launches)
    aligned, shifted = (batch_loss(rows, weights, [333, 300, 7, 0, 1], T, *layout) for layout in LAYOUTS[1:])
    for a, b in zip(aligned, shifted, strict=True):
        np.testing.assert_array_equal(a, b)


def sum_of_weights(weights, valid, T, gap=0, offset=0, grid=(2,), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    given, valid = placed(runtime, weights, gap, offset), on_device(runtime, np.array(valid, np.int32))
    total = on_device(runtime, np.full(len(weights), np.nan, weights.dtype))
    launch(runtime, f"weight_total_{T}", grid, block, given, given.strides[0], valid, total, len(weights))
    return [total.get()]


@every_type
@every_layout
def test_weight_total_agrees(T, gap, offset):
    for models, batch, valid in [(1, 1, [1]), (3, 33, [33, 1, 0]), (2, 1009, [1009, 31])]:
        weights = np.random.default_rng(batch).random((models, batch)).astype(HOST_TYPES[T])
        [total] = sum_of_weights(weights, valid, T, gap, offset)
        want = [row[:n].sum(dtype=np.float64) for row, n in zip(weights, valid, strict=True)]
        np.testing.assert_allclose(total, want, rtol=TOLERANCES[T])


def test_weight_total_gives_the_same_bits_by_any_grid_and_schedule():
    weights = np.random.default_rng(0).random((5, 333)).astype(np.float32)
    launches = [((grid,), (96,), schedule) for schedule, grid in enumerate([1, 5, 2, 7])]
    same_bits(lambda *how: sum_of_weights(weights, [333, 300, 7, 0, 1], "f32", 0, 0, *how), launches)


# --- the order of an epoch

EPOCH = 2**35 + 1
SEEDS, STREAMS = np.array([2**64 - 1, 5, 0], np.uint64), np.array([0, 2**40, 2], np.uint64)


def power_of_two(n):
    return 1 << max(0, int(n - 1).bit_length())


def words_on(runtime, counts, grid=(2, 2), block=(64,), width=None):
    """Keys and their numbers, (models, stride)."""
    shape = (len(counts), width or power_of_two(max(counts)))
    keys, index = DeviceArray.empty(runtime, shape, "u64"), DeviceArray.empty(runtime, shape, "i64")
    given = [on_device(runtime, values[: len(counts)]) for values in (np.array(counts), SEEDS, STREAMS)]
    launch(runtime, "shuffle_words", grid, block, keys, index, shape[1], *given, EPOCH, len(counts))
    return keys, index


def sort(runtime, keys, index, grid=(2, 2), block=(64,)):
    """The launches that sort (models, stride) pairs."""
    models, width = keys.shape

    def run(kernel, *arguments):
        launch(runtime, kernel, grid, block, keys, index, width, *arguments, models)

    run("sort_local", 2, min(width, 1024))
    size = 2048
    while size <= width:
        distance = size // 2
        while distance >= 1024:
            run("sort_pass", size, distance)
            distance //= 2
        run("sort_local", size, size)
        size *= 2


def shuffled(rows, counts, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    keys, index = words_on(runtime, counts, grid, block)
    sort(runtime, keys, index, grid, block)
    rows_on = placed(runtime, rows, 1)
    order = placed(runtime, np.full((len(counts), max(counts) + 1), -1), 2, 1)
    launch(
        runtime, "take_rows", grid, block,
        rows_on, 0 if len(rows) < len(counts) else rows_on.strides[0], index, index.strides[0],
        order, order.strides[0], on_device(runtime, np.array(counts)), len(counts),
    )  # fmt: skip
    return [order.get()]


@pytest.mark.parametrize(
    "counts", [[1], [2], [3, 1, 2], [5, 4, 0], [31, 33, 32], [1000], [1024, 1, 1023], [1025], [3001, 2048]]
)
def test_the_order_is_the_permutation_that_numpy_draws(counts):
    rows = np.random.default_rng(0).integers(0, 10**12, (len(counts), max(counts)))
    [order] = shuffled(rows, counts)
    for m, n in enumerate(counts):
        drawn = random.permutation(n, seed=int(SEEDS[m]), step=EPOCH, model=int(STREAMS[m]))
        np.testing.assert_array_equal(order[m], [*rows[m][drawn], *[-1] * (max(counts) + 1 - n)])


def test_models_may_share_their_rows():
    rows = np.random.default_rng(0).integers(0, 10**12, (1, 70))
    [order] = shuffled(rows, [70, 70, 9])
    for m, n in enumerate([70, 70, 9]):
        drawn = random.permutation(n, seed=int(SEEDS[m]), step=EPOCH, model=int(STREAMS[m]))
        np.testing.assert_array_equal(order[m, :n], rows[0][drawn])


def test_the_order_is_the_same_by_any_launch():
    rows = np.random.default_rng(0).integers(0, 10**12, (3, 1100))
    same_bits(lambda *how: shuffled(rows, [1100, 700, 5], *how))


def test_words_are_the_streams_words_and_padding_is_last():
    for counts, width in [([5, 8, 1], 8), ([1], 1), ([2, 1], 2), ([33], 64)]:
        runtime = EmulatedRuntime()
        keys, index = (array.get() for array in words_on(runtime, counts, width=width))
        for m, n in enumerate(counts):
            words = random.words(
                n, seed=int(SEEDS[m]), purpose=random.Purpose.SHUFFLE, step=EPOCH, model=int(STREAMS[m])
            )
            np.testing.assert_array_equal(keys[m], [*words, *[2**64 - 1] * (width - n)])
            np.testing.assert_array_equal(index[m], np.arange(width))


@pytest.mark.parametrize("width", [1, 2, 64, 1024, 4096])
def test_equal_keys_stay_in_order(width):
    runtime, rng = EmulatedRuntime(), np.random.default_rng(0)
    keys = rng.choice(np.array([0, 7, 2**63, 2**64 - 1], np.uint64), (2, width))
    on, index = on_device(runtime, keys), on_device(runtime, np.tile(np.arange(width), (2, 1)))
    sort(runtime, on, index, grid=(3, 1), block=(256,))
    want = np.argsort(keys, axis=1, kind="stable")
    np.testing.assert_array_equal(index.get(), want)
    np.testing.assert_array_equal(on.get(), np.take_along_axis(keys, want, axis=1))


# --- the vectors of L-BFGS


def partial_sums(a, b, T, gap=0, offset=0, grid=(3, 2), block=(64,), schedule=0):
    runtime, models = EmulatedRuntime(schedule=schedule), len(a)
    a, b = (None if x is None else placed(runtime, x, gap, offset) for x in (a, b))
    partial = on_device(runtime, np.full((models, grid[0]), np.nan))
    b_stride = 0 if b is None else b.strides[0]
    launch(runtime, f"dot_{T}", grid, block, a, a.strides[0], b, b_stride, a.shape[1], partial, models)
    return [partial.get()]


def vectors(shape, T, how_many=2):
    rng = np.random.default_rng(shape[1])
    return [rng.normal(size=shape).astype(HOST_TYPES[T]) for _ in range(how_many)]


@every_type
@every_layout
def test_dot_agrees(T, gap, offset):
    for shape in [(1, 1), (3, 31), (3, 33), (2, 1000), (1, 2053)]:
        a, b = vectors(shape, T)
        wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
        [sums] = partial_sums(a, b, T, gap, offset)
        np.testing.assert_allclose(sums.sum(axis=1), np.vecdot(wide_a, wide_b), rtol=1e-12, atol=1e-13)
        [sums] = partial_sums(a, None, T, gap, offset)
        np.testing.assert_allclose(sums.sum(axis=1), np.abs(wide_a).sum(axis=1), rtol=1e-13)


@every_type
def test_dot_gives_the_same_bits_under_any_schedule(T):
    a, b = vectors((3, 1009), T)
    launches = [((5, models), (96,), schedule) for schedule, models in enumerate([1, 3, 2, 4])]
    same_bits(lambda *how: partial_sums(a, b, T, 0, 0, *how), launches)
    np.testing.assert_array_equal(partial_sums(a, b, T, 3, 1), partial_sums(a, b, T, 15, 0))


def combined(alpha, x, beta, y, T, gap=0, offset=0, onto=None, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    out = placed(runtime, np.full(x.shape, np.nan, HOST_TYPES[T]), gap, offset)
    alpha, beta = (None if v is None else on_device(runtime, v) for v in (alpha, beta))
    x, y = (None if v is None else placed(runtime, v, gap, offset) for v in (x, y))
    out = {None: out, "x": x, "y": y}[onto]
    y_stride, (models, n) = 0 if y is None else y.strides[0], x.shape
    launch(
        runtime, f"combine_{T}", grid, block,
        out, out.strides[0], alpha, x, x.strides[0], beta, y, y_stride, n, models,
    )  # fmt: skip
    return [out.get()]


@every_type
@every_layout
def test_combine_agrees(T, gap, offset):
    for models, n in [(1, 1), (3, 31), (2, 1000), (3, 1009)]:
        x, y = vectors((models, n), T)
        alpha, beta = (np.random.default_rng(i).normal(size=models).astype(x.dtype) for i in range(2))
        for a, b, second, onto in [
            (alpha, beta, y, None),
            (None, beta, y, "x"),
            (alpha, None, y, "y"),
            (None, None, y, "x"),
            (alpha, None, None, "x"),
            (None, None, None, None),
        ]:
            [out] = combined(a, x, b, second, T, gap, offset, onto)
            want = x * (1 if a is None else a[:, None])
            want = want if second is None else want + second * (1 if b is None else b[:, None])
            np.testing.assert_allclose(out, want, rtol=TOLERANCES[T], atol=TOLERANCES[T])


def test_combine_gives_the_same_bits_by_any_launch():
    x, y = vectors((3, 1009), "f32")
    alpha, beta = vectors((1, 3), "f32")
    same_bits(lambda *how: combined(alpha[0], x, beta[0], y, "f32", 0, 0, None, *how))
