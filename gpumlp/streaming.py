"""Data that stay on the host: the rows of the next steps travel to the device while it works on those before.

Two slots of device memory take turns, each for a chunk of STEPS steps; so do two stretches of pinned host memory. The rows
of a chunk are picked on the host in the order of the epoch. Where a row lies in the slots does not change from epoch to
epoch, so what was recorded of a step holds.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends.device import DeviceArray

if TYPE_CHECKING:
    from .backends.gpu_backend import GpuBackend

SLOTS = 2
FREE_SHARE = 0.8  # of the memory that a device has free which data may fill where nobody set a limit


def must_stream(backend: Any, X: Any, limit: int | None) -> bool:
    """Whether X is larger than the limit, or than what the device has free."""
    if isinstance(X, DeviceArray):
        return False
    return X.nbytes > (FREE_SHARE * backend.runtime.free_bytes() if limit is None else limit)


class Stream:
    """Chunks of rows on their way to the device.

    Args:
        arrays: of equally many rows, on the host: X, y and maybe weights.
        order: (groups, rows) row numbers in the order of the epoch; read anew for every chunk.
        chunk: rows of a group that travel together.
    """

    def __init__(self, backend: GpuBackend, arrays: list[np.ndarray], order: np.ndarray, chunk: int) -> None:
        self.runtime, self.arrays, self.host_order, self.chunk = backend.runtime, arrays, order, chunk
        groups, rows = order.shape
        shapes = [(SLOTS, groups, chunk, *array.shape[1:]) for array in arrays]
        self.slots = [backend.empty(shape, array.dtype) for shape, array in zip(shapes, arrays, strict=True)]
        self._pinned = [
            self.runtime.pinned(prod(shape) * array.itemsize).view(array.dtype).reshape(shape)
            for shape, array in zip(shapes, arrays, strict=True)
        ]
        self._held: list[int | None] = [None] * SLOTS  # the chunk in each slot
        self._copied: list[Any] = [None] * SLOTS  # events: the pinned memory may be filled again
        # Events: the steps that read the slot are done; at first, whatever read its memory before.
        self._read: list[Any] = [self.runtime.event() for _ in range(SLOTS)]
        at = np.arange(rows)
        slot = (at // chunk) % SLOTS
        self.order = backend.asarray((slot * groups + np.arange(groups)[:, None]) * chunk + at % chunk)

    @property
    def flat(self) -> list[DeviceArray]:
        """The slots as arrays of rows, which ``order`` points into."""
        return [slots.reshape(prod(slots.shape[:3]), *slots.shape[3:]) for slots in self.slots]

    def begin_epoch(self) -> None:
        """Forget the rows: the order has changed."""
        self._held = [None] * SLOTS

    def provide(self, chunk: int) -> None:
        """Have the launches that follow find ``chunk`` in its slot."""
        self.send(chunk)
        self.runtime.wait_for(self._copied[chunk % SLOTS])

    def send(self, chunk: int) -> None:
        """Pick the rows of ``chunk`` and send them off, where they are not on their way."""
        slot, start = chunk % SLOTS, chunk * self.chunk
        if self._held[slot] == chunk or start >= self.host_order.shape[1]:
            return
        rows = self.host_order[:, start : start + self.chunk]
        if self._copied[slot] is not None:
            self._copied[slot].wait()
        for array, pinned, slots in zip(self.arrays, self._pinned, self.slots, strict=True):
            for group, picked in enumerate(rows):
                part = pinned[slot, group, : len(picked)]
                array.take(picked, axis=0, out=part, mode="clip")
            to = slots[slot]
            self._copied[slot] = self.runtime.upload_async(to.pointer, pinned[slot], self._read[slot])
        self._held[slot] = chunk

    def close(self) -> None:
        """Wait for what is on its way, before its memory is given back."""
        for copied in self._copied:
            if copied is not None:
                copied.wait()

    def done(self, chunk: int) -> None:
        """Mark that all steps that read ``chunk`` are launched."""
        self._read[chunk % SLOTS] = self.runtime.event()
