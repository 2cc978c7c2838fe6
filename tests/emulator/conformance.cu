// One small kernel for each intrinsic and wrapper that kernels lean on: the emulator and every GPU have to agree with the values
// in conformance.py.

#ifndef GM_EMULATOR
// d += a b for a 16 x 16 and a 16 x 8 matrix of bfloat16.
GM_DEVICE void gm_mma_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    asm("trap;");
#endif
}

// Four 8 x 8 matrices of 2-byte elements from shared memory: lane l gives the address of row l % 8 of matrix l / 8.
GM_DEVICE void gm_ldmatrix_x4(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
}
GM_DEVICE void gm_ldmatrix_x4_trans(u32 (&out)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
}
#endif

// --- launches

GM_KERNEL void arguments(i8 a, u8 b, i16 c, u16 d, i32 e, u32 f, i64 g, u64 h, f32 i, f64 j, f64* out) {
    const f64 given[10] = {f64(a), f64(b), f64(c), f64(d), f64(e), f64(f), f64(g), f64(h), f64(i), j};
    for (int at = 0; at < 10; ++at) out[at] = given[at];
}
GM_INSTANCES(arguments)

// Who a thread is, in the order of blocks and threads.
GM_KERNEL void indices(u32* out) {
    u32 block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    u32 thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    u32* at = out + 6 * (block * (blockDim.x * blockDim.y * blockDim.z) + thread);
    const u32 index[6] = {blockIdx.x, blockIdx.y, blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z};
    for (int i = 0; i < 6; ++i) at[i] = index[i];
}
GM_INSTANCES(indices)

// --- warps

template <typename T> GM_KERNEL void shuffles(const T* x, T* out) {
    u32 n = blockDim.x, t = threadIdx.x;
    out[t] = __shfl_xor_sync(0xFFFFFFFFu, x[t], 5);
    out[n + t] = __shfl_sync(0xFFFFFFFFu, x[t], 11);
    out[2 * n + t] = __shfl_down_sync(0xFFFFFFFFu, x[t], 9);
    out[3 * n + t] = __shfl_up_sync(0xFFFFFFFFu, x[t], 3);
}
GM_INSTANCES(shuffles, (i32), (u32), (u64), (f32), (f64))

GM_KERNEL void votes(const u32* x, u32* out) {
    u32 n = blockDim.x, t = threadIdx.x;
    out[t] = __ballot_sync(0xFFFFFFFFu, x[t] > 7);
    out[n + t] = u32(__any_sync(0xFFFFFFFFu, x[t] > 7));
    out[2 * n + t] = u32(__all_sync(0xFFFFFFFFu, x[t] > 7));
}
GM_INSTANCES(votes)

// The halves of a warp go separate ways and meet again.
GM_KERNEL void half_warps(const u32* x, u32* out) {
    u32 t = threadIdx.x, value = x[t];
    if ((t & 31) < 16)
        value = __shfl_xor_sync(0x0000FFFFu, value, 1) + __ballot_sync(0x0000FFFFu, value & 1);
    else
        value = __shfl_sync(0xFFFF0000u, value, 31);
    __syncwarp();
    out[t] = __shfl_xor_sync(0xFFFFFFFFu, value, 16);
}
GM_INSTANCES(half_warps)

template <typename T> GM_KERNEL void warp_sums(const T* x, T* out) { out[threadIdx.x] = gm_warp_sum(x[threadIdx.x]); }
GM_INSTANCES(warp_sums, (u32), (f32), (f64))

// --- blocks

template <typename T> GM_KERNEL void block_sums(const T* x, T* out) {
    GM_SHARED(T, held, 32);
    u32 block = blockDim.x * blockDim.y * blockDim.z;
    u32 at = blockIdx.x * block + threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    T once = gm_block_sum(x[at], held);
    out[at] = once + gm_block_sum(T(2) * x[at], held);  // held is used again at once
}
GM_INSTANCES(block_sums, (u32), (f32), (f64))

// Each block turns its part around.
template <typename T> GM_KERNEL void reverse(const T* x, T* out) {
    GM_SHARED(T, held, 256);
    u32 n = blockDim.x, begin = blockIdx.x * n, t = threadIdx.x;
    held[t] = x[begin + t];
    __syncthreads();
    out[begin + t] = held[n - 1 - t];
}
GM_INSTANCES(reverse, (u8), (bf16), (f32), (f64))

// Two launches in a row: the ticket has to be 0 again.
GM_KERNEL void last_block(const u32* x, u32* partials, u32* ticket, u32* total, u32* n_last) {
    GM_SHARED(u32, held, 32);
    u32 sum = gm_block_sum(x[blockIdx.x * blockDim.x + threadIdx.x], held);
    if (threadIdx.x == 0) partials[blockIdx.x] = sum;
    if (gm_last_block(ticket, gridDim.x, held) && threadIdx.x == 0) {
        u32 all = 0;
        for (u32 i = 0; i < gridDim.x; ++i) all += partials[i];
        *total = all;
        *n_last += 1;
    }
}
GM_INSTANCES(last_block)

