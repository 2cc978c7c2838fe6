// The optimizers: twins of the update functions of gpumlp/optimizers.py (sources there), and the kernels that run them over
// the flat buffers of all models.
//
// A rule is a struct: how many buffers it keeps beside the parameters, how many coefficients it takes, and
//
//   step(w, g, first, second, c)   one parameter w, its gradient g, the buffers, the coefficients in Python's order
//
// SGD has three of them, AdamW is adam with a `shrink` (see update).

struct descend {
    static constexpr int states = 0, coefficients = 2;
    template <typename T> GM_DEVICE static void step(T& w, T g, T&, T&, const T (&c)[coefficients]) {
        const T rate = c[0];
        w -= rate * g;
    }
};

struct heavy_ball {
    static constexpr int states = 1, coefficients = 2;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& velocity, T&, const T (&c)[coefficients]) {
        const T rate = c[0], momentum = c[1];
        velocity = velocity * momentum + g;
        w -= rate * velocity;
    }
};

struct nesterov {
    static constexpr int states = 1, coefficients = 2;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& velocity, T&, const T (&c)[coefficients]) {
        const T rate = c[0], momentum = c[1];
        velocity = velocity * momentum + g;
        w -= rate * (velocity * momentum + g);
    }
};

struct rmsprop {
    static constexpr int states = 1, coefficients = 4;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& v, T&, const T (&c)[coefficients]) {
        const T rate = c[0], rho = c[1], rest = c[2], epsilon = c[3];
        v = v * rho + g * g * rest;
        w -= rate * (g / (gm_sqrt(v) + epsilon));
    }
};

struct adagrad {
    static constexpr int states = 1, coefficients = 2;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& v, T&, const T (&c)[coefficients]) {
        const T rate = c[0], epsilon = c[1];
        v += g * g;
        w -= rate * (g / (gm_sqrt(v) + epsilon));
    }
};

struct adadelta {
    static constexpr int states = 2, coefficients = 4;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& v, T& u, const T (&c)[coefficients]) {
        const T rate = c[0], rho = c[1], rest = c[2], epsilon = c[3];
        v = v * rho + g * g * rest;
        const T delta = g / gm_sqrt(v + epsilon) * gm_sqrt(u + epsilon);
        u = u * rho + delta * delta * rest;
        w -= rate * delta;
    }
};

// m and v hold m / (1 - beta1) and v / (1 - beta2); the factors are in rate and epsilon.
struct adam {
    static constexpr int states = 2, coefficients = 4;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& m, T& v, const T (&c)[coefficients]) {
        const T beta1 = c[0], beta2 = c[1], rate = c[2], epsilon = c[3];
        m = m * beta1 + g;
        v = v * beta2 + g * g;
        w -= rate * (m / (gm_sqrt(v) + epsilon));
    }
};

// m and v as adam's
struct nadam {
    static constexpr int states = 2, coefficients = 5;
    template <typename T> GM_DEVICE static void step(T& w, T g, T& m, T& v, const T (&c)[coefficients]) {
        const T beta1 = c[0], beta2 = c[1], of_m = c[2], of_g = c[3], epsilon = c[4];
        m = m * beta1 + g;
        v = v * beta2 + g * g;
        w -= (m * of_m + g * of_g) / (gm_sqrt(v) + epsilon);
    }
};

// --- before the rule

constexpr int NEIGHBOURS = 8;  // elements that a thread takes at a time: 16 bytes of the shadow

// The derivative of l1 |w| + l2 w^2 / 2; 0 at w = 0.
template <typename T> GM_DEVICE T penalty_grad(T w, T l1, T l2) {
    return l2 * w + (w > T(0) ? l1 : (w < T(0) ? -l1 : w));
}

// The value of model m, `otherwise` where the array is null.
template <typename T> GM_DEVICE T of_model(const T* values, i32 m, T otherwise) { return values ? values[m] : otherwise; }

// What a model's gradient is multiplied by, so that its norm is at most clip_norm. The norm's square is in n parts.
template <typename T> GM_DEVICE T norm_scale(T clip_norm, const T* partials, i32 n, T* held) {
    T sum = T(0);
    for (i32 i = i32(threadIdx.x); i < n; i += i32(blockDim.x)) sum += partials[i];
    return clip_norm / gm_at_least(gm_sqrt(gm_block_sum(sum, held)), clip_norm);
}

// The first element that a thread takes, and the distance to its next.
GM_DEVICE i64 first_element() { return (i64(blockIdx.x) * blockDim.x + threadIdx.x) * NEIGHBOURS; }
GM_DEVICE i64 element_step() { return i64(gridDim.x) * blockDim.x * NEIGHBOURS; }

// Whether all models' parts of an array, null allowed, begin at 16 bytes.
template <typename T> GM_DEVICE bool in_quads(const T* p, i64 stride, i32 models) {
    return gm_aligned(p) && (models == 1 || gm_aligned_stride<T>(stride));
}

// --- kernels

