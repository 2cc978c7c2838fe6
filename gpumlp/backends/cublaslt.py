"""cuBLASLt by ctypes: matrix products with epilogues, each with a workspace and a stream that the caller names.

CuPy refuses cuBLAS while a CUDA graph is captured and does not offer cuBLASLt. Fifteen of its functions are bound here,
those of CUDA 12 and 13 alike; nothing here knows of CuPy. Descriptors need no device, so all but the handle is tested
without one.

cuBLASLt counts matrices by columns. The memory of a row-major (m, n) matrix is that of a column-major (n, m) one, so what
it computes for out = a b is outᵀ = bᵀ aᵀ: its A is our b, its B our a, its D our out. Rows of D are our columns: a bias
runs along them, as it wants.
"""

from __future__ import annotations

import ctypes as ct
import weakref
from dataclasses import dataclass
from functools import cached_property
from math import gcd
from typing import Any

from .device import ITEM_SIZES, DeviceArray, Product

# Names and numbers of cublasLt.h (library_types.h, cublas_api.h); a test holds them against the headers.
TYPES = {"f32": 0, "f64": 1, "f16": 2, "bf16": 14}  # cudaDataType
COMPUTE_TYPES = {"32F": 68, "64F": 70, "32F_FAST_TF32": 77}
ATTRIBUTES: dict[str, dict[str, tuple[int, Any]]] = {
    "MatmulDesc": {
        "TRANSA": (3, ct.c_int32),
        "TRANSB": (4, ct.c_int32),
        "EPILOGUE": (7, ct.c_uint32),
        "BIAS_POINTER": (8, ct.c_uint64),
        "BIAS_BATCH_STRIDE": (10, ct.c_int64),
        "EPILOGUE_AUX_POINTER": (11, ct.c_uint64),
        "EPILOGUE_AUX_LD": (12, ct.c_int64),
        "EPILOGUE_AUX_BATCH_STRIDE": (13, ct.c_int64),
        "BIAS_DATA_TYPE": (26, ct.c_int32),
    },
    "MatrixLayout": {"BATCH_COUNT": (5, ct.c_int32), "STRIDED_BATCH_OFFSET": (6, ct.c_int64)},
    "MatmulPreference": {
        "MAX_WORKSPACE_BYTES": (1, ct.c_uint64),
        "REDUCTION_SCHEME_MASK": (3, ct.c_uint32),
        "MIN_ALIGNMENT_A_BYTES": (5, ct.c_uint32),
        "MIN_ALIGNMENT_B_BYTES": (6, ct.c_uint32),
        "MIN_ALIGNMENT_C_BYTES": (7, ct.c_uint32),
        "MIN_ALIGNMENT_D_BYTES": (8, ct.c_uint32),
    },
}
EPILOGUES = {  # (Product.epilogue, whether it has an auxiliary)
    ("", False): ("DEFAULT", 1),
    ("bias", False): ("BIAS", 4),
    ("relu_bias", False): ("RELU_BIAS", 6),
    ("relu_bias", True): ("RELU_AUX_BIAS", 134),
    ("gelu_bias", True): ("GELU_AUX_BIAS", 164),
    ("bias_gradient", False): ("BGRADB", 512),  # sums its B over k, and its B is our a
    ("relu_gradient", True): ("DRELU_BGRAD", 152),
    ("gelu_gradient", True): ("DGELU_BGRAD", 208),
}
PRODUCT_TYPES = {("f32", "f32"), ("f64", "f64"), ("bf16", "bf16"), ("f16", "f16"), ("bf16", "f32"), ("f16", "f32")}
INVALID_VALUE, NOT_SUPPORTED = 7, 15  # what it says of products that it does not take
IN_COMPUTE_TYPE = (
    2  # where a sum is split, its parts are added in float32, and not in bfloat16 where that is the output
)
LARGEST_ALIGNMENT = 256  # bytes; cuBLASLt asks for no more
VECTOR_BYTES = 16  # of biases and auxiliaries; Marian (tensors/gpu/prod.cpp) saw biases off 16 bytes fail on an A100

