"""kernels/norm.cu against norm_forward and norm_backward of the NumPy backend, on the emulator."""

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp.backends.base import Norm
from gpumlp.backends.device import DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.numpy_backend import norm_backward, norm_forward

TOLERANCES = {"f32": 1e-5, "f64": 1e-12, "bf16": 1e-2}
# (models, batch, units). Batches that fit a block's registers and not
BATCH_SHAPES = [(1, 1, 1), (3, 5, 33), (1, 128, 3), (2, 131, 40), (1, 300, 31)]
# Rows for 4, 8, 16 and 32 lanes, and for a block
LAYER_SHAPES = [(1, 1, 1), (3, 5, 33), (2, 19, 40), (1, 9, 100), (2, 3, 208), (1, 3, 1000), (2, 2, 1031), (1, 2, 2504)]
# offset of the first element, elements between the models: 16-byte accesses can and cannot be had
PLACES = [(0, 0), (1, 3), (8, 16)]

every_type = pytest.mark.parametrize("type", TOLERANCES)
every_batch_shape = pytest.mark.parametrize("shape", BATCH_SHAPES, ids=str)
every_layer_shape = pytest.mark.parametrize("shape", LAYER_SHAPES, ids=str)


# --- what the tests are made of


def wide(type):
    """The type of a kernel's arithmetic, NumPy's and the kernel's name for it."""
    return (np.float64, "f64") if type == "f64" else (np.float32, "f32")


def exact(values, type):
    """What the type can hold of the values."""
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


class Case:
    """A normalisation's arrays on the host: what it reads, and what the definition makes of that in float64."""

    def __init__(self, kind, shape, type, x_mean=3.0):
        rng, (models, _, units) = np.random.default_rng(0), shape
        parameter = (models, units)
        self.kind, self.type = kind, type
        self.x = exact(x_mean + 2 * rng.standard_normal(shape), type)
        self.d = exact(rng.standard_normal(shape), type)
        T = wide(type)[0]
        self.gamma, self.beta, mean = ((1 + rng.standard_normal(parameter)).astype(T) for _ in range(3))
        self.running = [mean, (0.5 + rng.random(parameter)).astype(T)]

    def define(self, training=True, update_running=True, valid=None):
        """What norm_forward and norm_backward give, one model after the other over its valid rows; 0 beyond them."""
        models, batch, units = self.x.shape
        results = []
        for m in range(models):
            n = batch if valid is None else valid[m]
            one = slice(m, m + 1)
            running = [values[one].astype(np.float64) for values in self.running]
            parts = [np.zeros((1, batch, units)) for _ in range(3)]
            x_hat, out, d = (part[:, :n] for part in parts)
            inverse = np.zeros((1, 1, units) if self.kind == "batch" else (1, n, 1))
            sums = [np.zeros((1, units)) for _ in range(2)]
            d[...] = self.d[one, :n]
            x, gamma, beta = (
                values.astype(np.float64) for values in (self.x[one, :n], self.gamma[one], self.beta[one])
            )
            if n:
                norm = Norm(self.kind, x, x_hat, inverse, out, gamma, beta, *sums, d, *running)
                norm_forward(norm, training, update_running)
                hat = x_hat.copy()
                x_hat[...] = exact(hat, self.type)  # what the backward pass reads
                norm_backward(norm)
                x_hat[...] = hat
            results.append([*parts, inverse, *sums, *running])
        x_hat, out, d, inverse, dgamma, dbeta, mean, variance = map(np.concatenate, zip(*results, strict=True))
        forward = dict(x_hat=x_hat, out=out, inverse_std=inverse, running_mean=mean, running_variance=variance)
        return forward, dict(d=d, dgamma=dgamma, dbeta=dbeta)


def assert_close(got, wanted, type):
    for name, values in got.items():
        scale = np.abs(wanted[name]).max(initial=1e-30)
        np.testing.assert_allclose(
            values, wanted[name], rtol=TOLERANCES[type], atol=TOLERANCES[type] * scale, err_msg=name
        )


def assert_same_bits(got, wanted):
    assert got.keys() == wanted.keys()
    for name in got:
        np.testing.assert_array_equal(got[name], wanted[name], err_msg=name)


