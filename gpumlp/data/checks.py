"""Checks of what users pass in: features, targets, class names, weights, single numbers.

Each check returns the array in the form that training needs, or raises with the argument, the value, what is allowed
and what to do. A wrong kind of object is a TypeError, wrong content a ValueError. Inputs are never modified, and are
copied only when their memory layout or dtype demands it.
"""

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

TARGET_KINDS = ("labels", "labels or probabilities", "binary", "values", "counts")
BLOCK_BYTES = 1 << 20  # data are examined in blocks of about this size, so that a check needs no second copy of them
_ONE_CLASS = "{} has one class only ({}); training a classifier takes at least two"
SHOWN = 10  # at most so many class names in a message


def check_X(X: Any, n_features: int | None = None, name: str = "X", dtype: DTypeLike = np.float32) -> np.ndarray:
    """Return `X` as a C-contiguous numeric matrix in native byte order.

    Arguments:
        X: (n_samples, n_features), any bool, integer or float dtype, or nested lists. The dtype is kept (uint8 images
            stay one byte per pixel), except float16, which becomes float32, and long double, which becomes float64.
        n_features: what the network takes; None accepts any width.
        name: how messages call the argument.
        dtype: the dtype that training will use, float32 or float64. Values that it cannot hold are refused here,
            because they would become infinite later.

    Returns: (n_samples, n_features); `X` itself where nothing had to change.

    Raises:
        TypeError: not an array: None, text, a dict, a single value, a sparse matrix.
        ValueError: not two-dimensional, no rows, no columns, ragged rows, text, object or complex dtype, another width
            than `n_features`, or a value that is NaN, infinite or too large; the message names its row and column.
    """
    array = _as_array(X, name)
    if array.ndim == 1:
        raise ValueError(
            f"{name} is one-dimensional, shape {array.shape}; expected (samples, features). "
            f"Use {name}.reshape(-1, 1) for one feature or {name}.reshape(1, -1) for one sample"
        )
    if array.ndim > 2:
        raise ValueError(
            f"{name} has shape {array.shape}; expected (samples, features). Use {name}.reshape(len({name}), -1)"
        )
    if array.shape[0] == 0:
        raise ValueError(f"{name} has no rows, shape {array.shape}; at least one sample is needed")
    if array.shape[1] == 0:
        raise ValueError(f"{name} has no columns, shape {array.shape}; at least one feature is needed")
    _require_numeric(array, name)
    if n_features is not None and array.shape[1] != n_features:
        raise ValueError(f"the network takes {n_features} features, {name} has {array.shape[1]}")
    array = _native(array)
    require_finite(array, name, dtype)
    return array


def check_codes(codes: np.ndarray, sizes: Sequence[int], first: int, name: str = "X") -> None:
    """Raise ValueError unless ``codes``, a checked X's columns from ``first`` on, are whole numbers below ``sizes``."""
    for column, size in enumerate(sizes):
        values = codes[:, column]
        wrong = (values < 0) | (values >= size) | (values != np.floor(values))
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(
                f"{name} holds {values[row]:g} at row {row}, column {first + column}, a column of codes; "
                f"they are whole numbers from 0 to {size - 1}"
            )


