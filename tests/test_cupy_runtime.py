"""What is asked of CuPy: arguments, streams, captures, errors. tests/gpu shows that a GPU answers as it should."""

import sys
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
from fake_cupy import CUDARuntimeError, FakeCupy, FakeLt, Memory, OutOfMemoryError, Stream

from gpumlp.backends import cupy_runtime
from gpumlp.backends.cublaslt import Algorithm, UnsupportedProduct
from gpumlp.backends.cupy_runtime import CupyRuntime
from gpumlp.backends.device import DeviceArray, DeviceMemoryError, Product, bind


@pytest.fixture
def cupy(monkeypatch, tmp_path):
    module = FakeCupy(count=2)
    monkeypatch.setitem(sys.modules, "cupy", module)
    monkeypatch.setenv("GPUMLP_CACHE_DIR", str(tmp_path))
    module.lt = FakeLt(module)
    monkeypatch.setattr(cupy_runtime, "CublasLt", lambda: module.lt)
    return module


@pytest.fixture
def runtime(cupy):
    return CupyRuntime(1)


def array(runtime, shape, type="f32"):
    x = DeviceArray.empty(runtime, shape, type)
    if type == "f32":
        x[...] = np.arange(x.size, dtype=np.float32).reshape(shape)
    return x


def casts(runtime, n=7):
    """A kernel's launch: out ← in, and its two arrays."""
    given, out = array(runtime, (n,), "i32"), array(runtime, (n,))
    given[...] = np.arange(n) * 3
    instance, values = bind("cast_i32_f32", (given, n, out, n, n, 1))
    return lambda: runtime.launch(instance, (2, 1, 1), (32, 1, 1), values), given, out


# --- memory


def test_what_it_is(runtime):
    assert (runtime.name, runtime.device, runtime.processors) == ("cupy", "cuda:1", 132)
    assert runtime.description == "Fake GPU, CUDA 13.2, CuPy 14.2.0" and runtime.capability == (9, 0)


@pytest.mark.parametrize("capability, mebibytes", [("75", 4), ("89", 4), ("90", 32), ("120", 32)])
def test_products_get_a_workspace_that_fits_the_gpu(cupy, monkeypatch, capability, mebibytes):
    module = FakeCupy(capability=capability)
    monkeypatch.setitem(sys.modules, "cupy", module)
    sizes = []
    module.allocator = lambda nbytes: sizes.append(nbytes) or Memory(nbytes)
    CupyRuntime(0)
    assert sizes == [mebibytes << 20]


@pytest.mark.parametrize("shape", [(), (3, 5), (0, 4), (2, 0)])
@pytest.mark.parametrize("type", ["f32", "i64", "bf16"])
def test_arrays_come_back_as_they_went(runtime, shape, type):
    x = DeviceArray.empty(runtime, shape, type)
    values = (np.arange(x.size) - 2).reshape(shape).astype(x.dtype)
    x[...] = values
    np.testing.assert_array_equal(x.get(), values)
    assert x.pointer != 0, "kernels take null for an argument that is absent"
    x[...] = 0
    np.testing.assert_array_equal(x.get(), np.zeros_like(values))


def test_values_may_change_after_an_upload(cupy, runtime, monkeypatch):
    """Few are copied to pinned memory first, which is kept until they have arrived; for many the host waits."""
    x, stream, values = DeviceArray.empty(runtime, (3,), "f32"), runtime._stream.ptr, np.ones(3, np.float32)
    cupy.log.clear()
    x[...] = values
    assert cupy.log == [("copy", 1, 12, stream)] and len(runtime._staged) == 1
    runtime._staged[0][0].done = False
    x[...] = values
    assert len(runtime._staged) == 2
    runtime._staged[0][0].done = True
    x[...] = values
    assert len(runtime._staged) == 1
    monkeypatch.setattr(cupy_runtime, "STAGED", 8)
    cupy.log.clear()
    x[...] = values
    assert cupy.log == [("copy", 1, 12, stream), ("synchronize", stream)] and len(runtime._staged) == 1


def test_too_little_memory(cupy, runtime):
    cupy.fails["alloc"] = OutOfMemoryError("Out of memory allocating 12 bytes")
    cupy.cuda.runtime.memGetInfo = lambda: (3 << 30, 8 << 30)
    with pytest.raises(DeviceMemoryError) as error:
        runtime.allocate(5 << 30)
    assert str(error.value) == (
        "cuda:1 has 3.00 GiB free and 5.00 GiB more are needed: try a smaller batch_size, precision='bf16', or a lower "
        "memory_limit for the data, so that it streams"
    )
    assert isinstance(error.value.__cause__, OutOfMemoryError)


def test_free_memory_counts_what_the_pool_keeps_and_its_limit(cupy, runtime):
    assert runtime.free_bytes() == 1000 + 100
    cupy.limit = 900  # of which 300 are used
    assert runtime.free_bytes() == 600


