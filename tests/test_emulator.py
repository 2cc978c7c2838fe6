"""The emulator is right where a kernel is right, and each kind of wrong kernel is caught by something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from emulator import EmulatedRuntime, EmulatorError, ForeignArray, conformance, launch, on_device
from emulator import build as building
from emulator.build import build, instances_of
from emulator.conformance import typed

from gpumlp.activations import gelu_tanh
from gpumlp.backends import device
from gpumlp.backends.device import DeviceArray, DeviceMemoryError, Product, bf16_to_float32, float32_to_bf16

HERE = Path(__file__).resolve().parent
SCHEDULES = range(6)


def run(runtime, name, grid, block, *arguments, file="broken.cu"):
    instance = instances_of(file)[name]
    runtime.launch(instance, (grid,), (block,), typed(instance, arguments))


def room(runtime, *shape, type="f32"):
    return DeviceArray.empty(runtime, shape, type)


def bits(array):
    return array.get().tobytes()


def normal(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


# --- what is right ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_wrapper_gives_what_numpy_gives(schedule):
    results = conformance.check(EmulatedRuntime(schedule=schedule))
    assert len(results) == len(conformance.CHECKS) > 10
    assert not [result for result in results if not result[1]]


def test_conformance_says_what_is_wrong():
    runtime = EmulatedRuntime()

    def refuse(instance, grid, block, values):
        raise RuntimeError("no device")

    assert {detail for _, _, detail in conformance.check(runtime, refuse)} == {"RuntimeError: no device"}
    details = [detail for _, _, detail in conformance.check(runtime, lambda *launch: None)]  # nothing is written
    assert all(" wrong" in detail or detail == "" for detail in details) and any("output 0 at" in d for d in details)


def test_schedule_0_is_in_order_and_others_are_not():
    orders = []
    for schedule in SCHEDULES:
        runtime = EmulatedRuntime(schedule=schedule)
        total = on_device(runtime, np.zeros(1, np.float32))
        run(runtime, "sum_in_any_order", 3, 64, on_device(runtime, normal(192)), total)
        orders.append(bits(total))
    assert np.frombuffer(orders[0], np.float32) == normal(192).cumsum(dtype=np.float32)[-1]
    assert len(set(orders)) > 3


def test_the_same_schedule_gives_the_same_order_again():
    totals = []
    for _ in range(2):
        runtime = EmulatedRuntime(schedule=5)
        total = on_device(runtime, np.zeros(1, np.float32))
        run(runtime, "sum_in_any_order", 3, 64, on_device(runtime, normal(192)), total)
        totals.append(bits(total))
    assert totals[0] == totals[1]


def test_kernels_by_name_take_checked_arguments(monkeypatch):
    monkeypatch.setattr(device, "instances", lambda: instances_of("conformance.cu"))
    runtime = EmulatedRuntime()
    x, out = on_device(runtime, np.arange(32)), room(runtime, 32, type="f64")
    launch(runtime, "warp_sums_f64", (1,), (32,), on_device(runtime, np.arange(32.0)), out)
    np.testing.assert_array_equal(out.get(), 31 * 16)
    with pytest.raises(AssertionError, match=r"warp_sums_f64: x is <DeviceArray \(32,\) i64"):
        launch(runtime, "warp_sums_f64", (1,), (32,), x, out)


def test_values_are_of_the_type_that_the_kernel_takes():
    runtime = EmulatedRuntime()
    instance = instances_of("broken.cu")["unreached_barrier"]
    with pytest.raises(AssertionError, match=r"n is np.float32\(3.0\), not of uint32"):
        runtime.launch(instance, (1,), (32,), [np.uint64(0), np.float32(3)])
    with pytest.raises(AssertionError, match="takes 2 arguments"):
        runtime.launch(instance, (1,), (32,), [np.uint64(0)])


# --- what is wrong ----------------------------------------------------------------------------------------------------


def different_results(name, n, grid=1, block=64):
    """How many different bits a kernel gives over the schedules, and what it gives in order."""
    results = []
    for schedule in SCHEDULES:
        runtime = EmulatedRuntime(schedule=schedule)
        out = on_device(runtime, np.zeros(n, np.float32))
        run(runtime, name, grid, block, on_device(runtime, normal(grid * block)), out)
        results.append(bits(out))
    return len(set(results)), np.frombuffer(results[0], np.float32)


def test_a_missing_barrier_gives_different_bits():
    n_different, in_order = different_results("no_barrier", 1)
    assert n_different > 1
    assert in_order == normal(64).cumsum(dtype=np.float32)[-1]  # which is why a schedule in order proves nothing


def test_a_missing_warp_barrier_gives_different_bits():
    assert different_results("no_warp_barrier", 64)[0] > 3


def test_a_float_sum_in_any_order_gives_different_bits():
    assert different_results("sum_in_any_order", 1, grid=5)[0] > 3


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "arguments", "reason"),
    [
        ("unreached_barrier", (5,), "of 96 threads 91 wait at __syncthreads, 0 at a warp operation, and 5 have ended"),
        (
            "barrier_beside_shuffle",
            (),
            "of 96 threads 48 wait at __syncthreads, 48 at a warp operation, and 0 have ended",
        ),
        ("two_barriers", (), r"threads wait at the barriers of the lines \d+ and \d+ of .*broken.cu"),
        ("vote_beside_shuffle", (), r"the lanes \d+ and \d+ of a warp meet at different operations"),
        ("not_in_its_mask", (), "lane [123][0-9] calls a warp operation of the lanes 0x0000FFFF"),
        ("misaligned_ldmatrix", (), "ldmatrix from an address that is no multiple of 16"),
    ],
)
def test_threads_that_would_wait_forever_are_an_error(name, arguments, reason, schedule):
    runtime = EmulatedRuntime(schedule=schedule)
    out = room(runtime, 96, type="u32" if name == "misaligned_ldmatrix" else "f32")
    with pytest.raises(EmulatorError, match=rf"{name}: block \([012], 0, 0\): {reason}"):
        run(runtime, name, 3, 96, out, *arguments)
    results = conformance.check(runtime)  # the emulator goes on
    assert all(ok for _, ok, _ in results), results


def test_a_lane_that_does_not_exist_is_an_error():
    runtime = EmulatedRuntime()
    with pytest.raises(EmulatorError, match="0 wait at __syncthreads, 16 at a warp operation"):
        run(runtime, "warp_sums_f32", 1, 48, room(runtime, 48), room(runtime, 48), file="conformance.cu")


@pytest.mark.parametrize(
    ("grid", "block"),
    [((0,), (32,)), ((1, 65536), (32,)), ((1,), (0,)), ((1,), (257,)), ((1,), (16, 17)), ((1,), (1, 1, 65))],
)
def test_shapes_that_cuda_refuses(grid, block):
    instance = instances_of("conformance.cu")["indices"]
    with pytest.raises(EmulatorError, match=r"indices: no launch: grid .*, block .* of at most 256 threads"):
        EmulatedRuntime().launch(instance, grid, block, [np.uint64(0)])


def test_shared_memory_of_another_block_is_nan():
    for schedule in SCHEDULES:
        runtime = EmulatedRuntime(schedule=schedule)
        out = room(runtime, 3, 32)
        for _ in range(2):  # of an earlier launch, too
            run(runtime, "shared_by_one_block", 3, 32, out)
            np.testing.assert_array_equal(out.get()[0], 1)
            assert np.isnan(out.get()[1:]).all()


def test_memory_that_nobody_wrote_is_nan():
    runtime = EmulatedRuntime()
    out = room(runtime, 32)
    run(runtime, "half_written", 1, 32, out)
    np.testing.assert_array_equal(out.get(), np.where(np.arange(32) % 2, 1, np.nan))


def sanitized(name):
    """The error messages of a process that runs a kernel of broken.cu with the sanitizers, and a line of that file."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("g++ has no AddressSanitizer here")
    build("broken.cu", sanitize=True)
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "GPUMLP_EMULATOR_SANITIZE": "1",
        "ASAN_OPTIONS": "detect_leaks=0",
        "LD_PRELOAD": runtime,
        "PYTHONPATH": os.pathsep.join(paths),
    }
    command = [sys.executable, "-c", f"import test_emulator; test_emulator.run_broken({name!r})"]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def run_broken(name):
    runtime = EmulatedRuntime()
    assert runtime.sanitize
    x, out = on_device(runtime, np.ones(33, np.float32)), room(runtime, 32)
    arguments = {"one_past_the_end": (x, out, 33), "misaligned": (x, out), "past_shared_memory": (out,)}
    run(runtime, name, 1, 32, *arguments.get(name, (x, out)))
    print("it ran to its end")


