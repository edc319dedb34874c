/* Codes of 8, 4 or 2 bits between the least and the greatest value of every group, rounded up or down by chance:
 * x (count) -> packed, as groups.h lays it out.
 *
 * Chance is a hash of (seed, group, element): the same for any number of threads, and in the fallback. */
#include "groups.h"
#include "threads.h"

typedef struct {
    const element *x;
    uint8_t *packed;
    int64_t count, group;
    uint64_t seed;
    int bits, stochastic;
} group_job;

typedef struct { uint32_t first, second; } group_key;

/* The finaliser of splitmix64 (Steele, Lea, Flood, 2014) on seed + (group + 1) * 2^64/phi. */
static inline group_key key_of(uint64_t seed, int64_t group) {
    uint64_t z = seed + ((uint64_t)group + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    z ^= z >> 31;
    return (group_key){(uint32_t)z, (uint32_t)(z >> 32)};
}

/* 32 bits of chance a lane: a finaliser of two products (constants: C. Wellons, hash-prospector), keyed twice. */
static inline w8 chance(uint32_t counter, group_key key) {
    w8 z = w8_xor(w8_from(counter), w8_all(key.first));
    z = w8_mul(w8_xor(z, w8_right(z, 16)), w8_all(0x21f0aaadu));
    z = w8_add(w8_xor(z, w8_right(z, 15)), w8_all(key.second));
    z = w8_mul(z, w8_all(0xd35a2d97u));
    return w8_xor(z, w8_right(z, 15));
}

/* Least value and step; the step is rounded up to bfloat16, so that all codes reach the greatest value. */
static scale scale_of(const element *x, int64_t count, float levels) {
    float lows[8], highs[8], odd[8], low = to_float(x[0]), high = low, strange = 0;
    v8 lowest = v8_all(low), highest = lowest, nans = v8_all(0);
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        v8 v = load8(x + i, 8);
        lowest = v8_least(lowest, v);
        highest = v8_most(highest, v);
        nans = v8_fma(v, v8_all(0), nans);  /* NaN from the first NaN or infinity on */
    }
    v8_store(lows, lowest);
    v8_store(highs, highest);
    v8_store(odd, nans);
    for (int k = 0; k < 8; k++) {
        low = lows[k] < low ? lows[k] : low;
        high = highs[k] > high ? highs[k] : high;
        strange += odd[k];
    }
    for (; i < count; i++) {
        float v = to_float(x[i]);
        low = v < low ? v : low;
        high = v > high ? v : high;
        strange += v * 0;
    }
    if (strange != 0 || !(low >= -LARGEST) || !(high <= LARGEST)) return (scale){__builtin_nanf(""), __builtin_nanf("")};
    low += 0.0f;  /* no -0 */
    if (high == low) return (scale){low, 0};
    float step = (high - low) * (1 / levels);
    return (scale){low, bf16_upwards(step > LEAST_STEP ? step : LEAST_STEP)};
}

/* Codes of eight elements: their distance from the least value in 65536ths of a step, and chance on top. */
static inline w8 codes8(const element *x, scale s, float per_step, uint32_t top, w8 noise) {
    w8 place = w8_nearest(v8_mul(v8_add(load8(x, 8), v8_all(-s.least)), v8_all(per_step)));
    return w8_right(w8_add(w8_least(place, w8_all(top)), noise), 16);
}

/* A block of 32 elements from number `at` of its group on -> 4*bits bytes. */
static inline void pack_block(const element *x, uint8_t *to, int bits, scale s, float per_step, int64_t at,
                              const group_key *key) {
    w8 codes[ROWS_OF_BLOCK];
    for (int row = 0; row < ROWS_OF_BLOCK; row += 2) {
        w8 drawn = key ? chance((uint32_t)(at / 2 + 4 * row), *key) : w8_all(0x80008000u);
        uint32_t top = ((1u << bits) - 1) << 16;
        codes[row] = codes8(x + 8 * row, s, per_step, top, w8_and(drawn, w8_all(0xffff)));
        codes[row + 1] = codes8(x + 8 * row + 8, s, per_step, top, w8_right(drawn, 16));
    }
    for (int row = 0; row < ROWS_OF_BLOCK; row += 8 / bits) {
        w8 tile = codes[row];
        for (int k = 1; k < 8 / bits; k++) tile = w8_or(tile, w8_left(codes[row + k], k * bits));
        w8_store_bytes(to + row * bits, tile);
    }
}

/* One group; the last block of a short one is filled up with the least value, whose code is 0. */
static inline void pack_group(const element *x, uint8_t *to, int64_t count, int bits, scale s, const group_key *key) {
    float per_step = s.step > 0 ? 65536 / s.step : 0;
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) pack_block(x + i, to + i / 8 * bits, bits, s, per_step, i, key);
    if (i == count) return;
    element rest[BLOCK];
    uint8_t bytes[4 * 8];
    for (int k = 0; k < BLOCK; k++) rest[k] = i + k < count ? x[i + k] : from_float(s.least);
    pack_block(rest, bytes, bits, s, per_step, i, key);
    memcpy(to + i / 8 * bits, bytes, (size_t)bytes_of_codes(count - i, bits));
}

/* Items are groups. */
static void pack_groups(const void *data, int64_t begin, int64_t end) {
    const group_job *job = data;
    places to = places_in(job->packed, job->count, job->group);
    for (int64_t g = begin; g < end; g++) {
        const element *x = job->x + g * job->group;
        uint8_t *codes = to.codes + g * (job->group / 8) * job->bits;
        int64_t count = least(job->group, job->count - g * job->group);
        scale s = scale_of(x, count, (float)((1 << job->bits) - 1));
        put_scale(to, g, s);
        group_key drawn = key_of(job->seed, g), *key = job->stochastic ? &drawn : NULL;
        if (s.step != s.step) memset(codes, 0, (size_t)bytes_of_codes(count, job->bits));
        else if (job->bits == 2) pack_group(x, codes, count, 2, s, key);
        else if (job->bits == 4) pack_group(x, codes, count, 4, s, key);
        else pack_group(x, codes, count, 8, s, key);
    }
}

void NAME(et_group_pack)(const element *x, uint8_t *packed, int64_t count, int bits, int64_t group, int64_t seed,
                         int stochastic, int threads) {
    group_job job = {x, packed, count, group, (uint64_t)seed, bits, stochastic};
    et_parallel(pack_groups, &job, groups_in(count, group), count * (int64_t)sizeof *x, threads);
}
