"""The device on a GPU: memory, kernels, matrix products and graphs through CuPy. The only file that imports cupy.

All launches go to one stream of our own, in order, and a graph records all of them; what ``upload_async`` copies goes to a
second one beside it. CuPy's current stream is waited for where arrays come from other libraries, and made to wait where
they go to them. One lock stands before the streams: while a thread records a graph, what others launch would get into it.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from statistics import median
from typing import Any
from zlib import crc32

import numpy as np

from .cublaslt import Algorithm, CublasLt, CublasLtError, Plan, UnsupportedProduct
from .device import ITEM_SIZES, TYPE_NAMES, DeviceArray, DeviceMemoryError, Memory, Product
from .kernel_source import Instance, files, source, text_of
from .tuning import TuningCache

CANDIDATES = 8  # algorithms of cuBLASLt that are timed for a product
ROUNDS = 5  # timings of which the median counts
GRAPH_MILLISECONDS, GRAPH_RUNS = (
    1.0,
    8,
)  # a timed graph holds so many runs as take about this long, and no more than that
STAGED = 1 << 22  # bytes up to which an upload goes through pinned memory, and the host does not wait for it
CUDA_DEVICES = (2, 13)  # kDLCUDA and kDLCUDAManaged of DLPack


def load_cupy() -> Any:
    """The module; raises whatever importing it raises."""
    import cupy  # type: ignore

    return cupy


class CupyRuntime:
    """``device.Runtime`` on the GPU ``index``. Where no GPU works the constructor raises what CUDA says: see ``probe``."""

    name = "cupy"
    can_capture = True

    def __init__(self, index: int) -> None:
        cupy = self._cupy = load_cupy()
        self._cuda = cupy.cuda.runtime
        self._index, self._device = index, cupy.cuda.Device(index)
        properties = self._cuda.getDeviceProperties(index)
        self.capability: tuple[int, int] = properties["major"], properties["minor"]
        self.processors: int = properties["multiProcessorCount"]
        self.device = f"cuda:{index}"
        version = self._cuda.runtimeGetVersion()
        self._model = properties["name"].decode()
        self.description = f"{self._model}, CUDA {version // 1000}.{version % 1000 // 10}, CuPy {cupy.__version__}"
        with self._device:
            # Non-blocking: capturing on a stream that waits for CUDA's default one would block that one for the process.
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._copies = cupy.cuda.Stream(non_blocking=True)
        self._functions: dict[str, Callable] = {}  # by the name of the instance
        self._capturing = False
        self._lock = threading.RLock()
        self._staged: deque[tuple[Any, Any]] = deque()  # events of uploads, and the pinned memory that they read
        # One suffices: products follow each other on one stream. The sizes are those that NVIDIA recommends.
        self._workspace = self.allocate((32 if self.capability >= (9, 0) else 4) << 20)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """This thread's turn at the streams of this GPU."""
        with self._lock, self._device:
            yield

    # --- memory

    def allocate(self, nbytes: int) -> Memory:
        self._not_while_capturing("memory is allocated")
        # On our stream: CuPy gives memory that is freed there only to allocations there, so behind what still reads it.
        with self._turn(), self._stream:
            try:
                owner = self._cupy.cuda.alloc(max(nbytes, 1))  # an empty array is no null pointer: that means absent
            except MemoryError as error:
                raise DeviceMemoryError(
                    f"{self.device} has {_gib(self.free_bytes())} free and {_gib(nbytes)} more are needed: try a smaller "
                    "batch_size, precision='bf16', or a lower memory_limit for the data, so that it streams"
                ) from error
        return Memory(self, owner.ptr, nbytes, owner)

    def free_bytes(self) -> int:
        pool = self._cupy.get_default_memory_pool()
        with self._turn():
            free = self._cuda.memGetInfo()[0] + pool.free_bytes()  # what the pool holds unused is free to us
            limit = pool.get_limit()  # 0: none
            return min(free, limit - pool.used_bytes()) if limit else free

    def upload(self, pointer: int, values: np.ndarray) -> None:
        self._not_while_capturing("an array is uploaded")
        with self._turn():
            if values.nbytes > STAGED:
                self._copy(pointer, values.ctypes.data, values.nbytes, self._cuda.memcpyHostToDevice, self._stream)
                self._stream.synchronize()  # until then the copy may read values
                return
            while self._staged and self._staged[0][0].done:
                self._staged.popleft()
            pinned = self._cupy.cuda.alloc_pinned_memory(max(values.nbytes, 1))
            staging = np.frombuffer(pinned, np.uint8)[: values.nbytes]
            staging[...] = values.reshape(-1).view(np.uint8)
            self._copy(pointer, staging.ctypes.data, values.nbytes, self._cuda.memcpyHostToDevice, self._stream)
            self._staged.append((self._stream.record(self._cupy.cuda.Event(disable_timing=True)), pinned))

    def download(self, pointer: int, out: np.ndarray) -> None:
        self._not_while_capturing("an array is downloaded")
        with self._turn():
            self._copy(out.ctypes.data, pointer, out.nbytes, self._cuda.memcpyDeviceToHost, self._stream)
            self._stream.synchronize()

    def copy(self, to: int, pointer: int, nbytes: int) -> None:
        with self._turn():
            self._copy(to, pointer, nbytes, self._cuda.memcpyDeviceToDevice, self._stream)

    def zero(self, pointer: int, nbytes: int) -> None:
        with self._turn():
            if nbytes:
                self._cuda.memsetAsync(pointer, 0, nbytes, self._stream.ptr)

    def _copy(self, to: int, pointer: int, nbytes: int, kind: int, stream: Any) -> None:
        if nbytes:
            self._cuda.memcpyAsync(to, pointer, nbytes, kind, stream.ptr)

    # --- launches

    def launch(self, instance: Instance, grid: tuple, block: tuple, values: list) -> None:
        with self._turn():
            function = self._functions.get(instance.name) or self._compile(instance)
            function(grid, block, values, stream=self._stream)

    def _compile(self, instance: Instance) -> Callable:
        """One module for each instance: what they share costs 0.06 s of compiling each, one needless loss a second."""
        module = self._cupy.RawModule(code=source(instance.file, [instance]), options=("-std=c++17",))
        # CuPy compiles when a function is asked for, unless a file of its cache has it. RawKernel would launch on CuPy's
        # current stream; the cupy.cuda.Function beneath it takes one.
        function = self._functions[instance.name] = module.get_function(instance.name).kernel
        return function

    def product(self, product: Product) -> Callable[[], None]:
        """``Runtime.product``. The choice of an algorithm runs several, so ``product.out`` has no meaning afterwards."""
        self._not_while_capturing("a product is prepared")
        if product.epilogue == "relu_bias" and not self._relu_keeps_nan:
            raise UnsupportedProduct("this cuBLASLt's ReLU turns NaN into 0, which would hide that a training diverged")
        plan = self._lt.plan(product)
        return partial(self._multiply, plan, self._algorithm(plan))

    def _multiply(self, plan: Plan, algorithm: Algorithm) -> None:
        with self._turn():
            plan.run(algorithm, self._workspace.pointer, self._workspace.nbytes, self._stream.ptr)

    def _algorithm(self, plan: Plan) -> Algorithm:
        known = self._tuning.get(plan.key)
        if isinstance(known, str):
            with suppress(ValueError, CublasLtError):  # a file in which somebody wrote something else
                algorithm = Algorithm.from_bytes(bytes.fromhex(known))
                self._multiply(plan, algorithm)
                return algorithm
        with self._turn():
            candidates = plan.candidates(self._workspace.nbytes, CANDIDATES)
        times: dict[Algorithm, float] = {}
        for algorithm in candidates:
            with suppress(CublasLtError):  # some that it offers fail when they run
                times[algorithm] = self._milliseconds(partial(self._multiply, plan, algorithm))
        if not times:
            raise UnsupportedProduct(f"each of {len(candidates)} algorithms that cuBLASLt offers fails for {plan.key}")
        best = min(times, key=times.__getitem__)
        self._tuning.put(plan.key, best.to_bytes().hex())
        return best

    @cached_property
    def _relu_keeps_nan(self) -> bool:
        """Tried once on a small product: no document says what its ReLU makes of NaN."""
        n = 16
        a, b, out = (DeviceArray.empty(self, (1, n, n), "f32") for _ in range(3))
        bias = DeviceArray.empty(self, (1, n), "f32")
        for array in (a, b, bias):
            array[...] = 1.0
        a[:, 0] = np.nan
        plan = self._lt.plan(Product(a, b, out, epilogue="relu_bias", bias=bias))
        with self._turn():
            (algorithm, *_) = plan.candidates(self._workspace.nbytes, 1)
        self._multiply(plan, algorithm)
        return bool(np.isnan(out.get()[0, 0]).all())

    @cached_property
    def _lt(self) -> CublasLt:
        return CublasLt()

    @cached_property
    def _tuning(self) -> TuningCache:
        kernels = crc32("".join(map(text_of, files())).encode())  # ways with a changed kernel are timed again
        return TuningCache(self._model, f"cuBLASLt {self._lt.version()}, kernels {kernels:08x}")

    # --- timing

    def fastest(self, key: str, options: Sequence[Callable[[], None]]) -> int:
        self._not_while_capturing("ways are timed")
        known = self._tuning.get(key)
        if isinstance(known, int) and known in range(len(options)):
            return known
        times = [self._milliseconds(option) for option in options]
        best = times.index(min(times))
        self._tuning.put(key, best)
        return best

    def _milliseconds(self, run: Callable[[], None]) -> float:
        """Of one run within a graph, as steps will launch it: on their own, small kernels would time the host."""
        run()  # loads kernels
        runs = int(min(GRAPH_RUNS, max(1.0, GRAPH_MILLISECONDS / max(self._elapsed(run), 1e-3))))

        def several() -> None:
            for _ in range(runs):
                run()

        try:
            replay = self.capture(several)
        except self._cuda.CUDARuntimeError:  # this GPU records nothing: steps will launch one by one, too
            replay = several
        replay()
        return median(self._elapsed(replay) for _ in range(ROUNDS)) / runs

    def _elapsed(self, run: Callable[[], None]) -> float:
        with self._turn():
            begin = self._stream.record()
            run()
            end = self._stream.record()
            end.synchronize()
            return self._cupy.cuda.get_elapsed_time(begin, end)

    # --- graphs

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]:
        """``Runtime.capture``. What ``function`` launches has run before: kernels are loaded when they first run."""
        self._not_while_capturing("another graph is captured")
        with self._turn(), self._stream, self._cupy.cuda.using_allocator(_refuse):
            self._stream.begin_capture()
            self._capturing = True
            try:
                function()
            except BaseException:
                with suppress(RuntimeError):  # CUDA's own: what failed may have ended the capture
                    self._stream.end_capture()
                raise
            finally:
                self._capturing = False
            graph = self._stream.end_capture()
        # A graph keeps no array alive that it was captured with; function does.
        return partial(self._replay, graph, function)

    def _replay(self, graph: Any, _captured: Callable) -> None:
        with self._turn():
            graph.launch(self._stream)

    def _not_while_capturing(self, what: str) -> None:
        with self._lock:  # another thread's capture ends first
            if self._capturing:
                raise RuntimeError(f"{what} while a graph is captured")

    # --- waiting, and copies beside the launches

    def synchronize(self) -> None:
        self._not_while_capturing("the host waits")
        with self._turn():
            self._stream.synchronize()

    def pinned(self, nbytes: int) -> np.ndarray:
        with self._turn():
            return np.frombuffer(self._cupy.cuda.alloc_pinned_memory(max(nbytes, 1)), np.uint8)[:nbytes]

    def upload_async(self, pointer: int, values: np.ndarray, after: Any) -> Any:
        with self._turn():
            if after is not None:
                self._copies.wait_event(after.mark)
            self._copy(pointer, values.ctypes.data, values.nbytes, self._cuda.memcpyHostToDevice, self._copies)
            return _Event(self, self._copies)

    def event(self) -> Any:
        return _Event(self, self._stream)

    def wait_for(self, event: Any) -> None:
        with self._turn():
            self._stream.wait_event(event.mark)

    # --- arrays of other libraries

    def adopt(self, array: Any) -> DeviceArray | None:
        """``Runtime.adopt``. What is launched next waits for what its library has launched on its current stream.

        Raises:
            ValueError: it is on another GPU, or of a type that no kernel takes.
        """
        index = self._index_of(array)
        if index is None:
            return None
        if index != self._index:
            raise ValueError(
                f"the array is on cuda:{index} and the network on {self.device}: move the array, or create the network "
                f"with device='cuda:{index}'"
            )
        view = self._cupy_view(array)
        name = "bf16" if view.dtype.name == "bfloat16" else TYPE_NAMES.get(view.dtype)
        if name is None:
            raise ValueError(f"an array of {view.dtype} is none that kernels take; they take {', '.join(ITEM_SIZES)}")
        strides = tuple(stride // view.dtype.itemsize for stride in view.strides)
        return DeviceArray(Memory(self, view.data.ptr, view.nbytes, view), view.data.ptr, view.shape, strides, name)

    def _index_of(self, array: Any) -> int | None:
        """The GPU that holds an array, None for whatever else is given."""
        if isinstance(array, self._cupy.ndarray):
            return array.device.id
        if hasattr(array, "__dlpack_device__"):
            kind, index = array.__dlpack_device__()
            return int(index) if kind in CUDA_DEVICES else None
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return None
        pointer = interface["data"][0]
        return self._cuda.pointerGetAttributes(pointer).device if pointer else self._index  # an empty one has none

    def _cupy_view(self, array: Any) -> Any:
        with self._turn():
            if isinstance(array, self._cupy.ndarray):
                self._stream.wait_event(self._cupy.cuda.get_current_stream().record())
                return array
            with self._stream:  # for which both protocols make the library's work wait
                # DLPack first: it knows bfloat16.
                return (self._cupy.from_dlpack if hasattr(array, "__dlpack__") else self._cupy.asarray)(array)

    def export(self, array: DeviceArray, like: Any) -> Any:
        """``Runtime.export``: a PyTorch tensor for a tensor, else a CuPy array, in memory of that library.

        A copy: memory of our stream would be used again as soon as the answer is dropped, while the other library's stream
        may still read it.
        """
        if array.type == "bf16":
            raise ValueError("an array of bfloat16 is not handed to other libraries: export float32")
        cupy, item = self._cupy, array.dtype.itemsize
        last = sum((n - 1) * stride for n, stride in zip(array.shape, array.strides, strict=True)) if array.size else -1
        with self._turn():
            memory = cupy.cuda.UnownedMemory(array.pointer, (last + 1) * item, array.memory, self._index)
            view = cupy.ndarray(
                array.shape,
                array.dtype,
                memptr=cupy.cuda.MemoryPointer(memory, 0),
                strides=tuple(stride * item for stride in array.strides),
            )
            if type(like).__module__.partition(".")[0] == "torch":
                torch = sys.modules["torch"]
                with self._stream:  # the stream that PyTorch's one is made to wait for
                    copy = torch.from_dlpack(view).clone()
                foreign = _ForeignStream(torch.cuda.current_stream(self._index).cuda_stream)
                stream = cupy.cuda.Stream.from_external(foreign)
            else:
                stream = cupy.cuda.get_current_stream()
                stream.wait_event(self._stream.record())
                copy = view.copy()
            self._stream.wait_event(stream.record())
            return copy


class _Event:
    """A mark behind what a stream holds so far."""

    def __init__(self, runtime: CupyRuntime, stream: Any) -> None:
        with runtime._device:
            self.mark = stream.record(runtime._cupy.cuda.Event(disable_timing=True))

    def wait(self) -> None:
        self.mark.synchronize()


class _ForeignStream:
    """Another library's stream, as the CUDA stream protocol hands it on; not every PyTorch that works here speaks it."""

    def __init__(self, pointer: int) -> None:
        self.pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.pointer  # the protocol's version, the stream


def _refuse(nbytes: int) -> Any:
    """CuPy's allocator within a capture: a graph would go on using memory that is given to others once it is freed."""
    raise RuntimeError(f"{nbytes:,} bytes are allocated while a graph is captured")


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB"
