"""A folder of training states: one file for each checkpoint, the newest two kept, the newest whole one taken up.

The rules of the folder:

- A checkpoint is one file, ``step-0000000042.safetensors``, written beside its place and renamed into it: it is there
  whole or not at all, whenever the process or the machine stops.
- Order is by the number of the step, never by a clock.
- One fit at a time writes, under a lock on ``.lock`` that ends with its process, however it ends.
"""

from __future__ import annotations

import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .callbacks import Callback
from .container import FileError, pack, write_atomically
from .data.checks import check_integer, check_number
from .training_state import state_of

if TYPE_CHECKING:
    from .trainer import Trainer

KEPT = 2  # the newest one may be damaged by what stopped the machine
NAME = re.compile(r"step-(\d{10})\.safetensors")
LOCK = ".lock"


class Checkpoint(Callback):
    """Saves the training in a folder while it runs; ``fit(..., resume=folder)`` goes on from there with the same bits.

    The same call begins a training and takes it up again after a crash, a kill or Ctrl-C::

        trainer.fit(X, y, epochs=100, resume="run", callbacks=[gm.Checkpoint("run", every_seconds=60)])

    Where neither ``every_steps`` nor ``every_seconds`` is given, every epoch ends with a checkpoint. A fit that ends by
    itself, by its time limit, Ctrl-C or SIGTERM ends with one too. The newest two stay. It belongs last in the list of
    callbacks: those behind it have not seen the step that is saved.

    A GPU makes many steps at a time: there a checkpoint is written at the first chance after ``every_steps`` steps, so
    that they stay fast. What is not finite, loss or weights, is never saved.

    Args:
        folder: made where it is missing. A fit that was not resumed from it begins only in one without checkpoints.
        every_steps: steps between checkpoints, at least 1.
        every_seconds: seconds between checkpoints, more than 0.
        on_error: of a checkpoint that cannot be written, say because the disk is full: "raise" ends the fit; "warn"
            trains on and tries again when the next one is due. The checkpoints before stay as they were.

    Raises:
        ValueError, TypeError: values out of range; at ``fit``, a folder that holds the checkpoints of another fit.
        RuntimeError: at ``fit``, another fit is at work in the folder.
        OSError: at ``fit``, the folder or a checkpoint cannot be written.
    """

    every_step = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every_steps: int | None = None,
        every_seconds: float | None = None,
        on_error: str = "raise",
    ) -> None:
        if every_steps is not None:
            check_integer(every_steps, "every_steps", 1)
        if every_seconds is not None:
            check_number(every_seconds, "every_seconds", 0, np.inf, "()")
        if on_error not in ("raise", "warn"):
            raise ValueError(f"on_error={on_error!r} must be 'raise' or 'warn'")
        self.folder, self.on_error = Path(folder), on_error
        self.every_steps, self.every_seconds = every_steps, every_seconds
        self._lock: int | None = None

    def on_fit_begin(self, trainer: Trainer) -> None:
        self._outer = sys.exception()  # of whoever calls fit while handling an error: none of the fit's
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)
        for stale in self.folder.glob(".step-*.part"):  # of a writer that was killed
            stale.unlink(missing_ok=True)
        if not trainer.resumed and (found := checkpoints(self.folder)):
            raise ValueError(
                f"{self.folder} holds checkpoints of another fit ({found[0].name}): go on from them with "
                f"fit(..., resume={str(self.folder)!r}), or give another folder"
            )
        self._handled(trainer)

    def on_step_end(self, trainer: Trainer, loss: Any) -> None:
        if self._is_due(trainer):
            self._commit(trainer)

    def on_fit_end(self, trainer: Trainer) -> None:
        if self._lock is None:
            return  # the fit never began
        try:
            # After an error, of a step cut short say, nobody knows what the arrays hold.
            if sys.exception() is self._outer and _steps_made(trainer) > self._step:
                self._commit(trainer)
        finally:
            os.close(self._lock)
            self._lock = None

    def _is_due(self, trainer: Trainer) -> bool:
        if self.every_steps is None and self.every_seconds is None:
            return trainer.position == trainer.steps_per_epoch
        if self.every_steps is not None and _steps_made(trainer) - self._step >= self.every_steps:
            return True
        return self.every_seconds is not None and time.monotonic() - self._time >= self.every_seconds

    def _handled(self, trainer: Trainer) -> None:
        """Steps and seconds to the next checkpoint count from here."""
        self._step, self._time = _steps_made(trainer), time.monotonic()

    def _commit(self, trainer: Trainer) -> None:
        config, tensors = state_of(trainer)  # also brings what is known of a device's steps up to date
        step = trainer._step
        assert step is not None
        number = _steps_made(trainer)
        if step.has_diverged:
            return  # the fit deals with it next
        weights = [values for name, values in tensors.items() if name.startswith("weights.")]  # with running statistics
        if not all(np.isfinite(values[~step.lost]).all() for values in weights):
            warnings.warn(f"no checkpoint at step {number}: weights are NaN or infinite", stacklevel=4)
            return
        try:
            write_atomically(self.folder / f"step-{number:010d}.safetensors", pack("state", config, tensors))
            _forget(self.folder, number)
        except OSError as error:
            if self.on_error == "raise":
                raise
            warnings.warn(f"no checkpoint at step {number}, training goes on: {error}", stacklevel=4)
        self._handled(trainer)


def checkpoints(folder: Any) -> list[Path]:
    """The checkpoints in a folder, the newest first; whether they are whole is not looked at."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if NAME.fullmatch(entry.name) and entry.is_file()]
    return [Path(folder, name) for name in sorted(names, reverse=True)]


def resume_newest(trainer: Trainer, folder: Any) -> None:
    """Take up the newest whole checkpoint of ``folder``; without any the fit begins anew. See ``Trainer.fit``."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"resume={str(folder)!r} is a file: give the folder of gm.Checkpoint, or call resume")
    damaged: dict[Path, str] = {}
    while left := [path for path in checkpoints(folder) if path not in damaged] if folder.exists() else []:
        try:
            trainer.resume(left[0])
        except FileNotFoundError:
            continue  # a fit at work there has moved on: look again
        except (FileError, OSError) as error:
            damaged[left[0]] = str(error)
        else:
            break
    if damaged and not left:
        raise FileError(folder, f"none of its checkpoints can be read: {'; '.join(damaged.values())}")
    for reason in damaged.values():
        warnings.warn(f"resumed from {left[0].name}; a newer checkpoint cannot be read: {reason}", stacklevel=4)


def _steps_made(trainer: Trainer) -> int:
    """Of this fit, and of those that it goes on from."""
    return trainer.epochs_done * trainer.steps_per_epoch + trainer.position


def _forget(folder: Path, number: int) -> None:
    """Delete all but the newest checkpoints up to ``number``: what is beyond was damaged, or this fit would not be here."""
    found = checkpoints(folder)
    kept = [path for path in found if path.name <= f"step-{number:010d}.safetensors"][:KEPT]
    for path in found:
        if path not in kept:
            path.unlink(missing_ok=True)


def _locked(folder: Path) -> int:
    """A file descriptor that holds the folder's lock until it is closed, or its process ends.

    Raises:
        RuntimeError: another one holds it.
    """
    lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        import fcntl
    except ImportError:
        warnings.warn(
            f"this platform has no fcntl: see to it yourself that one fit alone writes to {folder}", stacklevel=5
        )
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RuntimeError(
            f"another fit is at work in {folder}: wait until it has ended, or give each trainer a folder of its own"
        ) from None
    except BaseException:
        os.close(lock)
        raise
    return lock
