"""What a model of a fleet costs: microseconds per model and step for fleets of 1 to 512, beside one model trained alone.

    python bench/fleet.py --json bench/results/fleet-HOST-DATE.json

784-256-10 with ReLU, softmax cross-entropy and Adam at batch 128, every model with its own seed and order of the rows. The
first and the last model of a fleet must have the losses that they have when trained alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine  # puts the checkout on the path
import numpy as np
from timing import short, step_times
from train_step import write_json

import gpumlp as gm

MODELS = (1, 8, 64, 512)
CPU_MODELS = (1, 8)  # more take minutes there
CHECK_EPOCHS = 2
TOLERANCES = {"float32": 1e-4, "tf32": 1e-2}  # relative, of losses; tf32 has ten bits, and products of their own shapes
PRECISIONS = ("float32", "tf32")  # on a GPU


@dataclass(frozen=True)
class Config:
    """What every model is, and on what it trains."""

    layer_sizes: tuple[int, ...] = (784, 256, 10)
    batch: int = 128
    steps: int = 256  # of an epoch: its end is part of the time
    cpu_steps: int = 16

    def trainer(self, device: Any, seed: Any, precision: str) -> gm.Trainer:
        n_features, *hidden, n_classes = self.layer_sizes
        layers = [*(gm.Dense(units, "relu") for units in hidden), gm.Dense(n_classes)]
        models = len(seed) if isinstance(seed, list) else None
        network = gm.Network(
            layers, n_features=n_features, models=models, seed=seed, device=device, precision=precision
        )
        return gm.Trainer(network, "softmax_cross_entropy", "adam")

    def data(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        rng, n = np.random.default_rng(0), steps * self.batch
        X = rng.standard_normal((n, self.layer_sizes[0]), dtype=np.float32)
        return X, rng.integers(self.layer_sizes[-1], size=n)


def check(config: Config, device: Any, models: int, precision: str) -> float:
    """The largest relative difference between a model's losses in the fleet and alone; exits beyond the tolerance."""
    X, y = config.data(2)

    def losses(seed: Any) -> np.ndarray:
        trainer = config.trainer(device, seed, precision)
        history = trainer.fit(X, y, epochs=CHECK_EPOCHS, batch_size=config.batch, progress=False)
        return np.array(history["loss"]).T  # (models, epochs) or (epochs,)

    together = losses(list(range(models)))
    alone = np.stack([losses(0), losses(models - 1)])
    error = float(np.abs(together[[0, -1]] / alone - 1).max())
    if not error <= TOLERANCES[precision]:  # so written, a NaN fails too
        raise SystemExit(
            f"in a fleet of {models} a model does not train as it does alone: losses {together[[0, -1]].tolist()} and "
            f"{alone.tolist()} ({precision}, relative error {error:.1e}, allowed {TOLERANCES[precision]:.0e})"
        )
    return error


def run(
    config: Config,
    device: Any,
    name: str,
    models: Sequence[int],
    precision: str,
    seconds: float,
    deadline: float = np.inf,
    keep: Callable[[dict], None] = lambda found: None,
) -> None:
    """One model alone, then fleets; what is found goes to ``keep``. Fleets behind the deadline are left out."""
    X, y = config.data(config.cpu_steps if name == "cpu" else config.steps)
    about = {"device": name, "precision": precision}
    alone = step_times(config.trainer(device, 0, precision), X, y, config.batch, seconds)
    keep({**about, "models": None, **alone, "per_model_us": alone["median_us"]})
    for count in models:
        if time.monotonic() > deadline:
            return
        error = check(config, device, count, precision)
        trainer = config.trainer(device, list(range(count)), precision)
        found = step_times(trainer, X, y, config.batch, seconds)
        each = found["median_us"] / count
        keep(
            {
                **about,
                "models": count,
                **found,
                "per_model_us": round(each, 3),
                "faster_than_alone": round(alone["median_us"] / each, 3),
                "largest_loss_error": error,
            }
        )
        print(f"{name} {precision}, {count} models: {each:.2f} us per model and step", file=sys.stderr, flush=True)


def markdown(report: dict[str, Any]) -> str:
    """One row per device and precision, one column per fleet."""
    results, protocol = report["results"], report["protocol"]
    sizes = "-".join(map(str, protocol["layer_sizes"]))
    counts = sorted({r["models"] for r in results if r["models"] is not None})
    lines = [
        machine.in_words(report),
        "",
        f"{sizes}, batch {protocol['batch']}, Adam: µs per model and step (median), and how many times faster that is than "
        "one model alone, which M models one after the other take M times.",
    ]
    if not report["machine"]["gpu"]:
        lines += ["", f"**No GPU was measured**: {report['device']}."]
    lines += [
        "",
        "| | alone | " + " | ".join(f"fleet of {n}" for n in counts) + " |",
        "|---|---:|" + "---:|" * len(counts),
    ]
    for device, precision in dict.fromkeys((r["device"], r["precision"]) for r in results):
        own = {r["models"]: r for r in results if (r["device"], r["precision"]) == (device, precision)}
        cells = [short(own[None]["per_model_us"])]
        cells += [fleet_text(own.get(n)) for n in counts]
        lines.append(f"| {device.upper()}, {precision} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def fleet_text(found: dict[str, Any] | None) -> str:
    return f"{short(found['per_model_us'])} ({short(found['faster_than_alone'])}×)" if found else "–"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time fleets of networks beside one network alone.")

    def numbers(text: str) -> list[int]:
        if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give integers above 0 with commas between them")
        return [int(part) for part in text.split(",")]

    def option(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    option("--models", type=numbers, default=list(MODELS), metavar="N,N", help="models of a fleet, on the GPU")
    option("--cpu-models", type=numbers, default=list(CPU_MODELS), metavar="N,N", help="the same on the CPU")
    option("--block-seconds", type=float, default=0.5, help="of timing for each fleet (0.5)")
    option("--seconds", type=float, default=np.inf, help="begin no further fleet after so many (no limit)")
    option("--json", type=Path, metavar="PATH", help="also write machine, versions and all numbers there")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.monotonic(), parse(argv)
    runtime, reason = machine.find_device()
    report, config = machine.frame("fleet", runtime, reason), Config()
    report["protocol"] = {
        **{"layer_sizes": config.layer_sizes, "batch": config.batch, "steps_per_epoch": config.steps},
        **{"optimizer": "Adam", "checked_epochs": CHECK_EPOCHS, "tolerances": TOLERANCES},
    }
    report["results"] = []

    def keep(found: dict) -> None:
        report["results"].append(found)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, report)

    deadline = begin + args.seconds
    if runtime is None:
        print(f"the CPU is measured alone: {reason}", file=sys.stderr)
    else:
        from gpumlp.backends.gpu_backend import GpuBackend

        for precision in PRECISIONS:
            backend = GpuBackend(runtime)
            run(config, backend, "gpu", args.models, precision, args.block_seconds, deadline, keep)
    run(config, "cpu", "cpu", args.cpu_models, "float32", args.block_seconds, deadline, keep)
    print(markdown(report))


if __name__ == "__main__":
    main()
