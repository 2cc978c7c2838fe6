// The activations: twins of the rows of gpumlp/activations.py, in its order, with its kinks and its forms (sources there).
//
//   <name>_f(z, alpha)          the activation
//   <name>_f_grad(z, a, alpha)  its derivative; reads a alone where the Python row says in_place, else z alone
//
// NaN stays NaN. Needs common.cuh before it.
#ifndef GPUMLP_ACTIVATIONS_CUH
#define GPUMLP_ACTIVATIONS_CUH

// slope where low < a < high, else 0; a is bounded, so a * 0 is 0 or NaN
template <typename T> GM_DEVICE T gm_inside(T a, T low, T high, T slope) {
    return a > low && a < high ? slope : a * T(0);
}

template <typename T> GM_DEVICE T identity_f(T z, T) { return z; }
template <typename T> GM_DEVICE T identity_f_grad(T, T, T) { return T(1); }

// exp may overflow to infinity: 1 / infinity = 0 is then right
template <typename T> GM_DEVICE T sigmoid_f(T z, T) { return T(1) / (T(1) + gm_exp(-z)); }
template <typename T> GM_DEVICE T sigmoid_f_grad(T, T a, T) { return a * (T(1) - a); }

template <typename T> GM_DEVICE T tanh_f(T z, T) { return gm_tanh(z); }
template <typename T> GM_DEVICE T tanh_f_grad(T, T a, T) { return T(1) - a * a; }

// relu'(0) = 0; where a > 0 fails, a is 0 or NaN, which is the derivative
template <typename T> GM_DEVICE T relu_f(T z, T) { return gm_at_least(z, T(0)); }
template <typename T> GM_DEVICE T relu_f_grad(T, T a, T) { return a > T(0) ? T(1) : a; }

// alpha at 0
template <typename T> GM_DEVICE T leaky_relu_f(T z, T alpha) { return z > T(0) ? z : z * alpha; }
template <typename T> GM_DEVICE T leaky_relu_f_grad(T, T a, T alpha) { return a > T(0) ? T(1) : (a <= T(0) ? alpha : a); }

// alpha at 0
template <typename T> GM_DEVICE T elu_f(T z, T alpha) { return z > T(0) ? z : alpha * gm_expm1(z); }
template <typename T> GM_DEVICE T elu_f_grad(T, T a, T alpha) { return a > T(0) ? T(1) : a + alpha; }

// scale * alpha at 0; alpha and scale are the paper's constants
#define GM_SELU_SCALE 1.0507009873554804934193349852946
#define GM_SELU_SCALE_ALPHA (1.6732632423543772848170429916717 * GM_SELU_SCALE)
template <typename T> GM_DEVICE T selu_f(T z, T) {
    return z > T(0) ? T(GM_SELU_SCALE) * z : T(GM_SELU_SCALE_ALPHA) * gm_expm1(z);
}
template <typename T> GM_DEVICE T selu_f_grad(T, T a, T) {
    return a > T(0) ? T(GM_SELU_SCALE) : a + T(GM_SELU_SCALE_ALPHA);
}

// z Phi(z), and Phi(z) + z phi(z)
template <typename T> GM_DEVICE T gm_normal_cdf(T z) { return T(0.5) * gm_erfc(z * T(-0.70710678118654752440)); }
template <typename T> GM_DEVICE T gelu_f(T z, T) { return z * gm_normal_cdf(z); }
template <typename T> GM_DEVICE T gelu_f_grad(T z, T, T) {
    return gm_normal_cdf(z) + z * (T(0.39894228040143267794) * gm_exp(T(-0.5) * z * z));
}

// z s with s = sigmoid(2 sqrt(2/pi) (z + 0.044715 z^3))
#define GM_GELU_SLOPE 1.5957691216057307117
template <typename T> GM_DEVICE T gm_gelu_gate(T z) {
    return sigmoid_f(T(GM_GELU_SLOPE) * (z + T(0.044715) * z * z * z), T(0));
}
template <typename T> GM_DEVICE T gelu_tanh_f(T z, T) { return z * gm_gelu_gate(z); }
template <typename T> GM_DEVICE T gelu_tanh_f_grad(T z, T, T) {
    T s = gm_gelu_gate(z);
    return s + z * s * (T(1) - s) * (T(GM_GELU_SLOPE) + T(3 * 0.044715 * GM_GELU_SLOPE) * z * z);
}

