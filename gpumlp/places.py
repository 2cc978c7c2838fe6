"""From a graph of layers to places: each layer's number, name and widths, and the parameters that it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .layers import Dense, Embedding, Input, Node, topological_order


@dataclass(frozen=True)
class Place:
    """One layer of a built network: its number, its name, what it reads and how wide it is."""

    index: int
    layer: Any
    name: str
    inputs: tuple[int, ...]
    fan_in: int
    units: int
    dropout: np.ndarray  # (models,)

    @property
    def is_dense(self) -> bool:
        return isinstance(self.layer, Dense)

    @property
    def is_embedding(self) -> bool:
        return isinstance(self.layer, Embedding)


def connect(layers: list[Any], inputs: list[tuple[int, ...]]) -> tuple[Node, Node]:
    """The input and output nodes of the graph in which layer i reads the layers ``inputs[i]``."""
    nodes = [Node(layers[0])]
    for layer, reads in zip(layers[1:], inputs[1:], strict=True):
        nodes.append(layer(*(nodes[i] for i in reads)))
    return nodes[0], nodes[-1]


def graph(architecture: tuple, n_features: int | None, input_dropout: Any) -> tuple[Node, Node]:
    """The input and output nodes that Network's positional arguments stand for."""
    if len(architecture) == 2 and all(isinstance(node, Node) for node in architecture):
        if n_features is not None or np.any(np.asarray(input_dropout)):
            raise ValueError(
                "n_features and input_dropout belong to gm.Input(...) where the network is built from nodes"
            )
        return architecture[0], architecture[1]
    if len(architecture) != 1 or not isinstance(architecture[0], list | tuple):
        raise ValueError(
            "Network takes a list of layers, or two nodes: Network([Dense(10)], n_features=4), Network(x, out)"
        )
    if n_features is None:
        raise ValueError("a network from a list of layers needs n_features, the number of columns of X")
    if not architecture[0]:
        raise ValueError("the list of layers is empty; the last layer, say gm.Dense(10), gives the outputs")
    node = first = Input(n_features, input_dropout)
    for i, layer in enumerate(architecture[0]):
        if not isinstance(layer, Dense) and not (i == 0 and isinstance(layer, Embedding)):
            raise ValueError(
                f"a list of layers holds gm.Dense layers, and perhaps a gm.Embedding before them, got {layer!r}; join "
                "branches with nodes instead"
            )
        node = layer(node)
    return first, node


def arrange(first: Node, last: Node, models: int) -> list[Place]:
    """The places of the graph from ``first`` to ``last``, each after those that it reads.

    Raises:
        ValueError: a graph that is none, widths that cannot be added, names used twice, rates for other models.
    """
    nodes = topological_order(first, last)
    number = {id(node): i for i, node in enumerate(nodes)}
    places: list[Place] = []
    counts: dict[str, int] = {}
    for i, node in enumerate(nodes):
        layer, inputs = node.layer, tuple(number[id(x)] for x in node.inputs)
        widths = [places[j].units for j in inputs]
        kind = layer.kind
        units = int(layer.units) if kind in ("input", "dense") else sum(widths) if kind == "concat" else widths[0]
        if kind == "embedding":
            units += len(layer.sizes) * (int(layer.units) - 1)
        if kind == "add" and len(set(widths)) > 1:
            raise ValueError(f"Add joins nodes of one width, got widths {widths}")
        name = getattr(layer, "name", None) or (kind if kind == "input" else f"{kind}_{counts.get(kind, 0)}")
        counts[kind] = counts.get(kind, 0) + 1
        if not isinstance(name, str) or "." in name or name in {place.name for place in places}:
            raise ValueError(f"layer name {name!r} must be a string, unique and without a dot")
        rates = np.asarray(getattr(layer, "dropout", 0.0), np.float64)
        if rates.ndim and len(rates) != models:
            raise ValueError(
                f"dropout of {name} has {len(rates)} values for {models} models; give one, or one for each"
            )
        places.append(Place(i, layer, name, inputs, sum(widths), units, np.broadcast_to(rates, (models,))))
    _check_embedding(places)
    return places


def _check_embedding(places: list[Place]) -> None:
    """Codes are no numbers to compute with: whoever reads the Input of an Embedding has to be that Embedding."""
    readers = [place for place in places if 0 in place.inputs]
    for place in places:
        if not place.is_embedding:
            continue
        if readers != [place]:
            others = ", ".join(reader.name for reader in readers if reader is not place) or "none"
            raise ValueError(
                f"{place.name} must read the Input, and nothing else may, which has codes in it (now: {others}); let other "
                "layers read the embedding's output, where numbers pass through"
            )
        if len(place.layer.sizes) > places[0].units:
            raise ValueError(
                f"{place.name} has sizes for {len(place.layer.sizes)} columns of codes, "
                f"the Input has {places[0].units} columns"
            )
        if places[0].dropout.any():
            raise ValueError("input dropout would make 0 of codes; use the dropout of the layers behind the Embedding")


def tensor_shapes(places: list[Place]) -> dict[str, tuple[int, ...]]:
    """Name and shape of a model's parameters: the weights first, so that what is decayed is one stretch of the buffer."""
    dense = [place for place in places if place.is_dense]
    shapes: dict[str, tuple[int, ...]] = {f"{place.name}.W": (place.units, place.fan_in) for place in dense}
    shapes |= {f"{p.name}.E": (sum(p.layer.sizes), int(p.layer.units)) for p in places if p.is_embedding}
    for place in dense:
        own = ["b"] * place.layer.has_bias + ["gamma", "beta"] * (place.layer.norm is not None)
        shapes |= {f"{place.name}.{name}": (place.units,) for name in own}
    return shapes
