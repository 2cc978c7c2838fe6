"""kernels/embedding.cu against the NumPy verbs, on the emulator."""

import numpy as np
import pytest
from emulator import EmulatedRuntime, launch, on_device

from gpumlp.backends.base import Embed
from gpumlp.backends.device import DeviceArray, bf16_to_float32, float32_to_bf16
from gpumlp.backends.numpy_backend import NumpyBackend

# models, rows of their own, batch, numbers, sizes of the columns of codes, units
CASES = [
    (1, False, 1, 0, (1,), 1),
    (1, False, 70, 3, (5, 1, 300), 4),
    (3, True, 33, 1, (2,), 33),
    (2, False, 40, 7, (9, 4), 70),
]
TYPES = {("f32", "f32"): 1e-6, ("f64", "f64"): 1e-14, ("f32", "bf16"): 1e-2}  # of the codes, of the layers
LAUNCHES = [((1, 1), 32, 0), ((3, 2), 96, 1), ((2, 1), 256, 2)]  # grid, threads, schedule


def problem(case, C, T):
    """The bundle on the host, with codes that no column has among the others."""
    models, own_rows, batch, numbers, sizes, units = case
    rng = np.random.default_rng(0)
    dtype = np.float64 if C == "f64" else np.float32
    x = rng.normal(size=(models if own_rows else 1, batch, numbers + len(sizes))).astype(dtype)
    for k, size in enumerate(sizes):
        x[..., numbers + k] = rng.integers(0, size, x.shape[:2])
    nowhere = np.array([-1, sizes[0], np.nan, 2.0**40, -np.inf])
    x[:, ::7, numbers] = np.resize(nowhere, x[0, ::7].shape[0])
    width = numbers + len(sizes) * units
    E = rng.normal(size=(models, sum(sizes), units)).astype(dtype)
    d = rng.normal(size=(models, batch, width)).astype(dtype)
    if T == "bf16":
        d = bf16_to_float32(float32_to_bf16(d))
    starts = np.cumsum([0, *sizes], dtype=np.int64)
    return Embed(x, E, starts, np.empty((models, batch, width), dtype), np.full_like(E, np.nan), d)


def run(embed, C, T, grid, threads, schedule):
    """out and dE as the kernels leave them."""
    runtime = EmulatedRuntime(schedule=schedule)
    models, batch, _ = embed.out.shape
    codes, units = embed.E.shape[1:]
    x, E = on_device(runtime, embed.x), on_device(runtime, embed.E)
    out, dE = DeviceArray.empty(runtime, embed.out.shape, T), DeviceArray.empty(runtime, E.shape, C)
    d = on_device(runtime, embed.d, T)
    stride = x.strides[0] if len(embed.x) == models else 0
    rows = (x, stride, embed.numbers, on_device(runtime, embed.starts), len(embed.starts) - 1)
    launch(
        runtime,
        f"embed_forward_{C}_{T}",
        grid,
        (threads,),
        *rows,
        E,
        E.strides[0],
        units,
        out,
        out.strides[0],
        models,
        batch,
    )
    launch(runtime, f"embed_clear_{C}", grid, (threads,), dE, dE.strides[0], codes * units, models)
    launch(
        runtime,
        f"embed_backward_{C}_{T}",
        grid,
        (threads,),
        *rows,
        dE,
        dE.strides[0],
        units,
        d,
        d.strides[0],
        models,
        batch,
    )
    return out.get(), dE.get()


@pytest.mark.parametrize("types", TYPES, ids="-".join)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_vectors_and_their_gradient(case, types):
    embed, backend = problem(case, *types), NumpyBackend()
    backend.embed_forward(embed)
    backend.embed_backward(embed)
    first, *others = [run(embed, *types, *how) for how in LAUNCHES]
    np.testing.assert_allclose(first[0], embed.out, rtol=TYPES[types], atol=TYPES[types])
    np.testing.assert_array_equal(first[1], embed.dE)  # sums in the order of the rows: the same bits
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)