def counts(runtime, valid):
    return None if valid is None else on_device(runtime, np.array(valid, np.int32))


# --- batch normalisation


def batch_forward(
    case, *, training=True, update_running=True, valid=None, in_place=False, grid=(2, 2), schedule=0, offset=0, gap=0
):
    runtime, type = EmulatedRuntime(schedule=schedule), case.type
    (T, name), (models, batch, units) = wide(type), case.x.shape
    x = Buffer(runtime, case.x, type, offset, gap)
    out = Buffer(runtime, np.full(case.x.shape, np.nan), type, offset, gap)
    x_hat = x if in_place else Buffer(runtime, np.full(case.x.shape, np.nan), type, offset, gap)
    gamma, beta, mean, variance = (
        Buffer(runtime, values, name, offset, gap) for values in (case.gamma, case.beta, *case.running)
    )
    inverse = Buffer(runtime, np.full((models, 1, units), np.nan, T), name, offset, gap)
    launch(
        runtime,
        f"batch_norm_forward_{type}",
        grid,
        (32, 8),
        *(x.array, x_hat.array, out.array, x.stride, inverse.array, inverse.stride),
        *(gamma.array, beta.array, gamma.stride, mean.array, variance.array, mean.stride),
        *(counts(runtime, valid), int(training), int(update_running), models, batch, units),
    )
    if not in_place:
        np.testing.assert_array_equal(x.get(), case.x)
    named = dict(x_hat=x_hat, out=out, inverse_std=inverse, running_mean=mean, running_variance=variance)
    return {name: buffer.get() for name, buffer in named.items()}


def batch_backward(case, forward, *, valid=None, grid=(2, 2), schedule=0, offset=0, gap=0):
    runtime, type = EmulatedRuntime(schedule=schedule), case.type
    (T, name), (models, batch, units) = wide(type), case.x.shape
    d, x_hat = (Buffer(runtime, values, type, offset, gap) for values in (case.d, forward["x_hat"]))
    inverse = Buffer(runtime, forward["inverse_std"].astype(T), name, offset, gap)
    unwritten = np.full((models, units), np.nan, T)
    gamma, dgamma, dbeta = (Buffer(runtime, v, name, offset, gap) for v in (case.gamma, unwritten, unwritten))
    launch(
        runtime,
        f"batch_norm_backward_{type}",
        grid,
        (32, 8),
        *(d.array, x_hat.array, d.stride, inverse.array, inverse.stride),
        *(gamma.array, dgamma.array, dbeta.array, gamma.stride, counts(runtime, valid), models, batch, units),
    )
    return {"d": d.get(), "dgamma": dgamma.get(), "dbeta": dbeta.get()}


@every_batch_shape
@pytest.mark.parametrize("place", PLACES, ids=str)
@every_type
def test_batch_normalisation_of_any_shape_at_any_place(shape, place, type):
    case, (offset, gap) = Case("batch", shape, type), place
    forward, backward = case.define()
    got = batch_forward(case, offset=offset, gap=gap)
    assert_close(got, forward, type)
    got_back = batch_backward(case, forward, offset=offset, gap=gap)
    assert_close(got_back, backward, type)
    for grid in [(1, 1), (3, 5)]:
        assert_same_bits(batch_forward(case, offset=offset, gap=gap, grid=grid), got)
        assert_same_bits(batch_backward(case, forward, offset=offset, gap=gap, grid=grid), got_back)
    assert_same_bits(batch_forward(case, offset=offset, gap=gap, in_place=True), got)


@pytest.mark.parametrize("valid", [(7, 0, 1), (150, 64, 149)], ids=str)
@every_type
def test_batch_statistics_are_of_the_valid_rows(valid, type):
    case = Case("batch", (3, max(9, *valid), 34), type)
    forward, backward = case.define(valid=valid)
    for m, n in enumerate(valid):
        case.x[m, n:] = case.d[m, n:] = np.nan  # nobody reads them
    got = batch_forward(case, valid=valid)
    none = [m for m, n in enumerate(valid) if n == 0]
    assert np.isfinite(got["inverse_std"]).all()
    forward["inverse_std"][none] = got["inverse_std"][none]  # of a model without rows: any number
    assert_close(got, forward, type)
    assert_close(batch_backward(case, forward, valid=valid), backward, type)


