// Randomness as a function: Philox4x64-10 (Salmon, Moraes, Dror & Shaw 2011) and what is made of its words.
// The twin of gpumlp/random.py, word for word: key = (seed, purpose), counter = (block + 1, step, model, layer), and word w
// of a stream is word w % 4 of block w / 4. The counter starts at 1 because NumPy's Philox counts before it draws.
// Needs common.cuh before it.
#ifndef GPUMLP_PHILOX_CUH
#define GPUMLP_PHILOX_CUH

// gpumlp.random.Purpose; a test compares the numbers
enum Purpose : u32 {
    PURPOSE_WEIGHTS = 1,
    PURPOSE_SHUFFLE = 2,
    PURPOSE_DROPOUT = 3,
    PURPOSE_NOISE = 4,
    PURPOSE_MIXUP = 5,
    PURPOSE_SHIFT = 6,
    PURPOSE_SPLIT = 7,
    PURPOSE_DATA = 8,
};

// The high half of a 128-bit product.
GM_DEVICE u64 gm_mulhi(u64 x, u64 y) {
#ifdef __CUDACC__
    return __umul64hi(x, y);
#else
    return static_cast<u64>((static_cast<unsigned __int128>(x) * y) >> 64);
#endif
}

// out = Philox4x64-10(counter, key); out may be counter.
GM_DEVICE void philox(const u64 (&counter)[4], const u64 (&key)[2], u64 (&out)[4]) {
    u64 c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; ++round) {
        u64 high0 = gm_mulhi(0xD2E7470EE14C6C93ull, c0), low0 = 0xD2E7470EE14C6C93ull * c0;
        u64 high1 = gm_mulhi(0xCA5A826395121157ull, c2), low1 = 0xCA5A826395121157ull * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B97F4A7C15ull;  // golden ratio
        k1 += 0xBB67AE8584CAA73Bull;  // sqrt(3) - 1
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

struct PhiloxStream {
    u64 seed, purpose, step, model, layer;
};

// Words 4 block .. 4 block + 3: what a thread that needs several neighbours draws at once.
GM_DEVICE void philox_block(const PhiloxStream& stream, u64 block, u64 (&out)[4]) {
    const u64 counter[4] = {block + 1, stream.step, stream.model, stream.layer};
    const u64 key[2] = {stream.seed, stream.purpose};
    philox(counter, key, out);
}

// Word i of a block, by selection: an index that is known only at run time would put the array in local memory.
GM_DEVICE u64 philox_pick(const u64 (&block)[4], int i) {
    return i & 2 ? (i & 1 ? block[3] : block[2]) : (i & 1 ? block[1] : block[0]);
}

// 32-bit lane j (0 to 7) of a block, the low half of a word first.
GM_DEVICE u32 philox_pick_lane(const u64 (&block)[4], int j) {
    u64 word = philox_pick(block, j >> 1);
    return static_cast<u32>(j & 1 ? word >> 32 : word);
}

GM_DEVICE u64 philox_word(const PhiloxStream& stream, u64 w) {
    u64 block[4];
    philox_block(stream, w >> 2, block);
    return philox_pick(block, static_cast<int>(w & 3));
}

GM_DEVICE u32 philox_lane(const PhiloxStream& stream, u64 e) {
    u64 word = philox_word(stream, e >> 1);
    return static_cast<u32>(e & 1 ? word >> 32 : word);
}

// Dropout keeps element e; threshold = random.keep_threshold(rate).
GM_DEVICE bool philox_keep(const PhiloxStream& stream, u64 e, u32 threshold) {
    return philox_lane(stream, e) >= threshold;
}

// Uniform in (0, 1): ((word >> 12) + 1/2) / 2^52.
GM_DEVICE double gm_unit_interval(u64 word) {
    return (static_cast<double>(word >> 12) + 0.5) * 2.220446049250313e-16;
}

GM_DEVICE double philox_uniform(const PhiloxStream& stream, u64 i) { return gm_unit_interval(philox_word(stream, i)); }

// Box & Muller: elements 2i and 2i + 1 from words 2i and 2i + 1, which share a block.
GM_DEVICE void gm_box_muller(u64 first, u64 second, double& even, double& odd) {
    double radius = gm_sqrt(-2.0 * gm_log(gm_unit_interval(first)));
    double angle = 6.283185307179586 * gm_unit_interval(second);
    even = radius * gm_cos(angle);
    odd = radius * gm_sin(angle);
}

// cos and sin of 2 pi turn. On a GPU by the functions of pi x: those of x carry a way for huge arguments, in double.
GM_DEVICE void gm_circle(float turn, float& x, float& y) {
#ifdef __CUDACC__
    sincospif(2.0f * turn, &y, &x);
#else
    x = gm_cos(6.2831853f * turn);
    y = gm_sin(6.2831853f * turn);
#endif
}

// The same draws in float, to a few of its last bits. A uniform that rounds to 1 would have logarithm 0, so above 1/2 the
// logarithm is taken from 1 - u, whose word is the complement; turns lie between -1/2 and 1/2, where floats are finer.
GM_DEVICE void gm_box_muller(u64 first, u64 second, float& even, float& odd) {
    bool high = first >> 63;
    float u = (static_cast<float>((high ? ~first : first) >> 12) + 0.5f) * 2.220446049250313e-16f;
    float radius = gm_sqrt(-2.0f * (high ? gm_log1p(-u) : gm_log(u)));
    float turn = (static_cast<float>(static_cast<i64>(second) >> 12) + 0.5f) * 2.220446049250313e-16f;
    gm_circle(turn, even, odd);
    even *= radius;
    odd *= radius;
}

// Normals 4 block .. 4 block + 3, as float or double.
template <typename T> GM_DEVICE void philox_normals(const PhiloxStream& stream, u64 block, T (&out)[4]) {
    u64 words[4];
    philox_block(stream, block, words);
    gm_box_muller(words[0], words[1], out[0], out[1]);
    gm_box_muller(words[2], words[3], out[2], out[3]);
}

GM_DEVICE double philox_normal(const PhiloxStream& stream, u64 i) {
    double block[4];
    philox_normals(stream, i >> 2, block);
    return i & 2 ? (i & 1 ? block[3] : block[2]) : (i & 1 ? block[1] : block[0]);
}

// low <= integer < low + span from lane i; 0 < span <= 2^32.
GM_DEVICE long long philox_integer(const PhiloxStream& stream, u64 i, long long low, u64 span) {
    return low + static_cast<long long>((philox_lane(stream, i) * span) >> 32);
}

#endif