def line_of(text):
    lines = (HERE / "emulator" / "broken.cu").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_sanitizers_leave_a_correct_kernel_alone():
    done = sanitized("no_warp_barrier")
    assert done.returncode == 0 and "it ran to its end" in done.stdout, done.stderr


def test_an_access_past_the_end_is_caught():
    done = sanitized("one_past_the_end")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "0 bytes to the right of 132-byte region" in done.stderr, (
        done.stderr
    )
    assert f"broken.cu:{line_of('// <= for <')}" in done.stderr, done.stderr


def test_an_access_past_shared_memory_is_caught():
    done = sanitized("past_shared_memory")
    assert done.returncode != 0 and "global-buffer-overflow" in done.stderr, done.stderr
    assert f"broken.cu:{line_of('// outside for')}" in done.stderr, done.stderr


def test_a_misaligned_quad_is_caught():
    done = sanitized("misaligned")
    assert done.returncode != 0
    assert "misaligned address" in done.stderr and "requires 16 byte alignment" in done.stderr, done.stderr
    assert "launch.cuh" in done.stderr, done.stderr


# --- builds -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A function that makes a source of one kernel; libraries go to a folder of the test."""
    monkeypatch.setattr(building.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(building, "path_of", lambda file: tmp_path / file)

    def write(file, body):
        name = Path(file).stem
        (tmp_path / file).write_text(f"GM_KERNEL void {name}(f32* x) {{ {body} }}\nGM_INSTANCES({name})\n")
        return file

    return write


def test_a_source_is_built_once(source, monkeypatch):
    built = build(source("doubled.cu", "*x += *x;"))
    again = build("doubled.cu")
    assert again == built and list(built.parent.iterdir()) == [built]  # nothing half-built stays
    assert build(source("doubled.cu", "*x = 2.0f * *x;")) != built


def test_a_source_that_does_not_compile_is_named(source):
    with pytest.raises(RuntimeError, match=r"widened.cu:1:\d+: error: implicit conversion .*double-promotion"):
        build(source("widened.cu", "*x = float(*x * 0.5);"))


def test_without_a_compiler_tests_are_skipped(source, monkeypatch):
    monkeypatch.setattr(building.shutil, "which", lambda name: None)
    with pytest.raises(pytest.skip.Exception, match="g\\+\\+ is not installed: the emulator compiles"):
        build(source("nothing.cu", ""))


def test_libraries_of_another_user_are_refused(source, monkeypatch):
    monkeypatch.setattr(building.os, "getuid", lambda: 12345678)
    with pytest.raises(
        PermissionError, match="gpumlp-emulator-12345678 belongs to another user: remove it, or set TMPDIR"
    ):
        build(source("nothing.cu", ""))


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("", False), (None, False)])
def test_the_environment_asks_for_the_sanitizers(value, wanted, monkeypatch):
    monkeypatch.delenv("GPUMLP_EMULATOR_SANITIZE", raising=False)
    if value is not None:
        monkeypatch.setenv("GPUMLP_EMULATOR_SANITIZE", value)
    assert EmulatedRuntime().sanitize == wanted


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", ["u8", "i16", "f16", "bf16", "f32", "f64"])
def test_values_come_back(type):
    runtime = EmulatedRuntime()
    values = np.arange(24).reshape(2, 3, 4)
    array = on_device(runtime, values, type)
    assert array.pointer % 256 == 0 and array.type == type
    np.testing.assert_array_equal(array.get(), values)
    np.testing.assert_array_equal(array[1, 1:, ::1][:, 1:3].get(), values[1, 1:, 1:3])
    array[:, 1] = 7
    array[0, 0] = array[1, 2]
    array[1, 2] = 0
    np.testing.assert_array_equal(array.get()[:, 1], 7)
    np.testing.assert_array_equal(array.get()[0, 0], values[1, 2])
    np.testing.assert_array_equal(array.get()[1, 2], 0)
    assert runtime.downloads > 0