@pytest.mark.parametrize("batch", [1, 9, 140])
@every_type
def test_batch_normalisation_predicts_with_the_running_statistics(batch, type):
    case = Case("batch", (2, batch, 35), type)
    forward, _ = case.define(training=False)
    got = batch_forward(case, training=False)
    assert_close(got, forward, type)
    np.testing.assert_array_equal(got["running_mean"], case.running[0])
    np.testing.assert_array_equal(got["running_variance"], case.running[1])


@pytest.mark.parametrize(("batch", "update_running", "moved"), [(6, True, True), (6, False, False), (1, True, False)])
def test_the_running_statistics_move_when_asked_and_with_two_rows(batch, update_running, moved):
    case = Case("batch", (2, batch, 5), "f64")
    forward, _ = case.define(update_running=update_running)
    got = batch_forward(case, update_running=update_running)
    assert_close(got, forward, "f64")
    assert (got["running_mean"] != case.running[0]).all() == moved
    assert (got["running_variance"] != case.running[1]).all() == moved


@pytest.mark.parametrize("batch", [20, 200])
@every_type
def test_batch_normalisation_of_any_schedule(batch, type):
    case = Case("batch", (2, batch, 33), type)
    forward, backward = batch_forward(case), batch_backward(case, case.define()[0])
    for schedule in (1, 2, 3):
        assert_same_bits(batch_forward(case, schedule=schedule), forward)
        assert_same_bits(batch_backward(case, case.define()[0], schedule=schedule), backward)


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_a_mean_far_from_zero_keeps_the_variance(kind):
    case = Case(kind, (1, 60, 40), "f32", x_mean=1000.0)
    got = (batch_forward if kind == "batch" else layer_forward)(case)
    np.testing.assert_allclose(got["inverse_std"], case.define()[0]["inverse_std"], rtol=1e-4)


def test_batch_normalisation_of_no_rows():
    case = Case("batch", (2, 0, 3), "f32")
    assert batch_forward(case)["out"].size == 0
    got = batch_backward(case, {"x_hat": case.x, "inverse_std": np.ones((2, 1, 3))})
    assert not got["dgamma"].any() and not got["dbeta"].any()


# --- layer normalisation


def layer_forward(case, *, in_place=False, grid=(2, 2), block=(256,), schedule=0, offset=0, gap=0, off=None):
    """What the kernel gives; the array called ``off`` begins one element later than the others."""
    runtime, type = EmulatedRuntime(schedule=schedule), case.type
    (T, name), (models, batch, units) = wide(type), case.x.shape
    x = Buffer(runtime, case.x, type, offset + (off == "x"), gap)
    out = Buffer(runtime, np.full(case.x.shape, np.nan), type, offset + (off == "out"), gap)
    x_hat = x if in_place else Buffer(runtime, np.full(case.x.shape, np.nan), type, offset + (off == "x_hat"), gap)
    gamma = Buffer(runtime, case.gamma, name, offset + (off == "gamma"), gap)
    beta = Buffer(runtime, case.beta, name, offset + (off == "beta"), gap)
    inverse = Buffer(runtime, np.full((models, batch, 1), np.nan, T), name, offset, gap)
    launch(
        runtime,
        f"layer_norm_forward_{type}",
        grid,
        block,
        *(x.array, x_hat.array, out.array, x.stride, inverse.array, inverse.stride),
        *(gamma.array, beta.array, gamma.stride, models, batch, units),
    )
    if not in_place:
        np.testing.assert_array_equal(x.get(), case.x)
    return {"x_hat": x_hat.get(), "out": out.get(), "inverse_std": inverse.get()}