_P = ct.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "cublasLtGetVersion": [],
    "cublasLtGetStatusName": [ct.c_int],
    "cublasLtCreate": [_P],
    "cublasLtDestroy": [_P],
    "cublasLtMatmulDescCreate": [_P, ct.c_int, ct.c_int],
    "cublasLtMatrixLayoutCreate": [_P, ct.c_int, ct.c_uint64, ct.c_uint64, ct.c_int64],
    "cublasLtMatmulPreferenceCreate": [_P],
    **{f"cublasLt{kind}SetAttribute": [_P, ct.c_int, _P, ct.c_size_t] for kind in ATTRIBUTES},
    **{f"cublasLt{kind}Destroy": [_P] for kind in ATTRIBUTES},
    "cublasLtMatmulAlgoGetHeuristic": [_P, _P, _P, _P, _P, _P, _P, ct.c_int, _P, _P],
    "cublasLtMatmul": [_P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, ct.c_size_t, _P],
}
_RESULTS: dict[str, Any] = {"cublasLtGetVersion": ct.c_size_t, "cublasLtGetStatusName": ct.c_char_p}  # others: a status


class CublasLtError(RuntimeError):
    """A call that cuBLASLt answered with an error; the message names call, status and product."""


class UnsupportedProduct(CublasLtError, ValueError):
    """A product that cuBLASLt does not take, at least not on this device."""


@dataclass(frozen=True, slots=True)
class Algorithm:
    """One way to compute a product: cuBLASLt's opaque description of it, for this version of the library alone."""

    data: bytes
    workspace_bytes: int

    def to_bytes(self) -> bytes:
        return self.data + self.workspace_bytes.to_bytes(8, "little")

    @classmethod
    def from_bytes(cls, data: bytes) -> Algorithm:
        if len(data) != ct.sizeof(_AlgorithmData) + 8:
            raise ValueError(f"an algorithm of cuBLASLt takes {ct.sizeof(_AlgorithmData) + 8} bytes, got {len(data)}")
        return cls(data[:-8], int.from_bytes(data[-8:], "little"))


_AlgorithmData = ct.c_uint64 * 8


class _Candidate(ct.Structure):  # cublasLtMatmulHeuristicResult_t
    _fields_ = (
        ("data", _AlgorithmData),
        ("workspace_bytes", ct.c_size_t),
        ("state", ct.c_int),
        ("waves", ct.c_float),
        ("reserved", ct.c_int * 4),
    )


def load() -> ct.CDLL:
    """The library, from NVIDIA's wheels or an installed toolkit.

    Raises:
        ImportError: it is not there; the message names the extras that bring it.
    """
    extras = 'pip install "gpumlp[cuda13]" (or "gpumlp[cuda12]" for CUDA 12)'
    try:
        from cuda.pathfinder import DynamicLibNotFoundError, load_nvidia_dynamic_lib  # type: ignore
    except ImportError as error:
        raise ImportError(
            f"cuBLASLt is looked for by cuda-pathfinder, which is not installed; run: {extras}"
        ) from error
    try:
        path = load_nvidia_dynamic_lib("cublasLt").abs_path
    except DynamicLibNotFoundError as error:
        raise ImportError(f"cuBLASLt is not installed; run: {extras}") from error
    library = ct.CDLL(path)
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _RESULTS.get(name, ct.c_int)
    return library


