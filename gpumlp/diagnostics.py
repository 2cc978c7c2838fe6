"""Is the gradient right, and is the network in good health? Two questions about a network, answered in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import random
from .backends.base import Dense
from .fit_data import scaled_targets, targets_for
from .losses import Loss, get_loss
from .workspace import Workspace

if TYPE_CHECKING:
    from .network import Network

DIFFERENCE = 1e-6  # length of the step of the central difference, in float64
ROWS = 1024  # rows that a diagnosis looks at

# What counts as wrong. Rules of thumb; the numbers are printed beside the sentences.
DEAD_SLOPE, DEAD_SHARE = 1e-3, 0.4
NEAR_LIMIT, SATURATED_SHARE = 0.02, 0.5
VANISHING, EXPLODING = 1e-3, 1e3
LARGE_INPUT = 20.0


def gradient_check(network: Network, X: Any, y: Any, loss: Any = None) -> dict[str, float]:
    """Hold each parameter's gradient against a central difference along a random direction, in float64.

    For a parameter w and a random direction v of length 1: (L(w + h v) - L(w - h v)) / 2h against ⟨dw, v⟩. Dropout
    masks and batch statistics are those of a training step, the same for every evaluation. The network is not changed.

    Args:
        X: (batch, n_features).
        y: labels or targets as the loss takes them.
        loss: a name or a Loss; None takes ``network.loss``.

    Returns:
        Parameter name → relative error |numeric - analytic| / max(|numeric|, |analytic|, 1e-7), the largest over the
        models of a fleet. A correct gradient gives less than about 1e-5; kinks that the step crosses give more.

    Raises:
        ValueError: no loss, or data that do not fit.
    """
    if loss is None and network.loss is None:
        raise ValueError("gradient_check needs a loss: pass one, or assign network.loss")
    loss = network.loss if loss is None else get_loss(loss)
    twin = network.copy(dtype="float64")
    X = twin.check_X(X)
    targets = _fitted_targets(twin, loss, y, len(X))
    here = twin.backend.to_numpy
    running = {name: here(values).copy() for name, values in twin.statistics.items()}

    def value_and_gradient() -> np.ndarray:
        value, dz = loss(twin.forward(X), targets)
        twin.backward(dz)
        for name, values in running.items():  # a training step moves the running statistics: put them back
            twin.statistics[name][...] = values
        return np.atleast_1d(value)

    value_and_gradient()
    analytic = {name: here(gradient).copy() for name, gradient in twin.gradients.items()}
    errors = {}
    for k, (name, w) in enumerate(twin.parameters.items()):
        direction = random.generator(seed=0, purpose=random.Purpose.DATA, layer=k).standard_normal(w.shape)
        over = tuple(range(1, w.ndim))
        direction /= np.sqrt(np.sum(direction**2, axis=over, keepdims=True))
        start = here(w).copy()
        values = []
        for sign in (1, -1):
            w[...] = start + sign * DIFFERENCE * direction
            values.append(value_and_gradient())
        w[...] = start
        numeric = (values[0] - values[1]) / (2 * DIFFERENCE)
        expected = np.sum(analytic[name] * direction, axis=over)
        scale = np.maximum(np.maximum(np.abs(numeric), np.abs(expected)), 1e-7)
        errors[name] = float(np.max(np.abs(numeric - expected) / scale))
    return errors


@dataclass(frozen=True)
class LayerHealth:
    """One layer's figures; see ``diagnose``."""

    name: str
    mean: float  # of its activations
    std: float
    dead: float  # share of units
    saturated: float  # share of activations
    gradient: float  # root mean square of dz
    weight_gradient: float  # Frobenius norm of dW


@dataclass(frozen=True)
class Diagnosis:
    """Figures for each layer, and a sentence for everything that looks wrong. Prints as a table."""

    layers: list[LayerHealth]
    messages: list[str]

    def __str__(self) -> str:
        head = f"{'layer':<12}{'mean a':>10}{'std a':>10}{'dead':>8}{'saturated':>11}{'rms dz':>11}{'|dW|':>11}"
        rows = [
            f"{row.name:<12}{row.mean:>10.3g}{row.std:>10.3g}{row.dead:>8.0%}{row.saturated:>11.0%}"
            f"{row.gradient:>11.2e}{row.weight_gradient:>11.2e}"
            for row in self.layers
        ]
        return "\n".join([head, *rows, *(self.messages or ["Nothing looks wrong."])])


