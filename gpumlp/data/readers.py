"""From a name, a file or a folder to a `Dataset`."""

import os
import zipfile
from collections.abc import Iterable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from .builtin import BUILTIN
from .checks import check_targets, check_X, encode_labels
from .dataset import Dataset
from .idx import find_part, is_idx_name, read_images, read_part
from .table import Table, is_number, parse_numbers, read_header, read_mixed, read_parquet, read_table, require_words

MAX_CLASSES = 20  # whole numbers with more different values than this are quantities rather than classes
TASKS = ("classification", "regression")
FORMATS = "a folder of IDX files, .npz, .csv or .csv.gz"
CSV_ENDINGS = (".csv", ".csv.gz")
TABLE_ENDINGS = (*CSV_ENDINGS, ".parquet")


def load(source: str | os.PathLike[str], *, target: str | None = None, task: str | None = None) -> Dataset:
    """Read a data set.

    Arguments:
        source: one of
            - the name of a built-in set: digits, moons, circles, spirals, xor, sine (write ./digits for a file so
              named);
            - a folder of IDX files as MNIST's: train-images-idx3-ubyte and train-labels-idx1-ubyte, perhaps t10k-*,
              with .gz or without, with a dot before idx or a dash;
            - .npz with X and y, perhaps X_test and y_test; or x_train and y_train, perhaps x_test and y_test. Images of
              shape (n, rows, columns) are flattened;
            - .csv or .csv.gz with a header, in UTF-8, commas between cells, every column but the target a number;
              `load_table` reads those with categories and missing cells.
        target: CSV: the name of the target column, or several with commas between them (regression).
        task: "classification" or "regression"; None infers it from y: text, bools, and whole numbers with at most 20
            different values are classes, everything else is regression.

    Returns: see `Dataset`. Features keep the dtype of the file; CSV features are float32.

    Raises:
        FileNotFoundError: nothing there; the message says what was looked for and lists the built-in names.
        ValueError: a file that is damaged, has the wrong content or an unknown ending, with the place of the fault.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be 'classification', 'regression' or None")
    if isinstance(source, str) and source in BUILTIN:
        return _as_it_is(BUILTIN[source](), target, task)
    path = _existing(source)
    if path.is_dir():
        return _as_it_is(_load_idx(path), target, task)
    if path.name.lower().endswith(CSV_ENDINGS):
        return _load_csv(path, target, task)
    if path.suffix.lower() == ".npz":
        if target is not None:
            raise ValueError(f"target is {target!r}, but {path} names its targets itself: y or y_train")
        return _load_npz(path, task)
    if is_idx_name(path):
        raise ValueError(f"{path} is one file of an IDX set; pass its folder, {path.parent}")
    hint = "; load_table reads it" if is_table_file(path) else ""
    raise ValueError(f"{path} has an unknown ending; allowed are {FORMATS}{hint}")


def is_table_file(path: str | os.PathLike[str]) -> bool:
    """Whether the name is one of a file for `load_table`: .csv, .csv.gz or .parquet."""
    return str(path).lower().endswith(TABLE_ENDINGS)


def load_table(
    path: str | os.PathLike[str], *, target: str | None, task: str | None = None, as_text: Sequence[str] = ()
) -> Dataset:
    """Read a table with numbers, categories and missing cells.

    Arguments:
        path: .csv or .csv.gz as `load` reads it, or .parquet (the extra `parquet`).
        target: the name of the target column, or several with commas between them (regression).
        task: as `load`.
        as_text: columns of a CSV file that are categories although all their cells are numbers: they keep their writing.

    Returns: see `Dataset`; X holds all other columns, as `TableEncoder.fit` takes them: of a CSV file a dict, of numbers
        where a column has nothing else, of text otherwise; of a Parquet file a pyarrow table.

    Raises: as `load`; ImportError without what reads Parquet.
    """
    if task is not None and task not in TASKS:
        raise ValueError(f"task is {task!r}; it must be 'classification', 'regression' or None")
    path = _existing(path)
    X: Any
    y: np.ndarray
    if path.suffix.lower() != ".parquet":
        targets = _target_names(read_header(path), target, task, path)
        y = _target_cells(read_table(path, [], targets), targets, task, path)
        X = {name: cells for name, cells in read_columns(path, as_text).items() if name not in targets}
        features = list(X)
    else:
        table = read_columns(path)
        targets = _target_names(table.column_names, target, task, path)
        X = table.drop_columns(targets)
        features, y = X.column_names, _target_columns(table, targets, path)
    task, y, classes = _targets(y, len(y), task, f"{path}: target")
    return Dataset(_stem(path), X, y, task, classes=classes, feature_names=features, target_names=targets)


def read_columns(path: str | os.PathLike[str], as_text: Sequence[str] = ()) -> Any:
    """All columns of a .csv, .csv.gz or .parquet file, as a table that a `TableEncoder` takes; as_text as `load_table`.

    Raises: FileNotFoundError and ValueError as `load`; ImportError without what reads Parquet.
    """
    path = _existing(path)
    if not is_table_file(path) or path.is_dir():
        raise ValueError(f"{path} is no table; a table is a file that ends with {', '.join(TABLE_ENDINGS)}")
    return read_parquet(path) if path.suffix.lower() == ".parquet" else read_mixed(path, as_text)


def read_rows(
    path: str | os.PathLike[str], feature_names: Sequence[str] | None = None
) -> tuple[np.ndarray, list[str] | None]:
    """Read rows to predict for, without targets.

    Arguments:
        path: .csv or .csv.gz whose header names the features; .npz with X; an IDX images file; or a folder of IDX
            files, from which it takes the test images.
        feature_names: CSV: the features that the network was trained on. They are taken in this order and other columns
            are ignored. None takes all columns as they stand.

    Returns: X (n, n_features) and the names of its columns (None for .npz and IDX).

    Raises: FileNotFoundError and ValueError as `load`; ValueError naming the features that a CSV file lacks.
    """
    path = _existing(path)
    if path.is_dir():
        images = find_part(path, "t10k", "images")
        if images is None:
            raise FileNotFoundError(f"{path} has no test images (t10k-images-idx3-ubyte); pass the images file instead")
        return read_images(images)[0], None
    if path.name.lower().endswith(CSV_ENDINGS):
        header = read_header(path)
        names = header if feature_names is None else list(feature_names)
        known = set(header)
        missing = [name for name in names if name not in known]
        if missing:
            raise ValueError(f"{path} lacks the features {_listed(missing)}; its columns are {_listed(header)}")
        return read_table(path, names).numbers, names
    if path.suffix.lower() == ".npz":
        arrays = _read_npz(path)
        if "x" not in arrays:
            raise ValueError(f"{path} holds {_listed(arrays)}; expected X")
        return check_X(_flat(arrays["x"]), name="X"), None
    if is_idx_name(path):
        return read_images(path)[0], None
    raise ValueError(f"{path} has an unknown ending; allowed are {FORMATS} and IDX images files")


def _existing(source: str | os.PathLike[str]) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source is a {type(source).__name__}; expected a path or the name of a built-in set")
    path = Path(source).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"no file or folder {path} (looked in {path.parent.absolute()}), and no built-in set of that name; "
            f"the built-in sets are {', '.join(BUILTIN)}"
        )
    return path


def _as_it_is(data: Dataset, target: str | None, task: str | None) -> Dataset:
    """Refuse options that contradict a source that knows its own target and task."""
    if target is not None:
        raise ValueError(
            f"target is {target!r}, but only CSV files have target columns; {data.name} has its own target"
        )
    if task is not None and task != data.task:
        raise ValueError(f"task is {task!r}, but {data.name} is for {data.task}")
    return data


def _load_idx(folder: Path) -> Dataset:
    X, labels, image_shape = read_part(folder, "train")
    y, classes = encode_labels(labels, name=f"{folder.name} train labels")
    X_test = y_test = None
    if find_part(folder, "t10k", "images") or find_part(folder, "t10k", "labels"):
        X_test, labels, test_shape = read_part(folder, "t10k")
        if test_shape != image_shape:
            raise ValueError(f"{folder}: train images have shape {image_shape}, test images {test_shape}")
        y_test, _ = encode_labels(labels, classes, name=f"{folder.name} test labels")
    name = folder.resolve().name
    return Dataset(name, X, y, "classification", X_test, y_test, classes, image_shape=image_shape)


def _load_npz(path: Path, task: str | None) -> Dataset:
    arrays = _read_npz(path)
    x_name, y_name = ("x_train", "y_train") if "x_train" in arrays else ("x", "y")
    if x_name not in arrays or y_name not in arrays:
        raise ValueError(f"{path} holds {_listed(arrays)}; expected X and y, or x_train and y_train")
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(f"{path} holds {_listed(arrays)}; x_test and y_test go together")
    X, y = check_X(_flat(arrays[x_name]), name="X"), arrays[y_name]
    task, y, classes = _targets(y, len(X), task, "y")
    X_test = y_test = None
    if "x_test" in arrays:
        X_test = check_X(_flat(arrays["x_test"]), name="X_test")
        if X_test.shape[1] != X.shape[1]:
            raise ValueError(f"{path}: X has {X.shape[1]} features, X_test has {X_test.shape[1]}")
        _, y_test, _ = _targets(arrays["y_test"], len(X_test), task, "y_test", classes)
        if y_test.shape[1:] != y.shape[1:]:
            raise ValueError(f"{path}: y has {y.shape[1]} outputs, y_test has {y_test.shape[1]}")
    image_shape = arrays[x_name].shape[1:] if arrays[x_name].ndim > 2 else None
    return Dataset(path.stem, X, y, task, X_test, y_test, classes, image_shape=image_shape)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return all arrays by their names in lower case."""
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is not an .npz file as numpy.savez writes it, or it is truncated")
    try:
        with np.load(path, allow_pickle=False) as archive:  # pickles can run code
            return {name.lower(): archive[name] for name in archive.files}
    except Exception as error:  # damage surfaces as BadZipFile, EOFError, zlib.error, TokenError, SyntaxError, ...
        raise ValueError(f"{path} cannot be read as .npz: {error}") from error


