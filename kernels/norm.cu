// Batch and layer normalisation, forward and backward. Definitions: norm_forward and norm_backward of
// gpumlp/backends/numpy_backend.py. As there, a variance is that of the differences from a mean that was summed before;
// what was read for the mean stays in registers where there is room, so that memory is read once.

constexpr int WARPS = GM_THREADS / 32;

template <typename C> constexpr C EPSILON = C(1e-5);  // under the root
template <typename C> constexpr C MOMENTUM = C(0.1);  // share of the batch in the running statistics
template <typename C> GM_DEVICE C inverse_root(C variance) { return C(1) / gm_sqrt(variance + EPSILON<C>); }

// --- sums over rows: a block of (32, 8) threads for 32 columns, a thread with every eighth row of its column

constexpr int HELD_ROWS = 16;            // that a thread has in registers
constexpr int SPAN = WARPS * HELD_ROWS;  // rows that a block has in registers: all of a batch of 128

// A thread's rows of one span, from `first` on; 0 for those from `rows` on.
template <typename T>
GM_DEVICE void load_rows(const T* column, i64 units, i64 first, i64 rows, Compute<T> (&v)[HELD_ROWS]) {
#pragma unroll
    for (int i = 0; i < HELD_ROWS; ++i) {
        const i64 r = first + i * WARPS;
        v[i] = r < rows ? gm_load(column + r * units) : Compute<T>(0);
    }
}

// The sum over the eight threads of a column, in their order; each of them gets it. `held` is shared, of GM_THREADS.
template <typename C> GM_DEVICE C column_sum(C x, C* held) {
    __syncthreads();  // held may still be read from the sum before
    held[threadIdx.y * 32 + threadIdx.x] = x;
    __syncthreads();
    C total = held[threadIdx.x];
    for (u32 y = 1; y < WARPS; ++y) total += held[y * 32 + threadIdx.x];
    return total;
}

// Mean and variance of a column over its first `rows` rows; `count` is their number, but never 0. Where there is one span
// alone, v is left with it.
template <typename T, typename C>
GM_DEVICE void column_moments(const T* column, i64 units, i64 rows, i64 count, C (&v)[HELD_ROWS], C& mean, C& variance,
                              C* held) {
    C sum = C(0), squares = C(0);
    for (i64 first = threadIdx.y; first < rows; first += SPAN) {
        load_rows(column, units, first, rows, v);
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) sum += v[i];
    }
    mean = column_sum(sum, held) / C(count);
    for (i64 first = threadIdx.y; first < rows; first += SPAN) {
        if (rows > SPAN) load_rows(column, units, first, rows, v);
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
            const C off = first + i * WARPS < rows ? v[i] - mean : C(0);
            squares += off * off;
        }
    }
    variance = column_sum(squares, held) / C(count);
}

// along = sum of d x_hat and total = sum of d over the first `rows` rows of a column; v and h are left with d and x_hat.
template <typename T, typename C>
GM_DEVICE void column_gradients(const T* d, const T* x_hat, i64 units, i64 rows, C (&v)[HELD_ROWS], C (&h)[HELD_ROWS],
                                C& along, C& total, C* held) {
    along = total = C(0);
    for (i64 first = threadIdx.y; first < rows; first += SPAN) {
        load_rows(d, units, first, rows, v);
        load_rows(x_hat, units, first, rows, h);
#pragma unroll
        for (int i = 0; i < HELD_ROWS; ++i) {
            along += v[i] * h[i];
            total += v[i];
        }
    }
    along = column_sum(along, held);
    total = column_sum(total, held);
}

// --- batch normalisation

template <typename C> GM_DEVICE void move(C& running, C value) {
    running = (C(1) - MOMENTUM<C>) * running + MOMENTUM<C> * value;
}

