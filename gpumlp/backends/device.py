"""What a device is to the GPU backend: memory with a shape, launches, products, graphs. Two things supply it: CuPy on a
GPU (``cupy_runtime.py``) and, in the tests, an emulator on the host (``tests/emulator``)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import numpy as np

from .kernel_source import Instance, instances

HOST_TYPES = {  # of each type of kernel_source.TYPES; bf16, which NumPy lacks, is float32 on the host
    "i8": np.int8, "u8": np.uint8, "i16": np.int16, "u16": np.uint16, "i32": np.int32, "u32": np.uint32,
    "i64": np.int64, "u64": np.uint64, "f16": np.float16, "f32": np.float32, "f64": np.float64, "bf16": np.float32,
}  # fmt: skip
ITEM_SIZES = {name: np.dtype(dtype).itemsize for name, dtype in HOST_TYPES.items()} | {"bf16": 2}
TYPE_NAMES = {np.dtype(dtype): name for name, dtype in HOST_TYPES.items() if name != "bf16"} | {np.dtype(bool): "u8"}


class DeviceMemoryError(MemoryError):
    """The device has less memory free than an array needs; the message says how much of each, and what to try."""


@dataclass(slots=True)
class Memory:
    """A stretch of device memory; whoever holds it keeps it."""

    runtime: Runtime
    pointer: int  # at a multiple of 256 bytes
    nbytes: int
    owner: Any = None  # what frees it


class Runtime(Protocol):
    """A device. What is asked of it is done in order; the host waits in ``download``, ``synchronize``, an event's ``wait``,
    and while it uploads much."""

    name: str  # "cupy", "emulator"
    device: str  # "cuda:0"
    description: str  # "NVIDIA H100 80GB HBM3, CUDA 13.0, CuPy 14.2.0"
    processors: int  # multiprocessors
    capability: tuple[int, int]  # compute capability
    can_capture: bool

    def allocate(self, nbytes: int) -> Memory:
        """Memory of any content. Raises DeviceMemoryError; RuntimeError within ``capture``."""

    def free_bytes(self) -> int: ...
    def upload(self, pointer: int, values: np.ndarray) -> None:
        """C-contiguous ``values`` to the device; the caller may change them afterwards."""

    def download(self, pointer: int, out: np.ndarray) -> None:
        """Fill C-contiguous ``out`` from the device, when all work before is done."""

    def copy(self, to: int, pointer: int, nbytes: int) -> None: ...
    def zero(self, pointer: int, nbytes: int) -> None: ...
    def launch(self, instance: Instance, grid: tuple, block: tuple, values: list) -> None:
        """Run a kernel; ``values`` are NumPy scalars in the types of its arguments, np.uint64 for pointers."""

    def product(self, product: Product) -> Callable[[], None]:
        """Prepare a matrix product: what is returned launches it. Raises ValueError where an epilogue is not to be had."""

    def fastest(self, key: str, options: Sequence[Callable[[], None]]) -> int:
        """Which of several ways to the same buffers takes least time on them; remembered by ``key`` and device."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record what ``function`` launches; what is returned launches it all again, with the same arguments."""

    def synchronize(self) -> None: ...
    def pinned(self, nbytes: int) -> np.ndarray:
        """Host memory (nbytes,) uint8 from which ``upload_async`` copies while kernels run."""

    def upload_async(self, pointer: int, values: np.ndarray, after: Any) -> Any:
        """Copy from pinned memory beside the launches, behind the event ``after`` if there is one; returns an event."""

    def event(self) -> Any:
        """A mark behind all launches so far; ``event.wait()`` holds the host until it is reached."""

    def wait_for(self, event: Any) -> None:
        """Hold the launches that follow until ``event``; the host goes on."""

    def adopt(self, array: Any) -> DeviceArray | None:
        """A view of an array of another library on this device, None where ``array`` is none."""

    def export(self, array: DeviceArray, like: Any) -> Any:
        """An array of the library that ``like`` belongs to."""


