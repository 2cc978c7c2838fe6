"""cuBLASLt's binding. Descriptors need no device: a product in NumPy reads from them what cuBLASLt would read."""

import ctypes as ct
import gc
import math
import re
import sys
import types
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided

from gpumlp.backends import cublaslt
from gpumlp.backends.cublaslt import Algorithm, CublasLt, CublasLtError, UnsupportedProduct
from gpumlp.backends.device import HOST_TYPES, DeviceArray, Memory, Product, bf16_to_float32, float32_to_bf16

# Attributes that the binding leaves to the functions that create descriptors, or at their default.
READABLE = {
    "MatmulDesc": {"COMPUTE_TYPE": (0, ct.c_int32), "SCALE_TYPE": (1, ct.c_int32), "POINTER_MODE": (2, ct.c_int32)},
    "MatrixLayout": {
        "TYPE": (0, ct.c_uint32), "ORDER": (1, ct.c_int32), "ROWS": (2, ct.c_uint64), "COLS": (3, ct.c_uint64),
        "LD": (4, ct.c_int64),
    },
    "MatmulPreference": {},
}  # fmt: skip
TYPES = {number: name for name, number in cublaslt.TYPES.items()}
STORED = HOST_TYPES | {"bf16": np.uint16}
TOLERANCE = {"f64": 1e-12, "f32": 2e-6, "f16": 2e-3, "bf16": 2e-2}


@pytest.fixture(scope="module")
def lt():
    try:
        return CublasLt()
    except ImportError as error:
        pytest.skip(f"cuBLASLt is not installed: {error}")


# --- arrays


class Host:
    """Memory where NumPy has it."""

    def upload(self, values):
        return values.ctypes.data, values

    def download(self, pointer, nbytes):
        return np.ctypeslib.as_array((ct.c_uint8 * nbytes).from_address(pointer))


def stored(values, type):
    return float32_to_bf16(values) if type == "bf16" else np.asarray(values, STORED[type])


def loaded(values, type):
    return (bf16_to_float32(values) if type == "bf16" else values).astype(np.float64)


def place(values, type="f32", transposed=False, pad=0, shift=0, shared=False, where=None):
    """A DeviceArray of ``values`` (models, ...) whose last two axes lie ``transposed`` in memory, with ``pad`` further
    elements behind every row and model, beginning ``shift`` elements into its memory; ``shared``: model stride 0.
    Elements between are NaN, so that reading one shows."""
    values = np.asarray(values)
    axes = [*range(values.ndim - 2), values.ndim - 1, values.ndim - 2] if transposed else [*range(values.ndim)]
    shape, strides, step = [values.shape[i] for i in axes], [], 1
    for n in reversed(shape):
        strides.insert(0, step)
        step = step * n + pad
    if shared:
        strides[0] = 0
    total = shift + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + 1
    size = np.dtype(STORED[type]).itemsize
    room = np.zeros(total * size + 256, np.uint8)
    buffer = room[-room.ctypes.data % 256 :][: total * size].view(STORED[type])
    buffer[:] = stored(np.full(total, 255 if type == "u8" else np.nan), type)
    strides = [strides[axes.index(i)] for i in range(values.ndim)]
    as_strided(buffer[shift:], values.shape, [s * size for s in strides])[...] = stored(values, type)
    pointer, owner = (where or Host()).upload(buffer)
    memory = Memory(None, pointer, buffer.nbytes, owner)
    return DeviceArray(memory, pointer + shift * size, values.shape, tuple(strides), type)


def fetch(array, where=None):
    """The elements, float64 but for u8, and whether all memory around them is still NaN."""
    memory, size = array.memory, np.dtype(STORED[array.type]).itemsize
    flat = (where or Host()).download(memory.pointer, memory.nbytes).view(STORED[array.type]).copy()
    shift = (array.pointer - memory.pointer) // size
    view = as_strided(flat[shift:], array.shape, [s * size for s in array.strides])
    values = view.copy() if array.type == "u8" else loaded(view, array.type)
    if array.type != "u8" and 0 not in array.strides:
        view[...] = stored(np.full(1, np.nan), array.type)
        assert np.isnan(loaded(flat, array.type)).all(), "written beside the array"
    return values