// x_hat = (x - mean) / sqrt(variance + epsilon), out = gamma x_hat + beta, over the valid rows; both are 0 in the others.
// Training, mean and variance are the batch's, and the running ones move towards them if asked to; else they are the
// running ones. x_hat may be x. The grid is (tiles of 32 columns, models).
template <typename T>
GM_KERNEL void batch_norm_forward(const T* x, T* x_hat, T* out, i64 stride, Compute<T>* inverse_std, i64 std_stride,
                                  const Compute<T>* gamma, const Compute<T>* beta, i64 parameter_stride,
                                  Compute<T>* running_mean, Compute<T>* running_variance, i64 running_stride,
                                  const i32* valid, i32 training, i32 update_running, i32 models, i64 batch, i64 units) {
    typedef Compute<T> C;
    GM_SHARED(C, held, GM_THREADS);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 n = valid == nullptr ? batch : i64(valid[m]);
        for (i64 tile = i64(blockIdx.x) * 32; tile < units; tile += i64(gridDim.x) * 32) {
            const bool exists = tile + threadIdx.x < units;  // a thread beside the last column goes along without rows
            const i64 column = exists ? tile + threadIdx.x : 0, rows = exists ? n : 0;
            const i64 at = m * stride + column, parameter = m * parameter_stride + column;
            const i64 kept = m * running_stride + column;
            C v[HELD_ROWS] = {}, mean, variance;
            if (training) {
                column_moments(x + at, units, rows, gm_at_least(n, i64(1)), v, mean, variance, held);
                // One row alone has no variance to learn from.
                // A model that diverges is left as it was.
                const bool moves = gm_finite(mean) && gm_finite(variance);
                if (update_running && n > 1 && exists && threadIdx.y == 0 && moves) {
                    move(running_mean[kept], mean);
                    move(running_variance[kept], variance * (C(n) / C(n - 1)));
                }
            } else {
                mean = running_mean[kept];
                variance = running_variance[kept];
            }
            const C inverse = inverse_root(variance), slope = gamma[parameter], offset = beta[parameter];
            if (exists && threadIdx.y == 0) inverse_std[m * std_stride + column] = inverse;
            for (i64 first = threadIdx.y; exists && first < batch; first += SPAN) {
                if (!training || batch > SPAN) load_rows(x + at, units, first, rows, v);
#pragma unroll
                for (int i = 0; i < HELD_ROWS; ++i) {
                    const i64 r = first + i * WARPS;
                    if (r >= batch) break;
                    const C hat = r < rows ? (v[i] - mean) * inverse : C(0);
                    gm_store(x_hat + at + r * units, hat);
                    gm_store(out + at + r * units, r < rows ? hat * slope + offset : C(0));
                }
            }
        }
    }
}
GM_INSTANCES(batch_norm_forward, (f32), (f64), (bf16))

// dgamma = sum of d x_hat, dbeta = sum of d, d becomes gamma / std (d - mean of d - x_hat mean of d x_hat), over the valid
// rows; 0 in the others. The grid is (tiles of 32 columns, models).
template <typename T>
GM_KERNEL void batch_norm_backward(T* d, const T* x_hat, i64 stride, const Compute<T>* inverse_std, i64 std_stride,
                                   const Compute<T>* gamma, Compute<T>* dgamma, Compute<T>* dbeta, i64 parameter_stride,
                                   const i32* valid, i32 models, i64 batch, i64 units) {
    typedef Compute<T> C;
    GM_SHARED(C, held, GM_THREADS);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 n = valid == nullptr ? batch : i64(valid[m]);
        for (i64 tile = i64(blockIdx.x) * 32; tile < units; tile += i64(gridDim.x) * 32) {
            const bool exists = tile + threadIdx.x < units;
            const i64 column = exists ? tile + threadIdx.x : 0, rows = exists ? n : 0;
            const i64 at = m * stride + column, parameter = m * parameter_stride + column;
            C v[HELD_ROWS] = {}, h[HELD_ROWS] = {}, along, total;
            column_gradients(d + at, x_hat + at, units, rows, v, h, along, total, held);
            if (exists && threadIdx.y == 0) {
                dgamma[parameter] = along;
                dbeta[parameter] = total;
            }
            const C slope = gamma[parameter] * inverse_std[m * std_stride + column];
            along /= C(gm_at_least(n, i64(1)));
            total /= C(gm_at_least(n, i64(1)));
            for (i64 first = threadIdx.y; exists && first < batch; first += SPAN) {
                if (batch > SPAN) {
                    load_rows(d + at, units, first, rows, v);
                    load_rows(x_hat + at, units, first, rows, h);
                }
#pragma unroll
                for (int i = 0; i < HELD_ROWS; ++i) {
                    const i64 r = first + i * WARPS;
                    if (r >= batch) break;
                    gm_store(d + at + r * units, r < rows ? (v[i] - total - h[i] * along) * slope : C(0));
                }
            }
        }
    }
}
GM_INSTANCES(batch_norm_backward, (f32), (f64), (bf16))

