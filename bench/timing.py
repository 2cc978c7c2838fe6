"""How long a training step takes, and a launch: the clock of the scripts for a GPU."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import numpy as np

UNTYPICAL = 2  # epochs at the beginning of a fit, in which a GPU compiles, plans and records
LEAST, MOST = 3, 2000  # epochs that count
GRAPH = 256  # launches that a timed graph holds at most


def summary(us: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of several measurements in microseconds."""
    return {"median_us": round(median(us), 3), "min_us": round(min(us), 3), "max_us": round(max(us), 3)}


def short(x: float) -> str:
    """Three digits, or all of a larger number; never an exponent."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def step_times(trainer: Any, X: Any, y: Any, batch_size: int, seconds: float) -> dict[str, Any]:
    """Microseconds per step over the epochs of a fit of about ``seconds``: all that ``Trainer.fit`` does in an epoch.

    A fit of a few epochs says how many fill the time. What a fit does once, such as recording a graph, is in neither.
    """
    steps = -(-len(X) // batch_size)

    def epochs(n: int) -> np.ndarray:
        history = trainer.fit(X, y, epochs=UNTYPICAL + n, batch_size=batch_size, progress=False)
        return np.diff(history["seconds"])[UNTYPICAL - 1 :]

    n = math.ceil(seconds / max(median(epochs(LEAST)), 1e-6))
    us = epochs(min(max(n, LEAST), MOST)) / steps * 1e6
    return summary(us.tolist()) | {"epochs": len(us), "steps_per_epoch": steps}


def launch_times(
    runtime: Any, launches: Sequence[Callable[[], None]], seconds: float = 0.02, rounds: int = 5
) -> list[float]:
    """Microseconds of one launch, in each of ``rounds`` rounds of about ``seconds``; the launches take turns.

    They are recorded as a graph, which is replayed many times between two waits: so neither the host's work for a launch
    nor the wait weighs. Where the device records nothing they are launched one by one.
    """
    for launch in launches:
        launch()  # loads the kernels

    def several(cycles: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(cycles):
                for launch in launches:
                    launch()

        return runtime.capture(run) if runtime.can_capture else run

    def us(run: Callable[[], None], replays: int, n: int) -> float:
        runtime.synchronize()
        begin = time.perf_counter()
        for _ in range(replays):
            run()
        runtime.synchronize()
        return (time.perf_counter() - begin) / (replays * n) * 1e6

    once = several(1)
    once()
    wanted = max(1, math.ceil(seconds / (us(once, 3, len(launches)) * 1e-6)))  # launches of a round
    cycles = max(1, min(wanted, GRAPH) // len(launches))
    n = cycles * len(launches)
    run, replays = several(cycles), -(-wanted // n)
    run()
    return [us(run, replays, n) for _ in range(rounds)]
