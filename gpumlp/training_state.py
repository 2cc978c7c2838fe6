"""Training states on disk: all that an exact resume needs, at any step."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .container import FileError, pack, read, refusing, unpack, write_atomically
from .files import describe
from .lbfgs import memory_of
from .network import SCALINGS, Network
from .schedules import SCHEDULES

if TYPE_CHECKING:
    from .fit_data import Data
    from .trainer import Trainer

WHOLE = 2**18  # bytes up to which data are hashed as a whole; of larger ones
SAMPLED = 64  # rows, evenly spaced: a copy of each from a device


def save_state(trainer: Trainer, path: Any) -> None:
    """Write all that an exact resume needs; see ``Trainer.save_state``."""
    write_atomically(path, pack("state", *state_of(trainer)))


def state_of(trainer: Trainer) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All that an exact resume needs: plain facts, and arrays by name.

    Raises:
        RuntimeError: nothing was trained yet.
    """
    step, network = trainer._step, trainer.network
    if step is None or trainer._pending is not None:
        raise RuntimeError("nothing to save yet: call fit first, or save_state from a callback")
    step.catch_up()
    weights = trainer._last or {"flat": network.flat, **network.statistics}
    tensors = {f"weights.{name}": values for name, values in weights.items()}
    tensors |= {f"optimizer.{name}": values for name, values in step.bound.states.items()}
    tensors |= _averages_of(trainer)
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
        "data": data_facts(step.data),
        "environment": _environment(network),
        "callbacks": [type(callback).__name__ for callback in trainer.callbacks],
        "epoch": trainer.epoch,
        "position": trainer.position,
        "epochs_done": trainer.epochs_done,
        "seconds": trainer._seconds,
        "history": _without_nan(trainer.history),
        "classes": None if network.classes is None else network.classes.tolist(),
    }
    return config, tensors


def load_state(trainer: Trainer, path: Any) -> None:
    """Take up a state; see ``Trainer.resume``."""
    config, tensors = unpack(read(path, "state"), path, "state", None)
    network = trainer.network
    for name, now in _settings(trainer).items():
        saved = config.get(name)
        if saved == now:
            continue
        if isinstance(now, dict) and isinstance(saved, dict):
            now = {part: value for part, value in now.items() if saved.get(part) != value}
            saved = {part: saved.get(part) for part in now}
        raise ValueError(f"{path}: the state was saved with another {name}: {saved}; this trainer has {now}")

    if other := refusing(path, lambda: _other_environment(config["environment"], network)):
        warnings.warn(
            f"{path}: training goes on in another environment, and may round otherwise: {'; '.join(other)}",
            stacklevel=3,
        )

    def take() -> None:
        bound = trainer.optimizer.bind(network)
        places = {"weights.flat": network.flat, "t": bound.t, "steps": network.steps}
        places |= {f"weights.{name}": values for name, values in network.statistics.items()}
        places |= _averages_of(trainer)
        states = {name.removeprefix("optimizer."): v for name, v in tensors.items() if name.startswith("optimizer.")}
        if states and trainer.optimizer.full_batch:
            memory_of(trainer.optimizer, bound)  # makes the states, which are to be filled
        own = {f"optimizer.{name}": values for name, values in bound.states.items()}
        for name, values in (places | own).items():
            if (tensors[name].shape, tensors[name].dtype) != (values.shape, values.dtype):
                raise FileError(path, f"its tensor {name} does not fit the network")
        counters = {name: int(config[name]) for name in ("epoch", "position", "epochs_done")}
        seconds, history = float(config["seconds"]), _with_nan(config["history"])
        dict(config["data"])  # which fit reads
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


def data_facts(data: Data) -> dict[str, Any]:
    """What tells the data of one fit from those of another: {"X": {"shape", "dtype", "sha256"}, "y": ..., ...}."""
    arrays = {"X": data.X, "y": data.y, "sample_weight": data.weight}
    return {name: None if values is None else _fingerprint(values) for name, values in arrays.items()}


def check_data(saved: dict[str, Any], data: Data) -> None:
    """Raise ValueError, naming what changed, unless ``data`` are those that a state was saved with."""
    changed = []
    for name, now in data_facts(data).items():
        before = saved.get(name)
        if before == now:
            continue
        if before is None or now is None:
            changed.append(f"{name} is given, it was not" if before is None else f"{name} is not given, it was")
            continue
        parts = [
            f"{part} {now[part]}, it had {before[part]}" for part in ("shape", "dtype") if now[part] != before[part]
        ]
        changed.append(f"{name} has {' and '.join(parts) or 'other values'}")
    if changed:
        raise ValueError(
            f"the data are not those that the state was saved with: {'; '.join(changed)}; give the same, or begin anew"
        )


def _fingerprint(values: Any) -> dict[str, Any]:
    n, on_host = len(values), isinstance(values, np.ndarray)
    rows = np.unique(np.linspace(0, n - 1, SAMPLED).astype(np.int64))
    if values.nbytes <= WHOLE:
        picked = values if on_host else values.get()
    else:
        picked = values[rows] if on_host else np.concatenate([values[int(i) : int(i) + 1].get() for i in rows])
    digest = hashlib.sha256(np.ascontiguousarray(picked).data).hexdigest()
    return {"shape": list(values.shape), "dtype": str(values.dtype), "sha256": digest}


def _environment(network: Network) -> dict[str, str]:
    """What the last bits of a sum may depend on."""
    limits = (os.environ.get(name) for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS"))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    device = network.backend.runtime.description if network.backend.is_device else "cpu"  # type: ignore[attr-defined]
    threads = next(filter(None, limits), str(cpus))
    return {"numpy": np.__version__, "BLAS": _blas(), "threads": threads, "CPU": _cpu(), "device": device}


def _other_environment(saved: dict[str, str], network: Network) -> list[str]:
    here = _environment(network)
    return [f"{name} {now!r}, was {saved.get(name)!r}" for name, now in here.items() if now != saved.get(name)]


@cache
def _blas() -> str:
    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


@cache
def _cpu() -> str:
    """The processor's name where the system tells it: BLAS picks its kernels by it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


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
        "ema": None if trainer.average is None else trainer.average.beta.tolist(),
    }


def _averages_of(trainer: Trainer) -> dict[str, Any]:
    averages = {} if trainer.average is None else trainer.average.averages
    return {f"average.{name}": values for name, values in averages.items()}


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
