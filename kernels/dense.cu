// A dense layer beside its matrix products: bias, non-linearity and dropout in one pass, the same backward with the bias'
// gradient; dropout alone; joins; the limit on the norms of weights. Definitions: gpumlp/backends/numpy_backend.py.
//
// These kernels are as fast as memory, and their shape follows from it. A warp works on a tile of 256 elements, 8 a lane,
// because one Philox block decides about 8. A lane takes them 16 bytes at a time, the widest access there is, and
// neighbouring lanes take neighbouring 16 bytes, so that an access of the whole warp is contiguous.

constexpr int WARPS = GM_THREADS / 32;
constexpr int OWN = 8;          // elements of a tile that belong to a lane
constexpr int TILE = 32 * OWN;  // elements of a tile
template <typename T> constexpr int QUAD = 16 / int(sizeof(T));  // elements of 16 bytes

GM_DEVICE int lane_of_warp() { return int(threadIdx.x & 31u); }
GM_DEVICE i64 warps_of_block() { return (blockDim.x * blockDim.y) >> 5; }
GM_DEVICE i64 warp_of_grid() { return blockIdx.x * warps_of_block() + ((threadIdx.x + blockDim.x * threadIdx.y) >> 5); }

// The place in the tile of this lane's element i, a multiple of QUAD<T>; those up to i + QUAD<T> - 1 follow it.
template <typename T> GM_DEVICE int place(int i) { return 32 * i + QUAD<T> * lane_of_warp(); }

// This lane's elements of the tile at p, of which n exist; 0 for the others.
template <typename T> GM_DEVICE void load_tile(const T* p, i64 n, bool quads, Compute<T> (&v)[OWN]) {
#pragma unroll
    for (int i = 0; i < OWN; i += QUAD<T>) {
        Compute<T> part[QUAD<T>];
        gm_load_some(p + place<T>(i), part, int(gm_clip(n - place<T>(i), i64(0), i64(QUAD<T>))), quads);
#pragma unroll
        for (int j = 0; j < QUAD<T>; ++j) v[i + j] = part[j];
    }
}
template <typename T> GM_DEVICE void store_tile(T* p, const Compute<T> (&v)[OWN], i64 n, bool quads) {
#pragma unroll
    for (int i = 0; i < OWN; i += QUAD<T>) {
        Compute<T> part[QUAD<T>];
#pragma unroll
        for (int j = 0; j < QUAD<T>; ++j) part[j] = v[i + j];
        gm_store_some(p + place<T>(i), part, int(gm_clip(n - place<T>(i), i64(0), i64(QUAD<T>))), quads);
    }
}

// --- dropout

// Dropout in one model: the bundle that every kernel here takes apart into arguments.
template <typename C> struct Drop {
    PhiloxStream stream;
    u32 threshold;
    C scale;
};

// Without dropout (thresholds null) the answer is not used.
template <typename C>
GM_DEVICE Drop<C> drop_of(i32 m, const u64* seeds, const u64* streams, const u64* steps, u64 layer, const u32* thresholds,
                          const C* scales) {
    if (thresholds == nullptr) return {};
    return {{seeds[m], PURPOSE_DROPOUT, steps[m], streams[m], layer}, thresholds[m], scales[m]};
}

// Which elements 8 block .. 8 block + 7 are kept, a bit each.
template <typename C> GM_DEVICE u32 keep_bits(const Drop<C>& drop, u64 block) {
    u64 words[4];
    philox_block(drop.stream, block, words);
    u32 bits = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) bits |= static_cast<u32>(philox_pick_lane(words, i) >= drop.threshold) << i;
    return bits;
}

// v times keep, for this lane's elements of a tile. `block` is the Philox block of the 8 elements from 8 lane on: the lane
// draws for these and hands the decisions to whoever holds the elements, a shuffle for each 16 bytes.
template <typename T> GM_DEVICE void drop_tile(const Drop<Compute<T>>& drop, u64 block, Compute<T> (&v)[OWN]) {
    const u32 drawn = keep_bits(drop, block);
#pragma unroll
    for (int i = 0; i < OWN; i += QUAD<T>) {
        const int first = place<T>(i);
        const u32 bits = QUAD<T> == 8 ? drawn : __shfl_sync(0xFFFFFFFFu, drawn, first / 8) >> first % 8;
#pragma unroll
        for (int j = 0; j < QUAD<T>; ++j) v[i + j] = bits >> j & 1u ? v[i + j] * drop.scale : Compute<T>(0);
    }
}

