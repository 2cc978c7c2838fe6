"""Files of tables: CSV, a header, then rows of numbers, with columns of text where they are asked for; and Parquet."""

import csv
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .compressed import DAMAGED, open_bytes

MISSING = ("", "?")  # texts, without surrounding spaces, that stand for a missing cell
BLOCK_CELLS = 1 << 18  # cells held as text at a time


@dataclass(frozen=True)
class Table:
    """The columns that were asked for.

    Fields:
        numbers: (n, columns) float32.
        text: for each text column, its n cells without surrounding spaces; an empty one is missing.
        lines: (n,) the line of the file on which each row starts, from 1.
    """

    numbers: np.ndarray
    text: dict[str, list[str]]
    lines: np.ndarray


def read_header(path: Path) -> list[str]:
    """Return the column names, without surrounding spaces.

    Raises: ValueError naming the file, for an empty file, a first line of numbers, and names that are empty or
        repeated.
    """
    with _reader(path) as reader:
        header = [name.strip() for name in next((row for row in reader if row), [])]
    if not header:
        raise ValueError(f"{path} is empty; expected a header with the names of the columns, then rows")
    if all(map(is_number, header)) and header != [str(column) for column in range(len(header))]:
        raise ValueError(f"{path} has no header: line 1 holds numbers; put the names of the columns there")
    if "" in header:
        raise ValueError(
            f"{path}: column {header.index('') + 1} has no name in the header (pandas: to_csv(..., index=False))"
        )
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise ValueError(f'{path}: column "{repeated[0]}" appears twice in the header')
    return header


def read_table(path: Path, numbers: Sequence[str], text: Sequence[str] = ()) -> Table:
    """Read the named columns, in the order of the names; others are skipped.

    Raises: ValueError naming the file, line and column, for cells that are not finite float32 numbers, rows of another
        length than the header, no rows, encoding other than UTF-8, open quotes and damaged gzip.
    """
    header = read_header(path)
    place = {name: index for index, name in enumerate(header)}
    blocks, all_lines = [], []
    cells: dict[str, list[str]] = {name: [] for name in text}
    for rows, lines in _blocks(path, len(header)):
        columns = list(zip(*rows, strict=True))
        block = np.empty((len(rows), len(numbers)), dtype=np.float32)
        for column, name in enumerate(numbers):
            block[:, column] = parse_numbers(columns[place[name]], lines, name, path)
        for name in text:
            cells[name].extend(cell.strip() for cell in columns[place[name]])
        blocks.append(block)
        all_lines.extend(lines)
    if not blocks:
        raise ValueError(f"{path} has a header but no rows")
    return Table(np.concatenate(blocks), cells, np.array(all_lines))


def parse_numbers(cells: Sequence[str], lines: Sequence[int] | np.ndarray, column: str, path: Path) -> np.ndarray:
    """Return the cells of a column as (n,) float64 that float32 can hold; `lines` says where each stands."""
    try:
        values = np.fromiter(map(number_of, cells), np.float64, len(cells))
    except ValueError:
        row = next(row for row, cell in enumerate(cells) if not is_number(cell))
        fault = f"{cells[row]!r} is not a number; encode or drop the column"
        if not cells[row].strip():
            fault = "the cell is empty; fill in a number or drop the row"
        raise ValueError(f'{path}, line {lines[row]}, column "{column}": {fault}') from None
    bad = ~(np.abs(values) <= np.finfo(np.float32).max)
    if bad.any():
        row = int(np.argmax(bad))
        fault = "is too large for float32" if np.isfinite(values[row]) else "is not a finite number"
        raise ValueError(f'{path}, line {lines[row]}, column "{column}": {cells[row]!r} {fault}')
    return values


def read_mixed(path: Path, as_text: Sequence[str] = ()) -> dict[str, Any]:
    """Every column by its name: (n,) float64, NaN where a cell is missing, or its cells as text where one is no number.

    Args:
        as_text: columns that are not to be taken for numbers.

    A column's text is kept only where it is needed, for which the file is read a second time: as Python's objects it takes
    ten times the room of the file.

    Raises: ValueError as ``read_table``.
    """
    header = read_header(path)
    numbers: dict[str, list] = {name: [] for name in header if name not in as_text}
    empty = True
    for rows, _ in _blocks(path, len(header)):
        empty = False
        for name, cells in zip(header, zip(*rows, strict=True), strict=True):
            if name in numbers:
                try:
                    numbers[name].append(np.fromiter(map(_number_or_nan, cells), np.float64, len(cells)))
                except ValueError:
                    del numbers[name]
    if empty:
        raise ValueError(f"{path} has a header but no rows")
    rest = [name for name in header if name not in numbers]
    text = read_table(path, [], rest).text if rest else {}
    return {name: np.concatenate(numbers[name]) if name in numbers else text[name] for name in header}


def _number_or_nan(cell: str) -> float:
    return np.nan if cell.strip() in MISSING else number_of(cell)


def require_words(table: Table, column: str, path: Path) -> list[str]:
    """The cells of a text column, none of which may be missing. Raises ValueError naming the line."""
    words = table.text[column]
    for missing in MISSING:
        if missing in words:
            line, fault = (
                table.lines[words.index(missing)],
                "is empty" if not missing else f"is {missing!r}, nothing known",
            )
            raise ValueError(f'{path}, line {line}, column "{column}": the cell {fault}; drop the row')
    return words


def read_parquet(path: Path) -> Any:
    """The file as a pyarrow table.

    Raises: ImportError without pyarrow; ValueError naming the file, for one that is damaged.
    """
    try:
        import pyarrow  # type: ignore
        import pyarrow.parquet  # type: ignore
    except ImportError as error:
        raise ImportError(f'{path} needs pyarrow: pip install "gpumlp[parquet]" ({error})') from error
    try:
        return pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as Parquet: {error}") from error


def number_of(cell: str) -> float:
    if "_" in cell:  # Python's own writing, which no table means as a number
        raise ValueError(cell)
    return float(cell)


def is_number(cell: str) -> bool:
    try:
        number_of(cell)
    except ValueError:
        return False
    return True


def _blocks(path: Path, width: int) -> Iterator[tuple[list[list[str]], list[int]]]:
    """Yield rows below the header, some at a time, with the line on which each starts; blank lines are skipped."""
    rows: list[list[str]] = []
    lines: list[int] = []
    with _reader(path) as reader:
        next(row for row in reader if row)
        line = reader.line_num + 1  # a quoted cell may hold line breaks: a row starts where the one before it ended
        for row in reader:
            if row:
                if len(row) != width:
                    raise ValueError(f"{path}, line {line}: {len(row)} cells, the header has {width}")
                rows.append(row)
                lines.append(line)
                if len(rows) * width >= BLOCK_CELLS:
                    yield rows, lines
                    rows, lines = [], []
            line = reader.line_num + 1
    if rows:
        yield rows, lines


@contextmanager
def _reader(path: Path) -> Iterator[Any]:
    """A csv.reader of the file, whose faults become ValueErrors that name the file."""
    # utf-8-sig drops the mark that Excel writes; newline="" leaves line breaks within quotes to csv
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            yield reader
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {reader.line_num}: not UTF-8 ({error}); save it as UTF-8") from error
        except DAMAGED as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error
