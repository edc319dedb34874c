/* Counts are summed as floats, which hold every integer up to 2^24: the caller keeps cells below that. */
#ifndef EDGETUNE_COUNTS_H
#define EDGETUNE_COUNTS_H
#include "simd.h"

/* Counts of cells up to 255 pixels are bytes, others int32. */
static inline void put_count(void *out, int64_t at, float count, int narrow) {
    if (narrow) ((uint8_t *)out)[at] = (uint8_t)count;
    else ((int32_t *)out)[at] = (int32_t)count;
}

static inline void put_counts(void *out, int64_t at, v8 counts, int narrow, int count) {
    if (narrow) {
        bytes8((uint8_t *)out + at, counts, count);
        return;
    }
    float lanes[8];
    v8_store(lanes, counts);
    for (int i = 0; i < count; i++) put_count(out, at + i, lanes[i], narrow);
}

static inline unsigned lanes_below(int count) { return (1u << count) - 1; }

#define NARROW (walk->cell_h * walk->cell_w <= 255)
#endif
