"""Learning-rate schedules: the factor by which the learning rate is multiplied, as a function of time.

Time is counted in epochs, as a float: step k of epoch e (both from 0) is at ``e + k / steps_per_epoch``. Warm-ups and
periods are in epochs too, so a schedule means the same for every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, Protocol, runtime_checkable

import numpy as np


@runtime_checkable
class Schedule(Protocol):
    """Anything that maps a moment of training to a factor of the learning rate.

    Called with ``epoch`` (float or array, any shape; from 0) and ``epochs`` (the length of the training), it returns
    the factor in the shape of ``epoch``, float64. It must be pure: asking twice gives the same answer.
    """

    def __call__(self, epoch: Any, epochs: int) -> Any: ...


def _check(schedule: object, name: str, allowed: str, ok: Callable[[Any], bool]) -> None:
    value = getattr(schedule, name)
    if not isinstance(value, Real) or isinstance(value, bool) or not ok(value):
        raise ValueError(f"{type(schedule).__name__}: {name}={value!r} must be {allowed}")


def _cosine_leg(t: Any, first: float, last: float) -> Any:
    """Half a cosine from ``first`` at t = 0 to ``last`` at t = 1; flat outside."""
    return last + (first - last) * 0.5 * (1.0 + np.cos(np.pi * np.clip(t, 0.0, 1.0)))


@dataclass(frozen=True)
class Constant:
    """The learning rate as given: factor = 1."""

    def __call__(self, epoch: Any, epochs: int) -> Any:
        return np.ones(np.shape(epoch))[()]


@dataclass(frozen=True)
class StepDecay:
    """Drops in steps: factor ** floor(epoch / every).

    Args:
        every: epochs between drops, > 0.
        factor: what each drop multiplies by, in (0, 1].

    Raises:
        ValueError: for a setting outside these ranges.

    Source: Krizhevsky et al. 2012 (section 5) lowered it by hand; He et al. 2016 (section 3.4) at fixed times.
    """

    every: float = 10
    factor: float = 0.1

    def __post_init__(self) -> None:
        _check(self, "every", "a number of epochs > 0", lambda v: 0 < v < math.inf)
        _check(self, "factor", "in (0, 1]", lambda v: 0 < v <= 1)

    def __call__(self, epoch: Any, epochs: int) -> Any:
        return self.factor ** np.floor(np.asarray(epoch, np.float64) / self.every)


@dataclass(frozen=True)
class Exponential:
    """Smooth decay: factor ** epoch.

    Args:
        factor: what one whole epoch multiplies by, in (0, 1].

    Raises:
        ValueError: for a factor outside this range.

    Source: Robbins & Monro 1951 asked for decay, this form is folklore (Goodfellow et al. 2016, section 8.3.1).
    """

    factor: float = 0.95

    def __post_init__(self) -> None:
        _check(self, "factor", "in (0, 1]", lambda v: 0 < v <= 1)

    def __call__(self, epoch: Any, epochs: int) -> Any:
        return self.factor ** np.asarray(epoch, np.float64)


@dataclass(frozen=True)
class Cosine:
    """A linear warm-up, then half a cosine down to ``final``.

        epoch / warmup                                      while epoch < warmup (so the very first step has factor 0)
        final + (1 - final) (1 + cos(π t)) / 2              after it, t = (epoch - warmup) / (epochs - warmup)

    Args:
        warmup: length of the warm-up in epochs, >= 0 and shorter than the training.
        final: factor at the end of training, in [0, 1].

    Raises:
        ValueError: for a setting outside these ranges; when called, if the warm-up fills the whole training.

    Source: Loshchilov & Hutter 2017 (SGDR, equation 5, without restarts); warm-up: Goyal et al. 2017 (section 2.2).
    """

    warmup: float = 0.0
    final: float = 0.0

    def __post_init__(self) -> None:
        _check(self, "warmup", "a number of epochs >= 0", lambda v: 0 <= v < math.inf)
        _check(self, "final", "in [0, 1]", lambda v: 0 <= v <= 1)

    def __call__(self, epoch: Any, epochs: int) -> Any:
        if epochs <= self.warmup:
            raise ValueError(
                f"Cosine: warmup={self.warmup!r} must be shorter than the training (epochs={epochs}); train longer or "
                "shorten the warm-up"
            )
        epoch = np.asarray(epoch, np.float64)
        decay = _cosine_leg((epoch - self.warmup) / (epochs - self.warmup), 1.0, self.final)
        if self.warmup == 0:
            return decay
        return np.where(epoch < self.warmup, epoch / self.warmup, decay)[()]


@dataclass(frozen=True)
class OneCycle:
    """Up and down once, both legs half a cosine: ``start`` -> 1 -> ``final``.

    With T = peak · epochs and c(t) = (1 + cos(π t)) / 2:

        1 + (start - 1) c(epoch / T)                        while epoch < T
        final + (1 - final) c((epoch - T) / (epochs - T))   after it

    The learning rate that you set is the peak. Momentum is left alone (the paper also cycles it, inversely).

    Args:
        peak: the fraction of training at which the factor is 1, in (0, 1).
        start: factor at the beginning, in [0, 1].
        final: factor at the end, in [0, 1].

    Raises:
        ValueError: for a setting outside these ranges.

    Source: Smith & Topin 2018 (super-convergence); cosine legs as in fastai and PyTorch.
    """

    peak: float = 0.3
    start: float = 0.04
    final: float = 1e-4

    def __post_init__(self) -> None:
        _check(self, "peak", "in (0, 1)", lambda v: 0 < v < 1)
        _check(self, "start", "in [0, 1]", lambda v: 0 <= v <= 1)
        _check(self, "final", "in [0, 1]", lambda v: 0 <= v <= 1)

    def __call__(self, epoch: Any, epochs: int) -> Any:
        epoch, top = np.asarray(epoch, np.float64), self.peak * epochs
        rise = _cosine_leg(epoch / top, self.start, 1.0)
        fall = _cosine_leg((epoch - top) / (epochs - top), 1.0, self.final)
        return np.where(epoch < top, rise, fall)[()]


@dataclass
class ReduceOnPlateau:
    """Multiplies the rate by ``factor`` when ``patience`` epochs in a row brought no improvement, for each model.

        improved = value < best - tolerance                          (NaN: not improved)
        after `patience` epochs without: current = max(current · factor, min_factor), and the count starts anew

    The only schedule with memory: the trainer calls `observe` at the end of every epoch, and calling the schedule
    returns the current factors whatever the epoch. `state` and `load_state` carry the memory over an interruption
    exactly. Two of them are equal when their settings are.

    Args:
        factor: what each reduction multiplies by, in (0, 1).
        patience: epochs in a row without improvement that trigger a reduction, an integer >= 1.
        min_factor: the factor never falls below it, in [0, 1].
        tolerance: what counts as improvement, in units of the observed value, >= 0.

    Raises:
        ValueError: for a setting outside these ranges.

    Source: folklore; the rule of Keras' ReduceLROnPlateau (PyTorch's waits one epoch more).
    """

    factor: float = 0.1
    patience: int = 5
    min_factor: float = 1e-3
    tolerance: float = 1e-4
    # The memory, one entry per model; empty until the first `observe` says how many models there are.
    _best: np.ndarray = field(default_factory=lambda: np.empty(0), init=False, repr=False, compare=False)
    _waited: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False, repr=False, compare=False)
    _factors: np.ndarray = field(default_factory=lambda: np.empty(0), init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check(self, "factor", "in (0, 1)", lambda v: 0 < v < 1)
        _check(self, "patience", "an integer >= 1", lambda v: v >= 1 and isinstance(v, Integral))
        _check(self, "min_factor", "in [0, 1]", lambda v: 0 <= v <= 1)
        _check(self, "tolerance", "a number >= 0", lambda v: 0 <= v < math.inf)

    def __call__(self, epoch: Any, epochs: int) -> np.ndarray:
        """Returns the current factors, (models,) float64; (1,) before the first `observe`."""
        return self._factors.copy() if self._factors.size else np.ones(1)

    def observe(self, values: np.ndarray) -> None:
        """Takes in one value per model, (models,), at the end of an epoch; smaller is better.

        Raises:
            ValueError: if ``values`` is not one-dimensional or its length differs from earlier calls.
        """
        values = np.asarray(values, np.float64)
        if values.ndim != 1 or not values.size:
            raise ValueError(
                f"ReduceOnPlateau: values of shape {values.shape} must be (models,): one per model, an array of one "
                "value for a single network"
            )
        if not self._best.size:
            self._best = np.full(values.size, np.inf)
            self._waited, self._factors = np.zeros(values.size, np.int64), np.ones(values.size)
        if values.size != self._best.size:
            raise ValueError(
                f"ReduceOnPlateau: values for {values.size} models, but it remembers {self._best.size}; use a new "
                "schedule for another fleet"
            )
        improved = values < self._best - self.tolerance
        self._best = np.where(improved, values, self._best)
        waited = np.where(improved, 0, self._waited + 1)
        due = waited >= self.patience
        self._factors = np.where(due, np.maximum(self._factors * self.factor, self.min_factor), self._factors)
        self._waited = np.where(due, 0, waited)

    def state(self) -> dict[str, np.ndarray]:
        """Returns the memory: "best" and "factors" (models,) float64, "waited" (models,) int64; copies."""
        return {"best": self._best.copy(), "waited": self._waited.copy(), "factors": self._factors.copy()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Puts back what `state` returned.

        Raises:
            ValueError: if a part is missing or the parts are not (models,) arrays of one length.
        """
        missing = {"best", "waited", "factors"} - set(state)
        if missing:
            raise ValueError(f"ReduceOnPlateau: the state lacks {sorted(missing)}; pass what state() returned")
        best, factors = np.array(state["best"], np.float64), np.array(state["factors"], np.float64)
        waited = np.array(state["waited"], np.int64)
        if best.ndim != 1 or not best.shape == waited.shape == factors.shape:
            raise ValueError(
                "ReduceOnPlateau: best, waited and factors must be (models,) arrays of one length; their shapes are "
                f"{best.shape}, {waited.shape}, {factors.shape}"
            )
        self._best, self._waited, self._factors = best, waited, factors


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": Constant,
    "step": StepDecay,
    "exponential": Exponential,
    "cosine": Cosine,
    "one_cycle": OneCycle,
    "plateau": ReduceOnPlateau,
}


def get_schedule(spec: str | Schedule | None) -> Schedule:
    """Returns the schedule that ``spec`` means: a name of `SCHEDULES` (its defaults), a schedule, or None (constant).

    A `ReduceOnPlateau` comes back as a new one with the same settings and no memory: otherwise a second training with
    the same object would begin at the reduced rate.

    Raises:
        ValueError: for an unknown name.
        TypeError: for anything that is neither a name, a schedule nor None.
    """
    if spec is None:
        return Constant()
    if isinstance(spec, str):
        if spec not in SCHEDULES:
            raise ValueError(f"schedule={spec!r} is unknown; use one of {', '.join(SCHEDULES)}, or pass a schedule")
        return SCHEDULES[spec]()
    if isinstance(spec, ReduceOnPlateau):
        return replace(spec)
    # A class such as Cosine is callable as well: called with (epoch, epochs) it would build a schedule.
    if isinstance(spec, type) or not callable(spec):
        raise TypeError(
            f"schedule={spec!r} must be a name ({', '.join(SCHEDULES)}), a schedule such as Cosine(warmup=5), or None"
        )
    return spec