def _flat(X: np.ndarray) -> np.ndarray:
    return X.reshape(len(X), -1) if X.ndim > 2 and X.size else X


def _load_csv(path: Path, target: str | None, task: str | None) -> Dataset:
    header = read_header(path)
    targets = _target_names(header, target, task, path)
    features = [name for name in header if name not in targets]
    table = read_table(path, features, targets)
    y = _target_cells(table, targets, task, path)
    task, y, classes = _targets(y, len(y), task, "y")
    return Dataset(_stem(path), table.numbers, y, task, classes=classes, feature_names=features, target_names=targets)


def _stem(path: Path) -> str:
    return path.name[: path.name.lower().index(".csv")] if ".csv" in path.name.lower() else path.stem


def _target_names(header: list[str], target: str | None, task: str | None, path: Path) -> list[str]:
    """The target columns; there are others besides them."""
    columns = _listed(header)
    if target is None:
        raise ValueError(f"{path}: which column is the target? Name it with target; the columns are {columns}")
    targets = [target] if target in header else [name.strip() for name in target.split(",")]
    unknown = [name for name in targets if name not in header]
    if unknown:
        raise ValueError(f"{path} has no target column {_listed(unknown)}; the columns are {columns}")
    if len(set(targets)) < len(targets):
        raise ValueError(f"target names a column twice: {target!r}")
    if len(targets) > 1 and task == "classification":
        raise ValueError(f"classification has one target column, target names {len(targets)}: {_listed(targets)}")
    if len(targets) == len(header):
        raise ValueError(f"{path} has no columns besides the target; features are needed")
    return targets


