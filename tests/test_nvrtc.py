"""Every kernel for every architecture, compiled as CuPy will compile it, without a GPU.

Three gates, each shown to catch what it is there for: NVRTC accepts the source without a header; a kernel without f64 in
its signature holds no double instruction (at 1/64 of the speed on most GPUs); registers and what is spilled to memory stay
within a budget.
"""

import ctypes
import importlib.util
import multiprocessing
import os
import re
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from emulator import conformance

from gpumlp.backends import kernel_source

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
OPTIONS = ("-std=c++17", "-ftz=true", "--ptxas-options=-v")  # those of CupyRuntime and CuPy, and ptxas's report
# For kernels without f64; with it they are for checks of gradients, and only have to compile.
REGISTERS, SPILLED = 128, 64  # of 65,536: room for two blocks of 256 threads; bytes for each thread
# These hold rows in registers, and from sm_100 on ptxas unrolls them far.
WIDE, SPILLED_WIDE = {"dense_backward", "batch_norm_backward", "layer_norm_backward"}, 320
CONFORMANCE = "conformance.cu"


def find_nvrtc():
    """The library's path, None where it is not installed."""
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib

        return load_nvidia_dynamic_lib("nvrtc").abs_path
    except (ImportError, RuntimeError):  # no cuda-pathfinder, or nothing that it finds
        wheels = importlib.util.find_spec("nvidia")
    folders = list(wheels.submodule_search_locations or []) if wheels else []
    found = [path for folder in folders for path in Path(folder).rglob("libnvrtc.so.*") if "alt" not in path.name]
    return str(max(found)) if found else None


PATH = find_nvrtc()
pytestmark = pytest.mark.skipif(PATH is None, reason="NVRTC is not installed: pip install nvidia-cuda-nvrtc")


@dataclass
class Entry:
    """What a compiler made of one kernel."""

    registers: int
    stack: int  # bytes of memory that a thread uses for arrays and spills
    spilled: int
    double: str | None  # its first instruction in double precision


@dataclass
class Compiled:
    error: str | None
    entries: dict[str, Entry]


@cache
def nvrtc():
    return ctypes.CDLL(PATH)


@cache
def supported():
    """Compute capabilities that this NVRTC knows."""
    n = ctypes.c_int()
    nvrtc().nvrtcGetNumSupportedArchs(ctypes.byref(n))
    known = (ctypes.c_int * n.value)()
    nvrtc().nvrtcGetSupportedArchs(known)
    return set(known)


def compile(source, architecture):
    """Compile one string for, say, 90; without any folder of headers."""
    program = ctypes.c_void_p()
    assert nvrtc().nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    options = [f"-arch=sm_{architecture}".encode(), *map(str.encode, OPTIONS)]
    try:
        status = nvrtc().nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = output(program, "ProgramLog")
        if status:
            return Compiled(log, {})
        return Compiled(None, read(log, output(program, "PTX")))
    finally:
        nvrtc().nvrtcDestroyProgram(ctypes.byref(program))


def output(program, what):
    size = ctypes.c_size_t()
    assert getattr(nvrtc(), f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    held = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc(), f"nvrtcGet{what}")(program, held) == 0
    return held.value.decode()


def read(log, ptx):
    """The entries, by name, from what ptxas says and from the code that it was given."""
    bodies, entries = functions(ptx), {}
    for part in log.split("Compiling entry function '")[1:]:
        name = part[: part.index("'")]
        memory = re.search(
            rf"Function properties for {name}\n\D*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill",
            part,
        )
        stack, stored, loaded = map(int, memory.groups())
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        entries[name] = Entry(registers, stack, max(stored, loaded), first_double(name, bodies))
    return entries


def functions(ptx):
    """The body of every entry and function of PTX."""
    bodies, name = {}, None
    for line in ptx.splitlines():
        begin = re.match(r"(?:\.visible |\.weak |\.extern )*\.(?:entry|func)\s+(?:\([^)]*\)\s*)?(\w+)", line)
        if begin and not line.startswith(".extern"):
            name, bodies[begin[1]] = begin[1], []
        elif line == "}":
            name = None
        elif name:
            bodies[name].append(line.strip())
    return bodies


def first_double(name, bodies):
    """Within the function or those that it calls."""
    called = {word for line in bodies[name] for word in re.findall(r"\w+", line) if word in bodies and word != name}
    found = [line for part in (name, *sorted(called)) for line in bodies[part] if re.search(r"\.f64\b", line)]
    return next((line for line in found if not line.startswith((".reg", ".param"))), None)


def has_doubles(instance):
    return any(argument.type == "f64" for argument in instance.arguments)


def compile_file(file, architecture):
    source = conformance.cuda_source() if file == CONFORMANCE else kernel_source.source(file)
    return compile(source, architecture)


@pytest.fixture(scope="module")
def compiled(request):
    """compiled(file, architecture), from processes that began to compile all that the chosen tests ask for."""
    mine = [
        item.callspec.params
        for item in request.session.items
        if item.fspath == request.fspath and hasattr(item, "callspec")
    ]
    wanted = dict.fromkeys(
        (p["file"], p["architecture"]) for p in mine if "file" in p and p["architecture"] in supported()
    )
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        futures = {job: pool.submit(compile_file, *job) for job in wanted}
        yield lambda *job: futures[job].result()
        for future in futures.values():
            future.cancel()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", [*kernel_source.files(), CONFORMANCE])
