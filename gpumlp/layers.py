"""What a layer is: a description, as plain data. Weights, buffers and arithmetic live elsewhere.

A layer called on a node gives a node, and nodes make a directed acyclic graph:

    x = gm.Input(20)
    h = gm.Dense(64, "relu")(x)
    out = gm.Dense(3)(gm.Add()(h, gm.Dense(64, "relu")(h)))
    network = gm.Network(x, out)

A layer is a description, so one may stand at several places; each place has weights of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar

import numpy as np

from .activations import Activation, get_activation
from .initializers import get_initializer

NORMS = ("batch", "layer")
Rate = Any  # a number in [0, 1), or one for each model


@dataclass(frozen=True, eq=False)
class Node:
    """One place in the graph: a layer and the nodes that it reads."""

    layer: Any
    inputs: tuple[Node, ...] = ()


class _Callable:
    kind: ClassVar[str]

    def __call__(self, *inputs: Node) -> Node:
        """The node of this layer over ``inputs``. Raises TypeError where an input is not a node."""
        for x in inputs:
            if not isinstance(x, Node):
                raise TypeError(
                    f"{type(self).__name__} was called on {type(x).__name__}; call it on gm.Input(...) or a layer's result"
                )
        self.check_inputs(len(inputs))
        return Node(self, inputs)

    def check_inputs(self, count: int) -> None:
        if count != 1:
            raise ValueError(
                f"{type(self).__name__} reads one node, got {count}; join nodes with gm.Add() or gm.Concat()"
            )


@dataclass(frozen=True)
class InputLayer:
    """Where rows enter; ``Input`` gives its node."""

    units: int
    dropout: Rate = 0.0
    kind: ClassVar[str] = "input"

    def __post_init__(self) -> None:
        check_units(self.units, "n_features")
        check_rate(self.dropout)


def Input(n_features: int, dropout: Rate = 0.0) -> Node:
    """The node where rows of ``n_features`` numbers enter, with input dropout if asked for.

    Raises:
        ValueError: ``n_features`` below 1 or a rate out of [0, 1).
    """
    return Node(InputLayer(n_features, dropout))


@dataclass(frozen=True)
class Dense(_Callable):
    """The lecture's layer: z = x Wᵀ + b, then normalisation, the non-linearity and dropout.

    Args:
        units: width of the output.
        activation: a name of ``gpumlp.activations.ACTIVATIONS``, say "relu" or "leaky_relu(0.2)", or an ``Activation``.
        norm: None, "batch" (Ioffe & Szegedy 2015) or "layer" (Ba, Kiros & Hinton 2016), before the non-linearity.
        norm_after: normalise after the non-linearity instead.
        dropout: share of the outputs set to zero in training, the others divided by 1 - rate (inverted dropout,
            Srivastava et al. 2014); a number, or one for each model of a fleet.
        bias: None has one unless batch normalisation before the non-linearity would cancel it.
        initializer: a name of ``gpumlp.initializers.INITIALIZERS``; None takes the activation's default.
        max_norm: largest Euclidean norm of a unit's incoming weights, enforced after every update; None for none.
        name: how parameters and reports call it; None numbers the layers: dense_0, dense_1, ...

    Raises:
        ValueError: a value that is not allowed; the message names it and what is.
    """

    units: int
    activation: str | Activation = "identity"
    norm: str | None = field(default=None, kw_only=True)
    norm_after: bool = field(default=False, kw_only=True)
    dropout: Rate = field(default=0.0, kw_only=True)
    bias: bool | None = field(default=None, kw_only=True)
    initializer: str | None = field(default=None, kw_only=True)
    max_norm: float | None = field(default=None, kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "dense"

    def __post_init__(self) -> None:
        check_units(self.units, "units")
        check_rate(self.dropout)
        get_activation(self.activation)
        if self.norm is not None and self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r} is unknown; allowed: None, 'batch', 'layer'")
        if not isinstance(self.bias, bool | None):
            raise ValueError(f"bias={self.bias!r} must be True, False or None")
        if self.initializer is not None:
            get_initializer(self.initializer)
        if self.max_norm is not None and not (isinstance(self.max_norm, Real) and 0 < self.max_norm < np.inf):
            raise ValueError(f"max_norm={self.max_norm!r} must be a positive number or None")

    @property
    def f(self) -> Activation:
        return get_activation(self.activation)

    @property
    def has_bias(self) -> bool:
        return self.bias if self.bias is not None else self.norm != "batch" or self.norm_after


@dataclass(frozen=True)
class Embedding(_Callable):
    """Categories as vectors that are learned: a column of codes becomes, row by row, the vector of its code.

    It reads the Input, whose last columns hold codes, 0, 1, ..., as whole numbers; the columns before them pass through:

        out = [x_0, ..., x_k, E_1[code_1], E_2[code_2], ...]

    Penalties and decay, which are for weights, do not reach the vectors.

    Args:
        sizes: of each column of codes, how many there are. Code 0 stands for what is unknown: its vector begins as zeros,
            and stays so where no row of the training has it. A code out of range counts as 0.
        units: length of a vector.
        initializer: of the vectors, a name of ``gpumlp.initializers.INITIALIZERS``. By the default their length is about 1,
            as that of a one-hot row.
        name: as ``Dense``.

    Source: Guo & Berkhahn 2016, Entity Embeddings of Categorical Variables.

    Raises:
        ValueError: a value that is not allowed; the message names it and what is.
    """

    sizes: tuple[int, ...]
    units: int = 8
    initializer: str = field(default="lecun_normal", kw_only=True)
    name: str | None = field(default=None, kw_only=True)
    kind: ClassVar[str] = "embedding"

    def __post_init__(self) -> None:
        check_units(self.units, "units")
        if not isinstance(self.sizes, list | tuple) or not self.sizes:
            raise ValueError(f"sizes={self.sizes!r} must be a list with the number of codes of each column")
        for size in self.sizes:
            check_units(size, "sizes")
        object.__setattr__(self, "sizes", tuple(int(size) for size in self.sizes))
        get_initializer(self.initializer)


@dataclass(frozen=True)
class Add(_Callable):
    """The sum of nodes of one width: a residual connection (He et al. 2016)."""

    kind: ClassVar[str] = "add"

    def check_inputs(self, count: int) -> None:
        if count < 2:
            raise ValueError(f"{type(self).__name__} joins two nodes or more, got {count}")


@dataclass(frozen=True)
class Concat(Add):
    """The outputs of several nodes side by side."""

    kind: ClassVar[str] = "concat"


def check_units(units: Any, name: str) -> None:
    if isinstance(units, bool) or not isinstance(units, int | np.integer) or units < 1:
        raise ValueError(f"{name}={units!r} must be an integer of at least 1")


def check_rate(rate: Any) -> None:
    try:
        rates = np.asarray(rate, dtype=np.float64)
    except (TypeError, ValueError):
        rates = np.array(np.nan)
    if rates.ndim > 1 or not ((rates >= 0) & (rates < 1)).all():
        raise ValueError(f"dropout={rate!r} must be a number in [0, 1), or one for each model")


def topological_order(inputs: Node, output: Node) -> list[Node]:
    """The nodes from ``inputs`` to ``output``, each after those that it reads.

    Raises:
        ValueError: ``output`` does not read ``inputs``, or reads another Input.
    """
    order: list[Node] = []
    seen: set[int] = set()
    stack = [(output, False)]
    while stack:  # depth first without recursion: a chain may be longer than the recursion limit
        node, expanded = stack.pop()
        if expanded:
            order.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((node, True))
            stack.extend((x, False) for x in reversed(node.inputs))
    sources = [node for node in order if not node.inputs]
    if inputs is output or inputs not in sources:
        raise ValueError(
            "the network's output does not depend on its Input: build it from the node that you pass first"
        )
    if len(sources) > 1:
        raise ValueError("the graph reads an Input that was not passed to Network; a network has one Input")
    order.remove(inputs)
    return [inputs, *order]
