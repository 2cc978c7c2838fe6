"""kernels/dense.cu against gpumlp/activations.py, gpumlp/random.py and the NumPy backend, on the emulator."""

from types import SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp import random
from gpumlp.activations import ACTIVATIONS, get_activation
from gpumlp.backends.device import DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.numpy_backend import NumpyBackend

TOLERANCES = {"f32": 1e-5, "f64": 1e-12, "bf16": 1e-2}
LAYER = 5
RATES = (0.5, 0.0, 0.2)
# (models, batch, units): one number; odd rows shorter and longer than a warp's tile; rows of whole Philox blocks, one with
# a rest of 8 columns; more rows than the warps of a block take at once
SHAPES = [(1, 1, 1), (3, 3, 31), (1, 7, 33), (2, 1, 257), (1, 2, 1000), (3, 5, 40), (2, 70, 8), (1, 67, 3)]
# offset of the first element, elements between the models: 16-byte accesses can and cannot be had
PLACES = [(0, 0), (0, 3), (1, 0), (8, 16)]

every_type = pytest.mark.parametrize("type", TOLERANCES)
every_row = pytest.mark.parametrize("name", ACTIVATIONS)
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


# --- what the tests are made of


def wide(type):
    """The type of a kernel's arithmetic, NumPy's and the kernel's name for it."""
    return (np.float64, "f64") if type == "f64" else (np.float32, "f32")


