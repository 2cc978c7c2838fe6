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
    network, memory, backend = bound.network, memory_of(optimizer, bound), bound.network.backend
    models, dot = network.models, backend.dot
    active = np.ones(models, bool) if active is None else active

    for name, values in network.statistics.items():
        bound.statistics[name][...] = values

    def objective() -> tuple[Any, np.ndarray]:
        # Every trial begins with the same running statistics: an iteration moves them once, by the step that it takes.
        for name, values in bound.statistics.items():
            network.statistics[name][...] = values
        loss = evaluate()
        if bound.has_l1 or bound.has_l2:
            backend.penalize(bound)
        return loss, np.asarray(loss, np.float64).reshape(-1) + bound.penalty()

    gradient, start, direction = memory["gradient"], memory["start"], memory["direction"]
    if same_data and bound.t.any():
        shown, value = memory["shown"].copy(), memory["value"].copy()
    else:
        shown, value = objective()
        gradient[...] = network.flat_gradient
    start[...] = network.flat
    set_direction(backend, memory)
    slope = dot(gradient, direction)
    uphill = ~(slope < 0)
    if uphill.any():  # downhill there; a model's direction that is not finite does not come back by a factor of 0
        for i in np.flatnonzero(uphill):
            backend.combine(direction[i : i + 1], -np.ones(1), gradient[i : i + 1], None, None)
        slope[uphill] = -dot(gradient, gradient)[uphill]
    first = np.minimum(1.0, 1.0 / np.maximum(dot(gradient, None), 1e-30))
    length = np.where(bound.t == 0, first, 1.0) * learning_rate
    still = ~active | ~(slope < 0) | ~np.isfinite(slope + value)  # at a minimum, or diverged
    length[still] = 0.0
    for i in np.flatnonzero(still):
        direction[i : i + 1] = 0.0

    def move() -> tuple[Any, np.ndarray, np.ndarray]:
        backend.combine(network.flat, None, start, length, direction)
        network.renew()
        loss, value = objective()
        return loss, value, dot(network.flat_gradient, direction)

    if optimizer.line_search:
        low, high, done = np.zeros(models), np.full(models, np.inf), length == 0
        for _ in range(optimizer.max_evaluations):
            new_shown, new_value, new_slope = move()
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
            new_shown, new_value, _ = move()
    else:
        new_shown, new_value, _ = move()
    _remember(memory, bound)
    memory["shown"], memory["value"] = np.asarray(new_shown, np.float64).reshape(-1), new_value
    gradient[...] = network.flat_gradient
    bound.t[active] += 1
    return shown if np.ndim(shown) == 0 or network.is_fleet else shown[0]


def memory_of(optimizer: LBFGS, bound: OptimizerState) -> dict[str, Any]:
    """The pairs and scalars kept between iterations; a pair's ``rho`` of 0 means that it counts for nothing."""
    if not bound.states:
        network, history = bound.network, optimizer.history
        (models, n), dtype, zeros = network.flat.shape, network.flat.dtype, network.backend.zeros
        bound.states.update(
            s=zeros((history, models, n), dtype),
            y=zeros((history, models, n), dtype),
            rho=np.zeros((history, models)),
            scale=np.ones(models),
            gradient=zeros((models, n), dtype),
            start=zeros((models, n), dtype),
            direction=zeros((models, n), dtype),
            value=np.zeros(models),
            shown=np.zeros(models),
        )
    return bound.states


def set_direction(backend: Any, memory: dict[str, Any]) -> None:
    """-H g by the two-loop recursion (algorithm 7.4); pairs stand from the newest to the oldest."""
    q, (s, y, rho), scale = memory["direction"], (memory[name] for name in ("s", "y", "rho")), memory["scale"]
    history = range(len(rho))
    backend.combine(q, -np.ones(len(scale)), memory["gradient"], None, None)
    alphas = []
    for k in history:
        alphas.append(rho[k] * backend.dot(s[k], q))
        backend.combine(q, None, q, -alphas[k], y[k])
    backend.combine(q, scale, q, None, None)
    for k in reversed(history):
        backend.combine(q, None, q, alphas[k] - rho[k] * backend.dot(y[k], q), s[k])


def _remember(memory: dict[str, Any], bound: OptimizerState) -> None:
    """Keep the newest pair where its curvature is positive; for the other models it counts for nothing."""
    network, backend = bound.network, bound.network.backend
    for name in ("s", "y", "rho"):
        for k in reversed(range(1, len(memory[name]))):
            memory[name][k] = memory[name][k - 1]
    s, y = memory["s"][0], memory["y"][0]
    minus = -np.ones(network.models)
    backend.combine(s, None, network.flat, minus, memory["start"])
    backend.combine(y, None, network.flat_gradient, minus, memory["gradient"])
    curvature, yy = backend.dot(s, y), backend.dot(y, y)
    good = curvature > 1e-10 * yy
    memory["rho"][0] = np.where(good, 1.0 / np.where(good, curvature, 1.0), 0.0)
    memory["scale"] = np.where(good, curvature / np.where(yy > 0, yy, 1.0), memory["scale"])
