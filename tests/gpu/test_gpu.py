"""What only a GPU can show: that CUDA, cuBLASLt and CuPy do what the emulator and the fakes of other tests say they do."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpumlp as gm
from gpumlp.activations import gelu_tanh
from gpumlp.backends.device import DeviceArray, DeviceMemoryError, Product, bind
from gpumlp.backends.probe import find_gpu

pytestmark = pytest.mark.gpu
TESTS = Path(__file__).parents[1]
TOLERANCE = {"f32": 1e-5, "tf32": 4e-3, "f64": 1e-12, "bf16": 2e-2}


@pytest.fixture
def runtime():
    runtime, reason = find_gpu()
    assert runtime is not None, reason
    return runtime


def put(runtime, values, type="f32"):
    values = np.asarray(values)
    x = DeviceArray.empty(runtime, values.shape, type)
    x[...] = values
    return x


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


# --- memory


@pytest.mark.parametrize("type", ["u8", "i32", "i64", "u64", "f16", "f32", "f64", "bf16"])
@pytest.mark.parametrize("shape", [(), (1,), (1000, 37), (3, 0)])
def test_arrays_come_back_as_they_went(runtime, shape, type):
    values = np.arange(int(np.prod(shape))).reshape(shape) % 100
    x = put(runtime, values, type)
    np.testing.assert_array_equal(x.get(), values)
    y = DeviceArray.empty(runtime, shape, type)
    y[...] = x
    x[...] = 0
    assert not x.get().any()
    np.testing.assert_array_equal(y.get(), values)


def test_views_are_read_and_written(runtime):
    x = put(runtime, np.arange(60).reshape(3, 4, 5))
    np.testing.assert_array_equal(x[1:, 2, 1:].get(), np.arange(60).reshape(3, 4, 5)[1:, 2, 1:])
    x[:, 1:3, 4] = 7
    assert (x.get() == 7).sum() == 6 + 1


def test_too_much_memory(runtime):
    with pytest.raises(
        DeviceMemoryError, match=r"^cuda:0 has \d+\.\d\d GiB free and 1048576\.00 GiB more are needed: try"
    ):
        runtime.allocate(1 << 50)
    assert 0 < runtime.free_bytes() < 1 << 40


def test_copies_beside_the_launches(runtime):
    n = 1 << 20
    staging, x = runtime.pinned(4 * n).view(np.float32), DeviceArray.empty(runtime, (n,), "f32")
    free = runtime.event()
    for number in range(5):
        staging[:] = number
        copied = runtime.upload_async(x.pointer, staging, free)
        runtime.wait_for(copied)
        y = DeviceArray.empty(runtime, (n,), "f32")
        y[...] = x
        free = runtime.event()
        copied.wait()  # only then may staging change
        np.testing.assert_array_equal(y.get(), np.full(n, number, np.float32))


# --- kernels


def test_conformance(runtime):
    """Every intrinsic and wrapper that kernels lean on."""
    import cupy
    from emulator import conformance

    module = cupy.RawModule(code=conformance.cuda_source(), options=("-std=c++17",))

    def launch(instance, grid, block, values):
        module.get_function(instance.name).kernel(grid, block, values, stream=runtime._stream)

    skipped = {"mma_by_ldmatrix", "mma_by_hand"} if runtime.capability < (8, 0) else set()
    wrong = [
        f"{name}: {detail}"
        for name, right, detail in conformance.check(runtime, launch)
        if not right and name not in skipped
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("file", sorted(path.name for path in TESTS.glob("test_kernels_*.py")))
def test_kernels_agree_with_numpy(file):
    """The tests that the emulator passes, in a process of their own with the GPU in its place."""
    paths = [TESTS.parent, TESTS, TESTS / "gpu", *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(str(path) for path in paths if str(path))}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "kernels_on_gpu",
        "-p",
        "no:cacheprovider",
        str(TESTS / file),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, cwd=TESTS.parent)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


# --- products


def reference(product, host):
    """out, bias and auxiliary afterwards, in float64."""
    a, b, bias, before = (host.get(name) for name in ("a", "b", "bias", "out"))
    z = a @ b + (before if product.adds else 0)
    match product.epilogue:
        case "bias_gradient":
            return {"out": z, "bias": np.broadcast_to(a, (len(z), *a.shape[1:])).sum(axis=2)}
        case "bias":
            return {"out": z + bias[:, None]}
        case "relu_bias":
            return {"out": np.maximum(z + bias[:, None], 0)}
        case "gelu_bias":
            z = z + bias[:, None]
            return {"out": gelu_tanh(z), "auxiliary": z}
    return {"out": z}


@pytest.mark.parametrize("epilogue", ["bias", "relu_bias", "gelu_bias"])
def test_nan_goes_through_an_epilogue(runtime, epilogue):
    """Or the runtime refuses the epilogue: a training that diverges has to show."""
    host = {"a": np.ones((1, 16, 16), np.float32), "b": np.ones((1, 16, 16), np.float32)}
    host["a"][0, 3] = np.nan
    held = {name: DeviceArray.empty(runtime, values.shape, "f32") for name, values in host.items()}
    for name, values in host.items():
        held[name][...] = values
    held |= {"out": DeviceArray.empty(runtime, (1, 16, 16), "f32"), "bias": DeviceArray.empty(runtime, (1, 16), "f32")}
    held["bias"][...] = 1.0
    if epilogue == "gelu_bias":
        held["auxiliary"] = DeviceArray.empty(runtime, (1, 16, 16), "f32")
    try:
        runtime.product(Product(**held, epilogue=epilogue))()
    except ValueError as error:
        pytest.skip(str(error))
    out = held["out"].get()[0]
    assert np.isnan(out[3]).all() and np.isfinite(np.delete(out, 3, axis=0)).all()


@pytest.mark.parametrize("epilogue", ["", "adds", "bias", "relu_bias", "gelu_bias", "bias_gradient"])
@pytest.mark.parametrize("type", TOLERANCE)
@pytest.mark.parametrize("models, m, k, n", [(1, 40, 24, 56), (3, 40, 24, 56), (2, 128, 33, 10), (1, 7, 5, 1)])
def test_products_agree_with_numpy(runtime, epilogue, type, models, m, k, n):
    storage = "f32" if type == "tf32" else type
    host = {
        "a": numbers((models, m, k), 1),
        "b": numbers((1, n, k), 2).swapaxes(1, 2),
        "out": numbers((models, m, n), 3),
    }
    if epilogue not in ("", "adds"):
        host["bias"] = numbers((models, m if epilogue == "bias_gradient" else n), 4)
    if epilogue == "gelu_bias":
        host["auxiliary"] = numbers((models, m, n), 5)
    held = {name: put(runtime, values, storage) for name, values in host.items() if name != "b"}
    held["b"] = put(runtime, host["b"].swapaxes(1, 2), storage).swapaxes(1, 2)  # as W is: a transpose by its strides
    host = {name: array.get().astype(np.float64) for name, array in held.items()}  # as rounded
    ending = "" if epilogue == "adds" else epilogue
    product = Product(**held, adds=epilogue == "adds", epilogue=ending, tf32=type == "tf32")
    try:
        multiply = runtime.product(product)
    except ValueError as error:  # a type, strides or an alignment that cuBLASLt has no epilogue for
        assert epilogue not in ("", "adds"), error
        pytest.skip(str(error))
    held["out"][...] = host["out"]  # to choose an algorithm, several ran
    multiply()
    for name, wanted in reference(product, host).items():
        np.testing.assert_allclose(
            held[name].get(), wanted, rtol=0, atol=TOLERANCE[type] * np.abs(wanted).max(), err_msg=name
        )


# --- graphs


def test_products_and_kernels_in_a_graph_give_the_bits_of_eager_launches(runtime):
    """Two products of cuBLASLt and a kernel of ours, which CuPy's own cuBLAS could not be captured with."""
    models, m, k, n = 2, 64, 48, 80
    x, W, out = (
        put(runtime, numbers((models, m, k))),
        put(runtime, numbers((models, k, n), 1)),
        put(runtime, np.zeros((models, m, n))),
    )
    back, total = put(runtime, np.zeros((models, m, k))), put(runtime, np.zeros((models, m, k)), "f64")
    forward, backward = runtime.product(Product(x, W, out)), runtime.product(Product(out, W.swapaxes(1, 2), back))
    cast = bind("cast_f32_f64", (back, m * k, total, m * k, m * k, models))

    def step():
        forward()
        backward()
        runtime.launch(cast[0], (3, models, 1), (256, 1, 1), cast[1])
        runtime.copy(x.pointer, back.pointer, x.nbytes)  # so each replay has another input
        runtime.zero(out.pointer, out.nbytes)

    def run(launch, times=3):
        x[...] = numbers((models, m, k)) / 30
        results = []
        for _ in range(times):
            launch()
            results.append((back.get(), total.get(), x.get()))
        return results

    eager = run(step)
    replay = runtime.capture(step)
    for a, b in zip(eager, run(replay), strict=True):
        for wanted, got in zip(a, b, strict=True):
            np.testing.assert_array_equal(got, wanted)
    assert not np.array_equal(eager[0][0], eager[1][0])