# --- launches


def test_a_kernel_gets_its_arguments_in_their_types(cupy, runtime):
    launch, given, out = casts(runtime)
    launch()
    name, grid, block, values = cupy.log[-1]
    assert (name, grid, block) == ("cast_i32_f32", (2, 1, 1), (32, 1, 1))
    assert [value.dtype.str[1:] for value in values] == [
        "u8",
        "i8",
        "u8",
        "i8",
        "i8",
        "i4",
    ]  # CuPy passes that many bytes
    assert [int(value) for value in values] == [given.pointer, 7, out.pointer, 7, 7, 1]
    np.testing.assert_array_equal(out.get(), given.get())


def test_a_kernel_is_compiled_once_and_alone(cupy, runtime):
    for _ in range(2):
        casts(runtime)[0]()
    ((code, options),) = cupy.sources
    assert code.count('extern "C" __global__') == 1 and "cast_i32_f32(" in code and "#include" not in code
    assert options == ("-std=c++17",)


def products(runtime, adds=False):
    a, b, out = array(runtime, (1, 3, 5)), array(runtime, (1, 5, 4)), array(runtime, (1, 3, 4))
    return Product(a, b, out, adds=adds), out.get() * adds + a.get() @ b.get()


def test_a_product_takes_the_fastest_algorithm_that_works_and_remembers_it(cupy, runtime):
    cupy.lt.offers, cupy.lt.broken = 4, (1,)
    # For each that works: a first run, whose 0.2 ms make a graph of 5 runs, then 5 graphs.
    cupy.times[:] = [*(0.2, 50, 5, 5, 5, 5), *(0.2, 1, 5, 1, 1, 1), *(0.2, 3, 3, 3, 3, 3)]
    product, wanted = products(runtime)
    multiply = runtime.product(product)
    assert cupy.times == [], "all of them were timed"
    cupy.lt.runs.clear()
    multiply()
    assert cupy.lt.runs == [2]
    np.testing.assert_array_equal(product.out.get(), wanted)

    again = CupyRuntime(0)  # in another process, say
    cupy.lt.runs.clear()
    again.product(products(again)[0])()
    assert cupy.lt.runs == [2, 2]  # tried, and run


def test_an_algorithm_is_timed_in_a_graph_of_about_a_millisecond(cupy, runtime):
    for first, runs in ((0.4, 2), (5.0, 1), (1e-9, 8)):
        cupy.times[:], cupy.lt.runs[:] = [first] + [1.0] * 5, []
        assert runtime._milliseconds(lambda: cupy.lt.runs.append(0)) == 1.0 / runs
        assert len(cupy.lt.runs) == 2 + runs  # to load it, to see how long it takes, to record it


def test_times_are_taken_without_a_graph_where_none_is_to_be_had(cupy, runtime):
    cupy.fails["capture"] = CUDARuntimeError(801, "cudaErrorNotSupported")
    cupy.times[:] = [0.5] + [1.0] * 5
    assert runtime._milliseconds(lambda: None) == 0.5


def test_an_algorithm_from_the_file_that_fails_is_chosen_anew(cupy, runtime):
    product, wanted = products(runtime)
    cupy.times[:] = [1.0] * 6
    runtime.product(product)
    cupy.lt.broken = {0}
    cupy.lt.offers = 2
    cupy.times[:] = [1.0] * 6
    runtime.product(product)()
    np.testing.assert_array_equal(product.out.get(), wanted)


@pytest.mark.parametrize("stored", [3, "no hexadecimal digits", "00"])
def test_what_is_no_algorithm_in_a_file_is_timed_again(cupy, runtime, stored):
    product, wanted = products(runtime)
    runtime._tuning.put(cupy.lt.plan(product).key, stored)
    cupy.times[:] = [1.0] * 6
    runtime.product(product)()
    np.testing.assert_array_equal(product.out.get(), wanted)


def test_products_that_are_not_to_be_had(cupy, runtime):
    a = array(runtime, (1, 3, 3))
    with pytest.raises(ValueError, match="no epilogue here"):
        runtime.product(Product(a, a, a, epilogue="bias"))
    cupy.lt.offers, cupy.lt.broken = 2, (0, 1)
    with pytest.raises(
        UnsupportedProduct, match=r"^each of 2 algorithms that cuBLASLt offers fails for \(1, 3, 4\) adds"
    ):
        runtime.product(products(runtime)[0])


