// Categories as vectors that are learned. The definitions are embed_forward and embed_backward of
// gpumlp/backends/numpy_backend.py. Blocks are one-dimensional; grid.y deals out models.

// The rows of a batch: numbers, and behind them columns of codes. starts[k] is where in E the codes of column k begin, and
// starts[columns] where the last ones end.
template <typename C> struct Rows {
    const C* x;
    i32 numbers;
    const i64* starts;
    i32 columns;

    GM_DEVICE const C* row(i64 r) const { return x + r * (numbers + columns); }
    // Which row of E column k of row r means; what is no code of the column is its code 0, NaN too.
    GM_DEVICE i64 code(i64 r, i32 k) const {
        C code = row(r)[numbers + k];
        i64 first = starts[k], size = starts[k + 1] - first;
        return code >= C(0) && code < C(size) ? first + i64(code) : first;
    }
};

// out = [numbers, the vector of each code]
template <typename C, typename T> GM_KERNEL void embed_forward(
    const C* x, i64 x_stride, i32 numbers, const i64* starts, i32 columns, const C* E, i64 E_stride, i32 units,
    T* out, i64 out_stride, i32 models, i32 batch) {
    i64 width = numbers + i64(columns) * units;
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        Rows<C> rows = {x + m * x_stride, numbers, starts, columns};
        const C* own_E = E + m * E_stride;
        T* to = out + m * out_stride;
        for (i64 e = thread_of_grid(); e < batch * width; e += threads_of_grid()) {
            i64 r = e / width, c = e % width - numbers;
            gm_store(to + e, c < 0 ? rows.row(r)[c + numbers] : own_E[rows.code(r, i32(c / units)) * units + c % units]);
        }
    }
}
GM_INSTANCES(embed_forward, (f32, f32), (f32, bf16), (f64, f64))

template <typename C> GM_KERNEL void embed_clear(C* dE, i64 dE_stride, i64 n, i32 models) {
    for (i32 m = blockIdx.y; m < models; m += gridDim.y)
        for (i64 e = thread_of_grid(); e < n; e += threads_of_grid()) dE[m * dE_stride + e] = C(0);
}
GM_INSTANCES(embed_clear, (f32), (f64))

// The lanes of a warp look at 32 rows at a time: which of the rows from first on, before stop, have the code in column k?
template <typename C> GM_DEVICE u32 rows_with(const Rows<C>& rows, i64 code, i32 k, i64 first, i64 stop) {
    i64 r = first + (threadIdx.x & 31);
    return __ballot_sync(0xFFFFFFFFu, r < stop && rows.code(r, k) == code);
}

// dE[code] = the sum of d over the rows with that code, in their order. A warp has one row and column, and goes on only where
// no row before has the same code: so each sum has one owner, and needs no atomics. What no row has was cleared before.
template <typename C, typename T> GM_KERNEL void embed_backward(
    const C* x, i64 x_stride, i32 numbers, const i64* starts, i32 columns, C* dE, i64 dE_stride, i32 units,
    const T* d, i64 d_stride, i32 models, i32 batch) {
    i64 width = numbers + i64(columns) * units;
    i32 lane = threadIdx.x & 31;
    for (i32 m = blockIdx.y; m < models; m += gridDim.y) {
        Rows<C> rows = {x + m * x_stride, numbers, starts, columns};
        for (i64 pair = thread_of_grid() >> 5; pair < i64(batch) * columns; pair += threads_of_grid() >> 5) {
            i64 own = pair / columns;
            i32 k = i32(pair % columns);
            i64 code = rows.code(own, k);
            bool first = true;
            for (i64 r = 0; first && r < own; r += 32) first = rows_with(rows, code, k, r, own) == 0;
            if (!first) continue;
            for (i32 u = 0; u < units; u += 32) {
                C sum = C(0);
                for (i64 r = own; r < batch; r += 32) {
                    for (u32 some = rows_with(rows, code, k, r, i64(batch)); some; some &= some - 1) {
                        i64 row = r + __ffs(i32(some)) - 1;
                        if (u + lane < units) sum += gm_load(d + m * d_stride + row * width + numbers + i64(k) * units + u + lane);
                    }
                }
                if (u + lane < units) dE[m * dE_stride + code * units + u + lane] = sum;
            }
        }
    }
}
GM_INSTANCES(embed_backward, (f32, f32), (f32, bf16), (f64, f64))