def test_a_refused_capture_leaves_the_stream_in_order(runtime):
    x = put(runtime, np.arange(5))
    for refused in (lambda: runtime.allocate(8), x.get, runtime.synchronize):
        with pytest.raises(RuntimeError, match="while a graph is captured"):
            runtime.capture(refused)
    np.testing.assert_array_equal(x.get(), np.arange(5))
    runtime.capture(lambda: runtime.zero(x.pointer, x.nbytes))()
    assert not x.get().any()


def test_the_fastest_of_two_ways(runtime):
    x, y = put(runtime, np.zeros(1 << 24)), put(runtime, np.zeros(1 << 24))
    ways = [
        lambda: [runtime.copy(y.pointer, x.pointer, x.nbytes) for _ in range(4)],
        lambda: runtime.copy(y.pointer, x.pointer, 4),
    ]
    assert runtime.fastest("a test of test_gpu.py", ways) == 1


# --- arrays of other libraries


def test_cupy_arrays_go_in_and_out_without_a_copy(runtime):
    import cupy

    theirs = cupy.arange(24, dtype=cupy.float32).reshape(4, 6)
    theirs *= 2
    ours = runtime.adopt(theirs[1:, ::2])
    np.testing.assert_array_equal(ours.get(), 2 * np.arange(24).reshape(4, 6)[1:, ::2])
    assert ours.pointer == theirs.data.ptr + 24 and ours.strides == (6, 2)
    out = runtime.export(put(runtime, np.arange(12).reshape(3, 4))[1:], theirs)
    assert isinstance(out, cupy.ndarray) and (out + 1).get().tolist() == [[5, 6, 7, 8], [9, 10, 11, 12]]
    assert cupy.shares_memory(cupy.asarray(ours[:, :1]), theirs)


