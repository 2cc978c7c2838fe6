"""What the kernels of ``conformance.cu`` give, on the emulator and on every GPU: NumPy says it, to the last bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpumlp.backends.device import HOST_TYPES, TYPE_NAMES, DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.kernel_source import Instance, assemble

from .build import instances_of, path_of

FILE = "conformance.cu"
Pair = tuple[Any, Any]  # what came out (a DeviceArray or NumPy's), what should have


def cuda_source() -> str:
    """One string for a CUDA compiler, with an extern "C" entry for every instance."""
    return assemble(path_of(FILE).read_text(encoding="utf-8"), instances_of(FILE).values())


def typed(instance: Instance, arguments: tuple) -> list:
    """The arguments as a Runtime's ``launch`` takes them; None is the null pointer."""
    assert len(arguments) == len(instance.arguments), instance
    return [
        (np.uint64(0 if given is None else given.pointer) if wanted.is_pointer else HOST_TYPES[wanted.type](given))
        for given, wanted in zip(arguments, instance.arguments, strict=True)
    ]


@dataclass
class Device:
    """A runtime, and how to launch an instance of conformance.cu there."""

    runtime: Any
    launch: Callable[[Instance, tuple, tuple, list], None]
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(5))

    def put(self, values: Any, type: str | None = None) -> DeviceArray:
        values = np.asarray(values)
        array = self.room(values.shape, type or TYPE_NAMES[values.dtype])
        array[...] = values
        return array

    def room(self, shape: tuple[int, ...], type: str) -> DeviceArray:
        return DeviceArray.empty(self.runtime, shape, type)

    def run(self, name: str, grid: int | tuple, block: int | tuple, *arguments: Any) -> None:
        grid, block = (n if isinstance(n, tuple) else (n,) for n in (grid, block))
        instance = instances_of(FILE)[name]
        self.launch(instance, grid, block, typed(instance, arguments))

    def numbers(self, shape: int | tuple, type: str) -> np.ndarray:
        """Small integers: every sum and product of a few is exact in every type."""
        return self.rng.integers(0 if type.startswith("u") else -50, 50, shape).astype(HOST_TYPES[type])


def check(runtime: Any, launch: Callable | None = None) -> list[tuple[str, bool, str]]:
    """Run all; for each its name, whether it agrees, and where it does not.

    ``launch(instance, grid, block, values)`` is that of ``runtime`` where none is given.
    """
    results = []
    for expect in CHECKS:
        device = Device(runtime, launch or runtime.launch)
        name, detail = expect.__name__, ""
        try:
            for number, (got, wanted) in enumerate(expect(device)):
                detail = detail or _difference(f"output {number}", got, np.asarray(wanted))
        except Exception as error:  # the others are to run all the same
            detail = f"{type(error).__name__}: {error}"
        results.append((name, not detail, detail))
    return results


def _difference(label: str, got: Any, wanted: np.ndarray) -> str:
    got = got.get() if isinstance(got, DeviceArray) else np.asarray(got)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return f"{label} is {got.dtype}{got.shape}, not {wanted.dtype}{wanted.shape}"
    wrong = (got != wanted) & ~((got != got) & (wanted != wanted))
    if not wrong.any():
        return ""
    at = tuple(int(i) for i in np.argwhere(wrong)[0])
    return f"{label} at {at} is {got[at]!r}, not {wanted[at]!r}; {int(wrong.sum())} of {wrong.size} are wrong"


# --- launches


def arguments(device: Device) -> Iterator[Pair]:
    given = [-7, 200, -30_000, 60_000, -(2**30), 2**31 + 5, -(2**52), 2**52, 0.375, -1e300]
    out = device.room((10,), "f64")
    device.run("arguments", 1, 1, *given, out)
    yield out, np.array(given, np.float64)


def indices(device: Device) -> Iterator[Pair]:
    grid, block = (3, 2, 4), (5, 7, 2)
    out = device.room((24, 70, 6), "u32")
    device.run("indices", grid, block, out)
    blocks, threads = (np.indices(n[::-1]).reshape(3, -1).T[:, ::-1] for n in (grid, block))  # x changes fastest
    wanted = np.concatenate([np.repeat(blocks, 70, 0), np.tile(threads, (24, 1))], axis=1)
    yield out, wanted.reshape(24, 70, 6).astype(np.uint32)


