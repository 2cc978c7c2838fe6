"""The optimizers: each is one small class, its equation in ``update``, over flat parameter buffers.

All parameters of a network lie in one buffer (models, n_parameters), and so do the gradient and each of an optimizer's
own buffers. An update works through them in blocks that stay in the processor's cache, one array operation after the
other with ``out=``, and never looks at a single tensor. What changes from step to step (learning rate, bias corrections)
is a handful of numbers for each model, ``coefficients``; everything else about a step is fixed.

Any hyper-parameter may be a number or, in a fleet, one number for each model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from .optimizer_state import OptimizerState

if TYPE_CHECKING:
    from .network import Network

Hyper = Any  # a number, or an array (models,)


@dataclass
class Optimizer:
    """What all optimizers share: the learning rate, and what happens to the gradient before the update.

    In this order: ``clip_value``, then ``clip_norm`` over all of a model's gradient, then ``l2`` w + ``l1`` sign(w) are
    added, then w ← w (1 - learning_rate · weight_decay), then the optimizer's own update. Penalties and decay act on
    weights alone, not on biases or the scales and shifts of normalisation.

    Args:
        learning_rate: step size.
        l1, l2: penalties added to the loss, l1 Σ|w| + ½ l2 Σ w² (scikit-learn's alpha is l2 times the number of rows).
        weight_decay: decoupled decay (Loshchilov & Hutter 2019), multiplied by the learning rate as in PyTorch.
        clip_norm: largest Euclidean norm of a model's gradient (Pascanu et al. 2013, algorithm 1); None for none.
        clip_value: largest absolute value of an element of the gradient; None for none.

    Raises:
        ValueError: a hyper-parameter out of its range; the message names it.
    """

    learning_rate: Hyper = 1e-3
    l1: Hyper = field(default=0.0, kw_only=True)
    l2: Hyper = field(default=0.0, kw_only=True)
    weight_decay: Hyper = field(default=0.0, kw_only=True)
    clip_norm: Hyper = field(default=None, kw_only=True)
    clip_value: Hyper = field(default=None, kw_only=True)

    states: ClassVar[tuple[str, ...]] = ()  # names of the buffers kept beside the parameters
    rule: ClassVar[str] = ""  # the name of the update's twin in kernels/optimizers.cu
    full_batch: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = ("learning_rate", "epsilon", "clip_norm", "clip_value")
    below_one: ClassVar[tuple[str, ...]] = ("momentum", "beta1", "beta2", "rho")

    def __post_init__(self) -> None:
        self._bound: OptimizerState | None = None
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(f.default, bool) or (value is None and f.default is None):
                continue
            numbers = numbers_of(value)
            if numbers.ndim:
                setattr(self, f.name, numbers)
            high = 1.0 if f.name in self.below_one else np.inf
            above = numbers > 0 if f.name in self.positive else numbers >= 0
            if numbers.ndim > 1 or not (np.isfinite(numbers) & above & (numbers < high)).all():
                bracket = "(" if f.name in self.positive else "["
                raise ValueError(
                    f"{f.name}={value!r} is out of range: a number, or one for each model, in {bracket}0, {high:g})"
                )

    # --- a row's own part

    def coefficients(self, t: Any, learning_rate: Any) -> tuple:
        """The numbers that ``update`` takes at step ``t`` = 1, 2, ...: scalars, arrays (models,) or (steps, models)."""
        raise NotImplementedError

    @staticmethod
    def update(w, g, *rest) -> None:
        """One step on a block: w, g, then the states, then a scratch block, then the coefficients; all but w are (.., n).

        ``g`` may be overwritten.
        """
        raise NotImplementedError

    # --- use

    def step(self, network: Network, learning_rate: Hyper = None) -> None:
        """Update the network's parameters from its gradients, as ``backward`` left them.

        Args:
            network: the first network given is the one that this optimizer belongs to.
            learning_rate: for this step alone, say from a schedule; None takes the optimizer's own.

        Raises:
            ValueError: a second network; make an optimizer for each.
        """
        rate = self.learning_rate if learning_rate is None else learning_rate
        network.backend.update(self.bind(network), slice(0, network.models), rate)
        network.after_update(slice(0, network.models))

    def bind(self, network: Network) -> OptimizerState:
        """Allocate the buffers for ``network``, once."""
        if self._bound is None:
            self._bound = OptimizerState(self, network)
        elif self._bound.network is not network:
            raise ValueError("this optimizer holds the state of another network; make a new one for this network")
        return self._bound

    def fresh(self) -> Any:
        """The same optimizer without any state."""
        return replace(self)

    def for_model(self, i: int) -> Any:
        """A fresh optimizer with the hyper-parameters of model ``i``."""
        picked = {
            f.name: np.asarray(getattr(self, f.name))[i].item() for f in fields(self) if np.ndim(getattr(self, f.name))
        }
        return replace(self, **picked)

    def describe(self) -> dict[str, Any]:
        """Name and hyper-parameters as plain data."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": type(self).__name__} | {
            k: v if v is None else np.asarray(v).tolist() for k, v in values.items()
        }


