"""The CUDA sources: where they are, what kernels they hold with which arguments, and one string for a compiler.

A kernel in ``kernels/*.cu`` is a function template marked GM_KERNEL with a list GM_INSTANCES of its types. An instance is
called after them, ``gather_u8_f32``; its extern "C" entry is written here, so that a name needs no mangling, and its
signature is read here, so that every launch is checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
HEADERS = ("common.cuh", "activations.cuh", "philox.cuh", "launch.cuh")  # in the order in which they lean on each other
TYPES = ("i8", "u8", "i16", "u16", "i32", "u32", "i64", "u64", "f16", "bf16", "f32", "f64")
TWO_BYTE_FLOATS = ("f16", "bf16")

_KERNEL = re.compile(
    r"^(?:template <(?P<template>[^>]*)>\s*)?GM_KERNEL void (?P<name>\w+)\((?P<arguments>[^)]*)\)", re.M
)
_INSTANCES = re.compile(r"^GM_INSTANCES\((?P<name>\w+)(?P<lists>[^;]*?)\)$", re.M)


@dataclass(frozen=True)
class Argument:
    """One argument of an instance."""

    name: str
    type: str  # one of TYPES
    is_pointer: bool


@dataclass(frozen=True)
class Instance:
    """One kernel for certain types."""

    name: str  # "gather_u8_f32"
    file: str  # "batch.cu"
    call: str  # "gather<u8, f32>"
    declaration: str  # of the arguments, as C++
    arguments: tuple[Argument, ...]


def kernel_path(name: str) -> Path:
    """The file ``name`` of ``kernels/``, say "philox.cuh".

    Raises:
        FileNotFoundError: it is in neither place: the installation is incomplete.
    """
    for folder in (PACKAGE / "kernels", PACKAGE.parent / "kernels"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"kernels/{name} is neither in {PACKAGE} nor beside it: install gpumlp again")


@cache
def files() -> tuple[str, ...]:
    """The sources that hold kernels, by name."""
    return tuple(sorted(path.name for path in kernel_path("common.cuh").parent.glob("*.cu")))


@cache
def instances() -> dict[str, Instance]:
    """Every instance of every kernel, by name."""
    found: dict[str, Instance] = {}
    for file in files():
        for instance in parse(kernel_path(file).read_text(encoding="utf-8"), file):
            assert instance.name not in found, f"{instance.name} in {file} and {found[instance.name].file}"
            found[instance.name] = instance
    return found


def parse(text: str, file: str) -> list[Instance]:
    """The instances that a source declares.

    Raises:
        ValueError: a kernel without instances, instances of no kernel, or an argument of a type that no host value has.
    """
    text = re.sub(r"//[^\n]*", "", text)
    lists = {m["name"]: re.findall(r"\(([^()]*)\)", m["lists"]) for m in _INSTANCES.finditer(text)}
    found = []
    for kernel in _KERNEL.finditer(text):
        name, parameters = kernel["name"], [p.split()[-1] for p in (kernel["template"] or "").split(",") if p.strip()]
        if name not in lists:
            raise ValueError(f"{file}: the kernel {name} has no GM_INSTANCES")
        for given in lists.pop(name) or [""]:
            values = [v.strip() for v in given.split(",") if v.strip()]
            if len(values) != len(parameters):
                raise ValueError(
                    f"{file}: GM_INSTANCES({name}, ({given})) does not fit template <{kernel['template']}>"
                )
            found.append(_instance(file, name, dict(zip(parameters, values, strict=True)), kernel["arguments"]))
    if lists:
        raise ValueError(f"{file}: GM_INSTANCES of {', '.join(lists)}, which no GM_KERNEL defines")
    return found


def _instance(file: str, kernel: str, types: dict[str, str], arguments: str) -> Instance:
    for parameter, value in types.items():
        arguments = re.sub(rf"\b{parameter}\b", value, arguments)
    arguments = re.sub(r"Compute<(\w+)>", lambda m: "f32" if m[1] in TWO_BYTE_FLOATS else m[1], arguments)
    declared, parsed = [" ".join(part.split()) for part in arguments.split(",") if part.strip()], []
    for part in declared:
        match = re.fullmatch(r"(?:const )?(\w+)(\*?) (\w+)", part)
        if match is None or match[1] not in TYPES:
            raise ValueError(
                f"{file}: argument {part!r} of {kernel} must be a pointer or a number of {', '.join(TYPES)}"
            )
        parsed.append(Argument(match[3], match[1], bool(match[2])))
    spelled = [v if v in TYPES else f"kernels::{v}" for v in types.values()]  # the others are structs of the source
    call = f"{kernel}<{', '.join(spelled)}>" if types else kernel
    return Instance("_".join([kernel, *types.values()]), file, call, ", ".join(declared), tuple(parsed))


def source(file: str, wanted: Iterable[Instance] | None = None) -> str:
    """One string for a CUDA compiler: the headers, ``file`` and the entries of ``wanted`` (None: of all its instances)."""
    wanted = [i for i in instances().values() if i.file == file] if wanted is None else wanted
    return assemble(kernel_path(file).read_text(encoding="utf-8"), wanted)


def assemble(text: str, wanted: Iterable[Instance]) -> str:
    """The headers, the kernels in ``text`` and the entries of ``wanted``.

    Headers are spliced in because CuPy's kernel cache does not look into files that are included. The namespace keeps a
    kernel that has no types apart from its entry, which has the same name.
    """
    headers = [kernel_path(name).read_text(encoding="utf-8") for name in HEADERS]
    return "\n".join([*headers, "namespace kernels {", text, "}", *map(_entry, wanted)])


def text_of(file: str) -> str:
    """The headers and ``file``, without entries."""
    return "\n".join(kernel_path(name).read_text(encoding="utf-8") for name in (*HEADERS, file))


def _entry(instance: Instance) -> str:
    # Blocks that a multiprocessor holds at once, and so the registers of a thread (128 for two blocks): without a number
    # ptxas takes up to 255 for kernels that hold rows in registers. Double precision needs them.
    blocks = 1 if any(argument.type == "f64" for argument in instance.arguments) else 2
    names = ", ".join(argument.name for argument in instance.arguments)
    return (
        f'extern "C" __global__ void __launch_bounds__(GM_THREADS, {blocks}) {instance.name}({instance.declaration}) '
        f"{{ kernels::{instance.call}({names}); }}"
    )
