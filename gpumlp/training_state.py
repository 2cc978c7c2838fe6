"""Training states on disk: all that an exact resume needs, at any step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .container import FileError, pack, refusing, unpack, write_atomically
from .files import describe
from .lbfgs import memory_of
from .network import SCALINGS, Network
from .schedules import SCHEDULES

if TYPE_CHECKING:
    from .trainer import Trainer


def save_state(trainer: Trainer, path: Any) -> None:
    """Write all that an exact resume needs; see ``Trainer.save_state``."""
    step, network = trainer._step, trainer.network
    if step is None or trainer._pending is not None:
        raise RuntimeError("nothing to save yet: call fit first, or save_state from a callback")
    step.catch_up()
    weights = trainer._last or {"flat": network.flat, **network.statistics}
    tensors = {f"weights.{name}": values for name, values in weights.items()}
    tensors |= {f"optimizer.{name}": values for name, values in step.bound.states.items()}
    tensors |= {name: getattr(network, name) for name in SCALINGS if getattr(network, name) is not None}
    tensors |= {"t": step.bound.t, "steps": network.steps, "active": step.active}
    tensors["log"] = step.log
    if hasattr(trainer.schedule, "state"):
        tensors |= {f"schedule.{name}": value for name, value in trainer.schedule.state().items()}
    for i, callback in enumerate(trainer.callbacks):
        tensors |= {f"callbacks.{i}.{name}": value for name, value in _state_of(callback).items()}
    here = network.backend.to_numpy
    tensors = {name: np.asarray(here(value)) for name, value in tensors.items()}
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
    write_atomically(path, pack("state", config, tensors))


def load_state(trainer: Trainer, path: Any) -> None:
    """Take up a state; see ``Trainer.resume``."""
    config, tensors = unpack(Path(path).read_bytes(), path, "state", None)
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
        if states and trainer.optimizer.full_batch:
            memory_of(trainer.optimizer, bound)  # makes the states, which are to be filled
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
        for name, values in (places | own).items():
            values[...] = tensors[name]
        for name in SCALINGS:
            setattr(network, name, tensors.get(name))
        network.classes = classes
        vars(trainer).update(counters, _seconds=seconds, history=history)
        trainer._pending = {"facts": config, "arrays": tensors}

    refusing(path, take)


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
