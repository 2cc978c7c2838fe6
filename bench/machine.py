"""What the scripts for a GPU share: this checkout on Python's path, the device, the machine in words, a report's frame.

Import it before ``gpumlp``: a checkout then needs no installation.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from typing import Any

import numpy as np
from train_step import ROOT, describe_blas, describe_libraries, describe_machine, n_cores

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

EMULATED_BYTES = 1 << 27  # little, because the emulator fills what is allocated
QUERY = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.mem", "power.limit")  # of nvidia-smi


def find_device(emulate: bool = False) -> tuple[Any, str]:
    """The first GPU's runtime, or None, and a sentence that says why; with ``emulate`` the emulated device of the tests."""
    if not emulate:
        from gpumlp.backends.probe import find_gpu

        return find_gpu()
    if shutil.which("g++") is None:
        return None, "g++ is not installed: the emulator compiles kernels with it"
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    from emulator import EmulatedRuntime

    runtime = EmulatedRuntime(memory=EMULATED_BYTES)
    return runtime, f"{runtime.device}: {runtime.description}; its times mean nothing"


def frame(benchmark: str, runtime: Any, reason: str) -> dict[str, Any]:
    """The first lines of a report: what ran, when, on what. ``gpu`` is None where there is none, ``device`` says why."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": reason,
        "machine": describe_machine() | {"gpu": None if runtime is None else describe_gpu(runtime)},
        "versions": versions(runtime),
    }


def describe_gpu(runtime: Any) -> dict[str, Any]:
    """The device in its own words, and in nvidia-smi's where that is installed."""
    found = {
        "description": runtime.description,
        "multiprocessors": runtime.processors,
        "free_bytes": runtime.free_bytes(),
    }
    if runtime.name != "cupy" or shutil.which("nvidia-smi") is None:
        return found
    command = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    values = done.stdout.splitlines()[:1] if done.returncode == 0 else []
    return found | {"nvidia-smi": dict(zip(QUERY, values[0].split(", "), strict=False)) if values else None}


def versions(runtime: Any) -> dict[str, Any]:
    """Of Python, NumPy and its BLAS, gpumlp, cuBLASLt, and of CuPy, PyTorch and JAX with all that belongs to them."""
    import gpumlp

    found: dict[str, Any] = {"python": platform.python_version(), "numpy": np.__version__}
    found |= {"gpumlp": gpumlp.__version__, "blas": describe_blas(n_cores()), "libraries": describe_libraries()}
    if runtime is not None and runtime.name == "cupy":
        from gpumlp.backends.cublaslt import CublasLt

        found["cublaslt"] = CublasLt().version()
    return found


def in_words(report: dict[str, Any]) -> str:
    """One line for people: processor, GPU, versions, day."""
    machine, known = report["machine"], report["versions"]
    gpu = machine["gpu"]["description"] if machine["gpu"] else "no GPU"
    named = ", ".join(f"{name} {version}" for name, version in known.items() if isinstance(version, str | int))
    blas = f"{known['blas']['name']} {known['blas']['version']}, {known['blas']['threads']} threads"
    return f"{machine['cpu']}, {machine['cores']} cores; {gpu}; {named}, {blas}; {report['date'][:10]}."
