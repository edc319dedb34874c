/* One bit an element, low < x < high, lowest bit first: x (count) -> bits (ceil(count/8)). */
#include "simd.h"
#include "threads.h"

typedef struct { const element *x; uint8_t *bits; int64_t count; float low, high; } pack;

/* Items are bytes of the mask. */
static void pack_bytes(const void *job, int64_t begin, int64_t end) {
    const pack *pack = job;
    v8 low = v8_all(pack->low), high = v8_all(pack->high);
    for (int64_t i = begin; i < end; i++) {
        int64_t rest = pack->count - 8 * i;
        if (rest >= 8) pack->bits[i] = (uint8_t)v8_inside(load8(pack->x + 8 * i, 8), low, high);
        else pack->bits[i] = (uint8_t)(v8_inside(load8(pack->x + 8 * i, (int)rest), low, high) & ((1u << rest) - 1));
    }
}

void NAME(et_mask_pack)(const element *x, uint8_t *bits, float low, float high, int64_t count, int threads) {
    pack job = {x, bits, count, low, high};
    et_parallel(pack_bytes, &job, (count + 7) / 8, count * (int64_t)sizeof *x, threads);
}