def test_memory_is_limited_and_comes_back():
    runtime = EmulatedRuntime(memory=1000)
    held = room(runtime, 200)
    assert runtime.free_bytes() == 200
    with pytest.raises(
        DeviceMemoryError, match="cuda:0 has 200 bytes free and an array needs 1,204: try a smaller batch"
    ):
        room(runtime, 301)
    assert room(runtime, 0).get().shape == (0,)
    del held
    assert runtime.free_bytes() == 1000
    room(runtime, 250)


def test_a_copy_past_the_end_of_an_array_is_refused():
    runtime = EmulatedRuntime()
    array = room(runtime, 10)
    for copy in (
        lambda: runtime.upload(array.pointer, np.zeros(11, np.float32)),
        lambda: runtime.download(array.pointer + 4, np.zeros(10, np.float32)),
        lambda: runtime.zero(array.pointer + 36, 5),
        lambda: runtime.copy(array.pointer, array.pointer + 20, 40),
        lambda: runtime.copy(array.pointer + 4, array.pointer, 40),
        lambda: runtime.zero(64, 4),
    ):
        with pytest.raises(AssertionError, match="are no part of one array"):
            copy()


def test_arrays_of_other_libraries_share_their_memory():
    runtime = EmulatedRuntime()
    foreign = ForeignArray(on_device(runtime, np.arange(6, dtype=np.float32).reshape(2, 3)).swapaxes(0, 1))
    array = runtime.adopt(foreign)
    assert (array.shape, array.strides, array.type) == ((3, 2), (1, 3), "f32")
    array[1] = 9
    np.testing.assert_array_equal(foreign.get(), [[0, 3], [9, 9], [2, 5]])
    del foreign  # the view keeps it
    np.testing.assert_array_equal(array.get(), [[0, 3], [9, 9], [2, 5]])
    again = runtime.export(array, like=ForeignArray(array))
    assert again.__cuda_array_interface__["data"][0] == array.pointer
    assert runtime.adopt(np.zeros(3)) is None


