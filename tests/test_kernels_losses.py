"""kernels/losses.cu against gpumlp/losses.py: every row, in every form of targets, weights and options."""

import re

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp.backends.device import DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.kernel_source import kernel_path
from gpumlp.losses import LOSSES, Loss, weighted_mean

SOURCE = kernel_path("losses.cu").read_text(encoding="utf-8")
ROWS = re.findall(r"\bROW\((\w+)\)", SOURCE)
TYPES = ["f32", "f64", "bf16"]
DTYPES = {"f32": np.float32, "f64": np.float64, "bf16": np.float32}  # of the arithmetic
TOLERANCES = {"f32": 1e-5, "f64": 1e-12, "bf16": 1e-5}  # of the losses
SLOPE_TOLERANCES = TOLERANCES | {"bf16": 1e-2}
# (models, batch, outputs): one output; odd; one lane an output; pieces of 8; beyond one piece a lane; a block to a row
SHAPES = [
    (1, 1, 1),
    (3, 67, 1),
    (2, 37, 3),
    (1, 5, 31),
    (3, 4, 33),
    (1, 5, 100),
    (1, 2, 257),
    (2, 3, 1000),
    (1, 3, 1031),
]
# Further values of an option, beside its default; a row with an option of another name is tested at its default.
OPTIONS = {"delta": [0.3], "quantile": [0.1, "per output"], "label_smoothing": [0.1, "per model"]}
CASES = [
    (name, options)
    for name, row in LOSSES.items()
    for options in [{}, *({key: value} for key in row.options for value in OPTIONS.get(key, []))]
]
every_row = pytest.mark.parametrize("name", LOSSES)
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=str)
every_type = pytest.mark.parametrize("type", TYPES)


# --- what the tests are made of


def make_loss(name, options, models, outputs):
    rng = np.random.default_rng(0)
    lengths = {"per output": outputs, "per model": models}
    return Loss(name, **{k: rng.uniform(0.1, 0.9, lengths[v]) if v in lengths else v for k, v in options.items()})


def make_logits(shape, type, seed=1):
    z = (2 * np.random.default_rng(seed).standard_normal(shape)).astype(DTYPES[type])
    return bf16_to_float32(float32_to_bf16(z)) if type == "bf16" else z


def make_targets(kind, shape, type, seed=2):
    """All forms of targets that a kind of loss takes: labels, hard and soft."""
    rng, dtype = np.random.default_rng(seed), DTYPES[type]
    if kind == "values":
        return [rng.standard_normal(shape).astype(dtype)]
    if kind == "counts":
        return [rng.poisson(2.0, shape).astype(dtype)]
    soft = rng.random(shape).astype(dtype)
    if kind == "binary":
        return [(soft > 0.5).astype(dtype), soft]
    assert kind == "labels or probabilities", f"write targets for {kind!r} here"
    return [rng.integers(0, shape[-1], shape[:-1]), soft / soft.sum(axis=-1, keepdims=True)]


def placed(runtime, values, type=None, gap=0, offset=0):
    """``values`` on the device, ``offset`` elements behind 256 bytes, each model ``gap`` elements behind the last one's."""
    values = np.asarray(values)
    packed = on_device(runtime, values.reshape(len(values), values[:1].size), type)
    n = packed.shape[1]
    store = DeviceArray.empty(runtime, (offset + len(values) * (n + gap),), packed.type)
    array = store[offset:].reshape(len(values), n + gap)[:, :n]
    array[...] = packed
    return array.reshape(*values.shape)


def over_models(array, models):
    """The stride from model to model, 0 where one entry serves them all."""
    return array.strides[0] if len(array) == models else 0


def option_arguments(runtime, loss, dtype):
    """The row's option and its strides over models and outputs; null for softmax where it smoothes nothing."""
    for name, value in loss.options.items():
        if loss.row.output == "softmax" and not np.any(value):
            break
        strides = (0, 0) if np.ndim(value) == 0 else (0, 1) if name == "quantile" else (1, 0)
        return [on_device(runtime, np.atleast_1d(np.asarray(value, dtype))), *strides]
    return [None, 0, 0]


