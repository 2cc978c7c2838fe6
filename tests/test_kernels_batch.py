"""kernels/batch.cu against the NumPy backend's gather and the rows of gpumlp/augment.py."""

from types import SimpleNamespace

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp import random
from gpumlp.augment import GaussianNoise, Mixup, RandomShift
from gpumlp.backends.base import Batch, Draw
from gpumlp.backends.device import HOST_TYPES, DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.numpy_backend import NumpyBackend
from gpumlp.random import Purpose

GATHERED = ["u8", "i8", "i16", "u16", "i32", "i64", "f16", "f32", "f64"]
TYPES = ["f32", "f64", "bf16"]
COMPUTE = {"f32": "f32", "f64": "f64", "bf16": "f32"}
DTYPES = {T: HOST_TYPES[C] for T, C in COMPUTE.items()}
TOLERANCES = {"f32": 1e-6, "f64": 1e-14, "bf16": 5e-3}  # relative; bf16 rounds once, by 2**-9 at most
LAUNCHES = [  # grid, block, schedule
    ((1, 1), (32,), 0),
    ((3, 2), (96,), 1),
    ((2, 1), (256,), 2),
    ((40, 3), (128,), 3),
]
# A gap between models and a distance from 16 bytes: none, so that 16 bytes are moved at a time, and some.
LAYOUTS = [(0, 0), (16, 0), (3, 1)]
every_type = pytest.mark.parametrize("T", TYPES)
every_layout = pytest.mark.parametrize(("gap", "offset"), LAYOUTS)


# --- what the tests are made of


def numbers(shape, type, seed=0):
    """Values of a type, of all sizes that it holds; bf16 ones as float32."""
    rng = np.random.default_rng(seed)
    if type[0] in "ui":
        bounds = np.iinfo(HOST_TYPES[type])
        return rng.integers(bounds.min, bounds.max, shape, HOST_TYPES[type], endpoint=True)
    values = rng.normal(0.5, 2.0, shape)
    return rounded(values.astype(HOST_TYPES[type]), type)


def rounded(values, type):
    """What an array of ``type`` keeps of ``values``."""
    return bf16_to_float32(float32_to_bf16(values)) if type == "bf16" else values


def placed(runtime, values, type=None, gap=0, offset=0):
    """``values`` on the device, ``offset`` elements behind 256 bytes, each model ``gap`` elements behind the last one's."""
    values = np.asarray(values)
    packed = on_device(runtime, values.reshape(len(values), values[:1].size), type)
    n = packed.shape[1]
    store = DeviceArray.empty(runtime, (offset + len(values) * (n + gap),), packed.type)
    array = store[offset:].reshape(len(values), n + gap)[:, :n]
    array[...] = packed
    return array.reshape(*values.shape)


def stride(array):
    return 0 if array is None else array.strides[0]


def streams(models):
    """Seeds, streams and steps that differ from model to model and fill more than 32 bits."""
    seeds = np.array([2**64 - 1, 5, 7, 11], np.uint64)[:models]
    return Draw(seeds, np.arange(3, 3 + models, dtype=np.uint64), np.array([2**33, 0, 9, 1], np.uint64)[:models])


def draws_on(runtime, draw):
    return [on_device(runtime, values) for values in (draw.seeds, draw.streams, draw.steps)]


def valid_on(runtime, valid):
    return None if valid is None else on_device(runtime, np.array(valid, np.int32))


def applied(row, x, valid, targets=None, weights=None):
    """What a row of gpumlp.augment makes of each model's first rows, in place."""
    draw = streams(len(x))
    for m, n in enumerate(valid if valid is not None else [x.shape[1]] * len(x)):
        one = slice(m, m + 1)
        part = SimpleNamespace(
            x=x[one, :n],
            targets=None if targets is None else targets[one, :n],
            weights=None if weights is None else weights[one, :n],
        )
        row.apply(part, Draw(draw.seeds[one], draw.streams[one], draw.steps[one]))
    return x


def same_bits(run):
    """That ``run(grid, block, schedule)`` gives one result for every launch."""
    first, *others = [run(*how) for how in LAUNCHES]
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


# --- gather

ROWS = 23  # of the data set