def make(
    epilogue="", models=3, m=5, k=7, n=9, types=("f32", "f32"), auxiliary=None, ta=False, tb=False, pad=0, shared=(),
    where=None, **options,
):  # fmt: skip
    """A product of random numbers, with the arrays that its epilogue needs; auxiliary=None: where it cannot do without.
    ``shared``: "a", "b" with a stride of 0 over models, "a1", "b1" of one model."""
    if auxiliary is None:
        auxiliary = (epilogue, False) not in cublaslt.EPILOGUES and (epilogue, True) in cublaslt.EPILOGUES
    rng, (inner, outer) = np.random.default_rng(m * k + n), types

    def numbers(*shape, share=None):
        x = rng.standard_normal(shape)
        return x[:1].repeat(models, 0) if share in shared else x

    def matrix(name, rows, columns, transposed, type):
        x = numbers(1 if name + "1" in shared else models, rows, columns, share=name)
        return place(x, type, transposed, pad, shared=name in shared, where=where)

    held = None
    if auxiliary and epilogue.startswith("gelu"):
        held = place(numbers(models, m, n), outer, pad=pad, where=where)
    elif auxiliary:
        row = -(-n // 128) * 16  # bytes
        held = place(rng.integers(0, 256, (models, m, row)), "u8", where=where)[:, :, : -(-n // 8)]
    units = m if epilogue == "bias_gradient" else n
    bias = place(numbers(models, units), outer, pad=-units % 16, where=where) if epilogue else None
    a, b = matrix("a", m, k, ta, inner), matrix("b", k, n, tb, inner)
    out = place(numbers(models, m, n), outer, pad=pad, where=where)
    return Product(a, b, out, epilogue=epilogue, bias=bias, auxiliary=held, **options)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_grad(x):
    t = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)


def bits(mask, n):
    return np.unpackbits(mask, axis=-1, count=n, bitorder="little")


def expected(p, where=None):
    """What Product's docstring says: out, bias and auxiliary afterwards, by name."""
    a, b, out = fetch(p.a, where), fetch(p.b, where), fetch(p.out, where)
    n, z = out.shape[2], np.broadcast_to(a @ b, out.shape) + (out if p.adds else 0)
    given = {name: fetch(x, where) for name in ("bias", "auxiliary") if (x := getattr(p, name)) is not None}
    match p.epilogue:
        case "":
            return {"out": z}
        case "bias":
            return {"out": z + given["bias"][:, None]}
        case "relu_bias":
            z = z + given["bias"][:, None]
            mask = {} if p.auxiliary is None else {"auxiliary": np.packbits(z > 0, axis=-1, bitorder="little")}
            return {"out": np.maximum(z, 0), **mask}
        case "gelu_bias":
            z = z + given["bias"][:, None]
            return {"out": gelu(z), "auxiliary": z}
        case "bias_gradient":
            return {"out": z, "bias": np.broadcast_to(a, (len(out), *a.shape[1:])).sum(2)}
        case "relu_gradient":
            z = z * bits(given["auxiliary"], n)
        case "gelu_gradient":
            z = z * gelu_grad(given["auxiliary"])
    return {"out": z, "bias": z.sum(1)}


def check(product, wanted, where=None):
    for name, values in wanted.items():
        got, type = fetch(getattr(product, name), where), getattr(product, name).type
        if type == "u8":
            n = product.out.shape[2]
            np.testing.assert_array_equal(bits(got, n), bits(values, n))
        else:
            tolerance = max(TOLERANCE[type], TOLERANCE[product.a.type] if product.tf32 else 0)
            np.testing.assert_allclose(got, values, rtol=tolerance, atol=tolerance * np.abs(values).max(), err_msg=name)


# --- what cuBLASLt does, read from descriptors


def attribute(lt, descriptor, name):
    kind = descriptor._kind
    number, type = (READABLE[kind] | cublaslt.ATTRIBUTES[kind])[name]
    value, written = type(), ct.c_size_t()
    function = getattr(lt.library, f"cublasLt{kind}GetAttribute")
    function.argtypes = [ct.c_void_p, ct.c_int, ct.c_void_p, ct.c_size_t, ct.c_void_p]
    assert function(descriptor, number, ct.byref(value), ct.sizeof(value), ct.byref(written)) == 0, name
    assert written.value == ct.sizeof(value), name
    return value.value


def by_columns(pointer, rows, columns, ld, type):
    """A view of memory as cuBLASLt sees it: element (i, j) at i + j ld."""
    assert ld >= rows
    size = np.dtype(STORED[type]).itemsize
    flat = Host().download(pointer, (rows + (columns - 1) * ld) * size).view(STORED[type])
    return as_strided(flat, (rows, columns), (size, ld * size))


class Simulation:
    """Stands in for cublasLtMatmul; one model after the other, in float64."""

    def __init__(self, lt):
        self.lt, self.calls = lt, []

    def __call__(self, handle, op, alpha, A, a, B, b, beta, C, c, D, d, algorithm, workspace, workspace_bytes, stream):
        def read(name):
            return attribute(self.lt, op, name)

        assert (handle.value, C, c) == (1, D, d) and read("POINTER_MODE") == 0
        scale = {0: ct.c_float, 1: ct.c_double}[read("SCALE_TYPE")]
        assert isinstance(alpha._obj, scale) and isinstance(beta._obj, scale) and alpha._obj.value == 1
        models = {attribute(self.lt, x, "BATCH_COUNT") for x in (a, b, c)}
        assert len(models) == 1
        self.calls.append((algorithm, workspace, workspace_bytes, stream))
        epilogue = {number: name for name, number in cublaslt.EPILOGUES.values()}[read("EPILOGUE")]
        for model in range(models.pop()):
            left, right, out = (self.matrix(x, at, model) for x, at in ((a, A), (b, B), (d, D)))
            left, right = (x.T if read(f"TRANS{t}") else x for x, t in ((left, "A"), (right, "B")))
            left, right = (loaded(x, self.type(layout)) for x, layout in ((left, a), (right, b)))
            value = left @ right
            if beta._obj.value:
                value = value + beta._obj.value * loaded(out, self.type(d))
            value = self.epilogue(epilogue, read, model, value, right)
            out[...] = stored(value, self.type(d))
        return 0

    def type(self, layout):
        return TYPES[attribute(self.lt, layout, "TYPE")]

    def matrix(self, layout, pointer, model):
        def read(name):
            return attribute(self.lt, layout, name)

        assert read("ORDER") == 0
        type = self.type(layout)
        pointer += model * read("STRIDED_BATCH_OFFSET") * np.dtype(STORED[type]).itemsize
        return by_columns(pointer, read("ROWS"), read("COLS"), read("LD"), type)

    def epilogue(self, name, read, model, value, right):
        if name == "DEFAULT":
            return value
        rows, columns = value.shape
        type = TYPES[read("BIAS_DATA_TYPE")]
        pointer = read("BIAS_POINTER") + model * read("BIAS_BATCH_STRIDE") * np.dtype(STORED[type]).itemsize
        length = columns if name == "BGRADB" else rows  # along D's rows, and with BGRADB along its columns
        bias = by_columns(pointer, length, 1, length, type)[:, 0]
        if name == "BGRADB":
            bias[:] = stored(right.sum(0), type)
            return value
        if "AUX" in name or name.startswith("D"):
            auxiliary = self.auxiliary(name, read, model, rows, columns, type)
        if name.startswith("D"):
            value = value * (auxiliary() if "RELU" in name else gelu_grad(auxiliary()))
            bias[:] = stored(value.sum(1), type)
            return value
        value = value + loaded(bias, type)[:, None]
        if "AUX" in name:
            auxiliary(value)
        return np.maximum(value, 0) if "RELU" in name else gelu(value) if "GELU" in name else value

    def auxiliary(self, name, read, model, rows, columns, type):
        """A function that reads the auxiliary or writes it, as columns × ld bits or elements."""
        is_mask = "RELU" in name
        ld, offset = read("EPILOGUE_AUX_LD"), model * read("EPILOGUE_AUX_BATCH_STRIDE")
        assert ld >= rows and ld % (128 if is_mask else 8) == 0 and offset % (128 if is_mask else 8) == 0
        pointer = read("EPILOGUE_AUX_POINTER")
        if is_mask:
            view = by_columns(pointer + offset // 8, -(-rows // 8), columns, ld // 8, "u8")
        else:
            view = by_columns(pointer + offset * np.dtype(STORED[type]).itemsize, rows, columns, ld, type)

        def access(value=None):
            if value is not None:
                view[...] = np.packbits(value > 0, axis=0, bitorder="little") if is_mask else stored(value, type)
            return bits(view.T, rows).T if is_mask else loaded(view, type)

        return access


@pytest.fixture
def simulation(lt, monkeypatch):
    simulation = Simulation(lt)
    monkeypatch.setitem(lt.__dict__, "handle", ct.c_void_p(1))
    monkeypatch.setattr(lt.library, "cublasLtMatmul", simulation)
    return simulation


ALGORITHM = Algorithm(bytes(range(64)), 1000)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"models": 1},
        {"pad": 3},
        {"ta": True},
        {"tb": True},
        {"ta": True, "tb": True, "pad": 2},
        {"ta": True, "tb": True, "models": 1, "adds": True},
        {"shared": ("a",)},
        {"shared": ("b",), "tb": True},
        {"shared": ("a1",), "adds": True},
        {"shared": ("a1", "b1"), "pad": 1},
        {"m": 1},
        {"k": 1, "ta": True},
        {"n": 1, "tb": True},
        {"m": 1, "n": 1, "pad": 4},
        {"m": 1, "k": 1, "n": 1, "models": 1},
        {"k": 1, "n": 1, "pad": 5, "ta": True, "tb": True},
        {"types": ("f64", "f64"), "adds": True},
        {"types": ("f16", "f16")},
        {"types": ("bf16", "bf16"), "tb": True},
        {"types": ("bf16", "f32"), "ta": True},
        {"types": ("f16", "f32"), "pad": 1},
    ],
    ids=str,
)
def test_rows_become_columns(lt, simulation, options):
    product = make(**options)
    wanted = expected(product)
    lt.plan(product).run(ALGORITHM, 0x1000, 2000, 7)
    check(product, wanted)
    assert simulation.calls == [(ALGORITHM.data, 0x1000, 2000, 7)]


