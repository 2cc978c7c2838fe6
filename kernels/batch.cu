// A batch on its way into the network: gathered, cast, standardised, augmented. The definitions are the verbs of
// gpumlp/backends/numpy_backend.py and the rows of gpumlp/augment.py.
// Blocks are one-dimensional; grid.x deals out rows or elements, grid.y models.

// --- rows in pieces

// Elements that a thread takes at once: 16 bytes of the wider type. The narrower one then comes in fewer bytes, but
// neighbouring threads always take neighbouring bytes of both.
template <typename S, typename T> GM_DEVICE constexpr int piece_size() {
    return 16 / int(sizeof(S) > sizeof(T) ? sizeof(S) : sizeof(T));
}

// The type that moves `bytes` at once.
template <int bytes> struct MoverOf;
template <> struct MoverOf<1> { typedef u8 type; };
template <> struct MoverOf<2> { typedef u16 type; };
template <> struct MoverOf<4> { typedef u32 type; };
template <> struct MoverOf<8> { typedef u64 type; };
template <> struct MoverOf<16> { typedef Quad type; };
template <int bytes> using Mover = typename MoverOf<(bytes < 16 ? bytes : 16)>::type;

// N elements, a power of two, at p: a multiple of their bytes, or of 16 where they are more.
template <int N, typename T> GM_DEVICE void load_piece(const T* p, Compute<T> (&v)[N]) {
    typedef Mover<N * sizeof(T)> Part;
    alignas(16) T held[N];
#pragma unroll
    for (int i = 0; i < int(sizeof held / sizeof(Part)); ++i)
        reinterpret_cast<Part*>(held)[i] = reinterpret_cast<const Part*>(p)[i];
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = gm_widen(held[i]);
}
template <int N, typename T> GM_DEVICE void store_piece(T* p, const Compute<T> (&v)[N]) {
    if constexpr (N * sizeof(T) >= 16) {
        gm_store_quads(p, v);
    } else {
        typedef Mover<N * sizeof(T)> Whole;
        alignas(16) T held[N];
#pragma unroll
        for (int i = 0; i < N; ++i) gm_narrow(v[i], held[i]);
        *reinterpret_cast<Whole*>(p) = *reinterpret_cast<Whole*>(held);
    }
}

// N elements of S as numbers that they are computed with.
template <int N, typename S, typename C> GM_DEVICE void load_cast(const S* p, C (&v)[N]) {
    Compute<S> raw[N];
    load_piece(p, raw);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = C(raw[i]);
}

// Which rows a thread has a part in, and which of their pieces: first, first + step, ...
struct Share {
    i64 row, row_step;
    i32 first, step;
};

// A row belongs to as many neighbouring threads, a power of two, as cover it: few for narrow rows, so that none idles; a warp
// at most, or a block where there are that many threads for each row: a small batch waits for memory, not for its width.
GM_DEVICE Share share_of_rows(i64 pieces, i64 rows) {
    int bits = 5;
    while (blockDim.x % (2u << bits) == 0 && (rows << (bits + 1)) <= threads_of_grid()) ++bits;
    while (bits > 0 && (i64(1) << (bits - 1)) >= pieces) --bits;
    i64 thread = thread_of_grid();
    return {thread >> bits, threads_of_grid() >> bits, i32(thread & ((1 << bits) - 1)), 1 << bits};
}

// v <- (v - shift) * scale for the columns from c on; shift null: nothing.
template <int N, typename C> GM_DEVICE void standardize_piece(C (&v)[N], const C* shift, const C* scale, i64 c) {
    if (!shift) return;
    C by[N], times[N];
    load_piece(shift + c, by);
    load_piece(scale + c, times);
#pragma unroll
    for (int i = 0; i < N; ++i) v[i] = (v[i] - by[i]) * times[i];
}

// --- gather

// One row of x from one of X. Here and below nothing is unrolled: a store might change what the next load reads, so loads do
// not come earlier by it, and it takes registers.
template <int N, typename S, typename T>
GM_DEVICE void gather_row(const S* from, T* to, i32 n, const Compute<T>* shift, const Compute<T>* scale, Share share) {
#pragma unroll 1
    for (i32 c = share.first * N; c < n; c += share.step * N) {
        Compute<T> v[N];
        load_cast(from + c, v);
        standardize_piece(v, shift, scale, c);
        store_piece(to + c, v);
    }
}

template <typename T> GM_DEVICE void clear_row(T* to, i32 n, Share share) {
#pragma unroll 1
    for (i32 c = share.first; c < n; c += share.step) gm_store(to + c, Compute<T>(0));
}