def test_kernels_compile_within_their_budget(compiled, file, architecture):
    if architecture not in supported():
        pytest.skip(f"this NVRTC knows no sm_{architecture}")
    result = compiled(file, architecture)
    assert result.error is None, result.error
    if file == CONFORMANCE:
        return
    instances = {i.name: i for i in kernel_source.instances().values() if i.file == file}
    assert result.entries.keys() == instances.keys()
    problems = [p for name, entry in result.entries.items() for p in faults(entry, instances[name])]
    assert not problems, "\n".join(problems)


def faults(entry, instance):
    """What is wrong with an entry, in words."""
    if has_doubles(instance):
        return
    spilled = SPILLED_WIDE if instance.call.split("<")[0] in WIDE else SPILLED
    if entry.registers > REGISTERS:
        yield f"{instance.name} needs {entry.registers} registers, the budget is {REGISTERS}"
    if entry.spilled > spilled:
        yield f"{instance.name} spills {entry.spilled} bytes, the budget is {spilled}"
    if entry.stack and not entry.spilled:
        yield f"{instance.name} keeps {entry.stack} bytes for each thread in memory: an array with an index that varies?"
    if entry.double:
        yield f"{instance.name} has no f64 in its signature and computes in double precision: {entry.double}"


# --- each gate catches what it is there for


def compile_text(text):
    instances = kernel_source.parse(text, "broken.cu")
    result = compile(kernel_source.assemble(text, instances), 80)
    return result, [fault for i in instances if not result.error for fault in faults(result.entries[i.name], i)]


GOOD = """
template <typename T> GM_KERNEL void twice(const T* x, T* y) { y[threadIdx.x] = T(2) * x[threadIdx.x]; }
GM_INSTANCES(twice, (f32), (f64))
"""


def test_a_good_kernel_passes():
    result, found = compile_text(GOOD)
    assert result.error is None and result.entries.keys() == {"twice_f32", "twice_f64"} and not found
    assert result.entries["twice_f64"].double is not None


@pytest.mark.parametrize(
    "text, message",
    [
        ("GM_KERNEL void k(f32* y) { y[0] = INFINITY; }\nGM_INSTANCES(k)", '"INFINITY" is undefined'),
        (
            "#include <cmath>\nGM_KERNEL void k(f32* y) { y[0] = 1; }\nGM_INSTANCES(k)",
            'could not open source file "cmath"',
        ),
        (
            "GM_KERNEL void k(f32* y) { y[0] = std::sqrt(y[1]); }\nGM_INSTANCES(k)",
            'namespace "std" has no member "sqrt"',
        ),
    ],
)
def test_what_only_a_host_compiler_takes(text, message):
    result, _ = compile_text(text)
    assert result.error is not None and message in result.error


@pytest.mark.parametrize(
    "statement",
    [
        "y[threadIdx.x] *= 0.1;",  # a bare literal
        "y[threadIdx.x] = y[threadIdx.x] > 0 ? exp(double(y[0])) : 0;",  # a function of doubles
        "y[threadIdx.x] = f32(sqrt(2.5 * y[threadIdx.x]));",
    ],
)
def test_double_precision_by_accident(statement):
    _, found = compile_text(GOOD + f"GM_KERNEL void slow(f32* y) {{ {statement} }}\nGM_INSTANCES(slow)")
    (fault,) = found
    assert re.fullmatch(
        r"slow has no f64 in its signature and computes in double precision: (cvt|mul|sqrt)\.(\w+\.)*f64.*", fault
    )


def test_spills():
    """Numbers that are all held at once: none may be read again after the first is written, since y may be x."""
    text = """
GM_KERNEL void hoard(const f32* x, f32* y) {
    f32 held[400];
#pragma unroll
    for (int i = 0; i < 400; ++i) held[i] = x[i * 32 + threadIdx.x];
#pragma unroll
    for (int i = 0; i < 400; ++i) y[i * 32 + threadIdx.x] = held[399 - i];
}
GM_INSTANCES(hoard)
"""
    _, found = compile_text(text)
    (fault,) = found
    assert re.fullmatch(r"hoard spills \d{4} bytes, the budget is 64", fault)


def test_too_many_registers():
    (instance,) = kernel_source.parse("GM_KERNEL void wide(f32* y) {}\nGM_INSTANCES(wide)", "broken.cu")
    entry = Entry(registers=129, stack=0, spilled=0, double=None)
    assert list(faults(entry, instance)) == ["wide needs 129 registers, the budget is 128"]


def test_an_array_in_memory():
    text = """
GM_KERNEL void table(const i32* at, f32* y) {
    f32 held[8];
    for (int i = 0; i < 8; ++i) held[i] = y[i];
    for (int i = 0; i < 8; ++i) held[at[i] & 7] += y[i + 8];
    y[threadIdx.x] = held[at[threadIdx.x] & 7];
}
GM_INSTANCES(table)
"""
    _, found = compile_text(text)
    assert found == ["table keeps 32 bytes for each thread in memory: an array with an index that varies?"]
