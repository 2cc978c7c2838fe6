"""The real tables of `estimators.py`: where their files lie, how they are split, and the matrix that everyone is given.

pandas and scikit-learn are imported inside the functions: this file says which sets are there without them.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FOLDER = Path(os.environ.get("GPUMLP_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
MISSING = ["", "?"]  # cells that hold nothing
TEST_SHARE, SPLIT_SEED = 0.2, 0


class Source(NamedTuple):
    """A set's files: training and test rows where it has an official split, else one file, from which both are drawn."""

    files: tuple[str, ...]
    target: str  # column of a .csv.gz; an .npz holds X_train, Y_train, X_test, Y_test
    task: str  # "classes", "labels" (several a row) or "values"
    epochs: int = 20


WINE = ("wine-quality-white/wine-quality-white.csv.gz",)
SOURCES = {
    "adult": Source(("adult/train.csv.gz", "adult/test.csv.gz"), "income", "classes"),
    "california-housing": Source(("california-housing/housing.csv.gz",), "median_house_value", "values"),
    "diamonds": Source(("diamonds/diamonds.csv.gz",), "price", "values"),
    "covertype": Source(("covertype/covertype.csv.gz",), "Cover_Type", "classes", epochs=5),
    "wine-quality-white": Source(WINE, "quality", "classes"),
    "wine-quality-white-values": Source(WINE, "quality", "values"),
    "yeast-multilabel": Source(("yeast-multilabel/yeast-multilabel.npz",), "", "labels"),
}
RAW = ["adult", "california-housing", "diamonds"]  # with categories


class Rows(NamedTuple):
    """Training and test rows. X is a DataFrame as the file has it, or the prepared matrix; y is an array."""

    X: Any
    y: np.ndarray
    X_test: Any
    y_test: np.ndarray

    def save(self, path: Path) -> None:
        np.savez(path, **self._asdict())

    @staticmethod
    def load(path: Path) -> Rows:
        with np.load(path) as file:
            return Rows(**{name: file[name] for name in Rows._fields})


def absent(name: str, folder: Path) -> list[str]:
    """The files of a set that the folder lacks."""
    return [file for file in SOURCES[name].files if not (folder / file).exists()]


def read(name: str, folder: Path) -> Rows:
    """A set as its files have it, split. Values to predict are standardised by the training rows."""
    import pandas as pd  # type: ignore[import-untyped]
    from sklearn.model_selection import train_test_split  # type: ignore[import-untyped]

    source = SOURCES[name]
    if source.task == "labels":
        with np.load(folder / source.files[0]) as file:
            X, X_test = (pd.DataFrame(file[part].astype(float)) for part in ("X_train", "X_test"))
            return Rows(X, file["Y_train"].astype(int), X_test, file["Y_test"].astype(int))
    parts = [pd.read_csv(folder / file, na_values=MISSING, keep_default_na=False) for file in source.files]
    if len(parts) == 1:
        parts = train_test_split(*parts, test_size=TEST_SHARE, random_state=SPLIT_SEED)
    X, X_test = (part.drop(columns=source.target) for part in parts)
    y, y_test = (np.array(part[source.target].tolist()) for part in parts)  # text as NumPy's own
    if source.task == "values":
        mean, std = y.mean(), y.std()
        y, y_test = (y - mean) / std, (y_test - mean) / std
    return Rows(X, y, X_test, y_test)


def preprocessor() -> Any:
    """Numbers standardised, a missing one the mean and a column that says so; categories one-hot, a missing one its own."""
    from sklearn.compose import ColumnTransformer, make_column_selector  # type: ignore[import-untyped]
    from sklearn.impute import SimpleImputer  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import OneHotEncoder, StandardScaler  # type: ignore[import-untyped]

    # Behind the scaler the mean is 0, and the column that says so stays 0 or 1.
    numbers = make_pipeline(StandardScaler(), SimpleImputer(strategy="constant", fill_value=0.0, add_indicator=True))
    categories = OneHotEncoder(handle_unknown="ignore", sparse_output=False)
    return ColumnTransformer(
        [
            ("numbers", numbers, make_column_selector(dtype_include="number")),
            ("categories", categories, make_column_selector(dtype_exclude="number")),
        ]
    )


def prepare(rows: Rows) -> Rows:
    """The same rows with X as a float64 matrix."""
    fitted = preprocessor()
    return rows._replace(X=fitted.fit_transform(rows.X), X_test=fitted.transform(rows.X_test))