def numbers_of(value: Any) -> np.ndarray:
    """A hyper-parameter as float64; NaN, which is in no range, where it is not made of numbers."""
    try:
        found = np.asarray(value)
    except ValueError:  # a ragged list
        return np.array(np.nan)
    return found.astype(np.float64) if found.dtype.kind in "iuf" else np.array(np.nan)


# --- the rows -----------------------------------------------------------------------------------------------------


@dataclass
class SGD(Optimizer):
    """Stochastic gradient descent, with momentum and Nesterov's form.

    v ← μ v + g; w ← w - η v (Polyak 1964; Sutskever et al. 2013 without the learning rate inside v, as PyTorch), and for
    Nesterov w ← w - η (g + μ v). The lecture's momentum, v ← β v + (1 - β) g, is this one with the learning rate
    multiplied by 1 - β. Batch, mini-batch and one sample at a time are batch sizes.

    Args:
        momentum: μ in [0, 1); 0 keeps no velocity.
        nesterov: take the gradient's look-ahead form; needs momentum.
    """

    learning_rate: Hyper = 0.01
    momentum: Hyper = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not np.all(np.asarray(self.momentum) > 0):
            raise ValueError(f"nesterov=True needs momentum > 0; momentum={self.momentum!r}")
        self.states = ("velocity",) if np.any(self.momentum) else ()  # type: ignore[misc]
        self.rule = "descend" if not self.states else "nesterov" if self.nesterov else "heavy_ball"  # type: ignore[misc]
        forms = {"descend": self.descend, "heavy_ball": self.heavy_ball, "nesterov": self.nesterov_update}
        self.update: Callable[..., None] = forms[self.rule]  # type: ignore[method-assign, assignment]

    def coefficients(self, t, learning_rate):
        return learning_rate, self.momentum

    @staticmethod
    def descend(w, g, s, rate, momentum):
        np.multiply(g, rate, out=s)
        np.subtract(w, s, out=w)

    @staticmethod
    def heavy_ball(w, g, v, s, rate, momentum):
        np.multiply(v, momentum, out=v)
        np.add(v, g, out=v)
        np.multiply(v, rate, out=s)
        np.subtract(w, s, out=w)

    @staticmethod
    def nesterov_update(w, g, v, s, rate, momentum):
        np.multiply(v, momentum, out=v)
        np.add(v, g, out=v)
        np.multiply(v, momentum, out=s)
        np.add(s, g, out=s)
        np.multiply(s, rate, out=s)
        np.subtract(w, s, out=w)


@dataclass
class RMSprop(Optimizer):
    """v ← ρ v + (1 - ρ) g²; w ← w - η g / (√v + ε) (Hinton 2012, lecture 6e).

    The lecture's form has ε inside the root, √(v + ε'). Both bound the step by η |g| over the same smallest denominator
    where ε = √ε': give that; in between they differ, as √(v + ε') ≤ √v + √ε'. Adadelta below has ε inside.
    """

    learning_rate: Hyper = 1e-2
    rho: Hyper = 0.99
    epsilon: Hyper = 1e-8
    states: ClassVar[tuple[str, ...]] = ("v",)
    rule: ClassVar[str] = "rmsprop"

    def coefficients(self, t, learning_rate):
        return learning_rate, self.rho, 1 - np.asarray(self.rho), self.epsilon

    @staticmethod
    def update(w, g, v, s, rate, rho, rest, epsilon):
        np.multiply(g, g, out=s)
        np.multiply(s, rest, out=s)
        np.multiply(v, rho, out=v)
        np.add(v, s, out=v)
        np.sqrt(v, out=s)
        np.add(s, epsilon, out=s)
        np.divide(g, s, out=s)
        np.multiply(s, rate, out=s)
        np.subtract(w, s, out=w)


