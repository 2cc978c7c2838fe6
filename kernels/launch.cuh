// What a kernel needs beyond scalar functions: its marker, loads and stores by type and by 16 bytes, sums over a warp and a
// block. Needs common.cuh before it, and either a CUDA compiler or tests/emulator/cuda_emulator.h.
#ifndef GPUMLP_LAUNCH_CUH
#define GPUMLP_LAUNCH_CUH

// A kernel is a function template marked GM_KERNEL, with the list of its instances after it:
//
//     template <typename S, typename T> GM_KERNEL void gather(const S* X, T* x, i64 n) { ... }
//     GM_INSTANCES(gather, (u8, f32), (f32, f32))
//
// gpumlp/backends/kernel_source.py reads both and writes the extern "C" entry of each instance: gather_u8_f32, ...
#define GM_KERNEL static GM_DEVICE
#define GM_INSTANCES(...)

constexpr int GM_THREADS = 256;  // the largest block that an entry is compiled for

#ifndef GM_EMULATOR
// An array that the threads of a block share, at a multiple of 16 bytes; the emulator has its own.
#define GM_SHARED(T, name, size) __shared__ alignas(16) T name[size]
#endif

// Where a thread of one-dimensional blocks stands in the grid's x.
GM_DEVICE i64 thread_of_grid() { return i64(blockIdx.x) * blockDim.x + threadIdx.x; }
GM_DEVICE i64 threads_of_grid() { return i64(gridDim.x) * blockDim.x; }

// --- two-byte floats

GM_DEVICE u32 gm_float_bits(f32 x) {
#ifdef __CUDACC__
    return __float_as_uint(x);
#else
    return __builtin_bit_cast(u32, x);
#endif
}

GM_DEVICE f32 gm_bits_float(u32 bits) {
#ifdef __CUDACC__
    return __uint_as_float(bits);
#else
    return __builtin_bit_cast(f32, bits);
#endif
}

template <typename T> GM_DEVICE T gm_widen(T x) { return x; }
GM_DEVICE f32 gm_widen(bf16 x) { return gm_bits_float(static_cast<u32>(x.bits) << 16); }
GM_DEVICE f32 gm_widen(f16 x) {
#ifdef __CUDACC__
    f32 wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
    return wide;
#else
    return static_cast<f32>(__builtin_bit_cast(_Float16, x.bits));
#endif
}

// To the nearest, ties to even; NaN to one NaN.
GM_DEVICE void gm_narrow(f32 x, bf16& out) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    u32 bits = gm_float_bits(x);
    out.bits = static_cast<u16>(x != x ? 0x7FFFu : (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
#endif
}
GM_DEVICE void gm_narrow(f32 x, f16& out) {
#ifdef __CUDACC__
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(out.bits) : "f"(x));
#else
    out.bits = __builtin_bit_cast(u16, static_cast<_Float16>(x));
#endif
}
template <typename C, typename T> GM_DEVICE void gm_narrow(C x, T& out) { out = static_cast<T>(x); }

template <typename T> GM_DEVICE Compute<T> gm_load(const T* p) { return gm_widen(*p); }
template <typename T> GM_DEVICE void gm_store(T* p, Compute<T> x) { gm_narrow(x, *p); }

// --- 16 bytes at a time

struct alignas(16) Quad {
    u32 part[4];
};

// Whether p may be read 16 bytes at a time. Strides of models and rows have to be asked for as well.
GM_DEVICE bool gm_aligned(const void* p) { return (reinterpret_cast<u64>(p) & 15u) == 0; }
template <typename T> GM_DEVICE bool gm_aligned_stride(i64 elements) { return elements * i64(sizeof(T)) % 16 == 0; }

// One store of 16 bytes to device memory. As plain C++ it becomes four of 4 bytes wherever the compiler has rearranged the
// address: it then no longer sees that they are neighbours.
GM_DEVICE void gm_store_quad(void* p, const Quad& q) {
#ifdef __CUDACC__
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 : : "l"(p), "r"(q.part[0]), "r"(q.part[1]), "r"(q.part[2]), "r"(q.part[3]) : "memory");
#else
    *static_cast<Quad*>(p) = q;
#endif
}

// N elements from p, which begins at 16 bytes; N * sizeof(T) is a multiple of 16.
template <int N, typename T> GM_DEVICE void gm_load_quads(const T* p, Compute<T> (&v)[N]) {
    static_assert(N * sizeof(T) % 16 == 0, "whole quads");
    alignas(16) T held[N];
#pragma unroll
    for (int i = 0; i < int(N * sizeof(T) / 16); ++i) reinterpret_cast<Quad*>(held)[i] = reinterpret_cast<const Quad*>(p)[i];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = gm_widen(held[i]);
}
template <int N, typename T> GM_DEVICE void gm_store_quads(T* p, const Compute<T> (&v)[N]) {
    static_assert(N * sizeof(T) % 16 == 0, "whole quads");
    alignas(16) T held[N];
#pragma unroll
    for (int i = 0; i < N; ++i) gm_narrow(v[i], held[i]);
#pragma unroll
    for (int i = 0; i < int(N * sizeof(T) / 16); ++i) gm_store_quad(reinterpret_cast<Quad*>(p) + i, reinterpret_cast<Quad*>(held)[i]);
}

// The same for the first n of N elements at any address and for any N: `quads` says whether p begins at 16 bytes.
template <int N, typename T> GM_DEVICE void gm_load_some(const T* p, Compute<T> (&v)[N], int n, bool quads) {
    if constexpr (N * sizeof(T) % 16 == 0) {
        if (quads && n == N) {
            gm_load_quads(p, v);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = i < n ? gm_load(p + i) : Compute<T>(0);
}
template <int N, typename T> GM_DEVICE void gm_store_some(T* p, const Compute<T> (&v)[N], int n, bool quads) {
    if constexpr (N * sizeof(T) % 16 == 0) {
        if (quads && n == N) {
            gm_store_quads(p, v);
            return;
        }
    }
#pragma unroll
    for (int i = 0; i < N; ++i)
        if (i < n) gm_store(p + i, v[i]);
}

// --- sums in a fixed order: the same bits whatever the schedule

template <typename T> GM_DEVICE T gm_warp_sum(T x) {
#pragma unroll
    for (int distance = 16; distance > 0; distance >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    return x;
}

// The sum over a block of GM_THREADS threads or fewer, whole warps; every thread gets it. `held` is shared, of 32 elements.
template <typename T> GM_DEVICE T gm_block_sum(T x, T* held) {
    int thread = int(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z));
    int warps = int(blockDim.x * blockDim.y * blockDim.z) >> 5;
    x = gm_warp_sum(x);
    __syncthreads();  // held may still be read from an earlier sum
    if ((thread & 31) == 0) held[thread >> 5] = x;
    __syncthreads();
    T total = held[0];
    for (int i = 1; i < warps; ++i) total += held[i];
    return total;
}

// True in every thread of the block that arrives last of `blocks` at the ticket, which is 0 before and after.
// What the other blocks wrote before is visible to it. `held` is shared, of one element.
GM_DEVICE bool gm_last_block(u32* ticket, u32 blocks, u32* held) {
    bool first = threadIdx.x == 0 && threadIdx.y == 0 && threadIdx.z == 0;
    __threadfence();
    __syncthreads();
    if (first) {
        u32 order = atomicAdd(ticket, 1u);
        *held = order;
        if (order == blocks - 1) *ticket = 0;
    }
    __syncthreads();
    bool last = *held == blocks - 1;
    __threadfence();
    return last;
}

#endif