def numbers(shape, type, seed=0):
    """Normal numbers that the type holds exactly, some of them on the activations' kinks."""
    values = 2 * np.random.default_rng(seed).standard_normal(shape)
    flat = values.reshape(-1)
    kinks = np.array([0.0, -3.0, 3.0, 1.0, -1.0, 6.0])[: flat.size // 6]
    flat[: kinks.size] = kinks
    return bf16_to_float32(float32_to_bf16(values)) if type == "bf16" else values.astype(wide(type)[0])


class Buffer:
    """``values`` (models, ...) on the device, with memory around them that nobody may write."""

    def __init__(self, runtime, values, type, offset=0, gap=0):
        models, n = len(values), int(np.prod(values.shape[1:]))
        self.memory = DeviceArray.empty(runtime, (offset + models * (n + gap),), type)
        rows = self.memory[offset:].reshape(models, n + gap)[:, :n]
        rows[...] = values.reshape(models, n)
        self.array, self.stride = rows.reshape(*values.shape), n + gap
        self.around = np.ones(self.memory.shape, bool)
        self.around[offset:].reshape(models, n + gap)[:, :n] = False

    def get(self):
        assert np.isnan(self.memory.get()[self.around]).all()  # fresh memory reads as NaN
        return self.array.get()


def draws(runtime, models, type, rates=RATES):
    """The six arguments that stand for dropout, and what they draw: (models, size) of 0 and 1 / (1 - rate)."""
    if rates is None:
        return [None, None, None, 0, None, None], lambda shape: np.ones(shape)
    seeds, streams, steps = ([7 + i, 2**40, 3][:models] for i in range(3))
    rates = rates[:models]

    def keep(shape):
        out = np.empty(shape, wide(type)[0])
        for m, rate in enumerate(rates):
            random.dropout_scale(out[m], rate, seed=seeds[m], step=steps[m], model=streams[m], layer=LAYER)
        return out

    words = [on_device(runtime, np.array(values, np.uint64)) for values in (seeds, streams, steps)]
    thresholds = on_device(runtime, np.array([random.keep_threshold(rate) for rate in rates], np.uint32))
    scales = on_device(runtime, (1.0 / (1.0 - np.array(rates))).astype(wide(type)[0]))
    return [*words, LAYER, thresholds, scales], keep


def assert_close(got, wanted, type):
    scale = np.abs(wanted).max(initial=1e-30)
    np.testing.assert_allclose(got, wanted, rtol=TOLERANCES[type], atol=TOLERANCES[type] * scale)


def assert_same_bits(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_array_equal(a, b)


# --- dense_forward


def forward(
    row, z, type, b=None, *, in_place=False, rates=None, grid=(2, 2), block=256, schedule=0, offset=0, gap=0, off=None
):
    """z, a and dropped as the kernel leaves them, and the mask; dropped is None without rates.

    The array called ``off`` begins one element later than the others.
    """
    runtime = EmulatedRuntime(schedule=schedule)
    models, batch, units = z.shape
    z = Buffer(runtime, z, type, offset + (off == "z"), gap)
    unwritten = np.full(z.array.shape, np.nan)
    a = z if in_place else Buffer(runtime, unwritten, type, offset + (off == "a"), gap)
    dropped = None if rates is None else Buffer(runtime, unwritten, type, offset + (off == "dropped"), gap)
    b = None if b is None else Buffer(runtime, b, wide(type)[1], offset + (off == "b"), gap)
    arguments, keep = draws(runtime, models, type, rates)
    number = list(ACTIVATIONS).index(row.name)
    launch(
        runtime,
        f"dense_forward_{type}",
        grid,
        (block,),
        *(z.array, a.array, None if dropped is None else dropped.array, z.stride),
        *(None if b is None else b.array, 0 if b is None else b.stride, number, row.alpha or 0.0),
        *(*arguments, models, batch, units),
    )
    return z.get(), a.get(), None if dropped is None else dropped.get(), keep(z.array.shape)


def define_forward(row, z, b=None):
    u = z.astype(np.float64) if b is None else z.astype(np.float64) + b[:, None, :]
    return u, row.f(u)


@every_row
@every_type
def test_every_activation_with_bias_and_dropout(name, type):
    row = get_activation(name, 0.3) if ACTIVATIONS[name].alpha else ACTIVATIONS[name]
    z, b = numbers((3, 5, 33), type), numbers((3, 33), type, 1)
    b[:, ::2] = 0  # kinks stay kinks
    got_z, a, dropped, keep = forward(row, z, type, b, rates=RATES)
    wanted_u, wanted_a = define_forward(row, z, b)
    assert_close(got_z, wanted_u, type)
    assert_close(a, wanted_a, type)
    assert_close(dropped, wanted_a * keep, type)
    assert (dropped[keep == 0] == 0).all() and 0.1 < (keep == 0).mean() < 0.4


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("rates", [None, RATES])
@every_type
def test_what_is_written(biased, in_place, rates, type):
    row, z = ACTIVATIONS["tanh"], numbers((2, 3, 37), type)
    b = numbers((2, 37), type, 1) if biased else None
    got_z, a, dropped, keep = forward(row, z, type, b, in_place=in_place, rates=rates)
    wanted_u, wanted_a = define_forward(row, z, b)
    assert_close(a, wanted_a, type)
    if in_place:
        np.testing.assert_array_equal(got_z, a)
    elif biased:
        assert_close(got_z, wanted_u, type)
    else:
        np.testing.assert_array_equal(got_z, z)
    assert (dropped is None) == (rates is None)
    if rates is not None:
        assert_close(dropped, wanted_a * keep, type)


@every_shape
@pytest.mark.parametrize("place", PLACES, ids=str)
@every_type
def test_forward_of_any_shape_at_any_place(shape, place, type):
    row, z, b = ACTIVATIONS["sigmoid"], numbers(shape, type), numbers((shape[0], shape[2]), type, 1)
    offset, gap = place
    got = forward(row, z, type, b, rates=RATES, offset=offset, gap=gap)
    wanted_u, wanted_a = define_forward(row, z, b)
    assert_close(got[0], wanted_u, type)
    assert_close(got[1], wanted_a, type)
    assert_close(got[2], wanted_a * got[3], type)
    for grid, block in [((1, 1), 32), ((7, 5), 64)]:
        other = forward(row, z, type, b, rates=RATES, offset=offset, gap=gap, grid=grid, block=block)
        assert_same_bits(other, got)


@pytest.mark.parametrize("off", ["z", "a", "dropped", "b"])
@every_type
def test_forward_where_one_array_begins_elsewhere(off, type):
    z, b = numbers((2, 5, 40), type), numbers((2, 40), type, 1)
    got = forward(ACTIVATIONS["tanh"], z, type, b, rates=RATES, off=off)
    assert_same_bits(got, forward(ACTIVATIONS["tanh"], z, type, b, rates=RATES))


@every_type
def test_forward_of_any_schedule(type):
    row, z, b = ACTIVATIONS["gelu"], numbers((2, 9, 37), type), numbers((2, 37), type, 1)
    first = forward(row, z, type, b, rates=RATES)
    for schedule in (1, 2, 3):
        assert_same_bits(forward(row, z, type, b, rates=RATES, schedule=schedule), first)


def test_forward_of_no_rows():
    z, a, dropped, _ = forward(ACTIVATIONS["relu"], np.empty((2, 0, 3)), "f32", np.zeros((2, 3)), rates=RATES)
    assert z.size == a.size == dropped.size == 0


def test_nan_passes_through_activations():
    z = numbers((1, 2, 40), "f32")
    z[0, 1, 3] = np.nan
    for row in ACTIVATIONS.values():
        np.testing.assert_array_equal(np.isnan(forward(row, z, "f32")[1]), np.isnan(z))


# --- dense_backward


def backward(
    row, d, u, a, type, *, rates=None, sums=True, grid=(2, 2, 1), schedule=0, offset=0, gap=0, runs=1, off=None
):
    """d and db as the kernel leaves them, and the mask; db is None unless ``sums``; ``off`` as above."""
    runtime = EmulatedRuntime(schedule=schedule)
    models, batch, units = d.shape
    named = {"d": d, "u": u, "a": a}
    d, u, a = (Buffer(runtime, values, type, offset + (off == name), gap) for name, values in named.items())
    T, name = wide(type)
    db = Buffer(runtime, np.full((models, units), np.nan, T), name, offset, gap) if sums else None
    arguments, keep = draws(runtime, models, type, rates)
    splits = grid[2]
    partial = DeviceArray.empty(runtime, (models, splits, units), name) if sums and splits > 1 else None
    tickets = on_device(runtime, np.zeros((models, -(-units // 32)), np.uint32)) if partial is not None else None
    start = d.array.get()
    for _ in range(runs):
        d.array[...] = start
        launch(
            runtime,
            f"dense_backward_{type}",
            grid,
            (32, 8),
            *(d.array, u.array, a.array, d.stride, list(ACTIVATIONS).index(row.name), row.alpha or 0.0, *arguments),
            *(None if db is None else db.array, 0 if db is None else db.stride, partial, tickets),
            *(models, batch, units),
        )
        assert tickets is None or not tickets.get().any()
    return d.get(), None if db is None else db.get(), keep(d.array.shape)


def define_backward(row, d, u, a, keep):
    with np.errstate(invalid="ignore"):
        slope = row.f_grad(*((a, a) if row.in_place else (u, u)))
    d = d.astype(np.float64) * keep * slope
    return d, d.sum(axis=1)


def layer(row, shape, type, seed=0):
    """A gradient, what f read and what it gave, each exact in the type."""
    u = numbers(shape, type, seed)
    a = row.f(u.astype(np.float64))
    a = bf16_to_float32(float32_to_bf16(a)) if type == "bf16" else a.astype(wide(type)[0])
    return numbers(shape, type, seed + 1), u, a


@every_row
@every_type
@pytest.mark.parametrize("units", [33, 40])
def test_every_derivative_with_dropout_and_sums(name, type, units):
    row = get_activation(name, 0.3) if ACTIVATIONS[name].alpha else ACTIVATIONS[name]
    d, u, a = layer(row, (3, 21, units), type)
    got, db, keep = backward(row, d, u, a, type, rates=RATES)
    wanted, wanted_db = define_backward(row, d, u, a, keep)
    assert_close(got, wanted, type)
    assert_close(db, wanted_db, type)
    unread = np.full_like(u, np.nan)  # of u and a, the derivative needs one
    other = backward(row, d, *((unread, a) if row.in_place else (u, unread)), type, rates=RATES)
    assert_same_bits(other, (got, db, keep))


@every_shape
@pytest.mark.parametrize("place", PLACES, ids=str)
@every_type
def test_backward_of_any_shape_at_any_place(shape, place, type):
    row = ACTIVATIONS["silu"]
    d, u, a = layer(row, shape, type)
    offset, gap = place
    got = backward(row, d, u, a, type, rates=RATES, offset=offset, gap=gap)
    wanted, wanted_db = define_backward(row, d, u, a, got[2])
    assert_close(got[0], wanted, type)
    assert_close(got[1], wanted_db, type)
    for grid in [(1, 1, 1), (7, 5, 1)]:
        assert_same_bits(backward(row, d, u, a, type, rates=RATES, offset=offset, gap=gap, grid=grid), got)
    for grid in [(1, 2, 2), (3, 1, 5)]:  # another order of the sum
        other = backward(row, d, u, a, type, rates=RATES, offset=offset, gap=gap, grid=grid, runs=2)
        assert_same_bits(other[::2], got[::2])
        assert_close(other[1], wanted_db, type)


@pytest.mark.parametrize("off", ["d", "u", "a"])
@every_type
def test_backward_where_one_array_begins_elsewhere(off, type):
    row = ACTIVATIONS["silu"]
    d, u, a = layer(row, (2, 20, 40), type)
    got, aligned = (backward(row, d, u, a, type, rates=RATES, off=which) for which in (off, None))
    assert_same_bits(got[::2], aligned[::2])
    assert_close(got[1], aligned[1], type)


@pytest.mark.parametrize("units", [35, 72])
@every_type
def test_backward_of_any_schedule(units, type):
    row = ACTIVATIONS["elu"]
    d, u, a = layer(row, (2, 90, units), type)
    for grid in [(1, 2, 1), (2, 1, 3)]:
        first = backward(row, d, u, a, type, rates=RATES, grid=grid)
        for schedule in (1, 2, 3):
            assert_same_bits(backward(row, d, u, a, type, rates=RATES, grid=grid, schedule=schedule), first)


@pytest.mark.parametrize("units", [1, 24])
@every_type
def test_identity_without_dropout_is_a_column_sum(units, type):
    d = numbers((2, 50, units), type)
    unread = np.full_like(d, np.nan)
    got, db, _ = backward(ACTIVATIONS["identity"], d, unread, unread, type, grid=(1, 2, 2))
    np.testing.assert_array_equal(got, d)
    assert_close(db, d.sum(axis=1, dtype=np.float64), type)


@pytest.mark.parametrize("units", [5, 32])
@every_type
def test_backward_without_sums(units, type):
    row = ACTIVATIONS["relu"]
    d, u, a = layer(row, (2, 9, units), type)
    got, db, keep = backward(row, d, u, a, type, rates=RATES, sums=False, grid=(1, 1, 2))
    assert db is None
    assert_close(got, define_backward(row, d, u, a, keep)[0], type)


@pytest.mark.parametrize("splits", [1, 3])
def test_backward_of_no_rows(splits):
    nothing = np.empty((2, 0, 9), np.float32)
    _, db, _ = backward(ACTIVATIONS["relu"], nothing, nothing, nothing, "f32", grid=(1, 1, splits))
    np.testing.assert_array_equal(db, np.zeros((2, 9)))


@pytest.mark.parametrize("units", [40, 41])
def test_backward_drops_what_forward_dropped(units):
    row, shape = ACTIVATIONS["identity"], (3, 20, units)
    ones = np.ones(shape, np.float32)
    dropped = forward(row, ones, "f32", rates=RATES)[2]
    np.testing.assert_array_equal(backward(row, ones, ones, ones, "f32", rates=RATES)[0], dropped)


# --- dropout


def drop(x, type, *, models=None, rates=RATES, in_place=False, grid=(2, 2), schedule=0, offset=0, gap=0):
    runtime = EmulatedRuntime(schedule=schedule)
    models = models or len(x)
    arguments, keep = draws(runtime, models, type, rates)
    x = Buffer(runtime, x, type, offset, gap)
    shape = (models, *x.array.shape[1:])
    out = x if in_place else Buffer(runtime, np.full(shape, np.nan), type, offset, gap)
    stride = x.stride if len(x.array) == models else 0
    size = int(np.prod(shape[1:]))
    launch(runtime, f"dropout_{type}", grid, (64,), x.array, stride, out.array, out.stride, *arguments, models, size)
    x.get()
    return out.get(), keep(shape)


@every_shape
@pytest.mark.parametrize("place", PLACES, ids=str)
@every_type
def test_dropout_of_any_shape_at_any_place(shape, place, type):
    x = numbers(shape, type)
    offset, gap = place
    got, keep = drop(x, type, offset=offset, gap=gap)
    assert_close(got, x * keep, type)
    for grid in [(1, 1), (5, 3)]:
        assert_same_bits(drop(x, type, offset=offset, gap=gap, grid=grid), (got, keep))
    assert_same_bits(drop(x, type, offset=offset, gap=gap, in_place=True, schedule=1), (got, keep))


@every_type
def test_dropout_of_rows_that_models_share(type):
    x = numbers((1, 4, 70), type)
    got, keep = drop(x, type, models=3)
    assert_close(got, x * keep, type)
    assert not np.array_equal(keep[0] > 0, keep[2] > 0)


@every_type
def test_dropout_without_rates_passes_on(type):
    x = numbers((2, 3, 111), type)
    np.testing.assert_array_equal(drop(x, type, rates=None)[0], x)


# --- add_columns


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize(
    ("columns", "start", "width"), [(1, 0, 1), (45, 3, 17), (64, 16, 32), (33, 0, 33), (40, 0, 40), (48, 8, 31)]
)
@pytest.mark.parametrize("place", PLACES, ids=str)
@every_type
def test_columns_go_into_wider_rows_and_out_of_them(adds, columns, start, width, place, type):
    models, batch, (offset, gap) = 3, 7, place
    narrow, rows = numbers((models, batch, width), type), numbers((models, batch, columns), type, 1)

    def run(grid, inwards):
        runtime = EmulatedRuntime()
        one, other = Buffer(runtime, narrow, type, offset, gap), Buffer(runtime, rows, type, 0, gap)
        ends = (one, one.array, width), (other, other.array[..., start : start + width], columns)
        (source, x, x_row), (target, out, out_row) = ends if inwards else ends[::-1]
        strides = source.stride, x_row, target.stride, out_row
        arguments = (x, strides[0], strides[1], out, strides[2], strides[3], int(adds), models, batch, width)
        launch(runtime, f"add_columns_{type}", grid, (64,), *arguments)
        return one.get(), other.get()

    part = rows[..., start : start + width]
    wanted = rows.copy()
    wanted[..., start : start + width] = narrow + part if adds else narrow
    for inwards, expected in [(True, (narrow, wanted)), (False, (part + narrow if adds else part, rows))]:
        got = run((2, 2), inwards)
        for values, correct in zip(got, expected, strict=True):
            assert_close(values, correct, type)
        for grid in [(1, 1), (9, 5)]:
            assert_same_bits(run(grid, inwards), got)


def test_models_may_share_what_is_added():
    runtime, x, out = EmulatedRuntime(), numbers((1, 3, 5), "f32"), numbers((2, 3, 5), "f32", 1)
    target = on_device(runtime, out)
    launch(runtime, "add_columns_f32", (1, 1), (32,), on_device(runtime, x), 0, 5, target, 15, 5, 1, 2, 3, 5)
    np.testing.assert_array_equal(target.get(), x + out)


# --- limit_norms


def limit(W, max_norm, type, *, shadowed=False, ok=None, valid=None, grid=(1, 2), schedule=0, offset=0, gap=0):
    runtime = EmulatedRuntime(schedule=schedule)
    models, units, fan_in = W.shape
    shadow = Buffer(runtime, W, "bf16", offset, gap) if shadowed else None
    W = Buffer(runtime, W, type, offset, gap)
    flags = [None if f is None else on_device(runtime, np.array(f, np.int32)) for f in (ok, valid)]
    arguments = (W.array, W.stride, units, fan_in, max_norm, None if shadow is None else shadow.array, *flags, models)
    launch(runtime, f"limit_norms_{type}", grid, (64,), *arguments)
    return W.get(), None if shadow is None else shadow.get()


def define_limit(W, max_norm):
    W = W.astype(np.float64)
    NumpyBackend().limit_norms(SimpleNamespace(parameters={"W": W}), "W", max_norm, slice(None))
    return W


def weights(shape, type):
    """Rows shorter and longer than 1."""
    scale = np.linspace(0.1, 2.0, shape[0] * shape[1]).reshape(*shape[:2], 1) / np.sqrt(shape[2])
    return (np.random.default_rng(0).standard_normal(shape) * scale).astype(wide(type)[0])


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 31), (1, 9, 33), (2, 3, 1000), (2, 4, 128)], ids=str)
@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("type", ["f32", "f64"])
def test_long_rows_are_cut_and_short_ones_kept(shape, place, type):
    W, (offset, gap) = weights(shape, type), place
    got, shadow = limit(W, 1.0, type, shadowed=True, offset=offset, gap=gap)
    assert_close(got, define_limit(W, 1.0), type)
    short = np.linalg.norm(W, axis=-1) <= 1.0
    np.testing.assert_array_equal(got[short], W[short])
    np.testing.assert_array_equal(shadow, bf16_to_float32(float32_to_bf16(got)))
    for grid, schedule in [((3, 1), 0), ((1, 5), 1), ((2, 2), 2)]:
        again = limit(W, 1.0, type, shadowed=True, offset=offset, gap=gap, grid=grid, schedule=schedule)
        assert_same_bits(again, (got, shadow))


def test_models_that_made_no_step_keep_their_weights():
    W = weights((4, 3, 50), "f32") * 10
    got, _ = limit(W, 1.0, "f32", ok=[1, 0, 1, 1], valid=[5, 5, 0, 1])
    assert_close(got[[0, 3]], define_limit(W, 1.0)[[0, 3]], "f32")
    np.testing.assert_array_equal(got[1:3], W[1:3])


def test_a_row_with_nan_becomes_nan():
    W = weights((1, 2, 40), "f32")
    W[0, 1, 7] = np.nan
    got, _ = limit(W, 1.0, "f32")
    assert np.isnan(got[0, 1]).all() and np.isfinite(got[0, 0]).all()
