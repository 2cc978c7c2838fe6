// The losses: twins of the rows of gpumlp/losses.py (sources there), and the kernels that run them over a batch.
//
// A row over single outputs is a struct of two functions:
//
//   f(z, y, option)       what one output adds to a sample's loss, before the mean over outputs
//   f_grad(z, y, option)  its derivative by z
//
// where `option` is the only one that the row has: delta, quantile or label_smoothing. NaN stays NaN.

struct squared_error {
    template <typename C> GM_DEVICE static C f(C z, C y, C) { return (z - y) * (z - y); }
    template <typename C> GM_DEVICE static C f_grad(C z, C y, C) { return C(2) * (z - y); }
};

// 0 at z = y
struct absolute_error {
    template <typename C> GM_DEVICE static C f(C z, C y, C) { return gm_fabs(z - y); }
    template <typename C> GM_DEVICE static C f_grad(C z, C y, C) {
        C error = z - y;
        return error > C(0) ? C(1) : (error < C(0) ? C(-1) : error);
    }
};

struct huber {
    template <typename C> GM_DEVICE static C f(C z, C y, C delta) {
        C size = gm_fabs(z - y), near = gm_at_most(size, delta);
        return near * (size - C(0.5) * near);
    }
    template <typename C> GM_DEVICE static C f_grad(C z, C y, C delta) { return gm_clip(z - y, -delta, delta); }
};

// 0 at z = y
struct quantile {
    template <typename C> GM_DEVICE static C f(C z, C y, C q) {
        C error = y - z;
        return gm_at_least(q * error, (q - C(1)) * error);
    }
    template <typename C> GM_DEVICE static C f_grad(C z, C y, C q) {
        C error = y - z;
        return error > C(0) ? -q : (error < C(0) ? C(1) - q : error);
    }
};

// The exponent stops at 80, where float still holds the result.
struct poisson {
    template <typename C> GM_DEVICE static C rate(C z) { return gm_exp(gm_at_most(z, C(80))); }
    template <typename C> GM_DEVICE static C f(C z, C y, C) { return rate(z) - y * z; }
    template <typename C> GM_DEVICE static C f_grad(C z, C y, C) { return rate(z) - y; }
};

struct binary_cross_entropy {
    template <typename C> GM_DEVICE static C smoothed(C y, C smoothing) {
        return y * (C(1) - smoothing) + C(0.5) * smoothing;
    }
    template <typename C> GM_DEVICE static C f(C z, C y, C smoothing) {
        return gm_at_least(z, C(0)) - z * smoothed(y, smoothing) + gm_log1p(gm_exp(-gm_fabs(z)));
    }
    template <typename C> GM_DEVICE static C f_grad(C z, C y, C smoothing) {
        return sigmoid_f(z, C(0)) - smoothed(y, smoothing);
    }
};

// The table, in the order of LOSSES in Python: a row's number is its place there. softmax_cross_entropy, whose outputs
// know each other, is the kernel softmax_loss.
#define GM_LOSSES(ROW)                                                                                                 \
    ROW(squared_error) ROW(absolute_error) ROW(huber) ROW(quantile) ROW(poisson) ROW(binary_cross_entropy)

#define GM_ROW(name) gm_loss_##name,
enum GmLoss { GM_LOSSES(GM_ROW) gm_n_losses };
#undef GM_ROW

// --- who works on a row

constexpr int WARP_OUTPUTS = 1024;  // the longest row that lanes of one warp share; a block shares longer ones
constexpr int SINGLE_OUTPUTS = 32;  // the longest row of which a lane takes one output
constexpr int NEIGHBOURS = 8;       // outputs that a thread takes of longer rows at a time

// The threads that share a row: as many lanes of a warp as there are pieces of V outputs, beyond WARP_OUTPUTS the block.
struct Team {
    i32 threads;  // a power of two up to 32, or all of the block
    i32 place;    // this thread's number among them
    i64 start;    // the rows are start + own, start + step + own, ...; start is the same in all that wait for each other
    i64 step;
    i64 own;
};

template <int V> GM_DEVICE Team team_of(i64 outputs) {
    if (outputs > WARP_OUTPUTS) return Team{i32(blockDim.x), i32(threadIdx.x), i64(blockIdx.x), i64(gridDim.x), 0};
    i32 threads = 1;
    while (threads < 32 && threads * V < outputs) threads *= 2;
    i32 lane = i32(threadIdx.x & 31), rows = 32 / threads;
    i64 warps = blockDim.x >> 5, warp = blockIdx.x * warps + (threadIdx.x >> 5);
    return Team{threads, lane % threads, warp * rows, gridDim.x * warps * rows, lane / threads};
}

