// What a step of training needs beside the network: its counters, its loss as one number, the order of an epoch's rows, and
// the long vectors of L-BFGS. The definitions are gpumlp/train_step.py, gpumlp/random.py and gpumlp/lbfgs.py.
// Blocks are one-dimensional; grid.y deals out models, except where a block is said to own one.

// Calls f(a[e], b[e]) for the elements of one thread of `threads`; b null: 1. A thread has the same elements in the same order
// whether they lie at 16 bytes or not. Several loads are on their way at once: one block may have a long vector to itself.
template <typename C, typename F> GM_DEVICE void for_pairs(const C* a, const C* b, i64 n, i64 thread, i64 threads, F f) {
    bool quads = gm_aligned(a) && gm_aligned(b);
#pragma unroll 4
    for (i64 q = thread; q < n / 4; q += threads) {
        C of_a[4], of_b[4] = {C(1), C(1), C(1), C(1)};
        gm_load_some(a + 4 * q, of_a, 4, quads);
        if (b) gm_load_some(b + 4 * q, of_b, 4, quads);
#pragma unroll
        for (int i = 0; i < 4; ++i) f(of_a[i], of_b[i]);
    }
    i64 e = n / 4 * 4 + thread;
    if (e < n) f(a[e], b ? b[e] : C(1));
}

// --- counters

// The largest over a block; thread 0 gets it. `held` is shared, of 32 elements.
GM_DEVICE i32 block_largest(i32 x, i32* held) {
    for (int distance = 16; distance > 0; distance >>= 1) {
        i32 other = __shfl_xor_sync(0xFFFFFFFFu, x, distance);
        x = other > x ? other : x;
    }
    if ((threadIdx.x & 31) == 0) held[threadIdx.x >> 5] = x;
    __syncthreads();
    for (u32 i = 0; threadIdx.x == 0 && i < blockDim.x >> 5; ++i) x = held[i] > x ? held[i] : x;
    return x;
}

// by = 1 ends a step and sets up the next one, by = 0 only sets up the present one. One block.
//
// `step` holds the position in the epoch and the position of the table's first step. A model that had rows and a finite
// loss has made a step of its own; it has rows in this one while it is active and its epoch has some left.
template <typename C> GM_KERNEL void advance(
    i64* step, i64 by, i64 batch_size, const i64* counts, const i32* active, i32* valid, const i32* ok, u64* steps,
    const C* table, i64 table_rows, i64 table_steps, C* current, i32 models) {
    GM_SHARED(i32, held, 32);
    i64 position = step[0] + by, t = gm_clip(position - step[1], i64(0), table_steps - 1);
    i32 largest = 0;
    for (i32 m = threadIdx.x; m < models; m += blockDim.x) {
        if (by && valid[m] > 0 && ok[m]) steps[m] += 1;
        i64 left = gm_clip(counts[m] - position * batch_size, i64(0), batch_size);
        i32 rows = active[m] ? i32(left) : 0;
        valid[m] = rows;
        largest = rows > largest ? rows : largest;
    }
    for (i64 i = threadIdx.x; i < table_rows * models; i += blockDim.x) {
        i64 k = i / models, m = i % models;
        current[i] = table[(k * table_steps + t) * models + m];
    }
    largest = block_largest(largest, held);  // behind its barrier every thread has read step[0]
    if (threadIdx.x == 0) {
        step[0] = position;
        valid[models] = largest;
    }
}
GM_INSTANCES(advance, (f32), (f64))

// --- the loss of a batch: a block to a model

GM_DEVICE i32 block_of_grid() { return i32(blockIdx.x + gridDim.x * blockIdx.y); }
GM_DEVICE i32 blocks_of_grid() { return i32(gridDim.x * gridDim.y); }