// Row r of model m is sample order[m, o + r], o = step[0] * batch_size, or sample o + r where there is no order.
struct Order {
    const i64* order;
    i64 stride, offset;
    GM_DEVICE i64 sample(i32 m, i64 r) const { return order ? order[m * stride + offset + r] : offset + r; }
};

template <typename S, typename T> GM_DEVICE void gather_inputs(
    const S* X, Order order, const i32* valid, T* x, i64 x_stride, i64 features,
    const Compute<T>* shift, const Compute<T>* scale, i64 scaling_stride, i32 models, i32 batch) {
    constexpr int N = piece_size<S, T>();
    bool pieces = features % N == 0 && x_stride % N == 0 && scaling_stride % N == 0 && gm_aligned(X) && gm_aligned(x) &&
                  gm_aligned(shift) && gm_aligned(scale);
    Share share = share_of_rows(pieces ? features / N : features, batch);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        const Compute<T>* own_shift = shift ? shift + m * scaling_stride : nullptr;
        const Compute<T>* own_scale = scale + m * scaling_stride;
        i64 rows = valid ? valid[m] : batch;
        for (i64 r = share.row; r < batch; r += share.row_step) {
            T* to = x + m * x_stride + r * features;
            if (r >= rows) {
                clear_row(to, i32(features), share);
                continue;
            }
            const S* from = X + order.sample(m, r) * features;
            if (pieces) {
                gather_row<N>(from, to, i32(features), own_shift, own_scale, share);
            } else {
                gather_row<1>(from, to, i32(features), own_shift, own_scale, share);
            }
        }
    }
}

template <typename C> GM_DEVICE void gather_targets(
    Order order, const i32* valid, const i64* labels, i64* labels_out, const C* values, C* values_out, i64 outputs,
    i64 targets_stride, const C* shift, const C* scale, i64 scaling_stride, const C* weight, C* weights_out,
    i64 weights_stride, i32 models, i32 batch) {
    Share share = share_of_rows(outputs, batch);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        i64 rows = valid ? valid[m] : batch;
        for (i64 r = share.row; r < batch; r += share.row_step) {
            bool counts = r < rows;
            i64 i = counts ? order.sample(m, r) : 0;
            if (labels && share.first == 0) labels_out[m * targets_stride + r] = counts ? labels[i] : 0;
            if (weight && share.first == 0) weights_out[m * weights_stride + r] = counts ? weight[i] : C(0);
#pragma unroll 1
            for (i64 k = share.first; values && k < outputs; k += share.step) {
                C v[1] = {counts ? values[i * outputs + k] : C(0)};
                if (counts) standardize_piece(v, shift, scale, m * scaling_stride + k);
                values_out[m * targets_stride + r * outputs + k] = v[0];
            }
        }
    }
}

template <typename S, typename T> GM_KERNEL void gather(
    const S* X, const i64* order, i64 order_stride, const i64* step, i64 batch_size, const i32* valid,
    T* x, i64 x_stride, i64 features, const Compute<T>* shift, const Compute<T>* scale, i64 scaling_stride,
    const i64* labels, i64* labels_out, const Compute<T>* values, Compute<T>* values_out, i64 outputs, i64 targets_stride,
    const Compute<T>* target_shift, const Compute<T>* target_scale, i64 target_scaling_stride,
    const Compute<T>* weight, Compute<T>* weights_out, i64 weights_stride, i32 models, i32 batch) {
    Order rows = {order, order_stride, step[0] * batch_size};
    gather_inputs(X, rows, valid, x, x_stride, features, shift, scale, scaling_stride, models, batch);
    gather_targets(rows, valid, labels, labels_out, values, values_out, outputs, targets_stride, target_shift, target_scale,
                   target_scaling_stride, weight, weights_out, weights_stride, models, batch);
}
GM_INSTANCES(gather,
    (u8, f32), (i8, f32), (i16, f32), (u16, f32), (i32, f32), (i64, f32), (f16, f32), (f32, f32), (f64, f32),
    (u8, f64), (i8, f64), (i16, f64), (u16, f64), (i32, f64), (i64, f64), (f16, f64), (f32, f64), (f64, f64),
    (u8, bf16), (i8, bf16), (i16, bf16), (u16, bf16), (i32, bf16), (i64, bf16), (f16, bf16), (f32, bf16), (f64, bf16))

// --- cast, standardize, find_nonfinite

template <int N, typename S, typename T> GM_DEVICE void cast_piece(const S* in, T* out) {
    Compute<T> v[N];
    load_cast(in, v);
    store_piece(out, v);
}