// out = x times keep, over `size` elements of each model; out may be x, and a stride of 0 gives all models the same x.
template <typename T>
GM_KERNEL void dropout(const T* x, i64 x_stride, T* out, i64 stride, const u64* seeds, const u64* streams, const u64* steps,
                       u64 layer, const u32* thresholds, const Compute<T>* scales, i32 models, i64 size) {
    const i64 step = TILE * i64(gridDim.x) * warps_of_block(), first = TILE * warp_of_grid();
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const T* from = x + m * x_stride;
        T* to = out + m * stride;
        const bool quads = gm_aligned(from) && gm_aligned(to);
        const Drop<Compute<T>> drop = drop_of(m, seeds, streams, steps, layer, thresholds, scales);
        for (i64 e = first; e < size; e += step) {
            Compute<T> v[OWN];
            load_tile(from + e, size - e, quads, v);
            if (thresholds != nullptr) drop_tile<T>(drop, static_cast<u64>(e / 8 + lane_of_warp()), v);
            store_tile(to + e, v, size - e, quads);
        }
    }
}
GM_INSTANCES(dropout, (f32), (f64), (bf16))

// --- forward

// v + b for this lane's elements of a tile that begins in `column`; rows may end within the tile, and often do.
// Columns are 32-bit numbers: no layer has 2^31 units, and a remainder of 64 bits takes several times as long.
template <typename T> GM_DEVICE void add_bias(const Compute<T>* b, u32 column, u32 units, Compute<T> (&v)[OWN]) {
#pragma unroll
    for (int i = 0; i < OWN; i += QUAD<T>) {
        u32 c = (column + static_cast<u32>(place<T>(i))) % units;
        Compute<T> part[QUAD<T>];
        if (c + QUAD<T> <= units) {
            gm_load_some(b + c, part, QUAD<T>, gm_aligned(b + c));
        } else {
#pragma unroll
            for (int j = 0; j < QUAD<T>; ++j) {
                part[j] = b[c];
                c = c + 1 == units ? 0 : c + 1;
            }
        }
#pragma unroll
        for (int j = 0; j < QUAD<T>; ++j) v[i + j] += part[j];
    }
}

// f of a lane's elements. The choice of the row stands outside the loop: one jump instead of eight.
template <typename C, int N> GM_DEVICE void activate(i32 row, C alpha, C (&v)[N]) {
    switch (row) {
#define GM_ROW(name)                                                                  \
    case gm_activation_##name:                                                        \
        _Pragma("unroll") for (int i = 0; i < N; ++i) v[i] = name##_f(v[i], alpha);   \
        break;
        GM_ACTIVATIONS(GM_ROW)
#undef GM_ROW
    }
}

// u = z + b, a = f(u), dropped = a times keep, over (models, batch, units) with one stride from model to model.
// b null: u is z already, and z is not written; thresholds null: no dropout. a may be z: then u is not kept.
template <typename T>
GM_KERNEL void dense_forward(T* z, T* a, T* dropped, i64 stride, const Compute<T>* b, i64 b_stride, i32 row,
                             Compute<T> alpha, const u64* seeds, const u64* streams, const u64* steps, u64 layer,
                             const u32* thresholds, const Compute<T>* scales, i32 models, i64 batch, i64 units) {
    const i64 size = batch * units;
    const i64 step = TILE * i64(gridDim.x) * warps_of_block(), first = TILE * warp_of_grid();
    if (first >= size) return;
    const u32 first_column = static_cast<u32>(first % units), column_step = static_cast<u32>(step % units);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 at = m * stride;
        const bool quads = gm_aligned(z + at) && gm_aligned(a + at) && (dropped == nullptr || gm_aligned(dropped + at));
        const Drop<Compute<T>> drop = drop_of(m, seeds, streams, steps, layer, thresholds, scales);
        u32 column = first_column;
        for (i64 e = first; e < size; e += step) {
            Compute<T> v[OWN];
            load_tile(z + at + e, size - e, quads, v);
            if (b != nullptr) {
                add_bias<T>(b + m * b_stride, column, static_cast<u32>(units), v);
                if (a != z) store_tile(z + at + e, v, size - e, quads);
            }
            activate(row, alpha, v);
            store_tile(a + at + e, v, size - e, quads);
            if (thresholds != nullptr) {
                drop_tile<T>(drop, static_cast<u64>(e / 8 + lane_of_warp()), v);
                store_tile(dropped + at + e, v, size - e, quads);
            }
            column += column_step;
            if (column >= units) column -= static_cast<u32>(units);
        }
    }
}
GM_INSTANCES(dense_forward, (f32), (f64), (bf16))

