/* How numbers are written in groups: the least value of every group (float32), then the step of every group
 * (bfloat16), then the codes, in tiles of eight bytes.
 *
 * A tile holds 64/bits elements, eight rows of 8 at most: byte l has element l of the first row in its lowest bits,
 * of the second row in the next ones, and so on. The last tile is filled up with codes 0. Element = least + code*step,
 * a product that is exact in float32, so that a fused multiply-add changes nothing. A group with a number that isn't
 * finite, or beyond LARGEST, has NaN for both and codes 0. */
#ifndef EDGETUNE_GROUPS_H
#define EDGETUNE_GROUPS_H

#include "whole.h"

enum { BLOCK = 32, ROWS_OF_BLOCK = BLOCK / 8 };  /* elements that are drawn and written at once: whole tiles */

static const float LARGEST = 0x1p126f;    /* the distance of two numbers must be a float32, too */
static const float LEAST_STEP = 0x1p-110f;  /* 65536 over the step must be one as well */

typedef struct { float least, step; } scale;
typedef struct { uint8_t *least, *step, *codes; } places;

static inline int64_t groups_in(int64_t count, int64_t group) { return count / group + (count % group != 0); }

static inline places places_in(uint8_t *packed, int64_t count, int64_t group) {
    int64_t groups = groups_in(count, group);
    return (places){packed, packed + 4 * groups, packed + 6 * groups};
}

static inline int64_t bytes_of_codes(int64_t count, int bits) {
    int64_t tile = 64 / bits;
    return (count + tile - 1) / tile * 8;
}

/* A positive number, rounded up to what bfloat16 holds. */
static inline float bf16_upwards(float f) {
    uint32_t wide;
    memcpy(&wide, &f, sizeof wide);
    wide = (wide + 0xffff) & 0xffff0000u;
    memcpy(&f, &wide, sizeof f);
    return f;
}

static inline void put_scale(places to, int64_t group, scale s) {
    uint32_t wide;
    memcpy(&wide, &s.step, sizeof wide);
    uint16_t half = (uint16_t)(wide >> 16);
    memcpy(to.least + 4 * group, &s.least, sizeof s.least);
    memcpy(to.step + 2 * group, &half, sizeof half);
}

static inline scale get_scale(places from, int64_t group) {
    scale s;
    uint16_t half;
    memcpy(&s.least, from.least + 4 * group, sizeof s.least);
    memcpy(&half, from.step + 2 * group, sizeof half);
    s.step = bf16_to_float(half);
    return s;
}

#endif
