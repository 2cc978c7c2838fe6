"""Which backend a device name stands for, and why."""

from __future__ import annotations

from importlib.util import find_spec

from .base import Backend
from .numpy_backend import NumpyBackend

__all__ = ["Backend", "get_backend"]

NO_GPU_BACKEND = "this version of gpumlp computes on the CPU with NumPy; its GPU backend is not part of it yet"


def get_backend(device: str = "auto") -> tuple[Backend, str]:
    """The backend for ``device`` and one sentence that says why it was taken.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:<index>".

    Raises:
        ValueError: another name.
        RuntimeError: "cuda" was asked for and cannot be had; it never falls back.
    """
    if device == "cpu":
        return NumpyBackend(), "cpu: asked for"
    if device == "auto":
        cupy = "CuPy is installed" if find_spec("cupy") else "CuPy is not installed"
        return NumpyBackend(), f"cpu: {NO_GPU_BACKEND} ({cupy})"
    if isinstance(device, str) and (device == "cuda" or (device.startswith("cuda:") and device[5:].isdigit())):
        raise RuntimeError(f"device={device!r}: {NO_GPU_BACKEND}; use device='cpu' or device='auto'")
    raise ValueError(f"device={device!r} is unknown; allowed: 'auto', 'cpu', 'cuda', 'cuda:<index>'")
