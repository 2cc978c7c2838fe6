"""The cells of a column: which are missing, whether they are numbers or categories, what a category is known by.

That is its text without surrounding spaces, and 1, 1.0, "1" and "1.0" are the same one: a network trained on a data frame
then understands the rows of a CSV file.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from typing import Any

import numpy as np

from .table import MISSING, is_number, number_of

LARGEST = float(np.finfo(np.float32).max)
WHOLE = re.compile(r"^(-?\d+)\.0+$")  # a whole number in the writing of a float
CONTAINERS = (list, tuple, dict, set, np.ndarray)
SHOWN = 8  # at most so many names in a message


# cells


@dataclass(frozen=True)
class Cells:
    """A column as it came: (n,) values of any dtype, and what its source says about them."""

    values: np.ndarray
    categorical: bool = False  # by its dtype
    untyped: bool = False  # text from a source that holds nothing else


def is_missing(cell: Any) -> bool:
    if isinstance(cell, str | bytes):
        cell = cell if isinstance(cell, str) else cell.decode("utf-8", "replace")
        return cell.strip() in MISSING
    if isinstance(cell, Decimal):
        return cell.is_nan()
    if isinstance(cell, float | np.floating):
        return bool(cell != cell)
    return cell is None or type(cell).__name__ in ("NAType", "NaTType")  # pandas', without importing it


def _kinds(cells: Iterable[Any], label: str) -> set[type]:
    """The types of the cells that are not missing. Raises TypeError for types that mean neither number nor category."""
    kinds = {type(cell) for cell in cells if not is_missing(cell)}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        if issubclass(kind, datetime.date | datetime.time | datetime.timedelta | np.datetime64 | np.timedelta64):
            raise TypeError(f"{label} holds dates or times ({kind.__name__}); {DATES}")
        # A category is known by its text, and these have none of their own.
        nameless = kind.__str__ is object.__str__ and kind.__repr__ is object.__repr__
        if nameless or issubclass(kind, complex | np.complexfloating) or issubclass(kind, CONTAINERS):
            raise TypeError(f"{label} holds cells of type {kind.__name__}; a cell must be a number, a text or a bool")
    return kinds


DATES = "make numbers of them (year, weekday, days since a date), or text to have categories"


def is_category(cells: Cells, label: str) -> bool:
    """What "auto" says about a column. One with no cells but missing ones is a category, unless its dtype is a number."""
    kind = cells.values.dtype.kind
    if cells.categorical or kind in "biuf":
        return cells.categorical or kind == "b"
    values = cells.values.tolist()
    if cells.untyped:
        words = {text for text in map(text_of, values) if text is not None}
        return not words or not all(map(is_number, words))
    kinds = _kinds(values, label)
    return not kinds or not all(issubclass(kind, Number) and kind not in (bool, np.bool_) for kind in kinds)


def numbers_of(cells: Cells, label: str) -> np.ndarray:
    """(n,) float64 of our own, NaN for missing."""
    if cells.values.dtype.kind in "biuf":
        values = cells.values.astype(np.float64)
    else:
        given = cells.values.tolist()
        _kinds(given, label)
        try:
            values = np.fromiter(map(_number, given), np.float64, len(given))
        except (ValueError, TypeError, OverflowError):
            row = next(row for row, cell in enumerate(given) if not _is_numeric(cell))
            raise ValueError(
                f"{label}, row {row}: {given[row]!r} is not a number; correct the cell, or name the column in "
                "categorical_features"
            ) from None
    beyond = np.abs(values) > LARGEST
    if beyond.any():
        row = int(np.argmax(beyond))
        fault = "is infinite" if np.isinf(values[row]) else "is too large for float32"
        raise ValueError(f"{label}, row {row}: {values[row]:g} {fault}; correct the cell, or make it missing (NaN)")
    return values


def _number(cell: Any) -> float:
    if is_missing(cell):
        return float("nan")
    return number_of(cell) if isinstance(cell, str) else float(cell)


def _is_numeric(cell: Any) -> bool:
    try:
        _number(cell)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def factorize(cells: Cells, label: str) -> tuple[np.ndarray, list[str | None]]:
    """(n,) positions in a list of texts, in which None is a missing cell; a text may stand there twice."""
    if cells.values.dtype.kind in "biuf":
        different, codes = np.unique(cells.values, return_inverse=True)
        return codes.reshape(-1), [text_of(value) for value in different]
    values = cells.values.tolist()
    if len(_kinds(values, label)) > 1:
        values = list(map(text_of, values))  # 1 == True: which of the two a dict keeps would depend on the rows' order
    index: dict[Any, int] = {}
    codes = np.fromiter((index.setdefault(value, len(index)) for value in values), np.int64, len(values))
    return codes, [text_of(value) for value in index]


def text_of(cell: Any) -> str | None:
    """What a category is known by; None for a missing cell."""
    if is_missing(cell):
        return None
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    if isinstance(cell, str):
        return WHOLE.sub(r"\1", cell.strip())
    if isinstance(cell, float | np.floating | Decimal) and abs(float(cell)) < 2**53 and float(cell).is_integer():
        return str(int(cell))  # 3.0 is what becomes of a column of integers with missing cells
    return str(cell)


def label_of(names: list[str] | None, position: int) -> str:
    return f"column {position}" if names is None else f'column "{names[position]}"'


def listed(names: Sequence[str], shown: int = SHOWN) -> str:
    text = ", ".join(map(repr, names[:shown]))
    return text if len(names) <= shown else f"{text} and {len(names) - shown:,} more"
