"""The kernels as shared libraries for the host: the headers, one ``.cu`` and the emulator, compiled by g++, each once.

Libraries lie in a folder of the user under the system's temporary directory, by a hash of all they are made of. Tests run
with AddressSanitizer and UndefinedBehaviorSanitizer, which end the process at an access outside an array, a misaligned
load and the like, and name file and line, when they are started so:

    export GPUMLP_EMULATOR_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0
    LD_PRELOAD=$(g++ -print-file-name=libasan.so) pytest tests/test_kernels_*.py
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from gpumlp.backends import kernel_source
from gpumlp.backends.kernel_source import HEADERS, Instance, kernel_path

HERE = Path(__file__).resolve().parent
FLAGS = [
    *(
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-shared",
    ),  # -O2 takes half as long again to compile, and saves less than that in tests
    *("-fno-strict-aliasing", "-ffp-contract=off"),
    "-Werror=double-promotion",  # a bare 0.5 in a float kernel
]
UNDEFINED = (
    "alignment,bounds,signed-integer-overflow,shift,integer-divide-by-zero"  # all checks take twice as long to compile
)
SANITIZE = ["-g1", f"-fsanitize=address,{UNDEFINED}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def sanitizes() -> bool:
    """Whether the environment asks for the sanitizers."""
    return os.environ.get("GPUMLP_EMULATOR_SANITIZE", "") not in ("", "0")


def path_of(file: str) -> Path:
    """A source of kernels/, or one of the emulator's own."""
    return HERE / file if (HERE / file).is_file() else kernel_path(file)


@cache
def instances_of(file: str) -> dict[str, Instance]:
    """The instances that a source declares, by name."""
    return {i.name: i for i in kernel_source.parse(path_of(file).read_text(encoding="utf-8"), file)}


def source(file: str) -> str:
    """What the compiler gets. Its messages, and the sanitizers', name the files that it is put together from."""
    headers = [HERE / "cuda_emulator.h", *map(kernel_path, HEADERS)]
    kernels = ["namespace kernels {", _marked(path_of(file)), "}"]  # as in kernel_source.assemble
    return "\n".join([*map(_marked, headers), *kernels, *map(_entry, instances_of(file).values())])


def _marked(path: Path) -> str:
    return f'#line 1 "{path}"\n{path.read_text(encoding="utf-8")}'


def _entry(instance: Instance) -> str:
    return (
        f'extern "C" const char* emu_{instance.name}(const unsigned* shape, void** arguments, unsigned schedule) '
        f"{{ return emulator::launch(kernels::{instance.call}, shape, arguments, GM_THREADS, schedule); }}"
    )


@cache
def library(file: str, sanitize: bool) -> ctypes.PyDLL:
    """The kernels of one source, built where they are not there yet. Skips the test where g++ is missing.

    PyDLL keeps Python's lock while a kernel runs: two at once would share the emulator's variables.
    """
    return ctypes.PyDLL(str(build(file, sanitize)))


def build(file: str, sanitize: bool = False) -> Path:
    """The path of the library."""
    compiler = shutil.which("g++")
    if compiler is None:
        import pytest  # here: conformance.py uses this module where no tests run

        pytest.skip("g++ is not installed: the emulator compiles kernels with it")
    text, flags = source(file), FLAGS + (SANITIZE if sanitize else [])
    digest = hashlib.sha256("\0".join([_version(compiler), *flags, text]).encode()).hexdigest()[:24]
    built = _folder() / f"{Path(file).stem}-{digest}.so"
    if not built.is_file():
        _compile(compiler, flags, text, built)
    return built


def _folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"gpumlp-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # whose libraries would run here
        raise PermissionError(f"{folder} belongs to another user: remove it, or set TMPDIR to a folder of your own")
    return folder


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


def _compile(compiler: str, flags: list[str], text: str, built: Path) -> None:
    """Written elsewhere and renamed: another process may build the same at the same time."""
    with tempfile.TemporaryDirectory(dir=built.parent) as scratch:
        out = Path(scratch) / built.name
        command = [compiler, *flags, "-x", "c++", "-", "-o", str(out)]
        plain = {
            name: value for name, value in os.environ.items() if name != "LD_PRELOAD"
        }  # the sanitizer is not for g++
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=plain)
        if done.returncode:
            raise RuntimeError(f"{built.name}: {done.stderr}")
        out.replace(built)