def test_arrays_of_unknown_types_are_refused():
    foreign = ForeignArray(on_device(EmulatedRuntime(), np.zeros(2, np.float32)))
    foreign.__cuda_array_interface__["typestr"] = "<c8"
    with pytest.raises(ValueError, match="complex64 is none that kernels take; they take i8, "):
        EmulatedRuntime().adopt(foreign)


# --- graphs -----------------------------------------------------------------------------------------------------------


def test_a_graph_runs_when_it_is_replayed():
    runtime = EmulatedRuntime()
    x, y, step = (on_device(runtime, np.full(n, v, np.float32)) for n, v in [(32, 1), (32, 0), (1, 10)])

    def work():
        run(runtime, "advance", 1, 32, x, 0.0, step)
        runtime.copy(y.pointer, x.pointer, x.nbytes)
        runtime.zero(x.pointer, 4)

    replay = runtime.capture(work)
    assert not runtime.launches and x.get()[0] == 1 and y.get()[0] == 0
    replay()
    assert runtime.launches == {"advance": 1}
    np.testing.assert_array_equal(y.get(), 11)
    np.testing.assert_array_equal(x.get(), [0] + [11] * 31)
    step[...] = 20
    replay()
    np.testing.assert_array_equal(y.get(), [20] + [31] * 31)