class CublasLt:
    """The library, with one handle for the device that is current when the handle is first needed."""

    def __init__(self) -> None:
        self.library = load()

    def version(self) -> int:
        """131000 is 13.10.0."""
        return self.library.cublasLtGetVersion()

    @cached_property
    def handle(self) -> ct.c_void_p:
        handle = ct.c_void_p()
        self.call("cublasLtCreate", ct.byref(handle), about="a handle; is there a GPU, with a driver that fits?")
        # Not at exit: the driver may be gone by then, and the process takes the handle along.
        weakref.finalize(self, self.library.cublasLtDestroy, handle).atexit = False
        return handle

    def plan(self, product: Product) -> Plan:
        """``product``, ready to run.

        Raises:
            ValueError: cuBLASLt cannot take it; the message says why.
        """
        return Plan(self, product)

    def call(self, function: str, *arguments: Any, about: Any) -> None:
        status = getattr(self.library, function)(*arguments)
        if status:
            error = UnsupportedProduct if status in (INVALID_VALUE, NOT_SUPPORTED) else CublasLtError
            name = self.library.cublasLtGetStatusName(status).decode()
            raise error(f"{function}: {name} ({status}) for {about}")


class _Descriptor:
    """An opaque struct of cuBLASLt; an argument of its functions as it is; destroyed with this object."""

    def __init__(self, lt: CublasLt, kind: str, *arguments: Any) -> None:
        self._lt, self._kind, self._as_parameter_ = lt, kind, ct.c_void_p()
        lt.call(f"cublasLt{kind}Create", ct.byref(self._as_parameter_), *arguments, about=f"a {kind} of {arguments}")
        weakref.finalize(self, getattr(lt.library, f"cublasLt{kind}Destroy"), self._as_parameter_).atexit = False

    def set(self, **values: int) -> None:
        for name, value in values.items():
            number, type = ATTRIBUTES[self._kind][name]
            held = type(value)
            arguments = (self, number, ct.byref(held), ct.sizeof(held))
            self._lt.call(f"cublasLt{self._kind}SetAttribute", *arguments, about=f"{name} = {value}")


class Plan:
    """One product and its descriptors. It keeps the arrays; ``key`` says all that a choice of algorithm depends on."""

    def __init__(self, lt: CublasLt, product: Product) -> None:
        self.product, self.key = product, _key(product)
        self._lt = lt
        try:
            _check(product)
            self._describe(product)
        except (ValueError, CublasLtError) as error:
            raise type(error)(f"{error}; in {self.key}") from None

    def _describe(self, product: Product) -> None:
        lt, models = self._lt, product.out.shape[0]
        self._a, transposes_a = _layout(lt, "a", product.a, models)
        self._b, transposes_b = _layout(lt, "b", product.b, models)
        self._out, transposes_out = _layout(lt, "out", product.out, models)
        if transposes_out:
            raise ValueError("the rows of out are not contiguous")

        double = product.out.type == "f64"
        tf32 = product.tf32 and product.a.type == "f32"
        compute = COMPUTE_TYPES["64F" if double else "32F_FAST_TF32" if tf32 else "32F"]
        scalar: Any = ct.c_double if double else ct.c_float
        self._alpha, self._beta = scalar(1), scalar(product.adds)  # every run reads them
        self._operation = _Descriptor(lt, "MatmulDesc", compute, TYPES["f64" if double else "f32"])
        self._operation.set(
            TRANSA=transposes_b,
            TRANSB=transposes_a,
            EPILOGUE=EPILOGUES[product.epilogue, product.auxiliary is not None][1],
            **_bias_attributes(product),
            **_auxiliary_attributes(product),
        )

    def candidates(self, workspace_bytes: int, count: int = 8) -> list[Algorithm]:
        """Up to ``count`` algorithms that make do with the workspace, first the one that cuBLASLt thinks fastest.

        Raises:
            UnsupportedProduct: there is none, often because the epilogue is not to be had for these types or strides.
            CublasLtError: any other failure, a missing device among them.
        """
        a, b, out = (_alignment(array) for array in (self.product.a, self.product.b, self.product.out))
        preference = _Descriptor(self._lt, "MatmulPreference")
        preference.set(
            MAX_WORKSPACE_BYTES=workspace_bytes,
            REDUCTION_SCHEME_MASK=IN_COMPUTE_TYPE,
            MIN_ALIGNMENT_A_BYTES=b,
            MIN_ALIGNMENT_B_BYTES=a,
            MIN_ALIGNMENT_C_BYTES=out,
            MIN_ALIGNMENT_D_BYTES=out,
        )
        found, n = (_Candidate * count)(), ct.c_int()
        layouts = (self._b, self._a, self._out, self._out)
        self._lt.call(
            "cublasLtMatmulAlgoGetHeuristic",
            *(self._lt.handle, self._operation, *layouts, preference, count, ct.byref(found), ct.byref(n)),
            about=self.key,
        )
        algorithms = [Algorithm(bytes(c.data), c.workspace_bytes) for c in found[: n.value] if c.state == 0]
        if not algorithms:
            raise UnsupportedProduct(
                f"cuBLASLt has no algorithm with {workspace_bytes:,} bytes of workspace for {self.key}"
            )
        return algorithms

    def run(self, algorithm: Algorithm, workspace: int, workspace_bytes: int, stream: int) -> None:
        """Launch the product on ``stream``, with memory at ``workspace`` that nothing else uses meanwhile."""
        p = self.product
        self._lt.call(
            "cublasLtMatmul",
            *(self._lt.handle, self._operation),
            *(ct.byref(self._alpha), p.b.pointer, self._b, p.a.pointer, self._a),
            *(ct.byref(self._beta), p.out.pointer, self._out, p.out.pointer, self._out),
            *(algorithm.data, workspace, workspace_bytes, stream),
            about=self.key,
        )


