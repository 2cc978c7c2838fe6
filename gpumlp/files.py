"""Models on disk: a network as a configuration and tensors, and back."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np

from .activations import Activation, get_activation
from .backends import get_backend
from .container import Form, pack, read, refusing, unpack, write_atomically
from .data.encoding import TableEncoder, tensor_forms
from .layers import Add, Concat, Dense, Embedding, InputLayer
from .losses import LOSSES, Loss
from .network import DTYPES, SCALINGS, Network
from .places import arrange, connect, tensor_shapes

LAYERS = {layer.kind: layer for layer in (InputLayer, Embedding, Dense, Add, Concat)}

# What a file may ask for. Parameters are bounded by the file's size, since they lie in it; these bound the rest.
MOST_LAYERS = 1_000
WIDEST = 1 << 24  # units: layers that join others have widths without having parameters
MOST_CLASS_CHARACTERS = 1 << 22  # NumPy gives every name the room of the longest


def save_network(network: Network, path: Any) -> None:
    """Write the model to ``path``: parameters, running statistics, scaling, classes and the loss that it predicts by.

    Raises:
        ValueError: an activation or loss of your own, which a file cannot name; more layers, names or units than a file
            may have.
        OSError: it cannot be written; an earlier file of that name stays as it was.
    """
    write_atomically(path, to_bytes(network))


def load(path: Any, device: str = "auto") -> Network:
    """The network that ``Network.save`` wrote to ``path``, on ``device``.

    Raises:
        FileError: the file is damaged, of another format, or of a later version; or not a regular file.
        OSError: it cannot be opened.
        RuntimeError: a device that cannot be had.
    """
    return from_bytes(read(path, "model"), path, device)


def to_bytes(network: Network) -> bytes:
    """The model as the content of a file."""
    tensors = {**network.parameters, **network.statistics}
    tensors |= {f"{network.places[0].name}.{name}": v for name in SCALINGS if (v := getattr(network, name)) is not None}
    if network.encoder is not None:
        tensors |= {f"encoder.{name}": values for name, values in network.encoder.tensors().items()}
    config = describe(network)
    _model_tensors(config)  # what no reader takes is not written
    _loss(config["loss"], network.models, network.n_outputs)
    return pack("model", config, {name: network.backend.to_numpy(v) for name, v in tensors.items()})


def from_bytes(data: bytes, path: Any = "model bytes", device: str = "auto") -> Network:
    """The network that ``to_bytes`` packed. Raises FileError; RuntimeError and ValueError for the device."""
    get_backend(device)  # a device that cannot be had is no fault of the file
    config, tensors = unpack(data, path, "model", lambda config: _model_tensors(config)[1])

    def build() -> Network:
        first, last = connect([_layer(d) for d in config["layers"]], config["reads"])
        options = {name: config[name] for name in ("models", "dtype", "standardize", "standardize_targets")}
        network = Network(
            first, last, seed=config["seeds"], device=device, encoder=_encoder(config, tensors), **options
        )
        network.streams[...], network.steps[...] = config["streams"], config["steps"]
        for name, values in {**network.parameters, **network.statistics}.items():
            values[...] = tensors[name]
        for name in SCALINGS:
            setattr(network, name, tensors.get(f"{network.places[0].name}.{name}"))
        network.classes = None if config["classes"] is None else np.array(config["classes"])
        network.target_names = config["target_names"]
        network.feature_names = config["feature_names"] or _encoder_names(network)
        network.loss = _loss(config["loss"], network.models, network.n_outputs)
        return network

    return refusing(path, build)


def describe(network: Network) -> dict[str, Any]:
    """Everything of a network but its arrays, as plain data."""
    if network.loss is not None and network.loss.row is not LOSSES.get(network.loss.name):
        raise ValueError(
            f"loss {network.loss.name!r} is not in gpumlp's table: a file cannot name it; set network.loss to None"
        )
    return {
        "layers": [_describe_layer(place) for place in network.places],
        "reads": [list(place.inputs) for place in network.places],
        "models": network.models if network.is_fleet else None,
        "dtype": network.dtype.name,
        "seeds": network.seeds.tolist(),
        "streams": network.streams.tolist(),
        "steps": network.steps.tolist(),
        "standardize": network.standardize,
        "standardize_targets": network.standardize_targets,
        "scaled": [name for name in SCALINGS if getattr(network, name) is not None],
        "classes": None if network.classes is None else network.classes.tolist(),
        "feature_names": None if network.feature_names == _encoder_names(network) else network.feature_names,
        "target_names": network.target_names,
        "encoder": None if network.encoder is None else network.encoder.describe(),
        "loss": None if network.loss is None else network.loss.describe(),
    }


def _encoder_names(network: Network) -> list[str] | None:
    return None if network.encoder is None else network.encoder.feature_names


def _describe_layer(place: Any) -> dict[str, Any]:
    values = {f.name: getattr(place.layer, f.name) for f in fields(place.layer)}
    values = {name: v.item() if isinstance(v, np.generic) else v for name, v in values.items()}
    if "activation" in values:
        activation = get_activation(values["activation"])
        try:
            known = get_activation(activation.spec)
        except ValueError:
            known = None
        if known is None or _functions(known) != _functions(activation):
            raise ValueError(f"activation {activation.name!r} is not in gpumlp's table: a file cannot name it")
        values |= {"activation": activation.spec}
    if "name" in values:
        values["name"] = place.name
    if "sizes" in values:
        values["sizes"] = list(values["sizes"])  # as JSON has it
    if "dropout" in values:
        values["dropout"] = np.asarray(values["dropout"], float).tolist()
    return {"kind": place.layer.kind} | values


def _functions(activation: Activation) -> list[Any]:
    return [getattr(f, "func", f) for f in (activation.f, activation.f_grad)]  # rows with a parameter hold partials


def _layer(description: dict[str, Any]) -> Any:
    values = dict(description)
    return LAYERS[values.pop("kind")](**values)


def _encoder(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> TableEncoder | None:
    if config.get("encoder") is None:  # files of version 0.1 have none
        return None
    own = {name.removeprefix("encoder."): v for name, v in tensors.items() if name.startswith("encoder.")}
    return TableEncoder.from_description(config["encoder"], own)


def _loss(description: dict[str, Any] | None, models: int, outputs: int) -> Loss | None:
    """The loss that ``Loss.describe`` described. Raises ValueError where it does not fit the network."""
    if description is None:
        return None
    values = dict(description)
    weight = values.pop("class_weight", None)  # files of version 0.1 have none
    if isinstance(weight, dict):
        weight = {int(label): number for label, number in weight.items()}  # JSON's names are strings
    loss = Loss(values.pop("name"), class_weight=weight, **values)
    loss.check_fits(models, outputs)
    loss.class_weights(np.zeros(0, np.int64), 2 if loss.row.output == "sigmoid" and outputs == 1 else outputs)
    return loss


def _check_bounds(config: dict[str, Any]) -> None:
    """Raises ValueError where a configuration asks for more work or memory than its file's size can account for."""
    layers, models = config["layers"], config["models"] or 1
    if not isinstance(layers, list) or not 1 <= len(layers) <= MOST_LAYERS:
        raise ValueError(f"the network must be a list of 1 to {MOST_LAYERS:,} layers")
    for layer in layers:
        units = layer.get("units", 1)
        if type(units) is int and units > WIDEST:
            raise ValueError(f"a layer has {units:,} units; a file may have {WIDEST:,}")
    for name in ("seeds", "streams", "steps"):
        values = config[name]
        if not isinstance(values, list) or any(type(value) is not int for value in values):
            raise ValueError(f"{name} must be a list of integers")
        if len(values) != models:
            raise ValueError(f"{name} has {len(values)} values for {models} models")
    if config["dtype"] not in DTYPES:
        raise ValueError(f"dtype={config['dtype']!r} is not supported; allowed: {', '.join(DTYPES)}")
    for name in ("classes", "feature_names", "target_names"):
        values = config[name]
        if values is not None and not (
            isinstance(values, list | tuple) and all(isinstance(v, str | int | float) for v in values)
        ):
            raise ValueError(f"{name} must be a list of names or numbers, or null")
    names = [name for name in config["classes"] or () if isinstance(name, str)]
    if names and len(config["classes"]) * max(map(len, names)) > MOST_CLASS_CHARACTERS:
        raise ValueError(
            f"{len(config['classes']):,} classes, the longest name of {max(map(len, names)):,} characters, are too many; "
            f"their product may be {MOST_CLASS_CHARACTERS:,}"
        )