// `held` is shared, of 32 elements, here and below.
template <typename C> GM_DEVICE C team_sum(C x, const Team& team, C* held) {
    if (team.threads > 32) return gm_block_sum(x, held);
    for (i32 distance = team.threads >> 1; distance > 0; distance >>= 1) x += __shfl_xor_sync(0xFFFFFFFFu, x, distance);
    return x;
}

// A largest value and where it stands; of equals the first, as argmax.
template <typename C> struct Peak {
    C value;
    i32 at;
};

template <typename C> GM_DEVICE Peak<C> higher(Peak<C> x, Peak<C> y) {
    return y.value > x.value || (y.value == x.value && y.at < x.at) ? y : x;
}

template <typename C> GM_DEVICE Peak<C> team_peak(Peak<C> x, const Team& team, Peak<C>* held) {
    for (i32 distance = gm_at_most(team.threads, 32) >> 1; distance > 0; distance >>= 1) {
        C value = __shfl_xor_sync(0xFFFFFFFFu, x.value, distance);
        x = higher(x, Peak<C>{value, __shfl_xor_sync(0xFFFFFFFFu, x.at, distance)});
    }
    if (team.threads <= 32) return x;
    __syncthreads();  // held may still be read from an earlier row
    if ((team.place & 31) == 0) held[team.place >> 5] = x;
    __syncthreads();
    for (i32 warp = 0; warp < team.threads >> 5; ++warp) x = higher(x, held[warp]);
    return x;
}

// --- what both kernels share

// One model's rows.
template <typename T> struct Rows {
    const T* z;                 // (batch, outputs)
    T* dz;                      // the same, or null
    const Compute<T>* weights;  // (batch,), or null
    Compute<T> weight_total;
    Compute<T>* loss;  // (batch,)
    i64 valid, batch, outputs;

    // What a sample's derivative is multiplied by: its part in the mean.
    GM_DEVICE Compute<T> share(i64 row) const {
        return weights ? weights[row] / weight_total : Compute<T>(1) / Compute<T>(valid);
    }
    // Whether each row begins at 16 bytes.
    GM_DEVICE bool in_quads() const {
        return gm_aligned(z) && (!dz || gm_aligned(dz)) && gm_aligned_stride<T>(outputs);
    }
};

template <typename T>
GM_DEVICE Rows<T> rows_of(i32 m, const T* z, T* dz, i64 stride, const Compute<T>* weights, i64 weights_stride,
                          const Compute<T>* weight_total, i64 total_stride, const i32* valid, Compute<T>* row_loss,
                          i64 row_stride, i64 batch, i64 outputs) {
    typedef Compute<T> C;
    C total = weights ? weight_total[m * total_stride] : C(1);
    return Rows<T>{z + m * stride,
                   dz ? dz + m * stride : nullptr,
                   weights ? weights + m * weights_stride : nullptr,
                   total > C(0) ? total : C(1),  // weights that are all 0: derivative 0
                   row_loss + m * row_stride,
                   valid ? valid[m] : batch,
                   batch,
                   outputs};
}

// --- losses over single outputs

// One model's rows under one loss; a thread takes V neighbouring outputs at a time.
template <typename Row, int V, typename T>
GM_DEVICE void elementwise_rows(const Rows<T>& rows, const Compute<T>* y, const Compute<T>* option, i64 option_stride,
                                Compute<T>* held) {
    typedef Compute<T> C;
    const Team team = team_of<V>(rows.outputs);
    const bool quads = V > 1 && rows.in_quads() && gm_aligned(y) && gm_aligned_stride<C>(rows.outputs);
    const C per_output = C(1) / C(rows.outputs);
    for (i64 start = team.start; start < rows.batch; start += team.step) {
        const i64 row = start + team.own;
        const bool counts = row < rows.valid;
        const C share = counts ? rows.share(row) * per_output : C(0);
        C loss = C(0);
        for (i64 k = i64(team.place) * V; k < rows.outputs; k += i64(team.threads) * V) {
            const i64 at = row * rows.outputs + k;
            const int n = int(gm_at_most(rows.outputs - k, i64(V)));
            C z[V], target[V], slope[V] = {};
            if (counts) {
                gm_load_some(rows.z + at, z, n, quads);
                gm_load_some(y + at, target, n, quads);
#pragma unroll
                for (int i = 0; i < V; ++i) {
                    if (i >= n) continue;
                    C chosen = option ? option[(k + i) * option_stride] : C(0);
                    loss += Row::f(z[i], target[i], chosen);
                    slope[i] = Row::f_grad(z[i], target[i], chosen) * share;
                }
            }
            if (rows.dz && row < rows.batch) gm_store_some(rows.dz + at, slope, n, quads);
        }
        loss = team_sum(loss, team, held);
        if (team.place == 0 && row < rows.batch) rows.loss[row] = loss * per_output;
    }
}