# --- warps


def shuffles(device: Device) -> Iterator[Pair]:
    lane = np.arange(32)
    sources = np.stack(
        [lane ^ 5, np.full(32, 11), np.where(lane + 9 < 32, lane + 9, lane), np.where(lane < 3, lane, lane - 3)]
    )
    for type in ("i32", "u32", "u64", "f32", "f64"):
        x = device.numbers((2, 32), type)
        out = device.room((4, 2, 32), type)
        device.run(f"shuffles_{type}", 1, 64, device.put(x), out)
        yield out, x[:, sources].swapaxes(0, 1)


def votes(device: Device) -> Iterator[Pair]:
    x = np.stack([np.arange(32), np.arange(32) % 8, np.arange(32) + 8]).astype(np.uint32)  # some, none, all above 7
    out = device.room((3, 3, 32), "u32")
    device.run("votes", 1, 96, device.put(x), out)
    ballot = ((x > 7) << np.arange(32, dtype=np.uint64)).sum(axis=1, keepdims=True)
    wanted = [ballot, (x > 7).any(axis=1, keepdims=True), (x > 7).all(axis=1, keepdims=True)]
    yield out, np.broadcast_to(np.stack(wanted), (3, 3, 32)).astype(np.uint32)


def half_warps(device: Device) -> Iterator[Pair]:
    x = device.numbers((3, 32), "u32")
    out = device.room((3, 32), "u32")
    device.run("half_warps", 1, 96, device.put(x), out)
    left, right = x[:, :16], np.repeat(x[:, 31:], 16, axis=1)
    odd = ((left & 1) << np.arange(16, dtype=np.uint32)).sum(axis=1, keepdims=True)
    yield out, np.concatenate([right, left[:, np.arange(16) ^ 1] + odd], axis=1).astype(np.uint32)


def warp_sums(device: Device) -> Iterator[Pair]:
    for type in ("u32", "f32", "f64"):
        x = device.numbers((5, 32), type)
        out = device.room((5, 32), type)
        device.run(f"warp_sums_{type}", 1, 160, device.put(x), out)
        yield out, np.repeat(x.sum(axis=1, keepdims=True), 32, axis=1).astype(x.dtype)


# --- blocks


def block_sums(device: Device) -> Iterator[Pair]:
    for type in ("u32", "f32", "f64"):
        for block in [(32,), (256,), (16, 6, 2)]:
            n = int(np.prod(block))
            x = device.numbers((3, n), type)
            out = device.room((3, n), type)
            device.run(f"block_sums_{type}", 3, block, device.put(x), out)
            yield out, np.repeat(3 * x.sum(axis=1, keepdims=True), n, axis=1).astype(x.dtype)


def reverse(device: Device) -> Iterator[Pair]:
    for type in ("u8", "bf16", "f32", "f64"):
        x = device.numbers((3, 160), type)
        out = device.room((3, 160), type)
        device.run(f"reverse_{type}", 3, 160, device.put(x, type), out)
        yield out, x[:, ::-1]


def last_block(device: Device) -> Iterator[Pair]:
    x = device.numbers((37, 64), "u32")
    partials, ticket = device.room((37,), "u32"), device.put(np.zeros(1, np.uint32))
    total, n_last = device.room((1,), "u32"), device.put(np.zeros(1, np.uint32))
    for n_launches in (1, 2):
        device.run("last_block", 37, 64, device.put(x), partials, ticket, total, n_last)
        yield total, x.sum(dtype=np.uint32).reshape(1)
        yield ticket, np.zeros(1, np.uint32)
        yield n_last, np.array([n_launches], np.uint32)


def atomics(device: Device) -> Iterator[Pair]:
    x = device.rng.integers(-(2**31), 2**31, (37, 64)).astype(np.int32)
    unsigned, keys = x.view(np.uint32), x.view(np.uint32).astype(np.uint64) << np.uint64(20)
    sums = device.put(np.array([0, 2**32 - 1, 0], np.uint32))
    signed_sum, ends = device.put(np.zeros(1, np.int32)), device.put(np.zeros(2, np.int32))
    wide = device.put(np.array([0, 2**64 - 1, 0], np.uint64))
    device.run("atomics", 37, 64, device.put(x), sums, signed_sum, wide, ends)
    yield sums, np.array([unsigned.sum(dtype=np.uint32), unsigned.min(), unsigned.max()], np.uint32)
    yield signed_sum, x.sum(dtype=np.int32).reshape(1)
    yield wide, np.array([keys.sum(dtype=np.uint64), keys.min(), keys.max()], np.uint64)
    yield ends, np.array([x.min(), x.max()], np.int32)