template <typename T> GM_DEVICE T silu_f(T z, T) { return z * sigmoid_f(z, T(0)); }
template <typename T> GM_DEVICE T silu_f_grad(T z, T, T) {
    T s = sigmoid_f(z, T(0));
    return s * (T(1) + z * (T(1) - s));
}

// z tanh(softplus(z)) = z n / (n + 2); from z = 20 on n / (n + 2) is 1
template <typename T> GM_DEVICE T mish_f(T z, T) {
    T e = gm_exp(gm_at_most(z, T(20))), n = e * (e + T(2));
    return z * (n / (n + T(2)));
}
template <typename T> GM_DEVICE T mish_f_grad(T z, T, T) {
    z = gm_at_most(z, T(20));
    T e = gm_exp(z), n = e * (e + T(2));
    return (n + T(4) * z * e * (e + T(1)) / (n + T(2))) / (n + T(2));
}

template <typename T> GM_DEVICE T softplus_f(T z, T) { return gm_at_least(z, T(0)) + gm_log1p(gm_exp(-gm_fabs(z))); }
template <typename T> GM_DEVICE T softplus_f_grad(T, T a, T) { return -gm_expm1(-a); }

template <typename T> GM_DEVICE T softsign_f(T z, T) { return z / (T(1) + gm_fabs(z)); }
template <typename T> GM_DEVICE T softsign_f_grad(T z, T, T) {
    T r = T(1) / (T(1) + gm_fabs(z));
    return r * r;
}

// 0 at both kinks. Not z / 6 + 1 / 2: fused multiply-add would move the kink.
template <typename T> GM_DEVICE T hard_sigmoid_f(T z, T) { return gm_clip(z + T(3), T(0), T(6)) / T(6); }
template <typename T> GM_DEVICE T hard_sigmoid_f_grad(T, T a, T) { return gm_inside(a, T(0), T(1), T(1) / T(6)); }

// 0 at both kinks
template <typename T> GM_DEVICE T hard_tanh_f(T z, T) { return gm_clip(z, T(-1), T(1)); }
template <typename T> GM_DEVICE T hard_tanh_f_grad(T, T a, T) { return gm_inside(a, T(-1), T(1), T(1)); }

// 0 at -3 and 1 at 3: the straight sides
template <typename T> GM_DEVICE T hard_silu_f(T z, T) { return z * hard_sigmoid_f(z, T(0)); }
template <typename T> GM_DEVICE T hard_silu_f_grad(T z, T, T) {
    return z <= T(-3) ? T(0) : (z >= T(3) ? T(1) : z / T(3) + T(0.5));
}

// 0 at both kinks
template <typename T> GM_DEVICE T relu6_f(T z, T) { return gm_clip(z, T(0), T(6)); }
template <typename T> GM_DEVICE T relu6_f_grad(T, T a, T) { return gm_inside(a, T(0), T(6), T(1)); }

// The table, in the order of ACTIVATIONS in Python: a row's number is its place there.
#define GM_ACTIVATIONS(ROW)                                                                                            \
    ROW(identity) ROW(sigmoid) ROW(tanh) ROW(relu) ROW(leaky_relu) ROW(elu) ROW(selu) ROW(gelu) ROW(gelu_tanh)         \
    ROW(silu) ROW(mish) ROW(softplus) ROW(softsign) ROW(hard_sigmoid) ROW(hard_tanh) ROW(hard_silu) ROW(relu6)

#define GM_ROW(name) gm_activation_##name,
enum GmActivation { GM_ACTIVATIONS(GM_ROW) gm_n_activations };
#undef GM_ROW

// By number. All threads of a kernel take one case; a row known at compile time leaves only its own code.
template <typename T> GM_DEVICE T activation_f(int row, T z, T alpha) {
    switch (row) {
#define GM_ROW(name) case gm_activation_##name: return name##_f(z, alpha);
        GM_ACTIVATIONS(GM_ROW)
#undef GM_ROW
    }
    return z;
}
template <typename T> GM_DEVICE T activation_f_grad(int row, T z, T a, T alpha) {
    switch (row) {
#define GM_ROW(name) case gm_activation_##name: return name##_f_grad(z, a, alpha);
        GM_ACTIVATIONS(GM_ROW)
#undef GM_ROW
    }
    return T(1);
}

#endif