@pytest.mark.parametrize("epilogue, auxiliary", [key for key in cublaslt.EPILOGUES if key[0]])
@pytest.mark.parametrize(
    "options",
    [
        {"n": 16},
        {"n": 24, "models": 1, "ta": True, "tb": True},
        {"n": 136, "m": 3, "tb": True, "pad": 8},
        {"n": 8, "m": 1, "types": ("f64", "f64")},
        {"n": 40, "ta": True, "types": ("bf16", "f32"), "adds": True},
        {"n": 32, "types": ("bf16", "bf16"), "shared": ("a1",)},
    ],
    ids=str,
)
def test_epilogues(lt, simulation, epilogue, auxiliary, options):
    product = make(epilogue, auxiliary=auxiliary, **options)
    wanted = expected(product)
    lt.plan(product).run(ALGORITHM, 0, 0, 0)
    check(product, wanted)


@pytest.mark.parametrize("epilogue", ["bias", "relu_bias", "relu_gradient", "bias_gradient"])
@pytest.mark.parametrize("n", [1, 9, 129])
def test_epilogues_of_odd_widths(lt, simulation, epilogue, n):
    product = make(epilogue, n=n)
    wanted = expected(product)
    lt.plan(product).run(ALGORITHM, 0, 0, 0)
    check(product, wanted)


