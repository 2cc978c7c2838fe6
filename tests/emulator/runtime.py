"""A device on the host: gpumlp.backends.device.Runtime over malloc, emulated kernels and a NumPy model of every product.

It refuses what a GPU refuses (uploads while a graph is captured, memory beyond a limit, blocks that are too large) and
shows what a GPU hides: memory nobody wrote reads as NaN, an access past an array ends the process under AddressSanitizer.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np

from gpumlp.activations import gelu_tanh
from gpumlp.backends.device import (
    HOST_TYPES,
    ITEM_SIZES,
    TYPE_NAMES,
    DeviceArray,
    DeviceMemoryError,
    Memory,
    Product,
    bf16_to_float32,
    float32_to_bf16,
    row_major,
)
from gpumlp.backends.kernel_source import Instance

from . import build

_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]
_libc.posix_memalign.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t, ctypes.c_size_t]


class EmulatorError(RuntimeError):
    """A kernel did what a GPU punishes with a hang or worse."""


class EmulatedRuntime:
    """A device with ``memory`` bytes. Its options make it behave as a GPU on which something is not to be had.

    ``schedule`` is the seed of the order in which the threads of a kernel run (0: in order), ``prefer`` the option that
    ``fastest`` chooses, ``epilogues`` whether products have any, ``launches`` counts kernels by name when they run (not
    when they are recorded), ``downloads`` the copies to the host.
    """

    name = "emulator"
    device = "cuda:0"
    description = "a CUDA emulator on the host"

    def __init__(
        self,
        schedule: int = 0,
        memory: int = 4 << 30,
        processors: int = 4,
        can_capture: bool = True,
        epilogues: bool = True,
        prefer: int = 0,
        sanitize: bool | None = None,
    ) -> None:
        self.capability = (9, 0)
        self.schedule, self.memory, self.processors, self.can_capture = schedule, memory, processors, can_capture
        self.epilogues, self.prefer = epilogues, prefer
        self.sanitize = build.sanitizes() if sanitize is None else sanitize
        self.launches: Counter[str] = Counter()
        self.downloads = 0
        self._sizes: dict[int, int] = {}  # of what is allocated, by pointer
        self._pointers: list[int] = []  # in order
        self._recording: list[Callable[[], None]] | None = None

    # --- memory

    def allocate(self, nbytes: int) -> Memory:
        self._not_while_capturing("memory is allocated")
        if nbytes > self.free_bytes():
            raise DeviceMemoryError(
                f"{self.device} has {self.free_bytes():,} bytes free and an array needs {nbytes:,}: "
                "try a smaller batch_size, fewer models at once or narrower layers"
            )
        block = _Block(self, nbytes)
        return Memory(self, block.pointer, nbytes, block)

    def free_bytes(self) -> int:
        return self.memory - sum(self._sizes.values())

    def upload(self, pointer: int, values: np.ndarray) -> None:
        self._not_while_capturing("an array is uploaded")
        self._move(pointer, values)

    def download(self, pointer: int, out: np.ndarray) -> None:
        self._not_while_capturing("an array is downloaded")
        assert out.flags.c_contiguous
        self.downloads += 1
        self._check(pointer, out.nbytes)
        ctypes.memmove(out.ctypes.data, pointer, out.nbytes)

    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        self._check(to, nbytes)
        self._check(pointer, nbytes)
        self._run(lambda: ctypes.memmove(to, pointer, nbytes))

    def zero(self, pointer: int, nbytes: int) -> None:
        self._check(pointer, nbytes)
        self._run(lambda: ctypes.memset(pointer, 0, nbytes))

    def _move(self, pointer: int, values: np.ndarray) -> None:
        assert values.flags.c_contiguous
        self._check(pointer, values.nbytes)
        ctypes.memmove(pointer, values.ctypes.data, values.nbytes)

    def _check(self, pointer: int, nbytes: int) -> None:
        """That all of it lies in one allocation."""
        at = bisect_right(self._pointers, pointer) - 1
        begin = self._pointers[at] if at >= 0 else 0
        inside = at >= 0 and pointer + nbytes <= begin + self._sizes[begin]
        assert inside or not nbytes, f"{nbytes} bytes at {pointer:#x} are no part of one array of this device"

    # --- work

    def launch(self, instance: Instance, grid: tuple, block: tuple, values: list) -> None:
        self._run(_Launch(self, instance, grid, block, values))

    def product(self, product: Product) -> Callable[[], None]:
        self._not_while_capturing("a product is prepared")
        if product.epilogue and not self.epilogues:
            raise ValueError(f"no product with the epilogue {product.epilogue!r} for these shapes")
        prepared = _PreparedProduct(product)
        return lambda: self._run(prepared)

    def fastest(self, key: str, options: Sequence[Callable[[], None]]) -> int:
        self._not_while_capturing("ways are timed")
        for option in options:
            option()
        return min(self.prefer, len(options) - 1)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        if not self.can_capture:
            raise RuntimeError(f"{self.device} captures no graphs")
        self._not_while_capturing("another graph is captured")
        recorded = self._recording = []
        try:
            function()
        finally:
            self._recording = None
        return partial(self._replay, recorded, function)  # which keeps the arrays that it was captured with

    def _replay(self, recorded: list[Callable[[], None]], _captured: Callable) -> None:
        for work in recorded:
            self._run(work)

    def synchronize(self) -> None:
        self._not_while_capturing("the host waits")

    def _run(self, work: Callable[[], Any]) -> None:
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def _not_while_capturing(self, what: str) -> None:
        if self._recording is not None:
            raise RuntimeError(f"{what} while a graph is captured")

    # --- beside the launches: here all of it happens at once

    def pinned(self, nbytes: int) -> np.ndarray:
        return np.empty(nbytes, np.uint8)

    def upload_async(self, pointer: int, values: np.ndarray, after: Any) -> Any:
        self._not_while_capturing("an array is uploaded")
        self._move(pointer, values)
        return self.event()

    def event(self) -> Any:
        return _Event(self)

    def wait_for(self, event: Any) -> None:
        assert isinstance(event, _Event), event

    # --- arrays of other libraries

    def adopt(self, array: Any) -> DeviceArray | None:
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return None
        dtype, shape, pointer = np.dtype(interface["typestr"]), tuple(interface["shape"]), interface["data"][0]
        if dtype not in TYPE_NAMES:
            raise ValueError(f"an array of {dtype} is none that kernels take; they take {', '.join(ITEM_SIZES)}")
        strides = interface.get("strides") or tuple(n * dtype.itemsize for n in row_major(shape))
        memory = Memory(self, pointer, prod(shape) * dtype.itemsize, array)
        return DeviceArray(memory, pointer, shape, tuple(n // dtype.itemsize for n in strides), TYPE_NAMES[dtype])

    def export(self, array: DeviceArray, like: Any) -> Any:
        assert isinstance(like, ForeignArray), like
        return ForeignArray(array)


class ForeignArray:
    """An array of another library on the device: all that gpumlp may know of it is its interface."""

    def __init__(self, array: DeviceArray) -> None:
        self._array = array
        self.__cuda_array_interface__ = array.__cuda_array_interface__

    def get(self) -> np.ndarray:
        return self._array.get()


class _Block:
    """Memory from malloc, so that AddressSanitizer watches its ends; full of NaN. Freed with the last array on it."""

    def __init__(self, runtime: EmulatedRuntime, nbytes: int) -> None:
        held = ctypes.c_void_p()
        if _libc.posix_memalign(ctypes.byref(held), 256, max(nbytes, 1)):
            raise MemoryError(f"the host has no {nbytes:,} bytes left for the emulator")
        self.runtime, self.pointer = runtime, int(held.value or 0)
        ctypes.memset(self.pointer, 0xFF, nbytes)
        runtime._sizes[self.pointer] = nbytes
        insort(runtime._pointers, self.pointer)

    def __del__(self) -> None:
        del self.runtime._sizes[self.pointer]
        self.runtime._pointers.remove(self.pointer)
        _libc.free(self.pointer)


class _Event:
    def __init__(self, runtime: EmulatedRuntime) -> None:
        self._runtime = runtime

    def wait(self) -> None:
        self._runtime._not_while_capturing("the host waits")


class _Launch:
    """A kernel with its arguments, as fixed as a graph records them."""

    def __init__(self, runtime: EmulatedRuntime, instance: Instance, grid: tuple, block: tuple, values: list) -> None:
        assert len(values) == len(instance.arguments), f"{instance.name} takes {len(instance.arguments)} arguments"
        for value, wanted in zip(values, instance.arguments, strict=True):
            dtype = np.dtype(np.uint64 if wanted.is_pointer else HOST_TYPES[wanted.type])
            assert value.dtype == dtype, f"{instance.name}: {wanted.name} is {value!r}, not of {dtype}"
        self.runtime, self.name = runtime, instance.name
        self.entry = build.library(instance.file, runtime.sanitize)[f"emu_{instance.name}"]
        self.entry.restype = ctypes.c_char_p
        shape = [*grid, *(1,) * (3 - len(grid)), *block, *(1,) * (3 - len(block))]
        self.shape = (ctypes.c_uint * 6)(*map(int, shape))
        self.values = [np.array(value) for value in values]  # each at an address of its own
        self.pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in self.values))

    def __call__(self) -> None:
        self.runtime.launches[self.name] += 1
        error = self.entry(self.shape, self.pointers, ctypes.c_uint(self.runtime.schedule))
        if error is not None:
            raise EmulatorError(f"{self.name}: {error.decode()}")


class _PreparedProduct:
    """What cuBLASLt computes, in NumPy on the same memory: two-byte floats are widened first and rounded last."""

    def __init__(self, product: Product) -> None:
        p = product
        models, m, n = p.out.shape
        k = p.a.shape[2]
        assert p.a.shape in ((models, m, k), (1, m, k)) and p.b.shape in ((models, k, n), (1, k, n)), p
        assert p.epilogue in ("", "bias", "relu_bias", "gelu_bias", "bias_gradient"), p
        assert (p.bias is not None) == bool(p.epilogue) and (p.auxiliary is not None) == (p.epilogue == "gelu_bias"), p
        assert p.bias is None or p.bias.shape == (models, m if p.epilogue == "bias_gradient" else n), p
        assert p.auxiliary is None or p.auxiliary.shape == p.out.shape, p
        self.product = p
        if not p.adds:  # a GPU tries several algorithms there
            write(p.out, np.float32(np.nan))

    def __call__(self) -> None:
        p = self.product
        a, b = read(p.a), read(p.b)
        out = np.matmul(to_tf32(a), to_tf32(b)) if p.tf32 else np.matmul(a, b)  # (models, m, n)
        if p.adds:
            out += read(p.out)
        if p.epilogue == "bias_gradient":
            write(p.bias, a.sum(axis=2))
        elif p.epilogue:
            out += read(p.bias)[:, None, :]
        if p.epilogue == "relu_bias":
            np.maximum(out, 0, out=out)
        if p.epilogue == "gelu_bias":
            write(p.auxiliary, out)
            out = gelu_tanh(out)
        write(p.out, out)


def view(array: DeviceArray) -> np.ndarray:
    """The device's own memory as a NumPy array; bf16 as its bits."""
    dtype = np.dtype(np.uint16 if array.type == "bf16" else HOST_TYPES[array.type])
    if not array.size:
        return np.empty(array.shape, dtype)
    last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True))
    nbytes = (last + 1) * dtype.itemsize
    array.memory.runtime._check(array.pointer, nbytes)
    flat = np.frombuffer((ctypes.c_ubyte * nbytes).from_address(array.pointer), dtype)
    strides = tuple(stride * ITEM_SIZES[array.type] for stride in array.strides)
    return np.lib.stride_tricks.as_strided(flat, array.shape, strides)


def read(array: DeviceArray) -> np.ndarray:
    """In the type that products compute in."""
    if array.type == "bf16":
        return bf16_to_float32(view(array))
    return view(array).astype(np.float32) if array.type == "f16" else view(array)


def write(array: DeviceArray, values: np.ndarray) -> None:
    view(array)[...] = float32_to_bf16(values) if array.type == "bf16" else values


def to_tf32(x: np.ndarray) -> np.ndarray:
    """Ten bits behind the point, the nearest, ties away from zero."""
    assert x.dtype == np.float32, x.dtype
    return ((x.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
