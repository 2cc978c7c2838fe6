// Kernels that are wrong, each in one way: tests/test_emulator.py shows which gate catches it.

// held is read before the others have written it. In order, thread 0 first, all is well.
GM_KERNEL void no_barrier(const f32* x, f32* out) {
    GM_SHARED(f32, held, 256);
    held[threadIdx.x] = x[threadIdx.x];
    if (threadIdx.x + 1 == blockDim.x) {
        f32 total = 0;
        for (u32 i = 0; i < blockDim.x; ++i) total += held[i];
        *out = total;
    }
}
GM_INSTANCES(no_barrier)

// The last value of a warp's lanes is read before they have written it: __syncwarp is missing.
GM_KERNEL void no_warp_barrier(const f32* x, f32* out) {
    GM_SHARED(f32, held, 256);
    held[threadIdx.x] = gm_warp_sum(x[threadIdx.x]);
    out[threadIdx.x] = held[threadIdx.x ^ 1];
}
GM_INSTANCES(no_warp_barrier)

GM_KERNEL void unreached_barrier(f32* out, u32 n) {
    if (threadIdx.x < n) return;
    __syncthreads();
    out[threadIdx.x] = 1;
}
GM_INSTANCES(unreached_barrier)

// As many arrive as a barrier wants, but at two of them.
GM_KERNEL void two_barriers(f32* out) {
    if (threadIdx.x < 32)
        __syncthreads();  // the first
    else
        __syncthreads();
    out[threadIdx.x] = 1;
}
GM_INSTANCES(two_barriers)

// Half of a warp waits for lanes that wait for the block.
GM_KERNEL void barrier_beside_shuffle(f32* out) {
    f32 x = 1;
    if (threadIdx.x & 1)
        __syncthreads();
    else
        x = gm_warp_sum(x);
    out[threadIdx.x] = x;
}
GM_INSTANCES(barrier_beside_shuffle)

GM_KERNEL void vote_beside_shuffle(f32* out) {
    f32 x = 1;
    if (threadIdx.x & 1)
        x = __any_sync(0xFFFFFFFFu, 1) ? 2.0f : 3.0f;
    else
        x = __shfl_sync(0xFFFFFFFFu, x, 0);
    out[threadIdx.x] = x;
}
GM_INSTANCES(vote_beside_shuffle)

GM_KERNEL void not_in_its_mask(f32* out) { out[threadIdx.x] = __shfl_sync(0x0000FFFFu, 1.0f, 0); }
GM_INSTANCES(not_in_its_mask)

GM_KERNEL void one_past_the_end(const f32* x, f32* out, i32 n) {
    f32 total = 0;
    for (i32 i = threadIdx.x; i <= n; i += blockDim.x) total += x[i];  // <= for <
    out[threadIdx.x] = total;
}
GM_INSTANCES(one_past_the_end)

GM_KERNEL void past_shared_memory(f32* out) {
    GM_SHARED(f32, held, 32);
    f32* end = held + blockDim.x;
    end[threadIdx.x] = 1;  // outside for every thread of a block of 32
    out[threadIdx.x] = held[threadIdx.x];
}
GM_INSTANCES(past_shared_memory)

GM_KERNEL void misaligned(const f32* x, f32* out) {
    f32 v[4];
    gm_load_quads(x + threadIdx.x, v);
    out[threadIdx.x] = v[0];
}
GM_INSTANCES(misaligned)

GM_KERNEL void misaligned_ldmatrix(u32* out) {
    GM_SHARED(bf16, tile, 512);
    u32 fragment[4];
    gm_ldmatrix_x4(fragment, tile + threadIdx.x);
    out[threadIdx.x] = fragment[0];
}
GM_INSTANCES(misaligned_ldmatrix)

// The first block writes what the others read.
GM_KERNEL void shared_by_one_block(f32* out) {
    GM_SHARED(f32, held, 32);
    if (blockIdx.x == 0) held[threadIdx.x] = 1;
    __syncthreads();
    out[blockIdx.x * blockDim.x + threadIdx.x] = held[threadIdx.x];
}
GM_INSTANCES(shared_by_one_block)

// As a float atomicAdd: the sum depends on who comes first, among threads and among blocks.
GM_KERNEL void sum_in_any_order(const f32* x, f32* total) { *total += x[blockIdx.x * blockDim.x + threadIdx.x]; }
GM_INSTANCES(sum_in_any_order)

// Rows that a model does not use are left as they were.
GM_KERNEL void half_written(f32* out) {
    if (threadIdx.x % 2) out[threadIdx.x] = 1;
}
GM_INSTANCES(half_written)

// Not wrong; for graphs: adds a number that is fixed at capture and one that is read from memory.
GM_KERNEL void advance(f32* x, f32 fixed, const f32* step) { x[threadIdx.x] += fixed + *step; }
GM_INSTANCES(advance)
