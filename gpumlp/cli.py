"""The command line: gpumlp train | evaluate | predict | info.

Results go to standard output (with ``--json`` as one JSON object), messages to standard error. Exit codes: 0, 2 for bad
usage or input, 1 for the rest.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import __version__, commands
from .network import PRECISIONS
from .optimizers import OPTIMIZERS
from .schedules import SCHEDULES
from .train_command import train


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpumlp", description="Train, evaluate and use multi-layer perceptrons.")
    parser.add_argument("--version", action="version", version=f"gpumlp {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="train | evaluate | predict | info")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print one JSON object on standard output")
    device = argparse.ArgumentParser(add_help=False)
    device.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:1 (default: auto)")

    def command(name: str, run: Any, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=help, description=run.__doc__, parents=[common, *parents])
        sub.set_defaults(run=run)
        return sub

    t = command("train", train, "train a network on a data set", device)
    t.add_argument(
        "data", help="digits, moons, circles, spirals, xor, sine; a folder of IDX files; .npz; .csv[.gz] or .parquet"
    )
    t.add_argument("--target", help="the target column of a table; several separated by commas")
    t.add_argument("--task", choices=["classification", "regression"], help="default: by the target's values")
    network = t.add_argument_group("network")
    network.add_argument(
        "--hidden", type=_widths, metavar="N[,N...]", help="hidden widths (default: 128, of a table 256)"
    )
    network.add_argument("--activation", default="relu", help="of the hidden layers (default: relu)")
    network.add_argument("--norm", choices=["batch", "layer"], help="normalisation before the non-linearity")
    network.add_argument(
        "--dropout",
        type=float,
        metavar="RATE",
        help="of the hidden layers (default: 0, over the classes of a table 0.2)",
    )
    network.add_argument("--input-dropout", type=float, default=0.0, metavar="RATE")
    network.add_argument("--initializer", help="default: by the activation")
    network.add_argument(
        "--standardize",
        choices=["columns", "global", "none"],
        help="of the input, for arrays (default: global for images, else columns)",
    )
    table = t.add_argument_group("tables", "How the columns of a CSV or Parquet file become numbers.")
    table.add_argument(
        "--categorical",
        metavar="NAME[,NAME...]",
        help="categories; the other columns are numbers (default: by their cells)",
    )
    table.add_argument(
        "--scaling",
        choices=["standard", "robust", "quantile", "piecewise", "none"],
        help="of numbers (default: standard)",
    )
    table.add_argument("--impute", choices=["median", "mean"], help="of missing numbers (default: median)")
    table.add_argument(
        "--one-hot-limit", type=int, metavar="N", help="more categories become learned vectors (default: 64)"
    )
    table.add_argument("--embedding-size", type=int, metavar="N", help="length of these vectors (default: 8)")
    training = t.add_argument_group("training")
    training.add_argument("--loss", help="default: softmax_cross_entropy, or squared_error")
    training.add_argument(
        "--optimizer", default="adam", choices=list(OPTIMIZERS), metavar="NAME", help=", ".join(OPTIMIZERS)
    )
    training.add_argument("--learning-rate", type=float, metavar="RATE", help="default: the optimizer's")
    training.add_argument("--schedule", metavar="NAME", help=", ".join(SCHEDULES))
    training.add_argument("--warmup", type=float, default=0.0, metavar="EPOCHS", help="of the cosine schedule")
    training.add_argument("--epochs", type=int, help="default: 20, of a table at most 100")
    training.add_argument("--batch-size", type=int, help="default: 64, of a table of 10,000 rows or more 256")
    training.add_argument(
        "--patience",
        type=int,
        metavar="EPOCHS",
        help="stop early, by a tenth of the rows held out; 0: do not (default: 0, of a table 8)",
    )
    training.add_argument("--ema", type=float, metavar="DECAY", help="average the weights, say 0.999")
    training.add_argument("--time-limit", type=float, metavar="SECONDS")
    training.add_argument("--precision", default="float32", choices=PRECISIONS, help="what a GPU may do with float32")
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
    outputs.add_argument(
        "--output", metavar="FILE", help="write the model (.safetensors; default of a table: its name, in this folder)"
    )
    outputs.add_argument("--plot", metavar="FILE", help="draw the learning curves (.png, .svg, .pdf)")
    outputs.add_argument("--confusion", metavar="FILE", help="draw the confusion matrix of the test rows")
    outputs.add_argument("--boundary", metavar="FILE", help="draw decisions over two features, or the curve over one")
    outputs.add_argument("--log", metavar="FILE", help="write each epoch as a line of CSV")
    outputs.add_argument("--quiet", action="store_true", help="no progress bar, no messages")

    e = command("evaluate", commands.evaluate, "loss and metrics of a saved model", device)
    e.add_argument("model")
    e.add_argument("data", help="as for train")
    e.add_argument("--target", help="default: the column that the model was trained on")

    p = command("predict", commands.predict, "predictions of a saved model", device)
    p.add_argument("model")
    p.add_argument("rows", help=".csv[.gz] with a header, .parquet, .npz with X, or IDX images")
    p.add_argument("--proba", action="store_true", help="probabilities instead of labels")
    p.add_argument("--output", metavar="FILE", help="write CSV there instead of standard output")

    command("info", commands.info, "versions, processors, BLAS, device")
    return parser


def _widths(text: str) -> list[int]:
    try:
        widths = [int(part) for part in text.split(",")] if text not in ("", "none") else []
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: widths are integers separated by commas, say 128,64") from None
    if any(width < 1 for width in widths):
        raise argparse.ArgumentTypeError(f"{text!r}: widths must be at least 1")
    return widths


def _finite(value: Any) -> Any:
    """The same with null for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value