def layer_backward(case, forward, *, grid=(2, 2), block=(256,), schedule=0, offset=0, gap=0, off=None):
    """Both kernels, in their order; ``off`` as above."""
    runtime, type = EmulatedRuntime(schedule=schedule), case.type
    (T, name), (models, batch, units) = wide(type), case.x.shape
    d = Buffer(runtime, case.d, type, offset + (off == "d"), gap)
    x_hat = Buffer(runtime, forward["x_hat"], type, offset + (off == "x_hat"), gap)
    inverse = Buffer(runtime, forward["inverse_std"].astype(T), name, offset, gap)
    unwritten = np.full((models, units), np.nan, T)
    gamma = Buffer(runtime, case.gamma, name, offset + (off == "gamma"), gap)
    dgamma, dbeta = (Buffer(runtime, unwritten, name, offset, gap) for _ in range(2))
    sums = dgamma.array, dbeta.array, dgamma.stride
    arrays = d.array, x_hat.array, d.stride
    launch(runtime, f"layer_norm_parameters_{type}", grid, (32, 8), *arrays, *sums, models, batch, units)
    roots = inverse.array, inverse.stride, gamma.array, gamma.stride
    launch(runtime, f"layer_norm_backward_{type}", grid, block, *arrays, *roots, models, batch, units)
    return {"d": d.get(), "dgamma": dgamma.get(), "dbeta": dbeta.get()}


@every_layer_shape
@pytest.mark.parametrize("place", PLACES, ids=str)
@every_type
def test_layer_normalisation_of_any_shape_at_any_place(shape, place, type):
    case, (offset, gap) = Case("layer", shape, type), place
    forward, backward = case.define()
    got = layer_forward(case, offset=offset, gap=gap)
    assert_close(got, forward, type)
    got_back = layer_backward(case, forward, offset=offset, gap=gap)
    assert_close(got_back, backward, type)
    for grid in [(1, 1), (3, 5)]:
        assert_same_bits(layer_forward(case, offset=offset, gap=gap, grid=grid), got)
        assert_same_bits(layer_backward(case, forward, offset=offset, gap=gap, grid=grid), got_back)
    assert_same_bits(layer_forward(case, offset=offset, gap=gap, in_place=True), got)


@pytest.mark.parametrize("off", ["x", "x_hat", "out", "gamma", "beta", "d"])
@every_type
def test_layer_normalisation_where_one_array_begins_elsewhere(off, type):
    case = Case("layer", (2, 3, 40), type)
    forward, backward = case.define()
    assert_close(layer_forward(case, off=off), forward, type)
    assert_close(layer_backward(case, forward, off=off), backward, type)


@pytest.mark.parametrize("units", [70, 1500])
@pytest.mark.parametrize("block", [(32,), (96,), (32, 8)], ids=str)
@every_type
def test_layer_normalisation_by_blocks_of_any_shape(units, block, type):
    case = Case("layer", (2, 3, units), type)  # 32 threads hold 512 of 1500 units
    forward, backward = case.define()
    assert_close(layer_forward(case, block=block), forward, type)
    assert_close(layer_backward(case, forward, block=block), backward, type)


@pytest.mark.parametrize("shape", [(2, 19, 60), (1, 150, 35), (1, 2, 1100)], ids=str)
@every_type
def test_layer_normalisation_of_any_schedule(shape, type):
    case = Case("layer", shape, type)
    forward, backward = layer_forward(case), layer_backward(case, case.define()[0])
    for schedule in (1, 2, 3):
        assert_same_bits(layer_forward(case, schedule=schedule), forward)
        assert_same_bits(layer_backward(case, case.define()[0], schedule=schedule), backward)


def test_layer_normalisation_of_no_rows():
    case = Case("layer", (2, 0, 3), "f32")
    assert layer_forward(case)["out"].size == 0
    got = layer_backward(case, {"x_hat": case.x, "inverse_std": np.ones((2, 0, 1))})
    assert not got["dgamma"].any() and not got["dbeta"].any()


def test_nan_stays_in_its_column_or_row():
    for kind, forward, touched in [("batch", batch_forward, np.s_[:, :, 2]), ("layer", layer_forward, np.s_[:, 4, :])]:
        case = Case(kind, (1, 9, 40), "f32")
        case.x[0, 4, 2] = np.nan
        wanted = np.zeros((1, 9, 40), bool)
        wanted[touched] = True
        np.testing.assert_array_equal(np.isnan(forward(case)["out"]), wanted)
