"""The command line: gpumlp train | evaluate | predict | info.

Results go to standard output (with ``--json`` as one JSON object), messages to standard error. Exit codes: 0, 2 for bad
usage or input, 1 for the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    try:
        options = parser.parse_args(arguments)
    except SystemExit as stop:  # argparse has printed usage or help
        return int(stop.code or 0)
    try:
        result, text = options.run(options)
        print(json.dumps(_finite(result), allow_nan=False) if options.json else text)
    except (ValueError, TypeError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        print(f"gpumlp {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nobody is left to tell
        return 1
    except KeyboardInterrupt:
        print(f"gpumlp {options.command}: interrupted", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, ArithmeticError, ImportError, MemoryError) as error:
        print(f"gpumlp {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


# --- train ----------------------------------------------------------------------------------------------------------


def train(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Train on a data set; evaluate on its test rows, or on held-out ones; write what was asked for."""
    from .callbacks import CSVLogger, EarlyStopping
    from .data import load, split_indices
    from .layers import Dense
    from .losses import LOSSES
    from .network import Network
    from .optimizers import OPTIMIZERS
    from .trainer import Trainer

    for path in (options.output, options.plot, options.confusion, options.boundary, options.log):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{path}: the folder {Path(path).absolute().parent} does not exist")
    if options.plot or options.confusion or options.boundary:
        from . import plots

        plots.require_matplotlib()
        for path in (options.plot, options.confusion, options.boundary):
            plots.check_path(path)
    data = load(options.data, target=options.target, task=options.task)
    is_classifier = data.task == "classification"
    if options.confusion and not is_classifier:
        raise ValueError("--confusion needs classes; this is a regression")
    if options.boundary and data.X.shape[1] != 1 + is_classifier:
        raise ValueError(f"--boundary draws two features of a classification or one of a regression, not {data.X.shape[1]}")
    X, y, X_test, y_test = data.X, data.y, data.X_test, data.y_test
    if X_test is None:
        kept, held = split_indices(len(X), options.test_share, seed=options.seed, stratify=y if is_classifier else None)
        X, y, X_test, y_test = X[kept], y[kept], X[held], y[held]
    _say(options, f"{data.name}: {data.task}, {len(X)} rows to train on, {len(X_test)} to test on, {X.shape[1]} features")
    loss = options.loss or ("softmax_cross_entropy" if is_classifier else "squared_error")
    if loss in LOSSES and LOSSES[loss].is_classifier != is_classifier:
        raise ValueError(f"--loss {loss} does not fit {data.task}; losses for it: {_losses_for(is_classifier)}")
    outputs = len(data.classes) if data.classes is not None else y.shape[1]
    if loss == "binary_cross_entropy":
        if outputs != 2:
            raise ValueError(f"--loss binary_cross_entropy needs two classes; {data.name} has {outputs}")
        outputs = 1
    hidden = [
        Dense(units, options.activation, norm=options.norm, dropout=options.dropout, initializer=options.initializer)
        for units in options.hidden
    ]
    scaling = options.standardize or ("global" if data.image_shape else "columns")
    network = Network(
        [*hidden, Dense(outputs)],
        n_features=X.shape[1],
        seed=options.seed,
        device=options.device,
        standardize=False if scaling == "none" else scaling,
        standardize_targets=loss in LOSSES and LOSSES[loss].output == "identity",
        input_dropout=options.input_dropout,
    )
    network.feature_names, network.target_names = data.feature_names, data.target_names
    penalties = {"l1": options.l1, "l2": options.l2, "clip_norm": options.clip_norm}
    if options.weight_decay is not None:
        penalties["weight_decay"] = options.weight_decay
    if options.learning_rate is not None:
        penalties["learning_rate"] = options.learning_rate
    optimizer = OPTIMIZERS[options.optimizer](**penalties)
    smoothing = {"label_smoothing": options.label_smoothing} if options.label_smoothing else {}
    trainer = Trainer(
        network, _loss(loss, smoothing), optimizer, schedule=_schedule(options), augment=_augmentation(options, data.image_shape)
    )
    _say(options, network.summary())
    callbacks: list[Any] = []
    validation = (X_test, y_test)
    if options.patience is not None:  # the test rows must not choose the epoch
        kept, held = split_indices(len(X), 0.1, seed=options.seed, stratify=y if is_classifier else None)
        validation = (X[held], y[held])
        X, y = X[kept], y[kept]
        callbacks.append(EarlyStopping(options.patience))
    if options.log:
        callbacks.append(CSVLogger(options.log))
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
    network_test = {"test": test, "seconds": history["seconds"][-1] if history else None, "stopped": trainer.stopped}
    files = {}
    if options.output:
        network.save(options.output)
        files["model"] = str(options.output)
    if options.plot:
        plots.learning_curves(history, options.plot)
        files["plot"] = str(options.plot)
    if options.confusion:
        plots.confusion_matrix(data.classes[y_test], network.predict(X_test), data.classes, options.confusion)
        files["confusion"] = str(options.confusion)
    if options.boundary:
        _boundary(plots, network, X_test, y_test, data, options.boundary)
        files["boundary"] = str(options.boundary)
    result = {
        "data": data.name,
        "task": data.task,
        "parameters": network.n_parameters,
        "device": network.device_reason,
        "epochs": len(history.get("epoch", [])),
        **network_test,
        "history": history,
        "files": files,
    }
    written = "".join(f"\n{kind}: {path}" for kind, path in files.items())
    text = f"test: {_figures(test)}; {result['epochs']} epochs in {network_test['seconds'] or 0:.1f} s{written}"
    return result, text


