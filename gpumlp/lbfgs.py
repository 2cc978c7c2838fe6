"""One iteration of L-BFGS for every model of a fleet at once: direction, step length, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .optimizer_state import OptimizerState
    from .optimizers import LBFGS

SUFFICIENT_DECREASE, CURVATURE = 1e-4, 0.9  # c₁ and c₂ of the Wolfe conditions, as Nocedal & Wright suggest


@np.errstate(over="ignore", invalid="ignore")  # a trial that is too long may overflow: it is then shortened
def iterate(
    optimizer: LBFGS,
    bound: OptimizerState,
    evaluate: Callable[[], Any],
    learning_rate: Any,
    active: np.ndarray | None = None,
    same_data: bool = False,
) -> Any:
    """Move ``bound.network`` by one iteration and return the loss that it had before.

    Args:
        evaluate: loss and gradient at the present parameters; leaves the gradient in ``network.flat_gradient``.
        active: (models,) bool; the others do not move.
        same_data: the loss is a function of the parameters alone and the same as at the iteration before, so that its
            last value and gradient still hold.
    """
    network, memory = bound.network, _memory(optimizer, bound)
    models = network.models
    active = np.ones(models, bool) if active is None else active

    statistics = {name: values.copy() for name, values in network.statistics.items()}

    def objective() -> tuple[Any, np.ndarray, np.ndarray]:
        # Every trial begins with the same running statistics: an iteration moves them once, by the step that it takes.
        for name, values in statistics.items():
            network.statistics[name][...] = values
        loss = evaluate()
        for _, penalties in bound.blocks(slice(0, models)):
            if penalties is not None:
                bound.regularise(*penalties)
        return loss, np.asarray(loss, np.float64).reshape(-1) + bound.penalty(), network.flat_gradient.copy()

    if same_data and bound.t.any():
        shown, value, gradient = memory["shown"].copy(), memory["value"].copy(), memory["gradient"].copy()
    else:
        shown, value, gradient = objective()
    start = network.flat.copy()
    direction = _direction(memory, gradient)
    slope = _dot(gradient, direction)
    uphill = ~(slope < 0)
    direction[uphill], slope[uphill] = -gradient[uphill], -_dot(gradient, gradient)[uphill]
    first = np.minimum(1.0, 1.0 / np.maximum(np.abs(gradient).sum(axis=1, dtype=np.float64), 1e-30))
    length = np.where(bound.t == 0, first, 1.0) * learning_rate
    still = ~active | ~(slope < 0) | ~np.isfinite(slope + value)  # at a minimum, or diverged
    length[still], direction[still] = 0.0, 0.0

    def move() -> tuple[Any, np.ndarray, np.ndarray]:
        network.flat[...] = start + length[:, None].astype(start.dtype) * direction
        return objective()

    if optimizer.line_search:
        low, high, done = np.zeros(models), np.full(models, np.inf), length == 0
        for _ in range(optimizer.max_evaluations):
            new_shown, new_value, new_gradient = move()
            new_slope = _dot(new_gradient, direction)
            decreased = (new_value <= value + SUFFICIENT_DECREASE * length * slope) & np.isfinite(new_slope)
            flat_enough = new_slope >= CURVATURE * slope
            done |= decreased & flat_enough
            if done.all():
                break
            high = np.where(done | decreased, high, length)
            low = np.where(done | ~decreased, low, length)
            next_length = np.where(np.isfinite(high), 0.5 * (low + high), 2.0 * low)
            length = np.where(done, length, next_length)
        else:  # the longest step that was seen to decrease the loss, maybe none
            length = np.where(done, length, low)
            new_shown, new_value, new_gradient = move()
    else:
        new_shown, new_value, new_gradient = move()
    _remember(memory, bound, network.flat - start, new_gradient - gradient)
    memory["shown"], memory["value"] = np.asarray(new_shown, np.float64).reshape(-1), new_value
    memory["gradient"][...] = new_gradient
    bound.t[active] += 1
    return shown if np.ndim(shown) == 0 or network.is_fleet else shown[0]


def _memory(optimizer: LBFGS, bound: OptimizerState) -> dict[str, np.ndarray]:
    """The pairs and scalars kept between iterations; a pair's ``rho`` of 0 means that it counts for nothing."""
    if not bound.states:
        models, n = bound.network.flat.shape
        dtype = bound.network.flat.dtype
        bound.states.update(
            s=np.zeros((optimizer.history, models, n), dtype),
            y=np.zeros((optimizer.history, models, n), dtype),
            rho=np.zeros((optimizer.history, models)),
            scale=np.ones(models),
            gradient=np.zeros((models, n), dtype),
            value=np.zeros(models),
            shown=np.zeros(models),
        )
    return bound.states


def _direction(memory: dict[str, np.ndarray], gradient: np.ndarray) -> np.ndarray:
    """-H g by the two-loop recursion (algorithm 7.4); pairs stand from the newest to the oldest."""
    q = -gradient
    alphas = []
    for s, y, rho in zip(memory["s"], memory["y"], memory["rho"], strict=True):
        alpha = rho * _dot(s, q)
        q -= alpha[:, None].astype(q.dtype) * y
        alphas.append(alpha)
    q *= memory["scale"][:, None].astype(q.dtype)
    for s, y, rho, alpha in zip(memory["s"][::-1], memory["y"][::-1], memory["rho"][::-1], alphas[::-1], strict=True):
        beta = rho * _dot(y, q)
        q += (alpha - beta)[:, None].astype(q.dtype) * s
    return q


def _remember(memory: dict[str, np.ndarray], bound: OptimizerState, s: np.ndarray, y: np.ndarray) -> None:
    """Keep the newest pair where its curvature is positive; for the other models it counts for nothing."""
    for name in ("s", "y", "rho"):
        memory[name][1:] = memory[name][:-1].copy()
    memory["s"][0], memory["y"][0] = s, y
    curvature, yy = _dot(s, y), _dot(y, y)
    good = curvature > 1e-10 * yy
    memory["rho"][0] = np.where(good, 1.0 / np.where(good, curvature, 1.0), 0.0)
    memory["scale"] = np.where(good, curvature / np.where(yy > 0, yy, 1.0), memory["scale"])


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Each model's inner product, (models,) float64."""
    return np.vecdot(a.astype(np.float64), b.astype(np.float64))