class DeviceArray:
    """A view of device memory: shape, strides in elements, element type.

    ``array.get()`` gives a NumPy array, ``array[...] = values`` takes one; both copy. It speaks
    ``__cuda_array_interface__``, so ``cupy.asarray(array)`` and ``torch.as_tensor(array)`` share its memory. NumPy's own
    functions do not take it.
    """

    __slots__ = ("memory", "pointer", "shape", "strides", "type")

    def __init__(self, memory: Memory, pointer: int, shape: tuple, strides: tuple, type: str) -> None:
        self.memory, self.pointer, self.shape, self.strides, self.type = memory, pointer, shape, strides, type

    @classmethod
    def empty(cls, runtime: Runtime, shape: tuple[int, ...], type: str) -> DeviceArray:
        shape = tuple(int(n) for n in shape)
        nbytes = prod(shape) * ITEM_SIZES[type]
        try:
            memory = runtime.allocate(nbytes)
        except DeviceMemoryError:
            gc.collect()  # networks and their buffers refer to each other: what is not in use may still be held
            memory = runtime.allocate(nbytes)
        return cls(memory, memory.pointer, shape, row_major(shape), type)

    # --- what it is

    @property
    def dtype(self) -> np.dtype:
        """Of what ``get`` returns."""
        return np.dtype(HOST_TYPES[self.type])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_SIZES[self.type]

    @property
    def is_contiguous(self) -> bool:
        return _is_row_major(self.shape, self.strides)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        return f"<DeviceArray {self.shape} {self.type} on {self.memory.runtime.device}>"

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("an array on the device does not become a NumPy array by itself: call its get()")

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.type == "bf16":
            raise AttributeError("bfloat16 has no name in __cuda_array_interface__")
        strides = None if self.is_contiguous else tuple(s * ITEM_SIZES[self.type] for s in self.strides)
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.pointer, False),
            "version": 3,
            "strides": strides,
        }

    # --- views

    def __getitem__(self, key: Any) -> DeviceArray:
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            at = keys.index(Ellipsis)
            keys[at : at + 1] = [slice(None)] * (self.ndim - sum(k is not None for k in keys) + 1)
        pointer, shape, strides, axis = self.pointer, [], [], 0
        for k in keys:
            if k is None:
                shape.append(1)
                strides.append(0)
                continue
            n, stride = self.shape[axis], self.strides[axis]
            if isinstance(k, slice):
                start, stop, step = k.indices(n)
                if step != 1:
                    raise IndexError("a view of device memory takes slices of step 1")
                shape.append(max(0, stop - start))
                strides.append(stride)
            elif isinstance(k, int | np.integer) and -n <= k < n:
                start = int(k) % n
            else:
                raise IndexError(f"{k!r} is no index into an axis of {n}")
            pointer += start * stride * ITEM_SIZES[self.type]
            axis += 1
        shape, strides = [*shape, *self.shape[axis:]], [*strides, *self.strides[axis:]]
        return DeviceArray(self.memory, pointer, tuple(shape), tuple(strides), self.type)

    def swapaxes(self, i: int, j: int) -> DeviceArray:
        shape, strides = list(self.shape), list(self.strides)
        shape[i], shape[j], strides[i], strides[j] = shape[j], shape[i], strides[j], strides[i]
        return DeviceArray(self.memory, self.pointer, tuple(shape), tuple(strides), self.type)

    def reshape(self, *shape: int) -> DeviceArray:
        """The same elements in another shape: leading axes may stay strided, what is behind them has to be contiguous."""
        if -1 in shape:
            known = -prod(shape)
            shape = tuple(self.size // known if n == -1 else n for n in shape)
        if prod(shape) != self.size:
            raise ValueError(f"{self.shape} does not reshape to {shape}")
        for kept in range(self.ndim + 1):
            if shape[:kept] == self.shape[:kept] and _is_row_major(self.shape[kept:], self.strides[kept:]):
                strides = (*self.strides[:kept], *row_major(shape[kept:]))
                return DeviceArray(self.memory, self.pointer, shape, strides, self.type)
        raise ValueError(f"an array of shape {self.shape} and strides {self.strides} is no view of shape {shape}")

    # --- copies

    def get(self) -> np.ndarray:
        """A copy on the host, float32 for bf16; waits for the device."""
        out = np.empty(self.shape, np.uint16 if self.type == "bf16" else self.dtype)
        flat, at = out.reshape(-1), 0
        for pointer, n in self._runs():
            self.memory.runtime.download(pointer, flat[at : at + n])
            at += n
        return bf16_to_float32(out) if self.type == "bf16" else out

    def __setitem__(self, key: Any, values: Any) -> None:
        part = self[key]
        runtime, size = self.memory.runtime, ITEM_SIZES[self.type]
        if isinstance(values, DeviceArray):
            assert values.shape == part.shape and values.type == part.type, (values, part)
            pairs = zip(part._runs(values.strides), values._runs(part.strides), strict=True)
            for (to, n), (pointer, _) in pairs:
                runtime.copy(to, pointer, n * size)
            return
        if np.ndim(values) == 0 and values == 0:
            for pointer, n in part._runs():
                runtime.zero(pointer, n * size)
            return
        host = np.broadcast_to(np.asarray(values), part.shape)
        flat = (float32_to_bf16(host) if self.type == "bf16" else np.ascontiguousarray(host, self.dtype)).reshape(-1)
        at = 0
        for pointer, n in part._runs():
            runtime.upload(pointer, flat[at : at + n])
            at += n

    def _runs(self, other: tuple | None = None) -> Iterator[tuple[int, int]]:
        """Pointer and length of the contiguous stretches, in order; cut so that ``other`` strides have the same ones."""
        kept = 0
        while not (
            _is_row_major(self.shape[kept:], self.strides[kept:])
            and (other is None or _is_row_major(self.shape[kept:], other[kept:]))
        ):
            kept += 1
        n = prod(self.shape[kept:])
        if not self.size:
            return
        for index in np.ndindex(*self.shape[:kept]):
            offset = sum(i * s for i, s in zip(index, self.strides, strict=False))
            yield self.pointer + offset * ITEM_SIZES[self.type], n


@dataclass(frozen=True, slots=True)
class Product:
    """out ← a b, or out ← out + a b, for every model; a transpose is in the strides.

    Where ``epilogue`` is not "": "bias" out + bias; "relu_bias" relu(out + bias), its bits kept in ``auxiliary`` where one
    is given; "gelu_bias" gelu_tanh(out + bias), the sum kept in ``auxiliary``; "bias_gradient" leaves the sum of ``a`` over
    its columns in ``bias``; "relu_gradient" and "gelu_gradient" out · f'(auxiliary), its column sums left in ``bias``.
    """

    a: DeviceArray  # (models or 1, m, k); a stride of 0 over models repeats it
    b: DeviceArray  # (models or 1, k, n)
    out: DeviceArray  # (models, m, n)
    adds: bool = False
    epilogue: str = ""
    bias: DeviceArray | None = None  # (models, n); (models, m) for "bias_gradient"
    auxiliary: DeviceArray | None = None  # (models, m, n); of relu (models, m, ⌈n / 8⌉) u8
    tf32: bool = False


def bind(name: str, arguments: Sequence[Any]) -> tuple[Instance, list]:
    """The instance ``name`` and its arguments in the types of its signature; asserts that they fit."""
    instance = instances()[name]
    assert len(arguments) == len(instance.arguments), f"{name} takes {len(instance.arguments)}, got {len(arguments)}"
    values: list[Any] = []
    for given, wanted in zip(arguments, instance.arguments, strict=True):
        if wanted.is_pointer:
            assert given is None or (isinstance(given, DeviceArray) and given.type == wanted.type), (
                f"{name}: {wanted.name} is {given!r}, the kernel takes {wanted.type}*"
            )
            values.append(np.uint64(0 if given is None else given.pointer))
        else:
            assert isinstance(given, int | float | np.integer | np.floating), (
                f"{name}: {wanted.name} is {given!r}, no number"
            )
            values.append(HOST_TYPES[wanted.type](given))  # type: ignore[arg-type]
    return instance, values


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(prod(shape[i + 1 :]) for i in range(len(shape)))


def _is_row_major(shape: tuple, strides: tuple) -> bool:
    return all(n == 1 or s == r for n, s, r in zip(shape, strides, row_major(shape), strict=True)) or 0 in shape


def bf16_to_float32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16, ties to even; NaN to one NaN."""
    x = np.ascontiguousarray(values, np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)