// out <- in, n contiguous elements of each model.
template <typename S, typename T> GM_KERNEL void cast(const S* in, i64 in_stride, T* out, i64 out_stride, i64 n, i32 models) {
    constexpr int N = piece_size<S, T>();
    bool pieces = in_stride % N == 0 && out_stride % N == 0 && gm_aligned(in) && gm_aligned(out);
    i64 whole = pieces ? n / N * N : 0, thread = thread_of_grid(), threads = threads_of_grid();
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        const S* from = in + m * in_stride;
        T* to = out + m * out_stride;
#pragma unroll 1
        for (i64 e = thread * N; e < whole; e += threads * N) cast_piece<N>(from + e, to + e);
#pragma unroll 1
        for (i64 e = whole + thread; e < n; e += threads) cast_piece<1>(from + e, to + e);
    }
}
GM_INSTANCES(cast,
    (u8, f32), (i8, f32), (u16, f32), (i16, f32), (u32, f32), (i32, f32), (u64, f32), (i64, f32),
    (f16, f32), (bf16, f32), (f32, f32), (f64, f32),
    (u8, f64), (i8, f64), (u16, f64), (i16, f64), (u32, f64), (i32, f64), (u64, f64), (i64, f64),
    (f16, f64), (bf16, f64), (f32, f64), (f64, f64),
    (u8, bf16), (i8, bf16), (u16, bf16), (i16, bf16), (u32, bf16), (i32, bf16), (u64, bf16), (i64, bf16),
    (f16, bf16), (bf16, bf16), (f32, bf16), (f64, bf16))

template <int N, typename T>
GM_DEVICE void standardize_row(T* x, i32 n, const Compute<T>* shift, const Compute<T>* scale, Share share) {
#pragma unroll 1
    for (i32 c = share.first * N; c < n; c += share.step * N) {
        Compute<T> v[N];
        load_piece(x + c, v);
        standardize_piece(v, shift, scale, c);
        store_piece(x + c, v);
    }
}

// x <- (x - shift) * scale.
template <typename T> GM_KERNEL void standardize(
    T* x, i64 x_stride, i64 features, const Compute<T>* shift, const Compute<T>* scale, i64 scaling_stride,
    i32 models, i64 batch) {
    constexpr int N = piece_size<T, T>();
    bool pieces = features % N == 0 && x_stride % N == 0 && scaling_stride % N == 0 && gm_aligned(x) &&
                  gm_aligned(shift) && gm_aligned(scale);
    Share share = share_of_rows(pieces ? features / N : features, batch);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        const Compute<T>*own_shift = shift + m * scaling_stride, *own_scale = scale + m * scaling_stride;
        for (i64 r = share.row; r < batch; r += share.row_step) {
            T* row = x + m * x_stride + r * features;
            if (pieces) {
                standardize_row<N>(row, i32(features), own_shift, own_scale, share);
            } else {
                standardize_row<1>(row, i32(features), own_shift, own_scale, share);
            }
        }
    }
}
GM_INSTANCES(standardize, (f32), (f64), (bf16))

// first <- the smallest index of a NaN, an infinity or a number beyond the largest; the caller sets it to 2^64 - 1 before.
template <typename T> GM_KERNEL void find_nonfinite(const T* x, i64 n, Compute<T> largest, u64* first) {
    constexpr int N = piece_size<T, T>();
    bool quads = gm_aligned(x);
    for (i64 e = thread_of_grid() * N; e < n; e += threads_of_grid() * N) {
        Compute<T> v[N];
        gm_load_some(x + e, v, int(n - e < N ? n - e : N), quads);
        int found = N;
#pragma unroll
        for (int i = N - 1; i >= 0; --i)
            if (!(gm_fabs(v[i]) <= largest)) found = i;  // NaN is no number that is smaller
        if (found < N) {
            atomicMin(first, u64(e + found));
            return;  // what follows is larger
        }
    }
}
GM_INSTANCES(find_nonfinite, (f16), (f32), (f64), (bf16))

// --- augmentation

// x <- x + std * normal over the rows that count: element e of a model's x takes draw e of its stream.
template <typename T> GM_KERNEL void noise(
    T* x, i64 x_stride, i64 features, const u64* seeds, const u64* streams, const u64* steps, const i32* valid,
    Compute<T> std, i32 models, i64 batch) {
    constexpr int N = 16 / sizeof(T) < 4 ? 4 : int(16 / sizeof(T));  // whole Philox blocks, of four draws each
    bool quads = gm_aligned(x) && gm_aligned_stride<T>(x_stride);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        PhiloxStream stream = {seeds[m], PURPOSE_NOISE, steps[m], streams[m], 0};
        i64 n = (valid ? valid[m] : batch) * features;
        for (i64 e = thread_of_grid() * N; e < n; e += threads_of_grid() * N) {
            int some = int(n - e < N ? n - e : N);
            T* here = x + m * x_stride + e;
            Compute<T> v[N];
            gm_load_some(here, v, some, quads);
#pragma unroll
            for (int block = 0; block < N / 4; ++block) {
                Compute<T> normals[4];
                philox_normals(stream, u64(e / 4 + block), normals);
#pragma unroll
                for (int i = 0; i < 4; ++i) v[4 * block + i] += std * normals[i];
            }
            gm_store_some(here, v, some, quads);
        }
    }
}
GM_INSTANCES(noise, (f32), (f64), (bf16))

