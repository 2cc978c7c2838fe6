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
                if (update_running && n > 1 && exists && threadIdx.y == 0) {
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

// --- layer normalisation: a warp for a row of up to 1024 units, a block for a longer one

constexpr int HELD = 32;                                         // elements of a row that a thread has in registers
template <typename T> constexpr int QUAD = 16 / int(sizeof(T));  // elements of 16 bytes

// The threads that share a row: a warp or the block.
struct Team {
    bool is_block;
    int size, rank;
    i64 first_row, row_step;

    static GM_DEVICE Team of(i64 units) {
        const int thread = int(threadIdx.x + blockDim.x * threadIdx.y), threads = int(blockDim.x * blockDim.y);
        if (units > 32 * HELD) return {true, threads, thread, i64(blockIdx.x), i64(gridDim.x)};
        return {false, 32, thread % 32, (i64(blockIdx.x) * threads + thread) / 32, i64(gridDim.x) * threads / 32};
    }
    GM_DEVICE i64 span() const { return i64(size) * HELD; }  // elements that they hold together
    template <typename C> GM_DEVICE C sum(C x, C* held) const {
        return is_block ? gm_block_sum(x, held) : gm_warp_sum(x);
    }

    // f(i, at, n) for each 16 bytes that a thread has of a span: its elements i .. i + n - 1 stand at `at` in the rest of
    // the row, which is `left` long.
    template <int W, typename F> GM_DEVICE void each(i64 left, F f) const {
#pragma unroll
        for (int i = 0; i < HELD; i += W) {
            if (i64(i) * size >= left) break;
            const int at = i * size + rank * W;
            f(i, at, int(gm_clip(left - at, i64(0), i64(W))));
        }
    }
};

// x_hat = (x - mean) / sqrt(variance + epsilon), out = gamma x_hat + beta, with mean and variance of each row. x_hat may
// be x. The grid is (rows, models); up to 1024 units a block takes as many rows as it has warps.
template <typename T>
GM_KERNEL void layer_norm_forward(const T* x, T* x_hat, T* out, i64 stride, Compute<T>* inverse_std, i64 std_stride,
                                  const Compute<T>* gamma, const Compute<T>* beta, i64 parameter_stride, i32 models,
                                  i64 batch, i64 units) {
    typedef Compute<T> C;
    constexpr int W = QUAD<T>;
    GM_SHARED(C, held, 32);
    const Team team = Team::of(units);
    const i64 span = team.span();
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 first = m * stride;
        const C *g = gamma + m * parameter_stride, *b = beta + m * parameter_stride;
        const bool parameter_quads = gm_aligned(g) && gm_aligned(b);
        const bool quads = gm_aligned_stride<T>(units) && gm_aligned(x + first) && gm_aligned(x_hat + first) &&
                           gm_aligned(out + first);
        for (i64 r = team.first_row; r < batch; r += team.row_step) {
            const i64 row = first + r * units;
            C v[HELD], part[W], slope[W], offset[W], sum = C(0), squares = C(0);
            auto load = [&](i64 start, int i, int at, int n) {
                gm_load_some(x + row + start + at, part, n, quads);
#pragma unroll
                for (int j = 0; j < W; ++j) v[i + j] = part[j];
            };
            for (i64 start = 0; start < units; start += span)
                team.each<W>(units - start, [&](int i, int at, int n) {
                    load(start, i, at, n);
#pragma unroll
                    for (int j = 0; j < W; ++j) sum += v[i + j];
                });
            const C mean = team.sum(sum, held) / C(units);
            for (i64 start = 0; start < units; start += span)
                team.each<W>(units - start, [&](int i, int at, int n) {
                    if (units > span) load(start, i, at, n);
#pragma unroll
                    for (int j = 0; j < W; ++j) {
                        const C off = j < n ? v[i + j] - mean : C(0);
                        squares += off * off;
                    }
                });
            const C inverse = inverse_root(team.sum(squares, held) / C(units));
            if (team.rank == 0) inverse_std[m * std_stride + r] = inverse;
            for (i64 start = 0; start < units; start += span)
                team.each<W>(units - start, [&](int i, int at, int n) {
                    if (units > span) load(start, i, at, n);
                    gm_load_some(g + start + at, slope, n, parameter_quads);
                    gm_load_some(b + start + at, offset, n, parameter_quads);
#pragma unroll
                    for (int j = 0; j < W; ++j) part[j] = (v[i + j] - mean) * inverse;
                    gm_store_some(x_hat + row + start + at, part, n, quads);
#pragma unroll
                    for (int j = 0; j < W; ++j) part[j] = part[j] * slope[j] + offset[j];
                    gm_store_some(out + row + start + at, part, n, quads);
                });
        }
    }
}
GM_INSTANCES(layer_norm_forward, (f32), (f64), (bf16))

// d becomes (d' - mean of d' - x_hat mean of d' x_hat) / std with d' = gamma d, means over each row. The grid is as above.
template <typename T>
GM_KERNEL void layer_norm_backward(T* d, const T* x_hat, i64 stride, const Compute<T>* inverse_std, i64 std_stride,
                                   const Compute<T>* gamma, i64 parameter_stride, i32 models, i64 batch, i64 units) {
    typedef Compute<T> C;
    constexpr int W = QUAD<T>;
    GM_SHARED(C, held, 32);
    const Team team = Team::of(units);
    const i64 span = team.span();
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 first = m * stride;
        const C* g = gamma + m * parameter_stride;
        const bool parameter_quads = gm_aligned(g);
        const bool quads = gm_aligned_stride<T>(units) && gm_aligned(d + first) && gm_aligned(x_hat + first);
        for (i64 r = team.first_row; r < batch; r += team.row_step) {
            const i64 row = first + r * units;
            C v[HELD], h[HELD], part[W], hat[W], slope[W], along = C(0), total = C(0);  // v: d', h: x_hat
            auto load = [&](i64 start, int i, int at, int n) {
                gm_load_some(d + row + start + at, part, n, quads);
                gm_load_some(x_hat + row + start + at, hat, n, quads);
                gm_load_some(g + start + at, slope, n, parameter_quads);
#pragma unroll
                for (int j = 0; j < W; ++j) {
                    v[i + j] = part[j] * slope[j];
                    h[i + j] = hat[j];
                }
            };
            for (i64 start = 0; start < units; start += span)
                team.each<W>(units - start, [&](int i, int at, int n) {
                    load(start, i, at, n);
#pragma unroll
                    for (int j = 0; j < W; ++j) {
                        along += v[i + j] * h[i + j];
                        total += v[i + j];
                    }
                });
            along = team.sum(along, held) / C(units);
            total = team.sum(total, held) / C(units);
            const C inverse = inverse_std[m * std_stride + r];
            for (i64 start = 0; start < units; start += span)
                team.each<W>(units - start, [&](int i, int at, int n) {
                    if (units > span) load(start, i, at, n);
#pragma unroll
                    for (int j = 0; j < W; ++j) part[j] = (v[i + j] - total - h[i + j] * along) * inverse;
                    gm_store_some(d + row + start + at, part, n, quads);
                });
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
