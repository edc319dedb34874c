/* The numbers of what group_pack wrote: packed, as groups.h lays it out -> out (count). */
#include "groups.h"
#include "threads.h"

typedef struct { const uint8_t *packed; float *out; int64_t count, group; int bits; } unpack_job;

/* 4*bits bytes -> a block of 32 elements. */
static inline void unpack_block(const uint8_t *from, float *out, int bits, scale s) {
    for (int row = 0; row < ROWS_OF_BLOCK; row++) {
        int in_tile = row % (8 / bits);
        w8 tile = w8_load_bytes(from + (row - in_tile) * bits);
        w8 codes = w8_and(w8_right(tile, in_tile * bits), w8_all((1u << bits) - 1));
        v8_store(out + 8 * row, v8_fma(w8_float(codes), v8_all(s.step), v8_all(s.least)));
    }
}

static inline void unpack_group(const uint8_t *from, float *out, int64_t count, int bits, scale s) {
    int64_t i = 0;
    for (; i + BLOCK <= count; i += BLOCK) unpack_block(from + i / 8 * bits, out + i, bits, s);
    if (i == count) return;
    uint8_t bytes[4 * 8] = {0};
    float rest[BLOCK];
    memcpy(bytes, from + i / 8 * bits, (size_t)bytes_of_codes(count - i, bits));
    unpack_block(bytes, rest, bits, s);
    memcpy(out + i, rest, (size_t)(count - i) * sizeof *out);
}

/* Items are groups. */
static void unpack_groups(const void *data, int64_t begin, int64_t end) {
    const unpack_job *job = data;
    places from = places_in((uint8_t *)job->packed, job->count, job->group);
    for (int64_t g = begin; g < end; g++) {
        const uint8_t *codes = from.codes + g * (job->group / 8) * job->bits;
        float *out = job->out + g * job->group;
        int64_t count = least(job->group, job->count - g * job->group);
        scale s = get_scale(from, g);
        if (job->bits == 2) unpack_group(codes, out, count, 2, s);
        else if (job->bits == 4) unpack_group(codes, out, count, 4, s);
        else unpack_group(codes, out, count, 8, s);
    }
}

void et_group_unpack_f32(const uint8_t *packed, float *out, int64_t count, int bits, int64_t group, int threads) {
    unpack_job job = {packed, out, count, group, bits};
    et_parallel(unpack_groups, &job, groups_in(count, group), count * (int64_t)sizeof *out, threads);
}