// --- backward

// What a warp works on at once in dense_backward: a patch of some rows and 32 columns, of which `rows` and `columns` exist.
// A lane's element i is in the column of its sum i % SUMS, and its sums are of neighbouring columns.
//
// A wide patch is a tile folded into 8 rows; for layers whose rows all begin at 16 bytes and at a Philox block.
template <typename T> struct WidePatch {
    static constexpr int ROWS = 8, ELEMENTS = OWN, SUMS = QUAD<T>;
    i64 start, units;  // its first element; elements from row to row
    int rows, columns;

    GM_DEVICE bool has(int place) const { return place / 32 < rows && place % 32 < columns; }
    GM_DEVICE i64 element(int place) const { return start + place / 32 * units + place % 32; }
    GM_DEVICE void load(const T* p, Compute<T> (&v)[ELEMENTS]) const {
#pragma unroll
        for (int i = 0; i < ELEMENTS; i += SUMS) {
            Compute<T> part[SUMS] = {};
            if (has(place<T>(i))) gm_load_quads(p + element(place<T>(i)), part);
#pragma unroll
            for (int j = 0; j < SUMS; ++j) v[i + j] = part[j];
        }
    }
    GM_DEVICE void store(T* p, const Compute<T> (&v)[ELEMENTS]) const {
#pragma unroll
        for (int i = 0; i < ELEMENTS; i += SUMS) {
            Compute<T> part[SUMS];
#pragma unroll
            for (int j = 0; j < SUMS; ++j) part[j] = v[i + j];
            if (has(place<T>(i))) gm_store_quads(p + element(place<T>(i)), part);
        }
    }
    GM_DEVICE void times_keep(const Drop<Compute<T>>& drop, Compute<T> (&v)[ELEMENTS]) const {
        drop_tile<T>(drop, static_cast<u64>(element(8 * lane_of_warp())) / 8, v);
    }
};

// A narrow patch is for any rows: a column a lane, of 6 rows, because 32 elements of a row lie in at most 5 Philox blocks,
// and 6 times 5 are what 32 lanes can draw at once.
template <typename T> struct NarrowPatch {
    static constexpr int ROWS = 6, ELEMENTS = ROWS, SUMS = 1, BLOCKS = 5;
    i64 start, units;
    int rows, columns;

    GM_DEVICE bool has(int row) const { return row < rows && lane_of_warp() < columns; }
    GM_DEVICE void load(const T* p, Compute<T> (&v)[ELEMENTS]) const {
#pragma unroll
        for (int k = 0; k < ROWS; ++k) v[k] = has(k) ? gm_load(p + start + k * units + lane_of_warp()) : Compute<T>(0);
    }
    GM_DEVICE void store(T* p, const Compute<T> (&v)[ELEMENTS]) const {
#pragma unroll
        for (int k = 0; k < ROWS; ++k)
            if (has(k)) gm_store(p + start + k * units + lane_of_warp(), v[k]);
    }
    GM_DEVICE void times_keep(const Drop<Compute<T>>& drop, Compute<T> (&v)[ELEMENTS]) const {
        const int lane = lane_of_warp();
        const u64 row = static_cast<u64>(start + lane / BLOCKS * units);
        const u32 drawn = keep_bits(drop, row / 8 + static_cast<u64>(lane % BLOCKS));
#pragma unroll
        for (int k = 0; k < ROWS; ++k) {
            const int place = int((start + k * units) & 7) + lane;  // counted from the first Philox block of the row
            const u32 bits = __shfl_sync(0xFFFFFFFFu, drawn, BLOCKS * k + place / 8);
            v[k] = bits >> place % 8 & 1u ? v[k] * drop.scale : Compute<T>(0);
        }
    }
};

// v times f'. The loads stand in each case, so that the compiler leaves out the array that the row's derivative ignores.
template <typename Patch, typename T, typename C, int N>
GM_DEVICE void times_slope(const Patch& patch, i32 row, C alpha, const T* u, const T* a, C (&v)[N]) {
    C z[N], f[N];
    switch (row) {
#define GM_ROW(name)                                                                              \
    case gm_activation_##name:                                                                    \
        patch.load(u, z);                                                                         \
        patch.load(a, f);                                                                         \
        _Pragma("unroll") for (int i = 0; i < N; ++i) v[i] *= name##_f_grad(z[i], f[i], alpha);   \
        break;
        GM_ACTIVATIONS(GM_ROW)
#undef GM_ROW
    }
}

