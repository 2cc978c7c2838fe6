"""Which backend a device name stands for, and why."""

from __future__ import annotations

from typing import Any

from .base import Backend
from .numpy_backend import NumpyBackend

__all__ = ["Backend", "get_backend"]


def get_backend(device: Any = "auto") -> tuple[Backend, str]:
    """The backend for ``device`` and one sentence that says why it was taken.

    Args:
        device: "auto" takes a GPU where one works, else the CPU; "cpu"; "cuda" or "cuda:<index>"; or a backend.

    Raises:
        ValueError: another name.
        RuntimeError: "cuda" was asked for and cannot be had, with the cause and what to do; it never falls back.
    """
    if device == "cpu":
        return NumpyBackend(), "cpu: asked for"
    if hasattr(device, "is_device"):
        return device, f"{device.device}: the backend that was given"
    if not isinstance(device, str) or not (device in ("auto", "cuda") or _index(device) is not None):
        raise ValueError(f"device={device!r} is unknown; allowed: 'auto', 'cpu', 'cuda', 'cuda:<index>'")
    from .probe import find_gpu

    runtime, reason = find_gpu(_index(device))
    if runtime is not None:
        from .gpu_backend import GpuBackend

        return GpuBackend(runtime), reason  # type: ignore[return-value]
    if device == "auto":
        return NumpyBackend(), f"cpu: {reason}"
    raise RuntimeError(f"device={device!r}: {reason}; or use device='cpu' or device='auto'")


def _index(device: str) -> int | None:
    return int(device[5:]) if device.startswith("cuda:") and device[5:].isdigit() else None
