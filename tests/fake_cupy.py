"""As much of CuPy as gpumlp uses, on the host: its "device" is host memory, its kernels are Python functions.

It shows what is asked of CuPy, in which order and with which arguments, and stands in for a machine where something is
missing or wrong. That the real CuPy does what is asked is shown by tests/gpu.
"""

import ctypes
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

from gpumlp.backends.cublaslt import Algorithm, CublasLtError, UnsupportedProduct
from gpumlp.backends.device import HOST_TYPES


class CUDARuntimeError(RuntimeError):
    def __init__(self, status, text="cudaErrorUnknown: unknown error"):
        super().__init__(text)
        self.status = status


class OutOfMemoryError(MemoryError):
    pass


def at(pointer, n, dtype):
    """n elements of device memory, as an array that shares it."""
    dtype = np.dtype(dtype)
    return np.frombuffer((ctypes.c_char * (n * dtype.itemsize)).from_address(int(pointer)), dtype)


def cast_i32_f32(x, _x_stride, y, _y_stride, n, _models):
    at(y, n, np.float32)[:] = at(x, n, np.int32)


class Memory:
    """What cupy.cuda.alloc returns."""

    def __init__(self, nbytes):
        self._held = np.full(nbytes + 512, 0xFF, np.uint8)
        self.ptr = -(-self._held.ctypes.data // 512) * 512


class Stream:
    """Work is done when it is launched, or when a graph that recorded it is."""

    def __init__(self, cupy, ptr):
        self.cupy, self.ptr, self.recording, self.waited = cupy, ptr, None, []

    def __enter__(self):
        self.cupy.streams.append(self)

    def __exit__(self, *_):
        assert self.cupy.streams.pop() is self

    def do(self, work):
        work() if self.recording is None else self.recording.append(work)

    def synchronize(self):
        assert self.recording is None
        self.cupy.log.append(("synchronize", self.ptr))

    def record(self, event=None):
        event = event or SimpleNamespace(synchronize=lambda: self.cupy.log.append(("wait", self.ptr)))
        event.stream = self
        return event

    def wait_event(self, event):
        self.waited.append(event.stream)

    def begin_capture(self):
        if self.cupy.fails.get("capture"):
            raise self.cupy.fails["capture"]
        self.recording = []

    def end_capture(self):
        recorded, self.recording = self.recording, None

        def launch(stream):
            for work in recorded:
                stream.do(work)

        return SimpleNamespace(launch=launch)


class Device:
    def __init__(self, cupy, index):
        self.cupy, self.id = cupy, index
        self.compute_capability = cupy.capability

    def __enter__(self):
        self.cupy.devices.append(self.id)

    def __exit__(self, *_):
        self.cupy.devices.pop()


class FakeCupy(ModuleType):
    """The module. ``fails`` says what raises ("getDeviceCount", "kernel", "compile", "capture", "alloc"), and what."""

    __version__ = "14.2.0"

    def __init__(self, count=1, capability="90", driver=13000, kernels=None, fails=None):
        super().__init__("cupy")
        self.__spec__ = ModuleSpec("cupy", None)  # find_spec asks for it
        self.capability, self.fails = capability, fails or {}
        self.kernels = {"cast_i32_f32": cast_i32_f32, **(kernels or {})}
        self.log, self.streams, self.devices, self.sources = [], [], [], []
        self.current = Stream(self, 1)
        self.allocator = Memory
        self.pool = SimpleNamespace(free_bytes=lambda: 100, used_bytes=lambda: 300, get_limit=lambda: self.limit)
        self.limit = 0
        properties = {"name": b"Fake GPU", "major": int(capability[:-1]), "minor": int(capability[-1])}
        runtime = SimpleNamespace(
            CUDARuntimeError=CUDARuntimeError,
            getDeviceCount=lambda: self.check("getDeviceCount") or count,
            getDeviceProperties=lambda index: {**properties, "multiProcessorCount": 132},
            driverGetVersion=lambda: driver,
            runtimeGetVersion=lambda: 13020,
            memGetInfo=lambda: (1000, 5000),
            memcpyHostToDevice=1,
            memcpyDeviceToHost=2,
            memcpyDeviceToDevice=3,
            memcpyAsync=self.memcpy,
            memsetAsync=lambda p, value, n, stream: self.on(stream).do(lambda: ctypes.memset(p, value, n)),
            pointerGetAttributes=lambda pointer: SimpleNamespace(device=self.index_of[pointer]),
        )
        self.index_of = {}
        self.cuda = SimpleNamespace(
            runtime=runtime,
            Device=lambda index: Device(self, index),
            Stream=self.make_stream,
            Event=lambda disable_timing: SimpleNamespace(
                synchronize=lambda: self.log.append(("wait", "event")), done=True
            ),
            alloc=self.alloc,
            alloc_pinned_memory=bytearray,
            using_allocator=self.using_allocator,
            get_elapsed_time=lambda begin, end: self.times.pop(0),
            get_current_stream=lambda: self.current,
        )
        self.times = []
        self.made = [self.current]

    def check(self, what):
        if what in self.fails:
            raise self.fails[what]

    def make_stream(self, non_blocking):
        assert non_blocking and self.devices, "a stream that waits for nothing, on the device that is current"
        self.made.append(Stream(self, 100 + len(self.made)))
        return self.made[-1]

    def on(self, ptr):
        assert self.devices, "no device is current"
        return next(stream for stream in self.made if stream.ptr == ptr)

    def memcpy(self, to, pointer, nbytes, kind, stream):
        self.log.append(("copy", kind, nbytes, stream))
        self.on(stream).do(lambda: ctypes.memmove(to, pointer, nbytes))

    def alloc(self, nbytes):
        assert self.streams, "memory comes from the pool of CuPy's current stream, and that has to be ours"
        self.check("alloc")
        return self.allocator(nbytes)

    @contextmanager
    def using_allocator(self, allocator):
        previous, self.allocator = self.allocator, allocator
        try:
            yield
        finally:
            self.allocator = previous

    def get_default_memory_pool(self):
        return self.pool

    def RawModule(self, code, options):
        self.check("compile")
        self.sources.append((code, options))
        return SimpleNamespace(get_function=lambda name: SimpleNamespace(kernel=self.function(name)))

    def function(self, name):
        def run(grid, block, values, stream):
            self.check("kernel")
            assert self.devices and all(isinstance(value, np.generic) for value in values)
            self.log.append((name, grid, block, values))
            stream.do(lambda: self.kernels[name](*(value.item() for value in values)))

        return run


class FakePlan:
    """A product as cublaslt.Plan prepares it, in NumPy; algorithms are numbered, and some fail."""

    def __init__(self, lt, product):
        self.lt, self.product, self.key = lt, product, f"{product.out.shape} adds {product.adds} {product.epilogue}"

    def candidates(self, workspace_bytes, count):
        assert self.lt.cupy.devices and count > 1
        return [Algorithm(bytes([i]) * 64, 0) for i in range(self.lt.offers)]

    def run(self, algorithm, workspace, workspace_bytes, stream):
        number, p = algorithm.data[0], self.product
        self.lt.runs.append(number)
        if number in self.lt.broken:
            raise CublasLtError(f"algorithm {number} fails")
        a, b, out = (at(x.pointer, x.size, HOST_TYPES[x.type]).reshape(x.shape) for x in (p.a, p.b, p.out))

        def work():
            out[...] = (out if p.adds else 0) + self.lt.scale * (a @ b)

        self.lt.cupy.on(stream).do(work)


class FakeLt:
    """cublaslt.CublasLt over FakeCupy."""

    def __init__(self, cupy, offers=1, broken=(), scale=1, error=None):
        self.cupy, self.offers, self.broken, self.scale, self.error = cupy, offers, broken, scale, error
        self.runs = []

    def version(self):
        return 131000

    def plan(self, product):
        if self.error:
            raise self.error
        if product.epilogue:
            raise UnsupportedProduct("no epilogue here")
        return FakePlan(self, product)