def check_targets(
    y: Any,
    n_samples: int,
    n_outputs: int,
    kind: str,
    name: str = "y",
    *,
    dtype: DTypeLike = np.float32,
    allow_one_class: bool = False,
) -> np.ndarray:
    """Return `y` in the form that a loss of this `kind` of target takes.

    ========================= ============================================== =====================================
    kind                      accepts                                        returns
    ========================= ============================================== =====================================
    "labels"                  (n,) or (n, 1): integers in [0, n_outputs)     (n,) int64
    "labels or probabilities" labels, or (n, n_outputs): rows >= 0, sum 1    (n,) int64 or (n, n_outputs) `dtype`
    "binary"                  (n, n_outputs): 0, 1 or a probability          (n, n_outputs) `dtype`
    "values"                  (n, n_outputs): finite numbers                 (n, n_outputs) `dtype`
    "counts"                  (n, n_outputs): finite numbers >= 0            (n, n_outputs) `dtype`
    ========================= ============================================== =====================================

    Arguments:
        y: any bool, integer or float dtype; labels may be floats that are whole numbers. Class names that are text go
            through `encode_labels` first. With n_outputs = 1 the last three kinds accept (n,) too.
        n_samples: rows of X, at least 1.
        n_outputs: width of the network's output layer.
        kind: one of `TARGET_KINDS`.
        name: how messages call the argument.
        dtype: float32 or float64, the dtype of targets that are not labels. Rows of probabilities may miss 1 by 1e-3.
        allow_one_class: accept labels, or zeros and ones of one output, that are all the same: right for evaluation,
            pointless for training.

    Raises:
        TypeError: not an array.
        ValueError: wrong length, shape, dtype or range; the message names the first offending value and its row.
    """
    assert kind in TARGET_KINDS, kind
    array = _as_array(y, name)
    if array.dtype.kind in "OUST":
        raise ValueError(
            f"{name} holds text or mixed types (dtype {array.dtype}); numbers are needed. "
            f"For class names use labels, classes = gpumlp.data.encode_labels({name})"
        )
    _require_numeric(array, name)
    if len(array) != n_samples:
        raise ValueError(f"{name} has {len(array)} rows, X has {n_samples}; they must have the same number")
    if kind == "labels" or (kind == "labels or probabilities" and array.size == n_samples):
        return _check_labels(array, n_outputs, name, allow_one_class)

    shape, flat = array.shape, array.ndim == 1
    if flat and n_outputs == 1:
        array = array.reshape(-1, 1)
    if array.shape != (n_samples, n_outputs):
        also = f" or ({n_samples},)" if n_outputs == 1 else ""
        also = f" or labels of shape ({n_samples},)" if kind == "labels or probabilities" else also
        raise ValueError(
            f"{name} has shape {shape}; expected ({n_samples}, {n_outputs}){also}: "
            f"one column for each of the network's outputs"
        )
    require_finite(array, name, dtype, flat)
    array = np.ascontiguousarray(array, dtype=dtype)
    if kind == "values":
        return array
    high, what = (math.inf, "counts") if kind == "counts" else (1.0, "probabilities")
    _require_range(array, name, 0.0, high, what, flat)
    if kind == "binary" and n_outputs == 1 and not allow_one_class and array[0] in (0, 1) and (array == array[0]).all():
        raise ValueError(_ONE_CLASS.format(name, int(array[0, 0])))
    if kind == "labels or probabilities":
        sums = array.sum(axis=1, dtype=np.float64)
        off = np.abs(sums - 1.0) > 1e-3
        if off.any():
            row = int(np.argmax(off))
            raise ValueError(f"{name}[{row}] sums to {sums[row]:.6g}; the probabilities of a row must sum to 1")
    return array


def _check_labels(array: np.ndarray, n_outputs: int, name: str, allow_one_class: bool) -> np.ndarray:
    if array.ndim != 1 and array.shape[1:] != (1,):
        raise ValueError(f"{name} has shape {array.shape}; expected one label per row, shape ({len(array)},)")
    array = array.reshape(-1)
    bad = (array < 0) | (array >= n_outputs)
    if array.dtype.kind == "f":
        bad |= array != np.floor(array)  # true for nan as well
    if bad.any():
        row = int(np.argmax(bad))
        raise ValueError(
            f"{name}[{row}] is {array[row]}; labels must be integers in [0, {n_outputs}), "
            f"since the network has {n_outputs} outputs"
        )
    labels = array.astype(np.int64, copy=False)
    if not allow_one_class and (labels == labels[0]).all():
        raise ValueError(_ONE_CLASS.format(name, labels[0]))
    return labels