template <typename Row, typename T>
GM_DEVICE void elementwise_model(const Rows<T>& rows, const Compute<T>* y, const Compute<T>* option, i64 option_stride,
                                 Compute<T>* held) {
    if (rows.outputs <= SINGLE_OUTPUTS)
        elementwise_rows<Row, 1>(rows, y, option, option_stride, held);
    else
        elementwise_rows<Row, NEIGHBOURS>(rows, y, option, option_stride, held);
}

// row_loss = each sample's loss, dz = derivative of the weighted mean over the valid rows; 0 in rows beyond them. dz may be
// z, or null. `row` is one of GM_LOSSES; option may be null where it has none. Blocks are (threads, 1), here and below.
template <typename T>
GM_KERNEL void elementwise_loss(i32 row, const T* z, T* dz, i64 stride, const Compute<T>* y, i64 targets_stride,
                                const Compute<T>* option, i64 option_model_stride, i64 option_output_stride,
                                const Compute<T>* weights, i64 weights_stride, const Compute<T>* weight_total,
                                i64 total_stride, const i32* valid, Compute<T>* row_loss, i64 row_stride, i32 models,
                                i64 batch, i64 outputs) {
    typedef Compute<T> C;
    GM_SHARED(C, held, 32);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const Rows<T> rows = rows_of(m, z, dz, stride, weights, weights_stride, weight_total, total_stride, valid,
                                     row_loss, row_stride, batch, outputs);
        const C* y_m = y + m * targets_stride;
        const C* option_m = option ? option + m * option_model_stride : nullptr;
        switch (row) {
#define GM_ROW(name) case gm_loss_##name: elementwise_model<name>(rows, y_m, option_m, option_output_stride, held); break;
            GM_LOSSES(GM_ROW)
#undef GM_ROW
        }
    }
}
GM_INSTANCES(elementwise_loss, (f32), (f64), (bf16))

// --- softmax with categorical cross-entropy

// One sample's t, smoothed: (1 - smoothing) y + smoothing / outputs.
template <typename C> struct ClassTarget {
    const C* y;  // its probabilities, or null
    i64 label;
    C smoothing;
    C rest;  // smoothing / outputs

    GM_DEVICE C at(i32 k) const { return (C(1) - smoothing) * (y ? y[k] : C(k == label)) + rest; }
};

// f(k, x[i]) for each of the V outputs of `seen` that begin at k.
template <int V, typename C, typename F> GM_DEVICE void for_each_output(i32 k, i32 seen, C (&x)[V], F f) {
#pragma unroll
    for (int i = 0; i < V; ++i)
        if (k + i < seen) f(k + i, x[i]);
}

// Where a sample's label is: the place of its largest probability where it has those.
template <typename C>
GM_DEVICE i64 label_of(const ClassTarget<C>& target, i32 seen, const Team& team, Peak<C>* peaks) {
    if (!target.y) return target.label;
    Peak<C> largest = {seen > 0 ? target.y[0] : C(0), 0};
    for (i32 k = team.place; k < seen; k += team.threads) largest = higher(largest, Peak<C>{target.y[k], k});
    return team_peak(largest, team, peaks).at;
}