GM_KERNEL void atomics(const i32* x, u32* sums, i32* signed_sum, u64* wide, i32* signed_ends) {
    i32 value = x[blockIdx.x * blockDim.x + threadIdx.x];
    u64 key = u64(u32(value)) << 20;
    atomicAdd(sums, u32(value));
    atomicMin(sums + 1, u32(value));
    atomicMax(sums + 2, u32(value));
    atomicAdd(signed_sum, value);
    atomicAdd(wide, key);
    atomicMin(wide + 1, key);
    atomicMax(wide + 2, key);
    atomicMin(signed_ends, value);
    atomicMax(signed_ends + 1, value);
}
GM_INSTANCES(atomics)

// --- numbers

GM_KERNEL void two_byte_floats(const f32* x, bf16* brain, f32* from_brain, f16* half, f32* from_half, i64 n) {
    for (i64 i = i64(blockIdx.x) * blockDim.x + threadIdx.x; i < n; i += i64(gridDim.x) * blockDim.x) {
        gm_store(brain + i, x[i]);
        gm_store(half + i, x[i]);
        from_brain[i] = gm_load(brain + i);
        from_half[i] = gm_load(half + i);
    }
}
GM_INSTANCES(two_byte_floats)

GM_KERNEL void float_bits(const f32* x, u32* bits, f32* back, i64 n) {
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) {
        bits[i] = gm_float_bits(x[i]);
        back[i] = gm_bits_float(bits[i]);
    }
}
GM_INSTANCES(float_bits)

GM_KERNEL void high_products(const u64* x, const u64* y, u64* out, i64 n) {
    for (i64 i = threadIdx.x; i < n; i += blockDim.x) out[i] = gm_mulhi(x[i], y[i]);
}
GM_INSTANCES(high_products)

// Doubles n numbers, 16 at a time.
template <typename T> GM_KERNEL void quads(const T* x, T* out, i32 n) {
    bool whole = gm_aligned(x) && gm_aligned(out);
    for (i32 i = 16 * i32(blockIdx.x * blockDim.x + threadIdx.x); i < n; i += 16 * i32(gridDim.x * blockDim.x)) {
        Compute<T> v[16];
        gm_load_some(x + i, v, n - i < 16 ? n - i : 16, whole);
        for (int j = 0; j < 16; ++j) v[j] += v[j];
        gm_store_some(out + i, v, n - i < 16 ? n - i : 16, whole);
    }
}
GM_INSTANCES(quads, (u8), (u32), (f16), (bf16), (f32), (f64))

// --- tensor cores

// d = c + a b, all 16 x 16 and row-major: a by ldmatrix, b by its transposing form, two tiles of d by one mma each.
GM_KERNEL void mma_by_ldmatrix(const bf16* a, const bf16* b, const f32* c, f32* d) {
    GM_SHARED(bf16, a_tile, 256);
    GM_SHARED(bf16, b_tile, 256);
    int lane = threadIdx.x;
    for (int i = lane; i < 256; i += 32) {
        a_tile[i] = a[i];
        b_tile[i] = b[i];
    }
    __syncwarp();
    u32 fragment_a[4], fragments_b[4];
    int at = lane % 16 * 16 + lane / 16 * 8;  // row lane % 16 of the left or right half
    gm_ldmatrix_x4(fragment_a, a_tile + at);
    gm_ldmatrix_x4_trans(fragments_b, b_tile + at);
    for (int half = 0; half < 2; ++half) {
        const u32 fragment_b[2] = {fragments_b[2 * half], fragments_b[2 * half + 1]};
        int first = lane / 4 * 16 + lane % 4 * 2 + 8 * half;
        float tile[4] = {c[first], c[first + 1], c[first + 128], c[first + 129]};
        gm_mma_bf16(tile, fragment_a, fragment_b);
        d[first] = tile[0];
        d[first + 1] = tile[1];
        d[first + 128] = tile[2];
        d[first + 129] = tile[3];
    }
}
GM_INSTANCES(mma_by_ldmatrix)

// The same for one tile, (16, 8), without ldmatrix: fragments element by element.
GM_KERNEL void mma_by_hand(const bf16* a, const bf16* b, f32* d) {
    int lane = threadIdx.x, group = lane / 4, pair = lane % 4 * 2;
    u32 fragment_a[4], fragment_b[2];
    for (int i = 0; i < 4; ++i) {
        const bf16* first = a + (group + i % 2 * 8) * 16 + pair + i / 2 * 8;
        fragment_a[i] = first[0].bits | u32(first[1].bits) << 16;
    }
    for (int i = 0; i < 2; ++i) {
        const bf16* first = b + (pair + i * 8) * 8 + group;
        fragment_b[i] = first[0].bits | u32(first[8].bits) << 16;
    }
    float tile[4] = {0, 0, 0, 0};
    gm_mma_bf16(tile, fragment_a, fragment_b);
    for (int i = 0; i < 4; ++i) d[(group + i / 2 * 8) * 8 + pair + i % 2] = tile[i];
}
GM_INSTANCES(mma_by_hand)