def encode_labels(y: Any, classes: ArrayLike | None = None, name: str = "y") -> tuple[np.ndarray, np.ndarray]:
    """Number the classes: classes[labels] equals `y`.

    Arguments:
        y: (n,) or (n, 1): text, bools or numbers; an object array must hold one of these throughout.
        classes: (n_classes,) known classes, for data that come after training; None takes them from `y`, sorted.
        name: how messages call the argument.

    Returns: labels (n,) int64 and classes (n_classes,) in the dtype of `y`; floats that are whole numbers become int64.

    Raises:
        TypeError: not an array.
        ValueError: not one value per row, missing or mixed values, or a value that is not among `classes`; the message
            names it and its row.
    """
    values = _class_values(y, name)
    if classes is None:
        known, labels = np.unique(values, return_inverse=True)
        return labels.astype(np.int64, copy=False), known

    known = _class_values(classes, "classes")
    order = np.argsort(known, kind="stable")
    if (values.dtype.kind == "U") != (known.dtype.kind == "U"):  # otherwise NumPy would compare 1 with "1" as text
        unseen = np.ones(len(values), dtype=bool)
    else:
        labels = order[np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)]
        unseen = known[labels] != values
    if unseen.any():
        row = int(np.argmax(unseen))
        shown = ", ".join(repr(value) for value in known[:SHOWN].tolist())
        more = f", ... ({len(known)} in all)" if len(known) > SHOWN else ""
        raise ValueError(f"{name}[{row}] is {values[row].item()!r}, an unknown class; known are {shown}{more}")
    return labels.astype(np.int64, copy=False), known


def _class_values(y: Any, name: str) -> np.ndarray:
    """Return class names as one dimension of str, bool, integer or float, without missing values."""
    array = _as_array(y, name)
    if array.ndim != 1 and array.shape[1:] != (1,):
        raise ValueError(f"{name} has shape {array.shape}; expected one class per row, shape ({len(array)},)")
    if array.size == 0:
        raise ValueError(f"{name} has no rows; at least one is needed")
    array = array.reshape(-1)
    if array.dtype.kind in "OT":
        numbers = (bool, int, float, np.bool_, np.integer, np.floating)
        there = (value for value in array if isinstance(value, (str, *numbers)) and value == value)  # none missing
        kinds = str if isinstance(next(there, None), str) else numbers
        for row, value in enumerate(array):
            if not isinstance(value, kinds):
                raise ValueError(
                    f"{name}[{row}] is {value!r}; classes must be all text, all bools or all numbers, none missing"
                )
        array = np.array(array.tolist())
    if array.dtype.kind not in "Ubiuf":
        raise ValueError(f"{name} has dtype {array.dtype}; classes must be text, bools or numbers")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype.kind == "f":
        bad = ~np.isfinite(array)
        if bad.any():
            row = int(np.argmax(bad))
            raise ValueError(f"{name}[{row}] is {array[row]}; drop rows whose class is missing")
        if (array == np.floor(array)).all() and float(np.abs(array).max()) < 2**53:
            array = array.astype(np.int64)
    return array


def check_sample_weight(w: Any, n: int, dtype: DTypeLike = np.float32) -> np.ndarray:
    """Return weights per sample as (n,) `dtype`.

    Raises:
        TypeError: not an array.
        ValueError: not one finite number >= 0 per sample, or all of them zero.
    """
    array = _as_array(w, "sample_weight")
    _require_numeric(array, "sample_weight")
    if array.shape != (n,):
        raise ValueError(f"sample_weight has shape {array.shape}; expected one weight per sample, shape ({n},)")
    require_finite(array.reshape(-1, 1), "sample_weight", dtype, flat=True)
    _require_range(array.reshape(-1, 1), "sample_weight", 0.0, math.inf, "weights", flat=True)
    weights = np.ascontiguousarray(array, dtype=dtype)
    if not weights.any():
        raise ValueError("sample_weight is zero for every sample; at least one weight must be positive")
    return weights


