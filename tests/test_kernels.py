"""The CUDA headers, compiled by a host compiler, give what NumPy gives: every activation, every word, every draw."""

import ctypes
import shutil
import subprocess

import numpy as np
import pytest

from gpumlp import random
from gpumlp.activations import ACTIVATIONS, get_activation
from gpumlp.backends.kernel_source import kernel_path
from gpumlp.random import Purpose

KERNELS = kernel_path("philox.cuh").parent
HEADERS = ("common.cuh", "activations.cuh", "philox.cuh")
DTYPES = [np.float32, np.float64]
LONG, U64 = ctypes.c_long, ctypes.c_uint64

LOOPS = r"""
#define LOOP(T)                                                                                    \
    void f_##T(int row, const T* z, T* a, long n, T alpha) {                                       \
        for (long i = 0; i < n; ++i) a[i] = activation_f(row, z[i], alpha);                        \
    }                                                                                              \
    void f_grad_##T(int row, const T* z, const T* a, T* slope, long n, T alpha) {                  \
        for (long i = 0; i < n; ++i) slope[i] = activation_f_grad(row, z[i], a[i], alpha);         \
    }
#define DRAW(name, T, value) \
    void name(const PhiloxStream* s, T* out, long n) { for (long i = 0; i < n; ++i) out[i] = value; }
#define NAME(name) #name " "

extern "C" {
LOOP(float)
LOOP(double)
const char* names() { return GM_ACTIVATIONS(NAME); }
int n_activations() { return gm_n_activations; }

DRAW(words, u64, philox_word(*s, i))
DRAW(lanes, u32, philox_lane(*s, i))
DRAW(uniform, double, philox_uniform(*s, i))
DRAW(normal, double, philox_normal(*s, i))
void block_lanes(const PhiloxStream* s, u32* out, long n) {
    u64 block[4] = {};
    for (long i = 0; i < n; ++i) {
        if (i % 8 == 0) philox_block(*s, i / 8, block);
        out[i] = philox_pick_lane(block, static_cast<int>(i % 8));
    }
}
void keep(const PhiloxStream* s, bool* out, long n, u32 threshold) {
    for (long i = 0; i < n; ++i) out[i] = philox_keep(*s, i, threshold);
}
void integers(const PhiloxStream* s, long long* out, long n, long long low, u64 span) {
    for (long i = 0; i < n; ++i) out[i] = philox_integer(*s, i, low, span);
}
void raw_philox(const u64* in, u64* out) {  // in: counter, key
    u64 counter[4] = {in[0], in[1], in[2], in[3]};
    const u64 key[2] = {in[4], in[5]};
    philox(counter, key, counter);  // in place, which the header allows
    for (int i = 0; i < 4; ++i) out[i] = counter[i];
}
PURPOSES
}
"""


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    purposes = ", ".join(f"PURPOSE_{p.name}" for p in Purpose)
    source = "\n".join((KERNELS / name).read_text() for name in HEADERS)
    source += LOOPS.replace("PURPOSES", f"u32 purposes[] = {{{purposes}}};")
    folder = tmp_path_factory.mktemp("kernels")
    (folder / "headers.cpp").write_text("#include <cmath>\n" + source)
    warnings = ["-Werror=double-promotion", "-Werror=float-conversion"]  # a bare 0.5 in a float function
    command = [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", *warnings, "headers.cpp", "-o", "headers.so"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "headers.so"))


def pointer(array):
    return ctypes.c_void_p(array.ctypes.data)


# --- activations ------------------------------------------------------------------------------------------------------


def names(library):
    library.names.restype = ctypes.c_char_p
    return library.names().decode().split()


def twin(library, row, z, a=None):
    """activation_f(z), or activation_f_grad(z, a) where a is given, by the compiled header."""
    assert row.name in names(library), f"{row.name} has no twin in kernels/activations.cuh"
    out = np.empty_like(z)
    number = names(library).index(row.name)
    suffix, scalar = ("float", ctypes.c_float) if z.dtype == np.float32 else ("double", ctypes.c_double)
    alpha = scalar(row.alpha or 0.0)
    if a is None:
        library[f"f_{suffix}"](number, pointer(z), pointer(out), LONG(z.size), alpha)
    else:
        library[f"f_grad_{suffix}"](number, pointer(z), pointer(a), pointer(out), LONG(z.size), alpha)
    return out


def points(dtype):
    kinks = np.array([-6.0, -3.0, -1.0, 0.0, -0.0, 1.0, 3.0, 6.0, 20.0], dtype)
    beside = [np.nextafter(kinks, dtype(side)) for side in (-np.inf, np.inf)]
    far = np.array([88.0, 89.0, 710.0, 1e4], dtype)
    spread = np.random.default_rng(2).normal(0.0, 5.0, 3001).astype(dtype)
    return np.concatenate([kinks, *beside, far, -far, [np.nan], spread, np.linspace(-40, 40, 801)]).astype(dtype)


def test_the_tables_have_the_same_rows_in_the_same_order(library):
    assert names(library) == list(ACTIVATIONS)
    assert library.n_activations() == len(ACTIVATIONS)


@pytest.mark.parametrize("spec", [*ACTIVATIONS, "leaky_relu(0.2)", "elu(0.5)"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_agrees(library, spec, dtype):
    row, z = get_activation(spec), points(dtype)
    eps = np.finfo(dtype).eps
    a = row.f(z)
    np.testing.assert_allclose(twin(library, row, z), a, rtol=16 * eps, atol=4 * eps)
    np.testing.assert_allclose(twin(library, row, z, a), row.f_grad(z, a), rtol=16 * eps, atol=4 * eps)


@pytest.mark.parametrize("spec", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activation_agrees_at_infinity(library, spec, dtype):
    """Also where the formula itself gives NaN (0 times infinity)."""
    row, z = get_activation(spec), np.array([np.inf, -np.inf], dtype)
    with np.errstate(invalid="ignore"):
        a = row.f(z)
        slope = row.f_grad(z, a)
    np.testing.assert_allclose(twin(library, row, z), a, rtol=1e-6)
    np.testing.assert_allclose(twin(library, row, z, a), slope, rtol=1e-6)


@pytest.mark.parametrize("spec", ["relu", "leaky_relu", "hard_sigmoid", "hard_tanh", "hard_silu", "relu6"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kinks_agree_to_the_last_bit(library, spec, dtype):
    row, z = get_activation(spec), points(dtype)
    a = twin(library, row, z)
    np.testing.assert_array_equal(twin(library, row, z, a), row.f_grad(z, a))


@pytest.mark.parametrize("spec", ACTIVATIONS)
def test_derivative_reads_what_the_row_says(library, spec):
    row, z = get_activation(spec), points(np.float64)
    a, junk = row.f(z), np.full_like(z, np.nan)
    unread = twin(library, row, junk, a) if row.in_place else twin(library, row, z, junk)
    np.testing.assert_array_equal(unread, twin(library, row, z, a))


# --- philox -----------------------------------------------------------------------------------------------------------


def raw_philox(library, counter, key):
    given, out = np.array([*counter, *key], np.uint64), np.empty(4, np.uint64)
    library.raw_philox(pointer(given), pointer(out))
    return out


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        (
            (0, 0, 0, 0),
            (0, 0),
            "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b",
        ),
        (
            (2**64 - 1,) * 4,
            (2**64 - 1,) * 2,
            "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0",
        ),
        (
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
        ),
    ],
)
def test_philox_gives_the_published_words(library, counter, key, words):
    """Known answers of Random123 (kat_vectors, philox4x64 10)."""
    assert " ".join(f"{w:016x}" for w in raw_philox(library, counter, key).tolist()) == words


def test_philox_is_numpys_philox(library):
    rng = np.random.default_rng(3)
    for _ in range(100):
        counter, key = (rng.integers(0, 2**64, size=size, dtype=np.uint64) for size in (4, 2))
        numpys = np.random.Philox(counter=counter, key=key).random_raw(4)
        counter[0] += np.uint64(1)  # NumPy counts before it draws
        np.testing.assert_array_equal(raw_philox(library, counter, key), numpys)


def test_purposes_are_the_same(library):
    assert list((ctypes.c_uint32 * len(Purpose)).in_dll(library, "purposes")) == [p.value for p in Purpose]


STREAMS = [
    {"seed": 0, "purpose": Purpose.DROPOUT, "step": 0, "model": 0, "layer": 0},
    {"seed": 2**64 - 1, "purpose": Purpose.NOISE, "step": 2**33 + 5, "model": 7, "layer": 3},
]


def draw(library, name, stream, dtype, n, *more):
    given, out = np.array(list(stream.values()), np.uint64), np.empty(n, dtype)
    library[name](pointer(given), pointer(out), LONG(n), *more)
    return out


@pytest.mark.parametrize("stream", STREAMS)
def test_draws_agree(library, stream):
    n = 1003
    words = random.words(n, **stream)
    lanes = words.view(np.uint32)[:n]
    np.testing.assert_array_equal(draw(library, "words", stream, np.uint64, n), words)
    np.testing.assert_array_equal(draw(library, "lanes", stream, np.uint32, n), lanes)
    np.testing.assert_array_equal(draw(library, "block_lanes", stream, np.uint32, n), lanes)
    np.testing.assert_array_equal(draw(library, "uniform", stream, np.float64, n), random.uniform(n, **stream))
    normal = draw(library, "normal", stream, np.float64, n)
    np.testing.assert_allclose(normal, random.normal(n, **stream), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1 - 2.0**-40])
@pytest.mark.parametrize("stream", STREAMS)
def test_dropout_agrees(library, stream, rate):
    kept = draw(library, "keep", stream, np.bool_, 1003, ctypes.c_uint32(random.keep_threshold(rate)))
    np.testing.assert_array_equal(kept, random.dropout_scale(np.empty(1003), rate, **stream) > 0)


def test_a_lane_equal_to_the_threshold_is_kept(library):
    lane = random.words(1, **STREAMS[0]).view(np.uint32)[0]
    for threshold, kept in [(int(lane), True), (int(lane) + 1, False)]:
        assert draw(library, "keep", STREAMS[0], np.bool_, 1, ctypes.c_uint32(threshold))[0] == kept


@pytest.mark.parametrize(("low", "high"), [(0, 10), (-7, 6), (5, 5 + 2**32)])
@pytest.mark.parametrize("stream", STREAMS)
def test_integers_agree(library, stream, low, high):
    got = draw(library, "integers", stream, np.int64, 1003, ctypes.c_longlong(low), U64(high - low))
    np.testing.assert_array_equal(got, random.integers(1003, low, high, **stream))
