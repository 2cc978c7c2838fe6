"""A CUDA device for tests on a machine without a GPU: kernels compiled by g++, memory from malloc, graphs as lists."""

from __future__ import annotations

from typing import Any

import numpy as np

from gpumlp.backends.device import TYPE_NAMES, DeviceArray, bind

from .runtime import EmulatedRuntime, EmulatorError, ForeignArray

__all__ = ["EmulatedRuntime", "EmulatorError", "ForeignArray", "launch", "on_device"]


def on_device(runtime: EmulatedRuntime, values: Any, type: str | None = None) -> DeviceArray:
    """A copy of ``values`` on the device, as ``type`` (None: the one that their dtype has)."""
    values = np.asarray(values)
    array = DeviceArray.empty(runtime, values.shape, type or TYPE_NAMES[values.dtype])
    array[...] = values
    return array


def launch(runtime: EmulatedRuntime, name: str, grid: tuple, block: tuple, *arguments: Any) -> None:
    """Run the kernel ``name``; the arguments are DeviceArrays, None or numbers, checked against its signature."""
    instance, values = bind(name, arguments)
    runtime.launch(instance, grid, block, values)
