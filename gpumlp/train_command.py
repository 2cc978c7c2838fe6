"""The command ``train``: from a data set and flags to a network, its file and its pictures.

What a flag that was not given stands for is decided here; of a table all that a flag could say is inferred.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import plots
from .augment import GaussianNoise, Mixup, RandomShift
from .callbacks import CSVLogger, EarlyStopping
from .commands import Result, figures, measure, naming
from .data import Dataset, TableEncoder, encode_labels, load, load_table, split_indices
from .data.checks import check_X
from .data.encoding import Encoded
from .data.frames import all_numbers
from .data.readers import is_table_file
from .files import to_bytes
from .layers import Dense, Embedding
from .losses import LOSSES, Loss
from .network import Network
from .optimizers import OPTIMIZERS, Optimizer
from .schedules import Cosine, get_schedule
from .trainer import Trainer


def train(options: argparse.Namespace) -> Result:
    """Train on a data set; evaluate on its test rows, or on held-out ones; write what was asked for.

    Of a table (CSV, Parquet) all that a flag could say is inferred: what each column is, how it becomes numbers, and when
    training has to end. The model's file then takes raw rows.
    """
    if is_table_file(options.data):
        data = load_table(options.data, target=options.target, task=options.task, as_text=_categorical(options) or ())
    else:
        data = load(options.data, target=options.target, task=options.task)
    _choose_defaults(options, data)
    _check_outputs(options, data)  # before hours of training, not after
    parts = _parts(options, data)
    _say(
        options,
        f"{data.name}: {data.task}, {len(parts.train[1])} rows to train on, {len(parts.test[1])} to test on, "
        f"{_features(data)} features",
    )
    if parts.encoder is not None:
        _say(options, parts.encoder.report())
    network, loss = _network(options, data, parts)
    if options.warmup and options.schedule != "cosine":
        raise ValueError("--warmup belongs to --schedule cosine; one_cycle warms up by itself")
    schedule = Cosine(warmup=options.warmup) if options.schedule == "cosine" else get_schedule(options.schedule)
    augment = _augmentation(options, data)
    trainer = Trainer(network, loss, _optimizer(options), schedule=schedule, augment=augment, ema=options.ema)
    _say(options, network.summary())
    if options.output:
        to_bytes(network)  # what a file cannot hold is said before hours of training, too
    callbacks: list[Any] = [CSVLogger(options.log)] if options.log else []
    if options.patience:
        callbacks.append(EarlyStopping(options.patience))
    X, y = parts.train
    history = trainer.fit(
        X,
        y,
        epochs=options.epochs,
        batch_size=options.batch_size,
        validation_data=parts.validation or parts.test,
        callbacks=callbacks,
        progress=False if options.quiet else None,
        time_limit=options.time_limit,
    )
    network.classes = data.classes
    test = measure(trainer, *parts.test)
    predicted = network.predict(parts.test[0])
    files = _write(options, network, data, history, parts, predicted)
    result = {
        "data": data.name,
        "task": data.task,
        "parameters": network.n_parameters,
        "device": network.device_reason,
        "columns": None if parts.encoder is None else parts.encoder.facts(),
        "epochs": len(history.get("epoch", [])),
        "seconds": history["seconds"][-1] if history else None,
        "stopped": trainer.stopped,
        "test": test,
        "history": history,
        "files": files,
    }
    text = f"test: {figures(test)}; {result['epochs']} epochs in {result['seconds'] or 0:.1f} s"
    return result, text + "".join(f"\n{kind}: {path}" for kind, path in files.items())


# What a flag that was not given stands for; a table's training ends by itself.
DEFAULTS = {"hidden": [128], "dropout": 0.0, "epochs": 20, "batch_size": 64, "patience": 0}
TABLE_DEFAULTS = {"hidden": [256], "epochs": 100, "patience": 8}
FEWEST_ROWS = 50  # of a table, of which some can be held out to stop by
STEPS_AN_EPOCH = 50  # about so many for a small table; batches have 16 to 256 rows


def _choose_defaults(options: argparse.Namespace, data: Dataset) -> None:
    """Fill in the flags that were not given; the model of a table is written in any case."""
    is_table, defaults = is_table_file(options.data), dict(DEFAULTS)
    if is_table:
        rows = 2 ** round(np.log2(len(data.y) / STEPS_AN_EPOCH))
        # Dropout blurs what a regression is to hit, and helps a classification.
        dropout = 0.0 if data.classes is None else 0.2
        defaults = TABLE_DEFAULTS | {"dropout": dropout, "batch_size": int(np.clip(rows, 16, 256))}
        if len(data.y) < FEWEST_ROWS:
            defaults["patience"] = 0
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if is_table and options.standardize is not None:
        raise ValueError(f"--standardize {options.standardize} is for arrays; the columns of a table have --scaling")
    if not is_table:
        for name in ("scaling", "categorical", "one_hot_limit", "embedding_size", "impute"):
            if getattr(options, name) is not None:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} is for tables (.csv, .csv.gz, .parquet); {options.data} is none")
    if is_table and options.output is None:
        options.output = f"{data.name}.safetensors"


@dataclass(frozen=True)
class Parts:
    """Rows to train on, to choose the epoch by, and to judge by: each X, of a table encoded, and y."""

    train: tuple[Any, np.ndarray]
    validation: tuple[Any, np.ndarray] | None
    test: tuple[Any, np.ndarray]
    encoder: TableEncoder | None = None
    raw_test: np.ndarray | None = None  # of numbers: the test rows before they were encoded


def _parts(options: argparse.Namespace, data: Dataset) -> Parts:
    stratify = data.y if data.classes is not None else None
    y = data.y
    kept = np.arange(len(y))
    test = None
    if data.X_test is None or data.y_test is None:
        kept, test = split_indices(len(y), options.test_share, seed=options.seed, stratify=stratify)
    held = None
    if options.patience or options.schedule == "plateau":
        # Rows that choose the epoch or the learning rate must not be those that judge the result.
        own = None if stratify is None else stratify[kept]
        rest, chosen = split_indices(len(kept), 0.1, seed=options.seed, stratify=own)
        kept, held = kept[rest], kept[chosen]
    X, encoder = data.X, None
    if is_table_file(options.data):
        with naming(options.data):
            encoder = _encoder(options).fit(data.X, rows=kept)  # what is held out is not learned from
            X = encoder.transform(data.X)

    def part(rows: np.ndarray | None) -> Any:
        return None if rows is None else (X[rows] if encoder is None else Encoded(X[rows]), y[rows])

    judged: Any = (data.X_test, data.y_test) if test is None else part(test)
    raw = judged[0]
    if options.boundary and encoder is not None:
        with naming(options.data):
            raw = check_X(all_numbers(data.X)[test], name="--boundary: the test rows")
    return Parts(part(kept), part(held), judged, encoder, raw)


def _encoder(options: argparse.Namespace) -> TableEncoder:
    given = {name: getattr(options, name) for name in ("one_hot_limit", "impute") if getattr(options, name) is not None}
    if options.scaling is not None:
        given["scaling"] = None if options.scaling == "none" else options.scaling
    if options.categorical is not None:
        given["categorical_features"] = _categorical(options)
    return TableEncoder(**given)


def _categorical(options: argparse.Namespace) -> list[str] | None:
    return [name for name in (options.categorical or "").split(",") if name] or None


def _features(data: Dataset) -> int:
    return len(data.feature_names) if data.feature_names is not None else data.X.shape[1]


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
    if options.boundary and _features(data) != (1 if data.classes is None else 2):
        drawn = "two features of a classification or one of a regression"
        raise ValueError(f"--boundary draws {drawn}; this is a {data.task} with {_features(data)}")


def _network(options: argparse.Namespace, data: Dataset, parts: Parts) -> tuple[Network, Loss]:
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
    vectors = []
    if parts.encoder is not None:
        scaling = "none"
        if parts.encoder.code_sizes:
            vectors = [Embedding(tuple(parts.encoder.code_sizes), options.embedding_size or 8)]
        elif options.embedding_size is not None:
            raise ValueError("--embedding-size is for columns of many categories, and there are none")
    hidden = [
        Dense(units, options.activation, norm=options.norm, dropout=options.dropout, initializer=options.initializer)
        for units in options.hidden
    ]
    network = Network(
        [*vectors, *hidden, Dense(outputs)],
        n_features=data.X.shape[1] if parts.encoder is None else None,
        encoder=parts.encoder,
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
    options: argparse.Namespace, network: Network, data: Dataset, history: dict, parts: Parts, predicted: np.ndarray
) -> dict[str, str]:
    """Model and pictures; returns what was written where."""
    if options.output:
        network.save(options.output)
    if options.plot and not history:
        _say(options, f"{options.plot} is not drawn: training ended before its first epoch did")
        options.plot = None
    if options.plot:
        plots.learning_curves(history, options.plot)
    y_test = parts.test[1]
    if options.confusion and data.classes is not None:
        labels, _ = encode_labels(predicted, data.classes, name="predictions")
        plots.confusion_matrix(y_test, labels, list(data.classes), options.confusion)
    if options.boundary and data.classes is not None:
        plots.decision_boundary(network, parts.raw_test, data.classes[y_test], options.boundary)
    elif options.boundary:
        plots.regression_curve(network, parts.raw_test, y_test, options.boundary)
    kinds = {
        "model": options.output,
        "plot": options.plot,
        "confusion": options.confusion,
        "boundary": options.boundary,
    }
    return {kind: str(path) for kind, path in kinds.items() if path}


def _say(options: argparse.Namespace, message: str) -> None:
    if not options.quiet:
        print(message, file=sys.stderr)