// --- layer normalisation: some lanes of a warp for a short row, a warp up to 1024 units, a block for a longer row
//
// A thread has pieces of W elements: 16 bytes where all rows begin at 16 bytes, else one element.

constexpr int FEWEST_LANES = 4;
constexpr int MOST_HELD = 16;
constexpr i64 WARP_UNITS = 1024;
template <typename T> constexpr int QUAD = 16 / int(sizeof(T));  // elements of 16 bytes

// Elements of a row that a thread has in registers; a row that is longer is read again. Single ones each need an address.
template <int W> constexpr int HELD = W == 1 ? MOST_HELD / 2 : MOST_HELD;

// The threads that share a row.
struct Team {
    int size, rank;
    i64 first, step;  // the first row of a warp's first team, and the way to its next
    int behind;       // how many rows behind that this team's is

    static GM_DEVICE Team of(i64 units) {
        const int thread = int(threadIdx.x + blockDim.x * threadIdx.y), threads = int(blockDim.x * blockDim.y);
        if (units > WARP_UNITS) return {threads, thread, i64(blockIdx.x), i64(gridDim.x), 0};
        int size = FEWEST_LANES;
        while (size < 32 && size * MOST_HELD < units) size *= 2;
        const i64 warp = (i64(blockIdx.x) * threads + thread) / 32, warps = i64(gridDim.x) * threads / 32;
        return {size, thread % size, warp * (32 / size), warps * (32 / size), thread % 32 / size};
    }
    template <int W> GM_DEVICE i64 span() const { return i64(size) * HELD<W>; }  // elements that they hold together
    template <int W> GM_DEVICE int place(int i) const { return i * size + rank * W; }  // of the thread's piece from i on
    template <typename C> GM_DEVICE C sum(C x, C* held) const {
        if (size > 32) return gm_block_sum(x, held);
        for (int distance = size / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
        return x;
    }
};

template <int W, typename T> GM_DEVICE void load_piece(const T* p, Compute<T> (&v)[W]) {
    if constexpr (W == 1) v[0] = gm_load(p);
    else gm_load_quads(p, v);
}
template <int W, typename T> GM_DEVICE void store_piece(T* p, const Compute<T> (&v)[W]) {
    if constexpr (W == 1) gm_store(p, v[0]);
    else gm_store_quads(p, v);
}

// The thread's elements of a span that begins at p, of which `left` exist; 0 for the others. Nothing here waits for what it
// loads: all of a row is then on its way at once.
template <int W, typename T> GM_DEVICE void load_span(const Team& team, const T* p, i64 left, Compute<T> (&v)[HELD<W>]) {
#pragma unroll
    for (int i = 0; i < HELD<W>; i += W) {
        Compute<T> piece[W] = {};
        if (team.place<W>(i) < left) load_piece(p + team.place<W>(i), piece);
#pragma unroll
        for (int j = 0; j < W; ++j) v[i + j] = piece[j];
    }
}

// f(i, place) for each of the thread's pieces in such a span: its elements from i on.
template <int W, typename F> GM_DEVICE void each_piece(const Team& team, i64 left, F f) {
#pragma unroll
    for (int i = 0; i < HELD<W>; i += W) {
        if (i64(i) * team.size >= left) break;
        if (team.place<W>(i) < left) f(i, team.place<W>(i));
    }
}

// One row, x_hat and out as below; returns 1 / std. A team without a row, whose units are 0, goes along for the sums.
template <int W, typename T, typename C>
GM_DEVICE C layer_norm_row(const Team& team, const T* x, T* x_hat, T* out, const C* gamma, const C* beta, i64 units,
                           C* held) {
    const i64 span = team.span<W>();
    C v[HELD<W>], sum = C(0), squares = C(0);
    for (i64 start = 0; start < units; start += span) {
        load_span<W>(team, x + start, units - start, v);
#pragma unroll
        for (int i = 0; i < HELD<W>; ++i) sum += v[i];
    }
    const C mean = team.sum(sum, held) / C(units);
    for (i64 start = 0; start < units; start += span) {
        if (units > span) load_span<W>(team, x + start, units - start, v);
        each_piece<W>(team, units - start, [&](int i, int) {
#pragma unroll
            for (int j = 0; j < W; ++j) squares += (v[i + j] - mean) * (v[i + j] - mean);
        });
    }
    const C inverse = inverse_root(team.sum(squares, held) / C(units));
    for (i64 start = 0; start < units; start += span) {
        if (units > span) load_span<W>(team, x + start, units - start, v);
        each_piece<W>(team, units - start, [&](int i, int place) {
            C hat[W], slope[W], offset[W];
            load_piece(gamma + start + place, slope);
            load_piece(beta + start + place, offset);
#pragma unroll
            for (int j = 0; j < W; ++j) hat[j] = (v[i + j] - mean) * inverse;
            store_piece(x_hat + start + place, hat);
#pragma unroll
            for (int j = 0; j < W; ++j) hat[j] = hat[j] * slope[j] + offset[j];
            store_piece(out + start + place, hat);
        });
    }
    return inverse;
}

// x_hat = (x - mean) / sqrt(variance + epsilon), out = gamma x_hat + beta, with mean and variance of each row. x_hat may
// be x. The grid is (rows, models); up to 1024 units a block takes at least as many rows at once as it has warps.
template <typename T>
GM_KERNEL void layer_norm_forward(const T* x, T* x_hat, T* out, i64 stride, Compute<T>* inverse_std, i64 std_stride,
                                  const Compute<T>* gamma, const Compute<T>* beta, i64 parameter_stride, i32 models,
                                  i64 batch, i64 units) {
    typedef Compute<T> C;
    GM_SHARED(C, held, 32);
    const Team team = Team::of(units);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 first = m * stride;
        const C *g = gamma + m * parameter_stride, *b = beta + m * parameter_stride;
        const bool quads = gm_aligned_stride<T>(units) && gm_aligned(x + first) && gm_aligned(x_hat + first) &&
                           gm_aligned(out + first) && gm_aligned(g) && gm_aligned(b);
        for (i64 lead = team.first; lead < batch; lead += team.step) {
            const i64 r = lead + team.behind, row = first + r * units, n = r < batch ? units : 0;
            const C inverse = quads ? layer_norm_row<QUAD<T>>(team, x + row, x_hat + row, out + row, g, b, n, held)
                                    : layer_norm_row<1>(team, x + row, x_hat + row, out + row, g, b, n, held);
            if (team.rank == 0 && r < batch) inverse_std[m * std_stride + r] = inverse;
        }
    }
}
GM_INSTANCES(layer_norm_forward, (f32), (f64), (bf16))