def _key(product: Product) -> str:
    """What a choice of algorithm depends on, and what a message about the product says."""
    parts = [" ".join([product.epilogue or "product", *(flag for flag in ("adds", "tf32") if getattr(product, flag))])]
    for name in ("a", "b", "out", "bias", "auxiliary"):
        x = getattr(product, name)
        if x is not None:
            parts.append(f"{name} {x.type} {_numbers(x.shape)} strides {_numbers(x.strides)} align {_alignment(x)}")
    return ", ".join(parts)


def _numbers(values: tuple[int, ...]) -> str:
    return "x".join(str(int(n)) for n in values)


def _alignment(array: DeviceArray) -> int:
    """The power of two, in bytes, that divides the address of every model's part."""
    offset = array.strides[0] * ITEM_SIZES[array.type] if array.shape[0] > 1 else 0
    return gcd(LARGEST_ALIGNMENT, array.pointer, offset)


def _check(product: Product) -> None:
    a, b, out = product.a, product.b, product.out
    models, m, n = out.shape
    assert a.shape[0] in (1, models) and b.shape[0] in (1, models), product
    assert a.shape[1:] == (m, b.shape[1]) and b.shape[2] == n, product
    if 0 in (*a.shape, *b.shape, *out.shape):
        raise ValueError("cuBLASLt takes no empty matrix")
    if a.type != b.type or (a.type, out.type) not in PRODUCT_TYPES:
        raise ValueError(f"cuBLASLt does not multiply {a.type} by {b.type} into {out.type}")
    if models > 1 and out.strides[0] == 0:
        raise ValueError("the models share out, which each of them writes")
    if (product.epilogue, product.auxiliary is not None) not in EPILOGUES:
        given = "with" if product.auxiliary is not None else "without"
        raise ValueError(f"there is no epilogue {product.epilogue!r} {given} auxiliary")
    if product.epilogue and n == 1 and m > 1 and out.strides[1] > 1:
        # Older versions leave the bias out of some rows here: github.com/dfyz/cublaslt-bias-epilogue
        raise ValueError("cuBLASLt's epilogues are not to be trusted with one column whose elements lie apart")