@dataclass
class Adagrad(Optimizer):
    """v ← v + g²; w ← w - η g / (√v + ε) (Duchi, Hazan & Singer 2011, section 1.3).

    The paper's δ stands outside the root as ε does here; for the lecture's √(v + ε') give ε = √ε', see ``RMSprop``.
    """

    learning_rate: Hyper = 1e-2
    epsilon: Hyper = 1e-10
    states: ClassVar[tuple[str, ...]] = ("v",)
    rule: ClassVar[str] = "adagrad"

    def coefficients(self, t, learning_rate):
        return learning_rate, self.epsilon

    @staticmethod
    def update(w, g, v, s, rate, epsilon):
        np.multiply(g, g, out=s)
        np.add(v, s, out=v)
        np.sqrt(v, out=s)
        np.add(s, epsilon, out=s)
        np.divide(g, s, out=s)
        np.multiply(s, rate, out=s)
        np.subtract(w, s, out=w)


@dataclass
class Adadelta(Optimizer):
    """v ← ρ v + (1 - ρ) g²; Δ = g √(u + ε) / √(v + ε); u ← ρ u + (1 - ρ) Δ²; w ← w - η Δ (Zeiler 2012, algorithm 1).

    The paper has no learning rate: η = 1.
    """

    learning_rate: Hyper = 1.0
    rho: Hyper = 0.9
    epsilon: Hyper = 1e-6
    states: ClassVar[tuple[str, ...]] = ("v", "u")
    rule: ClassVar[str] = "adadelta"

    def coefficients(self, t, learning_rate):
        return learning_rate, self.rho, 1 - np.asarray(self.rho), self.epsilon

    @staticmethod
    def update(w, g, v, u, s, rate, rho, rest, epsilon):
        np.multiply(v, rho, out=v)
        np.multiply(g, g, out=s)
        np.multiply(s, rest, out=s)
        np.add(v, s, out=v)
        np.add(v, epsilon, out=s)
        np.sqrt(s, out=s)
        np.divide(g, s, out=g)
        np.add(u, epsilon, out=s)
        np.sqrt(s, out=s)
        np.multiply(g, s, out=g)  # Δ
        np.multiply(u, rho, out=u)
        np.multiply(g, g, out=s)
        np.multiply(s, rest, out=s)
        np.add(u, s, out=u)
        np.multiply(g, rate, out=g)
        np.subtract(w, g, out=w)


@dataclass
class Adam(Optimizer):
    """m ← β₁ m + (1 - β₁) g; v ← β₂ v + (1 - β₂) g²; w ← w - η m̂ / (√v̂ + ε) (Kingma & Ba 2015, algorithm 1).

    m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ). The buffers hold m / (1 - β₁) and v / (1 - β₂), which saves two of twelve
    passes; the factors are in the step's coefficients. The lecture's form without bias corrections is this one with the
    learning rate of step t multiplied by (1 - β₁ᵗ) / √(1 - β₂ᵗ), and ε divided by √(1 - β₂ᵗ): in a loop of one's own,
    ``optimizer.step(network, learning_rate=...)``.
    """

    beta1: Hyper = 0.9
    beta2: Hyper = 0.999
    epsilon: Hyper = 1e-8
    states: ClassVar[tuple[str, ...]] = ("m", "v")
    rule: ClassVar[str] = "adam"

    def coefficients(self, t, learning_rate):
        root = ((1 - self.beta2) / (1 - self.beta2**t)) ** 0.5  # √v̂ = root · √(the buffer)
        rate = learning_rate * (1 - self.beta1) / (1 - self.beta1**t) / root
        return self.beta1, self.beta2, rate, self.epsilon / root

    @staticmethod
    def update(w, g, m, v, s, beta1, beta2, rate, epsilon):
        np.multiply(m, beta1, out=m)
        np.add(m, g, out=m)
        np.multiply(v, beta2, out=v)
        np.multiply(g, g, out=s)
        np.add(v, s, out=v)
        np.sqrt(v, out=s)
        np.add(s, epsilon, out=s)
        np.divide(m, s, out=s)
        np.multiply(s, rate, out=s)
        np.subtract(w, s, out=w)


@dataclass
class AdamW(Adam):
    """Adam with decoupled weight decay, w ← w (1 - η λ) before Adam's update (Loshchilov & Hutter 2019, algorithm 2)."""

    weight_decay: Hyper = field(default=1e-2, kw_only=True)