def test_a_number_in_a_graph_is_the_one_of_its_capture():
    """So a step that hands its number over by value is wrong from the second replay on, as on a GPU."""
    runtime = EmulatedRuntime()
    x, zero = on_device(runtime, np.zeros(32, np.float32)), on_device(runtime, np.zeros(1, np.float32))
    host = {"step": 1.0}
    replay = runtime.capture(lambda: run(runtime, "advance", 1, 32, x, host["step"], zero))
    for step in (1.0, 2.0):
        host["step"] = step
        replay()
    np.testing.assert_array_equal(x.get(), 2)  # not 1 + 2


def test_what_a_capture_refuses():
    runtime = EmulatedRuntime()
    x, host = room(runtime, 4), np.zeros(4, np.float32)
    event, product = runtime.event(), Product(*(room(runtime, 1, 2, 2) for _ in range(3)))
    refused = {
        "memory is allocated": lambda: room(runtime, 4),
        "an array is uploaded": lambda: runtime.upload(x.pointer, host),
        "an array is downloaded": lambda: runtime.download(x.pointer, host),
        "a product is prepared": lambda: runtime.product(product),
        "ways are timed": lambda: runtime.fastest("key", []),
        "the host waits": runtime.synchronize,
        "another graph is captured": lambda: runtime.capture(lambda: None),
    }
    for what, work in refused.items():
        with pytest.raises(RuntimeError, match=f"{what} while a graph is captured"):
            runtime.capture(work)
    for work in (lambda: runtime.upload_async(x.pointer, host, None), event.wait):
        with pytest.raises(RuntimeError, match="while a graph is captured"):
            runtime.capture(work)
    runtime.synchronize()  # a capture that failed has ended
    with pytest.raises(RuntimeError, match="cuda:0 captures no graphs"):
        EmulatedRuntime(can_capture=False).capture(lambda: None)


def test_copies_beside_the_launches():
    runtime = EmulatedRuntime()
    array, pinned = room(runtime, 8), runtime.pinned(32)
    pinned.view(np.float32)[:] = np.arange(8)
    runtime.wait_for(runtime.upload_async(array.pointer, pinned, runtime.event()))
    np.testing.assert_array_equal(array.get(), np.arange(8))


def test_the_fastest_way_is_the_one_that_a_test_wants():
    ran = []
    options = [lambda i=i: ran.append(i) for i in range(3)]
    assert [EmulatedRuntime(prefer=n).fastest("key", options) for n in (0, 1, 7)] == [0, 1, 2]
    assert ran == [0, 1, 2] * 3


# --- products ---------------------------------------------------------------------------------------------------------