def check_integer(value: Any, name: str, minimum: int) -> int:
    """Return `value` as an int; TypeError unless it is an integer, ValueError below `minimum`."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; it must be an integer >= {minimum}") from None
    if number < minimum:
        raise ValueError(f"{name} is {number}; it must be an integer >= {minimum}")
    return number


def check_number(value: Any, name: str, low: float, high: float, interval: str = "[]") -> float:
    """Return `value` as a float within low and high; `interval` "[]", "(]", "[)" or "()" says whether the ends belong.

    Raises: TypeError unless it is a number, ValueError outside the interval or for NaN.
    """
    allowed = f"a number in {interval[0]}{low:g}, {high:g}{interval[1]}"
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | float | np.integer | np.floating):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[1] == "]" else value < high
    if not (above and below):
        raise ValueError(f"{name} is {value}; it must be {allowed}")
    return float(value)


def _as_array(value: Any, name: str) -> np.ndarray:
    """np.asarray with reasons; at least one dimension."""
    if hasattr(value, "toarray") and hasattr(value, "nnz"):
        raise TypeError(f"{name} is a sparse matrix ({type(value).__name__}); use {name}.toarray()")
    refuse_masked(value, name)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} cannot be made an array: {_ragged_row(value) or error}") from None
    if array.ndim == 0:
        raise TypeError(f"{name} is a single {type(value).__name__}; expected an array or nested lists of numbers")
    return array


def refuse_masked(value: Any, name: str) -> None:
    """Raise ValueError for masked values, which np.asarray would unmask."""
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ValueError(f"{name} is a masked array with masked values; fill them with {name}.filled(value)")


def _ragged_row(rows: Any) -> str:
    """Say which row of nested lists differs in length from the first, '' where that is not the fault."""
    try:
        lengths = [len(row) for row in rows]
    except TypeError:
        return "some rows are lists and some are single values"
    odd = [row for row, length in enumerate(lengths) if length != lengths[0]]
    return f"row 0 has {lengths[0]} values, row {odd[0]} has {lengths[odd[0]]}" if odd else ""


def _require_numeric(array: np.ndarray, name: str) -> None:
    if array.dtype.kind in "biuf":
        return
    what = {"O": "mixed types", "U": "text", "S": "bytes", "T": "text", "c": "complex numbers"}
    raise ValueError(
        f"{name} has dtype {array.dtype} ({what.get(array.dtype.kind, 'not numbers')}); "
        f"bool, integer or float is needed. Encode text columns as numbers, or convert with {name}.astype(np.float32)"
    )


def _native(array: np.ndarray) -> np.ndarray:
    """Native byte order, C order, and a dtype that kernels know; no copy where it is so already."""
    dtype = array.dtype if array.dtype.isnative else array.dtype.newbyteorder("=")
    if dtype == np.float16:
        dtype = np.dtype(np.float32)
    elif dtype.kind == "f" and dtype.itemsize > 8:
        dtype = np.dtype(np.float64)
    with np.errstate(over="ignore"):  # a long double beyond float64 becomes inf, which the next check reports
        return np.ascontiguousarray(array, dtype=dtype)


def require_finite(array: np.ndarray, name: str, dtype: DTypeLike, flat: bool = False) -> None:
    """Raise ValueError unless every value of a matrix is finite and stays so in `dtype`; `flat` names the rows alone.

    The extremes of a block tell all, since they are NaN where a value is; a mask would cost memory and time.
    """
    if array.dtype.kind != "f":
        return
    largest = largest_of(dtype, array.dtype)
    rows = max(1, BLOCK_BYTES // (array.shape[1] * array.itemsize))
    for start in range(0, len(array), rows):
        block = array[start : start + rows]
        with np.errstate(invalid="ignore"):
            good = -largest <= block.min() and block.max() <= largest
        if good:
            continue
        row, column = (int(index) for index in np.argwhere(~(np.abs(block) <= largest))[0])
        raise not_finite(block[row, column], _where(name, start + row, column, flat), dtype)


def largest_of(dtype: DTypeLike, own: DTypeLike) -> float:
    """The largest number of dtype ``own`` that stays finite in ``dtype``."""
    return min(float(np.finfo(dtype).max), float(np.finfo(own).max))


def not_finite(value: Any, where: str, dtype: DTypeLike) -> ValueError:
    """The error for a value, say at "X[3, 17]", that is NaN, infinite, or becomes infinite in ``dtype``."""
    if np.isfinite(value):
        beyond = f"beyond the largest {np.dtype(dtype)} ({np.finfo(dtype).max:.4g})"
        return ValueError(f"{where} is {value}, {beyond}; scale it or train in float64")
    return ValueError(f"{where} is {value}; every value must be finite. Drop the row or fill in a number")


def _require_range(array: np.ndarray, name: str, low: float, high: float, what: str, flat: bool) -> None:
    if array.min() >= low and array.max() <= high:
        return
    row, column = (int(index) for index in np.argwhere((array < low) | (array > high))[0])
    allowed = f">= {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
    raise ValueError(f"{_where(name, row, column, flat)} is {array[row, column]}; {what} must be {allowed}")


def _where(name: str, row: int, column: int, flat: bool) -> str:
    """X[3, 17], or y[3] for what the user passed as one dimension."""
    return f"{name}[{row}]" if flat else f"{name}[{row}, {column}]"