def test_a_vector_is_read_along_its_longer_stretch(lt):
    """(k, 1) with stride 1 is k rows of one element, or one column of k: the second loads in vectors."""
    plan = lt.plan(make(k=32, n=1, tb=True))
    assert [attribute(lt, plan._b, name) for name in ("ROWS", "COLS", "LD")] == [32, 1, 32]
    assert attribute(lt, plan._operation, "TRANSA") == 1


# --- descriptors


@pytest.mark.parametrize(
    "inner, outer, tf32, compute, scale",
    [
        ("f32", "f32", False, "32F", "f32"),
        ("f32", "f32", True, "32F_FAST_TF32", "f32"),
        ("f64", "f64", True, "64F", "f64"),
        ("bf16", "bf16", False, "32F", "f32"),
        ("bf16", "f32", True, "32F", "f32"),
        ("f16", "f16", False, "32F", "f32"),
    ],
)
def test_types(lt, inner, outer, tf32, compute, scale):
    plan = lt.plan(make("bias", types=(inner, outer), tf32=tf32))
    assert attribute(lt, plan._operation, "COMPUTE_TYPE") == cublaslt.COMPUTE_TYPES[compute]
    assert attribute(lt, plan._operation, "SCALE_TYPE") == cublaslt.TYPES[scale]
    assert attribute(lt, plan._operation, "BIAS_DATA_TYPE") == cublaslt.TYPES[outer]
    layouts = (plan._a, plan._b, plan._out)
    assert [attribute(lt, x, "TYPE") for x in layouts] == [cublaslt.TYPES[t] for t in (inner, inner, outer)]


@pytest.mark.parametrize("kind", cublaslt.ATTRIBUTES)
def test_attributes_are_read_back_as_they_were_set(lt, kind):
    arguments = {"MatmulDesc": (68, 0), "MatrixLayout": (14, 1024, 512, 1040), "MatmulPreference": ()}[kind]
    descriptor = cublaslt._Descriptor(lt, kind, *arguments)
    values = {name: 2 ** (i + 4) for i, name in enumerate(cublaslt.ATTRIBUTES[kind])}
    values |= {name: value for name, value in {"TRANSA": 1, "TRANSB": 0, "EPILOGUE": 512}.items() if name in values}
    descriptor.set(**values)
    assert {name: attribute(lt, descriptor, name) for name in values} == values


