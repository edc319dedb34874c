/* g where its bit is set, 0 elsewhere: g (count), bits (ceil(count/8)) -> out (count). */
#include "simd.h"
#include "threads.h"

typedef struct { const element *g; const uint8_t *bits; element *out; int64_t count; } apply;

/* Elements are moved as they are, never converted. */
static inline void apply8(element *out, const element *g, unsigned mask) {
#ifdef ET_BF16
    for (int k = 0; k < 8; k++) out[k] = (element)(g[k] & -(mask >> k & 1));
#else
    v8_store(out, v8_keep(v8_load(g), mask));
#endif
}

/* Items are bytes of the mask. */
static void apply_bytes(const void *job, int64_t begin, int64_t end) {
    const apply *apply = job;
    const element *g = apply->g;
    const uint8_t *bits = apply->bits;
    element *out = apply->out;
    int64_t i = begin, whole = least(end, apply->count / 8);
    for (; i + 4 <= whole; i += 4)
        for (int k = 0; k < 4; k++) apply8(out + 8 * (i + k), g + 8 * (i + k), bits[i + k]);
    for (; i < whole; i++) apply8(out + 8 * i, g + 8 * i, bits[i]);
    for (int64_t k = 8 * i; k < least(8 * end, apply->count); k++) out[k] = bits[i] >> (k & 7) & 1 ? g[k] : 0;
}

void NAME(et_mask_apply)(const element *g, const uint8_t *bits, element *out, int64_t count, int threads) {
    apply job = {g, bits, out, count};
    et_parallel(apply_bytes, &job, (count + 7) / 8, 2 * count * (int64_t)sizeof *g, threads);
}