def gather_case(S, T, groups, features, outputs, *, batch=5, position=2, scaled=True, weighted=True, ordered=True):
    """A data set and what to gather from it; outputs 0 stands for labels."""
    rng, dtype = np.random.default_rng(features), DTYPES[T]
    case = SimpleNamespace(S=S, T=T, groups=groups, batch=batch, position=position, outputs=outputs)
    case.X = numbers((ROWS, features), S)
    case.y = rng.integers(0, 1000, ROWS) if outputs == 0 else rng.normal(size=(ROWS, outputs)).astype(dtype)
    case.weight = rng.random(ROWS).astype(dtype) if weighted else None
    case.order = np.stack([rng.permutation(ROWS) for _ in range(groups)]) if ordered else None
    case.scaling = case.target_scaling = None
    if scaled:
        spread = 1.0 if S[0] == "f" else float(np.iinfo(HOST_TYPES[S]).max)
        case.scaling = [
            rng.normal(0.0, spread, (groups, 1, features)).astype(dtype),
            (rng.uniform(0.5, 2.0, (groups, 1, features)) / spread).astype(dtype),
        ]
        if outputs:
            case.target_scaling = [rng.uniform(0.5, 2.0, (groups, 1, outputs)).astype(dtype) for _ in range(2)]
    return case


def defined(case, valid):
    """x, targets and weights by the NumPy backend; rows that do not count are 0."""
    shape, dtype = (case.groups, case.batch), DTYPES[case.T]
    start = case.position * case.batch
    order = np.arange(ROWS)[None] if case.order is None else case.order
    rows = np.broadcast_to(order[:, start : start + case.batch], shape)
    batch = Batch(
        X=case.X,
        y=case.y,
        weight=case.weight,
        raw=np.empty((*shape, case.X.shape[1]), case.X.dtype),
        x=np.empty((*shape, case.X.shape[1]), dtype),
        targets=np.empty((*shape, *case.y.shape[1:]), case.y.dtype),
        weights=None if case.weight is None else np.empty(shape, dtype),
        shift=None if case.scaling is None else case.scaling[0],
        scale=None if case.scaling is None else case.scaling[1],
        target_shift=None if case.target_scaling is None else case.target_scaling[0],
        target_scale=None if case.target_scaling is None else case.target_scaling[1],
    )
    NumpyBackend().gather(batch, rows)
    results = [batch.x, batch.targets] + ([] if batch.weights is None else [batch.weights])
    for result in results:
        for m, n in enumerate(valid or []):
            result[m, n:] = 0
    return results


def gathered(case, valid, gap=0, offset=0, grid=(2, 2), block=(64,), schedule=0):
    """The same by the kernel."""
    runtime = EmulatedRuntime(schedule=schedule)
    shape, dtype = (case.groups, case.batch), DTYPES[case.T]

    def put(values, type=None):
        return None if values is None else placed(runtime, values, type, gap, offset)

    X = on_device(runtime, np.concatenate([np.zeros(offset, case.X.dtype), case.X.reshape(-1)]), case.S)[offset:]
    y = on_device(runtime, case.y)
    weight = None if case.weight is None else on_device(runtime, case.weight)
    order = case.order
    if (
        order is not None and valid is not None
    ):  # beyond the rows that count nothing may be read: this would be far away
        order = order.copy()
        for m, n in enumerate(valid):
            order[m, case.position * case.batch + n :] = 2**40
    order = put(order)
    step = on_device(runtime, np.array([case.position, 99]))
    x = put(np.full((*shape, case.X.shape[1]), np.nan, dtype), case.T)
    targets = put(np.zeros((*shape, *case.y.shape[1:]), case.y.dtype) - 7)
    weights = put(None if weight is None else np.full(shape, np.nan, dtype))
    shift, scale = map(put, case.scaling or (None, None))
    target_shift, target_scale = map(put, case.target_scaling or (None, None))
    labels = case.outputs == 0
    launch(
        runtime, f"gather_{case.S}_{case.T}", grid, block,
        X, order, stride(order), step, case.batch, valid_on(runtime, valid),
        x, x.strides[0], case.X.shape[1], shift, scale, stride(shift),
        y if labels else None, targets if labels else None,
        None if labels else y, None if labels else targets, max(1, case.outputs), targets.strides[0],
        target_shift, target_scale, stride(target_shift),
        weight, weights, stride(weights), case.groups, case.batch,
    )  # fmt: skip
    return [array.get() for array in (x, targets, weights) if array is not None]