# --- numbers


def awkward_floats(device: Device) -> np.ndarray:
    """Every size of float32, ties between two-byte floats, what overflows them, infinities, NaN, zeros, subnormals."""
    bits = device.rng.integers(0, 2**32, 3001, dtype=np.uint64).astype(np.uint32)
    ties = (bits & 0xFFFF0000) | 0x8000
    halves = device.rng.integers(0, 2**11, 2000) * 2.0 ** device.rng.integers(-26, 5, 2000)
    edges = [
        0.0,
        -0.0,
        np.inf,
        -np.inf,
        np.nan,
        65504,
        65519,
        65520,
        -65520,
        3.3961775e38,
        1e-45,
        2.0**-24,
        2.0**-25,
        2.0**-14,
    ]
    return np.concatenate([bits.view(np.float32), ties.view(np.float32), np.float32(halves), np.float32(edges)])


def two_byte_floats(device: Device) -> Iterator[Pair]:
    x = awkward_floats(device)
    types = ("bf16", "f32", "f16", "f32")
    brain, from_brain, half, from_half = (device.room(x.shape, type) for type in types)
    device.run("two_byte_floats", 3, 128, device.put(x), brain, from_brain, half, from_half, x.size)
    with np.errstate(over="ignore"):
        wanted = x.astype(np.float16)
    yield brain, bf16_to_float32(float32_to_bf16(x))
    yield from_brain, bf16_to_float32(float32_to_bf16(x))
    yield half, wanted
    yield from_half, wanted.astype(np.float32)


def float_bits(device: Device) -> Iterator[Pair]:
    x = awkward_floats(device)
    bits, back = device.room(x.shape, "u32"), device.room(x.shape, "f32")
    device.run("float_bits", 1, 96, device.put(x), bits, back, x.size)
    yield bits, x.view(np.uint32)
    yield back, x


def high_products(device: Device) -> Iterator[Pair]:
    x, y = device.rng.integers(0, 2**64, (2, 101), dtype=np.uint64)
    out = device.room((101,), "u64")
    device.run("high_products", 1, 32, device.put(x), device.put(y), out, 101)
    wanted = [(a * b) >> 64 for a, b in zip(x.tolist(), y.tolist(), strict=True)]
    yield out, np.array(wanted, np.uint64)


def quads(device: Device) -> Iterator[Pair]:
    """Arrays that begin at 16 bytes and one element behind, of whole quads and not."""
    for type in ("u8", "u32", "f16", "bf16", "f32", "f64"):
        for n in (1, 31, 640, 1013):
            for skipped, skipped_out in [(0, 0), (1, 1), (0, 1)]:
                x = device.numbers(n + skipped, type)
                out = device.put(np.zeros(n + skipped_out + 1, x.dtype), type)
                device.run(f"quads_{type}", 2, 32, device.put(x, type)[skipped:], out[skipped_out:], n)
                wanted = np.concatenate([np.zeros(skipped_out), 2 * x[skipped:], [0]])
                yield out, wanted.astype(x.dtype)


# --- tensor cores


def mma_by_ldmatrix(device: Device) -> Iterator[Pair]:
    a, b, c = (device.numbers((16, 16), "f32") for _ in range(3))
    out = device.room((16, 16), "f32")
    device.run("mma_by_ldmatrix", 1, 32, device.put(a, "bf16"), device.put(b, "bf16"), device.put(c), out)
    yield out, c + a @ b


def mma_by_hand(device: Device) -> Iterator[Pair]:
    a, b = device.numbers((16, 16), "f32"), device.numbers((16, 8), "f32")
    out = device.room((16, 8), "f32")
    device.run("mma_by_hand", 1, 32, device.put(a, "bf16"), device.put(b, "bf16"), out)
    yield out, a @ b


CHECKS = [
    arguments, indices, shuffles, votes, half_warps, warp_sums, block_sums, reverse, last_block, atomics, two_byte_floats,
    float_bits, high_products, quads, mma_by_ldmatrix, mma_by_hand,
]  # fmt: skip
