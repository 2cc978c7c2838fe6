"""Tables of any kind as columns of cells, and whether one is more than numbers.

No table library is imported here: a table's type says where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .cells import DATES, Cells, is_category, is_missing, label_of, numbers_of
from .table import Table

TABLES = "a pandas, polars or pyarrow table, a dict of columns, a Table of text, or an array (samples, features)"


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
        if np.isnan(cells.values).any() if kind in "biuf" else any(map(is_missing, cells.values.tolist())):
            return True
    return False


def n_rows(table: Any) -> int:
    names, raw = open_table(table)
    return len(all_cells(names, raw)[0].values)


def take_rows(table: Any, rows: np.ndarray) -> Any:
    """The rows of those numbers, as a table of the same kind."""
    if isinstance(table, Mapping):
        return {name: take_rows(column, rows) for name, column in table.items()}
    if isinstance(table, Table):
        return Table(table.numbers[rows], take_rows(table.text, rows), table.lines[rows])
    home = _home(table)
    if home == "pandas":
        return table.iloc[rows]
    if home == "pyarrow":
        return table.take(rows)
    if isinstance(table, list | tuple):
        return [table[row] for row in rows]
    return table[rows]  # polars, NumPy


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
        raise TypeError(f"{label} holds dates or times ({found.values.dtype}); {DATES}")
    if kind not in "biufOUT":
        raise TypeError(f"{label} has dtype {found.values.dtype}; expected numbers, text, bools or objects")
    return found


def _pandas_cells(series: Any) -> Cells:
    if str(series.dtype) == "category":
        return Cells(np.asarray(series), categorical=True)
    kind = "" if isinstance(series.dtype, np.dtype) else series.dtype.kind
    if kind == "f":
        return Cells(series.to_numpy(dtype=np.float64, na_value=np.nan))
    if kind in tuple("iu"):  # beside NA as objects: float64 would make one of two large integers
        return Cells(series.to_numpy(dtype=object if series.isna().any() else f"{kind}8"))
    return Cells(series.to_numpy())


def _arrow_cells(column: Any) -> Cells:
    categorical = hasattr(column.type, "value_type") and hasattr(column.type, "index_type")
    if categorical:
        column = column.cast(column.type.value_type)  # a dictionary's own to_numpy gives wrong cells for missing ones
    if column.null_count and str(column.type).startswith(("int", "uint")):
        return Cells(np.array(column.to_pylist(), dtype=object), categorical)  # its own to_numpy would make floats
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