@pytest.mark.parametrize("keeps", [True, False])
def test_an_epilogue_that_hides_nan_is_not_taken(cupy, runtime, monkeypatch, keeps):
    class Plan:
        key = "relu"

        def __init__(self, product):
            self.product = product

        candidates = lambda self, *_: [Algorithm(bytes(64), 0)]  # noqa: E731

        def run(self, *_):
            values = self.product.a.get() @ self.product.b.get()
            self.product.out[...] = values if keeps else np.nan_to_num(values)

    monkeypatch.setattr(cupy.lt, "plan", Plan)
    monkeypatch.setattr(runtime, "_milliseconds", lambda run: 1.0)
    shapes = {"a": (1, 2, 3), "b": (1, 3, 4), "out": (1, 2, 4), "bias": (1, 4)}
    product = Product(**{name: array(runtime, shape) for name, shape in shapes.items()}, epilogue="relu_bias")
    if keeps:
        runtime.product(product)()
    else:
        with pytest.raises(UnsupportedProduct, match="turns NaN into 0, which would hide that a training diverged"):
            runtime.product(product)


def test_another_thread_waits_for_a_capture(cupy, runtime):
    launched, (launch, _, out) = [], casts(runtime)
    launch()
    other = threading.Thread(target=lambda: (out.get(), launched.append(1)))

    def function():
        launch()
        other.start()
        other.join(0.1)
        assert not launched and other.is_alive()

    replay = runtime.capture(function)
    other.join(10)
    assert launched == [1]
    replay()


def test_the_fastest_way_is_remembered(cupy, runtime):
    cupy.times[:] = [*(1.0, 3, 3, 3, 3, 3), *(1.0, 2, 2, 2, 2, 2)]
    ran = []
    ways = [lambda: ran.append(0), lambda: ran.append(1)]
    assert runtime.fastest("forward", ways) == 1
    ran.clear()
    assert runtime.fastest("forward", ways) == 1 and CupyRuntime(0).fastest("forward", ways) == 1
    assert ran == []
    cupy.times[:] = [1.0] * 6
    assert runtime.fastest("forward", ways[:1]) == 0, "what was remembered is none of these"


# --- graphs


def test_a_graph_launches_what_was_recorded(cupy, runtime):
    launch, given, out = casts(runtime)
    out[...] = 0

    def twice():
        launch()
        runtime.copy(given.pointer, given.pointer + 4, 24)
        runtime.zero(given.pointer + 24, 4)
        launch()

    replay = runtime.capture(twice)
    assert not out.get().any(), "nothing runs while it is recorded"
    replay()
    np.testing.assert_array_equal(out.get(), [3, 6, 9, 12, 15, 18, 0])
    replay()
    np.testing.assert_array_equal(out.get(), [6, 9, 12, 15, 18, 0, 0])
    assert not cupy.devices and not cupy.streams


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda r, x: r.allocate(4), "memory is allocated while a graph is captured"),
        (lambda r, x: r._cupy.cuda.alloc(4096), "4,096 bytes are allocated while a graph is captured"),
        (lambda r, x: r.upload(x.pointer, np.ones(3, np.float32)), "an array is uploaded while a graph is captured"),
        (lambda r, x: x.get(), "an array is downloaded while a graph is captured"),
        (lambda r, x: r.synchronize(), "the host waits while a graph is captured"),
        (lambda r, x: r.capture(lambda: None), "another graph is captured while a graph is captured"),
        (lambda r, x: r.product(None), "a product is prepared while a graph is captured"),
        (lambda r, x: r.fastest("", []), "ways are timed while a graph is captured"),
    ],
)
def test_what_a_graph_cannot_hold_is_refused_and_the_stream_goes_on(cupy, runtime, act, message):
    x = array(runtime, (3,))
    with pytest.raises(RuntimeError) as error:
        runtime.capture(lambda: act(runtime, x))
    assert str(error.value) == message
    assert runtime._stream.recording is None and cupy.allocator is Memory
    assert array(runtime, (3,)).get()[2] == 2


def test_a_graph_keeps_what_it_uses(runtime):
    launch, given, out = casts(runtime)
    alive = weakref.ref(given.memory.owner)

    def steps(launch=launch, held=(given, out)):
        launch()

    replay = runtime.capture(steps)
    del given, steps
    replay()
    assert alive() is not None and out.get()[2] == 6


# --- beside the launches


def test_copies_beside_the_launches_wait_for_events(cupy, runtime):
    staging = runtime.pinned(12)
    assert staging.shape == (12,) and staging.dtype == np.uint8 and staging.flags.writeable
    assert runtime.pinned(0).shape == (0,)
    values, x = staging.view(np.float32), array(runtime, (3,))
    values[:] = 4, 5, 6
    launches, copies = runtime._stream, runtime._copies
    copied = runtime.upload_async(x.pointer, values, None)
    assert cupy.log[-1] == ("copy", 1, 12, copies.ptr) and copies.waited == []
    runtime.wait_for(copied)
    assert launches.waited == [copies]
    runtime.upload_async(x.pointer, values, runtime.event())
    assert copies.waited == [launches]
    runtime.event().wait()
    assert cupy.log[-1] == ("wait", "event")
    np.testing.assert_array_equal(x.get(), [4, 5, 6])