// The mean sum(w l) / sum(w) of the rows that count, and what follows from it: a model whose mean is not finite stops, and
// one without rows has no part in this step. Weights that are all zero give the mean 0.
template <typename C> GM_KERNEL void loss_total(
    const C* row_loss, i64 row_stride, const C* weights, i64 weights_stride, const i32* valid, const i64* step,
    f64* losses, f64* log_weights, i64 log_stride, i32* ok, i32* active, i64* diverged_at, i32 models) {
    GM_SHARED(f64, held, 32);
    i64 position = step[0];
    for (i32 m = block_of_grid(); m < models; m += blocks_of_grid()) {
        f64 loss = 0, total = 0;
        const C* own_weights = weights ? weights + m * weights_stride : nullptr;
        for_pairs(row_loss + m * row_stride, own_weights, valid[m], threadIdx.x, blockDim.x, [&](C l, C w) {
            loss += f64(w) * f64(l);
            total += f64(w);
        });
        loss = gm_block_sum(loss, held);
        total = gm_block_sum(total, held);
        if (threadIdx.x != 0) continue;
        f64 mean = loss / (total > 0 ? total : f64(1));
        bool fine = gm_finite(mean);
        ok[m] = valid[m] > 0 && fine;
        if (valid[m] == 0) continue;
        losses[m * log_stride + position] = mean;
        log_weights[m * log_stride + position] = total;
        if (fine) continue;
        active[m] = 0;
        diverged_at[m] = position;
    }
}
GM_INSTANCES(loss_total, (f32), (f64))

// total <- the sum of the weights of the rows that count.
template <typename C> GM_KERNEL void weight_total(
    const C* weights, i64 weights_stride, const i32* valid, C* total, i32 models) {
    GM_SHARED(C, held, 32);
    for (i32 m = block_of_grid(); m < models; m += blocks_of_grid()) {
        C sum = 0;
        const C* none = nullptr;
        for_pairs(weights + m * weights_stride, none, valid[m], threadIdx.x, blockDim.x, [&](C w, C) { sum += w; });
        sum = gm_block_sum(sum, held);
        if (threadIdx.x == 0) total[m] = sum;
    }
}
GM_INSTANCES(weight_total, (f32), (f64))

// --- the order of an epoch: random.permutation, which is the stable argsort of random words
//
// A bitonic sort of `stride` pairs (key, index), a power of two: for size = 2, 4, ..., stride, for distance = size / 2, ...,
// 2, 1, pairs that lie `distance` apart are put in order, upwards where size is not in the first one's position. As indices
// differ, so do pairs, and the order is the one that a stable sort of the keys gives.

constexpr int SORT_TILE = 1024;  // pairs that a block sorts in shared memory

// Words of the epoch's stream with their numbers; what fills up to the power of two comes last.
GM_KERNEL void shuffle_words(
    u64* keys, i64* index, i64 stride, const i64* counts, const u64* seeds, const u64* streams, u64 epoch, i32 models) {
    bool quads = gm_aligned(keys) && gm_aligned(index) && gm_aligned_stride<u64>(stride);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        PhiloxStream stream = {seeds[m], PURPOSE_SHUFFLE, epoch, streams[m], 0};
        for (i64 i = thread_of_grid() * 4; i < stride; i += threads_of_grid() * 4) {
            int some = int(stride - i < 4 ? stride - i : 4);
            u64 words[4];
            i64 numbers[4];
            philox_block(stream, u64(i / 4), words);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                numbers[j] = i + j;
                if (i + j >= counts[m]) words[j] = ~u64(0);
            }
            gm_store_some(keys + m * stride + i, words, some, quads);
            gm_store_some(index + m * stride + i, numbers, some, quads);
        }
    }
}
GM_INSTANCES(shuffle_words)

// The first of the two positions that comparison t is about.
GM_DEVICE i64 first_of_pair(i64 t, i64 distance) { return ((t & ~(distance - 1)) << 1) | (t & (distance - 1)); }

GM_DEVICE void put_in_order(u64* keys, i64* index, i64 i, i64 j, bool upwards) {
    u64 key_i = keys[i], key_j = keys[j];
    i64 index_i = index[i], index_j = index[j];
    bool after = key_i > key_j || (key_i == key_j && index_i > index_j);
    if (after != upwards) return;
    keys[i] = key_j;
    keys[j] = key_i;
    index[i] = index_j;
    index[j] = index_i;
}

// The pass of one size and distance.
GM_KERNEL void sort_pass(u64* keys, i64* index, i64 stride, i64 size, i64 distance, i32 models) {
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        for (i64 t = thread_of_grid(); t < stride / 2; t += threads_of_grid()) {
            i64 i = first_of_pair(t, distance);
            put_in_order(keys + m * stride, index + m * stride, i, i + distance, (i & size) == 0);
        }
    }
}
GM_INSTANCES(sort_pass)