// One row, d as below; units as above.
template <int W, typename T, typename C>
GM_DEVICE void layer_norm_gradient_row(const Team& team, T* d, const T* x_hat, C inverse, const C* gamma, i64 units,
                                       C* held) {
    const i64 span = team.span<W>();
    C v[HELD<W>], h[HELD<W>], along = C(0), total = C(0);
    auto load = [&](i64 start) {  // gamma d and x_hat
        load_span<W>(team, d + start, units - start, v);
        load_span<W>(team, x_hat + start, units - start, h);
        each_piece<W>(team, units - start, [&](int i, int place) {
            C slope[W];
            load_piece(gamma + start + place, slope);
#pragma unroll
            for (int j = 0; j < W; ++j) v[i + j] *= slope[j];
        });
    };
    for (i64 start = 0; start < units; start += span) {
        load(start);
#pragma unroll
        for (int i = 0; i < HELD<W>; ++i) {
            along += v[i] * h[i];
            total += v[i];
        }
    }
    along = team.sum(along, held) / C(units);
    total = team.sum(total, held) / C(units);
    for (i64 start = 0; start < units; start += span) {
        if (units > span) load(start);
        each_piece<W>(team, units - start, [&](int i, int place) {
            C piece[W];
#pragma unroll
            for (int j = 0; j < W; ++j) piece[j] = (v[i + j] - total - h[i + j] * along) * inverse;
            store_piece(d + start + place, piece);
        });
    }
}