def test_models_are_a_strided_batch(lt):
    plan = lt.plan(make("gelu_bias", models=3, m=5, k=7, n=16, shared=("a1", "b"), pad=8))
    for layout, offset in ((plan._a, 0), (plan._b, 0), (plan._out, 5 * 24 + 8)):
        assert attribute(lt, layout, "BATCH_COUNT") == 3
        assert attribute(lt, layout, "STRIDED_BATCH_OFFSET") == offset
    assert attribute(lt, plan._operation, "BIAS_BATCH_STRIDE") == 16
    assert attribute(lt, plan._operation, "EPILOGUE_AUX_BATCH_STRIDE") == 5 * 24 + 8


def test_descriptors_go_with_their_plan(lt, monkeypatch):
    destroyed = []
    for kind in ("MatmulDesc", "MatrixLayout"):
        name = f"cublasLt{kind}Destroy"
        destroy = getattr(lt.library, name)
        monkeypatch.setattr(
            lt.library, name, lambda x, kind=kind, destroy=destroy: destroyed.append((kind, x.value, destroy(x)))
        )
    plan = lt.plan(make())
    held = [plan._operation, plan._a, plan._b, plan._out]
    wanted = [(x._kind, x._as_parameter_.value, 0) for x in held]
    del held
    assert not destroyed
    del plan
    gc.collect()
    assert sorted(destroyed) == sorted(wanted) and all(pointer for _, pointer, _ in wanted)


def test_a_plan_keeps_its_arrays(lt):
    product = make("gelu_bias", n=8)
    owners = [weakref.ref(getattr(product, name).memory.owner) for name in ("a", "b", "out", "bias", "auxiliary")]
    plan = lt.plan(product)
    del product
    gc.collect()
    assert all(owner() is not None for owner in owners)
    del plan
    gc.collect()
    assert all(owner() is None for owner in owners)


def test_keys_tell_products_apart_and_hold_no_address(lt):
    base = make("relu_bias", n=8)
    others = [
        make("relu_bias", n=8, auxiliary=True), make("relu_bias", n=8, tb=True), make("relu_bias", n=8, pad=8),
        make("relu_bias", n=8, models=2), make("relu_bias", n=8, types=("bf16", "f32")), make("bias", n=8),
        make("relu_bias", n=8, shared=("a",)), replace(base, tf32=True), replace(base, adds=True),
        replace(base, out=place(np.zeros((3, 5, 8)), shift=1)),
    ]  # fmt: skip
    keys = [lt.plan(p).key for p in (base, *others)]
    assert len(set(keys)) == len(keys)
    assert lt.plan(make("relu_bias", n=8)).key == keys[0]
    assert keys[0] == (
        "relu_bias, a f32 3x5x7 strides 35x7x1 align 4, b f32 3x7x8 strides 56x8x1 align 32, "
        "out f32 3x5x8 strides 40x8x1 align 32, bias f32 3x8 strides 16x1 align 64"
    )
    assert str(base.a.pointer) not in keys[0]


# --- candidates


class Heuristic:
    """Stands in for cublasLtMatmulAlgoGetHeuristic: what it was told, and three algorithms, one of which failed."""

    def __init__(self, lt, found=3, status=0):
        self.lt, self.found, self.status, self.told = lt, found, status, {}

    def __call__(self, handle, operation, a, b, c, d, preference, count, results, n):
        self.told = {name: attribute(self.lt, preference, name) for name in cublaslt.ATTRIBUTES["MatmulPreference"]}
        self.told |= {"count": count, "columns": [attribute(self.lt, x, "COLS") for x in (a, b, c, d)]}
        for i in range(self.found):
            results._obj[i].data[:] = [i + 1] * 8
            results._obj[i].workspace_bytes = 100 * i
            results._obj[i].state = 15 if i == 1 else 0
        n._obj.value = self.found
        return self.status


def heuristic(lt, monkeypatch, **options):
    stub = Heuristic(lt, **options)
    monkeypatch.setitem(lt.__dict__, "handle", ct.c_void_p(1))
    monkeypatch.setattr(lt.library, "cublasLtMatmulAlgoGetHeuristic", stub)
    return stub


