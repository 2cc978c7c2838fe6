"""Which device is taken, and what is said where it is not: every way in which a GPU can be missing or broken."""

import os
import subprocess
import sys
from multiprocessing import get_context

import numpy as np
import pytest
from fake_cupy import CUDARuntimeError, FakeCupy, FakeLt, OutOfMemoryError

from gpumlp.backends import cupy_runtime, get_backend, probe
from gpumlp.backends.numpy_backend import NumpyBackend

INSTALL = 'pip install "gpumlp[cuda13]", or "gpumlp[cuda12]" for an older driver (nvidia-smi shows its CUDA version)'


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """Nothing is known of any GPU, and what is learnt goes with the test."""
    monkeypatch.setattr(probe, "_found", {})
    monkeypatch.setattr(probe, "_started_in", [])
    monkeypatch.setenv("GPUMLP_CACHE_DIR", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install(monkeypatch, lt=None, **options):
    """A CuPy with these options, and a cuBLASLt with those of ``lt``."""
    cupy = FakeCupy(**options)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(cupy_runtime, "CublasLt", lambda: FakeLt(cupy, **(lt or {})))
    cupy.times[:] = [0.5] * 1000
    return cupy


def wrong_cast(x, x_stride, y, y_stride, n, models):
    """Leaves y as it is."""


def cuda_error(status, text):
    return CUDARuntimeError(status, text)


NO_DRIVER = cuda_error(35, "cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
FORKED = (
    "this process was forked from one in which CUDA had started, and CUDA works in no such fork: spawn workers instead "
    "(multiprocessing.get_context('spawn')), or create networks in the workers alone"
)
WRONG = "gave wrong numbers: update NVIDIA's driver and CuPy; if that does not help, the GPU may be faulty"

BROKEN = {  # what is wrong, and what is said of it
    "no driver": (
        {"fails": {"getDeviceCount": NO_DRIVER}, "driver": 0},
        "CuPy finds no CUDA driver: install NVIDIA's driver; a container has to be given it (--gpus all)",
    ),
    "an old driver": (
        {"fails": {"getDeviceCount": NO_DRIVER}, "driver": 12040},
        f"the driver is for CUDA 12.4 and CuPy for 13.2: update the driver, or {INSTALL}",
    ),
    "no GPU": (
        {"count": 0},
        "CUDA finds no GPU: see nvidia-smi; a container has to be given one (docker run --gpus all)",
    ),
    "no GPU, as an error": (
        {"fails": {"getDeviceCount": cuda_error(100, "cudaErrorNoDevice: no CUDA-capable device is detected")}},
        "CUDA finds no GPU: see nvidia-smi; a container has to be given one (docker run --gpus all)",
    ),
    "CUDA is out of order": (
        {"fails": {"getDeviceCount": cuda_error(803, "cudaErrorSystemDriverMismatch: system has unsupported pair")}},
        "CUDA does not start (CUDARuntimeError: cudaErrorSystemDriverMismatch: system has unsupported pair); nvidia-smi "
        "should list the GPU; after an update of the driver, restart the machine",
    ),
    "CUDA had started before a fork": (
        {"fails": {"getDeviceCount": cuda_error(3, "cudaErrorInitializationError: initialization error")}},
        FORKED,
    ),
    "an old GPU": (
        {"capability": "61"},
        "cuda:0 has compute capability 6.1, kernels need 7.5 (Turing, 2018) or later",
    ),
    "a GPU without free memory": (
        {"fails": {"alloc": OutOfMemoryError("out of memory")}},
        "cuda:0 does not start (DeviceMemoryError: cuda:0 has 0.00 GiB free and 0.03 GiB more are needed: try a smaller "
        "batch_size, precision='bf16', or a lower memory_limit for the data, so that it streams); another process may hold "
        "it or its memory: see nvidia-smi",
    ),
    "a kernel does not compile": (
        {"fails": {"compile": ImportError("libnvrtc.so.13:\n cannot open shared object file")}},
        "a kernel did not run on cuda:0 (ImportError: libnvrtc.so.13: cannot open shared object file); install CuPy with "
        f"its CUDA libraries: {INSTALL}",
    ),
    "a kernel does not launch": (
        {"fails": {"kernel": cuda_error(700, "cudaErrorIllegalAddress: an illegal memory access was encountered")}},
        "a kernel did not run on cuda:0 (CUDARuntimeError: cudaErrorIllegalAddress: an illegal memory access was "
        f"encountered); install CuPy with its CUDA libraries: {INSTALL}",
    ),
    "a kernel computes nothing": ({"kernels": {"cast_i32_f32": wrong_cast}}, f"a kernel on cuda:0 {WRONG}"),
    "no cuBLASLt": (
        {"lt": {"error": ImportError("cuBLASLt is not installed")}},
        "a matrix product did not run on cuda:0 (ImportError: cuBLASLt is not installed); install CuPy with its CUDA "
        f"libraries: {INSTALL}",
    ),
    "a product fails": (
        {"lt": {"broken": (0,)}},
        "a matrix product did not run on cuda:0 (UnsupportedProduct: each of 1 algorithms that cuBLASLt offers fails for "
        f"(1, 3, 4) adds False); install CuPy with its CUDA libraries: {INSTALL}",
    ),
    "a product is wrong": ({"lt": {"scale": 2}}, f"a matrix product on cuda:0 {WRONG}"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_said(monkeypatch, case):
    options, reason = BROKEN[case]
    install(monkeypatch, **options)
    assert probe.find_gpu(None) == (None, reason)

    backend, said = get_backend("auto")
    assert isinstance(backend, NumpyBackend) and said == f"cpu: {reason}"
    for device in ("cuda", "cuda:0"):
        with pytest.raises(RuntimeError) as error:
            get_backend(device)
        assert str(error.value).startswith(f"device={device!r}: {reason}")


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert probe.find_gpu() == (None, f"CuPy is not installed: {INSTALL}")
    assert get_backend("auto")[1] == f"cpu: CuPy is not installed: {INSTALL}"


def test_a_cupy_that_does_not_import(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.13: no such file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    assert probe.find_gpu() == (
        None,
        "CuPy does not import (ImportError: libcudart.so.13: no such file); install it again, one CuPy package and no "
        f"second one: {INSTALL}",
    )


def test_hidden_gpus(monkeypatch):
    install(monkeypatch, count=0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert probe.find_gpu()[1] == (
        "CUDA finds no GPU: CUDA_VISIBLE_DEVICES='-1' may hide it; a container has to be given one (docker run --gpus all)"
    )


def test_an_index_out_of_range(monkeypatch):
    install(monkeypatch, count=1)
    assert probe.find_gpu(1) == (None, "there is no cuda:1: CUDA finds 1 GPU, counted from cuda:0")
    with pytest.raises(
        RuntimeError, match=r"^device='cuda:1': there is no cuda:1: CUDA finds 1 GPU, counted from cuda:0"
    ):
        get_backend("cuda:1")
    install(monkeypatch, count=2)
    assert probe.find_gpu(7)[1] == "there is no cuda:7: CUDA finds 2 GPUs, counted from cuda:0"


def test_a_gpu_that_works(monkeypatch):
    install(monkeypatch, count=2)
    runtime, reason = probe.find_gpu(1)
    assert runtime.device == "cuda:1" and runtime.processors == 132
    assert reason == "cuda:1: Fake GPU, CUDA 13.2, CuPy 14.2.0; a kernel and a product ran on it"
    for device in ("cuda", "auto"):
        backend, said = get_backend(device)
        assert backend.runtime is probe.find_gpu(0)[0] and said == probe.find_gpu()[1]
        assert said.startswith("cuda:0: ")
    assert get_backend("cuda:1")[0].runtime is runtime


def test_a_bug_of_ours_is_no_reason(monkeypatch):
    install(monkeypatch, fails={"kernel": AssertionError("a kernel without a name")})
    with pytest.raises(AssertionError, match="a kernel without a name"):
        probe.find_gpu()


def test_each_gpu_is_probed_once(monkeypatch):
    cupy = install(monkeypatch, count=0)
    reason = probe.find_gpu()[1]
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert probe.find_gpu() == (None, reason)
    assert cupy.log == []


def test_a_fork_is_told_that_it_has_no_gpu(monkeypatch):
    """CUDA's state is not there in a process that is forked after CUDA has started."""
    install(monkeypatch, count=2)
    assert probe.find_gpu(0)[0] is not None
    parent = os.getpid()
    monkeypatch.setattr(probe.os, "getpid", lambda: parent + 1)
    for index in (0, 1):
        assert probe.find_gpu(index) == (None, FORKED)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_a_fork_in_deed(monkeypatch):
    install(monkeypatch)
    assert probe.find_gpu()[0] is not None
    receiver, sender = get_context("fork").Pipe(duplex=False)
    process = get_context("fork").Process(target=lambda: sender.send(probe.find_gpu()[1]))
    process.start()
    process.join(20)
    assert receiver.poll(0) and receiver.recv() == FORKED


def test_a_fork_of_a_process_without_cuda_looks_for_itself(monkeypatch):
    install(monkeypatch, fails={"getDeviceCount": NO_DRIVER}, driver=0)
    assert probe.find_gpu()[0] is None
    install(monkeypatch)
    parent = os.getpid()
    monkeypatch.setattr(probe.os, "getpid", lambda: parent + 1)
    assert probe.find_gpu()[0] is not None


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:1.0", 3, None], ids=repr)
def test_unknown_devices(device):
    with pytest.raises(ValueError) as error:
        get_backend(device)
    assert str(error.value) == f"device={device!r} is unknown; allowed: 'auto', 'cpu', 'cuda', 'cuda:<index>'"


def test_the_cpu_asks_for_no_gpu(monkeypatch):
    monkeypatch.setattr(probe, "find_gpu", None)
    backend, reason = get_backend("cpu")
    assert isinstance(backend, NumpyBackend) and reason == "cpu: asked for"


def test_cupy_is_imported_by_a_probe_alone(tmp_path):
    """Not by `import gpumlp`, nor by work on the CPU: starting CUDA takes seconds, and forbids forks."""
    (tmp_path / "cupy.py").write_text("raise SystemExit('cupy was imported')")
    code = (
        "import gpumlp as gm, numpy as np\n"
        "import gpumlp.backends.probe, gpumlp.backends.cupy_runtime\n"
        "net = gm.Network([gm.Dense(3), gm.Dense(2)], n_features=4, seed=0, device='cpu')\n"
        "print(net.predict(np.ones((5, 4), np.float32)).shape)\n"
    )
    here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), here])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert run.stdout.strip() == "(5, 2)", run.stderr


def test_a_broken_gpu_leaves_the_network_on_the_cpu(monkeypatch):
    import gpumlp as gm

    install(monkeypatch, count=0)
    net = gm.Network([gm.Dense(3, "relu"), gm.Dense(2)], n_features=4, seed=0)
    assert net.device_reason.startswith("cpu: CUDA finds no GPU")
    assert net.predict(np.ones((5, 4), np.float32)).shape == (5, 2)