def laid_out(runtime, values, transposed, type):
    """(models, m, n) on the device, behind each other along rows or along columns, within a larger buffer."""
    values = values.swapaxes(1, 2) if transposed else values
    models, rows, columns = values.shape
    array = room(runtime, models, rows + 1, columns, type=type)[:, :rows]
    array[...] = values
    return array.swapaxes(1, 2) if transposed else array


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("transposed", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("type", ["f32", "f64", "bf16"])
def test_products(type, transposed, models):
    runtime = EmulatedRuntime()
    dtype = np.float64 if type == "f64" else np.float32
    a, b = normal(models, 7, 5, dtype=dtype), normal(models, 5, 4, dtype=dtype, seed=1)
    old = normal(models, 7, 4, dtype=dtype, seed=2)
    if type == "bf16":
        a, b, old = (bf16_to_float32(float32_to_bf16(x)) for x in (a, b, old))
    on = [laid_out(runtime, x, t, type) for x, t in zip((a, b), transposed, strict=True)]
    for adds in (False, True):
        out = laid_out(runtime, old, False, type)
        runtime.product(Product(*on, out, adds=adds))()
        wanted = a @ b + old if adds else a @ b
        np.testing.assert_allclose(
            out.get(), wanted, rtol=1e-2 if type == "bf16" else 1e-5, atol=1e-2 if type == "bf16" else 1e-6
        )


def test_a_product_of_one_model_has_the_bits_of_matmul():
    runtime = EmulatedRuntime()
    W, x = normal(37, 53), normal(64, 53, seed=1)
    out = room(runtime, 1, 64, 37)
    runtime.product(Product(on_device(runtime, x[None]), on_device(runtime, W[None]).swapaxes(1, 2), out))()
    np.testing.assert_array_equal(out.get()[0], np.matmul(x, W.T))


def test_one_operand_for_all_models():
    runtime = EmulatedRuntime()
    a, b = normal(1, 7, 5), normal(3, 5, 4, seed=1)
    out, on = room(runtime, 3, 7, 4), on_device(runtime, a)
    repeated = DeviceArray(on.memory, on.pointer, (3, 7, 5), (0, 5, 1), "f32")
    for operand in (on, repeated):
        runtime.product(Product(operand, on_device(runtime, b), out))()
        np.testing.assert_allclose(out.get(), a @ b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epilogue", ["bias", "relu_bias", "gelu_bias", "bias_gradient"])
def test_epilogues(epilogue):
    runtime = EmulatedRuntime()
    a, b = normal(3, 7, 5), normal(3, 5, 4, seed=1)
    bias = on_device(runtime, normal(3, 7 if epilogue == "bias_gradient" else 4, seed=2))
    out, auxiliary = room(runtime, 3, 7, 4), room(runtime, 3, 7, 4) if epilogue == "gelu_bias" else None
    z = a @ b + (0 if epilogue == "bias_gradient" else bias.get()[:, None])
    product = Product(on_device(runtime, a), on_device(runtime, b), out, False, epilogue, bias, auxiliary)
    with pytest.raises(ValueError, match=f"no product with the epilogue '{epilogue}' for these shapes"):
        EmulatedRuntime(epilogues=False).product(product)
    runtime.product(product)()
    wanted = {"relu_bias": np.maximum(z, 0), "gelu_bias": gelu_tanh(z)}.get(epilogue, z)
    np.testing.assert_allclose(out.get(), wanted, rtol=1e-5, atol=1e-6)
    if epilogue == "gelu_bias":
        np.testing.assert_allclose(auxiliary.get(), z, rtol=1e-5, atol=1e-6)
    if epilogue == "bias_gradient":
        np.testing.assert_allclose(bias.get(), a.sum(axis=2), rtol=1e-5, atol=1e-6)


def test_a_product_is_recorded():
    runtime = EmulatedRuntime()
    a = on_device(runtime, normal(1, 3, 2))
    out = on_device(runtime, np.zeros((1, 3, 3), np.float32))
    launch_product = runtime.product(Product(a, a.swapaxes(1, 2), out))
    assert np.isnan(out.get()).all()  # preparing tries several ways on a GPU: what was there is gone
    replay = runtime.capture(launch_product)
    assert np.isnan(out.get()).all()
    a[...] = 2 * a.get()
    replay()
    np.testing.assert_allclose(out.get(), a.get() @ a.get().swapaxes(1, 2), rtol=1e-6)


def test_tf32_keeps_ten_bits_of_each_operand():
    runtime = EmulatedRuntime()
    exact = np.array([1 + 2.0**-10, 1 + 2.0**-11, -1 - 3 * 2.0**-12, 1 + 2.0**-13], np.float32).reshape(1, 4, 1)
    one, out = on_device(runtime, np.ones((1, 1, 1), np.float32)), room(runtime, 1, 4, 1)
    runtime.product(Product(on_device(runtime, exact), one, out, tf32=True))()
    np.testing.assert_array_equal(out.get().ravel(), [1 + 2.0**-10, 1 + 2.0**-10, -1 - 2.0**-10, 1])
