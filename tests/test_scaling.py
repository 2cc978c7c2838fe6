"""Standardisation: mean 0 and deviation 1, whatever the offset, the dtype and the constant columns."""

import tracemalloc

import numpy as np
import pytest

from gpumlp.data import standardization


def data(rows=3000, columns=7, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((rows, columns)) * rng.uniform(0.1, 9.0, columns) + rng.uniform(-5.0, 5.0, columns)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_columns_have_mean_0_and_deviation_1(dtype):
    X = data().astype(dtype)
    shift, scale = standardization(X)
    assert shift.shape == scale.shape == (7,) and shift.dtype == scale.dtype == np.float32
    scaled = (X - shift) * scale
    assert np.allclose(scaled.mean(axis=0), 0.0, atol=1e-5) and np.allclose(scaled.std(axis=0), 1.0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["u1", "i2", "?", "f4", "f8"])
def test_against_numpy_across_blocks(dtype):
    X = (np.random.default_rng(1).random((5000, 61)) * 200).astype(dtype)  # 2.4 MB in float64: three blocks
    X[:, 0] = np.arange(5000) % 2  # bool: no column is constant
    shift, scale = standardization(X)
    reference = X.astype(np.float64)
    varies = reference.std(axis=0) > 0
    assert np.allclose(shift, reference.mean(axis=0), rtol=1e-6)
    assert np.allclose(scale[varies], 1.0 / reference.std(axis=0)[varies], rtol=1e-6)


def test_a_large_offset_does_not_spoil_the_deviation():
    noise = np.random.default_rng(2).standard_normal((4000, 3))
    shift, scale = standardization(noise + np.array([0.0, 1e6, -1e9]))
    assert np.allclose(shift, [0.0, 1e6, -1e9], rtol=1e-6, atol=0.1)
    assert np.allclose(scale[:2], 1.0 / noise.std(axis=0)[:2], rtol=1e-6)
    assert scale[2] == 0.0  # a deviation of 1 at 1e9 is below what float32 can hold


def test_constant_columns_become_zero():
    X = data(rows=1000, columns=5)
    X[:, 1], X[:, 2], X[:, 4] = 0.1, 0.0, -1e30
    shift, scale = standardization(X)
    assert scale[1] == scale[2] == scale[4] == 1.0
    scaled = (X.astype(np.float32) - shift) * scale
    assert not scaled[:, [1, 2, 4]].any()


def test_both_sides_of_nearly_constant():
    sign = np.where(np.arange(100) % 2 == 0, 1.0, -1.0)
    X = np.column_stack([1.0 + 0.5e-7 * sign, 1.0 + 2e-7 * sign, 1e-39 * sign, 1e-37 * sign])
    _, scale = standardization(X)
    assert scale[0] == 0.0 and scale[1] == pytest.approx(1 / 2e-7, rel=1e-5)
    assert scale[2] == 0.0 and scale[3] == pytest.approx(1e37, rel=1e-5)


def test_values_near_the_end_of_float32():
    shift, scale = standardization(np.array([[3e38], [-3e38], [3e38], [-3e38]]))
    assert shift[0] == 0.0 and scale[0] == pytest.approx(1 / 3e38, rel=1e-5)


def test_one_row_is_constant():
    shift, scale = standardization(np.array([[3, 4]], dtype=np.uint8))
    assert shift.tolist() == [3.0, 4.0] and scale.tolist() == [1.0, 1.0]


def test_only_the_given_rows_count():
    X = data(rows=200, columns=3)
    rows = np.array([5, 190, 7, 44, 91])
    for chosen in (rows, rows.tolist(), np.isin(np.arange(200), rows)):
        shift, scale = standardization(X, chosen)
        assert np.allclose(shift, X[rows].mean(axis=0)) and np.allclose(scale, 1.0 / X[rows].std(axis=0))


def test_global_mode_has_one_mean_and_one_deviation():
    X = data(rows=500, columns=4)
    shift, scale = standardization(X, mode="global")
    assert shift.shape == scale.shape == (4,)
    assert np.allclose(shift, X.mean(), rtol=1e-6) and np.allclose(scale, 1.0 / X.std(), rtol=1e-6)


def test_global_mode_of_one_value():
    shift, scale = standardization(np.full((9, 4), 0.1), mode="global")
    assert np.all(shift == np.float32(0.1)) and np.all(scale == 1.0)


def test_input_is_untouched_and_memory_small():
    X = np.random.default_rng(3).integers(0, 256, (40_000, 100), dtype=np.uint8)
    before = X.copy()
    X.flags.writeable = False
    tracemalloc.start()
    standardization(X, np.arange(0, 40_000, 2))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20 and np.array_equal(X, before)


@pytest.mark.parametrize(
    "X, rows, mode, message",
    [
        (np.array([[1.0, 1e39], [2.0, 1e39]]), None, "columns", "column 1 of X has a mean or deviation beyond float32"),
        (np.array([[1.0, 1e300], [2.0, -1e300]]), None, "global", "column 1 of X has a mean or deviation beyond"),
        (np.ones((3, 2)), None, "rows", "mode is 'rows'; it must be 'columns' or 'global'"),
        (np.ones(3), None, "columns", r"X has shape \(3,\); expected \(samples, features\)"),
        (np.ones((3, 0)), None, "columns", r"X has shape \(3, 0\)"),
        (np.ones((0, 2)), None, "columns", "there are no rows"),
        (np.ones((3, 2)), np.array([], dtype=int), "columns", "there are no rows"),
        (np.ones((3, 2)), np.zeros(3, dtype=bool), "columns", "there are no rows"),
    ],
)
def test_errors(X, rows, mode, message):
    with pytest.raises(ValueError, match=message):
        standardization(X, rows, mode)
