/* g where its bit is set, 0 elsewhere: g (count), bits (ceil(count/8)) -> out (count). */
#include "simd.h"
#include "threads.h"

typedef struct { const element *g; const uint8_t *bits; element *out; int64_t count; } apply;

/* Items are bytes of the mask. Elements are moved as they are, never converted. */
static void apply_bytes(const void *job, int64_t begin, int64_t end) {
    const apply *apply = job;
    for (int64_t i = begin; i < end; i++) {
        const element *g = apply->g + 8 * i;
        element *out = apply->out + 8 * i;
        unsigned mask = apply->bits[i];
        int64_t rest = apply->count - 8 * i;
#ifndef ET_BF16
        if (rest >= 8) {
            v8_store(out, v8_keep(v8_load(g), mask));
            continue;
        }
#else
        if (rest >= 8) {
            for (int k = 0; k < 8; k++) out[k] = (element)(g[k] & -(mask >> k & 1));
            continue;
        }
#endif
        for (int64_t k = 0; k < rest; k++) out[k] = mask >> k & 1 ? g[k] : 0;
    }
}

void NAME(et_mask_apply)(const element *g, const uint8_t *bits, element *out, int64_t count, int threads) {
    apply job = {g, bits, out, count};
    et_parallel(apply_bytes, &job, (count + 7) / 8, 2 * count * (int64_t)sizeof *g, threads);
}
