"""What the commands of the command line do: each takes its options and returns a result as plain data, and as text.

Errors are ordinary exceptions; ``cli`` gives them their exit codes.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__, plots
from .augment import GaussianNoise, Mixup, RandomShift
from .backends import get_backend
from .callbacks import CSVLogger, EarlyStopping
from .container import write_atomically
from .data import Dataset, encode_labels, load, read_rows, split_indices
from .files import load as load_model
from .layers import Dense
from .losses import LOSSES, Loss
from .network import Network
from .optimizers import OPTIMIZERS, Optimizer
from .schedules import Cosine, get_schedule
from .trainer import Trainer

Result = tuple[dict[str, Any], str]


# --- train ----------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> Result:
    """Train on a data set; evaluate on its test rows, or on held-out ones; write what was asked for."""
    data = load(options.data, target=options.target, task=options.task)
    _check_outputs(options, data)  # before hours of training, not after
    stratify = data.y if data.classes is not None else None
    X, y, X_test, y_test = data.X, data.y, data.X_test, data.y_test
    if X_test is None or y_test is None:
        X, y, X_test, y_test = _hold_out(X, y, options.test_share, options.seed, stratify)
    _say(
        options,
        f"{data.name}: {data.task}, {len(X)} rows to train on, {len(X_test)} to test on, {X.shape[1]} features",
    )
    network, loss = _network(options, data)
    if options.warmup and options.schedule != "cosine":
        raise ValueError("--warmup belongs to --schedule cosine; one_cycle warms up by itself")
    schedule = Cosine(warmup=options.warmup) if options.schedule == "cosine" else get_schedule(options.schedule)
    trainer = Trainer(network, loss, _optimizer(options), schedule=schedule, augment=_augmentation(options, data))
    _say(options, network.summary())
    callbacks: list[Any] = [CSVLogger(options.log)] if options.log else []
    validation = (X_test, y_test)
    if options.patience is not None:
        callbacks.append(EarlyStopping(options.patience))
    if options.patience is not None or options.schedule == "plateau":
        # Rows that choose the epoch or the learning rate must not be those that judge the result.
        X, y, *held = _hold_out(X, y, 0.1, options.seed, y if data.classes is not None else None)
        validation = (held[0], held[1])
    history = trainer.fit(
        X,
        y,
        epochs=options.epochs,
        batch_size=options.batch_size,
        validation_data=validation,
        callbacks=callbacks,
        progress=False if options.quiet else None,
        time_limit=options.time_limit,
    )
    network.classes = data.classes
    test = _measure(trainer, X_test, y_test)
    files = _write(options, network, data, history, X_test, y_test)
    result = {
        "data": data.name,
        "task": data.task,
        "parameters": network.n_parameters,
        "device": network.device_reason,
        "epochs": len(history.get("epoch", [])),
        "seconds": history["seconds"][-1] if history else None,
        "stopped": trainer.stopped,
        "test": test,
        "history": history,
        "files": files,
    }
    text = f"test: {_figures(test)}; {result['epochs']} epochs in {result['seconds'] or 0:.1f} s"
    return result, text + "".join(f"\n{kind}: {path}" for kind, path in files.items())


def _check_outputs(options: argparse.Namespace, data: Dataset) -> None:
    """Refuse files that could not be written in the end."""
    pictures = (options.plot, options.confusion, options.boundary)
    for path in (options.output, options.log, *pictures):
        if path is not None and Path(path).is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file")
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
    if any(pictures):
        plots.require_matplotlib()
        for path in pictures:
            plots.check_path(path)
    if options.confusion and data.classes is None:
        raise ValueError("--confusion needs classes; this is a regression")
    if options.boundary and data.X.shape[1] != (1 if data.classes is None else 2):
        drawn = "two features of a classification or one of a regression"
        raise ValueError(f"--boundary draws {drawn}; this is a {data.task} with {data.X.shape[1]}")


def _hold_out(X: np.ndarray, y: np.ndarray, share: float, seed: int, stratify: np.ndarray | None) -> tuple:
    kept, held = split_indices(len(X), share, seed=seed, stratify=stratify)
    return X[kept], y[kept], X[held], y[held]


def _network(options: argparse.Namespace, data: Dataset) -> tuple[Network, Loss]:
    """The network that the options describe, and its loss."""
    is_classifier = data.classes is not None
    name = options.loss or ("softmax_cross_entropy" if is_classifier else "squared_error")
    loss = Loss(name, **({"label_smoothing": options.label_smoothing} if options.label_smoothing else {}))
    if loss.row.is_classifier != is_classifier:
        fitting = ", ".join(row.name for row in LOSSES.values() if row.is_classifier == is_classifier)
        raise ValueError(f"--loss {name} does not fit {data.task}; losses for it: {fitting}")
    outputs = data.y.shape[1] if data.classes is None else len(data.classes)
    if loss.row.output == "sigmoid":
        if outputs != 2:
            raise ValueError(f"--loss {name} needs two classes; {data.name} has {outputs}")
        outputs = 1
    scaling = options.standardize or ("global" if data.image_shape else "columns")
    hidden = [
        Dense(units, options.activation, norm=options.norm, dropout=options.dropout, initializer=options.initializer)
        for units in options.hidden
    ]
    network = Network(
        [*hidden, Dense(outputs)],
        n_features=data.X.shape[1],
        seed=options.seed,
        device=options.device,
        precision=options.precision,
        standardize=False if scaling == "none" else scaling,
        standardize_targets=loss.row.output == "identity",
        input_dropout=options.input_dropout,
    )
    network.feature_names, network.target_names = data.feature_names, data.target_names
    return network, loss


def _optimizer(options: argparse.Namespace) -> Optimizer:
    given = {name: getattr(options, name) for name in ("learning_rate", "weight_decay", "clip_norm", "l1", "l2")}
    return OPTIMIZERS[options.optimizer](**{name: value for name, value in given.items() if value is not None})


def _augmentation(options: argparse.Namespace, data: Dataset) -> list[Any]:
    rows: list[Any] = []
    if options.shift:
        if data.image_shape is None or len(data.image_shape) != 2:
            raise ValueError("--shift moves images; these rows are none")
        rows.append(RandomShift(options.shift, (data.image_shape[0], data.image_shape[1])))
    if options.noise:
        rows.append(GaussianNoise(options.noise))
    if options.mixup:
        rows.append(Mixup(options.mixup))
    return rows


def _write(
    options: argparse.Namespace, network: Network, data: Dataset, history: dict, X_test: np.ndarray, y_test: np.ndarray
) -> dict[str, str]:
    """Model and pictures; returns what was written where."""
    if options.output:
        network.save(options.output)
    if options.plot and not history:
        _say(options, f"{options.plot} is not drawn: training ended before its first epoch did")
        options.plot = None
    if options.plot:
        plots.learning_curves(history, options.plot)
    if options.confusion and data.classes is not None:
        predicted, _ = encode_labels(network.predict(X_test), data.classes, name="predictions")
        plots.confusion_matrix(y_test, predicted, list(data.classes), options.confusion)
    if options.boundary and data.classes is not None:
        plots.decision_boundary(network, X_test, data.classes[y_test], options.boundary)
    elif options.boundary:
        plots.regression_curve(network, X_test, y_test, options.boundary)
    kinds = {
        "model": options.output,
        "plot": options.plot,
        "confusion": options.confusion,
        "boundary": options.boundary,
    }
    return {kind: str(path) for kind, path in kinds.items() if path}


def _measure(trainer: Trainer, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Loss and metrics on labels that are indices already."""
    network = trainer.network
    classes, network.classes = network.classes, None
    try:
        return trainer.evaluate(X, y)
    finally:
        network.classes = classes