# --- arrays of other libraries


class CupyArray:
    """cupy.ndarray."""

    def __init__(self, shape=(2, 3), dtype=np.float32, memptr=None, strides=None, index=1):
        self.host = np.arange(6).reshape(2, 3)
        self.shape, self.strides = shape, strides or (12, 4)
        self.dtype = SimpleNamespace(name=dtype, itemsize=2) if isinstance(dtype, str) else np.dtype(dtype)
        self.data = memptr or SimpleNamespace(ptr=4096)
        self.device, self.nbytes = SimpleNamespace(id=index), 24

    def copy(self):
        copied = CupyArray()
        copied.copied = self
        return copied


class Tensor:
    """An array of a library that speaks DLPack."""

    def __init__(self, kind, index):
        self.__dlpack_device__ = lambda: (kind, index)

    def __dlpack__(self, **_):
        """CuPy's from_dlpack calls it."""


class Interface:
    def __init__(self, pointer):
        self.__cuda_array_interface__ = {"data": (pointer, False)}


@pytest.fixture
def foreign(cupy):
    cupy.ndarray = CupyArray

    def view(given):
        assert cupy.streams, "the library is told which stream will read"
        return CupyArray()

    cupy.from_dlpack = cupy.asarray = view
    cupy.index_of = {4096: 1, 8192: 0}
    return cupy


@pytest.mark.parametrize("given", [CupyArray(), Tensor(2, 1), Tensor(13, 1), Interface(4096), Interface(0)])
def test_an_array_of_this_gpu_is_viewed(foreign, runtime, given):
    x = runtime.adopt(given)
    assert (x.pointer, x.shape, x.strides, x.type) == (4096, (2, 3), (3, 1), "f32")
    assert x.memory.owner is not None
    waits = runtime._stream.waited
    assert waits == ([foreign.current] if isinstance(given, CupyArray) else [])


@pytest.mark.parametrize("given", [np.ones(3), [1, 2], 3.0, None, Tensor(1, 0), Tensor(3, 0)])
def test_what_is_on_the_host_is_no_array_of_a_gpu(foreign, runtime, given):
    assert runtime.adopt(given) is None


@pytest.mark.parametrize("given", [CupyArray(index=0), Tensor(2, 0), Interface(8192)])
def test_an_array_of_another_gpu_is_refused(foreign, runtime, given):
    with pytest.raises(ValueError) as error:
        runtime.adopt(given)
    assert str(error.value) == (
        "the array is on cuda:0 and the network on cuda:1: move the array, or create the network with device='cuda:0'"
    )


def test_types_of_adopted_arrays(foreign, runtime):
    half = runtime.adopt(CupyArray(dtype="bfloat16", strides=(6, 2)))
    assert half.type == "bf16" and half.strides == (3, 1)
    with pytest.raises(
        ValueError, match=r"^an array of complex64 is none that kernels take; they take i8, u8, .*, bf16$"
    ):
        runtime.adopt(CupyArray(dtype=np.complex64))


def test_an_exported_array_is_a_copy_in_the_other_librarys_memory(foreign, runtime, monkeypatch):
    foreign.cuda.UnownedMemory = lambda *given: given
    foreign.cuda.MemoryPointer = lambda memory, offset: memory
    x = array(runtime, (4, 5))[1:3, 2:]
    out = runtime.export(x, CupyArray())
    assert out.copied.shape == (2, 3) and out.copied.strides == (20, 4) and out.copied.dtype == np.float32
    assert out.copied.data == (x.pointer, (5 + 2 + 1) * 4, x.memory, 1)  # up to the last element
    assert foreign.current.waited == [runtime._stream]
    assert runtime._stream.waited[-1] is foreign.current  # x may be given back, but not before it is read

    tensor = type("Tensor", (), {"__module__": "torch"})()
    from_external = lambda stream: Stream(foreign, stream.__cuda_stream__()[1])  # noqa: E731
    foreign.cuda.Stream = SimpleNamespace(from_external=from_external)
    torch = SimpleNamespace(
        from_dlpack=lambda view: SimpleNamespace(clone=lambda: (view, *foreign.streams)),
        cuda=SimpleNamespace(current_stream=lambda index: SimpleNamespace(cuda_stream=77)),
    )
    monkeypatch.setitem(sys.modules, "torch", torch)
    view, stream = runtime.export(x, tensor)
    assert isinstance(view, CupyArray) and stream is runtime._stream
    assert runtime._stream.waited[-1].ptr == 77
    with pytest.raises(ValueError, match=r"^an array of bfloat16 is not handed to other libraries: export float32$"):
        runtime.export(DeviceArray.empty(runtime, (2,), "bf16"), tensor)
