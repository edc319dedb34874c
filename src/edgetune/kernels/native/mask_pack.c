/* One bit an element, low < x < high, lowest bit first: x (count) -> bits (ceil(count/8)). */
#include "simd.h"
#include "threads.h"

typedef struct { const element *x; uint8_t *bits; int64_t count; float low, high; } pack;

/* Items are bytes of the mask. */
static void pack_bytes(const void *job, int64_t begin, int64_t end) {
    const pack *pack = job;
    v8 low = v8_all(pack->low), high = v8_all(pack->high);
    int64_t i = begin, whole = pack->count / 8;
    for (; i + 4 <= least(end, whole); i += 4) {
        uint32_t four = 0;
        for (int k = 0; k < 4; k++) four |= v8_inside(load8(pack->x + 8 * (i + k), 8), low, high) << (8 * k);
        for (int k = 0; k < 4; k++) pack->bits[i + k] = (uint8_t)(four >> (8 * k));
    }
    for (; i < end; i++) {
        int64_t rest = pack->count - 8 * i;
        int here = (int)least(8, rest);
        unsigned mask = v8_inside(load8(pack->x + 8 * i, here), low, high);
        pack->bits[i] = (uint8_t)(mask & ((1u << here) - 1));
    }
}

void NAME(et_mask_pack)(const element *x, uint8_t *bits, float low, float high, int64_t count, int threads) {
    pack job = {x, bits, count, low, high};
    et_parallel(pack_bytes, &job, (count + 7) / 8, count * (int64_t)sizeof *x, threads);
}