def check_gather(case, valid, *layout):
    tolerances = [TOLERANCES[case.T], TOLERANCES[COMPUTE[case.T]], 0]  # x, targets, weights
    for got, want, tolerance in zip(gathered(case, valid, *layout), defined(case, valid), tolerances, strict=False):
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("S", GATHERED)
@every_type
def test_gather_agrees(S, T):
    for features, outputs, valid in [(1, 0, [5, 5, 5]), (16, 3, [5, 2, 0]), (31, 0, [1, 0, 4]), (48, 1, None)]:
        check_gather(gather_case(S, T, 3, features, outputs), valid)


@pytest.mark.parametrize("S", ["u8", "f32"])
@every_type
@every_layout
def test_gather_agrees_in_any_layout(S, T, gap, offset):
    for groups, features in [(1, 16), (2, 80), (2, 33)]:
        check_gather(gather_case(S, T, groups, features, 2), None, gap, offset)


@every_type
def test_gather_takes_rows_as_they_stand(T):
    """Without an order, and with neither scaling nor weights."""
    case = gather_case("i16", T, 2, 24, 0, scaled=False, weighted=False, ordered=False)
    check_gather(case, [5, 3])


def test_gather_goes_over_wide_rows_and_many():
    check_gather(gather_case("u8", "f32", 1, 1000, 0, batch=3, position=6), None)
    case = gather_case("f32", "f32", 1, 2, 0, batch=23, position=0)
    check_gather(case, [19])


def test_gather_gives_the_same_bits_by_any_launch():
    case = gather_case("u8", "f32", 3, 160, 3)
    same_bits(lambda *how: gathered(case, [5, 1, 3], 0, 0, *how))
    case = gather_case("f16", "bf16", 2, 35, 0)
    same_bits(lambda *how: gathered(case, None, 1, 1, *how))


# --- standardize, cast, find_nonfinite


