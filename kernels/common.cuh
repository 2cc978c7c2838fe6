// What every kernel source leans on: types, the GM_DEVICE marker and math functions chosen by argument type.
// Plain C++ without includes: NVRTC has these functions built in, and a host compiler includes <cmath> before this file.
#ifndef GPUMLP_COMMON_CUH
#define GPUMLP_COMMON_CUH

#ifdef __CUDACC__
#define GM_DEVICE __device__ __forceinline__
#else
#define GM_DEVICE inline
#endif

// One short name for each type: kernels are called after them (gather_u8_f32), and the host reads them in signatures.
typedef signed char i8;
typedef unsigned char u8;
typedef short i16;
typedef unsigned short u16;
typedef int i32;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;
typedef float f32;
typedef double f64;

// Two-byte floats are for storage alone: arithmetic is in Compute<T>. Own types, so that no CUDA header is needed.
struct f16 {
    u16 bits;
};
struct bf16 {
    u16 bits;
};

template <typename T> struct ComputeOf {
    typedef T type;
};
template <> struct ComputeOf<f16> {
    typedef f32 type;
};
template <> struct ComputeOf<bf16> {
    typedef f32 type;
};
template <typename T> using Compute = typename ComputeOf<T>::type;

// One name for float and double, so that a template never widens a float by calling the double function.
#define GM_MATH(name)                                     \
    GM_DEVICE float gm_##name(float x) { return name##f(x); } \
    GM_DEVICE double gm_##name(double x) { return name(x); }
GM_MATH(exp)
GM_MATH(expm1)
GM_MATH(log)
GM_MATH(log1p)
GM_MATH(sqrt)
GM_MATH(fabs)
GM_MATH(sin)
GM_MATH(cos)
GM_MATH(tanh)
GM_MATH(erfc)
#undef GM_MATH

// Comparisons that let NaN through as x; fmin and fmax would replace it by the bound.
template <typename T> GM_DEVICE T gm_at_least(T x, T low) { return x < low ? low : x; }
template <typename T> GM_DEVICE T gm_at_most(T x, T high) { return x > high ? high : x; }
template <typename T> GM_DEVICE T gm_clip(T x, T low, T high) { return gm_at_most(gm_at_least(x, low), high); }

// NaN and the infinities are the numbers whose difference from themselves is not 0.
template <typename T> GM_DEVICE bool gm_finite(T x) { return x - x == T(0); }

#endif