// One model's rows, in three passes: for the largest logit, for the sums, for the derivative. A thread keeps V outputs in
// registers; where a row has more than that for each, every pass reads it again, from the cache.
template <int V, typename T>
GM_DEVICE void softmax_rows(const Rows<T>& rows, const i64* labels, const Compute<T>* y, Compute<T> smoothing, i32* hits,
                            Compute<T>* held, Peak<Compute<T>>* peaks) {
    typedef Compute<T> C;
    const Team team = team_of<V>(rows.outputs);
    const i32 outputs = i32(rows.outputs), from = team.place * V, width = team.threads * V;
    const bool quads = V > 1 && rows.in_quads(), once = width >= outputs;
    C x[V] = {};
    for (i64 start = team.start; start < rows.batch; start += team.step) {
        const i64 row = start + team.own;
        const i32 seen = row < rows.valid ? outputs : 0;  // nothing is read of a row that does not count
        const T* z = rows.z + row * outputs;
        const ClassTarget<C> target = {y ? y + row * outputs : nullptr, seen > 0 && labels ? labels[row] : 0, smoothing,
                                       smoothing / C(outputs)};

        Peak<C> top = {seen > 0 ? gm_load(z) : C(0), 0};
        for (i32 k = from; k < seen; k += width) {
            gm_load_some(z + k, x, gm_at_most(seen - k, V), quads);
            for_each_output(k, seen, x, [&](i32 at, C& logit) { top = higher(top, Peak<C>{logit, at}); });
        }
        top = team_peak(top, team, peaks);

        C total = C(0), picked = C(0);  // of exp(z - top), of t (z - top)
        for (i32 k = from; k < seen; k += width) {
            if (!once) gm_load_some(z + k, x, gm_at_most(seen - k, V), quads);
            for_each_output(k, seen, x, [&](i32 at, C& logit) {
                const C t = target.at(at), below = logit - top.value;
                if (t != C(0)) picked += t * below;  // below may be -infinity
                logit = gm_exp(below);
                total += logit;
            });
        }
        total = team_sum(total, team, held);
        picked = team_sum(picked, team, held);

        if (hits) {  // none in a row with NaN, which `higher` passes over
            const bool hit = top.at == label_of(target, seen, team, peaks) && total == total;
            if (team.place == 0 && row < rows.batch) hits[row] = i32(seen > 0 && hit);
        }
        if (team.place == 0 && row < rows.batch) rows.loss[row] = seen > 0 ? gm_log(total) - picked : C(0);
        if (!rows.dz || row >= rows.batch) continue;
        const C share = seen > 0 ? rows.share(row) : C(0), per_total = C(1) / total;
        for (i32 k = from; k < outputs; k += width) {
            if (!once) {
                gm_load_some(z + k, x, gm_at_most(seen - k, V), quads);
                for_each_output(k, seen, x, [&](i32, C& logit) { logit = gm_exp(logit - top.value); });
            }
            for_each_output(k, outputs, x, [&](i32 at, C& slope) {
                slope = seen > 0 ? (slope * per_total - target.at(at)) * share : C(0);  // softmax(z) - t
            });
            gm_store_some(rows.dz + row * outputs + k, x, gm_at_most(outputs - k, V), quads);
        }
    }
}

// As elementwise_loss, of labels or of probabilities y; hits = 1 where the largest logit stands at the label.
template <typename T>
GM_KERNEL void softmax_loss(const T* z, T* dz, i64 stride, const i64* labels, const Compute<T>* y, i64 targets_stride,
                            const Compute<T>* option, i64 option_model_stride, i64 option_output_stride,
                            const Compute<T>* weights, i64 weights_stride, const Compute<T>* weight_total,
                            i64 total_stride, const i32* valid, Compute<T>* row_loss, i64 row_stride, i32* hits,
                            i32 models, i64 batch, i64 outputs) {
    typedef Compute<T> C;
    GM_SHARED(C, held, 32);
    GM_SHARED(Peak<C>, peaks, 32);
    for (i32 m = i32(blockIdx.y); m < models; m += i32(gridDim.y)) {
        const Rows<T> rows = rows_of(m, z, dz, stride, weights, weights_stride, weight_total, total_stride, valid,
                                     row_loss, row_stride, batch, outputs);
        const i64* labels_m = labels ? labels + m * targets_stride : nullptr;
        const C* y_m = y ? y + m * targets_stride : nullptr;
        const C smoothing = option ? option[m * option_model_stride] : C(0);
        i32* hits_m = hits ? hits + m * row_stride : nullptr;
        if (outputs <= SINGLE_OUTPUTS)
            softmax_rows<1>(rows, labels_m, y_m, smoothing, hits_m, held, peaks);
        else
            softmax_rows<NEIGHBOURS>(rows, labels_m, y_m, smoothing, hits_m, held, peaks);
    }
}
GM_INSTANCES(softmax_loss, (f32), (f64), (bf16))
