"""Is there a GPU that works? Asked once for each, by really running a kernel and a matrix product on it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np

from .cupy_runtime import CupyRuntime, load_cupy
from .device import DeviceArray, Product, bind

INSTALL = 'pip install "gpumlp[cuda13]", or "gpumlp[cuda12]" for an older driver (nvidia-smi shows its CUDA version)'
OLDEST = 75  # compute capability 7.5: CUDA 13 compiles for no older GPU
NOT_INITIALIZED, DRIVER_TOO_OLD, NO_DEVICE = 3, 35, 100  # of cudaError_t


class _Unusable(Exception):
    """Why a GPU is not to be had, and what to do about it."""


@dataclass(frozen=True, slots=True)
class _Found:
    process: int
    runtime: CupyRuntime | None
    reason: str


_found: dict[int, _Found] = {}  # by index
_started_in: list[int] = []  # the process in which CUDA was started, once it was


def find_gpu(index: int | None = None) -> tuple[CupyRuntime | None, str]:
    """The GPU ``index`` (None: the first one), or None; and one sentence that says why.

    The answer is kept: it is the same for the life of the process.
    """
    index = index or 0
    found = _found.get(index)
    if found is None or found.process != os.getpid():
        found = _found[index] = _look(index)
    return found.runtime, found.reason


def _look(index: int) -> _Found:
    try:
        runtime = _try(index)
    except _Unusable as error:
        return _Found(os.getpid(), None, str(error))
    return _Found(os.getpid(), runtime, f"{runtime.device}: {runtime.description}; a kernel and a product ran on it")


def _try(index: int) -> CupyRuntime:
    if _started_in and os.getpid() not in _started_in:
        raise _forked()
    if find_spec("cupy") is None:
        raise _Unusable(f"CuPy is not installed: {INSTALL}")
    with _stage("CuPy does not import", f"install it again, one CuPy package and no second one: {INSTALL}"):
        cupy = load_cupy()
    _check_devices(cupy, index)
    with _stage(f"cuda:{index} does not start", "another process may hold it or its memory: see nvidia-smi"):
        runtime = CupyRuntime(index)
    with _stage(f"a kernel did not run on {runtime.device}", f"install CuPy with its CUDA libraries: {INSTALL}"):
        right = _kernel_works(runtime)
    _check_numbers(runtime, "kernel", right)
    with _stage(
        f"a matrix product did not run on {runtime.device}", f"install CuPy with its CUDA libraries: {INSTALL}"
    ):
        right = _product_works(runtime)
    _check_numbers(runtime, "matrix product", right)
    return runtime


@contextmanager
def _stage(cause: str, fix: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a reason; an assertion is a bug of ours and stays one."""
    try:
        yield
    except (_Unusable, AssertionError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())  # a compiler's log has many lines
        raise _Unusable(f"{cause} ({type(error).__name__}: {said[:300]}); {fix}") from error


def _check_devices(cupy: Any, index: int) -> None:
    with _stage(
        "CUDA does not start", "nvidia-smi should list the GPU; after an update of the driver, restart the machine"
    ):
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            if error.status == NOT_INITIALIZED:
                raise _forked() from error
            if error.status == DRIVER_TOO_OLD:
                raise _driver(cupy) from error
            if error.status != NO_DEVICE:
                raise
            count = 0
        _started_in[:] = [os.getpid()]
        if count == 0:
            hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
            why = "see nvidia-smi" if hidden is None else f"CUDA_VISIBLE_DEVICES={hidden!r} may hide it"
            raise _Unusable(f"CUDA finds no GPU: {why}; a container has to be given one (docker run --gpus all)")
        if index >= count:
            raise _Unusable(f"there is no cuda:{index}: CUDA finds {count} GPU{'s'[: count > 1]}, counted from cuda:0")
        capability = int(cupy.cuda.Device(index).compute_capability)  # "75"
        if capability < OLDEST:
            raise _Unusable(
                f"cuda:{index} has compute capability {capability / 10}, kernels need {OLDEST / 10} (Turing, 2018) or later"
            )


def _driver(cupy: Any) -> _Unusable:
    has, needs = (
        f"{version // 1000}.{version % 1000 // 10}"
        for version in (cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion())
    )
    if has == "0.0":
        return _Unusable(
            "CuPy finds no CUDA driver: install NVIDIA's driver; a container has to be given it (--gpus all)"
        )
    return _Unusable(f"the driver is for CUDA {has} and CuPy for {needs}: update the driver, or {INSTALL}")


def _forked() -> _Unusable:
    return _Unusable(
        "this process was forked from one in which CUDA had started, and CUDA works in no such fork: spawn workers instead "
        "(multiprocessing.get_context('spawn')), or create networks in the workers alone"
    )


def _kernel_works(runtime: CupyRuntime) -> bool:
    n = 1000
    x, y = DeviceArray.empty(runtime, (n,), "i32"), DeviceArray.empty(runtime, (n,), "f32")
    x[...] = np.arange(n, dtype=np.int32)
    y[...] = 0
    instance, values = bind("cast_i32_f32", (x, n, y, n, n, 1))
    runtime.launch(instance, (1, 1, 1), (256, 1, 1), values)
    return bool((y.get() == np.arange(n)).all())


def _product_works(runtime: CupyRuntime) -> bool:
    """Of small integers, which every precision holds."""
    host = np.arange(15, dtype=np.float32).reshape(1, 3, 5), np.arange(20, dtype=np.float32).reshape(1, 5, 4) - 9
    a, b, out = (DeviceArray.empty(runtime, shape, "f32") for shape in ((1, 3, 5), (1, 5, 4), (1, 3, 4)))
    a[...], b[...] = host
    out[...] = 0
    runtime.product(Product(a, b, out))()
    return bool((out.get() == host[0] @ host[1]).all())


def _check_numbers(runtime: CupyRuntime, what: str, right: bool) -> None:
    if not right:
        raise _Unusable(
            f"a {what} on {runtime.device} gave wrong numbers: update NVIDIA's driver and CuPy; if that does not help, "
            "the GPU may be faulty"
        )