def _target_cells(table: Table, targets: list[str], task: str | None, path: Path) -> np.ndarray:
    """y of a CSV file: text, or numbers."""
    cells = [require_words(table, name, path) for name in targets]
    if len(targets) == 1 and _names_classes(cells[0], task):
        return np.array(cells[0])
    return np.column_stack(
        [parse_numbers(column, table.lines, name, path) for name, column in zip(targets, cells, strict=True)]
    )


def _target_columns(table: Any, targets: list[str], path: Path) -> np.ndarray:
    """y of a Parquet file, in the types that it has there."""
    columns = []
    for name in targets:
        column = table.column(name)
        if column.null_count:
            row = column.is_null().to_pylist().index(True)
            raise ValueError(f'{path}, row {row}, column "{name}": the cell is empty; drop the row')
        values = column.to_pylist()
        if isinstance(values[0], bool):  # as a CSV file has them
            values = [str(value) for value in values]
        elif isinstance(values[0], Decimal):
            values = [float(value) for value in values]
        columns.append(np.array(values))
    return columns[0] if len(columns) == 1 else np.column_stack(columns)


def _names_classes(cells: list[str], task: str | None) -> bool:
    """Say whether a target column holds class names rather than numbers.

    Where some cells are numbers and some are not, few different values are classes (0, 1, 2, 3+); many are a column of
    numbers with a slip in it, which must not turn a regression into thousands of classes.
    """
    kinds = set(cells)
    numbers = sum(map(is_number, kinds))
    if task == "regression" or numbers == len(kinds):
        return False
    return numbers == 0 or task == "classification" or len(kinds) <= MAX_CLASSES


def _targets(
    y: np.ndarray, n: int, task: str | None, name: str, classes: np.ndarray | None = None
) -> tuple[str, np.ndarray, np.ndarray | None]:
    """Return the task, y in its form, and the classes of a classification."""
    if y.shape[:1] != (n,):
        raise ValueError(
            f"{name} has shape {y.shape}, {name.replace('y', 'X')} has {n} rows; they must have as many rows"
        )
    task = task or infer_task(y)
    if task == "classification":
        return task, *encode_labels(y, classes, name)
    n_outputs = y.shape[1] or 1 if y.ndim > 1 else 1
    return task, check_targets(y, n, n_outputs, "values", name), None


def infer_task(y: np.ndarray) -> str:
    """Text, bools and whole numbers with at most 20 different values are classes; else, and for several columns,
    regression."""
    if y.ndim > 1 and y.shape[1:] != (1,):
        return "regression"
    if y.dtype.kind not in "iuf":
        return "classification"
    few_whole = len(np.unique(y)) <= MAX_CLASSES and bool((y == np.floor(y)).all())
    return "classification" if few_whole else "regression"


def _listed(names: Iterable[str]) -> str:
    """Quoted names; of more than 30 the first ones and the last, which often is the target."""
    quoted = [f'"{name}"' for name in names]
    if len(quoted) > 30:
        return f"{', '.join(quoted[:29])}, ..., {quoted[-1]} ({len(quoted)} in all)"
    return ", ".join(quoted)