// One model's backward pass over this block's columns and share of the rows. The column sums go into db; where several
// blocks share a column, by way of `partial` (splits, units) and a ticket for each 32. `held` is shared, of GM_THREADS.
template <typename Patch, typename T, typename C>
GM_DEVICE void backward_columns(T* d, const T* u, const T* a, i32 row, C alpha, bool drops, const Drop<C>& drop, C* db,
                                C* partial, u32* tickets, i64 batch, i64 units, C* held, u32* order) {
    constexpr int LANES = 32 / Patch::SUMS;  // that share a row of 32 columns
    const i64 first = (i64(blockIdx.z) * WARPS + threadIdx.y) * Patch::ROWS, step = i64(gridDim.z) * WARPS * Patch::ROWS;
    const bool changes = row != gm_activation_identity || drops;
    for (i64 tile = blockIdx.x; tile * 32 < units; tile += gridDim.x) {
        const int columns = int(gm_at_most(units - tile * 32, i64(32))), lane = lane_of_warp();
        C sums[Patch::SUMS] = {};
        for (i64 r = first; r < batch; r += step) {
            const int rows = int(gm_at_most(batch - r, i64(Patch::ROWS)));
            const Patch patch = {r * units + tile * 32, units, rows, columns};
            C v[Patch::ELEMENTS];
            patch.load(d, v);
            if (drops) patch.times_keep(drop, v);
            if (changes) {
                times_slope(patch, row, alpha, u, a, v);
                patch.store(d, v);
            }
#pragma unroll
            for (int i = 0; i < Patch::ELEMENTS; ++i) sums[i % Patch::SUMS] += v[i];
        }
        if (db == nullptr) continue;

        __syncthreads();  // held may still be read from the tile before
#pragma unroll
        for (int i = 0; i < Patch::SUMS; ++i) {
#pragma unroll
            for (int distance = LANES; distance < 32; distance *= 2)
                sums[i] += __shfl_xor_sync(0xFFFFFFFFu, sums[i], distance);
            if (lane < LANES) held[threadIdx.y * 32 + lane * Patch::SUMS + i] = sums[i];
        }
        __syncthreads();
        const bool adds = threadIdx.y == 0 && lane < columns;  // a column of the tile for each lane of the first warp
        const i64 column = tile * 32 + lane;
        C total = C(0);
        if (adds) {
            for (int warp = 0; warp < WARPS; ++warp) total += held[warp * 32 + lane];
            (gridDim.z == 1 ? db : partial + blockIdx.z * units)[column] = total;
        }
        if (gridDim.z == 1 || !gm_last_block(tickets + tile, gridDim.z, order) || !adds) continue;
        total = C(0);
        for (i64 split = 0; split < i64(gridDim.z); ++split) total += partial[split * units + column];
        db[column] = total;
    }
}

// d times keep times f'(u, a), in place, and db = the sum of that over rows (null: not wanted). Of u and a only the one is
// read that f' reads. The grid is (tiles of 32 columns, models, splits of the rows), a block (32, 8) threads. With several
// splits `partial` is (models, splits, units), and `tickets` (models, tiles) are 0, before and after.
template <typename T>
GM_KERNEL void dense_backward(T* d, const T* u, const T* a, i64 stride, i32 row, Compute<T> alpha, const u64* seeds,
                              const u64* streams, const u64* steps, u64 layer, const u32* thresholds,
                              const Compute<T>* scales, Compute<T>* db, i64 db_stride, Compute<T>* partial, u32* tickets,
                              i32 models, i64 batch, i64 units) {
    typedef Compute<T> C;
    GM_SHARED(C, held, GM_THREADS);
    GM_SHARED(u32, order, 1);
    const i64 tiles = (units + 31) / 32;
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const i64 at = m * stride;
        const Drop<C> drop = drop_of(m, seeds, streams, steps, layer, thresholds, scales);
        C* sums = db == nullptr ? nullptr : db + m * db_stride;
        C* parts = partial == nullptr ? nullptr : partial + m * i64(gridDim.z) * units;
        u32* ticket = tickets == nullptr ? nullptr : tickets + m * tiles;
        const bool wide = units % OWN == 0 && gm_aligned(d + at) && gm_aligned(u + at) && gm_aligned(a + at);
        if (wide)
            backward_columns<WidePatch<T>>(d + at, u + at, a + at, row, alpha, thresholds != nullptr, drop, sums, parts,
                                           ticket, batch, units, held, order);
        else
            backward_columns<NarrowPatch<T>>(d + at, u + at, a + at, row, alpha, thresholds != nullptr, drop, sums, parts,
                                             ticket, batch, units, held, order);
    }
}
GM_INSTANCES(dense_backward, (f32), (f64), (bf16))