@dataclass
class NAdam(Adam):
    """Adam with Nesterov's look-ahead, w ← w - η (μₜ₊₁ m / (1 - Πμ μₜ₊₁) + (1 - μₜ) g / (1 - Πμ)) / (√v̂ + ε).

    μₜ = β₁ (1 - ½ 0.96^(ψ t)), Πμ = μ₁ ⋯ μₜ (Dozat 2016, algorithm 2 with the paper's decay ψ = 0.004, as PyTorch).
    """

    learning_rate: Hyper = 2e-3
    momentum_decay: Hyper = 4e-3
    rule: ClassVar[str] = "nadam"

    def coefficients(self, t, learning_rate):
        root = ((1 - self.beta2) / (1 - self.beta2**t)) ** 0.5
        mu, ahead = self._mu(t), self._mu(t + 1)
        product = self.beta1**t * _nadam_product(t, self.momentum_decay)
        of_m = learning_rate * ahead * (1 - self.beta1) / (1 - product * ahead) / root
        of_g = learning_rate * (1 - mu) / (1 - product) / root
        return self.beta1, self.beta2, of_m, of_g, self.epsilon / root

    def _mu(self, t):
        return self.beta1 * (1 - 0.5 * 0.96 ** (t * self.momentum_decay))

    @staticmethod
    def update(w, g, m, v, s, beta1, beta2, of_m, of_g, epsilon):  # type: ignore[override]
        np.multiply(m, beta1, out=m)
        np.add(m, g, out=m)
        np.multiply(v, beta2, out=v)
        np.multiply(g, g, out=s)
        np.add(v, s, out=v)
        np.multiply(g, of_g, out=g)
        np.multiply(m, of_m, out=s)
        np.add(g, s, out=g)
        np.sqrt(v, out=s)
        np.add(s, epsilon, out=s)
        np.divide(g, s, out=g)
        np.subtract(w, g, out=w)


_nadam_products: dict[float, list[float]] = {}  # by ψ: the products up to each step that was asked for


def _nadam_product(t, psi):
    """Π over k = 1..t of 1 - ½ 0.96^(ψ k), for numbers or arrays of them."""
    if np.ndim(t) or np.ndim(psi):
        pairs = np.broadcast(t, psi)
        return np.reshape([_nadam_product(int(k), float(p)) for k, p in pairs], pairs.shape)
    known = _nadam_products.setdefault(psi, [1.0])
    while len(known) <= t:
        known.append(known[-1] * (1 - 0.5 * 0.96 ** (psi * len(known))))
    return known[t]


@dataclass
class LBFGS(Optimizer):
    """Limited-memory BFGS over the full batch (Nocedal & Wright 2006, algorithms 7.4 and 7.5).

    The direction is the two-loop recursion over the last ``history`` pairs of steps and gradient changes; the step length
    comes from the bracketing search of Lewis & Overton 2013 (algorithm 2.6) for the weak Wolfe conditions, each model of
    a fleet with its own, or is ``learning_rate`` where ``line_search=False`` (the first step then is at most
    ``learning_rate`` long in the sum of absolute values, as PyTorch's).

    Args:
        history: pairs kept.
        line_search: search the step length; otherwise it is fixed.
        max_evaluations: of loss and gradient for one step.
    """

    learning_rate: Hyper = 1.0
    history: int = 10
    line_search: bool = True
    max_evaluations: int = 20
    full_batch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("history", "max_evaluations"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1")
        super().__post_init__()
        if np.any(self.weight_decay) or self.clip_norm is not None or self.clip_value is not None:
            raise ValueError(
                "L-BFGS takes l1 and l2; weight_decay, clip_norm and clip_value would break its line search"
            )

    def step(self, network: Network, learning_rate: Hyper = None, evaluate: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One iteration.

        Args:
            network: as for every optimizer.
            learning_rate: the first step length tried; None takes the optimizer's own.
            evaluate: forward, loss and backward over all rows at the network's present parameters; returns the loss,
                a number or (models,).

        Returns:
            The loss before the step, as ``evaluate`` returned it.

        Raises:
            ValueError: no ``evaluate``.
        """
        if evaluate is None:
            raise ValueError("L-BFGS evaluates the loss several times a step: call step(network, evaluate=function)")
        from .lbfgs import iterate

        rate = self.learning_rate if learning_rate is None else learning_rate
        loss = iterate(self, self.bind(network), evaluate, rate)
        network.after_update(slice(0, network.models))
        return loss


OPTIMIZERS = {
    "sgd": SGD,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
    "adadelta": Adadelta,
    "adam": Adam,
    "adamw": AdamW,
    "nadam": NAdam,
    "lbfgs": LBFGS,
}


def get_optimizer(spec: str | Optimizer) -> Optimizer:
    """The optimizer that a name stands for, or the one given. Raises ValueError naming the allowed."""
    if isinstance(spec, Optimizer):
        return spec
    if spec not in OPTIMIZERS:
        raise ValueError(f"optimizer={spec!r} is unknown; allowed: {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[spec]()