// For size = first_size, 2 first_size, ..., last_size: all its passes with distances that stay within a tile.
GM_KERNEL void sort_local(u64* keys, i64* index, i64 stride, i64 first_size, i64 last_size, i32 models) {
    GM_SHARED(u64, own_keys, SORT_TILE);
    GM_SHARED(i64, own_index, SORT_TILE);
    i64 tile = stride < SORT_TILE ? stride : SORT_TILE;
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        for (i64 start = blockIdx.x * tile; start < stride; start += gridDim.x * tile) {
            i64 at = m * stride + start;
            for (i64 i = threadIdx.x; i < tile; i += blockDim.x) {
                own_keys[i] = keys[at + i];
                own_index[i] = index[at + i];
            }
            for (i64 size = first_size; size <= last_size; size *= 2) {
                for (i64 distance = (size < tile ? size : tile) / 2; distance > 0; distance /= 2) {
                    __syncthreads();
                    for (i64 t = threadIdx.x; t < tile / 2; t += blockDim.x) {
                        i64 i = first_of_pair(t, distance);
                        put_in_order(own_keys, own_index, i, i + distance, ((start + i) & size) == 0);
                    }
                }
            }
            __syncthreads();
            for (i64 i = threadIdx.x; i < tile; i += blockDim.x) {  // as above: each thread then loads over what it stored
                keys[at + i] = own_keys[i];
                index[at + i] = own_index[i];
            }
        }
    }
}
GM_INSTANCES(sort_local)

// order[m, i] = rows[m, index[m, i]] for the rows that the model has.
GM_KERNEL void take_rows(
    const i64* rows, i64 rows_stride, const i64* index, i64 index_stride, i64* order, i64 order_stride, const i64* counts,
    i32 models) {
    bool quads = gm_aligned(index) && gm_aligned(order) && gm_aligned_stride<i64>(index_stride) &&
                 gm_aligned_stride<i64>(order_stride);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        const i64* own_rows = rows + m * rows_stride;
        i64 n = counts[m];
        for (i64 i = thread_of_grid() * 4; i < n; i += threads_of_grid() * 4) {
            int some = int(n - i < 4 ? n - i : 4);
            i64 v[4];
            gm_load_some(index + m * index_stride + i, v, some, quads);
#pragma unroll
            for (int j = 0; j < 4; ++j)
                if (j < some) v[j] = own_rows[v[j]];
            gm_store_some(order + m * order_stride + i, v, some, quads);
        }
    }
}
GM_INSTANCES(take_rows)

// --- the vectors of L-BFGS

// partial[m, block] = the block's share of the sum of a b, or of |a| where b is null.
template <typename T> GM_KERNEL void dot(
    const T* a, i64 a_stride, const T* b, i64 b_stride, i64 n, f64* partial, i32 models) {
    GM_SHARED(f64, held, 32);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        f64 sum = 0;
        const T* own_b = b ? b + m * b_stride : nullptr;
        for_pairs(a + m * a_stride, own_b, n, thread_of_grid(), threads_of_grid(), [&](T x, T y) {
            sum += b ? f64(x) * f64(y) : gm_fabs(f64(x));
        });
        sum = gm_block_sum(sum, held);
        if (threadIdx.x == 0) partial[i64(m) * gridDim.x + blockIdx.x] = sum;
    }
}
GM_INSTANCES(dot, (f32), (f64))

// out <- alpha[m] x + beta[m] y; alpha or beta null: 1, y null: no second term. out may be x or y.
template <typename T> GM_KERNEL void combine(
    T* out, i64 out_stride, const T* alpha, const T* x, i64 x_stride, const T* beta, const T* y, i64 y_stride, i64 n,
    i32 models) {
    bool quads = gm_aligned(out) && gm_aligned(x) && gm_aligned(y) && gm_aligned_stride<T>(out_stride) &&
                 gm_aligned_stride<T>(x_stride) && gm_aligned_stride<T>(y_stride);
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        T times_x = alpha ? alpha[m] : T(1), times_y = beta ? beta[m] : T(1);
        for (i64 e = thread_of_grid() * 4; e < n; e += threads_of_grid() * 4) {
            int some = int(n - e < 4 ? n - e : 4);
            T of_x[4], of_y[4];
            gm_load_some(x + m * x_stride + e, of_x, some, quads);
            if (y) gm_load_some(y + m * y_stride + e, of_y, some, quads);
#pragma unroll
            for (int i = 0; i < 4; ++i) of_x[i] = times_x * of_x[i] + (y ? times_y * of_y[i] : T(0));
            gm_store_some(out + m * out_stride + e, of_x, some, quads);
        }
    }
}
GM_INSTANCES(combine, (f32), (f64))