def _model_tensors(config: dict[str, Any]) -> tuple[list, dict[str, Form]]:
    """The places that a configuration means, and name, dtype and shape of every tensor that its file must hold."""
    _check_bounds(config)
    reads = config["reads"]
    if any(not 0 <= j < i for i, inputs in enumerate(reads) for j in inputs) or len(reads) != len(config["layers"]):
        raise ValueError("the layers read layers that do not come before them")
    if config["layers"][0]["kind"] != "input":
        raise ValueError("the first layer is no input")
    models = config["models"] or 1
    places = arrange(*connect([_layer(d) for d in config["layers"]], reads), models)
    if [place.index for place in places] != list(range(len(reads))):
        raise ValueError("some layers are read by none")
    if max(place.units for place in places) > WIDEST:
        raise ValueError(f"layers that are joined have more than {WIDEST:,} units")
    shapes = {name: (models, *shape) for name, shape in tensor_shapes(places).items()}
    for place in places:
        if place.is_dense and place.layer.norm == "batch":
            shapes |= {f"{place.name}.{name}": (models, place.units) for name in ("mean", "variance")}
    for name in config["scaled"]:
        if name not in SCALINGS:
            raise ValueError(f"scaled={name!r} is unknown; allowed: {', '.join(SCALINGS)}")
        width = places[-1].units if name.startswith("target") else places[0].units
        shapes[f"{places[0].name}.{name}"] = (models, width)
    dtype = np.dtype(config["dtype"])
    forms: dict[str, Form] = {name: (dtype, shape) for name, shape in shapes.items()}
    if config.get("encoder") is not None:
        forms |= {f"encoder.{name}": form for name, form in tensor_forms(config["encoder"]).items()}
    return places, forms