def test_candidates(lt, monkeypatch):
    stub = heuristic(lt, monkeypatch)
    product = make(models=3, m=4, k=8, n=16)  # a: 32 elements to the next model, 128 bytes; b: 512; out: 256
    product = replace(product, out=place(np.zeros((3, 4, 16)), shift=4))
    algorithms = lt.plan(product).candidates(32 << 20, count=5)
    assert algorithms == [Algorithm(np.uint64([1] * 8).tobytes(), 0), Algorithm(np.uint64([3] * 8).tobytes(), 200)]
    assert stub.told == {
        "MAX_WORKSPACE_BYTES": 32 << 20,
        "REDUCTION_SCHEME_MASK": 2,
        "MIN_ALIGNMENT_A_BYTES": 256,
        "MIN_ALIGNMENT_B_BYTES": 128,
        "MIN_ALIGNMENT_C_BYTES": 16,
        "MIN_ALIGNMENT_D_BYTES": 16,
        "count": 5,
        "columns": [8, 4, 4, 4],
    }


def test_no_candidates(lt, monkeypatch):
    heuristic(lt, monkeypatch, found=0)
    with pytest.raises(
        UnsupportedProduct, match="no algorithm with 1,000 bytes of workspace for relu_bias, a f32 3x5x7"
    ):
        lt.plan(make("relu_bias", n=8)).candidates(1000)


@pytest.mark.parametrize(
    "status, error, name",
    [
        (1, CublasLtError, "NOT_INITIALIZED"), (3, CublasLtError, "ALLOC_FAILED"),
        (7, UnsupportedProduct, "INVALID_VALUE"), (13, CublasLtError, "EXECUTION_FAILED"),
        (15, UnsupportedProduct, "NOT_SUPPORTED"),
    ],
)  # fmt: skip
def test_a_status_becomes_an_error(lt, monkeypatch, status, error, name):
    heuristic(lt, monkeypatch, status=status)
    monkeypatch.setattr(lt.library, "cublasLtMatmul", lambda *_: status)
    plan = lt.plan(make("bias", types=("bf16", "f32")))
    for call, function in (
        (lambda: plan.candidates(0), "cublasLtMatmulAlgoGetHeuristic"),
        (lambda: plan.run(ALGORITHM, 0, 0, 0), "cublasLtMatmul"),
    ):
        with pytest.raises(CublasLtError) as caught:
            call()
        assert str(caught.value) == f"{function}: CUBLAS_STATUS_{name} ({status}) for {plan.key}"
        assert type(caught.value) is error
        assert isinstance(caught.value, ValueError) == (status in (7, 15))


def test_a_descriptor_that_fails_names_the_product(lt, monkeypatch):
    monkeypatch.setattr(lt.library, "cublasLtMatmulDescSetAttribute", lambda *_: 7)
    with pytest.raises(UnsupportedProduct, match=r"INVALID_VALUE \(7\) for TRANSA = .*; in bias, a f32 3x5x7"):
        lt.plan(make("bias"))
    monkeypatch.setattr(lt.library, "cublasLtMatrixLayoutCreate", lambda *_: 3)
    with pytest.raises(CublasLtError, match=r"ALLOC_FAILED \(3\) for a MatrixLayout of \(0, 7, 5, 7\); in bias"):
        lt.plan(make("bias"))


def test_no_handle_without_a_device(monkeypatch, lt):
    monkeypatch.setattr(lt.library, "cublasLtCreate", lambda *_: 1)
    assert "handle" not in lt.__dict__
    with pytest.raises(CublasLtError, match=r"cublasLtCreate: .*NOT_INITIALIZED \(1\) for a handle; is there a GPU"):
        lt.plan(make()).candidates(0)
    assert "handle" not in lt.__dict__  # the next call tries again


def test_the_handle_goes_with_the_library(monkeypatch, lt):
    made, destroyed = CublasLt(), []

    def create(handle):
        handle._obj.value = 5
        return 0

    monkeypatch.setattr(made.library, "cublasLtCreate", create)
    monkeypatch.setattr(made.library, "cublasLtDestroy", lambda handle: destroyed.append(handle.value))
    assert made.handle.value == 5 and made.handle is made.handle
    del made
    gc.collect()
    assert destroyed == [5]


def test_an_algorithm_as_bytes():
    assert Algorithm.from_bytes(ALGORITHM.to_bytes()) == ALGORITHM
    with pytest.raises(ValueError, match="an algorithm of cuBLASLt takes 72 bytes, got 64"):
        Algorithm.from_bytes(ALGORITHM.data)


# --- what cuBLASLt cannot take


def strided(array, **changes):
    fields = {name: getattr(array, name) for name in DeviceArray.__slots__}
    return DeviceArray(**(fields | changes))