def weight_arguments(runtime, weight, valid, shape, dtype, gap):
    """Weights, sums over each model's valid rows, and their strides."""
    if weight is None:
        return [None, 0, None, 0]
    models, batch = shape
    counted = np.arange(batch) < np.broadcast_to(batch if valid is None else valid, models)[:, None]
    total = on_device(runtime, (weight * counted).sum(axis=1).astype(dtype))
    weight = placed(runtime, weight.astype(dtype), None, gap)
    return [weight, over_models(weight, models), total, 1]


def run(
    loss, z, y, type, *, weight=None, valid=None, hits=False, dz=True, in_place=False, grid=(2, 2), block=64, schedule=0,
    gap=0, offsets=(0, 0, 0)
):  # fmt: skip
    """The kernel's losses (models, batch), derivative (models, batch, outputs) or None, and hits or None.

    ``y`` and ``weight`` of one model are shared by all; ``offsets`` are those of z, dz and y; losses over single outputs
    have no hits.
    """
    runtime, dtype, (models, batch, outputs) = EmulatedRuntime(schedule=schedule), DTYPES[type], z.shape
    z = placed(runtime, z, type, gap, offsets[0])
    d = z if in_place else placed(runtime, np.full(z.shape, np.nan), type, gap, offsets[1]) if dz else None
    y = placed(runtime, y, None, gap, offsets[2])
    options = option_arguments(runtime, loss, dtype)
    weights = weight_arguments(runtime, weight, valid, (models, batch), dtype, gap)
    counts = None if valid is None else on_device(runtime, np.asarray(valid, np.int32))
    losses = placed(runtime, np.full((models, batch), np.nan, dtype), None, gap)
    found = placed(runtime, np.full((models, batch), -1, np.int32), None, gap) if hits else None
    rest = [over_models(y, models), *options, *weights, counts, losses, losses.strides[0]]
    shape = (models, batch, outputs)
    if loss.row.output == "softmax":
        labels, values = (y, None) if y.type == "i64" else (None, y)
        arguments = [z, d, z.strides[0], labels, values, *rest, found, *shape]
        launch(runtime, f"softmax_loss_{type}", grid, (block,), *arguments)
    else:
        arguments = [ROWS.index(loss.name), z, d, z.strides[0], y, *rest, *shape]
        launch(runtime, f"elementwise_loss_{type}", grid, (block,), *arguments)
    return losses.get(), None if d is None else d.get(), None if found is None else found.get()


def define(loss, z, y, weight=None, valid=None):
    """The same by gpumlp/losses.py: one model after the other, over its valid rows."""
    losses, dz = np.zeros(z.shape[:2], z.dtype), np.zeros_like(z)
    for i, n in enumerate(np.broadcast_to(z.shape[1] if valid is None else valid, len(z))):
        if n == 0:
            continue
        rows, slope = losses[i : i + 1, :n], dz[i : i + 1, :n]
        rows[...] = loss.for_model(i).f(z[i : i + 1, :n], y[i % len(y)][None, :n], slope_of := np.empty_like(slope))
        weighted_mean(rows, None if weight is None else weight[i % len(weight)][None, :n].astype(z.dtype), slope_of)
        slope[...] = slope_of
    return losses, dz


def assert_close(got, wanted, type):
    """Losses and derivatives, each by its own largest."""
    for values, expected, tolerance in zip(got, wanted, (TOLERANCES[type], SLOPE_TOLERANCES[type]), strict=False):
        scale = np.abs(expected).max(initial=0.0)
        np.testing.assert_allclose(values, expected, rtol=tolerance, atol=tolerance * scale)


# --- the rows


