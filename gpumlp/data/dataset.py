"""What a data set is."""

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Rows to train on, perhaps rows to test on, and what their columns mean.

    Fields:
        name: of the built-in set, the file or the folder.
        X: (n_samples, n_features), in the dtype of its source: uint8 for images, float32 for CSV; from `load_table` the
            columns as a table that a `TableEncoder` takes.
        y: classification: labels (n_samples,) int64, indices into `classes`; regression: (n_samples, n_outputs)
            float32.
        task: "classification" or "regression".
        X_test, y_test: the same for test rows, or None.
        classes: classification: the original values of the labels, sorted.
        feature_names, target_names: of the columns of a CSV file, else None.
        image_shape: (rows, columns) or (rows, columns, channels) of the image that each row of X is, else None.
    """

    name: str
    X: Any
    y: np.ndarray
    task: str
    X_test: np.ndarray | None = None
    y_test: np.ndarray | None = None
    classes: np.ndarray | None = None
    feature_names: list[str] | None = None
    target_names: list[str] | None = None
    image_shape: tuple[int, ...] | None = None

    def __repr__(self) -> str:
        outputs = f"{self.y.shape[1]} outputs" if self.classes is None else f"{len(self.classes)} classes"
        test = "no test rows" if self.X_test is None else f"{len(self.X_test)} test rows"
        features = f"{len(self.feature_names or ())} columns of a table"
        if isinstance(self.X, np.ndarray):
            features = f"{self.X.shape[1]} features {self.X.dtype}"
        return f"Dataset({self.name}: {self.task}, {len(self.y)} rows, {features}, {outputs}, {test})"