def with_strides(product, name, strides):
    return replace(product, **{name: strided(getattr(product, name), strides=strides)})


@pytest.mark.parametrize(
    "product, message",
    [
        (lambda: make(m=0), "cuBLASLt takes no empty matrix; in product, a f32 3x0x7"),
        (lambda: make(types=("f32", "bf16")), "does not multiply f32 by f32 into bf16"),
        (lambda: replace(make(), b=place(np.zeros((3, 7, 9)), "f64")), "does not multiply f32 by f64 into f32"),
        (lambda: with_strides(make(), "out", (0, 9, 1)), "the models share out"),
        (lambda: with_strides(make(), "out", (45, 1, 5)), "the rows of out are not contiguous"),
        (lambda: with_strides(make(), "a", (35, 14, 2)), "a is no matrix to cuBLASLt: its strides are 14 and 2, and one"),
        (lambda: with_strides(make(), "b", (63, 8, 1)), "b is no matrix to cuBLASLt: its strides are 8 and 1, and one"),
        (lambda: with_strides(make(), "b", (63, 0, 1)), "b is no matrix to cuBLASLt: its strides are 0 and 1, and one"),
        (lambda: with_strides(make(), "out", (45, 9, 0)), "out is no matrix to cuBLASLt: its strides are 9 and 0"),
        (lambda: make("tanh"), "there is no epilogue 'tanh' without auxiliary"),
        (lambda: make("bias", auxiliary=True), "there is no epilogue 'bias' with auxiliary"),
        (lambda: make("bias", n=1, pad=2), "not to be trusted with one column"),
        (lambda: make("bias", types=("bf16", "bf16")), None),
        (
            lambda: replace(make("bias", types=("bf16", "bf16")), bias=place(np.zeros((3, 9)), pad=7)),
            "bias is f32 and out bf16: cuBLASLt takes one type for both",
        ),
        (lambda: replace(make("bias"), bias=place(np.zeros((3, 9)))), "bias does not begin at a multiple of 16 bytes"),
        (lambda: replace(make("bias", models=1), bias=place(np.zeros((1, 9)), shift=2)), "bias does not begin at a"),
        (lambda: with_strides(make("bias"), "bias", (32, 2)), "the elements of bias are not contiguous"),
        (lambda: with_strides(make("bias_gradient"), "bias", (0, 1)), "the models share bias, which each of them writes"),
        (lambda: with_strides(make("bias"), "bias", (0, 1)), None),
        (lambda: make("gelu_bias", n=9), "auxiliary does not begin every row at a multiple of 8 elements"),
        (lambda: make("gelu_gradient", n=8, pad=4), "auxiliary does not begin every row at a multiple of 8 elements"),
        (
            lambda: replace(make("gelu_bias", n=8), auxiliary=place(np.zeros((3, 5, 8)), shift=1)),
            "auxiliary does not begin every row at a multiple of 8 elements",
        ),
        (lambda: with_strides(make("gelu_bias", n=8), "auxiliary", (44, 8, 1)), "auxiliary does not begin every row"),
        (lambda: with_strides(make("gelu_bias", n=16), "auxiliary", (80, 8, 1)), "auxiliary does not begin every row"),
        (lambda: with_strides(make("relu_gradient"), "auxiliary", (80, 8, 1)), "every row at a multiple of 16 elements"),
        (lambda: with_strides(make("gelu_bias", n=8), "auxiliary", (40, 8, 2)), "the rows of auxiliary are not contiguous"),
        (lambda: with_strides(make("gelu_bias", n=8), "auxiliary", (0, 8, 1)), "the models share auxiliary"),
        (
            lambda: replace(make("gelu_bias", n=8), auxiliary=place(np.zeros((3, 5, 8)), "bf16")),
            "auxiliary is bf16, cuBLASLt takes f32 here",
        ),
        (
            lambda: replace(make("relu_bias", n=8), auxiliary=place(np.zeros((3, 5, 1)), "f32")),
            "auxiliary is f32, cuBLASLt takes u8 here",
        ),
    ],
)  # fmt: skip
def test_what_it_cannot_take_is_said(lt, product, message):
    if message is None:
        lt.plan(product())
        return
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        lt.plan(product())
    assert f"; in {cublaslt._key(product())}" in str(caught.value)


# --- the library