# --- evaluate, predict, info ----------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> Result:
    """Loss and metrics of a saved model on a data set: its test rows where it has some, else all rows."""
    network = _load_one(options)
    if network.loss is None:
        raise ValueError(
            f"{options.model} holds no loss to evaluate by; train it with a Trainer, or assign network.loss"
        )
    target = options.target or (",".join(network.target_names) if network.target_names else None)
    is_csv = str(options.data).lower().endswith((".csv", ".csv.gz"))
    task = "classification" if network.loss.row.is_classifier else "regression"
    data = load(options.data, target=target if is_csv else options.target, task=task)
    X, y = data.X, data.y
    if data.X_test is not None and data.y_test is not None:
        X, y = data.X_test, data.y_test
    if network.feature_names is not None and data.feature_names is not None:
        missing = [name for name in network.feature_names if name not in data.feature_names]
        if missing:
            raise ValueError(
                f"{options.data} lacks the columns {', '.join(missing)} that {options.model} was trained on"
            )
        X = X[:, [data.feature_names.index(name) for name in network.feature_names]]
    if X.shape[1] != network.n_features:
        raise ValueError(f"{options.model} takes {network.n_features} features, {options.data} has {X.shape[1]}")
    if data.classes is not None:
        known = np.arange(max(network.n_outputs, 2)) if network.classes is None else network.classes
        y = encode_labels(data.classes[y], known, name=f"{options.data}: target")[0]
    found = _measure(Trainer(network, network.loss), X, y)
    rows = {"rows": len(X)}
    return {
        "model": str(options.model),
        "data": str(options.data),
        **rows,
        **found,
    }, f"{_figures(found)} on {len(X)} rows"


def predict(options: argparse.Namespace) -> Result:
    """Predictions of a saved model for rows without targets, as CSV."""

    network = _load_one(options)
    X, _ = read_rows(options.rows, network.feature_names)
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
        "rows": len(X),
        "columns": header,
        "output": str(options.output),
    }, f"{len(X)} rows written to {options.output}"


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


# --- text -----------------------------------------------------------------------------------------------------------


def _say(options: argparse.Namespace, message: str) -> None:
    if not options.quiet:
        print(message, file=sys.stderr)


def _figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())
