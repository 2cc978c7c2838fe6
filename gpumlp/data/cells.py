"""Tables of any kind as columns of cells: which cells are missing, which columns are categories, what a category is.

A category is known by its text without surrounding spaces (1, 1.0 and "1" are the same one): a network trained on a data
frame then understands the rows of a CSV file. No table library is imported here: a table's type says where it comes from.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Number
from typing import Any

import numpy as np

from .table import Table, is_number

MISSING = ("", "?")  # texts, without surrounding spaces, that stand for a missing cell
LARGEST = float(np.finfo(np.float32).max)
CONTAINERS = (list, tuple, dict, set, np.ndarray)
TABLES = "a pandas, polars or pyarrow table, a dict of columns, a Table of text, or an array (samples, features)"
SHOWN = 8  # at most so many names in a message


# cells


@dataclass(frozen=True)
class Cells:
    """A column as it came: (n,) values of any dtype, and what its source says about them."""

    values: np.ndarray
    categorical: bool = False  # by its dtype
    untyped: bool = False  # text from a source that holds nothing else


def _is_missing(cell: Any) -> bool:
    if isinstance(cell, str | bytes):
        cell = cell if isinstance(cell, str) else cell.decode("utf-8", "replace")
        return cell.strip() in MISSING
    if isinstance(cell, float | np.floating | Decimal):
        return bool(cell != cell)
    return cell is None or type(cell).__name__ in ("NAType", "NaTType")  # pandas', without importing it


def _kinds(cells: Iterable[Any], label: str) -> set[type]:
    """The types of the cells that are not missing. Raises TypeError for types that mean neither number nor category."""
    kinds = {type(cell) for cell in cells if not _is_missing(cell)}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        if issubclass(kind, datetime.date | datetime.time | datetime.timedelta | np.datetime64 | np.timedelta64):
            raise TypeError(f"{label} holds dates or times ({kind.__name__}); {_DATES}")
        if issubclass(kind, complex | np.complexfloating) or issubclass(kind, CONTAINERS):
            raise TypeError(f"{label} holds cells of type {kind.__name__}; a cell must be a number, a text or a bool")
    return kinds


_DATES = "make numbers of them (year, weekday, days since a date), or text to have categories"


def is_category(cells: Cells, label: str) -> bool:
    """What "auto" says about a column. One with no cells but missing ones is a category, unless its dtype is a number."""
    kind = cells.values.dtype.kind
    if cells.categorical or kind in "biuf":
        return cells.categorical or kind == "b"
    values = cells.values.tolist()
    if cells.untyped:
        words = {text for text in map(_text, values) if text is not None}
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
    if _is_missing(cell):
        return float("nan")
    if isinstance(cell, str) and "_" in cell:  # Python's own writing, which no table means as a number
        raise ValueError(cell)
    return float(cell)


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
        return codes.reshape(-1), [_text(value) for value in different]
    values = cells.values.tolist()
    if len(_kinds(values, label)) > 1:
        values = list(map(_text, values))  # 1 == True: which of the two a dict keeps would depend on the rows' order
    index: dict[Any, int] = {}
    codes = np.fromiter((index.setdefault(value, len(index)) for value in values), np.int64, len(values))
    return codes, [_text(value) for value in index]


def _text(cell: Any) -> str | None:
    """What a category is known by; None for a missing cell."""
    if _is_missing(cell):
        return None
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    if isinstance(cell, str):
        return cell.strip()
    if isinstance(cell, float | np.floating | Decimal) and abs(float(cell)) < 2**53 and float(cell).is_integer():
        return str(int(cell))  # 3.0 is what becomes of a column of integers with missing cells
    return str(cell)


# tables


def all_cells(names: list[str] | None, columns: list[Any]) -> list[Cells]:
    if not columns:
        raise ValueError("the table has no columns; at least one is needed")
    cells = [_cells(column, label_of(names, position)) for position, column in enumerate(columns)]
    lengths = [len(column.values) for column in cells]
    if len(set(lengths)) > 1:
        other = next(position for position, length in enumerate(lengths) if length != lengths[0])
        raise ValueError(
            f"{label_of(names, 0)} has {lengths[0]} cells, {label_of(names, other)} has {lengths[other]}; "
            "all columns of a table must have the same number"
        )
    if not lengths[0]:
        raise ValueError("the table has no rows; at least one is needed")
    return cells


def is_table(thing: Any) -> bool:
    """Whether it has columns of types of their own: a pandas, polars or pyarrow table, or a dict of columns."""
    if isinstance(thing, Mapping | Table):
        return not hasattr(thing, "toarray")  # one of SciPy's sparse matrices is a mapping
    ways = ("columns", "get_columns", "itercolumns")  # of pandas, polars, pyarrow
    return bool(_home(thing)) and any(hasattr(thing, way) for way in ways)


def needs_encoding(table: Any) -> bool:
    """Whether a table is more than numbers and bools: a column is a category, or has missing cells."""
    names, raw = open_table(table)
    for position, cells in enumerate(all_cells(names, raw)):
        kind = cells.values.dtype.kind
        if kind != "b" and is_category(cells, label_of(names, position)):
            return True
        if np.isnan(cells.values).any() if kind in "biuf" else any(map(_is_missing, cells.values.tolist())):
            return True
    return False


def all_numbers(table: Any) -> np.ndarray:
    """A table of numbers, (n, columns) float64, NaN for missing cells. Raises as ``numbers_of`` where a column is none."""
    names, raw = open_table(table)
    cells = all_cells(names, raw)
    return np.column_stack([numbers_of(column, label_of(names, i)) for i, column in enumerate(cells)])


def open_table(table: Any) -> tuple[list[str] | None, list[Any]]:
    """Names (None where there are none) and columns, as they are, of a table of any kind."""
    if isinstance(table, Table):
        if table.numbers.shape[1]:
            raise ValueError(
                f"the Table has {table.numbers.shape[1]} columns of numbers, whose names it does not know; "
                "read all its columns as text, read_table(path, [], names): the encoder finds the numbers"
            )
        return _names(list(table.text), ([Cells(_objects(cells), untyped=True) for cells in table.text.values()]))
    if isinstance(table, Mapping):
        return _names(list(table), list(table.values()))
    home = _home(table)
    if home == "pandas" and hasattr(table, "columns"):
        return _names(list(table.columns), [table.iloc[:, position] for position in range(table.shape[1])])
    if home == "polars" and hasattr(table, "get_columns"):
        return _names(list(table.columns), list(table.get_columns()))
    if home == "pyarrow" and hasattr(table, "itercolumns"):
        return _names(list(table.schema.names), list(table.itercolumns()))
    if isinstance(table, np.ma.MaskedArray):
        raise TypeError("the table is a masked array; pass table.astype(float).filled(numpy.nan)")
    if isinstance(table, list | tuple):
        table = _objects(table)
    if not isinstance(table, np.ndarray):
        raise TypeError(f"the table is a {type(table).__name__}; expected {TABLES}")
    if table.ndim != 2:
        raise ValueError(f"the table has shape {table.shape}; expected (samples, features)")
    untyped = table.dtype.kind in "UST"
    return None, [Cells(_unpacked(table[:, column]), untyped=untyped) for column in range(table.shape[1])]


def _names(names: list[Any], columns: list[Any]) -> tuple[list[str] | None, list[Any]]:
    """Names that are all text name the columns; none that is (pandas numbers nameless columns), and they have none."""
    text = [str(name) for name in names if isinstance(name, str)]
    if not text:
        return None, columns
    if len(text) < len(names):
        other = next(name for name in names if not isinstance(name, str))
        raise ValueError(f"the column name {other!r} is not text, others are; make all names text")
    if len(set(text)) < len(text):
        raise ValueError(f"two columns are named {next(name for name in text if text.count(name) > 1)!r}; rename one")
    return text, columns


def _cells(column: Any, label: str) -> Cells:
    """A column of any table, or of a dict, as an array."""
    if isinstance(column, Cells):
        found = column
    else:
        home = _home(column)
        if home == "pandas" and hasattr(column, "to_numpy"):
            found = _pandas_cells(column)
        elif home == "polars" and hasattr(column, "to_numpy"):
            found = Cells(column.to_numpy())
        elif home == "pyarrow" and hasattr(column, "to_numpy"):
            found = _arrow_cells(column)
        elif isinstance(column, np.ndarray) and not isinstance(column, np.ma.MaskedArray):
            found = Cells(_unpacked(column))
        elif isinstance(column, list | tuple):
            found = Cells(_objects(column))
        else:
            raise TypeError(f"{label} is a {type(column).__name__}; expected an array, a list or a series")
    if found.values.ndim != 1:
        raise ValueError(f"{label} has shape {found.values.shape}; a column must be one-dimensional")
    kind = found.values.dtype.kind
    if kind in "Mm":
        raise TypeError(f"{label} holds dates or times ({found.values.dtype}); {_DATES}")
    if kind not in "biufOUT":
        raise TypeError(f"{label} has dtype {found.values.dtype}; expected numbers, text, bools or objects")
    return found


def _pandas_cells(series: Any) -> Cells:
    if str(series.dtype) == "category":
        return Cells(np.asarray(series), categorical=True)
    if not isinstance(series.dtype, np.dtype) and series.dtype.kind in "iuf":
        return Cells(series.to_numpy(dtype=np.float64, na_value=np.nan))  # NA has no place in NumPy's integers
    return Cells(series.to_numpy())


def _arrow_cells(column: Any) -> Cells:
    categorical = hasattr(column.type, "value_type") and hasattr(column.type, "index_type")
    if categorical:
        column = column.cast(column.type.value_type)  # a dictionary's own to_numpy gives wrong cells for missing ones
    chunked = hasattr(column, "num_chunks")  # the one of two kinds of column that refuses the argument
    return Cells(column.to_numpy() if chunked else column.to_numpy(zero_copy_only=False), categorical)


def _unpacked(values: np.ndarray) -> np.ndarray:
    return np.char.decode(values, "utf-8", "replace") if values.dtype.kind == "S" else values


def _objects(cells: Any) -> np.ndarray:
    """A list as it is: NumPy would make text of [1, "a"] and of NaN among text."""
    try:
        return np.array(cells, dtype=object)
    except ValueError as error:
        raise ValueError(f"rows or cells of different lengths: {error}") from None


def _home(thing: Any) -> str:
    """The library that a table or column comes from, without importing it; "" for any other."""
    homes = [kind.__module__.split(".")[0] for kind in type(thing).__mro__]
    return next((home for home in homes if home in ("pandas", "polars", "pyarrow")), "")


def label_of(names: list[str] | None, position: int) -> str:
    return f"column {position}" if names is None else f'column "{names[position]}"'


def listed(names: Sequence[str], shown: int = SHOWN) -> str:
    text = ", ".join(map(repr, names[:shown]))
    return text if len(names) <= shown else f"{text} and {len(names) - shown:,} more"