def diagnose(network: Network, X: Any, y: Any = None, loss: Any = None) -> Diagnosis:
    """Look at activations and gradients of a training step, without making it.

    - dead: units whose derivative is below 1e-3 for every row: they do not learn.
    - saturated: activations within 2 % of a limit, for activations that have two.
    - gradients: from the loss where y is given, else from a random dz of standard deviation 1 / (batch · √outputs) at the
      logits, which shows how the layers pass gradients on (Glorot & Bengio 2010, section 4).

    Args:
        X: (n_samples, n_features); at most 1,024 rows are looked at.
        y, loss: targets, and the loss that takes them (None: ``network.loss``).

    Raises:
        ValueError: a fleet (diagnose ``network[i]``), or data that do not fit.
    """
    if network.is_fleet:
        raise ValueError("diagnose looks at one network; take a model of the fleet: network[0].diagnose(X)")
    X = network.check_X(X)
    n, X = len(X), X[:ROWS]
    if network.backend.is_device:
        network = network.copy(device="cpu")
    if network.standardize is not None and network.shift is None:  # as the fit to come will do
        network = network.copy()
        network.learn_standardization(X, np.zeros((len(X), network.n_outputs)))
    workspace = Workspace(network, len(X), training=True, per_model_rows=False)
    np.copyto(workspace.x, X, casting="unsafe")
    network.backend.standardize(workspace.x, *network.standardization_of(workspace.models, False))
    spread = float(np.sqrt(np.mean(np.square(workspace.x, dtype=np.float64))))
    z = workspace.forward(update_running=False)
    dense = [op for op in workspace.operations if isinstance(op, Dense)]
    shares = [_shares(op) for op in dense]
    moments = [(float(op.a.mean()), float(op.a.std())) for op in dense]
    gradients = dict(network.gradients)
    kept = network.flat_gradient.copy()
    if y is None:
        noise = random.generator(seed=0, purpose=random.Purpose.DATA).standard_normal(z.shape)
        workspace.dz[...] = noise / (len(X) * np.sqrt(network.n_outputs))
    else:
        chosen = network.loss if loss is None else get_loss(loss)
        if chosen is None:
            raise ValueError("diagnose needs a loss for y: pass one, or assign network.loss")
        workspace.dz[0] = chosen(z[0], _fitted_targets(network, chosen, y, n)[: len(X)])[1]
    workspace.backward()
    layers = []
    for place, op, (dead, saturated), (mean, std) in zip(
        [place for place in network.places if place.is_dense], dense, shares, moments, strict=True
    ):
        rms = float(np.sqrt(np.mean(np.square(op.d, dtype=np.float64))))
        norm = float(np.linalg.norm(gradients[f"{place.name}.W"]))
        layers.append(LayerHealth(place.name, mean, std, dead, saturated, rms, norm))
    network.flat_gradient[...] = kept
    return Diagnosis(layers, _messages(network, layers, spread))


def _fitted_targets(network: Network, loss: Loss, y: Any, n: int) -> np.ndarray:
    """Targets as a training step sees them: names encoded, values in the units that the network fits."""
    if network.is_fleet and np.ndim(y) > 1 and np.shape(y)[:2] == (network.models, n):
        return np.asarray(y)  # rows of each model's own, for the loss to check
    scaled = scaled_targets(network, targets_for(network, loss, y, n, "diagnosed y"))
    return scaled if network.is_fleet and len(scaled) > 1 else scaled[0]


def _shares(op: Dense) -> tuple[float, float]:
    """Share of dead units and of saturated activations."""
    slope = np.abs(op.f.f_grad(op.u, op.a))
    dead = float((slope.max(axis=1) < DEAD_SLOPE).mean())
    if op.f.floor is None or op.f.ceiling is None:
        return dead, 0.0
    margin = NEAR_LIMIT * (op.f.ceiling - op.f.floor)
    return dead, float(((op.a < op.f.floor + margin) | (op.a > op.f.ceiling - margin)).mean())


def _messages(network: Network, layers: list[LayerHealth], spread: float) -> list[str]:
    found = []
    if spread > LARGE_INPUT:
        found.append(f"The inputs are large (root mean square {spread:.3g}): build the network with standardize=True.")
    for row in layers:
        W = network.parameters[f"{row.name}.W"][0]
        if len(W) > 1 and np.ptp(W, axis=0).max() == 0:
            found.append(
                f"{row.name}: its {len(W)} units have equal weights and will stay alike: initialise with random weights."
            )
        if row.dead > DEAD_SHARE:
            found.append(
                f"{row.name}: {row.dead:.0%} of the units are dead, no row gives them a gradient: try a smaller learning "
                "rate, He initialisation or leaky_relu."
            )
        if row.saturated > SATURATED_SHARE:
            found.append(
                f"{row.name}: {row.saturated:.0%} of the activations are saturated: try smaller initial weights (Glorot), "
                "normalisation or relu."
            )
    first, last = layers[0].gradient, layers[-1].gradient
    if len(layers) > 1 and last > 0 and not first / last > VANISHING:
        found.append(
            f"The gradient vanishes: rms dz falls from {last:.1e} at {layers[-1].name} to {first:.1e} at {layers[0].name}: "
            "try relu with He initialisation, normalisation or residual connections."
        )
    if len(layers) > 1 and first > EXPLODING * last:
        found.append(
            f"The gradient explodes: rms dz grows from {last:.1e} at {layers[-1].name} to {first:.1e} at {layers[0].name}: "
            "try smaller initial weights, normalisation or clip_norm."
        )
    return found
