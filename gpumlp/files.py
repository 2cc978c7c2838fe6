"""Models and training states on disk: one safetensors file each, its configuration as JSON in the metadata.

No code, no pickle, no import by name. A SHA-256 over configuration and tensors finds damage (not forgery). A file is
written beside its place and renamed into it, so that the name always holds a whole file, the old or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .activations import Activation, get_activation
from .backends import get_backend
from .layers import Add, Concat, Dense, InputLayer
from .losses import LOSSES, Loss
from .network import SCALINGS, Network
from .places import arrange, connect, tensor_shapes
from .schedules import SCHEDULES

if TYPE_CHECKING:
    from .trainer import Trainer

FORMAT_VERSION = "1"
LARGEST_HEADER = 100_000_000  # bytes, as the format's own library has it
LAYERS = {layer.kind: layer for layer in (InputLayer, Dense, Add, Concat)}


class FileError(ValueError):
    """A file that is not a gpumlp model or training state, or is damaged; the message names file and reason."""

    def __init__(self, path: Any, reason: str) -> None:
        super().__init__(f"{path}: {reason}")


# --- models ---------------------------------------------------------------------------------------------------------


def save_network(network: Network, path: Any) -> None:
    """Write the model to ``path``: parameters, running statistics, scaling, classes and the loss that it predicts by.

    Raises:
        ValueError: an activation or loss of your own, which a file cannot name.
        OSError: it cannot be written; an earlier file of that name stays as it was.
    """
    write_atomically(path, to_bytes(network))


def load(path: Any, device: str = "auto") -> Network:
    """The network that ``Network.save`` wrote to ``path``, on ``device``.

    Raises:
        FileError: the file is damaged, of another format, or of a later version.
        OSError: it cannot be read.
        RuntimeError: a device that cannot be had.
    """
    return from_bytes(Path(path).read_bytes(), path, device)


def to_bytes(network: Network) -> bytes:
    """The model as the content of a file."""
    tensors = {**network.parameters, **network.statistics}
    tensors |= {f"{network.places[0].name}.{name}": v for name in SCALINGS if (v := getattr(network, name)) is not None}
    return _pack("model", describe(network), tensors)


def from_bytes(data: bytes, path: Any = "model bytes", device: str = "auto") -> Network:
    """The network that ``to_bytes`` packed. Raises FileError; RuntimeError and ValueError for the device."""
    get_backend(device)  # a device that cannot be had is no fault of the file
    config, tensors = _unpack(data, path, "model", lambda config: _model_tensors(config)[1])

    def build() -> Network:
        first, last = connect([_layer(d) for d in config["layers"]], config["reads"])
        options = {name: config[name] for name in ("models", "dtype", "standardize", "standardize_targets")}
        network = Network(first, last, seed=config["seeds"], device=device, **options)
        network.streams[...], network.steps[...] = config["streams"], config["steps"]
        for name, values in {**network.parameters, **network.statistics}.items():
            values[...] = tensors[name]
        for name in SCALINGS:
            setattr(network, name, tensors.get(f"{network.places[0].name}.{name}"))
        network.classes = None if config["classes"] is None else np.array(config["classes"])
        network.feature_names, network.target_names = config["feature_names"], config["target_names"]
        network.loss = None if config["loss"] is None else Loss(**config["loss"])
        return network

    return _refusing(path, build)


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
        "feature_names": network.feature_names,
        "target_names": network.target_names,
        "loss": None if network.loss is None else network.loss.describe(),
    }


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
        values |= {"activation": activation.spec, "name": place.name}
    if "dropout" in values:
        values["dropout"] = np.asarray(values["dropout"], float).tolist()
    return {"kind": place.layer.kind} | values


def _functions(activation: Activation) -> list[Any]:
    return [getattr(f, "func", f) for f in (activation.f, activation.f_grad)]  # rows with a parameter hold partials


def _layer(description: dict[str, Any]) -> Any:
    values = dict(description)
    return LAYERS[values.pop("kind")](**values)


def _model_tensors(config: dict[str, Any]) -> tuple[list, dict[str, tuple[int, ...]]]:
    """The places that a configuration means, and the name and shape of every tensor that its file must hold."""
    reads = config["reads"]
    if any(not 0 <= j < i for i, inputs in enumerate(reads) for j in inputs) or len(reads) != len(config["layers"]):
        raise ValueError("the layers read layers that do not come before them")
    if config["layers"][0]["kind"] != "input":
        raise ValueError("the first layer is no input")
    models = config["models"] or 1
    places = arrange(*connect([_layer(d) for d in config["layers"]], reads), models)
    if [place.index for place in places] != list(range(len(reads))):
        raise ValueError("some layers are read by none")
    shapes = {name: (models, *shape) for name, shape in tensor_shapes(places).items()}
    for place in places:
        if place.is_dense and place.layer.norm == "batch":
            shapes |= {f"{place.name}.{name}": (models, place.units) for name in ("mean", "variance")}
    for name in config["scaled"]:
        width = places[-1].units if name.startswith("target") else places[0].units
        shapes[f"{places[0].name}.{name}"] = (models, width)
    return places, shapes


# --- training states ------------------------------------------------------------------------------------------------


def save_state(trainer: Trainer, path: Any) -> None:
    """Write all that an exact resume needs; see ``Trainer.save_state``."""
    step, network = trainer._step, trainer.network
    if step is None:
        raise RuntimeError("nothing to save yet: call fit first, or save_state from a callback")
    weights = trainer._last or {"flat": network.flat, **network.statistics}
    tensors = {f"weights.{name}": values for name, values in weights.items()}
    tensors |= {f"optimizer.{name}": values for name, values in step.bound.states.items()}
    tensors |= {name: getattr(network, name) for name in SCALINGS if getattr(network, name) is not None}
    tensors |= {"t": step.bound.t, "steps": network.steps, "active": step.active}
    tensors["log"] = step.log
    if hasattr(trainer.schedule, "state"):
        tensors |= {f"schedule.{name}": np.asarray(value) for name, value in trainer.schedule.state().items()}
    for i, callback in enumerate(trainer.callbacks):
        tensors |= {f"callbacks.{i}.{name}": np.asarray(value) for name, value in _state_of(callback).items()}
    config = {
        **_settings(trainer),
        "fit": trainer.fit_facts(step),
        "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
        "epoch": trainer.epoch,
        "position": trainer.position,
        "epochs_done": trainer.epochs_done,
        "seconds": trainer._seconds,
        "history": _without_nan(trainer.history),
        "classes": None if network.classes is None else network.classes.tolist(),
    }
    write_atomically(path, _pack("state", config, tensors))


def load_state(trainer: Trainer, path: Any) -> None:
    """Take up a state; see ``Trainer.resume``."""
    config, tensors = _unpack(Path(path).read_bytes(), path, "state", None)
    network = trainer.network
    for name, now in _settings(trainer).items():
        saved = config.get(name)
        if saved == now:
            continue
        if isinstance(now, dict) and isinstance(saved, dict):
            now = {part: value for part, value in now.items() if saved.get(part) != value}
            saved = {part: saved.get(part) for part in now}
        raise ValueError(f"{path}: the state was saved with another {name}: {saved}; this trainer has {now}")

    def take() -> None:
        bound = trainer.optimizer.bind(network)
        places = {"weights.flat": network.flat, "t": bound.t, "steps": network.steps}
        places |= {f"weights.{name}": values for name, values in network.statistics.items()}
        states = {name.removeprefix("optimizer."): v for name, v in tensors.items() if name.startswith("optimizer.")}
        own = {f"optimizer.{name}": values for name, values in bound.states.items()}
        for name, values in (places | own).items():
            if (tensors[name].shape, tensors[name].dtype) != (values.shape, values.dtype):
                raise FileError(path, f"its tensor {name} does not fit the network")
        counters = {name: int(config[name]) for name in ("epoch", "position", "epochs_done")}
        seconds, history = float(config["seconds"]), _with_nan(config["history"])
        classes = None if config["classes"] is None else np.array(config["classes"])
        if hasattr(trainer.schedule, "load_state"):
            memory = {name.removeprefix("schedule."): v for name, v in tensors.items() if name.startswith("schedule.")}
            trainer.schedule.load_state({name: v.item() if v.ndim == 0 else v for name, v in memory.items()})
        # Nothing fails from here on: a file that does not fit has left the trainer as it was.
        for name, values in places.items():
            values[...] = tensors[name]
        bound.states.update(states)
        bound.rebuild()
        for name in SCALINGS:
            setattr(network, name, tensors.get(name))
        network.classes = classes
        vars(trainer).update(counters, _seconds=seconds, history=history)
        trainer._pending = {"facts": config, "arrays": tensors}

    _refusing(path, take)


def _settings(trainer: Trainer) -> dict[str, Any]:
    """What a trainer that takes up a state must share with the one that saved it."""
    schedule = trainer.schedule
    return {
        "network": _identity(trainer.network),
        "loss": repr(trainer.loss),
        "optimizer": repr(trainer.optimizer.describe()),
        # A function of your own has an address in its repr: its kind has to do.
        "schedule": repr(schedule) if type(schedule) in SCHEDULES.values() else type(schedule).__name__,
        "augment": repr(trainer.augment),
    }


def _state_of(callback: Any) -> dict[str, Any]:
    return callback.state() if hasattr(callback, "state") else {}


def _identity(network: Network) -> dict[str, Any]:
    """What of a network stays the same while it trains."""
    changing = ("steps", "classes", "scaled", "loss", "feature_names", "target_names")
    return {name: value for name, value in describe(network).items() if name not in changing}


def _without_nan(history: dict[str, list]) -> Any:
    return json.loads(json.dumps(history), parse_constant=str)


def _with_nan(history: Any) -> Any:
    if isinstance(history, dict):
        return {name: _with_nan(values) for name, values in history.items()}
    if isinstance(history, list):
        return [_with_nan(value) for value in history]
    return float(history) if isinstance(history, str) else history


# --- the container --------------------------------------------------------------------------------------------------


def _pack(kind: str, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    from safetensors.numpy import save

    arrays = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    text = json.dumps(config, allow_nan=False)
    if len(text) > LARGEST_HEADER // 2:  # names and quotes take some room too
        raise ValueError(f"the {kind}'s configuration takes {len(text):,} bytes, too many for a safetensors header")
    metadata = {
        "format": f"gpumlp {kind}",
        "format_version": FORMAT_VERSION,
        "config": text,
        "sha256": _digest(text, arrays),
    }
    return _in_order(save(arrays, metadata=metadata))


def _in_order(data: bytes) -> bytes:
    """The same file with its metadata in order, so that equal models give equal files: the library shuffles them."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _unpack(
    data: bytes, path: Any, kind: str, shapes: Callable[[dict], dict[str, tuple[int, ...]]] | None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Configuration and tensors; everything is checked before a tensor is made. Raises FileError."""

    def read() -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        header = _header(data, path)
        metadata = header.pop("__metadata__", None)
        if not isinstance(metadata, dict) or not str(metadata.get("format", "")).startswith("gpumlp "):
            raise FileError(path, "is a safetensors file, but not gpumlp's")
        if metadata["format"] != f"gpumlp {kind}":
            raise FileError(path, f"holds a {metadata['format']}, expected a gpumlp {kind}")
        if metadata.get("format_version") != FORMAT_VERSION:
            raise FileError(
                path, f"has format version {metadata.get('format_version')}; this gpumlp reads {FORMAT_VERSION}"
            )
        config = _json(metadata["config"], path)
        if shapes is not None:
            expected = {name: list(shape) for name, shape in shapes(config).items()}
            if {name: entry["shape"] for name, entry in header.items()} != expected:
                raise FileError(path, "its tensors are not those that its configuration describes")
        from safetensors.numpy import load as load_tensors

        tensors = load_tensors(data)
        if _digest(metadata["config"], tensors) != metadata.get("sha256"):
            raise FileError(path, "the checksum does not fit: the file is damaged")
        return config, tensors

    return _refusing(path, read)


def _header(data: bytes, path: Any) -> dict[str, Any]:
    if len(data) < 8:
        raise FileError(path, f"has {len(data)} bytes: it is empty or cut off")
    length = int.from_bytes(data[:8], "little")
    if length > LARGEST_HEADER or 8 + length > len(data):
        raise FileError(path, "is not a safetensors file, or is cut off")
    header = _json(data[8 : 8 + length].decode("utf-8"), path)
    if not isinstance(header, dict):
        raise FileError(path, "its header is not a table")
    return header


def _json(text: str, path: Any) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise FileError(path, "its header names something twice")
        return table

    def refuse(constant: str) -> Any:
        raise FileError(path, f"its header holds {constant}")

    return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)


def _digest(config: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        values = tensors[name]
        digest.update(f"|{name}|{values.dtype.str}|{values.shape}|".encode())
        digest.update(np.ascontiguousarray(values).data)
    return digest.hexdigest()


def _refusing(path: Any, action: Callable[[], Any]) -> Any:
    """What ``action`` returns; any error in it becomes a FileError that names the file."""
    try:
        return action()
    except FileError:
        raise
    except (Exception, RecursionError) as error:
        raise FileError(path, f"cannot be read: {type(error).__name__}: {error}") from error


def write_atomically(path: Any, data: bytes) -> None:
    """Write ``data`` to ``path``, whole or not at all: beside it, to disk, renamed into place.

    Raises:
        OSError: nothing was written, or the rename failed; an earlier file stays as it was.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the rename itself
        finally:
            os.close(folder)
