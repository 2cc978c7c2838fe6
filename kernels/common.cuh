// What every kernel source leans on: the GM_DEVICE marker, integer types and math functions chosen by argument type.
// Plain C++ without includes: NVRTC has these functions built in, and a host compiler includes <cmath> before this file.
#ifndef GPUMLP_COMMON_CUH
#define GPUMLP_COMMON_CUH

#ifdef __CUDACC__
#define GM_DEVICE __device__ __forceinline__
#else
#define GM_DEVICE inline
#endif

typedef unsigned int gm_u32;
typedef unsigned long long gm_u64;

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

#endif
