"""Adult's official test rows, three ways: without a flag, with early stopping, and by a recipe.

    python bench/adult.py
    python bench/adult.py --data path/to/adult --device cuda --json

The folder holds train.csv.gz and test.csv.gz, 32,561 and 16,281 rows of 14 columns with categories and missing cells, and
the target "income". The run fails where an accuracy is below the one that README.md names.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import machine  # puts the checkout on the path
import numpy as np

import gpumlp as gm
from gpumlp.cli import main as command_line

FOLDER = Path(os.environ.get("GPUMLP_DATA", machine.ROOT.parent / "shared" / "data")) / "adult"
TARGET = "income"
GOALS = {"command line, no flag": 0.852, "MLPClassifier": 0.852, "recipe": 0.86}
MODELS = 8


def no_flag(folder: Path, device: str) -> float:
    """gpumlp train and evaluate; a fifth of the training rows is held out for its own test, a tenth to stop by."""
    with tempfile.TemporaryDirectory() as scratch:
        model = f"{scratch}/adult.safetensors"
        train = [
            "train",
            f"{folder}/train.csv.gz",
            "--target",
            TARGET,
            "--output",
            model,
            "--device",
            device,
            "--quiet",
        ]
        if command_line(train):
            raise SystemExit("gpumlp train failed: see above")
        test = gm.data.load_table(folder / "test.csv.gz", target=TARGET)
        network = gm.load(model, device)
        return accuracy(network.predict(test.X), test)


def classifier(folder: Path, device: str) -> float:
    """gm.MLPClassifier over DataFrames, with scikit-learn's early stopping."""
    import pandas as pd  # type: ignore[import-untyped]

    train, test = (pd.read_csv(folder / f"{part}.csv.gz") for part in ("train", "test"))
    y, y_test = train.pop(TARGET), test.pop(TARGET)
    return gm.MLPClassifier(early_stopping=True, random_state=0, device=device).fit(train, y).score(test, y_test)


def recipe(folder: Path, device: str) -> float:
    """Numbers as pieces of their range, and a fleet whose models differ in seed alone, averaged."""
    train, test = (gm.data.load_table(folder / f"{part}.csv.gz", target=TARGET) for part in ("train", "test"))
    encoder = gm.TableEncoder(scaling="piecewise").fit(train.X)
    layers = [gm.Dense(256, "relu", dropout=0.3), gm.Dense(256, "relu", dropout=0.3), gm.Dense(2)]
    network = gm.Network(layers, encoder=encoder, models=MODELS, seed=0, device=device)
    trainer = gm.Trainer(network, "softmax_cross_entropy", gm.AdamW(weight_decay=0.05), schedule="cosine")
    trainer.fit(train.X, train.classes[train.y], epochs=12, batch_size=256, progress=False)
    probabilities = network.predict_proba(test.X).mean(axis=0)  # (n, 2)
    return accuracy(network.classes[probabilities.argmax(axis=1)], test)


def accuracy(predicted: np.ndarray, test: gm.data.Dataset) -> float:
    return float((predicted == test.classes[test.y]).mean())  # type: ignore[index]


def measure(folder: Path, device: str) -> list[dict[str, Any]]:
    results = []
    for (name, goal), way in zip(GOALS.items(), (no_flag, classifier, recipe), strict=True):
        begin = time.perf_counter()
        found = way(folder, device)
        results.append({"way": name, "accuracy": found, "goal": goal, "seconds": time.perf_counter() - begin})
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="FOLDER", help="with train.csv.gz and test.csv.gz")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    if not (args.data / "train.csv.gz").is_file():
        raise SystemExit(f"{args.data} has no train.csv.gz: name the folder of the data set with --data or GPUMLP_DATA")
    results = measure(args.data, args.device)
    if args.json:
        print(json.dumps(results))
    else:
        print("| | accuracy on the official test rows | at least | seconds, reading included |\n|---|---:|---:|---:|")
        for r in results:
            print(f"| {r['way']} | {r['accuracy']:.4f} | {r['goal']} | {r['seconds']:.1f} |")
    if any(r["accuracy"] < r["goal"] for r in results):
        raise SystemExit("an accuracy is below what README.md names")


if __name__ == "__main__":
    main()