def test_every_row_has_its_twin_at_its_place():
    scalar = [name for name, row in LOSSES.items() if row.output != "softmax"]
    assert ROWS == scalar == list(LOSSES)[: len(ROWS)]
    assert list(LOSSES)[len(ROWS) :] == ["softmax_cross_entropy"], "write a kernel for it in losses.cu"


@every_case
@every_type
def test_a_row_agrees(name, options, type):
    for shape in SHAPES:
        loss, z = make_loss(name, options, shape[0], shape[2]), make_logits(shape, type)
        for y in make_targets(loss.row.targets, shape, type):
            assert_close(run(loss, z, y, type), define(loss, z, y), type)


@every_row
@every_type
def test_a_row_longer_than_a_blocks_registers_agrees(name, type):
    loss, shape = Loss(name), (1, 2, 2500)  # 256 threads hold 2048 outputs
    z = make_logits(shape, type)
    for y in make_targets(loss.row.targets, shape, type):
        assert_close(run(loss, z, y, type, block=256), define(loss, z, y), type)


@every_row
@every_type
@pytest.mark.parametrize(
    ("gap", "offsets"),
    [
        (16, (16, 16, 16)),
        (5, (0, 0, 0)),
        (3, (3, 3, 3)),
        (0, (1, 0, 0)),
        (0, (0, 1, 0)),
        (0, (0, 0, 1)),
        (1, (0, 2, 3)),
    ],
)
def test_arrays_may_begin_anywhere(name, type, gap, offsets):
    for shape in [(3, 5, 2), (3, 3, 40)]:
        loss, z = Loss(name), make_logits(shape, type)
        for y in make_targets(loss.row.targets, shape, type):
            assert_close(run(loss, z, y, type, gap=gap, offsets=offsets), define(loss, z, y), type)


@every_row
@pytest.mark.parametrize("outputs", [3, 40, 1030])
def test_the_derivative_may_take_the_place_of_the_logits(name, outputs):
    loss, z = Loss(name), make_logits((2, 3, outputs), "f32")
    y = make_targets(loss.row.targets, z.shape, "f32")[0]
    for got, wanted in zip(run(loss, z, y, "f32", in_place=True)[:2], run(loss, z, y, "f32")[:2], strict=True):
        np.testing.assert_array_equal(got, wanted)


@every_row
@every_type
def test_losses_alone_are_the_same(name, type):
    loss, z = Loss(name), make_logits((2, 5, 3), type)
    y = make_targets(loss.row.targets, z.shape, type)[-1]
    alone, nothing, _ = run(loss, z, y, type, dz=False)
    assert nothing is None
    np.testing.assert_array_equal(alone, run(loss, z, y, type)[0])


# --- weights and rows that count


@every_row
@every_type
@pytest.mark.parametrize("shared", [False, True])
def test_weights_agree(name, type, shared):
    loss, shape = Loss(name), (3, 13, 3)
    z, weight = make_logits(shape, type), np.random.default_rng(3).random((1 if shared else 3, 13))
    weight[:, 4] = 0
    for y in make_targets(loss.row.targets, (1, *shape[1:]) if shared else shape, type):
        assert_close(run(loss, z, y, type, weight=weight), define(loss, z, y, weight), type)


@every_row
def test_weights_that_are_all_zero_give_no_derivative(name):
    loss, z = Loss(name), make_logits((2, 5, 3), "f32")
    y, weight = make_targets(loss.row.targets, z.shape, "f32")[0], np.array([[0.0] * 5, [1.0] * 5])
    losses, dz, _ = run(loss, z, y, "f32", weight=weight)
    assert not dz[0].any() and dz[1].any()
    np.testing.assert_array_equal(losses, run(loss, z, y, "f32")[0])  # each sample's own, without its weight