def test_torch_tensors_go_in_and_out_without_a_copy(runtime):
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    theirs = torch.arange(12, dtype=torch.float32, device="cuda").reshape(3, 4) * 3
    ours = runtime.adopt(theirs)
    assert ours.pointer == theirs.data_ptr()
    np.testing.assert_array_equal(ours.get(), 3 * np.arange(12).reshape(3, 4))
    out = runtime.export(ours, theirs)
    assert isinstance(out, torch.Tensor) and out.data_ptr() == theirs.data_ptr()
    assert runtime.adopt(theirs.cpu()) is None
    pytest.importorskip("ml_dtypes")  # CuPy's bfloat16
    assert runtime.adopt(theirs.bfloat16()).type == "bf16"


# --- training


def fitted(device):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(500, 9)).astype(np.float32)
    y = (X[:, 0] * X[:, 1] > 0).astype(np.int64) + (X[:, 2] > 1)
    layers = [gm.Dense(24, "relu", norm="batch", dropout=0.1), gm.Dense(17, "gelu_tanh"), gm.Dense(3)]
    network = gm.Network(layers, n_features=9, seed=3, device=device)
    trainer = gm.Trainer(network, loss="softmax_cross_entropy", optimizer=gm.Adam(learning_rate=3e-3))
    trainer.fit(X, y, epochs=4, batch_size=64, progress=False)
    return np.asarray(network.predict(X))


def test_a_fit_gives_the_same_bits_twice_and_the_cpu_s_numbers():
    first, second, cpu = fitted("cuda"), fitted("cuda"), fitted("cpu")
    np.testing.assert_array_equal(first, second)
    np.testing.assert_allclose(first, cpu, atol=2e-3)