def test_it_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", None)
    with pytest.raises(
        ImportError, match=r'cuda-pathfinder, which is not installed; run: pip install "gpumlp\[cuda13\]"'
    ):
        CublasLt()

    class NotFound(RuntimeError):
        pass

    def load(name):
        assert name == "cublasLt"
        raise NotFound("no libcublasLt.so")

    stub = types.ModuleType("cuda.pathfinder")
    stub.DynamicLibNotFoundError, stub.load_nvidia_dynamic_lib = NotFound, load
    monkeypatch.setitem(sys.modules, "cuda", types.ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.pathfinder", stub)
    with pytest.raises(
        ImportError, match=r'cuBLASLt is not installed; run: pip .*\(or "gpumlp\[cuda12\]" for CUDA 12\)'
    ):
        CublasLt()


def test_version(lt):
    assert 120_000 <= lt.version() < 200_000


def test_numbers_are_those_of_the_headers(lt):
    folder = Path(lt.library._name).parents[1] / "include"
    names = ("library_types.h", "cublas_api.h", "cublasLt.h")  # the first comes with the runtime, not with cuBLAS
    files = [folder / name for name in names if (folder / name).is_file()]
    if len(files) < 2:
        pytest.skip(f"the headers are not in {folder}")
    text = "".join(file.read_text("utf-8") for file in files)
    definitions = dict(re.findall(r"^ *(CU\w+) *= *([^,\n/]+?) *(?:,|/\*|$)", text, re.M))

    def number(name):
        return eval(re.sub(r"CU\w+", lambda other: str(number(other[0])), definitions[name]))

    prefixes = {"MatmulDesc": "MATMUL_DESC", "MatrixLayout": "MATRIX_LAYOUT", "MatmulPreference": "MATMUL_PREF"}
    ours = {f"CUBLASLT_EPILOGUE_{name}": number for name, number in cublaslt.EPILOGUES.values()}
    ours |= {f"CUBLAS_COMPUTE_{name}": number for name, number in cublaslt.COMPUTE_TYPES.items()}
    ours |= {"CUBLAS_STATUS_INVALID_VALUE": 7, "CUBLAS_STATUS_NOT_SUPPORTED": 15}
    if "CUDA_R_32F" in definitions:
        names = {"CUDA_R_32F": "f32", "CUDA_R_64F": "f64", "CUDA_R_16F": "f16", "CUDA_R_16BF": "bf16"}
        ours |= {name: cublaslt.TYPES[type] for name, type in names.items()}
    for kind, prefix in prefixes.items():
        known = cublaslt.ATTRIBUTES[kind] | READABLE[kind]
        ours |= {f"CUBLASLT_{prefix}_{name}": number for name, (number, _) in known.items()}
    assert {name: number(name) for name in ours} == ours
    assert ct.sizeof(cublaslt._Candidate) == 96 and ct.sizeof(cublaslt._AlgorithmData) == 64


# --- on a GPU


class Gpu:
    """Memory of a device, by CuPy."""

    def __init__(self):
        import cupy

        self.runtime, self.alloc = cupy.cuda.runtime, cupy.cuda.alloc

    def upload(self, values):
        memory = self.alloc(values.nbytes)
        self.runtime.memcpy(memory.ptr, values.ctypes.data, values.nbytes, 1)
        return memory.ptr, memory

    def download(self, pointer, nbytes):
        out = np.empty(nbytes, np.uint8)
        self.runtime.memcpy(out.ctypes.data, pointer, nbytes, 2)
        return out


@pytest.fixture(scope="module")
def gpu(lt):
    cupy = pytest.importorskip("cupy")
    try:
        cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"no GPU: {error}")
    return Gpu()


@pytest.mark.parametrize("epilogue, auxiliary", cublaslt.EPILOGUES)
@pytest.mark.parametrize("types", sorted(cublaslt.PRODUCT_TYPES), ids="-".join)
@pytest.mark.parametrize("tb", [False, True])
@pytest.mark.parametrize("models", [1, 3])
def test_on_a_gpu(lt, gpu, epilogue, auxiliary, types, tb, models):
    ta = epilogue == "bias_gradient"  # as in dW = dzᵀ x
    product = make(epilogue, models, 48, 32, 40, types, auxiliary, ta, tb, where=gpu)
    wanted, workspace = expected(product, gpu), gpu.alloc(4 << 20)
    plan = lt.plan(product)
    try:
        algorithm = plan.candidates(4 << 20)[0]
    except UnsupportedProduct as error:
        if epilogue:
            pytest.skip(str(error))
        raise
    plan.run(algorithm, workspace.ptr, 4 << 20, 0)
    gpu.runtime.deviceSynchronize()
    check(product, wanted, gpu)