@every_row
@every_type
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("outputs", [3, 40, 1030])
def test_rows_beyond_the_valid_ones_count_nothing(name, type, weighted, outputs):
    loss, valid = Loss(name), [4, 0, 5]
    z = make_logits((3, 5, outputs), type)
    weight = np.random.default_rng(3).random((3, 5)) if weighted else None
    for y in make_targets(loss.row.targets, z.shape, type):
        wanted = define(loss, z, y, weight, valid)
        dirty, y = z.copy(), y.copy()
        for i, n in enumerate(valid):
            dirty[i, n:] = np.nan
            y[i, n:] = -(2**62) if y.dtype.kind == "i" else np.nan
        got = run(loss, dirty, y, type, weight=weight, valid=valid, hits=loss.row.output == "softmax")
        assert_close(got, wanted, type)
        for i, n in enumerate(valid):
            assert not got[0][i, n:].any() and not got[1][i, n:].any()
            assert got[2] is None or not got[2][i, n:].any()


@every_row
def test_no_rows_are_no_work(name):
    loss, z = Loss(name), np.empty((2, 0, 3), np.float32)
    y = make_targets(loss.row.targets, z.shape, "f32")[0]
    losses, dz, _ = run(loss, z, y, "f32")
    assert losses.shape == (2, 0) and dz.shape == z.shape


# --- the order of sums


@every_row
@pytest.mark.parametrize("shape", [(3, 9, 5), (3, 3, 100), (2, 3, 1030)])
def test_the_grid_changes_no_bit(name, shape):
    loss, z = Loss(name), make_logits(shape, "f32")
    y = make_targets(loss.row.targets, shape, "f32")[-1]
    weight = np.random.default_rng(3).random(shape[:2])
    first = run(loss, z, y, "f32", weight=weight, grid=(1, 1))
    for grid in [(1, 2), (3, 1), (7, 5)]:
        for got, wanted in zip(run(loss, z, y, "f32", weight=weight, grid=grid)[:2], first[:2], strict=True):
            np.testing.assert_array_equal(got, wanted)


@every_row
@pytest.mark.parametrize("block", [32, 96, 256])
def test_a_block_of_any_size_agrees(name, block):
    for shape in [(2, 21, 3), (1, 9, 50), (2, 2, 1500)]:
        loss, z = Loss(name), make_logits(shape, "f32")
        for y in make_targets(loss.row.targets, shape, "f32"):
            assert_close(run(loss, z, y, "f32", block=block, grid=(3,)), define(loss, z, y), "f32")


@every_row
@every_type
@pytest.mark.parametrize("shape", [(2, 9, 5), (1, 3, 100), (1, 2, 1030)])
def test_the_schedule_changes_no_bit(name, type, shape):
    loss, z = Loss(name), make_logits(shape, type)
    for y in make_targets(loss.row.targets, shape, type):
        first = run(loss, z, y, type)
        for schedule in (1, 2, 3):
            for got, wanted in zip(run(loss, z, y, type, schedule=schedule)[:2], first[:2], strict=True):
                np.testing.assert_array_equal(got, wanted)


# --- kinks, and numbers far out