def _layout(lt: CublasLt, name: str, array: DeviceArray, models: int) -> tuple[_Descriptor, bool]:
    """The matrix as cuBLASLt reads its memory, by columns, and whether that has to be transposed to give arrayᵀ."""
    (rows, columns), (row, column) = array.shape[1:], array.strides[1:]
    seen = []  # (rows, columns, leading dimension, transposed)
    if (column == 1 or columns == 1) and (row >= columns or rows == 1):
        seen.append((columns, rows, max(row, columns), False))
    if (row == 1 or rows == 1) and (column >= rows or columns == 1):
        seen.append((rows, columns, max(column, rows), True))
    if not seen:
        raise ValueError(
            f"{name} is no matrix to cuBLASLt: its strides are {row} and {column}, and one has to be 1, the other at least "
            "as long as what it steps over"
        )
    # Of a vector there are two views; the one with the longer contiguous stretch is loaded in vectors. out has one only.
    taken = seen[0] if name == "out" else max(seen, key=lambda view: view[0])
    layout = _Descriptor(lt, "MatrixLayout", TYPES[array.type], *taken[:3])
    layout.set(BATCH_COUNT=models, STRIDED_BATCH_OFFSET=array.strides[0] if array.shape[0] > 1 else 0)
    return layout, taken[3]


def _bias_attributes(product: Product) -> dict[str, int]:
    bias, out = product.bias, product.out
    if not product.epilogue:
        assert bias is None, product
        return {}
    models, m, n = out.shape
    assert bias is not None and bias.shape == (models, m if product.epilogue == "bias_gradient" else n), product
    if bias.type != out.type:
        raise ValueError(f"bias is {bias.type} and out {out.type}: cuBLASLt takes one type for both")
    if bias.strides[1] != 1 and bias.shape[1] > 1:
        raise ValueError("the elements of bias are not contiguous")
    if _alignment(bias) % VECTOR_BYTES:
        raise ValueError(f"bias does not begin at a multiple of {VECTOR_BYTES} bytes for every model")
    if product.epilogue.endswith("gradient") and models > 1 and bias.strides[0] == 0:
        raise ValueError("the models share bias, which each of them writes")
    return {
        "BIAS_POINTER": bias.pointer,
        "BIAS_BATCH_STRIDE": bias.strides[0] if models > 1 else 0,
        "BIAS_DATA_TYPE": TYPES[bias.type],
    }


def _auxiliary_attributes(product: Product) -> dict[str, int]:
    auxiliary, (models, m, n) = product.auxiliary, product.out.shape
    if auxiliary is None:
        return {}
    is_mask = product.epilogue.startswith("relu")  # one bit for each element, and cuBLASLt counts in bits
    assert auxiliary.shape == (models, m, -(-n // 8) if is_mask else n), product
    wanted = "u8" if is_mask else product.out.type
    if auxiliary.type != wanted:
        raise ValueError(f"auxiliary is {auxiliary.type}, cuBLASLt takes {wanted} here")
    per_item, multiple = (8, 128) if is_mask else (1, 8)
    leading, offset = (
        stride * per_item for stride in (auxiliary.strides[1], auxiliary.strides[0] if models > 1 else 0)
    )
    if auxiliary.strides[2] != 1 and auxiliary.shape[2] > 1:
        raise ValueError("the rows of auxiliary are not contiguous")
    if leading % multiple or leading < n or offset % multiple or _alignment(auxiliary) % VECTOR_BYTES:
        raise ValueError(f"auxiliary does not begin every row at a multiple of {multiple // per_item} elements")
    if models > 1 and offset == 0 and not product.epilogue.endswith("gradient"):
        raise ValueError("the models share auxiliary, which each of them writes")
    return {
        "EPILOGUE_AUX_POINTER": auxiliary.pointer,
        "EPILOGUE_AUX_LD": leading,
        "EPILOGUE_AUX_BATCH_STRIDE": offset,
    }