// a <- lambda a + (1 - lambda) b and b <- lambda b + (1 - lambda) a at once.
template <int N, typename T> GM_DEVICE void mix_rows(T* a, T* b, i32 n, Compute<T> lambda, Share share) {
    typedef Compute<T> C;
#pragma unroll 1
    for (i32 c = share.first * N; c < n; c += share.step * N) {
        C of_a[N], of_b[N], new_a[N], new_b[N];
        load_piece(a + c, of_a);
        load_piece(b + c, of_b);
#pragma unroll
        for (int i = 0; i < N; ++i) {
            new_a[i] = lambda * of_a[i] + (C(1) - lambda) * of_b[i];
            new_b[i] = lambda * of_b[i] + (C(1) - lambda) * of_a[i];
        }
        store_piece(a + c, new_a);
        store_piece(b + c, new_b);
    }
}

// Row r and its mirror, counted from the end of the rows that count: the same threads own both, so it works in place. The row
// in the middle of an odd number is its own mirror and stays as it is.
template <typename T> GM_KERNEL void mixup(
    T* x, i64 x_stride, i64 features, Compute<T>* values, i64 outputs, i64 targets_stride,
    Compute<T>* weights, i64 weights_stride, const i32* valid, const Compute<T>* share, i32 models, i64 batch) {
    constexpr int N = piece_size<T, T>();
    bool pieces = features % N == 0 && x_stride % N == 0 && gm_aligned(x);
    Share own = share_of_rows(pieces ? features / N : features, batch / 2);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        i64 rows = valid ? valid[m] : batch;
        for (i64 r = own.row; r < rows / 2; r += own.row_step) {
            i64 mirror = rows - 1 - r;
            T* own_x = x + m * x_stride;
            if (pieces) {
                mix_rows<N>(own_x + r * features, own_x + mirror * features, i32(features), share[m], own);
            } else {
                mix_rows<1>(own_x + r * features, own_x + mirror * features, i32(features), share[m], own);
            }
            Compute<T>* own_values = values + m * targets_stride;
            mix_rows<1>(own_values + r * outputs, own_values + mirror * outputs, i32(outputs), share[m], own);
            if (!weights) continue;
            Compute<T>* own_weights = weights + m * weights_stride;
            mix_rows<1>(own_weights + r, own_weights + mirror, 1, share[m], own);
        }
    }
}
GM_INSTANCES(mixup, (f32), (f64), (bf16))

// out <- in with each image moved by up to `pixels` in each direction, zeros where nothing was; rows that do not count are 0.
// Lane 2r of the stream moves image r along its rows, lane 2r + 1 along its columns: together word r.
template <typename T> GM_KERNEL void shift_images(
    const T* in, T* out, i64 stride, i64 rows, i64 columns, i64 pixels,
    const u64* seeds, const u64* streams, const u64* steps, const i32* valid, i32 models, i64 batch) {
    typedef Compute<T> C;
    i64 size = rows * columns;
    u64 span = u64(2 * pixels + 1);
    Share share = share_of_rows(size, batch);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        PhiloxStream stream = {seeds[m], PURPOSE_SHIFT, steps[m], streams[m], 0};
        i64 counted = valid ? valid[m] : batch;
        for (i64 r = share.row; r < batch; r += share.row_step) {
            u64 word = philox_word(stream, u64(r));
            i64 down = i64(((word & 0xFFFFFFFFu) * span) >> 32) - pixels, right = i64(((word >> 32) * span) >> 32) - pixels;
            const T* image = in + m * stride + r * size;
#pragma unroll 1
            for (i32 e = share.first; e < size; e += share.step) {
                i32 row = e / i32(columns);
                i64 i = row + down, j = e - row * columns + right;
                bool inside = r < counted && i >= 0 && i < rows && j >= 0 && j < columns;
                gm_store(out + m * stride + r * size + e, inside ? gm_load(image + i * columns + j) : C(0));
            }
        }
    }
}
GM_INSTANCES(shift_images, (f32), (f64), (bf16))