def _measure(trainer: Any, X: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """Loss and metrics on labels that are indices already."""
    network = trainer.network
    classes, network.classes = network.classes, None
    try:
        return trainer.evaluate(X, y)
    finally:
        network.classes = classes


def _loss(name: str, options: dict[str, Any]) -> Any:
    from .losses import Loss

    return Loss(name, **options)


def _losses_for(is_classifier: bool) -> str:
    from .losses import LOSSES

    return ", ".join(name for name, row in LOSSES.items() if row.is_classifier == is_classifier)


def _schedule(options: argparse.Namespace) -> Any:
    from .schedules import Cosine, get_schedule

    return Cosine(warmup=options.warmup) if options.schedule == "cosine" else get_schedule(options.schedule)


def _augmentation(options: argparse.Namespace, image_shape: tuple | None) -> list[Any]:
    from .augment import GaussianNoise, Mixup, RandomShift

    rows: list[Any] = []
    if options.shift:
        if image_shape is None or len(image_shape) != 2:
            raise ValueError("--shift moves images; these rows are none")
        rows.append(RandomShift(options.shift, tuple(image_shape)))
    if options.noise:
        rows.append(GaussianNoise(options.noise))
    if options.mixup:
        rows.append(Mixup(options.mixup))
    return rows


def _boundary(plots: Any, network: Any, X: np.ndarray, y: np.ndarray, data: Any, path: str) -> None:
    if data.task == "classification":
        plots.decision_boundary(network, X, data.classes[y], path)
    else:
        plots.regression_curve(network, X, y, path)


# --- evaluate, predict, info ----------------------------------------------------------------------------------------


def evaluate(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Loss and metrics of a saved model on a data set: its test rows where it has some, else all rows."""
    from .data import encode_labels, load
    from .files import load as load_model
    from .trainer import Trainer

    network = load_model(options.model, options.device)
    if network.loss is None:
        raise ValueError(f"{options.model} holds no loss to evaluate by; train it with a Trainer, or assign network.loss")
    target = options.target or (",".join(network.target_names) if network.target_names else None)
    is_csv = str(options.data).lower().endswith((".csv", ".csv.gz"))
    task = "classification" if network.loss.row.is_classifier else "regression"
    data = load(options.data, target=target if is_csv else options.target, task=task)
    X, y = (data.X, data.y) if data.X_test is None else (data.X_test, data.y_test)
    if network.feature_names is not None and data.feature_names is not None:
        missing = [name for name in network.feature_names if name not in data.feature_names]
        if missing:
            raise ValueError(f"{options.data} lacks the columns {', '.join(missing)} that {options.model} was trained on")
        X = X[:, [data.feature_names.index(name) for name in network.feature_names]]
    if X.shape[1] != network.n_features:
        raise ValueError(f"{options.model} takes {network.n_features} features, {options.data} has {X.shape[1]}")
    if data.classes is not None and network.classes is not None:
        y = encode_labels(data.classes[y], network.classes, name=f"{options.data}: target")[0]
    found = _measure(Trainer(network, network.loss), X, y)
    rows = {"rows": len(X)}
    return {"model": str(options.model), "data": str(options.data), **rows, **found}, f"{_figures(found)} on {len(X)} rows"


def predict(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Predictions of a saved model for rows without targets, as CSV."""
    import csv
    import io

    from .data import read_rows
    from .files import load as load_model
    from .files import write_atomically

    network = load_model(options.model, options.device)
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
    return {"rows": len(X), "columns": header, "output": str(options.output)}, f"{len(X)} rows written to {options.output}"


def info(options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Versions, processors, BLAS, and which backend "auto" takes and why."""
    import os
    import platform

    from .backends import get_backend

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
        import platform

        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


# --- usage ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpumlp", description="Train, evaluate and use multi-layer perceptrons.")
    parser.add_argument("--version", action="version", version=f"gpumlp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="train | evaluate | predict | info")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")

    def command(name: str, run: Any, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=help, description=run.__doc__, parents=[common, *parents])
        sub.set_defaults(run=run)
        return sub

    t = command("train", train, "train a network on a data set", device)
    t.add_argument("data", help="digits, moons, circles, spirals, xor, sine; a folder of IDX files; .npz; .csv[.gz]")
    t.add_argument("--target", help="the target column of a CSV file; several separated by commas")
    t.add_argument("--task", choices=["classification", "regression"], help="default: by the target's values")
    network = t.add_argument_group("network")
    network.add_argument("--hidden", type=_widths, default=[128], metavar="N[,N...]", help="hidden widths (default: 128)")
    network.add_argument("--activation", default="relu", help="of the hidden layers (default: relu)")
    network.add_argument("--norm", choices=["batch", "layer"], help="normalisation before the non-linearity")
    network.add_argument("--dropout", type=float, default=0.0, metavar="RATE", help="of the hidden layers")
    network.add_argument("--input-dropout", type=float, default=0.0, metavar="RATE")
    network.add_argument("--initializer", help="default: by the activation")
    network.add_argument(
        "--standardize", choices=["columns", "global", "none"], help="of the input (default: global for images, else columns)"
    )
    training = t.add_argument_group("training")
    training.add_argument("--loss", help="default: softmax_cross_entropy, or squared_error")
    training.add_argument("--optimizer", default="adam", choices=_optimizers(), metavar="NAME", help=", ".join(_optimizers()))
    training.add_argument("--learning-rate", type=float, metavar="RATE", help="default: the optimizer's")
    training.add_argument("--schedule", metavar="NAME", help="constant, step, exponential, cosine, one_cycle, plateau")
    training.add_argument("--warmup", type=float, default=0.0, metavar="EPOCHS", help="of the cosine schedule")
    training.add_argument("--epochs", type=int, default=20)
    training.add_argument("--batch-size", type=int, default=64)
    training.add_argument("--patience", type=int, metavar="EPOCHS", help="stop early, by a tenth of the rows held out")
    training.add_argument("--time-limit", type=float, metavar="SECONDS")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--test-share", type=float, default=0.2, help="held out where the data has no test rows")
    regular = t.add_argument_group("regularisation")
    regular.add_argument("--l1", type=float, default=0.0)
    regular.add_argument("--l2", type=float, default=0.0)
    regular.add_argument("--weight-decay", type=float)
    regular.add_argument("--clip-norm", type=float)
    regular.add_argument("--label-smoothing", type=float, default=0.0)
    regular.add_argument("--noise", type=float, default=0.0, metavar="STD", help="Gaussian noise on the input")
    regular.add_argument("--mixup", type=float, default=0.0, metavar="ALPHA")
    regular.add_argument("--shift", type=int, default=0, metavar="PIXELS", help="random shifts of images")
    outputs = t.add_argument_group("results")
    outputs.add_argument("--output", metavar="FILE", help="write the model (.safetensors)")
    outputs.add_argument("--plot", metavar="FILE", help="draw the learning curves (.png, .svg, .pdf)")
    outputs.add_argument("--confusion", metavar="FILE", help="draw the confusion matrix of the test rows")
    outputs.add_argument("--boundary", metavar="FILE", help="draw decisions over two features, or the curve over one")
    outputs.add_argument("--log", metavar="FILE", help="write each epoch as a line of CSV")
    outputs.add_argument("--quiet", action="store_true", help="no progress bar, no messages")

    e = command("evaluate", evaluate, "loss and metrics of a saved model", device)
    e.add_argument("model")
    e.add_argument("data", help="as for train")
    e.add_argument("--target", help="default: the column that the model was trained on")

    p = command("predict", predict, "predictions of a saved model", device)
    p.add_argument("model")
    p.add_argument("rows", help=".csv[.gz] with a header, .npz with X, or IDX images")
    p.add_argument("--proba", action="store_true", help="probabilities instead of labels")
    p.add_argument("--output", metavar="FILE", help="write CSV there instead of standard output")

    command("info", info, "versions, processors, BLAS, device")
    return parser


def _optimizers() -> list[str]:
    from .optimizers import OPTIMIZERS

    return list(OPTIMIZERS)


def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")] if text not in ("", "none") else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: widths are integers separated by commas, say 128,64") from None
    if any(width < 1 for width in widths):
        raise argparse.ArgumentTypeError(f"{text!r}: widths must be at least 1")
    return widths


def _say(options: argparse.Namespace, message: str) -> None:
    if not options.quiet:
        print(message, file=sys.stderr)


def _figures(found: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in found.items())


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
