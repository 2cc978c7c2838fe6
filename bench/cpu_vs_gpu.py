"""Where the crossover lies: the time of a training step on the CPU and on the GPU, over widths and batch sizes.

    python bench/cpu_vs_gpu.py --json bench/results/cpu-vs-gpu-HOST-DATE.json --plot crossover.png

Both train the same network on the same rows first and must report the same losses. Without a GPU the CPU is measured alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import machine  # puts the checkout on the path
import numpy as np
from timing import short, step_times
from train_step import write_json

import gpumlp as gm
from gpumlp.plots import BLUE, CLASS_MARKERS, ORANGE

WIDTHS = (16, 64, 256, 1024, 4096)
BATCHES = (16, 64, 256, 1024, 4096)
DEPTHS = (1, 2)  # hidden layers
FEATURES, CLASSES = 64, 10
CHECK_STEPS = 4
TOLERANCE = 1e-3  # relative, of float32 losses over CHECK_STEPS updates
MOST_STEPS, MOST_ROWS = 256, 1 << 18  # of an epoch that is timed
COLOURS = {"cpu": BLUE, "gpu": ORANGE}


class Cell(NamedTuple):
    """One network at one batch size."""

    depth: int
    width: int
    batch: int

    @property
    def parameters(self) -> int:
        sizes = [FEATURES, *[self.width] * self.depth, CLASSES]
        return sum((fan_in + 1) * fan_out for fan_in, fan_out in pairwise(sizes))

    @property
    def flop(self) -> int:
        """Of the matrix products of a step: forward and backward by weights and by values, two for each weight and row."""
        return 6 * self.parameters * self.batch

    def trainer(self, device: Any) -> gm.Trainer:
        layers = [*(gm.Dense(self.width, "relu") for _ in range(self.depth)), gm.Dense(CLASSES)]
        network = gm.Network(layers, n_features=FEATURES, device=device)
        return gm.Trainer(network, "softmax_cross_entropy", "adam")

    def data(self, steps: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(0)
        n = steps * self.batch
        return rng.standard_normal((n, FEATURES), dtype=np.float32), rng.integers(CLASSES, size=n)


def grid(depths: Sequence[int], widths: Sequence[int], batches: Sequence[int]) -> list[Cell]:
    """All cells, the least work first."""
    cells = [Cell(depth, width, batch) for depth in depths for width in widths for batch in batches]
    return sorted(cells, key=lambda cell: cell.flop)


def measure_device(cell: Cell, device: Any, seconds: float) -> tuple[list[float], dict[str, Any]]:
    """The losses of the first steps, and the time of a step."""
    trainer = cell.trainer(device)
    X, y = cell.data(1)
    first = trainer.fit(X, y, epochs=CHECK_STEPS, batch_size=cell.batch, progress=False)
    one = max(np.diff(first["seconds"]).min(), 1e-6)
    steps = int(np.clip(seconds / 4 / one, 2, min(MOST_STEPS, max(2, MOST_ROWS // cell.batch))))
    return first["loss"], step_times(trainer, *cell.data(steps), cell.batch, seconds)


def measure(cell: Cell, devices: dict[str, Any], seconds: float) -> dict[str, Any]:
    """One cell on every device; exits where their losses differ."""
    found: dict[str, Any] = {**cell._asdict(), "parameters": cell.parameters, "flop": cell.flop}
    losses = {}
    for name, device in devices.items():
        losses[name], found[name] = measure_device(cell, device, seconds)
    reference = np.array(losses["cpu"])
    found["largest_loss_error"] = {}
    for name, values in losses.items():
        error = float(np.abs(np.array(values) / reference - 1).max())
        if not error <= TOLERANCE:  # so written, a NaN fails too
            raise SystemExit(
                f"{name} and cpu train {cell} differently: losses {values} and {losses['cpu']} (relative error "
                f"{error:.1e}, allowed {TOLERANCE:.0e}); their times would mean nothing"
            )
        found["largest_loss_error"][name] = error
    return found


def run(
    cells: Sequence[Cell],
    gpu: Any,
    seconds: float,
    deadline: float = np.inf,
    keep: Callable[[list], None] = lambda results: None,
) -> list[dict[str, Any]]:
    """Measures cell after cell on the CPU and, where ``gpu`` is a backend, there; none begins behind the deadline."""
    devices = {"cpu": "cpu"} if gpu is None else {"cpu": "cpu", "gpu": gpu}
    results: list[dict[str, Any]] = []
    for cell in cells:
        if time.monotonic() > deadline:
            break
        found = measure(cell, devices, seconds)
        results.append(found)
        told = ", ".join(f"{name} {found[name]['median_us']:.1f}" for name in devices)
        print(
            f"depth {cell.depth}, width {cell.width}, batch {cell.batch}: {told} us a step", file=sys.stderr, flush=True
        )
        keep(results)
    return results


# --- the report ---------------------------------------------------------------------------------------------------


def crossover(results: Sequence[dict[str, Any]]) -> str:
    """Between how much work a step the GPU overtakes the CPU, in a sentence."""
    both = [r for r in results if "gpu" in r]
    if not both:
        return "No GPU was measured: there is no crossover to show."
    ahead = [r["flop"] for r in both if r["gpu"]["median_us"] < r["cpu"]["median_us"]]
    behind = [r["flop"] for r in both if r["gpu"]["median_us"] >= r["cpu"]["median_us"]]
    if not ahead:
        return f"The CPU is faster everywhere, up to {work(max(behind))} a step."
    if not behind:
        return f"The GPU is faster everywhere, from {work(min(ahead))} a step on."
    if max(behind) < min(ahead):
        return f"The crossover: the CPU is faster up to {work(max(behind))} a step, the GPU from {work(min(ahead))} on."
    return (
        f"The crossover: the CPU is faster below {work(min(ahead))} a step, the GPU above {work(max(behind))}; in between "
        "it depends on width and batch size."
    )


def work(flop: float) -> str:
    """Two significant digits with a unit."""
    for unit, size in (("TFLOP", 1e12), ("GFLOP", 1e9), ("MFLOP", 1e6)):
        if flop >= size:
            return f"{float(f'{flop / size:.2g}'):g} {unit}"
    return f"{float(f'{flop / 1e3:.2g}'):g} kFLOP"


def cell_text(found: dict[str, Any] | None) -> str:
    """`CPU / GPU (ratio)` in microseconds, bold where the GPU is faster; the CPU alone where there is no GPU."""
    if found is None:
        return "–"
    cpu = found["cpu"]["median_us"]
    if "gpu" not in found:
        return short(cpu)
    gpu = found["gpu"]["median_us"]
    text = f"{short(cpu)} / {short(gpu)} ({short(cpu / gpu)}×)"
    return f"**{text}**" if gpu < cpu else text


def markdown(report: dict[str, Any]) -> str:
    """A table for each depth: one row per batch size, one column per width."""
    results, gpu = report["results"], report["machine"]["gpu"]
    what = "CPU / GPU (how many times faster the GPU is), bold where the GPU is ahead" if gpu else "CPU alone"
    lines = [machine.in_words(report), "", f"µs per training step, Adam, float32, median: {what}. {crossover(results)}"]
    if not gpu:
        lines += ["", f"**No GPU was measured**: {report['device']}."]
    grid = report["protocol"]
    for depth in grid["depths"]:
        lines += [
            "",
            f"| {FEATURES}-{'-'.join(['width'] * depth)}-{CLASSES} | " + " | ".join(map(str, grid["widths"])) + " |",
        ]
        lines.append("|---|" + "---:|" * len(grid["widths"]))
        for batch in grid["batches"]:
            by_width = {r["width"]: r for r in results if (r["depth"], r["batch"]) == (depth, batch)}
            cells = " | ".join(cell_text(by_width.get(width)) for width in grid["widths"])
            lines.append(f"| batch {batch} | {cells} |")
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    """Time over work, both logarithmic: a line for each device and batch size, a panel for each depth."""
    from matplotlib.figure import Figure

    results, depths = report["results"], report["protocol"]["depths"]
    figure = Figure(figsize=(1.5 + 4.5 * len(depths), 4.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(depths), squeeze=False, sharey=True)[0]
    for panel, depth in zip(panels, depths, strict=True):
        for device, colour in COLOURS.items():
            for marker, batch in zip(CLASS_MARKERS, report["protocol"]["batches"], strict=False):
                line = [r for r in results if (r["depth"], r["batch"]) == (depth, batch) and device in r]
                if line:
                    x, us = [r["flop"] for r in line], [r[device]["median_us"] for r in line]
                    label = f"{device.upper()}, batch {batch}"
                    panel.plot(x, us, color=colour, marker=marker, markersize=4, linewidth=1, label=label)
        panel.set(xscale="log", yscale="log", xlabel="FLOP per step", title=f"{depth} hidden layer{'s'[: depth > 1]}")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("µs per step")
    panels[-1].legend(fontsize=7, edgecolor="none", framealpha=0.85, loc="upper left")
    gpu = report["machine"]["gpu"]
    names = f"{report['machine']['cpu']}, {report['machine']['cores']} cores, "
    figure.suptitle(names + (f"and {gpu['description']}" if gpu else "alone: no GPU was found"), fontsize=9)
    figure.savefig(path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps on CPU and GPU over widths and batch sizes.")

    def numbers(text: str) -> list[int]:
        if not all(part.isdigit() and int(part) > 0 for part in text.split(",")):
            raise argparse.ArgumentTypeError(f"{text} is not allowed; give integers above 0 with commas between them")
        return [int(part) for part in text.split(",")]

    def option(flag: str, **kwargs: Any) -> None:
        parser.add_argument(flag, **kwargs)

    option("--widths", type=numbers, default=list(WIDTHS), metavar="N,N", help="units of the hidden layers")
    option("--batches", type=numbers, default=list(BATCHES), metavar="N,N", help="rows of a step")
    option("--depths", type=numbers, default=list(DEPTHS), metavar="N,N", help="hidden layers")
    option("--cell-seconds", type=float, default=0.3, help="of timing for each cell and device (0.3)")
    option("--seconds", type=float, default=np.inf, help="begin no further cell after so many (no limit)")
    option("--json", type=Path, metavar="PATH", help="also write machine, versions and all numbers there")
    option("--plot", type=Path, metavar="PATH", help="also draw time over work; needs matplotlib")
    args = parser.parse_args(argv)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error('--plot needs matplotlib, which is not installed; run: pip install "gpumlp[plot]"')
    return args


def main(argv: Sequence[str] | None = None) -> None:
    begin, args = time.monotonic(), parse(argv)
    runtime, reason = machine.find_device()
    report = machine.frame("cpu-vs-gpu", runtime, reason)
    gpu = None
    if runtime is None:
        print(f"the CPU is measured alone: {reason}", file=sys.stderr)
    else:
        from gpumlp.backends.gpu_backend import GpuBackend

        gpu = GpuBackend(runtime)
    report["protocol"] = {
        **{"depths": args.depths, "widths": args.widths, "batches": args.batches, "cell_seconds": args.cell_seconds},
        **{"dtype": "float32", "optimizer": "Adam", "checked_steps": CHECK_STEPS, "tolerance": TOLERANCE},
    }

    def keep(results: list) -> None:
        report["results"], report["crossover"] = results, crossover(results)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.json, report)

    keep([])
    run(grid(args.depths, args.widths, args.batches), gpu, args.cell_seconds, begin + args.seconds, keep)
    if args.plot:
        args.plot.parent.mkdir(parents=True, exist_ok=True)
        plot(report, args.plot)
    print(markdown(report))


if __name__ == "__main__":
    main()