// --- joins

// out = in, or out + in where it adds, over `width` columns of each row; rows are in_row and out_row elements apart.
template <typename T>
GM_KERNEL void add_columns(const T* in, i64 in_stride, i64 in_row, T* out, i64 out_stride, i64 out_row, i32 adds,
                           i32 models, i64 batch, i64 width) {
    if (in_row == width && out_row == width) {  // no gaps: one long row, which keeps 16-byte accesses whatever the width
        width *= batch;
        batch = 1;
    }
    const i64 pieces = (width + QUAD<T> - 1) / QUAD<T>;  // of a row
    const i64 step = 32 * i64(gridDim.x) * warps_of_block(), first = 32 * warp_of_grid() + lane_of_warp();
    const bool rows_aligned = batch == 1 || (gm_aligned_stride<T>(in_row) && gm_aligned_stride<T>(out_row));
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const T* from = in + m * in_stride;
        T* to = out + m * out_stride;
        const bool quads = rows_aligned && gm_aligned(from) && gm_aligned(to);
        for (i64 i = first; i < batch * pieces; i += step) {
            const i64 r = batch == 1 ? 0 : i / pieces, c = (i - r * pieces) * QUAD<T>;
            const int n = int(gm_at_most(width - c, i64(QUAD<T>)));
            Compute<T> v[QUAD<T>], sum[QUAD<T>];
            gm_load_some(from + r * in_row + c, v, n, quads);
            if (adds) {
                gm_load_some(to + r * out_row + c, sum, n, quads);
#pragma unroll
                for (int j = 0; j < QUAD<T>; ++j) v[j] += sum[j];
            }
            gm_store_some(to + r * out_row + c, v, n, quads);
        }
    }
}
GM_INSTANCES(add_columns, (f32), (f64), (bf16))

// --- limits

// Rows of W (models, units, fan_in) longer than max_norm are scaled down to it, a warp a row; with them `shadow`, the
// bfloat16 twin at the same places (null: none). Models with ok or valid of 0 made no step, and are left alone.
template <typename T>
GM_KERNEL void limit_norms(T* W, i64 stride, i64 units, i64 fan_in, T max_norm, bf16* shadow, const i32* ok,
                           const i32* valid, i32 models) {
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        if ((ok != nullptr && ok[m] == 0) || (valid != nullptr && valid[m] == 0)) continue;
        for (i64 r = warp_of_grid(); r < units; r += gridDim.x * warps_of_block()) {
            const i64 at = m * stride + r * fan_in;
            const bool quads = gm_aligned(W + at);
            T v[QUAD<T>], sum = T(0);
            for (i64 c = lane_of_warp() * QUAD<T>; c < fan_in; c += 32 * QUAD<T>) {
                gm_load_some(W + at + c, v, int(gm_at_most(fan_in - c, i64(QUAD<T>))), quads);
#pragma unroll
                for (int j = 0; j < QUAD<T>; ++j) sum += v[j] * v[j];
            }
            const T scale = max_norm / gm_at_least(gm_sqrt(gm_warp_sum(sum)), max_norm);
            if (scale == T(1)) continue;  // NaN goes on, and through the row, as it does in NumPy
            for (i64 c = lane_of_warp() * QUAD<T>; c < fan_in; c += 32 * QUAD<T>) {
                const int n = int(gm_at_most(fan_in - c, i64(QUAD<T>)));
                gm_load_some(W + at + c, v, n, quads);
#pragma unroll
                for (int j = 0; j < QUAD<T>; ++j) v[j] *= scale;
                gm_store_some(W + at + c, v, n, quads);
                if (shadow == nullptr) continue;
                f32 narrow[QUAD<T>];
#pragma unroll
                for (int j = 0; j < QUAD<T>; ++j) narrow[j] = static_cast<f32>(v[j]);
                gm_store_some(shadow + at + c, narrow, n, false);
            }
        }
    }
}
GM_INSTANCES(limit_norms, (f32), (f64))
