"""What the commands of the command line do, all but ``train``: each takes its options and returns a result, as plain data
and as text.

Errors are ordinary exceptions; ``cli`` gives them their exit codes.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__
from .backends import get_backend
from .container import write_atomically
from .data import Dataset, encode_labels, load, load_table, read_columns, read_rows
from .data.encoding import Encoded
from .data.readers import is_table_file
from .files import load as load_model
from .network import Network
from .trainer import Trainer

Result = tuple[dict[str, Any], str]


def evaluate(options: argparse.Namespace) -> Result:
    """Loss and metrics of a saved model on a data set: its test rows where it has some, else all rows."""
    network = _load_one(options)
    if network.loss is None:
        raise ValueError(
            f"{options.model} holds no loss to evaluate by; train it with a Trainer, or assign network.loss"
        )
    target = options.target or (",".join(network.target_names) if network.target_names else None)
    task = "classification" if network.loss.row.is_classifier else "regression"
    if network.encoder is not None and not is_table_file(options.data):
        raise ValueError(f"{options.model} was trained on a table; give a file that is one: .csv, .csv.gz or .parquet")
    names = target if is_table_file(options.data) else options.target
    if network.encoder is None:
        data = load(options.data, target=names, task=task)
    else:
        data = load_table(options.data, target=names, task=task, as_text=network.encoder.category_names)
    X, y = data.X, data.y
    if data.X_test is not None and data.y_test is not None:
        X, y = data.X_test, data.y_test
    X = _in_order(options, network, data, X) if network.encoder is None else _encoded(network, X, options.data)
    if data.classes is not None:
        known = np.arange(max(network.n_outputs, 2)) if network.classes is None else network.classes
        y = encode_labels(data.classes[y], known, name=f"{options.data}: target")[0]
    found = measure(Trainer(network, network.loss), X, y)
    result = {"model": str(options.model), "data": str(options.data), "rows": len(y), **found}
    return result, f"{figures(found)} on {len(y)} rows"


def _in_order(options: argparse.Namespace, network: Network, data: Dataset, X: np.ndarray) -> np.ndarray:
    """The columns that the network was trained on, in its order."""
    if network.feature_names is not None and data.feature_names is not None:
        missing = [name for name in network.feature_names if name not in data.feature_names]
        if missing:
            raise ValueError(
                f"{options.data} lacks the columns {', '.join(missing)} that {options.model} was trained on"
            )
        X = X[:, [data.feature_names.index(name) for name in network.feature_names]]
    if X.shape[1] != network.n_features:
        raise ValueError(f"{options.model} takes {network.n_features} features, {options.data} has {X.shape[1]}")
    return X


def _encoded(network: Network, table: Any, path: Any) -> Encoded:
    assert network.encoder is not None
    with naming(path):
        return Encoded(network.encoder.transform(table))


@contextmanager
def naming(path: Any) -> Iterator[None]:
    """Errors about a table's cells say which file it came from."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise (TypeError if isinstance(error, TypeError) else ValueError)(f"{path}: {error}") from error


def predict(options: argparse.Namespace) -> Result:
    """Predictions of a saved model for rows without targets, as CSV."""
    network = _load_one(options)
    X: Any
    if network.encoder is None:
        X, _ = read_rows(options.rows, network.feature_names)
    else:
        X = _encoded(network, read_columns(options.rows, network.encoder.category_names), options.rows)
    if options.proba:
        if network.loss is None or not network.loss.row.is_classifier:
            raise ValueError(f"--proba needs a model over classes; {options.model} predicts values")
        values = network.predict_proba(X)
        labels = range(values.shape[1]) if network.classes is None else network.classes
        header = [f"probability_{label}" for label in labels]
    else:
        values = network.predict(X)
        values = values[:, None] if values.ndim == 1 else values
        names = network.target_names or [f"prediction_{i}" for i in range(values.shape[1])]
        header = names if values.shape[1] == len(names) and values.shape[1] > 1 else ["prediction"]
    if options.json and options.output is None:
        return {"columns": header, "rows": values.tolist()}, ""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(values.tolist())
    if options.output is None:
        return {}, text.getvalue().rstrip("\n")
    write_atomically(options.output, text.getvalue().encode())
    return {
        "rows": len(values),
        "columns": header,
        "output": str(options.output),
    }, f"{len(values)} rows written to {options.output}"


def info(options: argparse.Namespace) -> Result:
    """Versions, processors, BLAS, and which backend "auto" takes and why."""

    backend, reason = get_backend("auto")
    blas = np.show_config(mode="dicts").get("Build Dependencies", {}).get("blas", {})  # type: ignore[union-attr]
    found = {
        "gpumlp": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "system": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
        "backend": backend.name,
        "device": reason,
    }
    return found, "\n".join(f"{name:<10} {value}" for name, value in found.items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _load_one(options: argparse.Namespace) -> Network:
    network = load_model(options.model, options.device)
    if network.is_fleet:
        raise ValueError(
            f"{options.model} holds a fleet of {network.models} models; save one of them: "
            f"gpumlp.load({str(options.model)!r})[0].save(...)"
        )
    return network


# --- what train needs too -------------------------------------------------------------------------------------------


def measure(trainer: Trainer, X: Any, y: np.ndarray) -> dict[str, float]:
    """Loss and metrics on labels that are indices already."""
    network = trainer.network
    classes, network.classes = network.classes, None
    try:
        return trainer.evaluate(X, y)
    finally:
        network.classes = classes


def figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
