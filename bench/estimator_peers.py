"""The peers of `estimators.py`: one library fits one set, in a process of its own.

It fits twice: a few steps on the first rows in their order, from which the parent tells that both libraries train the same
thing, and which warm it up; then all rows for as many epochs as asked, which is timed and scored.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tables import SOURCES, Rows, preprocessor, read

CHECK_ROWS, CHECK_EPOCHS = 512, 3
CHECK_EPSILON = 1e-14  # Adam's stands elsewhere in scikit-learn; too small to count, it leaves the rest comparable
SETTINGS = {
    "hidden_layer_sizes": (256,),
    "batch_size": 256,
    "solver": "adam",
    "learning_rate_init": 1e-3,
    "alpha": 1e-4,
    "tol": 0.0,
    "n_iter_no_change": np.inf,  # nobody stops early
}


def scikit_learn(task: str, dtype: str, raw: bool, **options: Any) -> Any:
    """Its MLP; for raw tables behind the preprocessing, whose result is cast to `dtype`. It trains in X's own type."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor  # type: ignore[import-untyped]
    from sklearn.pipeline import make_pipeline  # type: ignore[import-untyped]
    from sklearn.preprocessing import FunctionTransformer  # type: ignore[import-untyped]

    mlp = (MLPRegressor if task == "values" else MLPClassifier)(**options)
    cast = FunctionTransformer(np.asarray, kw_args={"dtype": data_type(dtype)})
    return make_pipeline(preprocessor(), cast, mlp) if raw else mlp


def gpumlp(task: str, dtype: str, raw: bool, **options: Any) -> Any:
    """This library's MLP, which takes raw tables as they are."""
    import gpumlp as gm

    own = None if dtype == "default" else dtype
    return (gm.MLPRegressor if task == "values" else gm.MLPClassifier)(device="cpu", dtype=own, **options)


def data_type(dtype: str) -> str:
    return "float64" if dtype == "default" else dtype


LIBRARIES: dict[str, Callable] = {"scikit-learn": scikit_learn, "gpumlp": gpumlp}


def measure(library: str, rows: Rows, task: str, dtype: str, raw: bool, epochs: int, seed: int) -> dict[str, Any]:
    """Returns seconds of `fit`, score on the test rows, and check: what the short fit predicts for its rows.

    score is accuracy or R²; of labels the share of rows with all of them right, and label_score the share of right labels.
    """
    X, X_test = (part if raw else part.astype(data_type(dtype)) for part in (rows.X, rows.X_test))
    y, y_test = (part.astype(data_type(dtype)) if task == "values" else part for part in (rows.y, rows.y_test))

    def estimator(epochs: int, **options: Any) -> Any:
        return LIBRARIES[library](task, dtype, raw, max_iter=epochs, random_state=seed, **SETTINGS, **options)

    short = estimator(CHECK_EPOCHS, shuffle=False, epsilon=CHECK_EPSILON).fit(X[:CHECK_ROWS], y[:CHECK_ROWS])
    predicted = (short.predict if task == "values" else short.predict_proba)(X[:CHECK_ROWS])
    model = estimator(epochs)
    before = time.perf_counter()
    model.fit(X, y)
    seconds = time.perf_counter() - before
    found = {"seconds": seconds, "score": float(model.score(X_test, y_test)), "check": predicted.tolist()}
    return found | ({"label_score": float((model.predict(X_test) == y_test).mean())} if task == "labels" else {})


def main(library: str, source: str, result: str, name: str, dtypes: str, epochs: str, seed: str) -> None:
    """Fits one set with each dtype and writes what it found as JSON. `estimators.py` starts this.

    source: an .npz of prepared rows, or the folder of the raw tables.
    """
    warnings.simplefilter("ignore")  # that a fixed number of epochs is not converged; clipped batches of small sets
    raw, task = Path(source).is_dir(), SOURCES[name].task
    rows = read(name, Path(source)) if raw else Rows.load(Path(source))
    settings = raw, int(epochs), int(seed)
    found = {dtype: measure(library, rows, task, dtype, *settings) for dtype in dtypes.split(",")}
    Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