// d becomes (d' - mean of d' - x_hat mean of d' x_hat) / std with d' = gamma d, means over each row. The grid is as above.
template <typename T>
GM_KERNEL void layer_norm_backward(T* d, const T* x_hat, i64 stride, const Compute<T>* inverse_std, i64 std_stride,
                                   const Compute<T>* gamma, i64 parameter_stride, i32 models, i64 batch, i64 units) {
    typedef Compute<T> C;
    GM_SHARED(C, held, 32);
    const Team team = Team::of(units);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 first = m * stride;
        const C* g = gamma + m * parameter_stride;
        const bool quads =
            gm_aligned_stride<T>(units) && gm_aligned(d + first) && gm_aligned(x_hat + first) && gm_aligned(g);
        for (i64 lead = team.first; lead < batch; lead += team.step) {
            const i64 r = lead + team.behind, row = first + r * units, n = r < batch ? units : 0;
            const C inverse = r < batch ? inverse_std[m * std_stride + r] : C(0);
            if (quads) layer_norm_gradient_row<QUAD<T>>(team, d + row, x_hat + row, inverse, g, n, held);
            else layer_norm_gradient_row<1>(team, d + row, x_hat + row, inverse, g, n, held);
        }
    }
}
GM_INSTANCES(layer_norm_backward, (f32), (f64), (bf16))

// dgamma = sum of d x_hat and dbeta = sum of d over the rows, of d before layer_norm_backward. The grid is (tiles of 32
// columns, models), a block (32, 8) threads.
template <typename T>
GM_KERNEL void layer_norm_parameters(const T* d, const T* x_hat, i64 stride, Compute<T>* dgamma, Compute<T>* dbeta,
                                     i64 parameter_stride, i32 models, i64 batch, i64 units) {
    typedef Compute<T> C;
    GM_SHARED(C, held, GM_THREADS);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        for (i64 tile = i64(blockIdx.x) * 32; tile < units; tile += i64(gridDim.x) * 32) {
            const bool exists = tile + threadIdx.x < units;
            const i64 column = exists ? tile + threadIdx.x : 0, at = m * stride + column;
            C v[HELD_ROWS], h[HELD_ROWS], along, total;
            column_gradients(d + at, x_hat + at, units, exists ? batch : 0, v, h, along, total, held);
            if (!exists || threadIdx.y != 0) continue;
            dgamma[m * parameter_stride + column] = along;
            dbeta[m * parameter_stride + column] = total;
        }
    }
}
GM_INSTANCES(layer_norm_parameters, (f32), (f64), (bf16))