@every_row
@pytest.mark.parametrize("outputs", [1, 3, 40, 1030])
def test_nan_in_the_logits_is_nan_in_that_samples_loss(name, outputs):
    loss, z = Loss(name), make_logits((1, 4, outputs), "f32")
    z[0, 0, 0] = z[0, 1, -1] = z[0, 2, outputs // 2] = np.nan
    for y in make_targets(loss.row.targets, z.shape, "f32"):
        losses, dz, _ = run(loss, z, y, "f32")
        assert np.isnan(losses[0, :3]).all() and np.isfinite(losses[0, 3])
        assert np.isnan(dz[np.isnan(z)]).all() and np.isfinite(dz[0, 3]).all()


@every_row
@every_type
def test_large_logits_agree(name, type):
    z = np.array([[[-1e4, 1e4, 0.0], [90.0, -90.0, 80.0], [-745.0, 745.0, 40.0]]], DTYPES[type])
    z = bf16_to_float32(float32_to_bf16(z)) if type == "bf16" else z
    loss = Loss(name)
    for y in make_targets(loss.row.targets, z.shape, type):
        got = run(loss, z, y, type)
        assert np.isfinite(got[0]).all() and np.isfinite(got[1]).all()
        assert_close(got, define(loss, z, y), type)


@pytest.mark.parametrize("name", ["absolute_error", "quantile", "huber", "poisson"])
@pytest.mark.parametrize("type", ["f32", "f64"])
def test_kinks_agree_to_the_last_bit(name, type):
    dtype = DTYPES[type]
    edges = np.array(
        [0.0, -0.0, 1.0, -1.0, 80.0, -80.0], dtype
    )  # an error of 0, huber's delta, poisson's last exponent
    # The neighbours of 0 are the smallest normal numbers: on a GPU, CuPy has NVRTC take smaller ones for 0.
    tiny = np.finfo(dtype).tiny
    above, below = (np.nextafter(edges, dtype(way)) for way in (np.inf, -np.inf))
    above[edges == 0], below[edges == 0] = tiny, -tiny
    z = np.concatenate([edges, above, below])[None, None]
    z = np.concatenate([z, np.zeros_like(z)[..., :14]], axis=-1)  # 32 outputs: a division by them is exact
    y, loss = np.zeros_like(z), Loss(name)
    if name == "poisson":
        dz = run(loss, z, y, type)[1]
        assert dz[0, 0, 4] == dz[0, 0, 10] == dz.max() > dz[0, 0, 16]
    else:
        np.testing.assert_array_equal(run(loss, z, y, type)[1], define(loss, z, y)[1])


@pytest.mark.parametrize("type", TYPES)
def test_impossible_classes_cost_nothing(type):
    z = make_logits((1, 2, 4), type)
    z[..., 2] = -np.inf
    y = np.array([[0, 3]])
    got = run(Loss("softmax_cross_entropy"), z, y, type)
    assert_close(got, define(Loss("softmax_cross_entropy"), z, y), type)
    assert not got[1][..., 2].any()


# --- hits


@every_type
@pytest.mark.parametrize("outputs", [1, 2, 10, 33, 300, 1030, 2500])
def test_hits_are_argmaxes_that_agree(type, outputs):
    shape, loss = (2, 9, outputs), Loss("softmax_cross_entropy")
    z = make_logits(shape, type)
    z[:, ::2] = np.round(z[:, ::2])  # ties
    for y in make_targets(loss.row.targets, shape, type):
        labels = y if y.ndim == 2 else y.argmax(axis=-1)
        labels[:, ::3] = z.argmax(axis=-1)[:, ::3]
        y = labels if y.ndim == 2 else np.eye(outputs, dtype=y.dtype)[labels] / 2 + y / 2
        wanted = z.argmax(axis=-1) == (y if y.ndim == 2 else y.argmax(axis=-1))
        assert wanted.any()
        hits = run(loss, z, y, type, hits=True)[2]
        np.testing.assert_array_equal(hits, wanted)
        for schedule in (1, 2, 3):
            np.testing.assert_array_equal(run(loss, z, y, type, hits=True, dz=False, schedule=schedule)[2], hits)


def test_of_equal_logits_and_probabilities_the_first_is_the_largest():
    loss, z = Loss("softmax_cross_entropy"), np.zeros((1, 3, 5), np.float32)
    z[0, 1, 2:] = 1
    np.testing.assert_array_equal(run(loss, z, np.array([[0, 2, 1]]), "f32", hits=True)[2], [[1, 1, 0]])
    y = np.full((1, 3, 5), 0.2, np.float32)
    np.testing.assert_array_equal(run(loss, z, y, "f32", hits=True)[2], [[1, 0, 1]])


def test_a_row_with_nan_is_no_hit():
    z = np.zeros((1, 2, 5), np.float32)
    z[0, 0, 3] = np.nan
    np.testing.assert_array_equal(
        run(Loss("softmax_cross_entropy"), z, np.array([[0, 0]]), "f32", hits=True)[2], [[0, 1]]
    )