// One step of every model: clip_value, clip_norm, l1 and l2, shrink (1 - learning_rate weight_decay), the rule. Penalties
// and decay act on the first n_weights elements. A null pointer: that is not asked for. The shadow gets w in bfloat16. A
// model whose valid or ok is 0 stays as it is.
template <typename Rule, typename T>
GM_KERNEL void update(T* w, const T* g, T* first, T* second, i64 stride, i64 n, i64 n_weights, const T* current,
                      i64 current_stride, const T* l1, const T* l2, const T* shrink, const T* clip_value,
                      const T* clip_norm, const T* partials, i32 n_partials, bf16* shadow, const i32* valid,
                      const i32* ok, i32 models) {
    constexpr int V = NEIGHBOURS;
    GM_SHARED(T, held, 32);
    const bool quads = in_quads(w, stride, models) && in_quads(g, stride, models) && in_quads(first, stride, models) &&
                       in_quads(second, stride, models) && in_quads(shadow, stride, models);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        if ((valid && valid[m] == 0) || (ok && ok[m] == 0)) continue;
        T c[Rule::coefficients];
#pragma unroll
        for (int k = 0; k < Rule::coefficients; ++k) c[k] = current[k * current_stride + m];
        const T limit = of_model(clip_value, m, T(0)), shrunk = of_model(shrink, m, T(1));
        const T of_l1 = of_model(l1, m, T(0)), of_l2 = of_model(l2, m, T(0));
        const T scale = clip_norm ? norm_scale(clip_norm[m], partials + i64(m) * n_partials, n_partials, held) : T(1);
        for (i64 k = first_element(); k < n; k += element_step()) {
            const i64 at = m * stride + k;
            const int some = int(gm_at_most(n - k, i64(V)));
            T weight[V], gradient[V], state[V] = {}, state2[V] = {};
            gm_load_some(w + at, weight, some, quads);
            gm_load_some(g + at, gradient, some, quads);
            if constexpr (Rule::states > 0) gm_load_some(first + at, state, some, quads);
            if constexpr (Rule::states > 1) gm_load_some(second + at, state2, some, quads);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                T d = clip_value ? gm_clip(gradient[i], -limit, limit) : gradient[i];
                d *= scale;
                if (k + i < n_weights) {
                    d += penalty_grad(weight[i], of_l1, of_l2);
                    weight[i] *= shrunk;
                }
                Rule::step(weight[i], d, state[i], state2[i], c);
            }
            gm_store_some(w + at, weight, some, quads);
            if constexpr (Rule::states > 0) gm_store_some(first + at, state, some, quads);
            if constexpr (Rule::states > 1) gm_store_some(second + at, state2, some, quads);
            if (shadow) {
                f32 narrow[V];
#pragma unroll
                for (int i = 0; i < V; ++i) narrow[i] = f32(weight[i]);
                gm_store_some(shadow + at, narrow, some, quads);
            }
        }
    }
}
GM_INSTANCES(update, (descend, f32), (descend, f64), (heavy_ball, f32), (heavy_ball, f64), (nesterov, f32), (nesterov, f64),
             (rmsprop, f32), (rmsprop, f64), (adagrad, f32), (adagrad, f64), (adadelta, f32), (adadelta, f64),
             (adam, f32), (adam, f64), (nadam, f32), (nadam, f64))

// partials[m * gridDim.x + blockIdx.x] = the sum of the squares of a block's share of the gradient, clipped by value.
template <typename T>
GM_KERNEL void gradient_norm(const T* g, i64 stride, i64 n, const T* clip_value, T* partials, i32 models) {
    constexpr int V = NEIGHBOURS;
    GM_SHARED(T, held, 32);
    const bool quads = in_quads(g, stride, models);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const T limit = of_model(clip_value, m, T(0));
        T sum = T(0);
        for (i64 k = first_element(); k < n; k += element_step()) {
            T d[V];
            gm_load_some(g + m * stride + k, d, int(gm_at_most(n - k, i64(V))), quads);
#pragma unroll
            for (int i = 0; i < V; ++i) {
                if (clip_value) d[i] = gm_clip(d[i], -limit, limit);
                sum += d[i] * d[i];
            }
        }
        sum = gm_block_sum(sum, held);
        if (threadIdx.x == 0) partials[i64(m) * gridDim.x + blockIdx.x] = sum;
    }
}
GM_INSTANCES(gradient_norm, (f32), (f64))

// average <- average + rest (w - average), with rest = 1 - beta of each model. A model whose valid or ok is 0 made no step,
// and is left alone; null: all made one.
template <typename T>
GM_KERNEL void average(T* mean, const T* w, i64 stride, i64 n, const T* rest, const i32* valid, const i32* ok,
                       i32 models) {
    constexpr int V = NEIGHBOURS;
    const bool quads = in_quads(mean, stride, models) && in_quads(w, stride, models);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        if ((valid && valid[m] == 0) || (ok && ok[m] == 0)) continue;
        const T share = rest[m];
        for (i64 k = first_element(); k < n; k += element_step()) {
            const i64 at = m * stride + k;
            const int some = int(gm_at_most(n - k, i64(V)));
            T average[V], weight[V];
            gm_load_some(mean + at, average, some, quads);
            gm_load_some(w + at, weight, some, quads);
#pragma unroll
            for (int i = 0; i < V; ++i) average[i] += share * (weight[i] - average[i]);
            gm_store_some(mean + at, average, some, quads);
        }
    }
}
GM_INSTANCES(average, (f32), (f64))

// g <- g + the gradient of the penalties.
template <typename T>
GM_KERNEL void penalize(T* g, const T* w, i64 stride, i64 n_weights, const T* l1, const T* l2, i32 models) {
    constexpr int V = NEIGHBOURS;
    const bool quads = in_quads(g, stride, models) && in_quads(w, stride, models);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const T of_l1 = of_model(l1, m, T(0)), of_l2 = of_model(l2, m, T(0));
        for (i64 k = first_element(); k < n_weights; k += element_step()) {
            const i64 at = m * stride + k;
            const int some = int(gm_at_most(n_weights - k, i64(V)));
            T weight[V], gradient[V];
            gm_load_some(w + at, weight, some, quads);
            gm_load_some(g + at, gradient, some, quads);
#pragma unroll
            for (int i = 0; i < V; ++i) gradient[i] += penalty_grad(weight[i], of_l1, of_l2);
            gm_store_some(g + at, gradient, some, quads);
        }
    }
}
GM_INSTANCES(penalize, (f32), (f64))