def standardized(x, shift, scale, T, gap=0, offset=0, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    x = placed(runtime, x, T, gap, offset)
    shift, scale = (placed(runtime, values, None, gap, offset) for values in (shift, scale))
    models, batch, features = x.shape
    launch(
        runtime, f"standardize_{T}", grid, block,
        x, x.strides[0], features, shift, scale, 0 if len(shift) < models else shift.strides[0], models, batch,
    )  # fmt: skip
    return [x.get()]


def scaling_of(groups, features, T):
    rng = np.random.default_rng(3)
    return [rng.uniform(0.5, 2.0, (groups, 1, features)).astype(DTYPES[T]) for _ in range(2)]


@every_type
@every_layout
def test_standardize_agrees(T, gap, offset):
    for models, groups, batch, features in [(1, 1, 1, 1), (3, 3, 7, 33), (3, 1, 5, 16), (2, 2, 0, 4), (2, 2, 3, 1000)]:
        x, (shift, scale) = numbers((models, batch, features), T), scaling_of(groups, features, T)
        [got] = standardized(x, shift, scale, T, gap, offset)
        want = x.copy()
        NumpyBackend().standardize(want, shift, scale)
        np.testing.assert_allclose(got, want, rtol=TOLERANCES[T], atol=TOLERANCES[T])


def test_standardize_gives_the_same_bits_by_any_launch():
    """Each element once: threads of a row that lie in different blocks must not both take it."""
    for features in (8, 33, 600):
        x, (shift, scale) = numbers((3, 5, features), "f32"), scaling_of(3, features, "f32")
        same_bits(lambda *how, a=(x, shift, scale, "f32", 0, 0): standardized(*a, *how))


def cast(values, S, T, gap=0, offset=0, models=None, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    x = placed(runtime, values, S, gap, offset)
    models = models or len(values)
    out = placed(runtime, np.full((models, values.shape[1]), np.nan, DTYPES[T]), T, gap, offset)
    in_stride = x.strides[0] if len(values) == models else 0
    launch(runtime, f"cast_{S}_{T}", grid, block, x, in_stride, out, out.strides[0], values.shape[1], models)
    return [out.get()]


@pytest.mark.parametrize("S", [*GATHERED, "u32", "u64", "bf16"])
@every_type
def test_cast_agrees(S, T):
    for (models, n), (gap, offset) in zip([(1, 1), (3, 31), (2, 1000), (3, 64)], [*LAYOUTS, (0, 0)], strict=True):
        values = numbers((models, n), S)
        [got] = cast(values, S, T, gap, offset)
        np.testing.assert_array_equal(got, rounded(values.astype(DTYPES[T]), T))


def test_cast_repeats_what_models_share():
    values = numbers((1, 37), "u8")
    np.testing.assert_array_equal(cast(values, "u8", "f32", models=3)[0], np.broadcast_to(values, (3, 37)))


def test_cast_keeps_what_is_not_finite():
    values = np.array([[np.nan, np.inf, -np.inf, -0.0, 1e300]])
    for T in TYPES:
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(cast(values, "f64", T)[0], values.astype(DTYPES[T]))


def test_cast_gives_the_same_bits_by_any_launch():
    values = numbers((2, 1031), "f64")
    same_bits(lambda *how: cast(values, "f64", "bf16", 0, 0, None, *how))


LARGEST = float(np.finfo(np.float32).max)


def first_nonfinite(x, type, offset=0, grid=(2,), block=(64,), schedule=0, largest=LARGEST):
    runtime = EmulatedRuntime(schedule=schedule)
    first = on_device(runtime, np.full(1, 2**64 - 1, np.uint64))
    there = placed(runtime, x[None], type, 0, offset)
    launch(runtime, f"find_nonfinite_{type}", grid, block, there, x.size, largest, first)
    return [first.get()]


@pytest.mark.parametrize("type", ["f16", "f32", "f64", "bf16"])
@pytest.mark.parametrize("offset", [0, 1])
def test_find_nonfinite_gives_the_first_one(type, offset):
    for n, places in [(1, [0]), (33, [32]), (1000, [999, 514, 515]), (1009, [700, 3, 8]), (1000, []), (0, [])]:
        x = numbers(n, type)
        x[places] = np.resize(np.array([np.nan, np.inf, -np.inf], x.dtype), len(places))
        [[first]] = first_nonfinite(x, type, offset)
        assert first == min(places, default=2**64 - 1), (n, places)


@pytest.mark.parametrize("type", ["f32", "f64"])
def test_find_nonfinite_finds_what_is_too_large(type):
    x, largest = numbers(1000, type), 1e30
    x[[3, 4, 700, 701]] = largest, -largest, -2e30, 2e30
    assert first_nonfinite(x, type, largest=float(x[3])) == [[700]]
    assert first_nonfinite(x[:700], type, largest=float(x[3])) == [[2**64 - 1]]


def test_find_nonfinite_gives_the_same_answer_by_any_launch():
    x = numbers(1000, "f32")
    x[[611, 800, 999]] = np.nan
    same_bits(lambda grid, *how: first_nonfinite(x, "f32", 0, grid[:1], *how))


# --- augmentation


def noisy(x, std, T, valid, gap=0, offset=0, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    x = placed(runtime, x, T, gap, offset)
    models, batch, features = x.shape
    draws, counted = draws_on(runtime, streams(models)), valid_on(runtime, valid)
    launch(
        runtime, f"noise_{T}", grid, block, x, x.strides[0], features, *draws, counted, std, models, batch
    )  # fmt: skip
    return [x.get()]


@every_type
@every_layout
def test_noise_agrees(T, gap, offset):
    for shape, valid in [((1, 1, 1), None), ((3, 7, 5), [7, 0, 4]), ((2, 3, 32), [1, 3]), ((1, 2, 1000), None)]:
        x = numbers(shape, T)
        [got] = noisy(x, 0.3, T, valid, gap, offset)
        want = applied(GaussianNoise(0.3), x.copy(), valid)
        tolerance = max(TOLERANCES[T], 1e-12)
        np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance)
        for m, n in enumerate(valid or []):
            np.testing.assert_array_equal(got[m, n:], x[m, n:])


def test_noise_in_float_is_the_draw_in_double():
    """Close to zero and far out alike: the uniform behind it is near 1, or near 0."""
    n, draw = 60_000, streams(1)
    [[[got]]] = noisy(np.zeros((1, 1, n), np.float32), 1.0, "f32", None, grid=(4,), block=(256,))
    stream = {"seed": int(draw.seeds[0]), "step": int(draw.steps[0]), "model": int(draw.streams[0])}
    want = random.normal(n, purpose=Purpose.NOISE, **stream)
    assert np.abs(want).max() > 4 and np.abs(want).min() < 1e-4
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


def test_noise_gives_the_same_bits_by_any_launch():
    x = numbers((3, 11, 13), "f32")
    same_bits(lambda *how: noisy(x, 0.5, "f32", [11, 5, 0], 0, 0, *how))


def mixed(x, targets, weights, share, T, valid, gap=0, offset=0, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    arrays = [placed(runtime, x, T, gap, offset), placed(runtime, targets, None, gap, offset)]
    if weights is not None:
        arrays.append(placed(runtime, weights, None, gap, offset))
    weights = arrays[2] if weights is not None else None
    (models, batch, features), outputs = x.shape, targets.shape[2]
    launch(
        runtime, f"mixup_{T}", grid, block,
        arrays[0], arrays[0].strides[0], features, arrays[1], outputs, arrays[1].strides[0],
        weights, stride(weights), valid_on(runtime, valid), on_device(runtime, share), models, batch,
    )  # fmt: skip
    return [array.get() for array in arrays]


def mixup_case(shape, outputs, T, weighted=True):
    models, batch, _ = shape
    rng, draw = np.random.default_rng(4), streams(models)
    targets = rng.random((models, batch, outputs)).astype(DTYPES[T])
    weights = rng.random((models, batch)).astype(DTYPES[T]) if weighted else None
    shares = [Mixup(0.4).share(*map(int, keys)) for keys in zip(draw.seeds, draw.streams, draw.steps, strict=True)]
    return numbers(shape, T), targets, weights, np.array(shares, DTYPES[T])


@every_type
@every_layout
def test_mixup_agrees(T, gap, offset):
    cases = [((1, 1, 1), None), ((3, 6, 5), [6, 0, 3]), ((2, 5, 32), [1, 5]), ((1, 4, 1000), None)]
    for (shape, valid), outputs in zip(cases, [1, 3, 2, 10], strict=True):
        x, targets, weights, share = mixup_case(shape, outputs, T, weighted=outputs != 3)
        got = mixed(x, targets, weights, share, T, valid, gap, offset)
        applied(Mixup(0.4), x, valid, targets, weights)  # in place
        for result, want in zip(got, [x, targets] + ([] if weights is None else [weights]), strict=True):
            tolerance = TOLERANCES[T if result is got[0] else COMPUTE[T]]
            np.testing.assert_allclose(result, want, rtol=tolerance, atol=tolerance)


def test_mixup_gives_the_same_bits_by_any_launch():
    for features in (8, 33, 600):
        case = mixup_case((3, 7, features), 3, "f32")
        same_bits(lambda *how, case=case: mixed(*case, "f32", [7, 2, 4], 0, 0, *how))


def shifted(x, image, pixels, T, valid, gap=0, offset=0, grid=(2, 2), block=(64,), schedule=0):
    runtime = EmulatedRuntime(schedule=schedule)
    out = placed(runtime, np.full(x.shape, np.nan, DTYPES[T]), T, gap, offset)
    x = placed(runtime, x, T, gap, offset)
    models, batch, _ = x.shape
    draws, counted = draws_on(runtime, streams(models)), valid_on(runtime, valid)
    launch(
        runtime, f"shift_images_{T}", grid, block,
        x, out, x.strides[0], *image, pixels, *draws, counted, models, batch,
    )  # fmt: skip
    return [out.get()]


@every_type
@every_layout
def test_shift_images_agrees(T, gap, offset):
    cases = [((1, 1), 2, 3, None), ((5, 3), 1, 9, [9, 0, 4]), ((4, 8), 6, 7, [7, 7, 1]), ((28, 31), 4, 2, None)]
    for image, pixels, batch, valid in cases:
        x = numbers((3, batch, image[0] * image[1]), T)
        [got] = shifted(x, image, pixels, T, valid, gap, offset)
        want = applied(RandomShift(pixels, image), x.copy(), valid)
        for m, n in enumerate(valid or []):
            want[m, n:] = 0
        np.testing.assert_array_equal(got, want)


def test_shift_images_gives_the_same_bits_by_any_launch():
    x = numbers((3, 9, 35), "f32")
    same_bits(lambda *how: shifted(x, (5, 7), 2, "f32", [9, 3, 0], 0, 0, *how))
