/* What the convolutions with one bit a weight share: their geometry, and how their filters lie.
 *
 * Filters lie in blocks of LANES of one group, (group block u v byte LANES): one byte has the bits of 8 input channels,
 * lowest first, of one filter; of a block, filter j is at lane 2j and filter LANES/2 + j at lane 2j+1, such that sums
 * of the even and the odd lanes are in the order of filters. What fills the last block and the last byte is 0. Filters
 * of depthwise layers lie as depthwise.h says. */
#ifndef EDGETUNE_BINARY_H
#define EDGETUNE_BINARY_H

#include "lookup.h"
#include "threads.h"

enum { LANES = 32, STRIPE = 2 * LANES };  /* filters of a block, and of what one item computes */

typedef struct {
    int64_t n, h, w, p, q, groups, i, o, ku, kv, stride_h, stride_w, top, left, dil_h, dil_w, pad;
    int64_t bytes;  /* of the channels of one group, at one pixel of one filter */
} convolution;

/* The order of `sizes`: n h w p q, channels and filters of all groups, and the layer's own numbers. */
static inline convolution convolution_of(const int64_t *s) {
    convolution c = {.n = s[0], .h = s[1], .w = s[2], .p = s[3], .q = s[4], .ku = s[7], .kv = s[8], .stride_h = s[9],
                     .stride_w = s[10], .top = s[11], .left = s[12], .dil_h = s[15], .dil_w = s[16], .groups = s[17],
                     .pad = s[18]};
    c.i = s[5] / c.groups;
    c.o = s[6] / c.groups;
    c.bytes = (c.i + 7) / 8;
    return c;
}

static inline int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

/* Bytes of one block of filters. */
static inline int64_t block_bytes(const convolution *c) { return c->ku * c->kv * c->bytes * LANES; }

/* The first block of a stripe of filters. */
static inline const uint8_t *blocks_of(const convolution *c, const uint8_t *filters, int64_t group, int64_t stripe) {
    return filters + (group * parts(c->o, LANES) + 2 * stripe) * block_bytes(c);
}

/* Where filter f of a block lies. */
static inline int lane_of(int f) { return f < LANES / 2 ? 2 * f : 2 * f - LANES + 1; }

/* How many of k taps, `dil` apart from `first` on, lie in [0, size). */
static inline int64_t taps_inside(int64_t first, int64_t dil, int64_t k, int64_t size) {
    if (first >= 0 && first + (k - 1) * dil < size) return k;
    int64_t inside = 0;
    for (int64_t t = 0; t < k; t++) inside += first + t * dil >= 0 && first + t * dil < size;
    return inside;
}

/* Whether any output row meets the padded row. */
static inline int row_is_met(const convolution *c, int64_t row) {
    for (int64_t u = 0; u < c->ku; u++) {
        int64_t from = row - u * c->dil_h;
        if (from >= 0 && from % c->stride_h == 0 && from / c->stride_h < c->p) return 1;
    }
    return 0;
}

/* What becomes of the sums, times scale: gain and shift of a norm, a residual, bounds. y (n p q o), bits of its sign or
 * of sums that are at least `limits`, or both. */
typedef struct {
    const float *scale, *gain, *shift, *residual;
    float low, high;
    const int32_t *limits;
    const uint8_t *flips;
    float *y;
    uint64_t *bits;
    int64_t filters, words;  /* of the output: channels and words of a pixel */
    int aligned;  /* stripes begin with a word */
} answer;

/* `count` bits from channel `first` on to the words of a pixel, which others write to as well unless aligned. */
static inline void put_bits(const answer *a, int64_t pixel, int64_t first, uint64_t bits, int64_t count) {
    uint64_t *word = a->bits + pixel * a->words + first / 64;
    int64_t at = first % 64;
    if (a->aligned) {
        *word = bits;
        return;
    }
    __atomic_fetch_or(word, bits << at, __ATOMIC_RELAXED);
    if (at + count > 64) __atomic_fetch_or(word + 1, bits >> (64 - at), __ATOMIC_RELAXED);
}

static inline v8 load_few(const float *p, int64_t count) { return count >= 8 ? v8_load(p) : part_load(p, (int)count); }

/* scale, shift and residual of 8 sums. */
static inline v8 affine(const answer *a, v8 sums, int64_t first, int64_t at, int64_t count) {
    v8 y = sums;
    if (a->scale || a->shift)
        y = v8_fma(y, a->scale ? load_few(a->scale + first, count) : v8_all(1),
                   a->shift ? load_few(a->shift + first, count) : v8_all(0));
    return a->residual ? v8_add(y, load_few(a->residual + at, count)) : y;
}

#endif
